"""The parts of the report's page, each from data to markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rmsearch.datasets.beir import Beir
from rmsearch.metrics.measures import CUTOFFS, FAMILIES, PRIMARY, Ranking
from rmsearch.metrics.table import p_text
from rmsearch.reports import charts
from rmsearch.reports.page import Markup, el, join

SUMMARY = ("nDCG@10", "RR@10", "AP@100", "R@10", "R@100")
SURE = 0.05
KEYS_SHOWN = 3
Result = Mapping[str, Any]


def p_shown(p: float) -> str:
    """``p < 0.0001`` or ``p = 0.012``."""
    text = p_text(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def verdict(result: Result, name: str) -> Markup:
    """One sentence: is the run better than the baseline, and how sure is that?"""
    of = result["runs"][name]["comparison"][PRIMARY]
    sure = of["p_holm"] < SURE
    if not sure:
        said, kind = "does not differ significantly from", ""
    else:
        said, kind = ("is better than", "up") if of["difference"] > 0 else ("is worse than", "down")
    text = [el("b", name), f" {said} ", el("b", result["baseline"]), f": {PRIMARY} "]
    means = [result["runs"][n]["means"][PRIMARY] for n in (name, result["baseline"])]
    text.append(f"{means[0]:.4f} against {means[1]:.4f} ({of['difference']:+.4f}, {p_shown(of['p_holm'])}). ")
    text.append(f"It wins on {of['wins']} queries, ties on {of['ties']} and loses on {of['losses']}.")
    return el("div", el("p", text), class_=f"card verdict {kind}")


def summary(result: Result) -> Markup:
    """Means, tests and intervals."""
    runs = result["runs"]
    head = ["run", *SUMMARY, f"Δ {PRIMARY}", "p", "p t-test", "wins / ties / losses"]
    rows = []
    for i, (name, run) in enumerate(runs.items()):
        best = [run["means"][m] >= max(r["means"][m] for r in runs.values()) for m in SUMMARY]
        cells = [el("td", _dot(i), name, class_="name")]
        cells += [
            el("td", el("b" if b else "span", f"{run['means'][m]:.4f}")) for m, b in zip(SUMMARY, best, strict=True)
        ]
        rows.append(el("tr", cells, _comparison(run.get("comparison"))))
    table = el("table", el("tr", (el("th", h) for h in head)), rows)
    means = {name: run["means"][PRIMARY] for name, run in runs.items()}
    chart = charts.interval_chart(means, {name: run["intervals"][PRIMARY] for name, run in runs.items()}, PRIMARY)
    counts = {name: run["missing_queries"] for name, run in runs.items() if run["missing_queries"]}
    missing = [f"{name} lacks {n} {'query' if n == 1 else 'queries'}, counted as 0." for name, n in counts.items()]
    note = (
        f"Against {result['baseline']}: p of Fisher's paired randomisation test ({result['permutations']:,} "
        f"permutations, two-sided{', Holm-adjusted' if len(runs) > 2 else ''}), and of the paired t-test. "
        "Measures by trec_eval's code. "
    )
    return join(
        [
            el("h2", "Summary"),
            el("p", note, " ".join(missing), class_="soft"),
            el("div", el("div", table, class_="scroll"), class_="card"),
            el("div", el("h3", f"Mean {PRIMARY} with its 95 % interval"),
               el("p", "Bootstrap over queries. Intervals of two runs may overlap although the paired test is sure.",
                  class_="soft"), chart, class_="card"),
        ]
    )  # fmt: skip


def _comparison(of: Mapping[str, Any] | None) -> Markup:
    if of is None:
        return join([el("td", "baseline", class_="soft"), el("td"), el("td"), el("td")])
    test = of[PRIMARY]
    kind = ("up" if test["difference"] > 0 else "down") if test["p_holm"] < SURE else None
    return join(
        [
            el("td", f"{test['difference']:+.4f}", class_=kind),
            el("td", p_text(test["p_holm"])),
            el("td", p_text(test["p_t_test"])),
            el("td", f"{test['wins']} / {test['ties']} / {test['losses']}"),
        ]
    )


def _dot(i: int) -> Markup:
    return el("span", class_="dot", style=f"background: {charts.colour(i)}")


def depth(result: Result, curves: Mapping[str, Mapping[int, float]]) -> Markup:
    """nDCG by depth, or nothing when no run reranks the baseline's candidates."""
    if not curves:
        return Markup()
    index = {name: i for i, name in enumerate(result["runs"])}
    depths = list(next(iter(curves.values())))
    base = result["runs"][result["baseline"]]["means"][PRIMARY]
    chart = charts.depth_chart(depths, {name: list(curve.values()) for name, curve in curves.items()}, base, index)
    shown = [result["baseline"], *curves]
    legend = el("div", (el("span", _dot(index[name]), name) for name in shown), class_="legend")
    note = (
        f"Only the first candidates of {result['baseline']} are put into the run's order, the others keep their place."
    )
    return join(
        [el("h2", f"{PRIMARY} by rerank depth"), el("p", note, class_="soft"), el("div", legend, chart, class_="card")]
    )


