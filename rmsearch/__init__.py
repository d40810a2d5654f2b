"""RMSearch: search ranked by a reward model. Public names load on first use, so importing this stays light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmsearch.interrupts import watch_command

__version__ = "0.1.0"
watch_command()

if TYPE_CHECKING:
    from rmsearch.rm_trainer import RMTrainer as RMTrainer
    from rmsearch.search import Search as Search

_HOMES = {"Search": "rmsearch.rmsearch", "RMTrainer": "rmsearch.rm_trainer"}
__all__ = ["RMTrainer", "Search", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rmsearch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
