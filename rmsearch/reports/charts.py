"""The pages' charts as marks of an SVG, which a template draws. Colours are CSS variables of the light and dark scheme.

Drawn by hand rather than by a plotting library: the page stays some 100 KB in place of 5 MB, needs no script, and
prints. Every mark has a title, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = 6
BARS = 600  # more queries than this are drawn as one area: bars would be thinner than a pixel
WIDTH = 1000
SERIES_COLOURS = {"chosen": "var(--c1)", "rejected": "var(--c2)", "margin": "var(--c3)", "confidence": "var(--c4)"}


@dataclass(frozen=True)
class Mark:
    """An element of an SVG."""

    tag: str
    attributes: Mapping[str, str]
    text: str
    title: str


@dataclass(frozen=True)
class Chart:
    """An SVG of `WIDTH` and this height; ``label`` is read by screen readers."""

    label: str
    height: int
    marks: Sequence[Mark]
    width: int = WIDTH


def mark(tag: str, text: str = "", title: str = "", /, **attributes: float | str) -> Mark:
    """A mark; ``class_`` drops its underscore, other ``_`` become ``-``, numbers get two decimals at most."""
    shown = {
        name.rstrip("_").replace("_", "-"): f"{value:.2f}".rstrip("0").rstrip(".")
        if isinstance(value, float)
        else str(value)
        for name, value in attributes.items()
    }
    return Mark(tag, shown, text, title)


def colour(i: int) -> str:
    """The colour of the i-th run; 0 is the baseline's grey."""
    return f"var(--c{i if i == 0 else 1 + (i - 1) % (COLOURS - 1)})"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, some ``about`` of them."""
    span = max(high - low, 0.01)
    rough = span / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough - 1e-12)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _grid(
    values: Iterable[float], y: Callable[[float], float], left: int, right: int, form: str = "{:g}"
) -> list[Mark]:
    """A horizontal line with its label for each value."""
    marks = []
    for value in values:
        marks.append(mark("line", x1=left, x2=right, y1=y(value), y2=y(value), class_="grid"))
        marks.append(mark("text", form.format(value), x=left - 8, y=y(value) + 4, text_anchor="end"))
    return marks


def interval_chart(runs: Mapping[str, Any], measure: str) -> Chart:
    """One row per run: the mean as a dot, its 95 % interval as a line."""
    left, right, row = 170, 60, 34
    intervals = [run["intervals"][measure] for run in runs.values()]
    values = ticks(min(low for low, _ in intervals), max(high for _, high in intervals), 6)
    height = row * len(runs) + 30

    def x(value: float) -> float:
        return left + (value - values[0]) / (values[-1] - values[0]) * (WIDTH - left - right)

    marks = []
    for value in values:
        marks.append(mark("line", x1=x(value), x2=x(value), y1=4, y2=height - 24, class_="grid"))
        marks.append(mark("text", f"{value:g}", x=x(value), y=height - 8, text_anchor="middle"))
    for i, (name, run) in enumerate(runs.items()):
        y, mean, (low, high) = row * i + 20, run["means"][measure], run["intervals"][measure]
        title = f"{name}: {measure} {mean:.4f}, 95 % interval {low:.4f} to {high:.4f}"
        marks += [
            mark("text", _short(name, 22), name, x=left - 14, y=y + 4, text_anchor="end", class_="strong"),
            mark("line", x1=x(low), x2=x(high), y1=y, y2=y, stroke=colour(i), stroke_width=4, stroke_linecap="round"),
            mark("text", f"{mean:.4f}", x=x(high) + 10, y=y + 4),
            mark("circle", "", title, cx=x(mean), cy=y, r=7, fill=colour(i), stroke="var(--card)", stroke_width=2),
        ]
    return Chart(f"{measure} with intervals", height, marks)


def depth_chart(curves: Mapping[str, Mapping[int, float]], base: float, place: Mapping[str, int]) -> Chart:
    """nDCG@10 by the number of first-stage candidates that are reranked; depths at equal distances.

    curves: name -> depth -> value; base: the baseline's value; place: name -> number of the run's colour.
    """
    height, left, right, bottom = 330, 60, WIDTH - 150, 44
    depths = list(next(iter(curves.values())))
    shown = [base, *(value for curve in curves.values() for value in curve.values())]
    values = ticks(min(shown) - 0.005, max(shown) + 0.005)

    def x(i: int) -> float:
        return left + i * (right - left) / max(len(depths) - 1, 1)

    def y(value: float) -> float:
        return 12 + (values[-1] - value) / (values[-1] - values[0]) * (height - 12 - bottom)

    marks = _grid(values, y, left, right)
    for i, depth in enumerate(depths):
        marks.append(mark("text", str(depth), x=x(i), y=height - bottom + 20, text_anchor="middle"))
    marks.append(mark("text", "candidates reranked", x=(left + right) / 2, y=height - 4, text_anchor="middle"))
    dashed = {"stroke": colour(0), "stroke_width": "2", "stroke_dasharray": "6 5"}
    marks.append(mark("line", "", "", x1=left, x2=right, y1=y(base), y2=y(base), **dashed))
    for name, curve in curves.items():
        path = " ".join(f"{'ML'[i > 0]}{x(i):.1f} {y(value):.1f}" for i, value in enumerate(curve.values()))
        marks.append(mark("path", d=path, fill="none", stroke=colour(place[name]), stroke_width=2.5))
        for i, (depth, value) in enumerate(curve.items()):
            title = f"{name}, depth {depth}: nDCG@10 {value:.4f}"
            marks.append(mark("circle", "", title, cx=x(i), cy=y(value), r=4.5, fill=colour(place[name])))
    ends = {name: list(curve.values())[-1] for name, curve in curves.items()}
    for (name, value), at in zip(ends.items(), _apart([y(value) for value in ends.values()], 16), strict=True):
        said = f"{_short(name, 14)} {value:.3f}"
        marks.append(mark("text", said, x=right + 14, y=at + 4, style=f"fill: {colour(place[name])}"))
    return Chart("nDCG@10 by rerank depth", height, marks)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _apart(places: list[float], distance: float) -> list[float]:
    """Places moved down where they would overlap, in the given order."""
    moved, last = [0.0] * len(places), -math.inf
    for i in sorted(range(len(places)), key=places.__getitem__):
        moved[i] = last = max(places[i], last + distance)
    return moved


def gain_chart(differences: Sequence[tuple[str, float]], name: str, baseline: str) -> Chart:
    """Differences of nDCG@10 per query, (query text, difference), best gain first."""
    height, left = 210, 46
    middle, room = height / 2, height / 2 - 12
    step = (WIDTH - left) / max(len(differences), 1)
    marks = []
    for value in (-1, -0.5, 0, 0.5, 1):
        at = middle - value * room
        marks.append(mark("line", x1=left, x2=WIDTH, y1=at, y2=at, class_="grid" if value else "axis"))
        marks.append(mark("text", f"{value:+g}" if value else "0", x=left - 8, y=at + 4, text_anchor="end"))
    if len(differences) > BARS:
        for sign, fill in ((1, "var(--up)"), (-1, "var(--down)")):
            line = " ".join(
                f"L{left + i * step:.1f} {middle - max(sign * d, 0) * sign * room:.1f}"
                for i, (_, d) in enumerate(differences)
            )
            marks.append(mark("path", d=f"M{left} {middle} {line} L{WIDTH} {middle} Z", fill=fill))
    else:
        width = step - 1 if step > 3 else step + 0.4  # no seams between thin bars
        for i, (text, d) in enumerate(differences):
            if d:
                top, fill = (middle - d * room, "var(--up)") if d > 0 else (middle, "var(--down)")
                place = {"x": left + i * step, "y": top, "width": width, "height": max(abs(d) * room, 0.8)}
                marks.append(mark("rect", "", f"{d:+.3f}  {text}", **place, fill=fill))
    return Chart(f"nDCG@10 of {name} minus {baseline}, per query", height, marks)


def histogram(facts: Mapping[str, Any], unit: str) -> Chart:
    """Shares per bin of one or two series, as areas; the last bin holds what is above it, too."""
    start, step, series = facts["start"], facts["width"], facts["counts"]
    bins = len(next(iter(series.values())))
    shares = {name: [100 * n / max(sum(counts), 1) for n in counts] for name, counts in series.items()}
    height, left, bottom = 230, 56, 30
    values = ticks(0, max(max(each) for each in shares.values()), 4)
    wide = (WIDTH - left) / bins

    def y(share: float) -> float:
        return 10 + (values[-1] - share) / values[-1] * (height - 10 - bottom)

    marks = _grid(values, y, left, WIDTH, "{:g} %")
    end = start + bins * step
    for value in ticks(start, end, 8):
        if start <= value <= end:
            x = left + (value - start) / step * wide
            marks.append(mark("text", f"{value:g}", x=min(x, WIDTH - 14), y=height - 8, text_anchor="middle"))
    for name, each in shares.items():
        line = " ".join(
            f"L{left + i * wide:.1f} {y(share):.1f} L{left + (i + 1) * wide:.1f} {y(share):.1f}"
            for i, share in enumerate(each)
        )
        area = f"M{left} {y(0):.1f} {line} L{left + bins * wide:.1f} {y(0):.1f} Z"
        drawn = {"fill": SERIES_COLOURS[name], "stroke": SERIES_COLOURS[name]}
        marks.append(mark("path", "", "", d=area, **drawn, fill_opacity="0.22", stroke_width="1.8"))
    for i in range(bins):  # to hover over
        low, high = start + i * step, start + (i + 1) * step
        upto = f"{low:g} and more" if i == bins - 1 and facts["more"] else f"{low:g} to {high:g}"
        said = ", ".join(f"{name} {each[i]:.1f} %" for name, each in shares.items())
        place = {"x": left + i * wide, "y": 10, "width": wide, "height": height - 10 - bottom}
        marks.append(mark("rect", "", f"{upto} {unit}: {said}", **place, fill_opacity="0"))
    return Chart(f"Distribution of {' and '.join(series)} {unit}", height, marks)
