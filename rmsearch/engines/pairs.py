"""Pairs as numbers: the queries and keys of some work, which of them are paired, and the duplicates among them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from rmsearch.errors import ConfigError
from rmsearch.prompts.renderer import Query, key_text, query_text

REMEMBERED = 200_000  # pairs of a stream whose reward is kept for a later duplicate; about 40 MiB
TILE = 4096  # texts of the inner side of a grid at a time: few enough that their tokens stay cached
_CHUNK = 8192


@dataclass(frozen=True)
class NumberedPairs(Iterable[tuple[str, str]]):
    """Pairs of a query and a key by their numbers: those of ``chosen`` (int[n, 2]: query, key), else each with each.

    Every pair has a position. In a grid the side that is second in the model's input changes fastest, so that the side
    that is first can be reused from the model's cache; at most ``tile`` texts of it are in use at a time, and
    ``block`` queries are finished before the next ones start (None: all). Iterating gives the texts by position.

    key_first: the key stands first in the model's input.
    distinct: no two pairs have the same texts, so there are no duplicates to look for.
    prompt: writes the whole model input of a pair; its texts are then ("", that).
    """

    queries: Sequence[str]
    keys: Sequence[str]
    chosen: np.ndarray | None = None
    distinct: bool = False
    prompt: Callable[[str, str], str] | None = None
    key_first: bool = False
    block: int | None = None
    tile: int | None = None

    def __len__(self) -> int:
        return len(self.queries) * len(self.keys) if self.chosen is None else len(self.chosen)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return self.texts()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query, key) numbers, int[n] each, of the pairs at ``positions``."""
        if self.chosen is not None:
            return self.chosen[positions, 0], self.chosen[positions, 1]
        queries, keys = len(self.queries), len(self.keys)
        block = self.block or (self.tile if self.key_first else None) or queries
        number, rest = np.divmod(positions, block * keys)
        height = np.minimum(block, queries - number * block)
        if self.key_first:
            key, row = np.divmod(rest, height)
            return number * block + row, key
        size = self.tile or keys
        tile, rest = np.divmod(rest, size * height)
        row, column = np.divmod(rest, np.minimum(size, keys - tile * size))
        return number * block + row, tile * size + column

    def texts(self, positions: np.ndarray | None = None) -> Iterator[tuple[str, str]]:
        """(query, key) texts of the pairs at ``positions`` (all by default), made as they are taken."""
        total = len(self) if positions is None else len(positions)
        for start in range(0, total, _CHUNK):
            stop = min(start + _CHUNK, total)
            numbers = self.locate(np.arange(start, stop) if positions is None else positions[start:stop])
            for query, key in zip(*(side.tolist() for side in numbers), strict=True):
                texts = self.queries[query], self.keys[key]
                yield texts if self.prompt is None else ("", self.prompt(*texts))

    def at(self, positions: np.ndarray) -> NumberedPairs:
        """The pairs at ``positions`` as pairs of their own, in that order."""
        return replace(self, chosen=np.stack(self.locate(positions), axis=1, dtype=np.int32, casting="unsafe"))

    def by_key(self, positions: np.ndarray) -> np.ndarray:
        """The positions with those of one key next to each other; a grid has its own order."""
        if self.chosen is None:
            return positions
        return positions[np.argsort(self.chosen[positions, 1], kind="stable")]


@dataclass(frozen=True)
class UniquePairs:
    """Some pairs with every text and every pair once. ``pairs`` int64[n, 2]: numbers of a query and a key; ``inverse``
    int64[m]: which of the pairs stands at each asked position."""

    queries: list[str]
    keys: list[str]
    pairs: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[Query, str]], first_position: int = 0) -> UniquePairs:
        """Of texts. ConfigError names the position of what is no pair of a query and a key."""
        queries: dict[str, int] = {}
        keys: dict[str, int] = {}
        numbers: list[tuple[int, int]] = []
        for i, pair in enumerate(pairs, first_position):
            query, key = _checked(pair, i)
            numbers.append((queries.setdefault(query, len(queries)), keys.setdefault(key, len(keys))))
        every = np.array(numbers, dtype=np.int64).reshape(-1, 2)
        return cls._of_numbers(list(queries), list(keys), every[:, 0], every[:, 1])

    @classmethod
    def part(cls, pairs: NumberedPairs, positions: np.ndarray) -> UniquePairs:
        """Of the numbered pairs at ``positions``."""
        query, key = pairs.locate(positions)
        queries, query = _used(pairs.queries, query)
        keys, key = _used(pairs.keys, key)
        return cls._of_numbers(queries, keys, query, key)

    @classmethod
    def _of_numbers(cls, queries: list[str], keys: list[str], query: np.ndarray, key: np.ndarray) -> UniquePairs:
        width = max(len(keys), 1)
        codes, inverse = np.unique(query * width + key, return_inverse=True)
        return cls(queries, keys, np.stack(np.divmod(codes, width), axis=1), inverse.reshape(-1))


