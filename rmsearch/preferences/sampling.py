"""Sampling of keys beside a query's own: from retrieved ranks and at random, without positives and copies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pydantic import model_validator

from rmsearch.datasets.corpus import CorpusIndex, Row, indexed, read_corpus
from rmsearch.errors import ConfigError
from rmsearch.flags import DatasetFlags, count_missing_keys
from rmsearch.preferences.queries import Found, Wanted, wanted
from rmsearch.stage import Run, option, source

T = TypeVar("T")
TRIES = 50


class SampleFlags(DatasetFlags):
    """Flags of both sampling stages."""

    source_csv: str | None = source(
        None, "Corpus: .csv, .jsonl, .json, .parquet or a folder of text files; by default the data set's."
    )
    source_column: str = option("text", "Its column of texts.")
    id_column: str | None = option(None, "Its column of ids; by default index, _id, id …, else the row's position.")
    relevance_json: str | None = source(
        None, "What retrieval found: relevance records, or a first stage's --output. Without it negatives are random."
    )
    filtered_queries_json: str | None = source(None, "Query records; only these queries are taken.")
    split: str = option("train", "Split of the data set whose qrels name the positives.")
    random_seed: int = option(42, "Of all choices.", ge=0)
    rank_min: int = option(1, "First retrieved rank that negatives come from, counted from 1.", ge=1)
    rank_max: int | None = option(None, "Last one; by default all that were retrieved.", ge=1)
    random_share: float = option(0.0, "Share of negatives drawn at random from the whole corpus.", ge=0, le=1)
    max_relative_score: float = option(
        0.0,
        "Skip keys that retrieval scores above this share of the positive's score, as likely positives that nobody "
        "labelled (NV-Retriever: 0.95). For similarities above 0. 0: keep them.",
        ge=0,
    )
    min_score_margin: float | None = option(
        None, "Skip keys that score less than this below the positive. For rewards, which may be negative."
    )

    @model_validator(mode="after")
    def _complete(self) -> SampleFlags:
        if self.rank_max is not None and self.rank_max < self.rank_min:
            raise ValueError("--rank-max is below --rank-min")
        if not (self.source_csv or self.dataset_path or self.corpus):
            raise ValueError("--source-csv is needed (or --dataset-path)")
        if not (self.relevance_json or self.filtered_queries_json or self.dataset_path or self.queries):
            raise ValueError("there are no queries: give --relevance-json, --filtered-queries-json or --dataset-path")
        return self


@contextmanager
def sampled(config: SampleFlags, run: Run) -> Iterator[tuple[Sampler, Iterator[Wanted]]]:
    """A sampler over the corpus, which lies in a temporary file meanwhile, and the queries to sample for."""
    from rmsearch.datasets.beir import in_corpus, read_qrels

    whole = config.dataset_path or (config.queries and config.corpus)
    beir = config.load() if whole else None
    if beir:
        count_missing_keys(run, beir)
    grades = beir.reachable if beir else read_qrels(config.qrels) if config.qrels else None
    if config.source_csv:
        rows: Iterable[Row] = read_corpus(config.source_csv, config.source_column, config.id_column)
    else:
        assert beir is not None
        rows = (Row(key, document.key, {}) for key, document in beir.corpus.items())
    counts: Counter[str] = Counter()
    with indexed(rows) as corpus, run.progress(None, "queries") as bar:
        if grades is not None:
            known, where = lambda key: corpus.position(key) is not None, config.qrels or config.dataset_path
            grades = in_corpus(grades, known, config.max_missing_share, where)

        def queries() -> Iterator[Wanted]:
            for each in wanted(config, beir, grades, counts):
                bar.advance(1)
                counts["queries"] += 1
                yield each

        yield Sampler(config, corpus, counts), queries()
    run.counts |= {"corpus": len(corpus), **dict(sorted(counts.items()))}


def or_refuse(config: SampleFlags, sets: Iterator[T]) -> Iterator[T]:
    """The sets; ConfigError when there is none."""
    empty = True
    for each in sets:
        empty = False
        yield each
    if empty:
        problem = "no query has another key to sample beside its own"
        raise ConfigError(problem, where=config.source_csv or config.dataset_path, remedy="Use a larger corpus")


class Sampler:
    """Draws negatives. What is drawn for a query depends on the seed, the query and its own rows only."""

    def __init__(self, config: SampleFlags, corpus: CorpusIndex, counts: Counter[str]) -> None:
        self._config, self._corpus, self.counts = config, corpus, counts

    def text(self, key: str, text: str | None = None) -> str:
        """The text of a corpus row. ConfigError when there is no such row, or it has another text than ``text``."""
        kept = self._corpus.text(key)
        if kept is None or (text is not None and text.strip() != kept.strip()):
            problem = f"has no row with the id {key!r}" if kept is None else f"the row {key!r} has another text"
            config = self._config
            named = config.relevance_json if text is not None else config.filtered_queries_json or config.qrels
            remedy = f"Give the corpus that {named or 'the ids'} was made from, or its --source-column"
            raise ConfigError(problem, where=config.source_csv or config.dataset_path, remedy=remedy)
        return kept

    def negatives(self, each: Wanted, anchors: Iterable[str], count: int) -> list[tuple[str, str]]:
        """Up to ``count`` (id, text) of other keys: none of the positives, none with the text of one of them, of an
        anchor or of each other (case and white space apart)."""
        config, anchors = self._config, tuple(anchors)
        seed = f"{config.random_seed}\n{each.query_id}\n{each.query}\n{anchors[0]}"
        chance = random.Random(seed.encode("utf-8", "surrogatepass"))
        taken = {*each.positives, *anchors}
        texts = {_folded(self.text(key)) for key in taken}
        ranks = self._window(each, anchors)
        chance.shuffle(ranks)
        drawn: list[tuple[str, str]] = []
        while len(drawn) < count:
            found = None
            if ranks and chance.random() >= config.random_share:
                found = self._from_ranks(ranks, taken, texts)
            found = found or self._at_random(chance, taken, texts) or self._from_ranks(ranks, taken, texts)
            if found is None:
                self.counts["too_few_negatives"] += 1
                break
            taken.add(found[0])
            texts.add(_folded(found[1]))
            drawn.append(found)
        return drawn

    def _window(self, each: Wanted, anchors: tuple[str, ...]) -> list[Found]:
        """The wanted ranks without keys that score so close to the positive that they are likely positives, too."""
        config = self._config
        window = [key for key in each.found[config.rank_min - 1 : config.rank_max] if key.id not in each.positives]
        limit = self._limit(each, anchors)
        kept = [key for key in window if limit is None or key.score is None or key.score <= limit]
        self.counts["false_negatives_skipped"] += len(window) - len(kept)
        return kept

    def _limit(self, each: Wanted, anchors: tuple[str, ...]) -> float | None:
        """The highest score that a negative may have. A positive that was not retrieved scores no more than the last
        key that was."""
        config = self._config
        if not each.positives or not (config.max_relative_score or config.min_score_margin is not None):
            return None
        scores = [key.score for key in each.found if key.score is not None]
        own = [key.score for key in each.found if key.id in anchors and key.score is not None]
        if not scores:
            return None
        positive = min(own) if own else min(scores)
        self.counts["positives_not_retrieved"] += not own
        limits = [positive * config.max_relative_score] if config.max_relative_score and positive > 0 else []
        if config.min_score_margin is not None:
            limits.append(positive - config.min_score_margin)
        return min(limits, default=None)

    def _from_ranks(self, ranks: list[Found], taken: set[str], texts: set[str]) -> tuple[str, str] | None:
        while ranks:
            key = ranks.pop()
            if key.id not in taken and _folded(text := self.text(key.id, key.text)) not in texts:
                self.counts["from_ranks"] += 1
                return key.id, text
        return None

    def _at_random(self, chance: random.Random, taken: set[str], texts: set[str]) -> tuple[str, str] | None:
        few = len(self._corpus) <= TRIES
        order = range(len(self._corpus))
        for position in chance.sample(order, len(order)) if few else chance.choices(order, k=TRIES):
            key, text = self._corpus[position]
            if key not in taken and _folded(text) not in texts:
                self.counts["from_random"] += 1
                return key, text
        return None


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
