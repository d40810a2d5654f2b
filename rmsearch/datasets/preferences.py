"""The one reader of preference files: raw pairs, upstream's chats, and rows of candidates with stated orders (ADPO).

Upstream's rendered prompts are taken apart again into query and key, so that one template serves training and search.
Every reader streams, and raises InputMissingError, ConfigError (suffix) and RecordError, with ``file:row`` for a
record that is malformed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AliasChoices, Field

from rmsearch.datasets.chain import AdvancedRow, Candidate
from rmsearch.datasets.records import ChatMessage, Finite, MessagePair, PreferencePair, Record
from rmsearch.errors import RecordError
from rmsearch.prompts.templates import TEMPLATES
from rmsearch.storage.records import numbered_models, read_records

Texts = tuple[str, str]  # query, key
NO_PAIRS = "holds no pairs", "Make some with `rmsearch train mine`"
UNKNOWN_PROMPT = "the chat is in no known prompt, so query and key cannot be told apart"


class Pair(NamedTuple):
    """One preference as texts. ``template`` names upstream's prompt when the file held rendered chats."""

    query: str
    chosen: str
    rejected: str
    margin: float | None = None
    template: str | None = None


class OrderedRow(NamedTuple):
    """Candidates as (query, key) texts and what is preferred to what, by positions. ``margins``: one per pair, if
    known; ``template``: as in `Pair`."""

    candidates: list[Texts]
    pairs: list[tuple[int, int]]
    margins: list[float] | None = None
    template: str | None = None


class Preference(NamedTuple):
    """One preference of any form with all that is said about it. ``compares``: "keys" for one query; "queries" for one
    key, then ``query`` holds that key, and ``chosen`` and ``rejected`` are the queries; "both" when the two sides share
    neither."""

    query: str
    chosen: str
    rejected: str
    query_id: str | None = None
    chosen_id: str | None = None
    rejected_id: str | None = None
    margin: float | None = None
    confidence: float | None = None
    query_type: str | None = None
    source: str | None = None
    prompt: str | None = None
    compares: Literal["keys", "queries", "both"] = "keys"


class _Described(Record):
    query_type: str | None = Field(None, validation_alias=AliasChoices("query_type", "query-type"))
    source: str | None = None
    confidence: Annotated[Finite, Field(ge=0, le=1)] | None = None
    prompt: str | None = None


class _DescribedPair(_Described, PreferencePair):
    pass


class _DescribedMessagePair(_Described, MessagePair):
    pass


class _DescribedRow(AdvancedRow):
    source: str | None = None
    prompt: str | None = None


def read_preferences(uri: str) -> Iterator[PreferencePair | MessagePair]:
    """The records of a file of pairs, each in either form (dataset_list_train.json and the like)."""
    return (record for _, record in _pair_records(uri))


def read_pairs(uri: str) -> Iterator[Pair]:
    """The pairs of a file as texts."""
    number = None
    for number, record in _pair_records(uri):
        yield _pair(record, f"{uri}:{number}")
    if number is None:
        raise RecordError(NO_PAIRS[0], where=uri, remedy=NO_PAIRS[1])


def _pair_records(
    uri: str, raw: type[Any] = PreferencePair, chats: type[Any] = MessagePair
) -> Iterator[tuple[int, Any]]:
    return numbered_models(uri, lambda record: raw if record.get("chosen_msg") in (None, "") else chats)


def _pair(record: PreferencePair | MessagePair, where: str) -> Pair:
    if isinstance(record, PreferencePair):
        return Pair(record.query, record.chosen_key, record.rejected_key, record.margin)
    chosen, rejected = take_apart(record.chosen_msg), take_apart(record.rejected_msg)
    if chosen is None or rejected is None:
        raise RecordError(UNKNOWN_PROMPT, where=where, remedy="Give raw records: query, chosen_key, rejected_key")
    if chosen[:2] != rejected[:2]:
        raise RecordError("chosen_msg and rejected_msg do not share one query and one prompt", where=where)
    return Pair(chosen[1], chosen[2], rejected[2], record.margin, chosen[0])


def read_rows(uri: str, check: Callable[[OrderedRow], None] = lambda row: None) -> Iterator[OrderedRow]:
    """The rows of a file, all with raw candidates (``query``, ``key``) or all with upstream's ``msg`` chats. A
    ValueError of ``check`` is a RecordError with file and row."""
    first = next(read_records(uri), None)
    if first is None:
        raise RecordError("holds no rows", where=uri, remedy="Make some with `rmsearch train judge_adpo_dataset`")
    if "batch" not in first and not {"chosen_key", "chosen_msg"}.isdisjoint(first):
        raise RecordError("holds pairs, not rows of candidates", where=uri, remedy="Train with `rmsearch train lora`")
    return (row for row, _ in _rows(uri, AdvancedRow, check))


def _rows(
    uri: str, form: type[AdvancedRow], check: Callable[[OrderedRow], None] = lambda row: None
) -> Iterator[tuple[OrderedRow, Any]]:
    chats = None
    for number, record in numbered_models(uri, lambda _: form):
        chats = _is_chat(record.batch[0]) if chats is None else chats
        try:
            row = ordered_row(record, chats=chats)
            check(row)
        except ValueError as error:
            raise RecordError(str(error), where=f"{uri}:{number}", remedy="Correct that record.") from None
        yield row, record


