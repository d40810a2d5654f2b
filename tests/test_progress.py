"""Progress on a pod's log: a line every few seconds, whatever the work does."""

from __future__ import annotations

import time

import pytest

from rmsearch import progress


def test_lines_come_by_time_also_while_nothing_advances(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.05)
    with progress.progress("embed", 10, "texts") as bar:
        bar.advance(4)
        time.sleep(0.5)  # one long batch
    lines = [line for line in capsys.readouterr().err.splitlines() if "stage=embed done=4 total=10" in line]
    assert len(lines) >= 3
    time.sleep(0.2)
    assert "progress" not in capsys.readouterr().err
