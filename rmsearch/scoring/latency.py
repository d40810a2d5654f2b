"""How long one query takes when it comes alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rmsearch.retrieval.candidates import Pairs

if TYPE_CHECKING:
    from rmsearch.engines import Scorer


async def measure_latency(scorer: Scorer, pairs: Pairs, queries: int) -> dict[str, float]:
    """Score the candidates of the first ``queries`` queries, one query at a time, after one untimed query.

    Returns the number of queries, their mean number of pairs, and p50, p95 and the mean in milliseconds per query.
    """
    import numpy as np

    seconds, counts = [], []
    for q in [0, *range(min(queries, len(pairs.candidates)))]:
        texts = list(pairs.texts(np.arange(pairs.offsets[q], pairs.offsets[q + 1])))
        started = time.perf_counter()
        await scorer.score(texts)
        seconds.append(time.perf_counter() - started)
        counts.append(len(texts))
    taken = np.array(seconds[1:]) * 1000
    p50, p95 = np.percentile(taken, [50, 95])
    facts = {"p50_ms": p50, "p95_ms": p95, "mean_ms": taken.mean(), "pairs_per_query": np.mean(counts[1:])}
    return {"queries": len(taken), **{name: round(float(value), 2) for name, value in facts.items()}}
