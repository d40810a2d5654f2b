"""The k best keys of each query, kept while scores arrive in any order."""

from __future__ import annotations

import threading

import numpy as np

_CHUNK = 1 << 16


class TopK:
    """The ``k`` best keys per query so far: float32 scores and int64 keys, both [queries, k], best first.

    Ties go to the lower key, so the outcome does not depend on the order of arrival. One thread may add while another
    takes a `snapshot`. Memory is 12 bytes per slot, whatever the number of keys.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.empty = np.iinfo(np.int64).max  # an empty slot: score -inf and this key sort behind everything
        self._scores = np.full((queries, k), -np.inf, np.float32)
        self._keys = np.full((queries, k), self.empty, np.int64)
        self._lock = threading.Lock()
        self.added = 0

    def add(self, queries: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> None:
        """Merge finite scores of (query, key) pairs, int64[n] and float32[n]; each pair at most once over all calls."""
        for start in range(0, len(scores), _CHUNK):
            part = slice(start, start + _CHUNK)
            self._merge(queries[part], keys[part], scores[part])
        self.added += len(scores)

    def _merge(self, queries: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> None:
        promising = scores >= self._scores[queries, -1]  # most late arrivals stop here; equal scores compete by key
        if not promising.all():
            queries, keys, scores = queries[promising], keys[promising], scores[promising]
        if not len(scores):
            return
        rows, row_of = np.unique(queries, return_inverse=True)
        slots = np.arange(len(rows))
        owner = np.concatenate([np.repeat(slots, self.k), row_of])
        score = np.concatenate([self._scores[rows].ravel(), scores])
        key = np.concatenate([self._keys[rows].ravel(), keys])
        order = np.lexsort((key, -score, owner))
        first = np.searchsorted(owner[order], slots)
        best = order[first[:, None] + np.arange(self.k)]  # every row has at least its k old slots
        with self._lock:
            self._scores[rows], self._keys[rows] = score[best], key[best]

    def snapshot(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of (keys, scores); empty slots hold the key ``empty``."""
        with self._lock:
            return self._keys.copy(), self._scores.copy()
