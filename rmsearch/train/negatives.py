"""Negatives for an anchor: from a rank window, from similar queries' positives, at random; false ones are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rmsearch.datasets.beir import Beir
from rmsearch.train.anchors import Anchor
from rmsearch.train.rankings import Ranking


@dataclass(frozen=True)
class Rules:
    """How negatives are drawn. Ranks count from 1; shares are probabilities per negative, the rest is from ranks.

    max_relative_score: a key that a ranking scores above this share of the positive's score is taken for an unlabelled
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
class Miner:
    """Draws negatives for anchors of one data set."""

    beir: Beir
    rankings: Sequence[Ranking]
    similar: Mapping[str, Sequence[str]]
    rules: Rules
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._keys = sorted(self.beir.corpus)
        self._positive_ids = {query: set(self.beir.positives(query)) for query in self.beir.queries}
        self._lists: dict[str, list[list[str]]] = {}

    def negatives(self, anchor: Anchor, rng: np.random.Generator) -> Iterator[tuple[str, float | None]]:
        """(key id, margin) of up to ``per_positive`` distinct negatives."""
        taken: set[str] = set()
        texts = {self._text(anchor, key) for key in self._positive_ids[anchor.query_id]} | {anchor.text}
        pools = self._pools(anchor)
        for _ in range(self.rules.per_positive):
            key = self._draw(anchor, pools, taken, texts, rng)
            if key is None:
                self.counts["too_few_negatives"] += 1
                return
            taken.add(key)
            texts.add(self._text(anchor, key))
            yield key, self._margin(anchor, key)

    def _text(self, anchor: Anchor, key: str) -> str:
        return self.beir.corpus[key].text.strip() if anchor.bare else self.beir.key_text(key)

    def _pools(self, anchor: Anchor) -> list[list[str]]:
        """Keys in the rank window of each ranking, without false negatives."""
        query = anchor.query_id
        pools = []
        for ranking in self.rankings:
            window = list(ranking.scores.get(query, {}).items())[self.rules.rank_min - 1 : self.rules.rank_max]
            limit = self._limit(ranking, anchor)
            kept = [key for key, score in window if score <= limit]
            self.counts["false_negatives_skipped"] += len(window) - len(kept)
            pools.append([key for key in kept if key not in self._positive_ids[query]])
        return pools

    def _limit(self, ranking: Ranking, anchor: Anchor) -> float:
        share = self.rules.max_relative_score
        positive = ranking.of(anchor.query_id, anchor.key_id)
        return float("inf") if share is None or positive <= 0 else share * positive

    def _draw(
        self, anchor: Anchor, pools: list[list[str]], taken: set[str], texts: set[str], rng: np.random.Generator
    ) -> str | None:
        """A usable key from the source that the dice choose, else (that one being empty) from anywhere."""
        positives = self._positive_ids[anchor.query_id]

        def usable(key: str) -> bool:
            return key not in taken and key not in positives and self._text(anchor, key) not in texts

        dice = rng.random()
        if dice < self.rules.random_share:
            sources = ["random"]
        elif dice < self.rules.random_share + self.rules.similar_share:
            sources = ["similar", "ranks"]
        else:
            sources = ["ranks", "random"]
        for source in [*sources, "random"]:
            if source == "random":
                options = (self._keys[int(rng.integers(len(self._keys)))] for _ in range(50))
            else:
                pool = (
                    self._similar(anchor)
                    if source == "similar"
                    else pools[int(rng.integers(len(pools)))]
                    if pools
                    else []
                )
                options = (pool[i] for i in rng.permutation(len(pool)))
            if (key := next((key for key in options if usable(key)), None)) is not None:
                self.counts[f"from_{source}"] += 1
                return key
        return None

    def _similar(self, anchor: Anchor) -> list[str]:
        near = self.similar.get(anchor.query_id, ())
        return [key for query in near for key in self.beir.positives(query)]

    def _margin(self, anchor: Anchor, key: str) -> float | None:
        """The first stages' difference between positive and negative, weighted, scaled, and cut to 0 … margin_max."""
        if not self.rules.margin_scale:
            return None
        difference = 0.0
        for ranking, weight in zip(self.rankings, self.rules.weights, strict=True):
            query = anchor.query_id
            positive = ranking.positive.get((query, anchor.key_id))
            above = ranking.of(query, anchor.key_id) if positive is None else positive
            difference += weight * (above - ranking.of(query, key))
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
