"""First stages as mining needs them: scores of every key for a block of queries, from run files, vectors or BM25."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rmsearch.datasets.beir import Beir
from rmsearch.errors import ConfigError
from rmsearch.retrieval.bm25 import splitter
from rmsearch.retrieval.first_stage import best_positions
from rmsearch.retrieval.runs import read_run
from rmsearch.retrieval.vectors import TextsToEmbed, embed_texts
from rmsearch.stage import Run

BLOCK = 512
QUERIES, KEYS = 256, 128  # texts per block: evaluation.embed's defaults, so that a cache serves both
K1, B = 0.9, 0.4  # of evaluation.bm25


class Ranker(Protocol):
    """A first stage over keys whose positions are those of their sorted ids."""

    name: str

    def block(self, queries: Sequence[str]) -> np.ndarray:
        """Scores float32[len(queries), keys] of query ids; -inf where the stage gave none."""

    def of_text(self, query: str, text: str) -> float | None:
        """The score of a text that is not a key as it stands (a key without one sentence); None if not known."""


@dataclass
class RunRanker:
    """A run file: query id -> {key id: score}."""

    name: str
    run: Mapping[str, Mapping[str, float]] = field(repr=False)
    place: Mapping[str, int] = field(repr=False)

    def block(self, queries: Sequence[str]) -> np.ndarray:
        scores = np.full((len(queries), len(self.place)), -np.inf, np.float32)
        for row, query in enumerate(queries):
            for key, score in self.run.get(query, {}).items():
                scores[row, self.place[key]] = score
        return scores

    def of_text(self, query: str, text: str) -> float | None:
        return None


def read_rankings(uris: Sequence[str], beir: Beir) -> list[Ranker]:
    """Run files over the data set. ConfigError when one holds other keys or none of the queries."""
    place = places(sorted(beir.corpus))
    found: list[Ranker] = []
    for uri in uris:
        run = read_run(uri)
        known = {query: keys for query, keys in run.items() if query in beir.queries}
        if not known:
            problem = f"holds none of the {len(beir.queries)} queries of the split {beir.split!r}"
            raise ConfigError(
                problem, where=uri, remedy=f"Make it with: rmsearch evaluation embed --split {beir.split}"
            )
        for query, keys in known.items():
            if strange := next((key for key in keys if key not in place), None):
                problem = f"query {query!r} has the key id {strange!r}, which the corpus lacks"
                raise ConfigError(problem, where=uri, remedy="Give the run of this data set")
        found.append(RunRanker(uri, known, place))
    return found


class Bm25Ranker:
    """Lucene's BM25 with evaluation.bm25's words and constants, divided by the sum of the query's weights, which is
    what a key would reach that repeats every query word without end: so in [0, 1]."""

    name = "bm25"

    def __init__(self, beir: Beir) -> None:
        self._split = splitter("english", "en")
        keys = self._split(beir.key_text(key) for key in sorted(beir.corpus))
        asked = self._split(beir.queries.values())
        self._asked = dict(zip(beir.queries, asked, strict=True))
        self._mean = max(float(np.mean([len(words) for words in keys])), 1e-9)
        rows: dict[str, list[tuple[int, float]]] = {}
        for position, words in enumerate(keys):
            for word, weight in self._saturated(words).items():
                rows.setdefault(word, []).append((position, weight))
        self._idf = {w: float(np.log1p((len(keys) - len(r) + 0.5) / (len(r) + 0.5))) for w, r in rows.items()}
        self._postings = {
            word: (np.fromiter((p for p, _ in r), np.int64, len(r)), np.fromiter((s for _, s in r), np.float32, len(r)))
            for word, r in rows.items()
        }
        self._count = len(keys)

    def _saturated(self, words: Sequence[str]) -> dict[str, float]:
        norm = K1 * (1 - B + B * len(words) / self._mean)
        return {word: count / (count + norm) for word, count in Counter(words).items()}

    def block(self, queries: Sequence[str]) -> np.ndarray:
        scores = np.zeros((len(queries), self._count), np.float32)
        for row, query in enumerate(queries):
            for word in self._asked[query]:
                if word in self._postings:
                    at, weights = self._postings[word]
                    scores[row, at] += self._idf[word] * weights
            scores[row] /= self._most(query)
        scores[scores == 0] = -np.inf  # no word in common: not retrieved
        return scores

    def of_text(self, query: str, text: str) -> float | None:
        weights = self._saturated(self._split([text])[0])
        return sum(self._idf.get(w, 0.0) * weights.get(w, 0.0) for w in self._asked[query]) / self._most(query)

    def _most(self, query: str) -> float:
        return max(sum(self._idf.get(word, 0.0) for word in self._asked[query]), 1e-9)


class VectorRanker:
    """Cosine of an embedding model."""

    def __init__(self, name: str, beir: Beir, vectors: Vectors) -> None:
        self.name, self._vectors = name, vectors
        self._query, self._text = places(list(beir.queries)), places(vectors.more_texts)

    def block(self, queries: Sequence[str]) -> np.ndarray:
        return self._vectors.queries[[self._query[query] for query in queries]] @ self._vectors.keys.T

    def of_text(self, query: str, text: str) -> float | None:
        if text not in self._text:
            return None
        return float(self._vectors.queries[self._query[query]] @ self._vectors.more[self._text[text]])


class CentroidRanker:
    """Cosine of a query with the mean of each key's *other* labelled queries: what a key was asked for.

    Leaving the query itself out is what makes this a fair teacher: with it, its own key would always win. A key without
    another query scores 0, and counts as not ranked when it has no query at all. queries: unit vectors float32[n, d].
    """

    name = "centroids"

    def __init__(self, beir: Beir, queries: np.ndarray) -> None:
        place = places(sorted(beir.corpus))
        self._queries, self._query = queries, places(list(beir.queries))
        self._own = {query: [place[key] for key in beir.positives(query)] for query in beir.queries}
        self._sums = np.zeros((len(place), queries.shape[1]), np.float32)
        for query, at in self._query.items():
            self._sums[self._own[query]] += queries[at]
        self._unit = _unit(self._sums)
        self._unasked = np.setdiff1d(np.arange(len(place)), np.concatenate([*self._own.values(), []]).astype(np.int64))

    def block(self, queries: Sequence[str]) -> np.ndarray:
        mine = self._queries[[self._query[query] for query in queries]]
        scores = mine @ self._unit.T
        for row, query in enumerate(queries):
            own = self._own[query]
            scores[row, own] = _unit(self._sums[own] - mine[row]) @ mine[row]
        scores[:, self._unasked] = -np.inf
        return scores

    def of_text(self, query: str, text: str) -> float | None:
        return None


def similar_queries(names: Sequence[str], vectors: np.ndarray, count: int) -> dict[str, list[str]]:
    """For each query the ``count`` others most like it, best first. vectors: unit float32[len(names), d]."""
    found = {}
    count = min(count, len(names) - 1)
    for start in range(0, len(names), BLOCK) if count > 0 else ():
        part = vectors[start : start + BLOCK] @ vectors.T
        part[np.arange(len(part)), np.arange(start, start + len(part))] = -np.inf
        for row, scores in enumerate(part):
            found[names[start + row]] = [names[i] for i in best_positions(scores, count)]
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of (almost) nothing become 0."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-4, vectors / np.maximum(length, 1e-9), 0).astype(np.float32)


def places(names: Sequence[str]) -> dict[str, int]:
    """name -> position."""
    return {name: i for i, name in enumerate(names)}


@dataclass(frozen=True)
class Vectors:
    """Unit vectors, float32[n, d]: of the queries, of the keys by sorted id, and of more texts."""

    queries: np.ndarray = field(repr=False)
    keys: np.ndarray = field(repr=False)
    more: np.ndarray = field(repr=False)
    more_texts: list[str] = field(repr=False)


def embed_all(beir: Beir, model: str, more_texts: list[str], run: Run, cache_dir: str | None = None) -> Vectors:
    """Embed the data set's queries and keys, and more texts as keys; what the cache has is taken from there."""
    keys = [beir.key_text(key) for key in sorted(beir.corpus)]
    queries = TextsToEmbed(list(beir.queries.values()), "query", QUERIES, cache_dir)
    parts = [queries, *(TextsToEmbed(texts, "key", KEYS, cache_dir) for texts in (keys, more_texts))]
    asked, own, more = embed_texts(run, {"model_name": model}, parts)
    return Vectors(asked, own, more, more_texts)
