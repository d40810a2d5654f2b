"""Negatives for an anchor: from a rank window, from similar queries' positives, at random; false ones are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rmsearch.datasets.beir import Beir
from rmsearch.preferences.positives import Anchor
from rmsearch.retrieval.first_stage import best_positions
from rmsearch.retrieval.rankers import Ranker, places

TRIES = 50
BLOCK_SCORES = 1 << 24  # scores held at a time: 64 MiB per ranker


@dataclass(frozen=True)
class Rules:
    """How negatives are drawn. Ranks count from 1; shares are probabilities per negative, the rest is from ranks.

    max_relative_score: a key that a ranker scores above this share of the positive's score is taken for an unlabelled
    positive and skipped: "perc-pos" of NV-Retriever (Moreira et al. 2024, arXiv:2407.15831), which found 0.95 best.
    """

    per_positive: int
    rank_min: int
    rank_max: int
    random_share: float
    similar_share: float
    max_relative_score: float | None
    margin_scale: float
    margin_max: float
    weights: Sequence[float]


@dataclass
class _Scored:
    """An anchor with what the rankers say: scores of all keys and of the positive, and the pools to draw from."""

    anchor: Anchor
    scores: list[np.ndarray]
    positive: list[float]
    pools: list[np.ndarray]
    similar: np.ndarray


@dataclass
class Miner:
    """Draws negatives for anchors of one data set."""

    beir: Beir
    rankers: Sequence[Ranker]
    similar: Mapping[str, Sequence[str]]
    rules: Rules
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._keys = sorted(self.beir.corpus)
        self._place = places(self._keys)
        self._positives = {
            query: {self._place[key] for key in (*self.beir.positives(query), query) if key in self._place}
            for query in self.beir.queries
        }

    def mine(self, anchors: Sequence[Anchor], rng: np.random.Generator) -> Iterator[tuple[Anchor, str, float | None]]:
        """(anchor, key id, margin) for each negative, anchor by anchor."""
        size = max(1, BLOCK_SCORES // max(len(self._keys), 1))
        for start in range(0, len(anchors), size):
            part = anchors[start : start + size]
            blocks = [ranker.block([anchor.query_id for anchor in part]) for ranker in self.rankers]
            for row, anchor in enumerate(part):
                scored = self._scored(anchor, [block[row] for block in blocks])
                for position in self._negatives(scored, rng):
                    yield anchor, self._keys[position], self._margin(scored, position)

    def _scored(self, anchor: Anchor, rows: list[np.ndarray]) -> _Scored:
        own, changed = self._place[anchor.key_id], anchor.text != self.beir.key_text(anchor.key_id)
        positive, pools, scores = [], [], []
        for ranker, row in zip(self.rankers, rows, strict=True):
            finite = row[np.isfinite(row)]
            filled = np.where(np.isfinite(row), row, finite.min() if len(finite) else 0.0)
            known = ranker.of_text(anchor.query_id, anchor.text) if changed else None
            positive.append(float(filled[own]) if known is None else known)
            window = best_positions(row, self.rules.rank_max)[self.rules.rank_min - 1 :]
            pools.append(self._kept(window, row, positive[-1]))
            scores.append(filled)
        near = [p for query in self.similar.get(anchor.query_id, ()) for p in self._positives[query]]
        return _Scored(anchor, scores, positive, pools, np.asarray(near, np.int64))

    def _kept(self, window: np.ndarray, scores: np.ndarray, positive: float) -> np.ndarray:
        """The window without keys that score so close to the positive that they are likely positives, too."""
        share = self.rules.max_relative_score
        if share is None or positive <= 0:
            return window
        kept = window[scores[window] <= share * positive]
        self.counts["false_negatives_skipped"] += len(window) - len(kept)
        return kept

    def _negatives(self, scored: _Scored, rng: np.random.Generator) -> Iterator[int]:
        anchor, taken = scored.anchor, set(self._positives[scored.anchor.query_id])
        texts = {self._text(anchor, position) for position in taken} | {anchor.text}
        for _ in range(self.rules.per_positive):
            position = self._draw(scored, taken, texts, rng)
            if position is None:
                self.counts["too_few_negatives"] += 1
                return
            taken.add(position)
            texts.add(self._text(anchor, position))
            yield position

    def _text(self, anchor: Anchor, position: int) -> str:
        document = self.beir.corpus[self._keys[position]]
        return document.text.strip() if anchor.bare else document.key

    def _draw(self, scored: _Scored, taken: set[int], texts: set[str], rng: np.random.Generator) -> int | None:
        """A usable key from the source that the dice choose, else (none is left there) from another."""
        dice = rng.random()
        if dice < self.rules.random_share:
            sources = ["random"]
        elif dice < self.rules.random_share + self.rules.similar_share:
            sources = ["similar", "ranks", "random"]
        else:
            sources = ["ranks", "random"]
        for source in sources:
            if source == "random":
                tries = rng.integers(len(self._keys), size=TRIES)
            else:
                pools = [scored.similar] if source == "similar" else scored.pools
                pool = pools[int(rng.integers(len(pools)))] if pools else scored.similar[:0]
                tries = rng.permutation(pool)
            for position in map(int, tries):
                if position not in taken and self._text(scored.anchor, position) not in texts:
                    self.counts[f"from_{source}"] += 1
                    return position
        return None

    def _margin(self, scored: _Scored, position: int) -> float | None:
        """The rankers' weighted difference between positive and negative, scaled, within [0, margin_max]."""
        if not self.rules.margin_scale:
            return None
        parts = zip(self.rules.weights, scored.positive, scored.scores, strict=True)
        difference = sum(weight * (positive - float(scores[position])) for weight, positive, scores in parts)
        return round(min(max(0.0, self.rules.margin_scale * difference), self.rules.margin_max), 6)


def choose_anchors(anchors: Sequence[Anchor], wanted: int, balance: float, rng: np.random.Generator) -> list[Anchor]:
    """``wanted`` of the anchors (0: each once), in random order; more than there are: several rounds.

    balance 1 takes them as they are; 0 makes every key equally frequent as a positive, what is between half-way:
    an anchor weighs count(key) ** (balance - 1).
    """
    wanted = wanted or len(anchors)
    if balance >= 1:
        rounds = [rng.permutation(len(anchors)) for _ in range(-(-wanted // len(anchors)))]
        return [anchors[i] for i in np.concatenate(rounds)[:wanted]]
    count = Counter(anchor.key_id for anchor in anchors)
    weight = np.array([count[anchor.key_id] ** (balance - 1) for anchor in anchors])
    return [anchors[i] for i in rng.choice(len(anchors), wanted, p=weight / weight.sum())]
