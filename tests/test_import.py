"""Importing the package stays light: it is paid by every command, every worker and every test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "import_time.py"
HEAVY = {
    "torch",
    "vllm",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "boto3",
    "pandas",
    "scipy",
    "pyarrow",
    "kfp",
    "fastapi",
}


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    assert not modules_after("import rmsearch") & {*HEAVY, "numpy", "pydantic"}


def test_search_and_doctor_load_nothing_heavy() -> None:
    assert not modules_after("from rmsearch import Search") & {*HEAVY, "numpy", "pydantic"}
    assert not modules_after("import rmsearch.doctor, rmsearch.rmsearch, rmsearch.cli") & HEAVY


def test_import_takes_at_most_300_milliseconds() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", "--runs", "5"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = {each["statement"]: each for each in json.loads(done.stdout)["imports"]}
    assert found["import rmsearch"]["best_seconds"] <= 0.3
    assert found["import rmsearch"]["heavy"] == []
    assert found["from rmsearch import Search"]["best_seconds"] <= 0.3
