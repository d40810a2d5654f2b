"""A thread with an event loop, for what outlives its callers' loops: models, connections, engines."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from rmsearch.interrupts import stopping

P = ParamSpec("P")
T = TypeVar("T")


class LoopThread:
    """One thread with one event loop, until `stop`. Callers of any loop, or of several, can share it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = False
        self._last: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, _halt, self._loop).atexit = False  # of one that nobody stopped

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the thread. Cancelling the future cancels it there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine that runs in the thread. Cancelling reaches it."""
        return await asyncio.wrap_future(self.submit(work))

    def call_sync(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine that runs in the thread, blocking the caller."""
        return self.submit(work).result()

    async def run(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Await a function that blocks the thread, so that calls never overlap. A cancelled call that has begun ends
        unseen; one that waits while the thread is stopped is cancelled."""

        async def work() -> T:
            if self._stopped:
                raise asyncio.CancelledError
            return function(*arguments, **options)

        return await self.call(work())

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what runs, await ``last`` and end the thread. Works within the thread, too, and more than once.

        Does not wait when a signal ends the process.
        """
        if self._stopped:
            return
        self._stopped = True
        if threading.current_thread() is self._thread:  # the garbage collector may run in any thread, so in this one
            self._last = self._loop.create_task(self._finish(last))
            self._last.add_done_callback(lambda _: self._loop.stop())
        elif not stopping():
            with contextlib.suppress(RuntimeError):  # at interpreter exit the loop can start no helper threads
                self.call_sync(self._finish(last))
            _halt(self._loop)
            self._thread.join()

    async def _finish(self, last: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if last is not None:
            await last()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    # What is started here inherits this: Ctrl-C in a terminal is then for the main process alone, which ends them all
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        with contextlib.suppress(RuntimeError):
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _halt(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # it is closed already
        loop.call_soon_threadsafe(loop.stop)
