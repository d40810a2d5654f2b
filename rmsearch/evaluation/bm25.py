"""Rank the corpus with BM25: the lexical baseline, and another first stage for rerank."""

from __future__ import annotations

from typing import Literal

from rmsearch.cli import main
from rmsearch.flags import DatasetFlags, note_dataset
from rmsearch.retrieval.bm25 import rank_bm25
from rmsearch.retrieval.first_stage import write_outputs
from rmsearch.stage import Run, option, stage, target


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
    ranking = rank_bm25(beir, config.top_k, config.k1, config.b, config.stemmer, config.stopwords)
    write_outputs(beir, ranking, config.output, config.output_eval, config.run_file, "rmsearch-bm25")
    run.counts |= {"queries": len(ranking), "keys": len(beir.corpus)}


if __name__ == "__main__":
    main(bm25)
