"""Several runs over the same queries: their measures, and how each one differs from the baseline."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmsearch.metrics.measures import MEASURES, PRIMARY, Scores
from rmsearch.metrics.significance import CONFIDENCE, compare_all, holm, intervals

COMPARED = ("nDCG@10", "AP@100", "RR@10", "R@100", "P@10")


def summary(scores: dict[str, Scores], permutations: int, seed: int) -> dict[str, Any]:
    """Means, intervals, tests against the first run, and per-query nDCG@10, as JSON."""
    baseline, *others = scores
    values = np.stack([each.values[measure] for each in scores.values() for measure in MEASURES])
    bounds = iter(intervals(values, seed=seed).tolist())
    runs: dict[str, dict[str, Any]] = {
        name: {
            "means": {m: each.mean(m) for m in MEASURES},
            "intervals": {m: next(bounds) for m in MEASURES},
            "missing_queries": len(each.missing),
        }
        for name, each in scores.items()
    }
    pairs = [(measure, name) for measure in COMPARED for name in others]
    if pairs:
        tested = np.stack([scores[name].values[measure] for measure, name in pairs])
        base = np.stack([scores[baseline].values[measure] for measure, _ in pairs])
        tests = dict(zip(pairs, compare_all(tested, base, permutations, seed), strict=True))
        for measure in COMPARED:
            adjusted = holm([tests[measure, name].p_randomisation for name in others])
            for name, p in zip(others, adjusted, strict=True):
                runs[name].setdefault("comparison", {})[measure] = {**vars(tests[measure, name]), "p_holm": p}
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
