"""Batches on their way to a backend: bounded in flight, fair between callers, nothing left behind on failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rmsearch.engines.loaded import Closable, LoadedModel
from rmsearch.engines.pairs import Window
from rmsearch.errors import ConfigError, ModelError
from rmsearch.prompts.renderer import Rendered


@dataclass(frozen=True)
class Limits:
    """What a backend takes at once.

    batch_tokens, batch_size: per batch (padded tokens when ``padded``); in_flight: batches at a time;
    padded: rows of a batch are filled up to the longest, so batches are sorted by length;
    prefix_cache: texts that share their beginning go one after the other.
    """

    batch_tokens: int
    batch_size: int
    in_flight: int
    padded: bool
    prefix_cache: bool


class Backend(Closable, Protocol):
    """A model that scores model inputs. ``forward`` returns float32[len(batch)], in order."""

    limits: Limits

    async def forward(self, batch: list[Any]) -> np.ndarray: ...


@dataclass
class Stats:
    """Counts since loading. pairs: asked for; scored: sent to the model; seconds: while the model had work."""

    pairs: int = 0
    scored: int = 0
    tokens: int = 0
    truncated: int = 0
    seconds: float = 0.0
    _running: int = field(default=0, repr=False)
    _since: float = field(default=0.0, repr=False)

    def enter(self) -> None:
        """A batch goes to the model."""
        if self._running == 0:
            self._since = time.perf_counter()
        self._running += 1

    def leave(self) -> None:
        """A batch came back, or failed."""
        self._running -= 1
        if self._running == 0:
            self.seconds += time.perf_counter() - self._since

    def count(self, batch: Sequence[Rendered]) -> None:
        """Adds a scored batch."""
        self.scored += len(batch)
        self.tokens += sum(len(each.ids) for each in batch)
        self.truncated += sum(each.truncated for each in batch)


@dataclass(frozen=True)
class Job:
    """One batch: which of the caller's unique pairs (int64[n]) and their model inputs.

    window: of a stream. again: rather than inputs, the earlier windows and items that have these pairs' rewards.
    """

    index: np.ndarray
    batch: Sequence[Any] = ()
    window: Window | None = None
    again: Sequence[tuple[Window, int]] = ()


def split_batches(lengths: np.ndarray, limits: Limits) -> Iterator[slice]:
    """Consecutive slices of at most batch_size rows and batch_tokens tokens; a longer row goes alone."""
    start, total, longest = 0, 0, 0
    for i, length in enumerate(lengths.tolist()):
        wider = max(longest, length)
        cost = wider * (i - start + 1) if limits.padded else total + length
        if i > start and (cost > limits.batch_tokens or i - start >= limits.batch_size):
            yield slice(start, i)
            start, total, wider = i, 0, length
        total, longest = total + length, wider
    if len(lengths):
        yield slice(start, len(lengths))


class Dispatcher(LoadedModel[Backend]):
    """A backend with its counts; any number of callers may use it at a time."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.stats = Stats()
        self._slots: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def run(self, jobs: AsyncGenerator[Job, None]) -> AsyncGenerator[tuple[Job, np.ndarray], None]:
        """Sends jobs, at most ``in_flight`` at a time, and yields each with its values as it finishes."""
        tasks: set[asyncio.Task[tuple[Job, np.ndarray]]] = set()
        try:
            async with aclosing(jobs):
                async for job in jobs:
                    while len(tasks) >= self.backend.limits.in_flight:
                        for task in await _finished(tasks):
                            yield task.result()
                    tasks.add(asyncio.create_task(self._forward(job)))
            while tasks:
                for task in await _finished(tasks):
                    yield task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, job: Job) -> tuple[Job, np.ndarray]:
        if job.again:
            for earlier in {window for window, _ in job.again}:
                await earlier.scored.wait()
            return job, np.array([window.rewards[item] for window, item in job.again], dtype=np.float32)
        async with self._free_slot():
            self.require_open()
            self.stats.enter()
            try:
                values = await self.backend.forward(list(job.batch))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._closed and task is not None and not task.cancelling():
                    raise ConfigError("this model was closed while it worked", remedy="Close it last") from None
                raise
            finally:
                self.stats.leave()
        if not np.isfinite(values).all():
            raise ModelError("the model gave a value that is no finite number", remedy="Load it with dtype='float32'")
        self.stats.count(job.batch)
        if job.window is not None:
            job.window.put(job.index, values)
        return job, values

    def _free_slot(self) -> asyncio.Semaphore:
        """Slots of the backend, first come, first served, so callers take turns; new ones for each event loop."""
        loop = asyncio.get_running_loop()
        if self._slots is None or self._slots[0] is not loop:
            self._slots = (loop, asyncio.Semaphore(self.backend.limits.in_flight))
        return self._slots[1]


async def _finished(tasks: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Waits for one task or more to finish and takes them out of the set."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    tasks -= done
    for task in done:  # one failure is raised; the others count as seen, or asyncio would complain about them later
        if not task.cancelled():
            task.exception()
    return done
