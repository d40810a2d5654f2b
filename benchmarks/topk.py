"""Exact top-k of many queries over many keys (`ExactSearch`, what the embedding stages use) against the bare product.

    python benchmarks/topk.py [--queries 10000] [--keys 1000000] [--width 384] [--k 100] [--json FILE]

Random unit vectors; the keys lie in a file and come in blocks. Each block goes through both sides, in turns: the plain
side is numpy's matrix product of all queries with the block, ours gives the best k of each query. Reading is not
counted. The targets: at least 0.7 times the plain side's speed, and at most 2.5 GiB for the whole process. A few
queries are compared with a sort of all their scores.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np

from rmsearch.retrieval.vectors import ExactSearch
from rmsearch.train.get_top_relevant_keys_embed import SEARCHED

CHECKED = 5


def unit_vectors(count: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """float32[count, width]"""
    vectors = rng.standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def blocks(path: Path, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first position, float32[n, width]) of the file's keys."""
    first = 0
    with path.open("rb") as file:
        while len(block := np.fromfile(file, np.float32, SEARCHED * width)):
            yield first, block.reshape(-1, width)
            first += len(block) // width


def write_keys(path: Path, count: int, width: int) -> None:
    """A file of unit vectors."""
    rng = np.random.default_rng(1)
    with path.open("wb") as file:
        for start in range(0, count, 8192):
            unit_vectors(min(8192, count - start), width, rng).tofile(file)


def peak() -> float:
    """The most MiB of this process so far."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def check(path: Path, queries: np.ndarray, positions: np.ndarray, scores: np.ndarray) -> None:
    """Compare a few queries with a sort of all their scores, which another product may round otherwise."""
    whole = np.concatenate([queries @ block.T for _, block in blocks(path, queries.shape[1])], axis=1)
    for row in range(len(queries)):
        best = np.sort(whole[row])[::-1][: positions.shape[1]]
        assert np.allclose(scores[row], best, atol=1e-6) and len(set(positions[row].tolist())) == len(best)
        assert np.allclose(whole[row, positions[row]], scores[row], atol=1e-6)


def main() -> None:
    """Measure and print."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=100)
    options = parser.parse_args()
    queries = unit_vectors(options.queries, options.width, np.random.default_rng(0))
    search = ExactSearch(queries, options.k, [-1] * len(queries), "cpu")
    seconds = {"plain": 0.0, "ours": 0.0}
    cpu = dict(seconds)

    def timed(side: str, first: int, block: np.ndarray) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        if side == "plain":
            queries @ block.T
        else:
            search.add(first, block)
        seconds[side] += time.perf_counter() - start
        cpu[side] += time.process_time() - cpu_start

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "keys.f32"
        write_keys(path, options.keys, options.width)
        queries[:64] @ queries[:64].T  # starts the threads
        for number, (first, block) in enumerate(blocks(path, options.width)):
            for side in ("plain", "ours") if number % 2 else ("ours", "plain"):
                timed(side, first, block)
        start, cpu_start = time.perf_counter(), time.process_time()
        positions, scores = search.result()
        seconds["ours"] += time.perf_counter() - start
        cpu["ours"] += time.process_time() - cpu_start
        most = peak()
        check(path, queries[:CHECKED], positions[:CHECKED], scores[:CHECKED])
    row = {
        "queries": options.queries,
        "keys": options.keys,
        "k": options.k,
        "block": SEARCHED,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
        "plain, s": seconds["plain"],
        "ours, s": seconds["ours"],
        "speed, of plain": seconds["plain"] / seconds["ours"],
        "in CPU time": cpu["plain"] / cpu["ours"],
        "peak, MiB": most,
    }
    common.report([row], options.json)


if __name__ == "__main__":
    main()
