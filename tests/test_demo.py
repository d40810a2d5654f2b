"""`make demo`, whole: the claim that everything serves, on requests that the model has not seen."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_trained_model_beats_the_stage_that_fed_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "demo.sh"), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    runs = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    ndcg = {name: run["means"]["nDCG@10"] for name, run in runs.items()}
    assert ndcg["reward"] > max(ndcg["embed"], ndcg["bm25"], ndcg["untrained"]), ndcg
    assert runs["reward"]["comparison"]["nDCG@10"]["p_randomisation"] < 0.01
    assert "SQL Tuner" in done.stdout.split("The page takes nine seconds")[1][:200], "the first example search"
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in ("embed", "bm25", "untrained", "reward", "fused"))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 << 20, "KiB: the largest stage stays below 4 GiB"
