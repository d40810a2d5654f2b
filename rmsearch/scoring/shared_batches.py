"""Small calls that wait for the model at the same time go to it as one batch, each with its own outcome."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines import Scorer

SMALL = 64  # pairs of a call that may share a batch; larger ones fill batches by themselves
_TOGETHER = 256  # pairs of a shared batch: about what a model takes in one pass, so that nobody waits for many passes
_LANES = 2  # shared batches at a time: one is being tokenised while the other is with the model


@dataclass(frozen=True)
class _Part:
    """One caller's pairs and where the rewards go."""

    pairs: list[tuple[str, str]]
    rewards: asyncio.Future[np.ndarray]


class Together:
    """Merges small calls on one scorer. Lives in the engine's loop; adds no waiting when the model is idle."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._waiting: deque[_Part] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """float32[n] rewards, in order. Cancelling one caller leaves the others of its batch alone."""
        part = _Part(pairs, asyncio.get_running_loop().create_future())
        self._waiting.append(part)
        self._start()
        return await part.rewards

    def _start(self) -> None:
        while self._waiting and len(self._running) < _LANES:
            task = asyncio.create_task(self._run(self._take()))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    def _take(self) -> list[_Part]:
        """The parts that waited longest, at least one, `_TOGETHER` pairs at most; cancelled ones are dropped."""
        taken: list[_Part] = []
        size = 0
        while self._waiting and (not taken or size + len(self._waiting[0].pairs) <= _TOGETHER):
            part = self._waiting.popleft()
            if not part.rewards.done():
                taken.append(part)
                size += len(part.pairs)
        return taken

    async def _run(self, parts: list[_Part]) -> None:
        try:
            rewards = await self._scorer.score([pair for part in parts for pair in part.pairs])
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs to the callers
            await self._fail(parts, error)
            return
        start = 0
        for part in parts:
            stop = start + len(part.pairs)
            if not part.rewards.done():
                part.rewards.set_result(rewards[start:stop])
            start = stop

    async def _fail(self, parts: list[_Part], error: Exception) -> None:
        """A batch of several may have failed for one caller's texts, so each is tried by itself."""
        if len(parts) > 1:
            for part in parts:
                await self._run([part])
        elif parts and not parts[0].rewards.done():
            parts[0].rewards.set_exception(error)
