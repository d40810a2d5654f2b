"""The page that compares runs: how good, how sure, at what depth, and on which queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rmsearch.datasets.beir import Beir
from rmsearch.metrics.measures import CUTOFFS, FAMILIES, PRIMARY, Qrels, Ranking, ndcg
from rmsearch.reports.page import clipped, render

DEPTHS = (1, 2, 5, 10, 20, 50, 100)
SUMMARY = ["nDCG@10", "RR@10", "AP@100", "R@10", "R@100"]
KEYS_SHOWN = 3
Differences = Sequence[tuple[str, float]]  # query id, nDCG@10 minus the baseline's


def comparison_page(
    beir: Beir,
    runs: Mapping[str, Ranking],
    result: Mapping[str, Any],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str | None,
    examples: int,
) -> bytes:
    """The page. runs: name -> run, the baseline first; result: what ndcg writes; records: name -> run records."""
    baseline, *others = runs
    differences = {name: differences_of(result, name) for name in others}
    best = best_of(result)
    both = {name: runs[name] for name in (baseline, best) if name is not None}
    ordered = differences[best] if best is not None else []
    return render(
        "runs.html.j2",
        title or f"{beir.name}: {' vs '.join(runs)}",
        [f"Split {beir.split}", f"{len(beir.qrels):,} queries", f"{len(beir.corpus):,} keys"],
        result=result,
        best=best,
        primary=PRIMARY,
        shown_measures=SUMMARY,
        highest={measure: max(run["means"][measure] for run in result["runs"].values()) for measure in SUMMARY},
        place={name: i for i, name in enumerate(runs)},
        depths=depth_curves(beir.qrels, runs),
        gains={
            name: [(clipped(beir.queries.get(query, query), 90), difference) for query, difference in each]
            for name, each in differences.items()
        },
        lost=[_query(beir, both, *each) for each in ordered[::-1][:examples] if each[1] < 0],
        gained=[_query(beir, both, *each) for each in ordered[:examples] if each[1] > 0],
        families=FAMILIES,
        cutoffs=CUTOFFS,
        records=records,
    )


def best_of(result: Mapping[str, Any]) -> str | None:
    """The run with the highest nDCG@10 among those compared; one that changes nothing comes last."""

    def rank(name: str) -> tuple[bool, float]:
        test = result["runs"][name]["comparison"][PRIMARY]
        return test["wins"] + test["losses"] > 0, result["runs"][name]["means"][PRIMARY]

    return max((name for name in result["runs"] if name != result["baseline"]), key=rank, default=None)


def differences_of(result: Mapping[str, Any], name: str) -> Differences:
    """The run's differences from the baseline, best gain first."""
    values = result["per_query"][PRIMARY]
    differences = [(query, value - values[result["baseline"]][query]) for query, value in values[name].items()]
    return sorted(differences, key=lambda item: (-item[1], item[0]))


def _query(beir: Beir, runs: Mapping[str, Ranking], query: str, difference: float) -> dict[str, Any]:
    """What is shown of a query: its text, its relevant keys, and the top of both runs."""
    relevant = set(beir.relevant(query))
    return {
        "id": query,
        "text": beir.queries[query],
        "difference": difference,
        "relevant": relevant,
        "relevant_shown": _keys(beir, sorted(relevant)),
        "top": {name: _keys(beir, list(run.get(query, {}))) for name, run in runs.items()},
    }


def _keys(beir: Beir, keys: Sequence[str]) -> list[tuple[str, str]]:
    return [
        (key, clipped(beir.key_text(key), 180) if key in beir.corpus else "(not in the corpus)")
        for key in keys[:KEYS_SHOWN]
    ]


def depth_curves(qrels: Qrels, runs: Mapping[str, Ranking]) -> dict[str, dict[int, float]]:
    """Name -> depth -> nDCG@10, when only the first run's top candidates are put into the other's order.

    Only for runs whose keys are all among the first run's, which is what reranking does.
    """
    (_, first), *others = runs.items()
    deepest = max((len(first[query]) for query in qrels if query in first), default=0)
    depths = [depth for depth in DEPTHS if depth < deepest] + [deepest]
    curves = {}
    for name, run in others:
        if all(scores.keys() <= first.get(query, {}).keys() for query, scores in run.items() if query in qrels):
            curves[name] = {depth: ndcg(qrels, at_depth(first, run, depth)) for depth in depths}
    return curves


def at_depth(first: Ranking, second: Ranking, depth: int) -> dict[str, dict[str, float]]:
    """The first run with its top ``depth`` keys in the second's order; keys that the second lacks come after those."""
    mixed = {}
    for query, scores in first.items():
        keys, rewards = list(scores), second.get(query, {})
        top = sorted(keys[:depth], key=lambda key: -rewards.get(key, float("-inf")))  # stable: else the first's order
        mixed[query] = {key: float(-rank) for rank, key in enumerate([*top, *keys[depth:]])}
    return mixed