def _used(texts: Sequence[str], numbers: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The texts with these numbers, each once, and the numbers among them."""
    used, numbers = np.unique(numbers, return_inverse=True)
    place: dict[str, int] = {}
    places = np.fromiter((place.setdefault(texts[i], len(place)) for i in used.tolist()), np.int64, len(used))
    return list(place), places[numbers.reshape(-1)]


def windows(pairs: Iterable[tuple[Query, str]], size: int) -> Iterator[UniquePairs]:
    """The pairs, ``size`` at a time."""
    if isinstance(pairs, NumberedPairs) and pairs.prompt is None:
        for start in range(0, len(pairs), size):
            yield UniquePairs.part(pairs, np.arange(start, min(start + size, len(pairs))))
        return
    source, position = iter(pairs), 0
    while len((window := UniquePairs.of(islice(source, size), position)).inverse):
        yield window
        position += len(window.inverse)


def _checked(pair: Any, position: int) -> tuple[str, str]:
    try:
        query, key = pair
    except (TypeError, ValueError):
        raise ConfigError("a pair is (query, key)", where=f"pairs[{position}]", remedy="Give two values") from None
    if type(query) is str and type(key) is str:
        return query, key
    return query_text(query, f"pairs[{position}] query"), key_text(key, f"pairs[{position}] key")


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def pair_digest(query: bytes, key: bytes) -> bytes:
    """16 bytes that stand for a pair, from the digests of its texts."""
    return hashlib.blake2b(query + key, digest_size=16).digest()


class Window:
    """A window of a stream: rewards of its unique pairs (float32[n], NaN until known), and who waits for them."""

    def __init__(self, pairs: UniquePairs, offset: int) -> None:
        self.offset = offset  # the texts are not kept: a Memory holds many windows
        self.rewards = np.full(len(pairs.pairs), np.nan, dtype=np.float32)
        self.scored = asyncio.Event()
        counts = np.bincount(pairs.inverse, minlength=len(pairs.pairs))
        self._places, self._ends, self._counts = np.argsort(pairs.inverse, kind="stable"), np.cumsum(counts), counts
        self._left = 0

    def expect(self, items: int) -> None:
        """So many of the unique pairs go to the model."""
        self._left = items

    def put(self, items: np.ndarray, rewards: np.ndarray) -> None:
        """Rewards from the model."""
        self.rewards[items] = rewards
        self._left -= len(items)
        if self._left == 0:
            self.scored.set()

    def result(self, items: np.ndarray, rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions in the stream, rewards): every position that holds one of the unique pairs ``items``."""
        counts, ends = self._counts[items], self._ends[items]
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._places[np.repeat(ends - counts, counts) + steps] + self.offset, np.repeat(rewards, counts)


class Memory:
    """Which window scored each of the last ``REMEMBERED`` pairs of a stream, finished or on its way."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[Window, int]] = {}

    def sort(self, pairs: UniquePairs, window: Window) -> tuple[np.ndarray, list[tuple[int, Window, int]]]:
        """Split a window into items to score and (item, earlier window, its item) of those asked before."""
        queries, keys = ([text_digest(text) for text in texts] for texts in (pairs.queries, pairs.keys))
        fresh: list[int] = []
        again: list[tuple[int, Window, int]] = []
        for item, (query, key) in enumerate(pairs.pairs.tolist()):
            digest = pair_digest(queries[query], keys[key])
            earlier = self._seen.get(digest)
            if earlier is None:
                fresh.append(item)
                self._seen[digest] = (window, item)
            else:
                again.append((item, *earlier))
        while len(self._seen) > REMEMBERED:
            self._seen.pop(next(iter(self._seen)))
        return np.array(fresh, dtype=np.int64), again
