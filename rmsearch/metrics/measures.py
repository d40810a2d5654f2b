"""Measures of a run against qrels, computed by trec_eval's own code through pytrec_eval.

A query that the run lacks counts as 0, and so does one without relevant keys, as in trec_eval; the mean is over all
queries of the qrels. Grades of 0 and below are not relevant. nDCG has linear gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rmsearch.errors import ConfigError, MissingExtraError

CUTOFFS = (1, 3, 5, 10, 20, 100)
FAMILIES = {"nDCG": "ndcg_cut", "AP": "map_cut", "RR": "recip_rank", "R": "recall", "P": "P"}  # trec_eval's names
MEASURES = tuple(f"{family}@{k}" for family in FAMILIES for k in CUTOFFS)
PRIMARY = "nDCG@10"
Qrels = Mapping[str, Mapping[str, int]]
Ranking = Mapping[str, Mapping[str, float]]  # a run: query id -> key id -> score, best first


@dataclass(frozen=True)
class Scores:
    """Per-query values: measure -> float64[n], in the order of ``query_ids``; ``missing`` are queries the run lacks."""

    query_ids: list[str]
    values: dict[str, np.ndarray]
    missing: list[str]

    def mean(self, measure: str) -> float:
        return float(self.values[measure].mean())


def evaluate(qrels: Qrels, run: Ranking, measures: Sequence[str] = MEASURES) -> Scores:
    """Per-query values of the measures (``nDCG@10``, ``AP@100``, ``RR@10``, ``R@100``, ``P@5``; any cut-off).

    Raises ConfigError for an unknown measure or qrels without queries, MissingExtraError without pytrec_eval.
    """
    try:
        import pytrec_eval
    except ImportError:
        raise MissingExtraError("pytrec-eval-terrier", "eval") from None
    if not qrels:
        raise ConfigError("the qrels hold no queries", where="metrics")
    parsed = {measure: _parse(measure) for measure in measures}
    query_ids = sorted(qrels)
    ranked = {query: dict(run[query]) for query in query_ids if run.get(query)}
    # trec_eval's code crashes at grades below -1
    judged = {query: {key: max(grade, 0) for key, grade in qrels[query].items()} for query in ranked}
    names = {name if name == "recip_rank" else f"{name}.{k}" for name, k in parsed.values()}
    found = pytrec_eval.RelevanceEvaluator(judged, names).evaluate(ranked)
    values = {}
    for measure, (name, k) in parsed.items():
        column = name if name == "recip_rank" else f"{name}_{k}"
        of_query = np.array([found[query][column] if query in found else 0.0 for query in query_ids])
        # trec_eval knows the reciprocal rank without a cut-off only: ranks past k give 0
        values[measure] = np.where(of_query > 1 / (k + 0.5), of_query, 0.0) if name == "recip_rank" else of_query
    return Scores(query_ids, values, [query for query in query_ids if query not in ranked])


def ndcg(qrels: Qrels, run: Ranking, k: int = 10) -> float:
    """Mean nDCG@k."""
    return evaluate(qrels, run, [f"nDCG@{k}"]).mean(f"nDCG@{k}")


def _parse(measure: str) -> tuple[str, int]:
    family, _, cutoff = measure.partition("@")
    if family not in FAMILIES or not cutoff.isascii() or not cutoff.isdigit() or int(cutoff) < 1:
        remedy = f"Write one of {', '.join(FAMILIES)} with a cut-off: nDCG@10"
        raise ConfigError(f"unknown measure {measure!r}", remedy=remedy)
    return FAMILIES[family], int(cutoff)
