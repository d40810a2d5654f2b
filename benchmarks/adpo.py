"""The Python parts of adpo.sh: graded lists from embedding ranks and labels, the steps that fit a time, the table.

python benchmarks/adpo.py lists DATA SPLIT RUN PREFIX [--rows N]   # PREFIX_rows.jsonl, _pairs.jsonl and _run.json
python benchmarks/adpo.py steps MODEL_FOLDER MINUTES               # how many steps like MODEL_FOLDER's take so long
python benchmarks/adpo.py best MODEL_FOLDER …                      # the folder whose model is best on dev
python benchmarks/adpo.py table LISTS NAME=MODEL_FOLDER …          # run files and lists lie beside the models
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import common
import numpy as np

NEAR, FAR = (1, 5), (20, 60)  # ranks, from 1, of the tools below the labelled one
DRAWN = 2  # tools from each of these windows; one more at random from beyond


def graded(ranked: list[str], label: str, positives: set[str], rest: list[str], rng: Any) -> list[tuple[str, int]]:
    """(tool, grade), best first: the labelled tool 3, near ones 2, far ones 1, one beyond the ranks 0."""
    found = [(label, 3)]
    for grade, (first, last) in ((2, NEAR), (1, FAR)):
        window = [key for key in ranked[first - 1 : last] if key not in positives]
        found += [(window[i], grade) for i in sorted(rng.choice(len(window), DRAWN, replace=False))]
    return [*found, (rest[int(rng.integers(len(rest)))], 0)]


def write_lists(data: str, split: str, run_file: str, prefix: str, rows: int) -> None:
    """Writes one list per labelled query (0 rows), or ``rows`` lists with every tool equally often the labelled one:
    as rows for train.adpo_lora, the same preferences as pairs for train.lora, and as a run {query: {tool: grade}}."""
    from rmsearch.datasets.beir import load_beir
    from rmsearch.preferences.mining import choose_pairs
    from rmsearch.preferences.positives import labelled_pairs
    from rmsearch.retrieval.runs import read_run
    from rmsearch.storage.records import write_json, write_records

    beir, run, rng = load_beir(data, split), read_run(run_file), np.random.default_rng(42)
    chosen = choose_pairs(labelled_pairs(beir), rows, 0.0, rng) if rows else labelled_pairs(beir)
    lists = []
    for pair in chosen:
        ranked, positives = list(run[pair.query_id])[: FAR[1]], set(beir.positives(pair.query_id))
        rest = sorted(beir.corpus.keys() - positives - set(ranked))
        lists.append((pair.query_id, graded(ranked, pair.key_id, positives, rest, rng)))
    write_records(f"{prefix}_rows.jsonl", (_row(beir, query, keys) for query, keys in lists))
    pairs = ((query, a, b) for query, keys in lists for (a, x), (b, y) in combinations(keys, 2) if x > y)
    write_records(f"{prefix}_pairs.jsonl", (_pair(beir, *pair) for pair in pairs))
    write_json(f"{prefix}_run.json", {query: dict(keys) for query, keys in lists})


def _row(beir: Any, query: str, keys: list[tuple[str, int]]) -> dict[str, Any]:
    text = beir.queries[query]
    batch = [{"query": text, "key": beir.key_text(key), "query_id": query, "key_id": key} for key, _ in keys]
    pairs = [(a, b) for a, b in combinations(range(len(keys)), 2) if keys[a][1] > keys[b][1]]
    return {"batch": batch, "dpo_pairs": pairs}


def _pair(beir: Any, query: str, chosen: str, rejected: str) -> dict[str, Any]:
    texts = {"query": beir.queries[query], "chosen_key": beir.key_text(chosen), "rejected_key": beir.key_text(rejected)}
    return texts | {"query_id": query, "chosen_key_id": chosen, "rejected_key_id": rejected}


def seconds_and_steps(folder: str) -> tuple[float, int]:
    """What a training took (evaluations while training included) and its steps."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    return next(e["train_runtime"] for e in reversed(state["log_history"]) if "train_runtime" in e), state[
        "global_step"
    ]


def counts(folder: str) -> dict[str, Any]:
    """What the training's run record counts."""
    found: dict[str, Any] = json.loads(Path(f"{folder}.run.json").read_text())["counts"]
    return found


def accuracy(lists: str, scored: str, above: int = 0) -> float:
    """Share of the lists' pairs that the scores order rightly, ties half; only those whose better grade is ``above``
    or more."""
    from rmsearch.retrieval.runs import read_run

    right, grades, scores = [], read_run(lists), read_run(scored)
    for query, keys in grades.items():
        for better, worse in combinations(keys, 2):  # read_run puts the best first
            if keys[better] > keys[worse] and keys[better] >= above:
                difference = scores[query][better] - scores[query][worse]
                right.append((difference > 0) + 0.5 * (difference == 0))
    return float(np.mean(right))


def table(lists: str, models: dict[str, str]) -> list[dict[str, Any]]:
    """One line per trainer. lists: prefix of the held-out lists, before ``_dev_run.json`` and ``_test_run.json``."""
    rows = []
    for name, folder in models.items():
        seconds, steps = seconds_and_steps(folder)
        row: dict[str, Any] = {"trainer": name, "model": Path(folder).name, "steps": steps, "minutes": seconds / 60}
        row["forwards per pair"] = counts(folder)["forwards_per_pair"]
        for split in ("dev", "test"):
            held_out, scored = f"{lists}_{split}_run.json", f"{folder}_{split}_lists.json"
            row[f"pairs right, {split}"] = accuracy(held_out, scored)
            row[f"label first, {split}"] = accuracy(held_out, scored, above=3)
            measured = json.loads(Path(f"{folder}_{split}_ndcg.json").read_text())
            row[f"nDCG@10, {split}"] = measured["runs"]["reward"]["means"]["nDCG@10"]
        rows.append(row)
    return rows


def main() -> None:
    """Run one of the parts."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("part", choices=("lists", "steps", "best", "table"))
    parser.add_argument("arguments", nargs="+")
    parser.add_argument("--rows", type=int, default=0)
    options: argparse.Namespace = parser.parse_args()
    if options.part == "lists":
        write_lists(*options.arguments, rows=options.rows)
    elif options.part == "steps":
        folder, minutes = options.arguments
        seconds, steps = seconds_and_steps(folder)
        print(int(60 * float(minutes) * steps / seconds))
    elif options.part == "best":
        print(max(options.arguments, key=lambda folder: counts(folder)["ndcg@10_after"]))
    else:
        lists, *models = options.arguments
        common.report(table(lists, dict(model.split("=", 1) for model in models)), options.json)


if __name__ == "__main__":
    main()
