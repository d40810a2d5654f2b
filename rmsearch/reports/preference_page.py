"""The page of `rmsearch train inspect`: facts and checks as HTML with inline SVG, loading nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmsearch.reports import charts
from rmsearch.reports.comparison import clipped, records
from rmsearch.reports.page import STYLE, Markup, el, join, page
from rmsearch.reports.preference_checks import Check, counted, failed, percent
from rmsearch.storage import uri as storage

Facts = Mapping[str, Any]
CLIP = 1500  # characters of a text to read
SHORT = 160  # of a text in a table
COLOUR = {"chosen": "var(--c1)", "rejected": "var(--c2)", "margin": "var(--c3)", "confidence": "var(--c4)"}
EXTRA = """
.bar { display: inline-block; height: 10px; border-radius: 3px; background: var(--c1); min-width: 2px; }
.mark { font-weight: 600; white-space: nowrap; }
.reading { white-space: pre-line; overflow-wrap: anywhere; margin: 0; font-size: 14px; max-width: none; }
.side { border-left: 3px solid var(--line); padding-left: 12px; }
.tags { float: right; margin-left: 12px; font-weight: 400; font-size: 13px; }
.checks td { vertical-align: top; } .text { text-align: left; }
"""


def render(facts: Facts, checks: Sequence[Check], made: Mapping[str, Sequence[Facts]], title: str) -> str:
    """The page. ``facts``: what `rmsearch.train.inspect_stage.gather` found; ``made``: file -> its run records."""
    sets = facts["sets"]
    counts = sets["train"]["counts"]
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    known = [counted(counts["pairs"], "pair"), counted(counts["queries"], "query"), counted(counts["keys"], "key")]
    body = [
        el("h1", title),
        el("p", " · ".join([*known, when]), class_="soft"),
        _verdict(checks),
        _checks(checks),
        _counts(sets),
        _types(sets["train"]),
        _lengths(sets),
        _scores(sets["train"]["scores"]),
        _judges(facts["reports"]),
        _overlap(facts["overlap"]),
        _keys(sets["train"]),
        _openings(sets["train"]),
        _repeats(sets["train"]),
        _contradictions(sets["train"]["contradictions"]),
        _sample(facts["sample"]),
        records(made),
    ]
    return page(title, STYLE + EXTRA, el("main", join(body)))


def _section(title: str, note: str | None, *body: Any) -> Markup:
    return join([el("h2", title), el("p", note, class_="soft") if note else None, *body])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], text: Sequence[int] = (0,), class_: str = "") -> Markup:
    """A card with a table; the columns in ``text`` are wrapped and to the left."""
    cells = [el("tr", (el("th", name, class_="text" if i in text else None) for i, name in enumerate(head)))]
    for row in rows:
        cells.append(el("tr", (el("td", value, class_="text" if i in text else None) for i, value in enumerate(row))))
    return el("div", el("table", cells, class_=class_ or None), class_="card")


def _verdict(checks: Sequence[Check]) -> Markup:
    bad = failed(checks)
    if not bad:
        return el("div", el("p", el("b", f"All {len(checks)} checks passed.")), class_="card verdict up")
    names = ", ".join(check.line.partition(":")[0] for check in bad)
    said = [el("b", f"{len(bad)} of {len(checks)} checks failed"), f": {names}."]
    return el("div", el("p", said), class_="card verdict down")


def _checks(checks: Sequence[Check]) -> Markup:
    rows = []
    for check in sorted(checks, key=lambda each: each.passed):
        name, _, finding = check.line.partition(": ")
        mark = el("span", "✓ passed" if check.passed else "✗ failed", class_="up mark" if check.passed else "down mark")
        remedy = None if check.passed else el("div", check.remedy, ".", class_="soft")
        rows.append([el("b", name), mark, join([finding[:1].upper() + finding[1:], ".", remedy]), percent(check.limit)])
    return _section("Checks", None, _table(["check", "result", "finding", "limit"], rows, (0, 1, 2), "checks"))


def _counts(sets: Mapping[str, Facts]) -> Markup:
    rows: list[tuple[str, Callable[[Facts], str]]] = [
        ("pairs", lambda c: f"{c['pairs']:,}"),
        ("distinct queries", lambda c: f"{c['queries']:,}"),
        ("distinct keys", lambda c: f"{c['keys']:,}"),
        ("pairs per query: median, most", lambda c: _two(c["pairs_per_query"], "median", "max")),
        ("words per query: median, 95th percentile", lambda c: _two(c["query_words"], "median", "p95")),
        ("pairs that repeat an earlier pair", lambda c: f"{c['repeated_pairs']:,}"),
    ]
    optional = {"compares_queries": "pairs of two queries for one key", "compares_both": "pairs that share neither"}
    for name, label in optional.items():
        if any(each["counts"][name] for each in sets.values()):
            rows.append((label, lambda c, name=name: f"{c[name]:,}"))  # type: ignore[misc]
    cells = [[label, *(show(each["counts"]) for each in sets.values())] for label, show in rows]
    return _section("Counts", None, _table(["", *sets], cells))


def _two(facts: Facts, *names: str) -> str:
    return ", ".join(f"{facts[name]:,.0f}" for name in names)


def _types(facts: Facts) -> Markup:
    pairs = facts["counts"]["pairs"]
    blocks = []
    if len(facts["types"]) > 1 or any(facts["types"][0][name] for name in ("query_type", "source")):
        rows = [
            [each["query_type"] or "—", each["source"] or "—", f"{each['pairs']:,}", *_share(each["pairs"] / pairs)]
            for each in facts["types"][:20]
        ]
        blocks.append(_table(["query type", "source", "pairs", "share", ""], rows, (0, 1, 4)))
    if facts["prompts"]:
        rows = [
            [each["prompt"], f"{each['pairs']:,}", *_share(each["pairs"] / pairs)] for each in facts["prompts"][:20]
        ]
        blocks.append(_table(["prompt", "pairs", "share", ""], rows, (0, 3)))
    note = None if blocks else "The pairs name neither a query type nor a source."
    return _section("Query types and sources", note, *blocks)


def _share(share: float) -> tuple[str, Markup]:
    return percent(share), el("span", class_="bar", style=f"width: {max(1, round(220 * share))}px")


def _lengths(sets: Mapping[str, Facts]) -> Markup:
    rows, blocks = [], []
    for of, facts in sets.items():
        for unit, each in facts["lengths"].items():
            middle = (f"{each[side]['median']:,.0f} / {each[side]['p95']:,.0f}" for side in ("chosen", "rejected"))
            shares = (percent(each["longer_chosen"]), percent(each["equal"]), percent(each["guess"]))
            rows.append([f"{unit} ({of})", *middle, *shares, f"{each['auc']:.3f}"])
    for unit, each in sets["train"]["lengths"].items():
        blocks.append(_chart(f"Length in {unit}", each["histogram"], unit))
    note = (
        "Lengths as median / 95th percentile. Guess: how often “the longer one” (or “the shorter one”) is right; 50 % "
        "is chance. AUC: the chance that a chosen key is longer than a rejected key of any pair; 0.5 is chance."
    )
    head = ["", "chosen", "rejected", "longer is chosen", "equal", "guess right", "AUC"]
    return _section("Lengths of chosen and rejected", note, _table(head, rows), *blocks)


def _scores(scores: Mapping[str, Facts]) -> Markup:
    if not scores:
        return _section("Margins and confidence", "No pair has a margin or a confidence.")
    names = ("known", "mean", "p5", "median", "p95", "max")
    rows = [[name, f"{each['known']:,}", *(f"{each[n]:.3f}" for n in names[1:])] for name, each in scores.items()]
    blocks = [_chart(name.capitalize(), each["histogram"], "") for name, each in scores.items()]
    head = ["", "pairs", "mean", "5th percentile", "median", "95th percentile", "largest"]
    return _section("Margins and confidence", None, _table(head, rows), *blocks)


def _judges(reports: Sequence[Facts]) -> Markup:
    if not reports:
        return _section("Ties and position bias", "No judge's run record lies beside the files.")
    counts = dict.fromkeys(count for each in reports for count in each if count not in ("file", "fingerprint"))
    rows = [[count, *(_number(each.get(count)) for each in reports)] for count in counts]
    note = (
        "As the judge's run record says. first_preferred: of its answers that name a text, how many name the one shown "
        "first; 0.5 is no bias. agreement: of the pairs, how many it answers alike in both orders."
    )
    return _section(
        "Ties and position bias", note, _table(["", *(storage.name(each["file"]) for each in reports)], rows)
    )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _overlap(facts: Facts | None) -> Markup:
    if facts is None:
        return _section("Training and test set", "Give --dataset-list-test to see whether they overlap.")
    ids = f"{facts['same_ids']:,} of {facts['ids']:,}" if facts["ids"] else "no ids"
    rows = [
        ["test queries that training has", f"{facts['same']:,} of {facts['queries']:,}", percent(facts["same_share"])],
        ["test queries that training nearly has", f"{facts['nearly']:,}", percent(facts["nearly_share"])],
        ["query ids in both", ids, percent(facts["same_ids"] / facts["ids"]) if facts["ids"] else ""],
        ["query ids in both that name different queries", f"{facts['other_text']:,}", ""],
        ["test keys that training has", f"{facts['same_keys']:,} of {facts['keys']:,}",
         percent(facts["same_keys"] / facts["keys"])],
    ]  # fmt: skip
    note = "Queries with the same words count as the same. Keys may be in both; queries should not."
    return _section("Training and test set", note, _table(["", "count", "share"], rows))


def _keys(facts: Facts) -> Markup:
    pairs, blocks = facts["counts"]["pairs"], []
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        rows = [
            [
                join([el("code", each["key_id"], " ", class_="soft") if each["key_id"] else None, _short(each["key"])]),
                f"{each[side]:,}",
                percent(each[side] / pairs),
                f"{each[other]:,}",
            ]
            for each in facts["keys"][f"{side}_most"]
        ]
        blocks.append(_table([f"{side} most", side, "share of pairs", other], rows))
    return _section("Keys chosen and rejected most", None, *blocks)


def _openings(facts: Facts) -> Markup:
    if not facts["openings"]:
        return _section("How queries begin", "No two queries begin with the same words.")
    rows = [
        [each["opening"], _short(each["example"]), f"{each['queries']:,}", *_share(each["share"])]
        for each in facts["openings"]
    ]
    head = ["begins with", "for example", "queries", "share", ""]
    return _section("How queries begin", None, _table(head, rows, (0, 1, 4)))


def _repeats(facts: Facts) -> Markup:
    near, blocks = facts["near_duplicates"], []
    rows = [
        [sort, f"{near[sort]['compared']:,}", f"{near[sort]['found']:,}", percent(near[sort]["share"])]
        for sort in ("queries", "keys")
    ]
    for sort in ("queries", "keys"):
        if near[sort]["examples"]:
            examples = [[_short(each["one"]), _short(each["other"])] for each in near[sort]["examples"]]
            blocks.append(_table([f"{sort}: earlier", "nearly the same"], examples, (0, 1)))
    note = f"Distinct texts whose three-word sequences are the same to {percent(near['similarity'])} or more (MinHash)."
    table = _table(["", "compared", "repeat an earlier one", "share"], rows)
    return _section("Near-duplicates", note, table, *blocks)


def _contradictions(facts: Facts) -> Markup:
    if not facts["pairs"]:
        return _section("Contradictions", "No pair has its reverse for the same query.")
    rows = [[_short(each[name]) for name in ("query", "one", "other")] for each in facts["examples"]]
    note = f"{counted(facts['pairs'], 'pair')} ({percent(facts['share'])}), for example:"
    head = ["query", "chosen in one pair", "chosen in another"]
    return _section("Contradictions", note, _table(head, rows, (0, 1, 2)))


def _sample(pairs: Sequence[Facts]) -> Markup:
    blocks = []
    for pair in pairs:
        tags = [pair["query_type"], pair["source"]]
        tags += [f"{name} {pair[name]:.3g}" for name in ("margin", "confidence") if pair[name] is not None]
        sides = [
            el("div", el("h4", side, " ", el("code", pair[f"{side}_id"]) if pair[f"{side}_id"] else None),
               el("p", clipped(pair[side], CLIP), class_="reading"),
               class_="side", style=f"border-color: {COLOUR[side]}")
            for side in ("chosen", "rejected")
        ]  # fmt: skip
        shown = " · ".join(tag for tag in tags if tag)
        about = el("span", shown, class_="tags soft") if shown else None
        number = el("code", " ", pair["query_id"], class_="soft") if pair["query_id"] else None
        query = el("p", about, clipped(pair["query"], CLIP), number)
        blocks.append(el("div", query, el("div", sides, class_="columns"), class_="query"))
    note = "At random. Would you choose as the set does?"
    return _section(f"{counted(len(pairs), 'pair')} to read", note, el("div", blocks, class_="card"))


def _short(text: str) -> str:
    return clipped(" ".join(text.split()), SHORT)


def _chart(title: str, facts: Facts, unit: str) -> Markup:
    names = list(facts["counts"])
    dots = (el("span", el("span", class_="dot", style=f"background: {COLOUR[name]}"), name) for name in names)
    legend = el("div", dots, class_="legend") if len(names) > 1 else None
    return el("div", el("h3", title), legend, histogram(facts, unit), class_="card")


def histogram(facts: Facts, unit: str) -> Markup:
    """Shares per bin of one or two series, as areas; the last bin holds what is above it, too."""
    start, step, series = facts["start"], facts["width"], facts["counts"]
    bins = len(next(iter(series.values())))
    shares = {name: [100 * n / max(sum(counts), 1) for n in counts] for name, counts in series.items()}
    width, height, left, bottom = 1000, 230, 56, 30
    marks = charts.ticks(0, max(max(each) for each in shares.values()), 4)
    wide = (width - left) / bins

    def y(share: float) -> float:
        return 10 + (marks[-1] - share) / marks[-1] * (height - 10 - bottom)

    parts = []
    for mark in marks:
        parts.append(el("line", x1=left, x2=width, y1=y(mark), y2=y(mark), class_="grid"))
        parts.append(el("text", f"{mark:g} %", x=left - 8, y=y(mark) + 4, text_anchor="end"))
    end = start + bins * step
    for mark in charts.ticks(start, end, 8):
        if start <= mark <= end:
            x = left + (mark - start) / step * wide
            parts.append(el("text", f"{mark:g}", x=min(x, width - 14), y=height - 8, text_anchor="middle"))
    for name, each in shares.items():
        line = " ".join(
            f"L{left + i * wide:.1f} {y(share):.1f} L{left + (i + 1) * wide:.1f} {y(share):.1f}"
            for i, share in enumerate(each)
        )
        area = f"M{left} {y(0):.1f} {line} L{left + bins * wide:.1f} {y(0):.1f} Z"
        colour = COLOUR[name]
        parts.append(el("path", d=area, fill=colour, fill_opacity="0.22", stroke=colour, stroke_width="1.8"))
    for i in range(bins):  # to hover over
        low, high = start + i * step, start + (i + 1) * step
        upto = f"{low:g} and more" if i == bins - 1 and facts["more"] else f"{low:g} to {high:g}"
        said = ", ".join(f"{name} {each[i]:.1f} %" for name, each in shares.items())
        title = el("title", f"{upto} {unit}: {said}")
        parts.append(
            el("rect", title, x=left + i * wide, y=10, width=wide, height=height - 10 - bottom, fill_opacity="0")
        )
    label = f"Distribution of {' and '.join(series)} {unit}"
    return el("svg", parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)
