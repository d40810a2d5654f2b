"""Pages from the templates in ``templates/``: every value is escaped there, so data can never become markup."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rmsearch.metrics.table import p_text
from rmsearch.reports import charts
from rmsearch.storage import uri as storage

SURE = 0.05


def render(template: str, title: str, subtitle: Sequence[str], **facts: Any) -> bytes:
    """A whole HTML document of a template; the subtitle ends with the time."""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    page = _environment().get_template(template).render(title=title, subtitle=[*subtitle, when], **facts)
    return str(page).encode()


@cache
def _environment() -> Any:
    import jinja2

    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clipped": clipped,
        "counted": counted,
        "direction": direction,
        "file_name": storage.name,
        "made_by": made_by,
        "number": number,
        "p_text": p_text,
        "percent": percent,
        "record_facts": record_facts,
        "short": lambda text: clipped(" ".join(text.split()), 160),
        "whole": "{:,.0f}".format,
    }
    environment.globals |= {
        "colour": charts.colour,
        "depth_chart": charts.depth_chart,
        "gain_chart": charts.gain_chart,
        "histogram": charts.histogram,
        "interval_chart": charts.interval_chart,
        "series_colours": charts.SERIES_COLOURS,
    }
    return environment


def clipped(text: str, length: int) -> str:
    """The text, or its beginning and ``…`` when it is longer."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def percent(share: float) -> str:
    """``83 %`` or ``0.4 %``; what is not all or nothing is never shown as 0 or 100."""
    value = 100 * share
    if 0 < share < 1 and not 0.05 <= value <= 99.95:
        return "< 0.1 %" if value < 1 else "> 99.9 %"
    return f"{value:.0f} %" if 10 <= value <= 99 else f"{round(value, 1):g} %"


def counted(count: int, noun: str) -> str:
    """``1 query``, ``1,200 queries``."""
    many = noun.replace("query", "querie") + "s"
    return f"{count:,} {noun if count == 1 else many}"


def number(value: float | None) -> str:
    """``1,200``, ``0.3333``, or nothing for what is unknown."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def direction(test: Mapping[str, Any]) -> str:
    """``up`` or ``down`` for a difference that is significant, else nothing."""
    return "" if test["p_holm"] >= SURE else "up" if test["difference"] > 0 else "down"


def made_by(record: Mapping[str, Any]) -> str:
    """The stage, model and seconds of a run record."""
    seconds = record.get("seconds")
    shown = f"{seconds:g} s" if isinstance(seconds, int | float) else None
    facts = [record.get("stage"), record.get("config", {}).get("model_name"), shown]
    return " · ".join(str(fact) for fact in facts if fact)


def record_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run record says, as (name, text)."""
    config, notes = record.get("config", {}), record.get("notes", {})
    facts = {
        "stage": record.get("stage"),
        "model": config.get("model_name"),
        "adapter": config.get("lora"),
        **{name: notes.get(name) for name in ("contract", "embedding", "fusion", "fusion_fit", "latency")},
        "candidates from": config.get("embed_output"),
        "data set": notes.get("dataset"),
        **{name: record.get(name) for name in ("inputs", "counts", "seconds", "versions", "finished")},
    }
    return [(name, _plain(value)) for name, value in facts.items() if value not in (None, {}, "")]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key} ({_plain(each)})" if isinstance(each, Mapping) else f"{key} {_plain(each)}"
            for key, each in value.items()
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)
