"""The scheduler in front of every backend: no pair scored twice, packed batches, bounded in flight, streamed results.

Texts are looked up and tokenised once per window; pairs are numbers until their batch is sent. Work proceeds in windows
of ``WINDOW`` pairs, so memory stays bounded however many pairs come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import numpy as np

from rmsearch.engines.dispatch import Backend, Dispatcher, Job, split_batches
from rmsearch.engines.pairs import Memory, NumberedPairs, UniquePairs, Window, windows
from rmsearch.models.contract import Contract
from rmsearch.prompts.renderer import Query

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
        asked = UniquePairs.of(pairs)
        self.stats.pairs += len(asked.inverse) - len(asked.pairs)  # the unique ones count as they are streamed
        order = self._adjacent(asked.pairs)
        unique = NumberedPairs(asked.queries, asked.keys, asked.pairs[order], distinct=True)
        rewards = np.empty(len(unique), dtype=np.float32)
        async with aclosing(self.stream(unique)) as results:
            async for positions, values in results:
                rewards[order[positions]] = values
        return rewards[asked.inverse]

    async def stream(self, pairs: Iterable[tuple[Query, str]]) -> AsyncGenerator[tuple[np.ndarray, np.ndarray], None]:
        """(positions int64[n], rewards float32[n]) as batches finish, in any order, every position once.

        ``pairs``: texts, or `NumberedPairs`, whose texts are looked up once per window. They may be endless: they are
        read (in a thread) as results are taken. A pair is scored once per ``REMEMBERED`` other pairs. Leave early with
        ``contextlib.aclosing`` to stop the work at once.
        """
        async with aclosing(self.run(self._jobs(pairs))) as results:
            async for job, rewards in results:
                assert job.window is not None
                yield job.window.result(job.index, rewards)

    async def _jobs(self, pairs: Iterable[tuple[Query, str]]) -> AsyncGenerator[Job, None]:
        memory = None if isinstance(pairs, NumberedPairs) and pairs.distinct else Memory()
        source, offset = windows(pairs, WINDOW), 0
        while (unique := await asyncio.to_thread(next, source, None)) is not None:
            self.stats.pairs += len(unique.inverse)
            window = Window(unique, offset)
            offset += len(unique.inverse)
            fresh, again = (np.arange(len(unique.pairs)), []) if memory is None else memory.sort(unique, window)
            window.expect(len(fresh))
            async with aclosing(self._batches(unique, fresh)) as batches:
                async for index, batch in batches:
                    yield Job(index, batch, window)
            if again:
                yield Job(
                    np.array([item for item, *_ in again]), (), window, [(earlier, its) for _, earlier, its in again]
                )

    async def _batches(
        self, unique: UniquePairs, items: np.ndarray
    ) -> AsyncGenerator[tuple[np.ndarray, Sequence[Any]], None]:
        """The unique pairs ``items`` (int64[n]) as batches: which they are, and their model inputs."""
        if not len(items):
            return
        limits = self.backend.limits
        items = items[self._adjacent(unique.pairs[items])]
        pairs = unique.pairs[items]
        prepared = await asyncio.to_thread(self.renderer.prepare, unique.queries, unique.keys)
        lengths = prepared.lengths(pairs)
        order = np.argsort(-lengths, kind="stable") if limits.padded else np.arange(len(pairs))
        for part in split_batches(lengths[order], limits):
            chosen = order[part]
            yield items[chosen], prepared.render(pairs[chosen].tolist())

    def _adjacent(self, pairs: np.ndarray) -> np.ndarray:
        """The order in which pairs with the same first text follow each other, where the backend gains by it."""
        if not self.backend.limits.prefix_cache:
            return np.arange(len(pairs))
        key_first = self.contract is not None and self.contract.order == "key_first"
        return np.argsort(pairs[:, 1 if key_first else 0], kind="stable")
