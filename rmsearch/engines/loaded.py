"""A loaded model: the backend behind a scorer, an embedder or a generator, until it is closed."""

from __future__ import annotations

import asyncio
from typing import Generic, Protocol, TypeVar

from rmsearch.errors import ConfigError


class Closable(Protocol):
    """What every backend has beside its work."""

    def close_sync(self) -> None: ...


B = TypeVar("B", bound=Closable)


class LoadedModel(Generic[B]):
    """A backend that is closed once, and refuses work from then on."""

    def __init__(self, backend: B) -> None:
        self.backend = backend
        self._closed = False

    def require_open(self) -> None:
        """Raise ConfigError once closed."""
        if self._closed:
            raise ConfigError("this model is closed", remedy="Load it again")

    async def close(self) -> None:
        """Free the model. Safe to call twice."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """``close`` for code outside of a coroutine; also works inside a running event loop."""
        if not self._closed:
            self._closed = True
            self.backend.close_sync()
