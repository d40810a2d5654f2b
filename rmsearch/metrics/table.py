"""The result of ndcg as tables on stdout: for people on a terminal, and plain in a log."""

from __future__ import annotations

import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rmsearch.metrics.measures import PRIMARY
from rmsearch.progress import say

SHOWN = ("nDCG@1", "nDCG@5", "nDCG@100", "AP@100", "RR@10", "R@10", "R@100", "P@10")


def p_text(p: float) -> str:
    """A p-value with two digits, never as 0."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def show_table(result: dict[str, Any]) -> None:
    """Print the means with their intervals, and each run against the baseline."""
    runs, baseline = result["runs"], result["baseline"]
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150, highlight=False)
    title = f"{result['dataset']}, split {result['split']}, {result['queries']} queries"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    table.add_column("run", overflow="fold")
    for column in (PRIMARY, "95 % interval", *SHOWN):
        table.add_column(column, justify="right", no_wrap=True)
    for name, run in runs.items():
        low, high = run["intervals"][PRIMARY]
        row = [f"{run['means'][m]:.4f}" for m in (PRIMARY, *SHOWN)]
        table.add_row(name, row[0], f"{low:.3f} to {high:.3f}", *row[1:])
    console.print(table)
    if len(runs) > 1:
        console.print(_comparisons(runs, baseline))
    for name, run in runs.items():
        if run["missing_queries"]:
            say("warning", run=name, missing=f"{run['missing_queries']} of {result['queries']} queries, counted as 0")


def _comparisons(runs: dict[str, Any], baseline: str) -> Table:
    table = Table(title=f"{PRIMARY} against {baseline}", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("run", overflow="fold")
    several = len(runs) > 2
    for column in (
        "difference",
        "p randomisation",
        *(["p Holm"] if several else []),
        "p t-test",
        "wins",
        "ties",
        "losses",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, run in runs.items():
        if "comparison" not in run:
            continue
        of = run["comparison"][PRIMARY]
        tests = [p_text(of["p_randomisation"]), *([p_text(of["p_holm"])] if several else []), p_text(of["p_t_test"])]
        table.add_row(name, f"{of['difference']:+.4f}", *tests, *(str(of[n]) for n in ("wins", "ties", "losses")))
    return table
