"""Measures of a run against qrels, computed by trec_eval's own code through ir-measures.

A query that the run lacks counts as 0, and so does one without relevant keys, as in trec_eval; the mean is over all
queries of the qrels. Grades of 0 and below are not relevant. nDCG has linear gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rmsearch.errors import ConfigError, MissingExtraError

CUTOFFS = (1, 3, 5, 10, 20, 100)
FAMILIES = ("nDCG", "AP", "RR", "R", "P")
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

    Raises ConfigError for an unknown measure or qrels without queries, MissingExtraError without ir-measures.
    """
    try:
        import ir_measures
    except ImportError:
        raise MissingExtraError("ir-measures", "eval") from None
    if not qrels:
        raise ConfigError("the qrels hold no queries", where="metrics")
    wanted = {measure: _parse(measure) for measure in measures}
    asked = {("RR" if family == "RR" else f"{family}@{k}") for family, k in wanted.values()}
    query_ids = sorted(qrels)
    row = {query: i for i, query in enumerate(query_ids)}
    raw = {name: np.zeros(len(query_ids)) for name in asked}
    judged = {query: dict(keys) for query, keys in qrels.items()}
    found = {query: dict(scores) for query, scores in run.items() if query in row and scores}
    parsed = [ir_measures.parse_measure(name) for name in sorted(asked)]
    for value in ir_measures.pytrec_eval.iter_calc(parsed, judged, found):
        raw[str(value.measure)][row[value.query_id]] = value.value
    values = {}
    for measure, (family, k) in wanted.items():
        # trec_eval knows the reciprocal rank without a cut-off only: ranks past k give 0
        values[measure] = np.where(raw["RR"] > 1 / (k + 0.5), raw["RR"], 0.0) if family == "RR" else raw[measure]
    return Scores(query_ids, values, [query for query in query_ids if query not in found])


def ndcg(qrels: Qrels, run: Ranking, k: int = 10) -> float:
    """Mean nDCG@k."""
    return evaluate(qrels, run, [f"nDCG@{k}"]).mean(f"nDCG@{k}")


def _parse(measure: str) -> tuple[str, int]:
    family, _, cutoff = measure.partition("@")
    if family not in FAMILIES or not cutoff.isascii() or not cutoff.isdigit() or int(cutoff) < 1:
        remedy = f"Write one of {', '.join(FAMILIES)} with a cut-off: nDCG@10"
        raise ConfigError(f"unknown measure {measure!r}", remedy=remedy)
    return family, int(cutoff)
