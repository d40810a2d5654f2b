"""What `rmsearch train inspect` keeps of each pair while it reads: numbers and digests, about 70 bytes; no texts."""

from __future__ import annotations

from array import array
from collections import Counter
from functools import lru_cache
from hashlib import blake2b
from math import nan
from typing import Any, NamedTuple

import numpy as np

from rmsearch.datasets.duplicates import Sketches, words
from rmsearch.datasets.preferences import Preference

DIGESTS = ("query", "query_id", "opening", "chosen", "rejected")
LENGTHS = ("query_words", "chosen_characters", "rejected_characters", "chosen_words", "rejected_words")
SCORES = ("margin", "confidence")
_BATCH = 1024


class Place(NamedTuple):
    """Where a text stands: a field of the preference at a position, or its first words only."""

    position: int
    field: str
    first_words: int = 0


class Distinct:
    """MinHash sketches of the first ``limit`` distinct texts, and where each was first seen; some 400 bytes a text."""

    def __init__(self, limit: int) -> None:
        self._positions, self._fields = array("Q"), list[str]()
        self._limit, self._seen, self._waiting, self._sketches = limit, set[int](), list[str](), Sketches()

    def __len__(self) -> int:
        return len(self._positions)

    def place(self, i: int) -> Place:
        """Where the i-th text stands."""
        return Place(self._positions[i], self._fields[i])

    def add(self, digest: int, text: str, position: int, field: str) -> None:
        """Take a text, unless it is known or there are enough."""
        if len(self) < self._limit and digest not in self._seen:
            self._seen.add(digest)
            self._positions.append(position)
            self._fields.append(field)
            self._waiting.append(text)
            if len(self._waiting) >= _BATCH:
                self._flush()

    @property
    def sketches(self) -> Sketches:
        """The sketches of the texts, in the order of their places."""
        self._flush()
        return self._sketches

    def _flush(self) -> None:
        self._sketches.add(self._waiting)
        self._waiting = []


class Columns:
    """The pairs of a set, a column per fact. Queries count as equal when they have the same words, keys when they are
    the same text; an opening is the first ``opening_words`` words of a longer query."""

    def __init__(self, opening_words: int, compared_texts: int) -> None:
        self.origins: Counter[tuple[str, str]] = Counter()
        self.prompts: Counter[str] = Counter()
        self.compares: Counter[str] = Counter()
        self.queries, self.keys = Distinct(compared_texts), Distinct(compared_texts)
        self.opening_words = opening_words
        self._columns: dict[str, array[Any]] = {name: array("Q") for name in DIGESTS}
        self._columns |= {name: array("I") for name in LENGTHS} | {name: array("f") for name in SCORES}

    def __len__(self) -> int:
        return len(self._columns["query"])

    def add(self, preference: Preference) -> None:
        """Take one pair."""
        position = len(self)
        query, opening, query_words = _query(preference.query, self.opening_words)
        chosen, chosen_characters, chosen_words = _key(preference.chosen)
        rejected, rejected_characters, rejected_words = _key(preference.rejected)
        query_id = digest(preference.query_id) if preference.query_id is not None else 0
        digests = (query, query_id, opening, chosen, rejected)
        lengths = (query_words, chosen_characters, rejected_characters, chosen_words, rejected_words)
        scores = (_known(preference.margin), _known(preference.confidence))
        for column, value in zip(self._columns.values(), (*digests, *lengths, *scores), strict=True):
            column.append(value)
        self.origins[preference.query_type or "", preference.source or ""] += 1
        self.compares[preference.compares] += 1
        if preference.prompt:
            self.prompts[preference.prompt] += 1
        self.queries.add(query, preference.query, position, "query")
        self.keys.add(chosen, preference.chosen, position, "chosen")
        self.keys.add(rejected, preference.rejected, position, "rejected")

    def __getitem__(self, name: str) -> np.ndarray:
        """A column: uint64, uint32 or float32 (NaN where unknown) per pair."""
        column = self._columns[name]
        return np.frombuffer(column, dtype={"Q": np.uint64, "I": np.uint32, "f": np.float32}[column.typecode])


def digest(text: str) -> int:
    """64 bits that stand for a text; never 0."""
    found = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little") or 1


@lru_cache(maxsize=1024)  # pairs of one query and one chosen key follow each other
def _query(text: str, opening_words: int) -> tuple[int, int, int]:
    found = words(text)
    opening = digest(" ".join(found[:opening_words])) if len(found) > opening_words else 0
    return digest(" ".join(found)), opening, len(text.split())


@lru_cache(maxsize=1024)
def _key(text: str) -> tuple[int, int, int]:
    return digest(text), len(text), len(text.split())


def _known(score: float | None) -> float:
    return nan if score is None else score
