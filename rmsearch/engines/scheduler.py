"""The scheduler in front of every backend: no pair scored twice, packed batches, bounded in flight, streamed results.

Texts are interned and tokenised once; pairs are numbers until their batch is sent. Work proceeds in windows of
``WINDOW`` pairs, so memory stays bounded however many pairs come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Any, Protocol

import numpy as np

from rmsearch.engines.dispatch import Backend, Dispatcher, Job, split_batches
from rmsearch.engines.pairs import Memory, Texts, Window
from rmsearch.models.contract import Contract
from rmsearch.prompts.renderer import Query, key_text, query_text

WINDOW = 8192


class PreparedPairs(Protocol):
    """See :class:`rmsearch.prompts.renderer.Prepared`."""

    def lengths(self, pairs: np.ndarray) -> np.ndarray: ...

    def render(self, pairs: Sequence[tuple[int, int]]) -> Sequence[Any]: ...


class PairRenderer(Protocol):
    """See :class:`rmsearch.prompts.renderer.Renderer`; a server that takes text gets one that leaves text as it is."""

    def prepare(self, queries: Sequence[str], keys: Sequence[str]) -> PreparedPairs: ...


class PairScorer(Dispatcher):
    """A backend behind the scheduler: what ``load_scorer`` returns. Any number of callers may use one at a time."""

    def __init__(self, backend: Backend, renderer: PairRenderer, contract: Contract | None) -> None:
        super().__init__(backend)
        self.contract, self.renderer = contract, renderer

    async def score(self, pairs: Sequence[tuple[Query, str]]) -> np.ndarray:
        """float32[len(pairs)] rewards, in order; equal pairs are scored once. ConfigError: a pair is no text."""
        texts = Texts(pairs)
        self.stats.pairs += len(texts.inverse)
        return (await self._score_unique(texts.queries, texts.keys, texts.pairs))[texts.inverse]

    async def score_grid(self, queries: Sequence[Query], keys: Sequence[str]) -> np.ndarray:
        """float32[len(queries), len(keys)] rewards; equal queries and equal keys are scored once."""
        rows: dict[str, int] = {}
        columns: dict[str, int] = {}
        row = [rows.setdefault(query_text(query, f"queries[{i}]"), len(rows)) for i, query in enumerate(queries)]
        column = [columns.setdefault(key_text(key, f"keys[{i}]"), len(columns)) for i, key in enumerate(keys)]
        self.stats.pairs += len(row) * len(column)
        pairs = np.indices((len(rows), len(columns))).reshape(2, -1).T
        unique = await self._score_unique(list(rows), list(columns), pairs)
        grid = unique.reshape(len(rows), len(columns))
        return grid[np.ix_(np.array(row, dtype=np.int64), np.array(column, dtype=np.int64))]

    async def stream(self, pairs: Iterable[tuple[Query, str]]) -> AsyncGenerator[tuple[np.ndarray, np.ndarray], None]:
        """(positions int64[n], rewards float32[n]) as batches finish, in any order, every position once.

        ``pairs`` may be endless: it is read (in a thread) as results are taken. A pair is scored once per
        ``REMEMBERED`` other pairs. Leave early with ``contextlib.aclosing`` to stop the work at once.
        """
        async with aclosing(self.run(self._stream_jobs(pairs))) as results:
            async for job, rewards in results:
                assert job.window is not None
                yield job.window.result(job.index, rewards)

    async def _score_unique(self, queries: list[str], keys: list[str], pairs: np.ndarray) -> np.ndarray:
        rewards = np.empty(len(pairs), dtype=np.float32)
        async with aclosing(self.run(self._jobs(queries, keys, pairs))) as results:
            async for job, values in results:
                rewards[job.index] = values
        return rewards

    async def _jobs(self, queries: Sequence[str], keys: Sequence[str], pairs: np.ndarray) -> AsyncGenerator[Job, None]:
        """The batches of unique pairs (int64[n, 2]), window by window."""
        limits = self.backend.limits
        arranged = self._adjacent(pairs) if limits.prefix_cache else np.arange(len(pairs))
        for start in range(0, len(pairs), WINDOW):
            index = arranged[start : start + WINDOW]
            used_queries, query = np.unique(pairs[index, 0], return_inverse=True)
            used_keys, key = np.unique(pairs[index, 1], return_inverse=True)
            texts = [queries[i] for i in used_queries], [keys[i] for i in used_keys]
            prepared = await asyncio.to_thread(self.renderer.prepare, *texts)
            local = np.stack([query.reshape(-1), key.reshape(-1)], axis=1)
            lengths = prepared.lengths(local)
            order = np.argsort(-lengths, kind="stable") if limits.padded else np.arange(len(local))
            for part in split_batches(lengths[order], limits):
                chosen = order[part]
                yield Job(index[chosen], prepared.render(local[chosen].tolist()))

    def _adjacent(self, pairs: np.ndarray) -> np.ndarray:
        """The order in which pairs with the same first text follow each other."""
        key_first = self.contract is not None and self.contract.order == "key_first"
        return np.argsort(pairs[:, 1 if key_first else 0], kind="stable")

    async def _stream_jobs(self, pairs: Iterable[tuple[Query, str]]) -> AsyncGenerator[Job, None]:
        source, offset, memory = iter(pairs), 0, Memory()
        while True:
            texts = await asyncio.to_thread(lambda at: Texts(islice(source, WINDOW), at), offset)
            if not len(texts.inverse):
                return
            self.stats.pairs += len(texts.inverse)
            window = Window(texts, offset)
            offset += len(texts.inverse)
            fresh, again = memory.sort(window)
            async with aclosing(self._jobs(texts.queries, texts.keys, texts.pairs[fresh])) as jobs:
                async for job in jobs:
                    yield Job(fresh[job.index], job.batch, window)
            if again:
                yield Job(
                    np.array([item for item, *_ in again]), (), window, [(earlier, its) for _, earlier, its in again]
                )
