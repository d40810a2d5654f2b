"""One search: its texts, the pairs of them, and the rankings as documented results."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType
from typing import Any, NotRequired, TypedDict

import numpy as np

from rmsearch.engines.pairs import TILE, NumberedPairs
from rmsearch.progress import progress
from rmsearch.scoring.arguments import prompt_text
from rmsearch.scoring.topk import TopK


class RankedKey(TypedDict):
    """A key of a ranking. ``relevance`` is the raw reward; it is left out on request."""

    key_id: int
    key: str
    relevance: NotRequired[float]


class Result(TypedDict):
    """A query and its best keys, best first. Ids are positions in the arguments."""

    query: str
    query_id: int
    keys: list[RankedKey]


@dataclass(frozen=True)
class UniqueTexts:
    """Texts without duplicates, in order of first appearance, and where each asked text went (int64[n])."""

    texts: list[str]
    inverse: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> UniqueTexts:
        """Equal texts become one."""
        number: dict[str, int] = {}
        inverse = np.fromiter((number.setdefault(text, len(number)) for text in texts), np.int64, len(texts))
        return cls(list(number), inverse)

    @classmethod
    def apart(cls, texts: Sequence[str]) -> UniqueTexts:
        """Every text stays by itself, equal or not."""
        return cls(list(texts), np.arange(len(texts)))

    def positions(self) -> list[list[int]]:
        """For each unique text the positions that hold it, ascending."""
        positions: list[list[int]] = [[] for _ in self.texts]
        for position, text in enumerate(self.inverse.tolist()):
            positions[text].append(position)
        return positions


@dataclass(frozen=True)
class SearchTask:
    """One call: its texts, its pairs, and how many keys each query gets. ``every_key`` holds equal keys, too."""

    queries: UniqueTexts
    keys: UniqueTexts
    every_key: list[str]
    pairs: NumberedPairs
    k: int

    @classmethod
    def of(
        cls,
        queries: Sequence[str],
        keys: list[str],
        k: int,
        chosen: np.ndarray | None,
        prompt: Callable[..., Any] | None,
        block: int | None,
    ) -> SearchTask:
        """Each query with each key, or with those of ``chosen`` (int64[n, 2]: query_id, key_id)."""
        # Equal texts may have different candidates, so they stay apart then; the engine still scores them once.
        texts = UniqueTexts.of if chosen is None else UniqueTexts.apart
        unique_queries, unique_keys = texts(queries), texts(keys)
        pairs = numbered(unique_queries, unique_keys, chosen, prompt, distinct=chosen is None, block=block)
        return cls(unique_queries, unique_keys, keys, pairs, min(k, len(keys)))

    def board(self) -> TopK:
        """An empty ranking of the unique queries. ``k`` unique keys suffice: each stands for one key or more."""
        return TopK(len(self.queries.texts), min(self.k, len(self.keys.texts)))

    def results(self, snapshot: tuple[np.ndarray, np.ndarray], relevance: bool) -> list[Result]:
        """Rankings (unique keys and scores, [queries, k]) as documented results."""
        ranked = [self._ranking(*row) for row in zip(*(side.tolist() for side in snapshot), strict=True)]
        return [
            {
                "query": self.queries.texts[row],
                "query_id": query_id,
                "keys": [_ranked_key(i, self.every_key[i], score if relevance else None) for i, score in ranked[row]],
            }
            for query_id, row in enumerate(self.queries.inverse.tolist())
        ]

    def _ranking(self, keys: list[int], scores: list[float]) -> list[tuple[int, float]]:
        """(key_id, score) of one query, equal texts with all their ids; empty slots (score -inf) are left out."""
        ids = self._key_ids
        ranked = [(i, score) for key, score in zip(keys, scores, strict=True) if score > -math.inf for i in ids[key]]
        return sorted(ranked, key=lambda item: (-item[1], item[0]))[: self.k]

    @cached_property
    def _key_ids(self) -> list[list[int]]:
        return self.keys.positions()


def numbered(
    queries: UniqueTexts,
    keys: UniqueTexts,
    chosen: np.ndarray | None,
    prompt: Callable[..., Any] | None,
    *,
    distinct: bool = True,
    block: int | None = None,
) -> NumberedPairs:
    """The pairs of a search; ``prompt``: the user's ``llm_template``, which may write one text for several pairs."""
    write = None if prompt is None else partial(prompt_text, prompt)
    distinct = distinct and write is None
    return NumberedPairs(queries.texts, keys.texts, chosen, distinct, write, block=block, tile=TILE)


def _ranked_key(key_id: int, key: str, relevance: float | None) -> RankedKey:
    ranked = RankedKey(key_id=key_id, key=key)
    if relevance is not None:
        ranked["relevance"] = relevance
    return ranked


@dataclass(frozen=True)
class SearchUpdate:
    """A state of a running search. done, total: unique (query, key) pairs; final: nothing more will change."""

    done: int
    total: int
    final: bool
    _task: SearchTask = field(repr=False, compare=False)
    _snapshot: tuple[np.ndarray, np.ndarray] = field(repr=False, compare=False)

    @cached_property
    def results(self) -> list[Result]:
        """The rankings so far, as a plain call returns them; a query with no score yet has no keys."""
        return self._task.results(self._snapshot, True)


def flat_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Results as one row per ranked key, for tables."""
    for result in results:
        for rank, key in enumerate(result["keys"], 1):
            yield {
                "query_id": result["query_id"],
                "query": result["query"],
                "rank": rank,
                "key_id": key["key_id"],
                "key": key["key"],
                "relevance": key.get("relevance"),
            }


class Reporter:
    """Progress of one call, shown once it has run for a second, and for one call of the process at a time."""

    _shown = threading.Lock()

    def __init__(self, total: int, disable_log: bool, progress_bar: Any) -> None:
        self._total = total
        self._update: Callable[[int], Any] | None = getattr(progress_bar, "update", None)
        self._quiet = disable_log or progress_bar is False or self._update is not None
        self._show_at = time.monotonic() + 1
        self._stack = ExitStack()
        self._progress: Any = None
        self._before_shown = 0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._quiet = True
        self._stack.close()

    def advance(self, pairs: int) -> None:
        """So many more pairs have their score."""
        if self._update is not None:
            self._update(pairs)
        if self._quiet:
            return
        if self._progress is None and not self._show():
            self._before_shown += pairs
            return
        self._progress.advance(pairs + self._before_shown)
        self._before_shown = 0

    def _show(self) -> bool:
        if time.monotonic() < self._show_at or not self._shown.acquire(blocking=False):
            return False
        self._stack.callback(self._shown.release)
        self._progress = self._stack.enter_context(progress("search", self._total, "pairs"))
        return True
