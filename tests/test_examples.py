"""The scripts of examples/, whole, on small data with the real embedding model."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
THINGS = ["salt", "iron", "sugar", "zinc", "vitamin C", "caffeine", "protein", "water", "copper", "alcohol"]
PLACES = ["the liver", "bones", "the skin"]


def write_beir(folder: Path, rng: random.Random, queries: dict[str, int]) -> None:
    """One abstract for each thing in each place; a query is a claim about one of them."""
    (folder / "qrels").mkdir(parents=True)
    keys = {f"d{i}": (thing, place) for i, (thing, place) in enumerate((t, p) for t in THINGS for p in PLACES)}
    corpus = [
        {
            "_id": name,
            "title": f"How {thing} acts on {place} of healthy adults",
            "text": f"We gave {thing} to forty adults for two months. The state of {place} was measured every week. "
            f"A moderate amount of {thing} made {place} stronger in most of them. Very large doses did harm instead.",
        }
        for name, (thing, place) in keys.items()
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    lines, number = [], 0
    for split, count in queries.items():
        judged = ["query-id\tcorpus-id\tscore"]
        for _ in range(count):
            name, (thing, place) = rng.choice(list(keys.items()))
            lines.append({"_id": f"q{number}", "text": f"Number {number}: does {thing} strengthen {place}?"})
            judged.append(f"q{number}\t{name}\t1")
            number += 1
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(judged) + "\n")
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def write_pairs(path: Path, field: str) -> None:
    path.parent.mkdir()
    rows = [
        {"question": f"What is {thing} good for?", field: f"It is {thing} that {p} need."}
        for thing in THINGS
        for p in PLACES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_chains_print_their_table_and_then_skip_what_is_done(tmp_path: Path) -> None:
    data, rng = tmp_path / "data", random.Random(1)
    write_beir(data / "metatool", rng, {"train": 60, "dev": 10, "test": 12})
    write_beir(data / "scifact", rng, {"train": 40, "test": 12})
    write_pairs(data / "medquad" / "pairs.jsonl", "answer")
    write_pairs(data / "squad_nqg" / "pairs_dev.jsonl", "positive")
    environment = {
        **os.environ,
        "EPOCHS": "4",
        "SENTENCES": "40",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "examples" / "chains.sh"), str(data), str(tmp_path / "out")]

    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    rows = [line for line in first.stdout.splitlines() if line.startswith(("| metatool", "| scifact"))]
    assert len(rows) == 2 and all(len(row.split("|")) == 9 for row in rows)
    assert all(0 < float(cell) <= 1 for row in rows for cell in row.split("|")[2:4])

    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("up_to_date") >= 30 and "done stage=" not in again.stderr
    assert [line for line in again.stdout.splitlines() if line.startswith(("| metatool", "| scifact"))] == rows
