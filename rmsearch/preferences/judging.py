"""What the judging stages share: their flags, which keys are compared, the split by query, the files they write."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from itertools import combinations
from tempfile import TemporaryFile
from typing import IO, Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from rmsearch.errors import ConfigError
from rmsearch.flags import QrelsFlags
from rmsearch.llm.asking import GeneratorFlags
from rmsearch.preferences.judges import Comparison, Contest
from rmsearch.preferences.verdicts import Verdict
from rmsearch.prompts.templates import TEMPLATES
from rmsearch.stage import Run, model, option, source, target

MESSAGES = TEMPLATES["upstream_lora"]
Side = Literal["train", "test", "ties"]


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


def side_of(query: str, seed: int, test_share: float) -> Literal["train", "test"]:
    """Where a query belongs: decided by its own text (case and white space apart), so that other queries, whether
    added or gone, never move it."""
    place = int.from_bytes(_digest(query, str(seed)), "big") / 2**128
    return "test" if place < test_share else "train"


def _digest(query: str, salt: str = "") -> bytes:
    text = f"{salt}\n{' '.join(query.split()).casefold()}"
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def comparisons(contests: Iterable[Contest], sample: int, seed: int) -> Iterator[Comparison]:
    """``sample`` of the pairs of each contest's keys, the same for the same seed; 0: all.

    Where keys are known to serve the query, pairs have at least one of them: two others teach little.
    """
    number = 0
    for place, contest in enumerate(contests):
        pairs = list(combinations(range(len(contest.keys)), 2))
        positive = {i for i, key in enumerate(contest.key_ids) if key in (contest.positive_ids or ())}
        if positive:
            pairs = [pair for pair in pairs if positive & set(pair)]
        if sample and sample < len(pairs):
            chance = random.Random(f"{seed}\n{contest.query_id}\n{contest.query}".encode("utf-8", "surrogatepass"))
            pairs = sorted(chance.sample(pairs, sample))
        for first, second in pairs:
            yield Comparison(number, place, contest, first, second)
            number += 1


def count_comparisons(contests: Iterable[Contest], sample: int, where: str) -> int:
    """How many there will be. Reads the whole file, so that it is known to be sound before any answer is paid."""
    total = sum(1 for _ in comparisons(contests, sample, 0))
    if not total:
        remedy = "Make some with sample_dpo_batch or sample_advanced_dpo_batch"
        raise ConfigError("holds no sets to judge", where=where, remedy=remedy)
    return total


def as_messages(query: str, key: str) -> list[dict[str, str]]:
    """Upstream's prompt of its training data, filled in."""
    texts = {"{query}": query, "{key}": key}
    return [
        {"role": each.role, "content": re.sub(r"\{query\}|\{key\}", lambda match: texts[match[0]], each.content)}
        for each in MESSAGES.messages
    ]


def tie_record(comparison: Comparison, verdict: Verdict, decided: str) -> dict[str, Any]:
    """A pair without a preference, with the reason and the judge's lean (above 0: to the first key)."""
    contest, at = comparison.contest, (comparison.first, comparison.second)
    return {
        "query": contest.query,
        "first_key": contest.keys[at[0]],
        "second_key": contest.keys[at[1]],
        "query_id": contest.query_id,
        "first_key_id": contest.key_ids[at[0]],
        "second_key_id": contest.key_ids[at[1]],
        "lean": None if verdict.score is None else round(verdict.score, 6),
        "reason": verdict.reason,
        "query_type": contest.query_type,
        "source": decided,
    }


@contextmanager
def collecting(config: JudgeFlags) -> Iterator[Records]:
    """Records that wait in temporary files until all are there."""
    with TemporaryFile() as train, TemporaryFile() as test, TemporaryFile() as ties:
        yield Records(config, {"train": train, "test": test, "ties": ties})


class Records:
    """Records on their way into train, test and ties."""

    def __init__(self, config: JudgeFlags, files: Mapping[Side, IO[bytes]]) -> None:
        self._config, self._files = config, files
        self._queries: dict[Side, set[bytes]] = {"train": set(), "test": set(), "ties": set()}
        self.counts: Counter[Side] = Counter()

    def put(self, query: str, record: dict[str, Any], *, tie: bool = False) -> None:
        """A record of a query: to its side, or to the ties."""
        side: Side = "ties" if tie else side_of(query, self._config.seed, self._config.test_share)
        self._files[side].write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._queries[side].add(_digest(query))
        self.counts[side] += 1

    def write(self, run: Run) -> None:
        """Write the three files and count. Raises ConfigError when there is no preference at all."""
        from rmsearch.storage.records import write_records

        config = self._config
        if not self.counts["train"] + self.counts["test"]:
            remedy = "See the tie rate; --judge labels needs sets with a key that is labelled"
            raise ConfigError(f"no preference is left: {self.counts['ties']} ties", where=config.sets, remedy=remedy)
        places: dict[Side, str | None] = {
            "ties": config.output_ties,
            "test": config.output_test,
            "train": config.output,
        }
        for side, place in places.items():
            assert place is not None
            write_records(place, self._read(side))
        for side in ("train", "test"):
            run.counts |= {side: self.counts[side], f"{side}_queries": len(self._queries[side])}
        run.counts["overlap"] = len(self._queries["train"] & self._queries["test"])

    def _read(self, side: Side) -> Iterator[dict[str, Any]]:
        self._files[side].seek(0)
        return (json.loads(line) for line in self._files[side])
