"""Write docs/reference.md from the stages' configs: `python scripts/reference.py` (`--check` only compares)."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rmsearch.cli import STAGES, load_stage
from rmsearch.stage import Stage, StageConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
HEAD = """# Reference: every stage and every flag

Written by `python scripts/reference.py` from the code; a test compares. `rmsearch GROUP STAGE --help` shows the same.
Every stage also takes `--config FILE.yaml` and `RMSEARCH_GROUP_STAGE_FLAG` from the environment (flags win, then
environment, then YAML), and the flags of the last table.
"""


def _type(annotation: Any) -> str:
    kinds = [
        kind
        for kind in (get_args(annotation) if type(None) in get_args(annotation) else (annotation,))
        if kind is not type(None)
    ]
    names = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            names.append(", ".join(f"`{choice}`" for choice in get_args(kind)))
        else:
            names.append(getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind))
    return " or ".join(names)


def _table(config: type[StageConfig], own: bool) -> list[str]:
    lines = ["| flag | type | default | meaning |", "|---|---|---|---|"]
    for name, info in config.model_fields.items():
        if (name in StageConfig.model_fields) == own:
            continue
        default = "required" if info.is_required() else "" if info.default in (None, [], ()) else f"`{info.default}`"
        meaning = (info.description or "").replace("|", "\\|")
        lines.append(f"| `--{name.replace('_', '-')}` | {_type(info.annotation)} | {default} | {meaning} |")
    return lines


def _section(group: str, name: str, stage: Stage[Any]) -> list[str]:
    return [f"## rmsearch {group} {name}", inspect.cleandoc(stage.help), "", *_table(stage.config, own=True), ""]


def page() -> str:
    lines = [HEAD]
    for group, stages in STAGES.items():
        for name in stages:
            lines += _section(group, name, load_stage(group, name))
    lines += ["## Flags of every stage", "", *_table(StageConfig, own=False)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        raise SystemExit(
            0 if PAGE.read_text() == page() else f"{PAGE} is out of date. Run: python scripts/reference.py"
        )
    PAGE.write_text(page())
