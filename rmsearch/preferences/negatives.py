"""Negatives: what may be one. Sampling, mining and test sets all draw through here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

import numpy as np

TRIES = 50  # random keys that are looked at before a draw is given up

K = TypeVar("K")  # what names a key: its id, or its position in the corpus


def folded(text: str) -> str:
    """The text without what does not tell two texts apart: case and white space."""
    return " ".join(text.split()).casefold()


def same_text(text: str) -> bytes:
    """A digest that texts share when they are the same, case and white space apart."""
    return blake2b(folded(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def score_limit(positive: float, max_relative_score: float | None, min_margin: float | None = None) -> float | None:
    """The highest retrieval score that a negative may have beside a positive with that score; None: any.

    Keys above it are likely positives that nobody labelled: above a share of the positive's score ("perc-pos" of
    NV-Retriever, Moreira et al. 2024, arXiv:2407.15831, which found 0.95 best; without meaning for a score of 0 or
    below), or less than a margin under it.
    """
    limits = [max_relative_score * positive] if max_relative_score and positive > 0 else []
    if min_margin is not None:
        limits.append(positive - min_margin)
    return min(limits, default=None)


class Positives(Generic[K]):
    """The keys that are known to serve a query. Their texts are read once, however many sets the query gets."""

    def __init__(self, keys: Iterable[K]) -> None:
        self.keys = frozenset(keys)
        self._texts: frozenset[bytes] | None = None

    def texts(self, text_of: Callable[[K], str]) -> frozenset[bytes]:
        """`same_text` of each."""
        if self._texts is None:
            self._texts = frozenset(same_text(text_of(key)) for key in self.keys)
        return self._texts


class Negatives(Generic[K]):
    """Draws negatives for one positive: no key twice, none of the positives, none with the text of one of them, of
    what is excluded besides, or of an earlier one."""

    def __init__(self, positives: Positives[K], text_of: Callable[[K], str], counts: Counter[str]) -> None:
        self._positives, self._text_of, self._counts = positives, text_of, counts
        self._keys, self._texts = set[K](), set[bytes]()

    def exclude(self, key: K, text: str) -> None:
        """Draw neither that key nor that text."""
        self._keys.add(key)
        self._texts.add(same_text(text))

    def draw(self, *sources: tuple[str, Iterable[tuple[K, str | None]]]) -> tuple[K, str] | None:
        """The first usable key of the first source that has one, with its text, counted as ``from_<source>``; None
        when there is none. ``sources``: a name, and keys in random order with their texts where those are at hand."""
        known = self._positives.texts(self._text_of)
        for name, candidates in sources:
            for key, text in candidates:
                if key in self._positives.keys or key in self._keys:
                    continue
                text = self._text_of(key) if text is None else text
                if (same := same_text(text)) not in known and same not in self._texts:
                    self._keys.add(key)
                    self._texts.add(same)
                    self._counts[f"from_{name}"] += 1
                    return key, text
        return None


def shuffled(keys: Sequence[K], rng: np.random.Generator) -> Iterator[tuple[K, None]]:
    """All keys in random order."""
    for at in rng.permutation(len(keys)).tolist():
        yield keys[at], None


def at_random(keys: Sequence[K], rng: np.random.Generator) -> Iterator[tuple[K, None]]:
    """`TRIES` random ones of the keys."""
    for at in rng.integers(len(keys), size=TRIES).tolist():
        yield keys[at], None
