"""The runs that ndcg and report compare: which files, on which data set, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from rmsearch.errors import ConfigError
from rmsearch.flags import QrelsFlags
from rmsearch.metrics.comparison import summary
from rmsearch.metrics.measures import Qrels, Ranking, evaluate
from rmsearch.metrics.significance import PERMUTATIONS
from rmsearch.retrieval.candidates import records_of
from rmsearch.retrieval.runs import read_run
from rmsearch.stage import option, source
from rmsearch.storage import uri as storage

# What is scored when no flag says so: the files that the stages write by default.
RUNS = (
    "embed=relevance_dict_embed_eval.json",
    "bm25=relevance_dict_bm25_eval.json",
    "rerank=relevance_dict_rerank_eval.json",
)


class RunFlags(QrelsFlags):
    """Which runs. Without a data set, the one in the run record beside the first run is taken."""

    run: list[str] = source(
        [],
        "NAME=PATH of a run: JSON, TREC's six columns, or a stage's --output. Repeat for more; by default what embed, "
        "bm25 and rerank write in this folder.",
    )
    baseline: str | None = option(None, "Name of the run that the others are compared with; by default the first.")
    permutations: int = option(PERMUTATIONS, "Permutations of the randomisation test.", ge=1000)
    seed: int = option(0, "Seed of the permutations and bootstrap samples.", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        runs = values.get("run") or [run for run in RUNS if storage.exists(name_and_path(run)[1])]
        known = any(values.get(name) for name in ("dataset_path", "qrels"))
        found = {} if known or not isinstance(runs, list) else _dataset_of(runs, set(cls.model_fields))
        return {**found, **values, "run": runs}

    def named(self) -> dict[str, str]:
        """Name -> path of the runs, the baseline first."""
        named = dict(name_and_path(each) for each in self.run)
        if not named:
            raise ConfigError("no run is given", where="--run", remedy="Write --run NAME=PATH")
        if len(named) != len(self.run):
            raise ConfigError("two runs have the same name", where="--run", remedy="Write --run NAME=PATH")
        baseline = self.baseline or next(iter(named))
        if baseline not in named:
            problem = f"there is no run {baseline!r} among {', '.join(named)}"
            raise ConfigError(problem, where="--baseline", remedy="Name one of the runs")
        return {baseline: named[baseline], **named}


def load_runs(named: dict[str, str], qrels: Qrels) -> dict[str, Ranking]:
    """Read the runs. Raises ConfigError for a run that shares no query with the qrels."""
    runs = {name: read_run(path) for name, path in named.items()}
    for name, run in runs.items():
        if not run.keys() & qrels.keys():
            remedy = "Give the run of this data set and split"
            raise ConfigError("shares no query id with the qrels", where=named[name], remedy=remedy)
    return dict(runs)


def evaluated(config: RunFlags, runs: dict[str, Ranking], qrels: Qrels) -> dict[str, Any]:
    """`summary` of runs, with the data set's name and the runs' paths."""
    result = summary({n: evaluate(qrels, run) for n, run in runs.items()}, config.permutations, config.seed)
    for name, path in config.named().items():
        result["runs"][name]["path"] = path
    return {"dataset": config.dataset_path or config.qrels, "split": config.split, **result}


def name_and_path(run: str) -> tuple[str, str]:
    """(name, path) of NAME=PATH; a bare path is named after its file."""
    name, equals, path = run.partition("=")
    return (name, path) if equals and name and not storage.exists(run) else (Path(storage.name(run)).stem, run)


def _dataset_of(runs: list[str], flags: set[str]) -> dict[str, str]:
    """The data set and split that the stage which wrote the first run used."""
    for each in runs:
        for record in records_of(name_and_path(each)[1]):
            config = record.get("config", {})
            if config.get("dataset_path") or config.get("qrels"):
                names = flags & {"dataset_path", "queries", "corpus", "qrels", "split", "max_missing_share"}
                return {name: config[name] for name in names if config.get(name)}
    return {}
