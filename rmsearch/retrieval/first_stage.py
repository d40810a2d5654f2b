"""What a first stage (embed, bm25) writes: candidates for rerank, a run for ndcg, and TREC's six columns if asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from rmsearch.datasets.beir import Beir
from rmsearch.metrics.measures import Ranking
from rmsearch.retrieval.runs import short, write_run
from rmsearch.storage.records import write_records


def write_outputs(beir: Beir, ranking: Ranking, output: str, output_eval: str, run_file: str | None, tag: str) -> None:
    """Write the ranking (query id -> key id -> score, best first) in each form."""
    rounded = {query: {key: short(score) for key, score in scores.items()} for query, scores in ranking.items()}
    write_run(output_eval, rounded.items(), tag)
    if run_file:
        write_run(run_file, rounded.items(), tag)
    write_records(output, _records(beir, rounded))


def _records(beir: Beir, ranking: Ranking) -> Iterator[dict[str, Any]]:
    for query, scores in ranking.items():
        record: dict[str, Any] = {
            "query_id": query,
            "key_ids": list(scores),
            "embed_relevances": list(scores.values()),
        }
        if positives := beir.relevant(query):  # left out when there are none, as upstream does
            record["positive_key_ids"] = positives
        yield record


def self_positions(query_ids: list[str], key_ids: list[str]) -> list[int]:
    """For each query the position of the key with its own id, or -1: such a key is the query itself (ArguAna)."""
    position = {key: i for i, key in enumerate(key_ids)}
    return [position.get(query, -1) for query in query_ids]


def best_positions(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the ``count`` best finite scores, best first, ties by position."""
    if count < len(scores):
        lowest = np.partition(scores, -count)[-count]
        candidates = np.flatnonzero(scores >= lowest)
    else:
        candidates = np.arange(len(scores))
    candidates = candidates[np.isfinite(scores[candidates])]
    return candidates[np.lexsort((candidates, -scores[candidates]))][:count]


def rankings(query_ids: list[str], key_ids: list[str], keys: Any, scores: Any) -> dict[str, dict[str, float]]:
    """From positions int64[n, k] and scores float32[n, k] (-inf: empty slot) to ids."""
    return {
        query: {key_ids[k]: s for k, s in zip(row, of_row, strict=True) if s != float("-inf")}
        for query, row, of_row in zip(query_ids, keys.tolist(), scores.tolist(), strict=True)
    }
