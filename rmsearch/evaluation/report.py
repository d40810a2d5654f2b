"""One self-contained HTML page that compares runs: how good, how sure, at what depth, and on which queries."""

from __future__ import annotations

from pathlib import Path

from rmsearch.cli import main
from rmsearch.errors import ConfigError
from rmsearch.flags import DatasetFlags, note_dataset
from rmsearch.reports.comparison import comparison_page
from rmsearch.retrieval.candidates import records_of
from rmsearch.retrieval.compared_runs import RunFlags, evaluated, load_runs
from rmsearch.stage import Run, option, stage, target
from rmsearch.storage import uri as storage


class ReportConfig(DatasetFlags, RunFlags):
    """Flags of report."""

    output: str = target("report.html", "The page.")
    title: str | None = option(None, "Title of the page.")
    examples: int = option(8, "Best and worst queries shown, each.", ge=0)


def show(config: ReportConfig) -> None:
    """Print where the page is."""
    print(config.output if storage.is_s3(config.output) else str(Path(config.output).resolve()))


@stage("evaluation.report", show=show)
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
        records = {name: records_of(path) for name, path in named.items()}
        page = comparison_page(beir, runs, result, records, title=config.title, examples=config.examples)
    with storage.writer(config.output) as file:
        file.write(page)
    run.counts |= {"queries": len(beir.qrels), "runs": len(runs)}
    show(config)


if __name__ == "__main__":
    main(report)
