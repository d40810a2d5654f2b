"""Pairs as numbers: interned texts, unique pairs, and the duplicates of a stream."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from rmsearch.errors import ConfigError
from rmsearch.prompts.renderer import Query, key_text, query_text

REMEMBERED = 200_000  # pairs of a stream whose reward is kept for a later duplicate; about 40 MiB


class Fanout:
    """From unique items back to all positions that hold them (``inverse`` int[n]: position -> unique item)."""

    def __init__(self, inverse: np.ndarray, unique: int) -> None:
        self._order = np.argsort(inverse, kind="stable")
        self._ends = np.cumsum(np.bincount(inverse, minlength=unique))
        self._counts = np.bincount(inverse, minlength=unique)

    def __call__(self, items: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All positions of the items, and the items' values repeated for them."""
        counts, ends = self._counts[items], self._ends[items]
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._order[np.repeat(ends - counts, counts) + steps], np.repeat(values, counts)


class Texts:
    """Interned pairs: unique queries, unique keys, unique pairs of them, and where each asked pair went."""

    def __init__(self, pairs: Iterable[tuple[Query, str]], first_position: int = 0) -> None:
        queries: dict[str, int] = {}
        keys: dict[str, int] = {}
        numbers: list[tuple[int, int]] = []
        for i, pair in enumerate(pairs, first_position):
            query, key = _checked(pair, i)
            numbers.append((queries.setdefault(query, len(queries)), keys.setdefault(key, len(keys))))
        self.queries, self.keys = list(queries), list(keys)
        every = np.array(numbers, dtype=np.int64).reshape(-1, 2)
        codes, inverse = np.unique(every[:, 0] * max(len(keys), 1) + every[:, 1], return_inverse=True)
        self.pairs = np.stack(np.divmod(codes, max(len(keys), 1)), axis=1)
        self.inverse = inverse.reshape(-1)


def _checked(pair: Any, position: int) -> tuple[str, str]:
    try:
        query, key = pair
    except (TypeError, ValueError):
        raise ConfigError("a pair is (query, key)", where=f"pairs[{position}]", remedy="Give two values") from None
    if type(query) is str and type(key) is str:
        return query, key
    return query_text(query, f"pairs[{position}] query"), key_text(key, f"pairs[{position}] key")


class Window:
    """A window of a stream: its unique pairs, their rewards (float32[n], NaN until known), and who waits for them."""

    def __init__(self, texts: Texts, offset: int) -> None:
        self.offset = offset  # the texts are not kept: a Memory holds many windows
        self.rewards = np.full(len(texts.pairs), np.nan, dtype=np.float32)
        self.scored = asyncio.Event()
        self.digests = [_digest(texts.queries[q], texts.keys[k]) for q, k in texts.pairs.tolist()]
        self._fanout = Fanout(texts.inverse, len(texts.pairs))
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
        """(positions in the stream, rewards) of unique pairs of this window."""
        positions, values = self._fanout(items, rewards)
        return positions + self.offset, values


def _digest(query: str, key: str) -> bytes:
    text = f"{len(query)}:{query}{key}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


class Memory:
    """Which window scored each of the last ``REMEMBERED`` pairs of a stream, finished or on its way."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[Window, int]] = {}

    def sort(self, window: Window) -> tuple[np.ndarray, list[tuple[int, Window, int]]]:
        """Splits a window into items to score and (item, earlier window, its item) of those asked before."""
        fresh: list[int] = []
        again: list[tuple[int, Window, int]] = []
        for item, digest in enumerate(window.digests):
            earlier = self._seen.get(digest)
            if earlier is None:
                fresh.append(item)
                self._seen[digest] = (window, item)
            else:
                again.append((item, *earlier))
        while len(self._seen) > REMEMBERED:
            self._seen.pop(next(iter(self._seen)))
        window.expect(len(fresh))
        return np.array(fresh, dtype=np.int64), again
