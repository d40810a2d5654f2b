"""The report's charts as inline SVG. Colours are CSS variables, so they follow the page's light or dark scheme.

Drawn by hand rather than by a plotting library: the page stays some 100 KB in place of 5 MB, needs no script, and
prints. Every mark has a ``<title>``, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rmsearch.reports.page import Markup, el

COLOURS = 6
BARS = 600  # more queries than this are drawn as one area: bars would be thinner than a pixel


def colour(i: int) -> str:
    """The colour of the i-th run; 0 is the baseline's grey."""
    return f"var(--c{i if i == 0 else 1 + (i - 1) % (COLOURS - 1)})"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``."""
    span = max(high - low, 0.01)
    rough = span / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough - 1e-12)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


def interval_chart(means: Mapping[str, float], intervals: Mapping[str, Sequence[float]], measure: str) -> Markup:
    """One row per run: the mean as a dot, its 95 % interval as a line."""
    width, left, right, row = 1000, 170, 60, 34
    marks = ticks(min(low for low, _ in intervals.values()), max(high for _, high in intervals.values()), 6)
    height = row * len(means) + 30

    def x(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * (width - left - right)

    parts = []
    for mark in marks:
        parts.append(el("line", x1=x(mark), x2=x(mark), y1=4, y2=height - 24, class_="grid"))
        parts.append(el("text", f"{mark:g}", x=x(mark), y=height - 8, text_anchor="middle"))
    for i, (name, mean) in enumerate(means.items()):
        y, (low, high) = row * i + 20, intervals[name]
        shown = name if len(name) <= 22 else name[:21] + "…"
        parts += [
            el("text", shown, el("title", name), x=left - 14, y=y + 4, text_anchor="end", class_="strong"),
            el("line", x1=x(low), x2=x(high), y1=y, y2=y, stroke=colour(i), stroke_width=4, stroke_linecap="round"),
            el("text", f"{mean:.4f}", x=x(high) + 10, y=y + 4),
            el("circle", el("title", f"{name}: {measure} {mean:.4f}, 95 % interval {low:.4f} to {high:.4f}"),
               cx=x(mean), cy=y, r=7, fill=colour(i), stroke="var(--card)", stroke_width=2),
        ]  # fmt: skip
    return el("svg", parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{measure} with intervals")


def depth_chart(
    depths: Sequence[int], curves: Mapping[str, Sequence[float]], base: float, index: Mapping[str, int]
) -> Markup:
    """nDCG@10 by the number of first-stage candidates that are reranked; depths at equal distances."""
    width, height, left, right, bottom = 1000, 330, 60, 150, 44
    values = [base, *(v for curve in curves.values() for v in curve)]
    marks = ticks(min(values) - 0.005, max(values) + 0.005)

    def x(i: int) -> float:
        return left + i * (width - left - right) / max(len(depths) - 1, 1)

    def y(value: float) -> float:
        return 12 + (marks[-1] - value) / (marks[-1] - marks[0]) * (height - 12 - bottom)

    parts = []
    for mark in marks:
        parts.append(el("line", x1=left, x2=width - right, y1=y(mark), y2=y(mark), class_="grid"))
        parts.append(el("text", f"{mark:g}", x=left - 10, y=y(mark) + 4, text_anchor="end"))
    for i, depth in enumerate(depths):
        parts.append(el("text", depth, x=x(i), y=height - bottom + 20, text_anchor="middle"))
    parts.append(el("text", "candidates reranked", x=(left + width - right) / 2, y=height - 4, text_anchor="middle"))
    dashed = {"stroke": colour(0), "stroke_width": 2, "stroke_dasharray": "6 5"}
    parts.append(el("line", x1=left, x2=width - right, y1=y(base), y2=y(base), **dashed))
    for name, curve in curves.items():
        path = " ".join(f"{'ML'[i > 0]}{x(i):.1f} {y(v):.1f}" for i, v in enumerate(curve))
        parts.append(el("path", d=path, fill="none", stroke=colour(index[name]), stroke_width=2.5))
        for i, value in enumerate(curve):
            title = el("title", f"{name}, depth {depths[i]}: nDCG@10 {value:.4f}")
            parts.append(el("circle", title, cx=x(i), cy=y(value), r=4.5, fill=colour(index[name])))
    ends = {name: curve[-1] for name, curve in curves.items()}
    for (name, value), at in zip(ends.items(), _apart([y(v) for v in ends.values()], 16), strict=True):
        shown = name if len(name) <= 14 else name[:13] + "…"
        parts.append(
            el("text", f"{shown} {value:.3f}", x=width - right + 14, y=at + 4, style=f"fill: {colour(index[name])}")
        )
    return el("svg", parts, viewBox=f"0 0 {width} {height}", role="img", aria_label="nDCG@10 by rerank depth")


def _apart(places: list[float], distance: float) -> list[float]:
    """Places moved down where they would overlap, in the given order."""
    moved, last = [0.0] * len(places), -math.inf
    for i in sorted(range(len(places)), key=places.__getitem__):
        moved[i] = last = max(places[i], last + distance)
    return moved


def gain_chart(differences: Sequence[tuple[str, float]], name: str, baseline: str) -> Markup:
    """Differences of nDCG@10 per query, (query text, difference), best gain first."""
    width, height, left = 1000, 210, 46
    middle, room = height / 2, height / 2 - 12
    step = (width - left) / max(len(differences), 1)
    parts = []
    for mark in (-1, -0.5, 0, 0.5, 1):
        at = middle - mark * room
        parts.append(el("line", x1=left, x2=width, y1=at, y2=at, class_="axis" if mark == 0 else "grid"))
        parts.append(el("text", f"{mark:+g}" if mark else "0", x=left - 8, y=at + 4, text_anchor="end"))
    if len(differences) > BARS:
        for sign, fill in ((1, "var(--up)"), (-1, "var(--down)")):
            line = " ".join(
                f"L{left + i * step:.1f} {middle - max(sign * d, 0) * sign * room:.1f}"
                for i, (_, d) in enumerate(differences)
            )
            parts.append(el("path", d=f"M{left} {middle} {line} L{width} {middle} Z", fill=fill))
    else:
        for i, (text, d) in enumerate(differences):
            if d:
                title = el("title", f"{d:+.3f}  {text}")
                top, fill = (middle - d * room, "var(--up)") if d > 0 else (middle, "var(--down)")
                wide = step - 1 if step > 3 else step + 0.4  # no seams between thin bars
                parts.append(
                    el("rect", title, x=left + i * step, y=top, width=wide, height=max(abs(d) * room, 0.8), fill=fill)
                )
    label = f"nDCG@10 of {name} minus {baseline}, per query"
    return el("svg", parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)
