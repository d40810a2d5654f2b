"""Mining: negatives for labelled pairs from a rank window, from similar queries' positives, and at random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rmsearch.datasets.beir import Beir
from rmsearch.preferences.negatives import Negatives, Positives, at_random, score_limit, shuffled
from rmsearch.preferences.positives import PositivePair
from rmsearch.retrieval.first_stage import best_positions
from rmsearch.retrieval.rankers import Ranker, places

BLOCK_SCORES = 1 << 24  # scores held at a time: 64 MiB per ranker


@dataclass(frozen=True)
class Rules:
    """How negatives are drawn. Ranks count from 1; shares are probabilities per negative, the rest is from ranks;
    max_relative_score is that of `score_limit`."""

    per_positive: int
    rank_min: int
    rank_max: int
    random_share: float
    similar_share: float
    max_relative_score: float
    margin_scale: float
    margin_max: float
    weights: Sequence[float]


@dataclass
class _Scored:
    """A pair with what the rankers say: scores of all keys and of the positive, and the pools to draw from."""

    pair: PositivePair
    scores: list[np.ndarray]
    positive: list[float]
    pools: list[np.ndarray]
    similar: list[int]


@dataclass
class Miner:
    """Draws negatives for pairs of one data set."""

    beir: Beir
    rankers: Sequence[Ranker]
    similar: Mapping[str, Sequence[str]]
    rules: Rules
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._keys = sorted(self.beir.corpus)
        self._place = places(self._keys)
        self._positions = {
            query: {self._place[key] for key in (*self.beir.positives(query), query) if key in self._place}
            for query in self.beir.queries
        }
        self._positives: dict[tuple[str, bool], Positives[int]] = {}

    def mine(
        self, pairs: Sequence[PositivePair], rng: np.random.Generator
    ) -> Iterator[tuple[PositivePair, str, float | None]]:
        """(pair, key id, margin) for each negative, pair by pair."""
        size = max(1, BLOCK_SCORES // max(len(self._keys), 1))
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            blocks = [ranker.block([pair.query_id for pair in part]) for ranker in self.rankers]
            for row, pair in enumerate(part):
                scored = self._scored(pair, [block[row] for block in blocks])
                for position in self._negatives(scored, rng):
                    yield pair, self._keys[position], self._margin(scored, position)

    def _scored(self, pair: PositivePair, rows: list[np.ndarray]) -> _Scored:
        own, changed = self._place[pair.key_id], pair.text != self.beir.key_text(pair.key_id)
        positive, pools, scores = [], [], []
        for ranker, row in zip(self.rankers, rows, strict=True):
            finite = row[np.isfinite(row)]
            filled = np.where(np.isfinite(row), row, finite.min() if len(finite) else 0.0)
            known = ranker.of_text(pair.query_id, pair.text) if changed else None
            positive.append(float(filled[own]) if known is None else known)
            window = best_positions(row, self.rules.rank_max)[self.rules.rank_min - 1 :]
            pools.append(self._kept(window, row, positive[-1]))
            scores.append(filled)
        near = [p for query in self.similar.get(pair.query_id, ()) for p in self._positions[query]]
        return _Scored(pair, scores, positive, pools, near)

    def _kept(self, window: np.ndarray, scores: np.ndarray, positive: float) -> np.ndarray:
        """The window without keys that score so close to the positive that they are likely positives, too."""
        limit = score_limit(positive, self.rules.max_relative_score)
        if limit is None:
            return window
        kept = window[scores[window] <= limit]
        self.counts["false_negatives_skipped"] += len(window) - len(kept)
        return kept

    def _negatives(self, scored: _Scored, rng: np.random.Generator) -> Iterator[int]:
        pair = scored.pair
        name = (pair.query_id, pair.bare)
        if name not in self._positives:
            self._positives[name] = Positives(self._positions[pair.query_id])
        negatives = Negatives(self._positives[name], partial(self._text, bare=pair.bare), self.counts)
        negatives.exclude(self._place[pair.key_id], pair.text)
        for _ in range(self.rules.per_positive):
            found = negatives.draw(*self._sources(scored, rng))
            if found is None:
                self.counts["too_few_negatives"] += 1
                return
            yield found[0]

    def _text(self, position: int, bare: bool) -> str:
        document = self.beir.corpus[self._keys[position]]
        return document.text.strip() if bare else document.key

    def _sources(self, scored: _Scored, rng: np.random.Generator) -> list[tuple[str, Iterator[tuple[int, None]]]]:
        """The source that the dice choose, and those to turn to when it has no usable key."""
        dice = rng.random()
        sources = [("random", at_random(range(len(self._keys)), rng))]
        if dice >= self.rules.random_share:
            sources.insert(0, ("ranks", self._ranks(scored, rng)))
            if dice < self.rules.random_share + self.rules.similar_share:
                sources.insert(0, ("similar", shuffled(scored.similar, rng)))
        return sources

    def _ranks(self, scored: _Scored, rng: np.random.Generator) -> Iterator[tuple[int, None]]:
        """The window of one of the rankers."""
        if scored.pools:
            yield from shuffled(scored.pools[int(rng.integers(len(scored.pools)))].tolist(), rng)

    def _margin(self, scored: _Scored, position: int) -> float | None:
        """The rankers' weighted difference between positive and negative, scaled, within [0, margin_max]."""
        if not self.rules.margin_scale:
            return None
        parts = zip(self.rules.weights, scored.positive, scored.scores, strict=True)
        difference = sum(weight * (positive - float(scores[position])) for weight, positive, scores in parts)
        return round(min(max(0.0, self.rules.margin_scale * difference), self.rules.margin_max), 6)


def choose_pairs(
    pairs: Sequence[PositivePair], count: int, balance: float, rng: np.random.Generator
) -> list[PositivePair]:
    """``count`` of the pairs (0: each once), in random order; more than there are: several rounds.

    balance 1 takes them as they are; 0 makes every key equally frequent as a positive, what is between half-way:
    a pair weighs count(key) ** (balance - 1).
    """
    count = count or len(pairs)
    if balance >= 1:
        rounds = [rng.permutation(len(pairs)) for _ in range(-(-count // len(pairs)))]
        return [pairs[i] for i in np.concatenate(rounds)[:count]]
    frequency = Counter(pair.key_id for pair in pairs)
    weight = np.array([frequency[pair.key_id] ** (balance - 1) for pair in pairs])
    return [pairs[i] for i in rng.choice(len(pairs), count, p=weight / weight.sum())]
