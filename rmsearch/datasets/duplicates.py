"""Near-duplicate texts by MinHash over word shingles and locality-sensitive hashing, in about linear time.

Two texts are compared by the Jaccard similarity of their sets of word shingles, case, punctuation and Unicode's
spellings folded. A signature of `HASHES` minima estimates it (Broder 1997, "On the resemblance and containment of
documents") with a standard error of at most 0.045; only texts whose signatures agree in a whole band are compared
(Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3). Of a minimum 16 bits are kept, which is enough
to tell minima apart (Li and König 2010, "b-bit minwise hashing").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from zlib import crc32

import numpy as np

from rmsearch.errors import ConfigError

HASHES = 128
MISSED = 0.01  # chance that a pair just at the threshold shares no band
BUCKET = 8  # texts of one bucket that later ones are compared with: a phrase that all share must not cost n * n
_BATCH = 1024
_ROWS = 1 << 15  # signatures compared at a time: 8 MiB a side
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Han are written without spaces: a character a word
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:'[^\W{_UNSPACED}]+)*")


def near_duplicates(
    texts: Iterable[str], threshold: float = 0.8, *, shingle: int = 3, seed: int = 0
) -> list[int | None]:
    """For each text the position of the first earlier text that it nearly repeats, else None.

    "Nearly" is an estimated Jaccard similarity of at least ``threshold`` between the sets of ``shingle`` consecutive
    words. Texts with the same words in the same order are always found; a pair just at the threshold is found with
    probability `1 - MISSED`, a closer one almost surely. Keeping the texts that get None leaves one text of every
    chain of near-duplicates. Memory: 256 bytes per text; the texts are read once and not kept.

    Raises ConfigError for a threshold outside (0, 1] or shingles of no word.
    """
    sketches, iterator = Sketches(shingle=shingle, seed=seed), iter(texts)
    sketches.check(threshold)
    while batch := list(islice(iterator, _BATCH)):
        sketches.add(batch)
    return sketches.duplicates(threshold)


def words(text: str) -> list[str]:
    """The words of a text, folded; a text without any word stands for itself."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return _WORD.findall(folded) or [folded.strip()]


class Sketches:
    """MinHash signatures of texts that are added in batches; 256 bytes per text."""

    def __init__(self, *, shingle: int = 3, seed: int = 0) -> None:
        if shingle < 1:
            raise ConfigError(f"a shingle of {shingle} words is no shingle", remedy="Use 1 or more words")
        rng = np.random.default_rng(seed)
        self._shingle, self._seed = shingle, seed
        self._mix = _odd(rng, shingle, np.uint64)
        self._times = _odd(rng, HASHES, np.uint32)
        self._plus = rng.integers(1 << 32, size=HASHES, dtype=np.uint32)
        self._band = _odd(rng, HASHES, np.uint64)
        self._table, self._length = np.empty((0, HASHES), np.uint16), 0

    def __len__(self) -> int:
        return self._length

    @staticmethod
    def check(threshold: float) -> None:
        """Raises ConfigError for a threshold outside (0, 1]."""
        if not 0 < threshold <= 1:
            raise ConfigError(f"a similarity of {threshold} is no threshold", remedy="Use one above 0 and up to 1")

    def add(self, texts: Sequence[str]) -> None:
        """Add texts; their positions follow those of the texts before."""
        if not texts:
            return
        end = self._length + len(texts)
        if end > len(self._table):  # grown in place: no second copy while it grows
            self._table.resize((max(end, len(self._table) * 9 // 8), HASHES), refcheck=False)
        self._table[self._length : end] = self._signatures(texts)
        self._length = end

    def followed_by(self, other: Sketches) -> Sketches:
        """The texts of both, the other's after these. Both must have been made with the same shingle and seed."""
        assert (self._shingle, self._seed) == (other._shingle, other._seed), "sketches of two kinds"
        both = Sketches(shingle=self._shingle, seed=self._seed)
        both._table = np.concatenate([self._table[: len(self)], other._table[: len(other)]])
        both._length = len(both._table)
        return both

    def duplicates(self, threshold: float) -> list[int | None]:
        """As `near_duplicates`, for the texts added so far."""
        self.check(threshold)
        signatures, none = self._table[: self._length], self._length
        first = np.full(none, none)
        agreeing = int(np.ceil(threshold * HASHES - 1e-9))
        rows = band_rows(threshold)
        # The whole signature is a band, too: equal texts are found however full their other buckets are.
        for band in (range(HASHES), *(range(i, i + rows) for i in range(0, HASHES - rows + 1, rows))):
            keys = np.zeros(none, np.uint64)
            for i in band:
                keys += signatures[:, i] * self._band[i]
            for earlier, later in _candidates(keys):
                useful = earlier < first[later]
                earlier, later = earlier[useful], later[useful]
                for start in range(0, len(later), _ROWS):
                    a, b = earlier[start : start + _ROWS], later[start : start + _ROWS]
                    alike = (signatures[a] == signatures[b]).sum(axis=1) >= agreeing
                    first[b[alike]] = a[alike]
        return [None if position == none else position for position in first.tolist()]

    def _signatures(self, texts: Sequence[str]) -> np.ndarray:
        """uint16[texts, HASHES]: per hash function the low bits of the least hash of the text's shingles."""
        hashes, counts = [], []
        for text in texts:
            found = [crc32(word.encode("utf-8", "surrogatepass")) for word in words(text)]
            found += [0] * (self._shingle - len(found))
            counts.append(len(found))
            hashes += found
        shingles, starts = self._shingles(np.asarray(hashes, np.uint64), np.asarray(counts))
        signatures = np.empty((len(texts), HASHES), np.uint16)
        for i in range(HASHES):  # a multiply and shift per hash function
            least = np.minimum.reduceat(shingles * self._times[i] + self._plus[i], starts)
            signatures[:, i] = least & 0xFFFF
        return signatures

    def _shingles(self, hashes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all shingles, uint32, one text after the other, and where each text's begin."""
        size = self._shingle
        total = len(hashes) - size + 1
        mixed = sum((hashes[i : i + total] * self._mix[i] for i in range(size)), np.zeros(total, np.uint64))
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        ends = np.cumsum(counts)
        inside = np.ones(total, bool)  # of one text, not of two neighbours
        for i in range(1, size):
            inside[ends[:-1] - i] = False
        starts = np.concatenate(([0], np.cumsum(counts - size + 1)[:-1]))
        return (mixed[inside] >> np.uint64(32)).astype(np.uint32), starts


def band_rows(threshold: float) -> int:
    """Rows per band: the most (fewest texts to compare) with which a pair at the threshold is seldom missed."""
    kept = [r for r in range(1, HASHES + 1) if (1 - threshold**r) ** (HASHES // r) <= MISSED]
    return max(kept, default=1)


def _candidates(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(earlier, later) positions with equal keys; earlier is the first, then the second … of the bucket."""
    if not len(keys):
        return
    order = np.argsort(keys, kind="stable")
    fresh = np.concatenate(([True], keys[order][1:] != keys[order][:-1]))
    starts = np.flatnonzero(fresh)[np.cumsum(fresh) - 1]
    places = np.arange(len(keys))
    for i in range(BUCKET):
        places = places[places - starts[places] > i]
        if not len(places):
            return
        yield order[starts[places] + i], order[places]


def _odd(rng: np.random.Generator, size: int, kind: type[np.unsignedinteger]) -> np.ndarray:
    return rng.integers(np.iinfo(kind).max, size=size, dtype=kind, endpoint=True) | kind(1)
