"""BM25 over a data set's keys, by bm25s."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np

from rmsearch.datasets.beir import Beir
from rmsearch.errors import MissingExtraError
from rmsearch.retrieval.first_stage import best_positions, self_positions


def rank_bm25(
    beir: Beir, top_k: int, k1: float = 0.9, b: float = 0.4, stemmer: str = "english", stopwords: str = "en"
) -> dict[str, dict[str, float]]:
    """Query id -> key id -> BM25 score, best first."""
    try:
        import bm25s
    except ImportError:
        raise MissingExtraError("bm25s", "eval") from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    query_ids, key_ids = list(beir.queries), sorted(beir.corpus)
    words = splitter(stemmer, stopwords)
    ranking: dict[str, dict[str, float]] = {query: {} for query in query_ids}
    corpus = words(beir.key_text(key) for key in key_ids)
    if not any(corpus):
        return ranking
    index = bm25s.BM25(method="lucene", k1=k1, b=b)
    index.index(corpus, show_progress=False)
    own = self_positions(query_ids, key_ids)
    for row, (query, query_words) in enumerate(zip(query_ids, words(beir.queries.values()), strict=True)):
        if known := [word for word in query_words if word in index.vocab_dict]:
            scores = np.asarray(index.get_scores(known), dtype=np.float32)
            if own[row] >= 0:
                scores[own[row]] = 0.0
            scores[scores <= 0] = -np.inf  # no word in common: not retrieved
            ranking[query] = {key_ids[at]: float(scores[at]) for at in best_positions(scores, top_k)}
    return ranking


def splitter(stemmer: str, stopwords: str) -> Callable[[Iterable[str]], list[list[str]]]:
    """A function from texts to lists of stemmed words."""
    import bm25s

    stem = None
    if stemmer != "none":
        try:
            import Stemmer
        except ImportError:
            raise MissingExtraError("PyStemmer", "eval") from None
        stem = Stemmer.Stemmer(stemmer)

    def split(texts: Iterable[str]) -> list[list[str]]:
        chosen = None if stopwords == "none" else stopwords
        return bm25s.tokenize(list(texts), stopwords=chosen, stemmer=stem, return_ids=False, show_progress=False)

    return split
