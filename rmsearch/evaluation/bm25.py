"""Rank the corpus with BM25: the lexical baseline, and another first stage for rerank."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from rmsearch.cli import main
from rmsearch.errors import MissingExtraError
from rmsearch.flags import DatasetFlags, note_dataset
from rmsearch.retrieval.first_stage import rankings, self_positions, write_outputs
from rmsearch.stage import Run, option, stage, target

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.datasets.beir import Beir

_ROWS = 256  # queries whose scores are turned into a ranking together


class Bm25Config(DatasetFlags):
    """Flags of bm25."""

    output: str = target("relevance_dict_bm25.json", "Candidates for rerank, in embed's form.")
    output_eval: str = target("relevance_dict_bm25_eval.json", "Run for ndcg: {query: {key: score}}.")
    run_file: str | None = target(None, "The same run in TREC's six columns (.trec, .run or .txt).")
    top_k: int = option(100, "Candidates per query.", ge=1)
    k1: float = option(0.9, "How fast repeated words saturate.", ge=0)
    b: float = option(
        0.4, "How much long keys are held back: 0 not at all, 1 in proportion to their length.", ge=0, le=1
    )
    stemmer: Literal["english", "none"] = option("english", "Snowball stemmer.")
    stopwords: Literal["en", "none"] = option("en", "Words left out.")


NEXT = "rmsearch evaluation ndcg --dataset-path {dataset_path} --split {split} --run bm25={output_eval}"


@stage("evaluation.bm25", next_step=NEXT)
def bm25(config: Bm25Config, run: Run) -> None:
    """Rank the corpus with BM25.

    Lucene's variant, by bm25s, with the English Snowball stemmer and stop words. Keys that share no word with the
    query are left out, and so is a key with the query's own id. Ties are ordered by key id.
    """
    beir = config.load()
    note_dataset(run, beir)
    ranking = rank(beir, config.top_k, config.k1, config.b, config.stemmer, config.stopwords)
    write_outputs(beir, ranking, config.output, config.output_eval, config.run_file, "rmsearch-bm25")
    run.counts |= {"queries": len(ranking), "keys": len(beir.corpus)}


def rank(
    beir: Beir, top_k: int, k1: float = 0.9, b: float = 0.4, stemmer: str = "english", stopwords: str = "en"
) -> dict[str, dict[str, float]]:
    """Query id -> key id -> BM25 score, best first."""
    try:
        import bm25s
    except ImportError:
        raise MissingExtraError("bm25s", "eval") from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    query_ids, key_ids = list(beir.queries), sorted(beir.corpus)
    words = _splitter(stemmer, stopwords)
    found: dict[str, dict[str, float]] = {query: {} for query in query_ids}
    corpus = words(beir.key_text(key) for key in key_ids)
    if not any(corpus):
        return found
    index = bm25s.BM25(method="lucene", k1=k1, b=b)
    index.index(corpus, show_progress=False)
    asked = words(beir.queries.values())
    own = self_positions(query_ids, key_ids)
    for start in range(0, len(query_ids), _ROWS):
        part = slice(start, start + _ROWS)
        best = _best(index, asked[part], own[part], min(top_k, len(key_ids)))
        found |= rankings(query_ids[part], key_ids, *best)
    return found


def _best(index: Any, asked: list[list[str]], own: list[int], k: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions int64[n, k], scores float32[n, k]); -inf marks an empty slot."""
    import numpy as np

    from rmsearch.scoring.topk import TopK

    best = TopK(len(asked), k)
    for row, words in enumerate(asked):
        known = [word for word in words if word in index.vocab_dict]
        if not known:
            continue
        scores = np.asarray(index.get_scores(known), dtype=np.float32)
        if own[row] >= 0:
            scores[own[row]] = 0.0
        matching = np.flatnonzero(scores > 0)
        best.add(np.full(len(matching), row), matching, scores[matching])
    return best.snapshot()


def _splitter(stemmer: str, stopwords: str) -> Any:
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


if __name__ == "__main__":
    main(bm25)
