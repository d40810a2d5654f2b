"""Who closes a backend: its one owner, once."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from rmsearch.errors import ConfigError


class Closable(Protocol):
    """What every backend has beside its work."""

    async def close(self) -> None: ...

    def close_sync(self) -> None: ...


B = TypeVar("B", bound=Closable)


class Owner(Generic[B]):
    """Holds a backend until it is closed."""

    def __init__(self, backend: B) -> None:
        self.backend = backend
        self._closed = False

    def require_open(self) -> None:
        """ConfigError once closed."""
        if self._closed:
            raise ConfigError("this model is closed", remedy="Load it again")

    async def close(self) -> None:
        """Frees the model. Safe to call twice."""
        if not self._closed:
            self._closed = True
            await self.backend.close()

    def close_sync(self) -> None:
        """``close`` for code outside of a coroutine; also works inside a running event loop."""
        if not self._closed:
            self._closed = True
            self.backend.close_sync()
