"""Sampling of keys beside a query's own: from retrieved ranks and at random, without positives and copies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from rmsearch.datasets.beir import in_corpus, read_qrels
from rmsearch.datasets.chain import ChainRecord, RetrievedKey
from rmsearch.datasets.corpus import CorpusIndex, Row, indexed, nonempty, read_corpus
from rmsearch.errors import ConfigError
from rmsearch.flags import count_missing_keys
from rmsearch.preferences.negatives import TRIES, Negatives, score_limit
from rmsearch.preferences.queries import LabelledQuery, SampleFlags, labelled_queries
from rmsearch.stage import Run
from rmsearch.storage.records import write_records


def write_samples(
    config: SampleFlags,
    run: Run,
    output: str,
    sets_of: Callable[[Sampler, Iterable[LabelledQuery]], Iterable[ChainRecord]],
) -> None:
    """Write what ``sets_of(sampler, queries)`` gives; the corpus lies in a temporary file meanwhile. Raises ConfigError
    when there is no set."""
    whole = config.dataset_path or (config.queries and config.corpus)
    beir = config.load() if whole else None
    if beir:
        count_missing_keys(run, beir)
    grades = beir.reachable if beir else read_qrels(config.qrels) if config.qrels else None
    where = config.source_csv or config.dataset_path
    if config.source_csv:
        rows: Iterable[Row] = read_corpus(config.source_csv, config.source_column, config.id_column)
    else:
        assert beir is not None
        rows = (Row(key, document.key, {}) for key, document in beir.corpus.items())
    counts: Counter[str] = Counter()
    with indexed(rows) as corpus, run.progress(None, "queries") as bar:
        if grades is not None:
            known, judged = lambda key: corpus.position(key) is not None, config.qrels or config.dataset_path
            grades = in_corpus(grades, known, config.max_missing_share, judged)

        def queries() -> Iterator[LabelledQuery]:
            for each in labelled_queries(config, beir, grades, counts):
                bar.advance(1)
                counts["queries"] += 1
                yield each

        problem = "no query has another key to sample beside its own"
        none = ConfigError(problem, where=where, remedy="Use a larger corpus")
        sets = nonempty(sets_of(Sampler(config, corpus, counts), queries()), none)
        run.counts["sets"] = write_records(output, sets)
    run.counts |= {"corpus": len(corpus), **dict(sorted(counts.items()))}


class Sampler:
    """Draws negatives. What is drawn for a query depends on the seed, the query and its own rows only."""

    def __init__(self, config: SampleFlags, corpus: CorpusIndex, counts: Counter[str]) -> None:
        self._config, self._corpus, self.counts = config, corpus, counts

    def text(self, key: str, text: str = "") -> str:
        """The text of a corpus row. ConfigError when there is no such row, or it has another text than ``text``."""
        kept = self._corpus.text(key)
        if kept is None or (text and text.strip() != kept.strip()):
            problem = f"has no row with the id {key!r}" if kept is None else f"the row {key!r} has another text"
            config = self._config
            named = config.relevance_json if text else config.filtered_queries_json or config.qrels
            remedy = f"Give the corpus that {named or 'the ids'} was made from, or its --source-column"
            raise ConfigError(problem, where=config.source_csv or config.dataset_path, remedy=remedy)
        return kept

    def negatives(self, query: LabelledQuery, own_keys: Sequence[str], count: int) -> list[tuple[str, str]]:
        """Up to ``count`` (id, text) of other keys: none of the positives, none with the text of one of them, of an own
        key or of each other (case and white space apart)."""
        config = self._config
        seed = f"{config.random_seed}\n{query.query_id}\n{query.query}\n{own_keys[0]}"
        chance = random.Random(seed.encode("utf-8", "surrogatepass"))
        negatives = Negatives(query.positives, self.text, self.counts)
        for key in own_keys:
            if key not in query.positives.keys:
                negatives.exclude(key, self.text(key))
        ranks = self._window(query, own_keys)
        chance.shuffle(ranks)
        drawn: list[tuple[str, str]] = []
        while len(drawn) < count:
            from_ranks = ranks and chance.random() >= config.random_share
            sources = [("random", self._random_rows(chance)), ("ranks", self._ranked(ranks))]
            found = negatives.draw(*([("ranks", self._ranked(ranks))] if from_ranks else []), *sources)
            if found is None:
                self.counts["too_few_negatives"] += 1
                break
            drawn.append(found)
        return drawn

    def _window(self, query: LabelledQuery, own_keys: Sequence[str]) -> list[RetrievedKey]:
        """The ranks to draw from, without keys that score so close to the positive that they are likely positives."""
        config = self._config
        window = query.retrieved[config.rank_min - 1 : config.rank_max]
        window = [key for key in window if key.key_id not in query.positives.keys]
        limit = self._limit(query, own_keys)
        kept = [key for key in window if limit is None or key.score is None or key.score <= limit]
        self.counts["false_negatives_skipped"] += len(window) - len(kept)
        return kept

    def _limit(self, query: LabelledQuery, own_keys: Sequence[str]) -> float | None:
        """The highest score that a negative may have. A positive that was not retrieved scores no more than the last
        key that was."""
        config, own = self._config, set(own_keys)
        if not query.positives.keys or not (config.max_relative_score or config.min_score_margin is not None):
            return None
        scores = [key.score for key in query.retrieved if key.score is not None]
        own_scores = [key.score for key in query.retrieved if key.key_id in own and key.score is not None]
        if not scores:
            return None
        self.counts["positives_not_retrieved"] += not own_scores
        return score_limit(min(own_scores or scores), config.max_relative_score, config.min_score_margin)

    def _ranked(self, ranks: list[RetrievedKey]) -> Iterator[tuple[str, str]]:
        while ranks:
            key = ranks.pop()
            yield key.key_id, self.text(key.key_id, key.key)

    def _random_rows(self, chance: random.Random) -> Iterator[tuple[str, str]]:
        rows = range(len(self._corpus))
        chosen = chance.sample(rows, len(rows)) if len(rows) <= TRIES else chance.choices(rows, k=TRIES)
        yield from map(self._corpus.__getitem__, chosen)
