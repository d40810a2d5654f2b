"""`train sample_dpo_batch` and `sample_advanced_dpo_batch` with more and more positives per query.

    python benchmarks/sampling.py [--positives 4000] [--json FILE]

Makes a data set (BEIR layout) of 20,000 keys of about 900 characters with so many positives in all, 10, 40, 160 or 500
of them per query, and samples 4 keys a set. The targets: at least 5,000 sets per second of sample_dpo_batch at each
number, and 500 positives per query cost at most 1.3 times as much per set as 10. A set of sample_advanced_dpo_batch
holds all positives of its query, so there a positive's share of it is to be as cheap. Seconds are this process's CPU
time from the call to the written file, less those of a run over 20 positives, which load the data set.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import common

KEYS = 20_000
PER_QUERY = (10, 40, 160, 500)
WORDS = [f"word{i}" for i in range(3000)]


def write_dataset(folder: Path, positives: int, per_query: int) -> Path:
    """A data set whose queries have ``per_query`` positives each."""
    chance = random.Random(3)
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as corpus:
        for i in range(KEYS):
            corpus.write(json.dumps({"_id": f"k{i}", "text": " ".join(chance.choices(WORDS, k=110))}) + "\n")
    queries = range(positives // per_query)
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{q}", "text": f"query number {q}"}) + "\n" for q in queries)
    )
    judged = [f"q{q}\tk{key}\t1\n" for q in queries for key in chance.sample(range(KEYS), per_query)]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    return folder


def cpu_seconds(stage: Any, **flags: Any) -> tuple[float, int]:
    """(seconds, sets) of a stage."""
    from rmsearch.stage import execute

    began = time.process_time()
    run = execute(stage, force=True, **flags)
    return time.process_time() - began, int(run.counts["sets"])


def main() -> None:
    from rmsearch.train.sample_advanced_dpo_batch import sample_advanced_dpo_batch
    from rmsearch.train.sample_dpo_batch import sample_dpo_batch

    parser = common.arguments(__doc__ or "")
    parser.add_argument("--positives", type=int, default=4000, help="in all queries together")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temp:
        least = str(write_dataset(Path(temp) / "least", 20, 10))
        for stage, flag in ((sample_dpo_batch, "negatives_per_query"), (sample_advanced_dpo_batch, "n_sampled_keys")):
            flags: dict[str, Any] = {"output": str(Path(temp) / "sets.jsonl"), flag: 4}
            loading = min(cpu_seconds(stage, dataset_path=least, **flags)[0] for _ in range(3))
            for per_query in PER_QUERY:
                folder = Path(temp) / str(per_query)
                if not folder.exists():
                    write_dataset(folder, given.positives, per_query)
                seconds, sets = min(cpu_seconds(stage, dataset_path=str(folder), **flags) for _ in range(3))
                positives, seconds = given.positives // per_query * per_query, max(seconds - loading, 1e-9)
                rates = {"sets_per_s": sets / seconds, "positives_per_s": positives / seconds}
                rows.append({"stage": stage.name, "per_query": per_query, "sets": sets, "seconds": seconds} | rates)
    common.report(rows, given.json)


if __name__ == "__main__":
    main()
