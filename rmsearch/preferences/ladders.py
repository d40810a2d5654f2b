"""Ladders: texts of falling relevance from a language model. What is asked next, what an answer must hold, and the
rows that a ladder gives for training."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rmsearch.datasets.chain import AdvancedRow, Candidate, KeyLadder, QueryChoices, QueryLadder
from rmsearch.datasets.corpus import CorpusFlags, nonempty
from rmsearch.datasets.records import PreferencePair
from rmsearch.errors import ConfigError
from rmsearch.llm.asking import GeneratorFlags, Question, ask, json_value
from rmsearch.llm.budget import Fitting
from rmsearch.llm.instructions import instruction
from rmsearch.llm.languages import language
from rmsearch.stage import Run, fields_with_role, option, target
from rmsearch.storage.records import suffix_of

L = TypeVar("L")
LONG = 80  # characters of a text whose language can be told from it alone
_MARKS = ".,;:!?\"'()[]“”‘’„«»*`。、！？"


class LadderFlags(CorpusFlags, GeneratorFlags):
    """A corpus to make ladders of, and how the language model samples for it."""

    output: str = target(..., "Ladders to write (.json, .jsonl, .csv, .parquet, each also .gz).")
    adpo_output: str | None = target(None, "Rows for `rmsearch train adpo_lora` (batch, dpo_pairs) to write besides.")
    max_tokens: int = option(1200, "Tokens of an answer at most.", ge=1)
    temperature: float = option(0.2, "Sampling temperature; 0 takes the likeliest token.", ge=0)
    top_p: float = option(0.9, "Nucleus sampling.", gt=0, le=1)

    def check(self) -> int:
        """Number of rows. All that can be wrong with corpus and outputs shows here, before a model is asked."""
        for name in fields_with_role(type(self), "target"):
            if output := getattr(self, name):
                suffix_of(output)
        return sum(1 for _ in self.rows())


@dataclass(frozen=True)
class Task:
    """A row, cut to what the model reads, and those of the instruction's parts whose turn it is."""

    row_id: str
    text: str
    parts: tuple[dict[str, str], dict[str, str]]


def ask_ladders(
    run: Run,
    flags: LadderFlags,
    name: str,
    cycles: tuple[str, str],
    max_characters: int,
    schema: dict[str, Any],
    parse: Callable[[Task, Any, str], L],
    rows: int,
    **fields: Any,
) -> Iterator[L]:
    """What ``parse(task, value, tag)`` makes of the model's answers, a row at a time.

    ``name``: the instruction; ``cycles``: the lists of its parts that take turns; ``fields``: its other fields. Rows
    are cut to ``max_characters`` and so that the instruction with its longest parts, the row and the answer fit into
    the model.
    """
    spec = instruction(name)
    first, second = (spec.parts[cycle] for cycle in cycles)
    longest = {cycle: max((part["text"] for part in spec.parts[cycle]), key=len) for cycle in cycles}
    fit = Fitting(flags, spec.messages(text="", characters=max_characters, **longest, **fields), max_characters)

    def questions() -> Iterator[Question[Task]]:
        cut = 0
        for position, row in enumerate(flags.rows()):
            whole = row.text.strip()
            text = fit(whole)
            cut += len(text) < len(whole)
            one, other = combination(position, len(first), len(second))
            parts = (first[one], second[other])
            chosen = {cycle: part["text"] for cycle, part in zip(cycles, parts, strict=True)}
            messages = spec.messages(text=text, characters=len(text), **chosen, **fields)
            run.counts["cut_rows"] = cut
            yield Question(Task(row.id, text, parts), messages, schema=schema)

    for answer in ask(run, flags, questions(), lambda task, said: parse(task, json_value(said), spec.tag), rows):
        yield answer.value
    run.check_rejects(int(run.counts["questions"]))


def some_ladders(ladders: Iterable[L]) -> Iterator[L]:
    """The ladders; ConfigError when there is none."""
    return nonempty(
        ladders, ConfigError("gave no ladder at all", where="the language model", remedy="See the rejects file")
    )


def combination(position: int, first: int, second: int) -> tuple[int, int]:
    """One of ``first`` things with one of ``second``. Any ``first * second`` positions in a row hold each combination
    once, and neighbours differ in both, so that a short corpus sees all of both lists."""
    block, one = divmod(position, first)
    return one, (one + block) % second


