"""Small preference sets: the better key names the query's word. Test queries do not occur in training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TOPICS = ["protein", "gene", "cancer", "market", "price", "weather", "train", "plane", "recipe", "salt"]
GOOD, BAD = ["relevant", "good", "serves"], ["error", "water", "bad"]


def pairs(count: int, *, seed: int = 0, **extra: Any) -> list[dict[str, Any]]:
    """Raw records; the chosen key has a word of GOOD, the rejected one a word of BAD."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        topic, other = rng.sample(TOPICS, 2)
        query = f"{topic} {rng.choice(['query', 'which', 'how'])} {seed} {i}"
        keys = {"chosen_key": f"{topic} {rng.choice(GOOD)}", "rejected_key": f"{other} {rng.choice(BAD)}"}
        rows.append({"query": query, **keys, **extra})
    return rows


def upstream_form(row: dict[str, Any]) -> dict[str, Any]:
    """The record as upstream's judge writes it: rendered user messages."""

    def message(key: str) -> list[dict[str, str]]:
        text = f"Give me relevant score between query and sentence;\n\nQuery:{row['query']}\n\nSentence:```{key}```"
        return [{"role": "user", "content": text}]

    ids = {"chosen_sentence_id": 1, "rejected_sentence_id": 2, "query_id": 0}
    return {"chosen_msg": message(row["chosen_key"]), "rejected_msg": message(row["rejected_key"]), **ids}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows as a JSON array; returns the path as text."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)
