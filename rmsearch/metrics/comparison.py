"""Several runs over the same queries: their measures, and how each one differs from the baseline."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmsearch.metrics.measures import MEASURES, PRIMARY, Scores
from rmsearch.metrics.significance import CONFIDENCE, compare, holm, intervals

COMPARED = ("nDCG@10", "AP@100", "RR@10", "R@100", "P@10")


def summary(scores: dict[str, Scores], permutations: int, seed: int) -> dict[str, Any]:
    """Means, intervals, tests against the first run, and per-query nDCG@10, as JSON."""
    baseline = next(iter(scores))
    runs: dict[str, dict[str, Any]] = {}
    for name, each in scores.items():
        bounds = intervals(np.stack([each.values[m] for m in MEASURES]), seed=seed)
        runs[name] = {
            "means": {m: each.mean(m) for m in MEASURES},
            "intervals": {m: [float(low), float(high)] for m, (low, high) in zip(MEASURES, bounds, strict=True)},
            "missing_queries": len(each.missing),
        }
    for measure in COMPARED:
        base = scores[baseline].values[measure]
        tests = {
            name: compare(each.values[measure], base, permutations=permutations, seed=seed)
            for name, each in scores.items()
            if name != baseline
        }
        adjusted = holm([test.p_randomisation for test in tests.values()])
        for (name, test), p in zip(tests.items(), adjusted, strict=True):
            runs[name].setdefault("comparison", {})[measure] = {**vars(test), "p_holm": p}
    query_ids = scores[baseline].query_ids
    per_query = {n: dict(zip(query_ids, s.values[PRIMARY].tolist(), strict=True)) for n, s in scores.items()}
    return {
        "queries": len(query_ids),
        "baseline": baseline,
        "confidence": CONFIDENCE,
        "permutations": permutations,
        "seed": seed,
        "runs": runs,
        "per_query": {PRIMARY: per_query},
    }