def object_schema(**properties: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TEXT = {"type": "string", "minLength": 1}


def list_schema(count: int) -> dict[str, Any]:
    """The JSON schema of a list of so many texts."""
    return {"type": "array", "items": TEXT, "minItems": count, "maxItems": count}


def strings(value: Any, field: str, count: int) -> list[str]:
    """The first ``count`` texts of an answer's list, stripped. ValueError says what is wrong with it."""
    found = value.get(field) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"the answer has no list {field!r}")
    if len(found) < count:
        raise ValueError(f"fewer {field} than asked")
    return [string(each, field) for each in found[:count]]


def string(value: Any, field: str) -> str:
    """A text of an answer, stripped; ValueError when it is none or empty."""
    if not isinstance(value, str):
        raise ValueError(f"{field}: not a text")
    if not value.strip():
        raise ValueError(f"{field}: empty")
    return value.strip()


def require_distinct(texts: Iterable[str], field: str, others: Sequence[str], name: str) -> None:
    """ValueError when a text comes twice or is one of the ``others``, whatever the case, spaces and punctuation."""
    known = {_plain_words(each) for each in others}
    seen: set[str] = set()
    for text in map(_plain_words, texts):
        if text in known:
            raise ValueError(f"{field}: one is {name}")
        if text in seen:
            raise ValueError(f"{field}: one comes twice")
        seen.add(text)


def require_language(texts: Sequence[str], source: str) -> None:
    """ValueError when a long text, or all together, are surely in another language than their source."""
    wanted = language(source)
    long = [text for text in texts if len(text) >= LONG]
    if wanted and any(language(text) not in (wanted, None) for text in [*long, "\n".join(texts)]):
        raise ValueError("the answer is in another language than the row")


def _plain_words(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(word.strip(_MARKS) or word for word in words)


def steps(count: int) -> list[tuple[int, int]]:
    """Every pair of a ladder of ``count`` texts: [better position, worse position]."""
    return [(better, worse) for better in range(count) for worse in range(better + 1, count)]


def rungs(ladder: KeyLadder) -> list[str]:
    """All keys of a ladder, the best first."""
    return [ladder.correspond_key, *ladder.less_relevant_keys]


def key_ladder_row(ladder: KeyLadder) -> AdvancedRow:
    """One query with all keys of its ladder; each is preferred to all below it."""
    batch = [
        Candidate(
            query=ladder.query,
            key=key,
            query_id=f"{ladder.df_id}-ladder",
            key_id=_key_id(ladder, place),
            query_type=ladder.query_type,
            key_role="less_relevant" if place else "correspond",
            ds_id=ladder.df_id,
        )
        for place, key in enumerate(rungs(ladder))
    ]
    return AdvancedRow(batch=batch, dpo_pairs=steps(len(batch)))


def _key_id(ladder: KeyLadder, place: int) -> str:
    """The row's own id for its text; the made keys are numbered from 1."""
    return f"{ladder.df_id}-less-{place}" if place else ladder.df_id


def query_ladder_row(ladder: QueryLadder) -> AdvancedRow:
    """One key with all queries of its ladder; it serves each better than all below it."""
    batch = _asked_of(ladder.queries, ladder)
    return AdvancedRow(batch=batch, dpo_pairs=steps(len(batch)))


def query_choices_row(choices: QueryChoices) -> AdvancedRow:
    """One key with all its queries; it serves each chosen one better than each rejected one."""
    chosen = len(choices.chosen_queries)
    batch = _asked_of(choices.chosen_queries + choices.rejected_queries, choices)
    pairs = [(better, worse) for better in range(chosen) for worse in range(chosen, len(batch))]
    return AdvancedRow(batch=batch, dpo_pairs=pairs)


def _asked_of(queries: Sequence[str], ladder: QueryLadder | QueryChoices) -> list[Candidate]:
    types: Sequence[str | None] = ladder.query_types or [None] * len(queries)
    return [
        Candidate(
            query=query,
            key=ladder.key,
            query_id=f"{ladder.df_id}-ladder-{place}",
            key_id=ladder.df_id,
            query_type=each,
            ds_id=ladder.df_id,
        )
        for place, (query, each) in enumerate(zip(queries, types, strict=True))
    ]


def key_ladder_pairs(ladder: KeyLadder) -> Iterator[PreferencePair]:
    """Every pair of keys of a ladder, for training on pairs."""
    keys = rungs(ladder)
    for better, worse in steps(len(keys)):
        yield PreferencePair(
            query=ladder.query,
            chosen_key=keys[better],
            rejected_key=keys[worse],
            query_id=f"{ladder.df_id}-ladder",
            chosen_key_id=_key_id(ladder, better),
            rejected_key_id=_key_id(ladder, worse),
            query_type=ladder.query_type,
            source="ladder",
        )
