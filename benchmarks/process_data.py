"""`train process_data` on a large jsonl file: speed and memory.

    python benchmarks/process_data.py [--mebibytes 2048] [--n-sample 0] [--json FILE]

Writes a file of rows with an id, a text of about 1 KiB, a title and a number, then runs the stage as a command of its
own and reads its peak memory (the kernel's figure: if this script had more when it started the stage, its own). The
targets: at most 600 MiB, at least 50 MiB of jsonl per second, the whole process counted.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROW_WORDS = 150


def write_jsonl(path: Path, mebibytes: int) -> int:
    """A file of at least that size; returns its number of rows."""
    chance = random.Random(1)
    texts = [json.dumps(text) for text in common.sentences(5000, ROW_WORDS, seed=3)]
    rows = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < mebibytes << 20:
            for _ in range(5000):
                text = chance.choice(texts)
                file.write(f'{{"_id": "row-{rows}", "title": "Row {rows}", "text": {text}, "score": {rows / 7:.3f}}}\n')
                rows += 1
    return rows


def run_measured(command: list[str]) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak MiB of that process) of a command that must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the stage ended with {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--mebibytes", type=int, default=2048)
    parser.add_argument("--n-sample", type=int, default=0, help="also sample so many rows; 0: take all")
    options = parser.parse_args()
    stage = [sys.executable, "-m", "rmsearch.train.process_data"]
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "corpus.jsonl", Path(scratch) / "out"
        rows = write_jsonl(source, options.mebibytes)
        size = source.stat().st_size / 2**20
        command = [*stage, "--dataset-name", str(source), "--output-dir", str(output)]
        if options.n_sample:
            command += ["--n-sample", str(options.n_sample)]
        seconds, cpu, peak = run_measured(command)
        written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 2**20
    figures = {"jsonl, MiB": size, "rows": rows, "written, MiB": written, "seconds": seconds, "CPU seconds": cpu}
    common.report([{**figures, "MiB/s": size / seconds, "peak, MiB": peak}], options.json)


if __name__ == "__main__":
    main()
