"""HTML and SVG as nested calls: every text is escaped unless `el` itself made it, so data can never become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

VOID = {"meta", "br", "line", "circle", "rect", "path"}


class Markup(str):
    """Text that is HTML already; only `el` and `raw` make it."""

    __slots__ = ()


Child = Any  # text, number, Markup, None, or an iterable of them


def el(name: str, /, *children: Child, **attributes: Any) -> Markup:
    """An element. ``class_`` and ``for_`` drop their underscore, other ``_`` become ``-``; None leaves one out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Markup(f"<{name}{shown}>" if name in ("meta", "br") else f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after the other, escaped where they are not markup."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str | int | float):
            parts.append(Markup(html.escape(_number(child))))
        else:
            parts.append(join(child))
    return Markup("".join(parts))


def _number(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def page(title: str, style: str, body: Markup) -> str:
    """A whole document that loads nothing from anywhere (a policy in it forbids the browser to)."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("title", title),
        el("style", Markup(style)),
    )
    return f"<!doctype html>\n{el('html', head, el('body', body), lang='en')}\n"


STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #ffffff; --text: #1c1f23; --soft: #5d6570; --line: #e1e4e8;
  --up: #12805c; --down: #c0392b; --mark: #fff3c4; --c0: #7a828e; --c1: #1769c2; --c2: #d2691e; --c3: #7b4bb7;
  --c4: #0b8a8a; --c5: #b8336a; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --card: #1d2125; --text: #e7e9ec; --soft: #a0a8b2;
  --line: #343a41; --up: #4cc38a; --down: #ff7b6b; --mark: #4a4014; --c0: #9aa3ae; --c1: #6cb2ff; --c2: #ffa657;
  --c3: #c49cff; --c4: #4fd1c5; --c5: #ff8fb8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 40px 0 6px; }
h3 { font-size: 15px; margin: 0 0 2px; }
p { margin: 4px 0 12px; max-width: 75ch; } .soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin: 12px 0; }
.verdict { border-left: 5px solid var(--c0); font-size: 17px; } .verdict.up { border-left-color: var(--up); }
.verdict.down { border-left-color: var(--down); }
.card.verdict { color: inherit; } .verdict p { margin: 0; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; } td.name { font-weight: 600; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.up { color: var(--up); } .down { color: var(--down); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin: 2px 0 8px; }
.card { overflow-x: auto; } svg { display: block; width: 100%; min-width: 620px; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg .strong { fill: var(--text); font-weight: 600; }
details { margin: 8px 0; } summary { cursor: pointer; } summary:hover { color: var(--c1); }
.query { border-top: 1px solid var(--line); padding: 12px 0; } .query:first-of-type { border-top: 0; }
.query > p { max-width: none; margin: 0 0 8px; font-weight: 600; overflow-wrap: anywhere; }
.delta { float: right; font-variant-numeric: tabular-nums; font-weight: 600; margin-left: 12px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 14px; }
.columns h4 { margin: 0 0 4px; font-size: 13px; color: var(--soft); font-weight: 600; }
ol { margin: 0; padding-left: 22px; font-size: 13.5px; } li { margin-bottom: 4px; overflow-wrap: anywhere; }
li.hit { background: var(--mark); border-radius: 4px; } code { font-size: 12.5px; overflow-wrap: anywhere; }
.records td { white-space: normal; overflow-wrap: anywhere; text-align: left; font-size: 13px; vertical-align: top; }
.records td:first-child { width: 210px; color: var(--soft); }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""
