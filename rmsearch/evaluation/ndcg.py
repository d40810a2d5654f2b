"""Score runs with trec_eval's measures, and test whether they differ. Also runs as a file, without any flag."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rmsearch.cli import main
from rmsearch.datasets.beir import read_qrels, split_qrels
from rmsearch.errors import ConfigError
from rmsearch.metrics.measures import PRIMARY, Qrels
from rmsearch.metrics.table import show_table
from rmsearch.retrieval.compared_runs import RunFlags, evaluated, load_runs
from rmsearch.stage import Run, stage, target
from rmsearch.storage.records import read_json, write_json


class NdcgConfig(RunFlags):
    """Flags of ndcg."""

    output: str | None = target(None, "All measures, intervals and tests as JSON.")


@stage("evaluation.ndcg", show=lambda config: show_table(read_json(config.output)))
def ndcg(config: NdcgConfig, run: Run) -> None:
    """Score runs with nDCG, MAP, MRR, recall and precision, with significance tests.

    Measures come from trec_eval's own code (pytrec_eval). A query that a run lacks counts as 0. Each run is compared
    with the baseline by Fisher's paired randomisation test and a paired t-test, two-sided; with several runs the
    p-values are Holm-adjusted. Intervals are 95 % bootstrap intervals over queries.

    Without flags it scores what the other stages write by default in this folder, on the data set that they used.
    """
    named = config.named()
    qrels = _qrels(config)
    result = evaluated(config, load_runs(named, qrels), qrels)
    if config.output:
        write_json(config.output, result, indent=1)
    show_table(result)
    run.counts |= {"queries": len(qrels), "runs": len(result["runs"])}
    run.counts |= {f"ndcg10_{name}": round(each["means"][PRIMARY], 4) for name, each in result["runs"].items()}


def _qrels(config: NdcgConfig) -> Qrels:
    if config.qrels:
        return read_qrels(config.qrels)
    if config.dataset_path is None:
        raise ConfigError("no data set is given", where="evaluation.ndcg", remedy="Give --dataset-path or --qrels")
    return split_qrels(config.dataset_path, config.split)


if __name__ == "__main__":
    main(ndcg)
