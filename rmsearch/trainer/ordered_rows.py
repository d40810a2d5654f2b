"""Rows of candidates with explicit preferences (upstream's ADPO records) as token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rmsearch.datasets.preferences import OrderedRow, Texts, read_rows
from rmsearch.preferences.orders import levels
from rmsearch.prompts.renderer import Renderer
from rmsearch.trainer.data import Encoded, Reject, Table, batches, text_digest

_BATCH = 256


def read_trainable_rows(uri: str) -> Iterator[OrderedRow]:
    """The rows of a file; RecordError ``file:row`` also when the preferences of one go in a circle."""
    return read_rows(uri, refuse_circles)


def refuse_circles(row: OrderedRow) -> None:
    """ValueError when the preferences of a row go in a circle; equal texts count as one candidate."""
    first: dict[Texts, int] = {}
    place = [first.setdefault(text, i) for i, text in enumerate(row.candidates)]
    levels(len(place), [(place[chosen], place[rejected]) for chosen, rejected in row.pairs])


def encode_rows(rows: Iterable[OrderedRow], renderer: Renderer, reject: Reject | None = None) -> Encoded:
    """Render the candidates that occur in a preference; the pairs of a row stay together (``Encoded.start``).

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

    def add(self, row: OrderedRow, place: Mapping[int, int], inputs: Sequence[np.ndarray]) -> None:
        """Add a row. place: candidate -> position in ``inputs``."""
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