def ordered_row(record: AdvancedRow, *, chats: bool = False) -> OrderedRow:
    """The row as texts. ValueError for chats among raw candidates or the reverse, a chat in no known prompt, and a
    candidate that is preferred to its own text."""
    if any(_is_chat(each) != chats for each in record.batch):
        raise ValueError("msg in one row, query and key in another: give all candidates of a file in one form")
    template, texts = _taken_apart(record.batch) if chats else (None, [_raw(each) for each in record.batch])
    for chosen, rejected in record.dpo_pairs:
        if texts[chosen] == texts[rejected]:
            raise ValueError(f"the two candidates of the pair {[chosen, rejected]} are the same text")
    return OrderedRow(texts, list(record.dpo_pairs), record.margins, template)


def _is_chat(candidate: Candidate) -> bool:
    return candidate.query is None or candidate.key is None


def _raw(candidate: Candidate) -> Texts:
    return candidate.query or "", candidate.key or ""


def _taken_apart(batch: Sequence[Candidate]) -> tuple[str | None, list[Texts]]:
    parts = [part for each in batch if (part := take_apart(each.msg or [])) is not None]
    if len(parts) < len(batch):
        raise ValueError(f"{UNKNOWN_PROMPT}: give query and key")
    if len({template for template, _, _ in parts}) > 1:
        raise ValueError("the chats are in different prompts")
    return parts[0][0], [(query, key) for _, query, key in parts]


def read_described(uri: str) -> Iterator[Preference]:
    """The preferences of a file of pairs or of rows, with all that is said about them. RecordError also for a file
    that is empty or whose first record is of no known form."""
    first = next(read_records(uri), None)
    if first is None:
        raise RecordError(NO_PAIRS[0], where=uri, remedy=NO_PAIRS[1])
    if "batch" in first:
        return (each for row, record in _rows(uri, _DescribedRow) for each in _described_row(row, record))
    if {"chosen_key", "chosen_msg"}.isdisjoint(first):
        known = ", ".join(sorted(first)[:8]) or "none"
        remedy = "Give pairs (query, chosen_key, rejected_key), or rows of batch and dpo_pairs"
        raise RecordError(f"holds no preferences (its fields: {known})", where=uri, remedy=remedy)
    records = _pair_records(uri, _DescribedPair, _DescribedMessagePair)
    return (_described_pair(_pair(record, f"{uri}:{number}"), record) for number, record in records)


def described_at(uris: Sequence[str], positions: Collection[int]) -> dict[int, Preference]:
    """The preferences at these positions, counted through all files; reads no further than the last of them."""
    preferences = enumerate(each for uri in uris for each in read_described(uri))
    return {i: each for i, each in islice(preferences, max(positions, default=-1) + 1) if i in positions}


def _described_pair(pair: Pair, record: _DescribedPair | _DescribedMessagePair) -> Preference:
    if isinstance(record, _DescribedPair):
        chosen_id, rejected_id = record.chosen_key_id, record.rejected_key_id
    else:
        chosen_id, rejected_id = record.chosen_sentence_id, record.rejected_sentence_id
    return Preference(
        pair.query,
        pair.chosen,
        pair.rejected,
        query_id=record.query_id,
        chosen_id=chosen_id,
        rejected_id=rejected_id,
        margin=record.margin,
        confidence=record.confidence,
        query_type=record.query_type,
        source=record.source,
        prompt=record.prompt,
    )


def _described_row(row: OrderedRow, record: _DescribedRow) -> Iterator[Preference]:
    for i, (a, b) in enumerate(row.pairs):
        chosen, rejected = record.batch[a], record.batch[b]
        yield _compared(row.candidates[a], row.candidates[b])._replace(
            query_id=chosen.query_id,
            chosen_id=chosen.key_id,
            rejected_id=rejected.key_id,
            margin=row.margins[i] if row.margins else None,
            query_type=chosen.query_type,
            source=record.source,
            prompt=record.prompt,
        )


def _compared(chosen: Texts, rejected: Texts) -> Preference:
    if chosen[0] == rejected[0]:
        return Preference(chosen[0], chosen[1], rejected[1])
    if chosen[1] == rejected[1]:
        return Preference(chosen[1], chosen[0], rejected[0], compares="queries")
    return Preference(chosen[0], chosen[1], rejected[1], compares="both")


def common_template(uris: Sequence[str], read: Callable[[str], Iterable[Pair | OrderedRow]]) -> str | None:
    """The upstream prompt that the first 100 records of each file were rendered with; None for raw or mixed files."""
    names = {each.template for uri in uris for each in islice(read(uri), 100)}
    return names.pop() if len(names) == 1 else None


def take_apart(messages: Sequence[ChatMessage]) -> tuple[str | None, str, str] | None:
    """(upstream template's name, query, key) of a rendered chat; a last answer of another chat counts as the key."""
    roles = tuple(each.role for each in messages)
    for name, expected, patterns in _upstream_patterns():
        if roles != expected:
            continue
        matches = [pattern.fullmatch(message.content) for pattern, message in zip(patterns, messages, strict=True)]
        if all(matches):
            texts = {field: text for match in matches if match for field, text in match.groupdict().items()}
            return name, texts["query"], texts["key"]
    if len(messages) > 1 and roles[-1] == "assistant":
        *before, answer = messages
        text = before[0].content if len(before) == 1 else "\n".join(f"{m.role}: {m.content}" for m in before)
        return None, text, answer.content
    return None


@cache
def _upstream_patterns() -> list[tuple[str, tuple[str, ...], list[re.Pattern[str]]]]:
    return [
        (name, tuple(message.role for message in spec.messages), [_pattern(m.content) for m in spec.messages])
        for name, spec in TEMPLATES.items()
        if name.startswith("upstream_")
    ]


def _pattern(content: str) -> re.Pattern[str]:
    text = re.escape(content)
    for field in ("query", "key"):
        text = text.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>.*?)")
    return re.compile(text, re.DOTALL)
