"""Flags of both judging stages, and the names of the files that they write."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationInfo, field_validator, model_validator

from rmsearch.flags import QrelsFlags
from rmsearch.llm.asking import GeneratorFlags
from rmsearch.stage import model, option, source, target


class JudgeFlags(QrelsFlags, GeneratorFlags):
    """Flags of both judging stages."""

    query_key_set: str | None = source(None, "Sampled sets to judge (required).")
    query_key_s: str | None = source(None, "Another name of --query-key-set.")
    relevant_json: str | None = source(None, "Another name of --query-key-set.")
    output: str = target("dataset_list.json", "Training records to write (.json, .jsonl, .parquet, each also .gz).")
    output_test: str | None = target(None, "Test records; by default beside --output, with test for train in its name.")
    output_ties: str | None = target(None, "Pairs without a preference; by default beside --output.")

    judge: Literal["llm", "reward", "labels"] = option(
        "llm", "Who decides: a language model, a teacher reward model, or labels (qrels, else the sets' positive_ids)."
    )
    model_name: str = model("", "The judge: language or reward model (folder, s3:// URI, or name). Not for labels.")
    sample_pairs: int = option(0, "Pairs of each set to judge, chosen by the seed; 0: all.", ge=0)
    split: str = option("train", "Split of the data set whose qrels decide, for labels.")
    test_share: float = option(0.1, "Share of the queries whose pairs become test records.", ge=0, le=1)
    record_form: Literal["raw", "messages"] = option("raw", "Raw query and keys, or upstream's rendered chats.")
    margin_max: float = option(6.0, "Largest margin, in rewards.", gt=0)
    margin_scale: float = option(1.0, "A teacher's difference times this is the margin (reward).", gt=0)
    tie_margin: float = option(0.0, "A teacher's difference up to this is a tie (reward).", ge=0)
    constrain: bool = option(True, "Have the server allow only 1, 2 or tie; off for one that refuses that (llm).")
    top_logprobs: int = option(
        20,
        "Alternatives per token that the confidence is read from; 0 for a server that gives none (llm).",
        ge=0,
        le=20,
    )
    max_characters: int = option(4000, "Characters of a query or key that the judge reads (llm).", ge=1)

    @field_validator("output_test", "output_ties")
    @classmethod
    def _beside(cls, value: str | None, info: ValidationInfo) -> str | None:
        side = str(info.field_name).removeprefix("output_")
        return value or ("output" in info.data and beside(info.data["output"], side)) or None

    @model_validator(mode="after")
    def _complete(self) -> JudgeFlags:
        given = [each for each in (self.query_key_set, self.query_key_s, self.relevant_json) if each]
        if len(given) != 1:
            raise ValueError("--query-key-set is needed, once, under one of its names")
        if len({self.output, self.output_test, self.output_ties}) < 3:
            raise ValueError("--output, --output-test and --output-ties must differ")
        if self.judge != "labels" and not self.model_name:
            raise ValueError(f"--judge {self.judge} needs --model-name")
        return self

    @property
    def sets(self) -> str:
        """The file to judge."""
        return self.query_key_set or self.query_key_s or self.relevant_json or ""


def beside(output: str, side: str) -> str:
    """The output's name with ``side`` in place of its last "train", else before its suffixes."""
    folder, slash, name = output.rpartition("/")
    if "train" in name:
        head, _, tail = name.rpartition("train")
        return f"{folder}{slash}{head}{side}{tail}"
    stem, dot, suffixes = name.partition(".")
    return f"{folder}{slash}{stem}_{side}{dot}{suffixes}"
