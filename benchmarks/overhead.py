"""What a stage of language model answers costs per answer beside the model: prompt, journal, parse, validate, write.

    python benchmarks/overhead.py [--records 20000] [--json FILE]

A null generator answers at once in the model's place. judge_dataset asks about every pair in both orders, and reads the
choice and its log-probability. The second run takes every answer from the journal. The target is 1 ms per answer.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import common

ALTERNATIVES = 20


class NullGenerator:
    """Answers each chat at once: the longer text, with the probabilities that a server would send along."""

    def __init__(self, *_: Any, **__: Any) -> None:
        from rmsearch.engines.generation import Generation

        others = {f"token {i}": math.log(0.001) for i in range(ALTERNATIVES - 2)}
        chances = {"1": ({"1": math.log(0.8), "2": math.log(0.1)}), "2": ({"2": math.log(0.8), "1": math.log(0.1)})}
        self._answers = {name: Generation(name, 1, "stop", ({**two, **others},), 200) for name, two in chances.items()}

    async def generate(self, messages_list: list[Any], **_: Any) -> list[Any]:
        """An answer each."""
        return [self._answers[self._choice(messages[-1]["content"])] for messages in messages_list]

    @staticmethod
    def _choice(prompt: str) -> str:
        first, second = (prompt.index(f"</text_{n}>") - prompt.index(f"<text_{n}>") for n in (1, 2))
        return "1" if first > second else "2"

    async def close(self) -> None:
        """Nothing to free."""


def write_sets(path: Path, count: int) -> None:
    """Sampled sets: a query of about 12 tokens with two keys of about 120, of different lengths."""
    from rmsearch.storage.records import write_records

    queries, first, second = (common.sentences(count, words, seed) for seed, words in enumerate((12, 110, 130)))
    rows = zip(queries, first, second, strict=True)
    write_records(
        str(path),
        (
            {"query": q, "query_id": i, "keys": [a, b + " end" * (len(a) == len(b))], "key_ids": [2 * i, 2 * i + 1]}
            for i, (q, a, b) in enumerate(rows)
        ),
    )


def judged(folder: Path, answers: int) -> tuple[float, int]:
    """Seconds of the stage, and how many answers came from the model."""
    from rmsearch.stage import execute
    from rmsearch.train.judge_dataset import judge_dataset

    options = {"query_key_set": str(folder / "sets.jsonl"), "output": str(folder / "train.jsonl"), "force": True}
    start = time.perf_counter()
    run = execute(judge_dataset, model_name="null", engine="http", base_url="http://127.0.0.1:9", **options)
    seconds = time.perf_counter() - start
    if run.counts["judged"] != answers // 2 or run.counts["ties"]:
        raise SystemExit(f"the run is not what it should be: {run.counts}")
    return seconds, int(run.counts["asked"])


def main() -> None:
    """Measure and print."""
    import rmsearch.engines

    parser = common.arguments(__doc__ or "")
    parser.add_argument("--records", type=int, default=20_000, help="answers, two per pair")
    options = parser.parse_args()
    rmsearch.engines.load_generator = NullGenerator
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_sets(folder / "sets.jsonl", options.records // 2)
        for name in ("answers from the model", "answers from the journal"):
            start, (seconds, asked) = time.process_time(), judged(folder, options.records)
            row = {"run": name, "answers": options.records, "asked": asked, "seconds": seconds}
            row |= {"ms per answer": 1000 * seconds / options.records}
            row["CPU ms per answer"] = 1000 * (time.process_time() - start) / options.records
            rows.append(row | {"peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
    common.report(rows, options.json)


if __name__ == "__main__":
    main()
