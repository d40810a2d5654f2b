"""What one search asks of the model: unique texts, the pairs of them, and the order in which they are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rmsearch.scoring.arguments import prompt_text

if TYPE_CHECKING:
    import numpy as np

Prompt = Callable[[str, str], str]

_TILE = 4096  # texts of the inner side of a grid at a time: few enough that their tokens stay cached
_CHUNK = 8192


@dataclass(frozen=True)
class Unique:
    """Texts without duplicates, in order of first appearance, and where each asked text went (int64[n])."""

    texts: list[str]
    inverse: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> Unique:
        import numpy as np

        number: dict[str, int] = {}
        inverse = np.fromiter((number.setdefault(text, len(number)) for text in texts), np.int64, len(texts))
        return cls(list(number), inverse)

    @classmethod
    def apart(cls, texts: Sequence[str]) -> Unique:
        """Every text by itself, equal or not."""
        import numpy as np

        return cls(list(texts), np.arange(len(texts)))

    def positions(self) -> list[list[int]]:
        """For each unique text the positions that hold it, ascending."""
        found: list[list[int]] = [[] for _ in self.texts]
        for position, text in enumerate(self.inverse.tolist()):
            found[text].append(position)
        return found


@dataclass(frozen=True)
class Work:
    """Pairs of unique queries and keys: those of ``pairs`` (int64[n, 2]: query, key), or each with each.

    query_block: queries of a grid that are finished before the next ones start (None: as many as suits the model).
    key_first: the key stands first in the model's input, so pairs with the same key follow each other.
    """

    queries: Sequence[str]
    keys: Sequence[str]
    pairs: np.ndarray | None = None
    prompt: Prompt | None = None
    query_block: int | None = None
    key_first: bool = False

    def __len__(self) -> int:
        return len(self.queries) * len(self.keys) if self.pairs is None else len(self.pairs)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query, key) numbers, int64[n] each, of positions in the order of scoring.

        A grid is walked in tiles: the side that is second in the model's input changes fastest, so that the side that
        is first can be reused from the model's cache, and at most ``_TILE`` texts of it are in use at a time.
        """
        import numpy as np

        if self.pairs is not None:
            return self.pairs[positions, 0], self.pairs[positions, 1]
        queries, keys = len(self.queries), len(self.keys)
        block = self.query_block or (_TILE if self.key_first else queries)
        number, rest = np.divmod(positions, block * keys)
        height = np.minimum(block, queries - number * block)
        if self.key_first:
            key, row = np.divmod(rest, height)
            return number * block + row, key
        tile, rest = np.divmod(rest, _TILE * height)
        width = np.minimum(_TILE, keys - tile * _TILE)
        row, column = np.divmod(rest, width)
        return number * block + row, tile * _TILE + column

    def texts(self, positions: np.ndarray | None = None) -> Iterator[tuple[str, str]]:
        """(query, key) texts of the positions (all by default), made as they are taken."""
        for part in self.chunks(positions):
            query, key = self.locate(part)
            pairs = zip(query.tolist(), key.tolist(), strict=True)
            if self.prompt is None:
                yield from ((self.queries[q], self.keys[k]) for q, k in pairs)
            else:
                yield from (("", prompt_text(self.prompt, self.queries[q], self.keys[k])) for q, k in pairs)

    def chunks(self, positions: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The positions (all by default) in arrays of at most ``_CHUNK``."""
        import numpy as np

        total = len(self) if positions is None else len(positions)
        for start in range(0, total, _CHUNK):
            stop = min(start + _CHUNK, total)
            yield np.arange(start, stop) if positions is None else positions[start:stop]
