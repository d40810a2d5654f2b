"""Fusion of two stages' scores of the same candidates: each normalised per query, then a weighted sum.

The weight is the reranker's share. It is fitted on a development split only, never on the evaluated one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rmsearch.errors import ConfigError
from rmsearch.metrics.measures import Qrels, Ranking, ndcg
from rmsearch.retrieval.runs import ordered

Method = Literal["zscore", "minmax"]
WEIGHTS = tuple(round(0.05 * i, 2) for i in range(21))


def normalised(scores: Mapping[str, float], method: Method) -> dict[str, float]:
    """Scores of one query with mean 0 and deviation 1 (zscore), or from 0 to 1 (minmax); all 0 when all are equal."""
    values = list(scores.values())
    if not values:
        return {}
    if method == "zscore":
        low = sum(values) / len(values)
        width = (sum((v - low) ** 2 for v in values) / len(values)) ** 0.5
    else:
        low = min(values)
        width = max(values) - low
    return {key: (v - low) / width if width > 0 else 0.0 for key, v in scores.items()}


def fuse(first: Mapping[str, float], second: Mapping[str, float], weight: float, method: Method) -> dict[str, float]:
    """One query: ``weight`` × second + (1 − ``weight``) × first, best first. Both must score the same keys."""
    if first.keys() != second.keys():
        raise ConfigError("the two stages scored different keys of a query", where="fusion")
    a, b = normalised(first, method), normalised(second, method)
    return ordered({key: weight * b[key] + (1 - weight) * a[key] for key in first})


@dataclass(frozen=True)
class Fit:
    """The weight that gave the best nDCG@10 on a development split, and the whole curve (weight -> nDCG@10)."""

    weight: float
    ndcg: float
    curve: dict[float, float]


def fit_weight(qrels: Qrels, first: Ranking, second: Ranking, method: Method) -> Fit:
    """Try `WEIGHTS` on a development split; of equals the one nearest to an even mix wins."""
    curve = {}
    for weight in WEIGHTS:
        fused = {query: fuse(first[query], second[query], weight, method) for query in first if query in second}
        curve[weight] = ndcg(qrels, fused)
    best = max(curve, key=lambda weight: (round(curve[weight], 12), -abs(weight - 0.5), -weight))
    return Fit(best, curve[best], curve)
