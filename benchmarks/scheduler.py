"""2,000 queries x the same 50 keys, 20 % of the queries duplicates: pairs really scored, and what the scheduler costs.

    python benchmarks/scheduler.py [--queries 2000] [--timed-queries 100] [--json FILE]

Two runs: all pairs with a null model (counts, and the scheduler's own seconds), and some of them with the MiniLM
cross-encoder (the model's seconds, and what of the whole time is not the model's).
The target is 5 % of the model's time.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np


class NullBackend:
    """Takes the same batches as the transformers backend on a CPU and answers 0 at once."""

    def __init__(self, limits: Any) -> None:
        self.limits, self.scored = limits, 0

    async def forward(self, batch: list[Any]) -> np.ndarray:
        """Zeros, float32[n]."""
        self.scored += len(batch)
        return np.zeros(len(batch), dtype=np.float32)

    async def close(self) -> None:
        """Nothing to free."""

    def close_sync(self) -> None:
        """Nothing to free."""


def questions(count: int) -> list[str]:
    """``count`` queries of which every fifth repeats an earlier one."""
    unique = common.sentences(count - count // 5, 12, seed=5)
    return unique + unique[: count // 5]


async def scored(scorer: Any, queries: list[str], keys: list[str]) -> None:
    """Have every query scored with every key."""
    from rmsearch.engines.pairs import NumberedPairs

    async for _ in scorer.stream(NumberedPairs(queries, keys)):
        pass


def timed(scorer: Any, backend: Any, queries: list[str], keys: list[str]) -> tuple[float, float]:
    """(seconds of the whole grid, seconds within the model)."""
    inside = 0.0
    original = backend._forward

    def watched(batch: list[Any]) -> np.ndarray:
        nonlocal inside
        start = time.perf_counter()
        try:
            return original(batch)
        finally:
            inside += time.perf_counter() - start

    backend._forward = watched
    start = time.perf_counter()
    asyncio.run(scored(scorer, queries, keys))
    return time.perf_counter() - start, inside


def main() -> None:
    """Measure and print."""
    from rmsearch.engines import load_scorer
    from rmsearch.engines.scheduler import PairScorer

    parser = common.arguments(__doc__ or "")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--timed-queries", type=int, default=100)
    options = parser.parse_args()
    keys = common.sentences(50, 30, seed=6)
    with tempfile.TemporaryDirectory() as scratch:
        real: Any = load_scorer(str(common.minilm_cross_encoder(Path(scratch) / "model")), engine="transformers")
        null = NullBackend(real.backend.limits)
        scheduler = PairScorer(null, real.renderer, real.contract)
        start = time.perf_counter()
        asyncio.run(scored(scheduler, questions(options.queries), keys))
        own = time.perf_counter() - start
        asyncio.run(scored(real, questions(5), keys))
        few = questions(options.timed_queries)
        whole, inside = timed(real, real.backend, few, keys)
    per_pair = inside / (len(set(few)) * len(keys))
    rows = [
        {
            "asked pairs": options.queries * len(keys),
            "unique pairs": len(set(questions(options.queries))) * len(keys),
            "scored pairs": null.scored,
            "scheduler alone, s": own,
            "of the model's time (estimated)": own / (per_pair * null.scored),
            "real run: outside the model": (whole - inside) / inside,
            "model pairs/s": 1 / per_pair,
        }
    ]
    common.report(rows, options.json)


if __name__ == "__main__":
    main()
