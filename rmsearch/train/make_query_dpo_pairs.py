"""Queries that a row of a corpus serves less and less, or ones that it serves against ones that share its words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import model_validator

from rmsearch.cli import main
from rmsearch.datasets.chain import AdvancedRow, QueryChoices, QueryLadder
from rmsearch.engines.generation import Generation
from rmsearch.errors import ConfigError
from rmsearch.llm.asking import Question, ask, json_value
from rmsearch.llm.instructions import Instruction, instruction
from rmsearch.preferences.ladders import (
    LadderFlags,
    combination,
    fitting,
    query_choices_row,
    query_ladder_row,
    require_distinct,
    require_language,
    strings,
)
from rmsearch.stage import Run, ignored, option, stage

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

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of an answer's lists."""
        return ("chosen_queries", "rejected_queries") if self.variant == 3 else ("queries",)


@dataclass(frozen=True)
class Task:
    """A row, and the type of query and the way of moving off whose turn it is."""

    row_id: str
    text: str
    type: dict[str, str]
    way: dict[str, str]


Ladder = QueryLadder | QueryChoices


@stage("train.make_query_dpo_pairs")
def make_query_dpo_pairs(config: QueryPairsConfig, run: Run) -> None:
    """Make queries of falling fit for every row of a corpus.

    A language model writes --n-query-generation queries per row, from the one that the row serves best to the one that
    it serves least; variant 2 takes larger steps; variant 3 contrasts claims that the row supports in other words with
    claims that use its words and that it does not support. 6 types of queries and 4 ways of moving off take turns.
    Answers of the wrong form are asked again, then rejected; nothing is filled in.
    """
    from rmsearch.storage.records import read_models, write_records

    rows = config.check()
    run.counts["rows"] = rows
    run.counts["ladders"] = write_records(config.output, _some(_ladders(config, run, rows)))
    if config.adpo_output:
        advanced: Iterable[AdvancedRow]
        if config.variant == 3:
            advanced = map(query_choices_row, read_models(config.output, QueryChoices))
        else:
            advanced = map(query_ladder_row, read_models(config.output, QueryLadder))
        write_records(config.adpo_output, advanced)


def _ladders(config: QueryPairsConfig, run: Run, rows: int) -> Iterator[Ladder]:
    spec, count = instruction(f"query_ladder_{config.variant}"), config.n_query_generation
    schema = answer_schema(config.lists, count)

    def questions() -> Iterator[Question[Task]]:
        run.counts["cut_rows"] = 0
        for task in _tasks(config, run, spec):
            messages = spec.messages(text=task.text, types=task.type["text"], ways=task.way["text"], n=count)
            yield Question(task, messages, schema=schema)

    def parse(task: Task, generation: Generation) -> Ladder:
        return parse_answer(task, json_value(generation), config.lists, count, spec.tag)

    for answer in ask(run, config, questions(), parse, rows):
        yield answer.value
    run.check_rejects(int(run.counts["questions"]))


def _tasks(config: QueryPairsConfig, run: Run, spec: Instruction) -> Iterator[Task]:
    types, ways = spec.parts["types"], spec.parts["ways"]
    fit = fitting(config, spec, config.max_characters, n=config.n_query_generation)
    for position, row in enumerate(config.rows()):
        kind, way = combination(position, len(types), len(ways))
        text = fit(row.text.strip())
        run.counts["cut_rows"] += len(text) < len(row.text.strip())  # type: ignore[operator]
        yield Task(row.id, text, types[kind], ways[way])


def answer_schema(lists: Iterable[str], count: int) -> dict[str, Any]:
    """The JSON schema of an answer with so many queries in each list."""
    queries = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": count, "maxItems": count}
    names = list(lists)
    properties = dict.fromkeys(names, queries)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def parse_answer(task: Task, value: Any, lists: tuple[str, ...], count: int, tag: str) -> Ladder:
    """The ladder, or the choices, of an answer; ValueError says why it is none."""
    found = {name: strings(value, name, count) for name in lists}
    queries = [query for name in lists for query in found[name]]
    require_distinct(queries, "queries", [task.text], "the row itself")
    require_language(queries, task.text)
    kind: Callable[..., Ladder] = QueryChoices if len(lists) == 2 else QueryLadder
    types = [task.type["name"]] * len(queries)
    return kind(**found, key=task.text, df_id=task.row_id, query_types=types, prompt=tag)


def _some(ladders: Iterable[Ladder]) -> Iterator[Ladder]:
    """The ladders; ConfigError when there is none."""
    empty = True
    for ladder in ladders:
        empty = False
        yield ladder
    if empty:
        raise ConfigError("gave no ladder at all", where="the language model", remedy="See the rejects file")


if __name__ == "__main__":
    main(make_query_dpo_pairs)
