"""An engine in an event loop of its own thread, so that callers of any loop, or of several, can share it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from rmsearch.errors import ConfigError, RetryableError, RMSearchError

if TYPE_CHECKING:
    from rmsearch.engines import Scorer

T = TypeVar("T")


class ClosedError(ConfigError, RuntimeError):
    """A Search used after ``close()``, or closed under a running call."""

    def __init__(self) -> None:
        super().__init__("this Search is closed", remedy="Make a new Search, and close it after its last use")


class Engine:
    """A scorer that is loaded at first use and lives in one background event loop.

    An engine such as vLLM's is bound to the loop in which it first ran. A loop of its own makes it usable from several
    ``asyncio.run`` calls and threads, and lets `close` be a plain function that works inside a running loop.
    """

    def __init__(self, load: Callable[[], Scorer]) -> None:
        self._load = load
        self._scorer: Scorer | None = None
        self._failure: RMSearchError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._last: asyncio.Task[None] | None = None
        self.closed = False

    @property
    def scorer(self) -> Scorer | None:
        """The scorer, once loaded."""
        return self._scorer

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
            loop = self._loop or self._start()
            return asyncio.run_coroutine_threadsafe(self._run(work), loop)

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

    def _start(self) -> asyncio.AbstractEventLoop:
        self._loop = loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(loop,), name="rmsearch-engine", daemon=True)
        self._thread.start()
        return loop

    async def _run(self, work: Callable[[Scorer], Coroutine[Any, Any, T]]) -> T:
        return await work(self._loaded())

    def _loaded(self) -> Scorer:
        """Loads in the loop's own thread: nothing else could run there before, and calls meanwhile queue up."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._scorer is None:
            try:
                self._scorer = self._load()
            except RMSearchError as error:
                if not isinstance(error, RetryableError):  # waiting callers need not load the same model to see it fail
                    self._failure = error
                raise
        return self._scorer

    def close(self) -> None:
        """Cancel what runs, close the scorer and end the thread. Safe to call again and inside a running loop."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        loop, thread = self._loop, self._thread
        if loop is None or thread is None or os.getpid() != self._process:
            return
        if threading.current_thread() is thread:  # the garbage collector may run in any thread, so in this one too
            self._last = loop.create_task(self._finish())
            self._last.add_done_callback(lambda _: loop.stop())
            return
        with contextlib.suppress(RuntimeError):  # at interpreter exit the loop can no longer start helper threads
            asyncio.run_coroutine_threadsafe(self._finish(), loop).result()
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join()

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            await scorer.close()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        with contextlib.suppress(RuntimeError):
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
