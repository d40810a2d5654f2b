"""Scores as stages take them from a scorer: with a time limit, and counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING

from rmsearch.errors import RetryableError
from rmsearch.stage import Run

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines import Scorer


async def scores_in_time(
    scorer: Scorer, pairs: Iterable[tuple[str, str]], timeout: float, where: str | None = None
) -> AsyncGenerator[tuple[np.ndarray, np.ndarray]]:
    """(positions, rewards) of the pairs as they come. RetryableError when none came for ``timeout`` seconds."""
    async with aclosing(scorer.stream(pairs)) as results:
        while True:
            try:
                async with asyncio.timeout(timeout):
                    scored = await anext(results)
            except StopAsyncIteration:
                return
            except TimeoutError:
                problem = f"no score came for {timeout:g} seconds"
                remedy = "Run again; it goes on where it stopped"
                raise RetryableError(problem, where=where, remedy=remedy) from None
            yield scored


def count_scores(run: Run, scorer: Scorer, **more: int) -> None:
    """Puts what was scored, ``more`` counts, the rate and the model's contract into the run."""
    stats = scorer.stats
    run.counts |= {"scored": stats.scored, **more, "tokens": stats.tokens, "truncated": stats.truncated}
    if stats.seconds > 0:
        run.counts["pairs_per_second"] = round(stats.scored / stats.seconds, 1)
    run.note(model_seconds=round(stats.seconds, 3))
    if (contract := scorer.contract) is not None:
        facts = contract.model_dump(mode="json", include={"architecture", "template_hash", "order", "max_length"})
        run.note(contract=facts | {"template": contract.template.name})
