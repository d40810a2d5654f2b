"""Memory while scoring 1,000,000 pairs streamed from a Parquet file, with a null model in the place of the real one.

    python benchmarks/memory.py [--pairs 1000000] [--unique] [--json FILE]

Everything else is real: reading, checking, interning, tokenising (MiniLM's tokenizer), packing, streaming results back.
The target is a peak of at most 500 MiB above the start, and a flat line. --unique makes every pair a different one.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from scheduler import NullBackend

ROWS = 10_000


def write_pairs(path: Path, count: int, unique: bool) -> None:
    """A Parquet file of (query, key); one text of 20,000 each, or numbered ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chance = random.Random(1)
    queries, keys = common.sentences(20_000, 12, seed=7), common.sentences(20_000, 60, seed=8)
    with pq.ParquetWriter(path, pa.schema([("query", pa.string()), ("key", pa.string())])) as writer:
        for start in range(0, count, ROWS):
            size = min(ROWS, count - start)
            rows = {"query": chance.choices(queries, k=size), "key": chance.choices(keys, k=size)}
            if unique:
                rows["key"] = [f"{key} {start + i}" for i, key in enumerate(rows["key"])]
            writer.write_table(pa.table(rows))


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The file's pairs, a batch of rows at a time."""
    from rmsearch.storage.records import read_records

    return ((row["query"], row["key"]) for row in read_records(str(path)))


def resident() -> float:
    """MiB of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def consume(scorer: Any, pairs: Iterator[tuple[str, str]], total: int) -> list[float]:
    """Scores all pairs; memory in MiB at every tenth of the way."""
    seen, marks = 0, []
    async for positions, _ in scorer.stream(pairs):
        seen += len(positions)
        if seen >= total * (len(marks) + 1) / 10:
            marks.append(resident())
    assert seen == total, f"{seen} of {total} answered"
    return marks


def peak() -> float:
    """The most MiB of this process so far (VmHWM: unlike getrusage's, it does not carry over from the parent)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Measure and print."""
    from rmsearch.engines.dispatch import Limits
    from rmsearch.engines.scheduler import PairScorer
    from rmsearch.models.folder import ModelFolder
    from rmsearch.models.resolve import resolve_contract
    from rmsearch.prompts.renderer import Renderer

    parser = common.arguments(__doc__ or "")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--unique", action="store_true")
    parser.add_argument("--prepare", type=Path, help="only write the model and the pairs into this folder")
    options = parser.parse_args()
    if options.prepare:
        write_pairs(options.prepare / "pairs.parquet", options.pairs, options.unique)
        common.minilm_cross_encoder(options.prepare / "model")
        return
    with tempfile.TemporaryDirectory() as scratch:
        # In a process of its own, so that its memory does not count as ours.
        subprocess.run([sys.executable, *sys.argv, "--prepare", scratch], check=True)
        path, folder = Path(scratch) / "pairs.parquet", Path(scratch) / "model"
        contract = resolve_contract(ModelFolder(folder))
        renderer = Renderer(ModelFolder(folder).tokenizer, contract.template, contract.max_length)
        null = NullBackend(Limits(batch_tokens=4096, batch_size=256, in_flight=2, padded=True, prefix_cache=False))
        scorer = PairScorer(null, renderer, contract)
        asyncio.run(scorer.score([("a", "b")]))
        start, began = resident(), time.perf_counter()
        marks = asyncio.run(consume(scorer, read_pairs(path), options.pairs))
        seconds = time.perf_counter() - began
    rows = [
        {
            "pairs": options.pairs,
            "scored": null.scored,
            "start, MiB": start,
            "peak above start, MiB": peak() - start,
            "at 10 %": marks[0] - start,
            "at 50 %": marks[4] - start,
            "at 100 %": marks[9] - start,
            "pairs/s": options.pairs / seconds,
        }
    ]
    common.report(rows, options.json)


if __name__ == "__main__":
    main()
