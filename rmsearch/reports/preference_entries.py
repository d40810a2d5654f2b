"""Preferences in any of their forms as one kind of entry, for `rmsearch train inspect`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AliasChoices, Field, model_validator

from rmsearch.datasets.chain import AdvancedRow, Candidate
from rmsearch.datasets.records import Finite, Message, MessagePair, PreferencePair
from rmsearch.errors import RecordError
from rmsearch.storage.records import read_models, read_records
from rmsearch.trainer.data import take_apart

QUERY_TYPE = AliasChoices("query_type", "query-type")
Confidence = Annotated[Finite, Field(ge=0, le=1)]


class Entry(NamedTuple):
    """One preference. ``compares``: "keys" for one query; "queries" for one key, then ``query`` holds that key, and
    ``chosen`` and ``rejected`` are the queries; "both" when the two sides share neither."""

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


class _Pair(PreferencePair):
    query_type: str | None = Field(None, validation_alias=QUERY_TYPE)
    confidence: Confidence | None = None
    prompt: str | None = None

    @property
    def entries(self) -> list[Entry]:
        of_keys = (self.query_id, self.chosen_key_id, self.rejected_key_id, self.margin, self.confidence)
        return [Entry(self.query, self.chosen_key, self.rejected_key, *of_keys, **_origin(self))]


class _Chats(MessagePair):
    query_type: str | None = Field(None, validation_alias=QUERY_TYPE)
    source: str | None = None
    confidence: Confidence | None = None
    prompt: str | None = None

    @cached_property
    def entries(self) -> list[Entry]:
        (query, chosen), (other, rejected) = _texts(self.chosen_msg), _texts(self.rejected_msg)
        if query != other:
            raise ValueError("chosen_msg and rejected_msg do not share one query")
        of_keys = (self.query_id, self.chosen_sentence_id, self.rejected_sentence_id, self.margin, self.confidence)
        return [Entry(query, chosen, rejected, *of_keys, **_origin(self))]

    @model_validator(mode="after")
    def _check(self) -> _Chats:
        assert self.entries  # a ValueError here gets the file and row
        return self


class _Row(AdvancedRow):
    source: str | None = None
    prompt: str | None = None

    @cached_property
    def entries(self) -> list[Entry]:
        texts = [_candidate(each) for each in self.batch]
        margins: Sequence[float | None] = self.margins or [None] * len(self.dpo_pairs)
        found = []
        for (a, b), margin in zip(self.dpo_pairs, margins, strict=True):
            chosen, rejected = self.batch[a], self.batch[b]
            entry = _compared(texts[a], texts[b])._replace(
                query_id=chosen.query_id,
                chosen_id=chosen.key_id,
                rejected_id=rejected.key_id,
                margin=margin,
                query_type=chosen.query_type,
                source=self.source,
                prompt=self.prompt,
            )
            found.append(entry)
        return found

    @model_validator(mode="after")
    def _consistent(self) -> _Row:
        assert self.entries
        return self


FORMS: dict[str, type[_Pair | _Chats | _Row]] = {"batch": _Row, "chosen_msg": _Chats, "chosen_key": _Pair}


def _origin(record: _Pair | _Chats) -> dict[str, Any]:
    return {"query_type": record.query_type, "source": record.source, "prompt": record.prompt}


def _texts(messages: Sequence[Message]) -> tuple[str, str]:
    found = take_apart(messages)
    if found is None:
        raise ValueError("the chat is in no known prompt, so query and key cannot be told apart: give query and key")
    return found[1], found[2]


def _candidate(candidate: Candidate) -> tuple[str, str]:
    if candidate.query is None or candidate.key is None:
        return _texts(candidate.msg or [])
    return candidate.query, candidate.key


def _compared(chosen: tuple[str, str], rejected: tuple[str, str]) -> Entry:
    """The entry of two (query, key) texts."""
    if chosen == rejected:
        raise ValueError("the two candidates of a pair are the same text")
    if chosen[0] == rejected[0]:
        return Entry(chosen[0], chosen[1], rejected[1])
    if chosen[1] == rejected[1]:
        return Entry(chosen[1], chosen[0], rejected[0], compares="queries")
    return Entry(chosen[0], chosen[1], rejected[1], compares="both")


def read_entries(uri: str) -> Iterator[Entry]:
    """The preferences of a file: raw pairs, upstream's ``chosen_msg`` pairs or ADPO rows, one form per file.

    Raises InputMissingError, ConfigError (suffix), and RecordError for an empty file, records of no form or, with
    ``file:row``, one that is malformed or of another form than the first.
    """
    first = next(read_records(uri), None)
    if first is None:
        raise RecordError("holds no pairs", where=uri, remedy="Make some with `rmsearch train mine`")
    form = next((form for name, form in FORMS.items() if name in first), None)
    if form is None:
        known = ", ".join(sorted(first)[:8]) or "none"
        remedy = "Give pairs (query, chosen_key, rejected_key), or rows of batch and dpo_pairs"
        raise RecordError(f"holds no preferences (its fields: {known})", where=uri, remedy=remedy)
    return (entry for record in read_models(uri, form) for entry in record.entries)


def entries_at(uris: Sequence[str], wanted: Collection[int]) -> dict[int, Entry]:
    """The entries at these positions, counted through all files; reads no further than the last of them."""
    left, last, found = set(wanted), max(wanted, default=-1), dict[int, Entry]()
    for position, entry in enumerate(entry for uri in uris for entry in read_entries(uri)):
        if position > last:
            break
        if position in left:
            found[position] = entry
    return found
