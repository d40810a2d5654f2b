"""Preference pairs as token ids: rendered once per distinct (query, key), kept compact.

A set of pairs is a table of distinct model inputs and, per pair, two positions in it; a batch then forwards each
distinct input once however many pairs it is in (a positive with three negatives costs four rows, not six).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from rmsearch.datasets.preferences import Pair
from rmsearch.prompts.renderer import Renderer

T = TypeVar("T")
Reject = Callable[[Any, str], None]
_BATCH = 2048


@dataclass
class Encoded:
    """Pairs over a table of model inputs.

    inputs: int32[length] each, distinct; chosen, rejected: int64[n], positions in ``inputs``; margin: float32[n], 0
    when unknown; group: int64[n], equal for pairs of one query and one chosen key; counts: what was read, cut and
    refused; queries: digests of the distinct queries; start: int64[rows + 1], when pairs come in rows that go into a
    batch whole: those of row i are start[i] to start[i + 1].
    """

    inputs: list[np.ndarray] = field(repr=False)
    chosen: np.ndarray = field(repr=False)
    rejected: np.ndarray = field(repr=False)
    margin: np.ndarray = field(repr=False)
    group: np.ndarray = field(repr=False)
    counts: dict[str, int]
    queries: set[bytes] = field(repr=False, default_factory=set)
    start: np.ndarray | None = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def starts(self) -> np.ndarray:
        """Where the pairs of each row start, and their end; without rows each pair is its own."""
        return np.arange(len(self) + 1) if self.start is None else self.start

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each input, int64[len(inputs)]."""
        return np.fromiter(map(len, self.inputs), np.int64, len(self.inputs))

    def sample(self, size: int, seed: int) -> Encoded:
        """At most ``size`` of the pairs (0: all), the same ones for the same seed."""
        if not size or len(self) <= size:
            return self
        keep = np.sort(np.random.default_rng(seed).choice(len(self), size, replace=False))
        return replace(
            self,
            chosen=self.chosen[keep],
            rejected=self.rejected[keep],
            margin=self.margin[keep],
            group=self.group[keep],
            counts=self.counts | {"pairs": size},
            start=None,
        )


class Table:
    """Model inputs of (query, key) texts, each distinct pair of texts rendered once."""

    def __init__(self, renderer: Renderer) -> None:
        self.inputs: list[np.ndarray] = []
        self.truncated = 0
        self._renderer = renderer
        self._known: dict[bytes, int] = {}  # digests, so that the texts need not stay in memory

    def add(self, texts: Sequence[tuple[str, str]]) -> list[int]:
        """Positions of the inputs of (query, key) texts."""
        digests = [text_digest(*each) for each in texts]
        fresh = {d: each for d, each in zip(digests, texts, strict=True) if d not in self._known}
        queries = {query: i for i, query in enumerate(dict.fromkeys(query for query, _ in fresh.values()))}
        keys = {key: i for i, key in enumerate(dict.fromkeys(key for _, key in fresh.values()))}
        places = [(queries[query], keys[key]) for query, key in fresh.values()]
        for digest, rendered in zip(fresh, self._renderer.render_many(list(queries), list(keys), places), strict=True):
            self._known[digest] = len(self.inputs)
            self.inputs.append(np.asarray(rendered.ids, np.int32))
            self.truncated += rendered.truncated
        return [self._known[digest] for digest in digests]


def text_digest(query: str, key: str) -> bytes:
    """Digest by which a (query, key) pair of texts is known again."""
    state = blake2b(query.encode("utf-8", "surrogatepass"), digest_size=16)
    state.update(b"\0\xff\0" + key.encode("utf-8", "surrogatepass"))
    return state.digest()


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def encode_pairs(pairs: Iterable[Pair], renderer: Renderer, reject: Reject | None = None) -> Encoded:
    """Render pairs. Pairs whose two inputs are the same tokens (the texts differ only past the cut) are given to
    ``reject`` and left out: they teach nothing."""
    table, groups, queries = Table(renderer), dict[int, int](), set[bytes]()
    chosen, rejected, margins, group = [], [], [], []
    read = same = with_margin = 0
    for batch in batches(pairs, _BATCH):
        read += len(batch)
        left = table.add([(pair.query, pair.chosen) for pair in batch])
        right = table.add([(pair.query, pair.rejected) for pair in batch])
        for pair, a, b in zip(batch, left, right, strict=True):
            if np.array_equal(table.inputs[a], table.inputs[b]):
                same += 1
                if reject is not None:
                    reject(pair._asdict(), "chosen and rejected are the same tokens")
                continue
            chosen.append(a)
            rejected.append(b)
            margins.append(pair.margin or 0.0)
            with_margin += pair.margin is not None
            group.append(groups.setdefault(a, len(groups)))
            queries.add(text_digest(pair.query, ""))
    counts = {"pairs": len(chosen), "queries": len(queries), "inputs": len(table.inputs)}
    counts |= {"truncated": table.truncated, "same_tokens": same, "with_margin": with_margin, "read": read}
    return Encoded(
        table.inputs,
        np.asarray(chosen, np.int64),
        np.asarray(rejected, np.int64),
        np.asarray(margins, np.float32),
        np.asarray(group, np.int64),
        counts,
        queries,
    )
