"""The documented module name of async top-k search; the code is in `rmsearch.search`."""

from __future__ import annotations

from rmsearch.search import ClosedError, InputError, Result, Search, SearchUpdate

__all__ = ["ClosedError", "InputError", "Result", "Search", "SearchUpdate"]
