"""One self-contained HTML page that compares runs: how good, how sure, at what depth, and on which queries."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rmsearch.datasets.beir import Beir
from rmsearch.errors import ConfigError
from rmsearch.flags import DatasetFlags, note_dataset
from rmsearch.metrics.measures import PRIMARY, Qrels, Ranking, ndcg
from rmsearch.reports import comparison as sections
from rmsearch.reports.page import STYLE, el, join, page
from rmsearch.retrieval.candidates import records_of
from rmsearch.retrieval.compared_runs import RunFlags, evaluated, load_runs
from rmsearch.stage import Run, main, option, stage, target
from rmsearch.storage import uri as storage

DEPTHS = (1, 2, 5, 10, 20, 50, 100)


class ReportConfig(DatasetFlags, RunFlags):
    """Flags of report."""

    output: str = target("report.html", "The page.")
    title: str | None = option(None, "Title of the page.")
    examples: int = option(8, "Best and worst queries shown, each.", ge=0)


@dataclass(frozen=True)
class Material:
    """All that the page shows. ``runs``: name -> run, the baseline first; ``result``: what ndcg writes."""

    beir: Beir
    runs: dict[str, Ranking]
    result: dict[str, Any]
    depths: dict[str, dict[int, float]]
    records: dict[str, list[dict[str, Any]]]

    @property
    def baseline(self) -> str:
        return next(iter(self.runs))

    @property
    def best(self) -> str | None:
        """The run with the highest nDCG@10 among those compared; one that changes nothing comes last."""
        runs = self.result["runs"]
        others = [name for name in self.runs if name != self.baseline]
        changes = {n: runs[n]["comparison"][PRIMARY]["wins"] + runs[n]["comparison"][PRIMARY]["losses"] for n in others}
        return max(others, key=lambda name: (changes[name] > 0, runs[name]["means"][PRIMARY]), default=None)

    def differences(self, name: str) -> list[tuple[str, float]]:
        """(query id, nDCG@10 minus the baseline's), best gain first."""
        values = self.result["per_query"][PRIMARY]
        found = [(query, value - values[self.baseline][query]) for query, value in values[name].items()]
        return sorted(found, key=lambda item: (-item[1], item[0]))


@stage("evaluation.report", show=lambda config: print(_place(config.output)))
def report(config: ReportConfig, run: Run) -> None:
    """Write one HTML page that compares runs.

    The page loads nothing from elsewhere and follows the reader's light or dark scheme: a table with intervals and
    p-values, nDCG by rerank depth, gains and losses per query, the best and worst queries with their texts, and the
    run records. Without flags it takes what the other stages write by default in this folder.
    """
    named = config.named()
    beir = config.load()
    note_dataset(run, beir)
    if not beir.qrels:
        raise ConfigError("no qrels are given", where="evaluation.report", remedy="Give --dataset-path or --qrels")
    runs = load_runs(named, beir.qrels)
    with run.progress(unit="steps"):
        result = evaluated(config, runs, beir.qrels)
        depths = depth_curves(beir.qrels, runs)
    material = Material(beir, runs, result, depths, {name: records_of(path) for name, path in named.items()})
    with storage.writer(config.output) as file:
        file.write(render(material, config.title, config.examples).encode())
    run.counts |= {"queries": len(beir.qrels), "runs": len(runs)}
    print(_place(config.output))


def render(material: Material, title: str | None, examples: int) -> str:
    """The page."""
    beir, best = material.beir, material.best
    heading = title or f"{beir.name}: {' vs '.join(material.runs)}"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    facts = f"Split {beir.split} · {len(beir.qrels):,} queries · {len(beir.corpus):,} keys · {when}"
    body = [el("h1", heading), el("p", facts, class_="soft")]
    if best is not None:
        body.append(sections.verdict(material.result, best))
    body += [sections.summary(material.result), sections.depth(material.result, material.depths)]
    for name in material.runs:
        if name != material.baseline:
            body.append(sections.gains(beir, name, material.baseline, material.differences(name), material.result))
    if best is not None and examples:
        differences = material.differences(best)
        pair = {name: material.runs[name] for name in (material.baseline, best)}
        body.append(sections.examples("Where it lost most", beir, pair, differences[::-1][:examples], -1))
        body.append(sections.examples("Where it gained most", beir, pair, differences[:examples], 1))
    body += [sections.all_measures(material.result), sections.records(material.records)]
    return page(heading, STYLE, el("main", join(body)))


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


def _place(output: str) -> str:
    from pathlib import Path

    return output if storage.is_s3(output) else str(Path(output).resolve())


if __name__ == "__main__":
    main(report)
