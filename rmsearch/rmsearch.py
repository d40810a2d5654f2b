"""Search under its documented module name, with the argument names of older versions as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rmsearch import search
from rmsearch.prompts.renderer import Query
from rmsearch.scoring.arguments import optional_number
from rmsearch.search import ClosedError, InputError, RankedKey, Result, SearchUpdate

__all__ = ["ClosedError", "InputError", "RankedKey", "Result", "Search", "SearchUpdate"]


class SearchWithOldNames(search.Search):
    __doc__ = search.Search.__doc__

    async def __call__(
        self,
        queries: Sequence[Query] | None = None,
        keys: Sequence[str] | None = None,
        k: int = 5,
        return_relevance: bool = True,
        disable_log: bool = False,
        progress_bar: Any = None,
        batch_size: int | None = None,
        query_batch_size: int | None = None,
        *,
        candidates: Sequence[Sequence[int]] | None = None,
        checkpoint: str | None = None,
        queires: Sequence[Query] | None = None,
    ) -> list[Result]:
        """As `rmsearch.search.Search.__call__`. queires: an old spelling of queries. batch_size: accepted, no effect:
        the engine packs its batches by tokens."""
        optional_number(batch_size, "batch_size")
        if queires is not None and queries is not None:
            raise InputError("queries and queires are both given", remedy="Give queries")
        return await super().__call__(
            queries if queires is None else queires,  # type: ignore[arg-type]  # None is refused there
            keys,  # type: ignore[arg-type]
            k,
            return_relevance,
            disable_log,
            progress_bar,
            query_batch_size=query_batch_size,
            candidates=candidates,
            checkpoint=checkpoint,
        )

    def close(self, *, kill: bool = False) -> None:
        """As `rmsearch.search.Search.close`. kill: accepted, no effect: closing is quick anyway."""
        super().close()


Search = SearchWithOldNames