def gains(beir: Beir, name: str, baseline: str, differences: Sequence[tuple[str, float]], result: Result) -> Markup:
    """Gains and losses of one run, query by query."""
    of = result["runs"][name]["comparison"][PRIMARY]
    shown = [(clipped(beir.queries.get(query, query), 90), d) for query, d in differences]
    note = f"{of['wins']} queries gain, {of['ties']} stay, {of['losses']} lose. Hover over a bar to see its query."
    chart = el("div", charts.gain_chart(shown, name, baseline), class_="card")
    return join([el("h2", f"Gains and losses: {name} against {baseline}"), el("p", note, class_="soft"), chart])


def examples(
    title: str, beir: Beir, runs: Mapping[str, Ranking], differences: Sequence[tuple[str, float]], sign: int
) -> Markup:
    """Queries with the largest differences of that sign: their texts, relevant keys, and the top of both runs."""
    chosen = [(query, d) for query, d in differences if d * sign > 0]
    if not chosen:
        return Markup()
    blocks = []
    for query, d in chosen:
        relevant = set(beir.relevant(query))
        delta = el("span", f"{d:+.3f}", class_=f"delta {'up' if d > 0 else 'down'}")
        columns = [_keys(f"relevant ({len(relevant)})", beir, sorted(relevant)[:KEYS_SHOWN], set())]
        columns += [
            _keys(f"top of {name}", beir, list(run.get(query, {}))[:KEYS_SHOWN], relevant) for name, run in runs.items()
        ]
        text = el("p", delta, clipped(beir.queries[query], 400), " ", el("code", query, class_="soft"))
        blocks.append(el("div", text, el("div", columns, class_="columns"), class_="query"))
    note = f"{PRIMARY} of {list(runs)[-1]} minus {next(iter(runs))}. Relevant keys are marked."
    return join([el("h2", title), el("p", note, class_="soft"), el("div", blocks, class_="card")])


def _keys(title: str, beir: Beir, keys: Sequence[str], relevant: set[str]) -> Markup:
    items = []
    for key in keys:
        text = clipped(beir.key_text(key), 180) if key in beir.corpus else "(not in the corpus)"
        hit = key in relevant
        items.append(el("li", "✓ " if hit else None, el("code", key), " ", text, class_="hit" if hit else None))
    return el("div", el("h4", title), el("ol", items) if items else el("p", "none", class_="soft"))


def all_measures(result: Result) -> Markup:
    """Every measure at every cut-off, folded."""
    blocks = []
    for family in FAMILIES:
        head = el("tr", el("th", family), (el("th", f"@{k}") for k in CUTOFFS))
        rows = [
            el(
                "tr",
                el("td", _dot(i), name, class_="name"),
                (el("td", f"{run['means'][f'{family}@{k}']:.4f}") for k in CUTOFFS),
            )
            for i, (name, run) in enumerate(result["runs"].items())
        ]
        blocks.append(el("div", el("table", head, rows), class_="card scroll"))
    return el("details", el("summary", "All measures"), blocks)


def records(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """How each run was made, from its run record."""
    blocks = []
    for name, of_run in found.items():
        if not of_run:
            blocks.append(
                el("div", el("h3", name), el("p", "No run record lies beside this run.", class_="soft"), class_="card")
            )
        for record in of_run:
            rows = [el("tr", el("td", key), el("td", value)) for key, value in _facts(record)]
            title = el("summary", el("b", name), f" · {_made(record)}")
            blocks.append(el("details", title, el("table", rows, class_="records"), class_="card"))
    return join([el("h2", "How the runs were made"), blocks])


def _made(record: Mapping[str, Any]) -> str:
    """The stage and model of a run in few words."""
    config, seconds = record.get("config", {}), record.get("seconds")
    facts = [
        record.get("stage"),
        config.get("model_name"),
        f"{seconds:g} s" if isinstance(seconds, int | float) else None,
    ]
    return " · ".join(str(fact) for fact in facts if fact)


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    config, notes = record.get("config", {}), record.get("notes", {})
    facts: list[tuple[str, Any]] = [
        ("stage", record.get("stage")),
        ("model", config.get("model_name")),
        ("adapter", config.get("lora")),
        *((key, notes.get(key)) for key in ("contract", "embedding", "fusion", "fusion_fit", "latency")),
        ("candidates from", config.get("embed_output")),
        ("data set", notes.get("dataset")),
        ("inputs", record.get("inputs")),
        ("counts", record.get("counts")),
        ("seconds", record.get("seconds")),
        ("versions", record.get("versions")),
        ("finished", record.get("finished")),
    ]
    return [(key, _plain(value)) for key, value in facts if value not in (None, {}, "")]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key} {_plain(each)}" if not isinstance(each, Mapping) else f"{key} ({_plain(each)})"
            for key, each in value.items()
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)
