"""Rows of candidates with explicit preferences (upstream's ADPO records): read, checked, rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from pydantic import model_validator

from rmsearch.datasets.chain import AdvancedRow, Candidate
from rmsearch.errors import RecordError
from rmsearch.preferences.orders import Positions, levels
from rmsearch.storage.records import read_models, read_records
from rmsearch.trainer.data import Encoded, Reject, Table, batches, take_apart, text_digest

if TYPE_CHECKING:
    from rmsearch.prompts.renderer import Renderer

_BATCH = 256


class Row(NamedTuple):
    """Candidates as (query, key) texts and what is preferred to what, by positions. ``margins``: one per pair, if
    known; ``template``: names upstream's prompt when the file held rendered chats."""

    candidates: list[tuple[str, str]]
    pairs: list[Positions]
    margins: list[float] | None = None
    template: str | None = None


class RawRow(AdvancedRow):
    """A row of raw candidates whose preferences hold together: no circle, nothing preferred to its own text."""

    chats: ClassVar[bool] = False

    @cached_property
    def row(self) -> Row:
        """The row as texts. ValueError for what is inconsistent."""
        if any(_is_chat(each) != self.chats for each in self.batch):
            raise ValueError("msg in one row, query and key in another: give all candidates of a file in one form")
        template, texts = _chats(self.batch) if self.chats else (None, [_raw(each) for each in self.batch])
        first: dict[tuple[str, str], int] = {}
        place = [first.setdefault(text, i) for i, text in enumerate(texts)]
        for chosen, rejected in self.dpo_pairs:
            if place[chosen] == place[rejected]:
                raise ValueError(f"the two candidates of the pair {[chosen, rejected]} are the same text")
        levels(len(texts), [(place[chosen], place[rejected]) for chosen, rejected in self.dpo_pairs])
        return Row(texts, list(self.dpo_pairs), self.margins, template)

    @model_validator(mode="after")
    def _consistent(self) -> RawRow:
        _ = self.row  # a ValueError here gets the file and row
        return self


class ChatRow(RawRow):
    """A row of upstream's rendered chats, which are taken apart into query and key."""

    chats: ClassVar[bool] = True


def _is_chat(candidate: Candidate) -> bool:
    return candidate.query is None or candidate.key is None


def _raw(candidate: Candidate) -> tuple[str, str]:
    return candidate.query or "", candidate.key or ""


def _chats(batch: Sequence[Candidate]) -> tuple[str | None, list[tuple[str, str]]]:
    parts = [take_apart(each.msg or []) for each in batch]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        raise ValueError("a chat is in no known prompt, so query and key cannot be told apart: give query and key")
    if len({name for name, _, _ in known}) > 1:
        raise ValueError("the chats are in different prompts")
    return known[0][0], [(query, key) for _, query, key in known]


def read_rows(uri: str) -> Iterator[Row]:
    """The rows of a file, with raw candidates (``query``, ``key``) or with upstream's ``msg`` chats.

    Raises InputMissingError, ConfigError (suffix), and RecordError ``file:row`` for what is malformed: a pair out of
    range or of equal texts, preferences in a circle, both forms in one file, a chat in no known prompt.
    """
    first = next(read_records(uri), None)
    if first is None:
        raise RecordError("holds no rows", where=uri, remedy="Make some with `rmsearch train judge_adpo_dataset`")
    if "batch" not in first and not {"chosen_key", "chosen_msg"}.isdisjoint(first):
        raise RecordError("holds pairs, not rows of candidates", where=uri, remedy="Train with `rmsearch train lora`")
    chats = _is_chat(next(read_models(uri, AdvancedRow)).batch[0])
    return (each.row for each in read_models(uri, ChatRow if chats else RawRow))


def peek_row_template(uris: Sequence[str], rows: int = 100) -> str | None:
    """The upstream prompt that the first ``rows`` rows were rendered with; None for raw or mixed files."""
    names = {row.template for uri in uris for row in islice(read_rows(uri), rows)}
    return names.pop() if len(names) == 1 else None


def encode_rows(rows: Iterable[Row], renderer: Renderer, reject: Reject | None = None) -> Encoded:
    """Renders the candidates that occur in a preference; the pairs of a row stay together (``Encoded.start``).

    Texts that differ only past the cut are one candidate: pairs of two such texts, and rows whose preferences go in a
    circle for it, are given to ``reject`` and left out.
    """
    table, kept = Table(renderer), _Kept(reject)
    for batch in batches(rows, _BATCH):
        used = [sorted({i for pair in row.pairs for i in pair}) for row in batch]
        places = iter(table.add([row.candidates[i] for row, some in zip(batch, used, strict=True) for i in some]))
        for row, some in zip(batch, used, strict=True):
            kept.add(row, {i: next(places) for i in some}, table.inputs)
    start = np.asarray(kept.start, np.int64)
    counts = {"rows": len(start) - 1, "pairs": len(kept.chosen), "queries": len(kept.queries)}
    counts |= {"inputs": len(table.inputs), "truncated": table.truncated, **kept.counts}
    return Encoded(
        table.inputs,
        np.asarray(kept.chosen, np.int64),
        np.asarray(kept.rejected, np.int64),
        np.asarray(kept.margins, np.float32),
        np.repeat(np.arange(len(start) - 1), np.diff(start)),
        counts,
        kept.queries,
        start,
    )


@dataclass
class _Kept:
    """The pairs so far, as positions in the table of inputs; those of row i are start[i] to start[i + 1]."""

    reject: Reject | None
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    start: list[int] = field(default_factory=lambda: [0])
    queries: set[bytes] = field(default_factory=set)
    counts: Counter[str] = field(
        default_factory=lambda: Counter(candidates=0, total_orders=0, same_tokens=0, circles=0, with_margin=0, read=0)
    )

    def add(self, row: Row, place: Mapping[int, int], inputs: Sequence[np.ndarray]) -> None:
        """Adds a row. place: candidate -> position in ``inputs``."""
        first: dict[bytes, int] = {}
        same = {i: first.setdefault(inputs[at].tobytes(), i) for i, at in place.items()}
        kept = [(same[a], same[b], n) for n, (a, b) in enumerate(row.pairs) if same[a] != same[b]]
        self.counts["read"] += len(row.pairs)
        for a, b in row.pairs:
            if same[a] == same[b]:
                chosen, rejected = row.candidates[a], row.candidates[b]
                self._refuse("same_tokens", [chosen, rejected], "chosen and rejected are the same tokens")
        try:
            level = levels(len(row.candidates), [(a, b) for a, b, _ in kept])
        except ValueError:
            self._refuse("circles", row._asdict(), "the preferences go in a circle once the texts are cut")
            return
        if not kept:
            return
        candidates = {i for a, b, _ in kept for i in (a, b)}
        self.chosen += [place[a] for a, _, _ in kept]
        self.rejected += [place[b] for _, b, _ in kept]
        self.margins += [row.margins[n] if row.margins else 0.0 for _, _, n in kept]
        self.start.append(len(self.chosen))
        self.queries |= {text_digest(row.candidates[i][0], "") for i in candidates}
        self.counts["candidates"] += len(candidates)
        self.counts["total_orders"] += len({level[i] for i in candidates}) == len(candidates)
        self.counts["with_margin"] += len(kept) if row.margins else 0

    def _refuse(self, name: str, record: object, reason: str) -> None:
        self.counts[name] += 1
        if self.reject is not None:
            self.reject(record, reason)
