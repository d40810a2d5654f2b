"""Progress of long work: a bar on a terminal, elsewhere (a pod's log) one ``key=value`` line every few seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE_EVERY_SECONDS = 5.0


def first_process() -> bool:
    """Whether this is the only or first process of a distributed run."""
    return os.environ.get("RANK", "0") in ("", "0")


def logfmt(event: str, **fields: Any) -> str:
    """``event key=value …``; values with spaces are quoted. None values are left out."""
    parts = [event]
    for name, value in fields.items():
        if value is None:
            continue
        text = str(value)
        if isinstance(value, float):
            text = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
        parts.append(f'{name}="{text}"' if " " in text or not text else f"{name}={text}")
    return " ".join(parts)


def say(event: str, **fields: Any) -> None:
    """Print one line for people and log parsers on stderr (stdout is for results). Of several processes that
    ``accelerate launch`` started the first speaks for all."""
    if not first_process():
        return
    print(logfmt(event, **fields), file=sys.stderr, flush=True)


class Progress:
    """Counts done items; `advance` is cheap enough to call per batch."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.started = time.monotonic()
        self._advance_bar: Any = None

    def advance(self, n: int = 1) -> None:
        """Count n more items as done."""
        self.done += n
        if self._advance_bar is not None:
            self._advance_bar(n)

    def print_lines(self, ended: threading.Event) -> None:
        """Print a line every few seconds, also while a long batch lets nothing advance."""
        while not ended.wait(LINE_EVERY_SECONDS):
            self._print_line()

    @property
    def rate(self) -> float:
        """Items per second since the start."""
        return self.done / max(time.monotonic() - self.started, 1e-9)

    def _print_line(self) -> None:
        left = None if self.total is None or not self.done else (self.total - self.done) / max(self.rate, 1e-9)
        say(
            "progress",
            stage=self.label,
            done=self.done,
            total=self.total,
            unit=self.unit,
            per_second=self.rate,
            seconds_left=left,
        )


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "items") -> Iterator[Progress]:
    """Show progress on stderr while the block runs."""
    shown = Progress(label, total, unit)
    if not sys.stderr.isatty():
        ended = threading.Event()
        threading.Thread(target=shown.print_lines, args=(ended,), name="rmsearch-progress", daemon=True).start()
        try:
            yield shown
        finally:
            ended.set()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, unit=unit)
        shown._advance_bar = lambda n: bar.advance(task, n)
        yield shown
