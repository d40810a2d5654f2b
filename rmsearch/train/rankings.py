"""First-stage rankings to take negatives from: run files, BM25 or an embedding model over the data set at hand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rmsearch.datasets.beir import Beir
from rmsearch.errors import ConfigError

if TYPE_CHECKING:
    from rmsearch.stage import Run

BLOCK = 512


@dataclass
class Ranking:
    """query id -> {key id: score}, best first. ``positive``: scores of (query id, key id) below the cut, if known."""

    name: str
    scores: Mapping[str, Mapping[str, float]] = field(repr=False)
    positive: Mapping[tuple[str, str], float] = field(repr=False, default_factory=dict)

    def of(self, query: str, key: str) -> float:
        """The score of a pair; a key below the cut gets the lowest score of the query's ranking."""
        found = self.scores.get(query, {})
        if key in found:
            return found[key]
        if (query, key) in self.positive:
            return self.positive[query, key]
        return min(found.values(), default=0.0)


def read_rankings(uris: Sequence[str], beir: Beir) -> list[Ranking]:
    """Run files over the data set. ConfigError when one holds other keys or none of the queries."""
    from rmsearch.evaluation.runs import read_run

    found = []
    for uri in uris:
        run = read_run(uri)
        known = {query: keys for query, keys in run.items() if query in beir.queries}
        if not known:
            problem = f"holds none of the {len(beir.queries)} queries of the split {beir.split!r}"
            raise ConfigError(
                problem, where=uri, remedy=f"Make it with: rmsearch evaluation embed --split {beir.split}"
            )
        for query, keys in known.items():
            if strange := next((key for key in keys if key not in beir.corpus), None):
                problem = f"query {query!r} has the key id {strange!r}, which the corpus lacks"
                raise ConfigError(problem, where=uri, remedy="Give the run of this data set")
        found.append(Ranking(uri, known))
    return found


def bm25_ranking(beir: Beir, top_k: int) -> Ranking:
    """BM25 over the data set, scores divided by the query's best one (so in 0 to 1)."""
    from rmsearch.evaluation.bm25 import rank

    scores = rank(beir, top_k)
    return Ranking("bm25", {q: {k: s / max(keys.values()) for k, s in keys.items()} for q, keys in scores.items()})


@dataclass
class Embedded:
    """An embedding model's rankings (by key texts; by the keys' other queries), and each query's most similar ones."""

    rankings: list[Ranking]
    similar: Mapping[str, Sequence[str]] = field(repr=False, default_factory=dict)


def embed_ranking(
    beir: Beir,
    model: str,
    top_k: int,
    positives: Sequence[tuple[str, str, str]],
    similar: int,
    centroids: bool,
    run: Run,
) -> Embedded:
    """Exact top-k by an embedding model.

    positives: (query id, key id, text) whose scores are wanted even below the cut; the text is embedded as given.
    similar: how many of the most similar other queries to find per query (0: none). centroids: also rank by
    `centroid_ranking`.
    """
    return asyncio.run(_embed(beir, model, top_k, positives, similar, centroids, run))


async def _embed(
    beir: Beir,
    model: str,
    top_k: int,
    positives: Sequence[tuple[str, str, str]],
    similar: int,
    centroids: bool,
    run: Run,
) -> Embedded:
    from rmsearch.engines import load_embedder
    from rmsearch.evaluation.first_stage import rankings, self_positions

    query_ids, key_ids = list(beir.queries), sorted(beir.corpus)
    texts = [beir.key_text(key) for key in key_ids]
    changed = list(dict.fromkeys(text for _, key, text in positives if text != beir.key_text(key)))
    embedder = load_embedder(model)
    try:
        with run.progress(len(query_ids) + len(texts) + len(changed), "texts") as bar:

            async def vectors(part: list[str], kind: str) -> np.ndarray:
                blocks = []
                for start in range(0, len(part), BLOCK):
                    blocks.append(await embedder.embed(part[start : start + BLOCK], kind))  # type: ignore[arg-type]
                    bar.advance(len(blocks[-1]))
                return np.concatenate(blocks)

            queries, keys = await vectors(list(beir.queries.values()), "query"), await vectors(texts, "key")
            extra = await vectors(changed, "key") if changed else keys[:0]
    finally:
        await embedder.close()
    best = top_positions(queries, keys, min(top_k, len(key_ids)), self_positions(query_ids, key_ids))
    at_query, at_key = _places(query_ids), _places(key_ids)
    at_text = _places(changed)
    pairs = {}
    for query, key, text in positives:
        vector = extra[at_text[text]] if text in at_text else keys[at_key[key]]
        pairs[query, key] = float(queries[at_query[query]] @ vector)
    found = [Ranking(model, rankings(query_ids, key_ids, *best), pairs)]
    if centroids:
        found.append(centroid_ranking(beir, query_ids, queries, top_k))
    if not similar or len(query_ids) < 2:
        return Embedded(found)
    near, _ = top_positions(queries, queries, min(similar, len(query_ids) - 1), list(range(len(query_ids))))
    return Embedded(found, {q: [query_ids[i] for i in row] for q, row in zip(query_ids, near, strict=True)})


def centroid_ranking(beir: Beir, query_ids: Sequence[str], queries: np.ndarray, top_k: int) -> Ranking:
    """Ranks the labelled keys by the cosine of a query with the mean of each key's *other* queries.

    queries: unit vectors float32[len(query_ids), dim]. Leaving the query itself out is what makes this a fair teacher:
    with it, its own key would always win. A key without another query scores 0.
    """
    from rmsearch.evaluation.first_stage import rankings

    key_ids = sorted({key for query in query_ids for key in beir.positives(query)})
    at_key = _places(key_ids)
    total = np.zeros((len(key_ids), queries.shape[1]), np.float32)
    for query, vector in zip(query_ids, queries, strict=True):
        for key in beir.positives(query):
            total[at_key[key]] += vector
    k = min(top_k, len(key_ids))
    best, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    own = {}
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        similarities = queries[block] @ _units(total).T
        for row, query in enumerate(query_ids[block]):
            vector = queries[start + row]
            for key in beir.positives(query):
                value = float(_units(total[at_key[key]] - vector) @ vector)
                similarities[row, at_key[key]] = own[query, key] = value
        best[block] = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        scores[block] = np.take_along_axis(similarities, best[block], axis=1)
    return Ranking("centroids", rankings(list(query_ids), key_ids, best, scores), own)


def _units(vectors: np.ndarray) -> np.ndarray:
    """Rows at length 1; rows of (nearly) nothing stay as they are."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def _places(names: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


def top_positions(queries: np.ndarray, keys: np.ndarray, k: int, own: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(positions int64[n, k], inner products float32[n, k]) of the best keys; ``own`` is a position to leave out."""
    from rmsearch.evaluation.vectors import ExactSearch

    search = ExactSearch(queries, k, own, "cpu")
    for start in range(0, len(keys), 4096):
        search.add(start, keys[start : start + 4096])
    return search.result()
