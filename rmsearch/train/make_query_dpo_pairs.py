"""Queries that a row of a corpus serves less and less, or ones that it serves against ones that share its words."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from rmsearch.cli import main
from rmsearch.datasets.chain import QueryChoices, QueryLadder
from rmsearch.errors import ConfigError
from rmsearch.preferences.ladders import (
    LadderFlags,
    Task,
    ask_ladders,
    list_schema,
    object_schema,
    query_choices_row,
    query_ladder_row,
    require_distinct,
    require_language,
    some_ladders,
    strings,
)
from rmsearch.stage import Run, ignored, option, stage
from rmsearch.storage.records import read_models, write_records

LONG_ANSWERS = 6000  # tokens, of variant 3


class QueryPairsConfig(LadderFlags):
    """Config of `rmsearch train make_query_dpo_pairs`."""

    variant: int = option(
        1, "1: ladders of fine steps; 2: of large steps; 3: supported claims against shared words.", ge=1, le=3
    )
    n_query_generation: int = option(5, "Queries per key; variant 3: of each of both kinds.", ge=1)
    max_characters: int = option(
        8000,
        "Longer rows are cut to whole sentences of so many characters; further when instruction, row and answer would "
        "not fit into --max-model-len.",
        ge=20,
    )
    max_tokens: int = option(1200, f"Tokens of an answer at most; variant 3: {LONG_ANSWERS} by default.", ge=1)
    min_tokens: int = ignored(512, "an answer ends where its form ends.")

    @model_validator(mode="before")
    @classmethod
    def _long_answers(cls, values: Any) -> Any:
        variant = values.get("variant", cls.model_fields["variant"].default)
        return {"max_tokens": LONG_ANSWERS} | values if str(variant) == "3" else values

    def check(self) -> int:
        """As `LadderFlags.check`, for these flags, too."""
        if self.variant < 3 and self.n_query_generation < 2:
            raise ConfigError("a ladder has two queries or more", where="--n-query-generation")
        return super().check()


@stage("train.make_query_dpo_pairs")
def make_query_dpo_pairs(config: QueryPairsConfig, run: Run) -> None:
    """Make queries of falling fit for every row of a corpus.

    A language model writes --n-query-generation queries per row, from the one that the row serves best to the one that
    it serves least; variant 2 takes larger steps; variant 3 contrasts claims that the row supports in other words with
    claims that use its words and that it does not support. 6 types of queries and 4 ways of moving off take turns.
    Answers of the wrong form are asked again, then rejected; nothing is filled in.
    """
    rows, count = config.check(), config.n_query_generation
    lists = ("chosen_queries", "rejected_queries") if config.variant == 3 else ("queries",)
    kind: Any = QueryChoices if config.variant == 3 else QueryLadder

    def ladder(task: Task, value: Any, tag: str) -> QueryLadder | QueryChoices:
        found = {name: strings(value, name, count) for name in lists}
        queries = [query for name in lists for query in found[name]]
        require_distinct(queries, "queries", [task.text], "the row itself")
        require_language(queries, task.text)
        types = [task.parts[0]["name"]] * len(queries)
        return kind(**found, key=task.text, df_id=task.row_id, query_types=types, prompt=tag)

    run.counts["rows"] = rows
    ladders = ask_ladders(
        run,
        config,
        f"query_ladder_{config.variant}",
        ("types", "ways"),
        config.max_characters,
        object_schema(**dict.fromkeys(lists, list_schema(count))),
        ladder,
        rows,
        n=count,
    )
    run.counts["ladders"] = write_records(config.output, some_ladders(ladders))
    if config.adpo_output:
        row: Any = query_choices_row if config.variant == 3 else query_ladder_row
        write_records(config.adpo_output, map(row, read_models(config.output, kind)))


if __name__ == "__main__":
    main(make_query_dpo_pairs)
