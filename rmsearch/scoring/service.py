"""A scorer in an event loop of its own thread, so that callers of any loop, or of several, can share it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from rmsearch.engines import Scorer
from rmsearch.engines.threads import LoopThread
from rmsearch.errors import ConfigError, RetryableError, RMSearchError

T = TypeVar("T")


class ClosedError(ConfigError, RuntimeError):
    """A Search used after ``close()``, or closed under a running call."""

    def __init__(self) -> None:
        super().__init__("this Search is closed", remedy="Make a new Search, and close it after its last use")


class SharedScorer:
    """A scorer that is loaded at first use and lives in one background event loop.

    An engine such as vLLM's is bound to the loop in which it first ran. A loop of its own makes it usable from several
    ``asyncio.run`` calls and threads, and lets `close` be a plain function that works inside a running loop.
    """

    def __init__(self, load: Callable[[], Scorer]) -> None:
        self._load = load
        self.scorer: Scorer | None = None  # once loaded
        self._failure: RMSearchError | None = None
        self._thread: LoopThread | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()
        self.closed = False

    def submit(self, work: Callable[[Scorer], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run ``work(scorer)`` in the background loop; cancelling the future cancels it there.

        ClosedError after `close`; ConfigError in a forked child, where the loop's thread does not exist.
        """
        if os.getpid() != self._process:
            raise ConfigError(
                "this Search was made before the process forked", remedy="Make a Search in each process that uses one"
            )
        with self._lock:
            if self.closed:
                raise ClosedError
            if self._thread is None:
                self._thread = LoopThread("rmsearch-engine")
            return self._thread.submit(self._run(work))

    async def call(self, work: Callable[[Scorer], Coroutine[Any, Any, T]]) -> T:
        """`submit`, and wait in the caller's loop."""
        return await self.wait(self.submit(work))

    async def wait(self, future: Future[T]) -> T:
        """Wait for a submitted future; ClosedError when `close` cut it short, cancelled when the waiter is."""
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.cancel()
            task = asyncio.current_task()
            if self.closed and not (task and task.cancelling()):
                raise ClosedError from None
            raise

    async def _run(self, work: Callable[[Scorer], Coroutine[Any, Any, T]]) -> T:
        return await work(self._loaded())

    def _loaded(self) -> Scorer:
        """Load in the loop's own thread: nothing else could run there before, and calls meanwhile queue up."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self.scorer is None:
            try:
                self.scorer = self._load()
            except RMSearchError as error:
                if not isinstance(error, RetryableError):  # waiting callers need not load the same model to see it fail
                    self._failure = error
                raise
        return self.scorer

    def close(self) -> None:
        """Cancel what runs, close the scorer and end the thread. Safe to call again and inside a running loop."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        if self._thread is not None and os.getpid() == self._process:
            self._thread.stop(self._close_scorer)

    async def _close_scorer(self) -> None:
        scorer, self.scorer = self.scorer, None
        if scorer is not None:
            await scorer.close()
