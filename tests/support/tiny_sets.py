"""A small BEIR folder made of words, with a dev and a test split."""

from __future__ import annotations

import json
import random
from pathlib import Path

TOPICS = ["cat", "dog", "tax", "rain", "bread", "chess", "piano", "moon", "river", "train"]
FILLERS = ["old", "new", "red", "blue", "small", "large", "quick", "slow", "warm", "cold", "far", "near"]


def write_beir(root: Path, *, keys: int = 40, queries: int = 24, seed: int = 0) -> Path:
    """``keys`` keys on ten topics; every query names a topic, its positives are the keys of that topic (grade 2 for
    one of them). Half of the queries are dev, half are test; one key in ten is a copy of the one before, so the topic
    "train" has no keys and its two test queries are judged by nobody."""
    rng = random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    (root / "qrels").mkdir(exist_ok=True)
    texts: list[tuple[str, str]] = []
    for i in range(keys):
        topic = TOPICS[i % len(TOPICS)]
        texts.append(texts[-1] if i % 10 == 9 else (topic, " ".join([topic, *rng.sample(FILLERS, 4)])))
    corpus = [{"_id": f"k{i:03d}", "title": t.title() if i % 2 else "", "text": s} for i, (t, s) in enumerate(texts)]
    asked = [(f"q{i:03d}", TOPICS[i % len(TOPICS)], rng.sample(FILLERS, 3)) for i in range(queries)]
    rows = [{"_id": q, "text": " ".join([topic, *more])} for q, topic, more in asked]
    (root / "corpus.jsonl").write_text("".join(json.dumps(c) + "\n" for c in corpus))
    (root / "queries.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for n, split in enumerate(("dev", "test")):
        lines = ["query-id\tcorpus-id\tscore"]
        for q, topic, _ in asked[n::2]:
            own = [c["_id"] for c, (t, _) in zip(corpus, texts, strict=True) if t == topic]
            lines += [f"{q}\t{key}\t{2 if i == 0 else 1}" for i, key in enumerate(own)]
        (root / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return root
