"""Importing the package stays light: it is paid by every command, every worker and every test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "import_time.py"
LIGHT_ENOUGH = {"numpy", "pydantic"}  # for Search and commands, not for `import rmsearch`


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """What the benchmark says of each import statement."""
    command = [sys.executable, str(BENCHMARK), "--json", "--runs", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return {each["statement"]: each for each in json.loads(done.stdout)["imports"]}


@pytest.mark.parametrize("statement", ["import rmsearch", "from rmsearch import Search"])
def test_import_is_quick_and_loads_nothing_heavy(measured: dict[str, dict[str, Any]], statement: str) -> None:
    allowed = set() if statement == "import rmsearch" else LIGHT_ENOUGH
    assert not set(measured[statement]["heavy"]) - allowed
    assert measured[statement]["best_seconds"] <= 0.3


@pytest.mark.parametrize("statement", ["import rmsearch.rmsearch", "import rmsearch.cli", "import rmsearch.doctor"])
def test_commands_load_nothing_heavy(measured: dict[str, dict[str, Any]], statement: str) -> None:
    assert not set(measured[statement]["heavy"]) - LIGHT_ENOUGH
