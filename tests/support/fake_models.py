"""A scorer and an embedder that need no model: word overlap. They can log what they are asked, and die by SIGKILL.

``python tests/support/fake_models.py evaluation.rerank --flags…`` runs a stage with them, for tests that kill it;
FAKE_LOG names the log (one asked item a line), FAKE_DIE_AFTER the number of items after which it kills itself.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import AsyncGenerator, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rmsearch.engines.dispatch import Stats
from rmsearch.engines.embedding import EmbeddingSpec

WIDTH = 64


def words(text: str) -> list[str]:
    return text.lower().split()


def bag(text: str) -> np.ndarray:
    """A unit vector of hashed words; equal texts have equal vectors."""
    vector = np.zeros(WIDTH, dtype=np.float32)
    for word in words(text):
        vector[int.from_bytes(hashlib.blake2b(word.encode(), digest_size=2).digest(), "big") % WIDTH] += 1
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def overlap(query: str, key: str) -> float:
    """A reward that is no multiple of a nice number, so that rounding would show."""
    shared = len(set(words(query)) & set(words(key)))
    return float(np.float32(shared + 1 / (3 + len(key)) - 1.7))


class Asked:
    """Counts items, logs them and dies when told to."""

    def __init__(self) -> None:
        self.log = os.environ.get("FAKE_LOG")
        self.left = int(os.environ.get("FAKE_DIE_AFTER", "0")) or None

    def add(self, items: Iterable[str]) -> None:
        for item in items:
            if self.log:
                with Path(self.log).open("a") as file:
                    file.write(item.replace("\n", " ") + "\n")
            if self.left is not None:
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)


class FakeScorer:
    """Rewards by word overlap, in batches of 16 that come in reverse order within four batches."""

    def __init__(self, *_: Any, **arguments: Any) -> None:
        self.arguments, self.contract, self.stats, self.asked = arguments, None, Stats(), Asked()

    async def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        self.asked.add(f"{query}\t{key}" for query, key in pairs)
        self.stats.pairs += len(pairs)
        self.stats.scored += len(pairs)
        self.stats.seconds += 0.001
        return np.array([overlap(query, key) for query, key in pairs], dtype=np.float32)

    async def stream(self, pairs: Iterable[tuple[str, str]]) -> AsyncGenerator[tuple[np.ndarray, np.ndarray], None]:
        source, start = iter(pairs), 0
        while window := list(islice(source, 64)):
            for first in reversed(range(0, len(window), 16)):
                part = window[first : first + 16]
                yield np.arange(start + first, start + first + len(part)), await self.score(part)
            start += len(window)

    async def close(self) -> None:
        pass


class FakeEmbedder:
    """Bags of words as unit vectors."""

    def __init__(self, *_: Any, **arguments: Any) -> None:
        self.arguments, self.stats, self.asked = arguments, Stats(), Asked()
        self.spec = EmbeddingSpec("mean", 64, arguments.get("query_instruction") or "", "")

    async def embed(self, texts: Sequence[str], kind: str = "key") -> np.ndarray:
        self.asked.add(f"{kind}\t{text}" for text in texts)
        self.stats.scored += len(texts)
        scale = 1.0 if self.spec.normalize else 2.0
        return np.stack([bag(text) * np.float32(scale) for text in texts])

    async def close(self) -> None:
        pass


def use_fakes(patch: Any) -> None:
    """``patch(module, name, value)`` puts the fakes in place of the loaders."""
    import rmsearch.engines
    import rmsearch.models.folder

    patch(rmsearch.engines, "load_scorer", FakeScorer)
    patch(rmsearch.engines, "load_embedder", FakeEmbedder)
    patch(rmsearch.models.folder, "open_model", lambda name: Path(__file__))


if __name__ == "__main__":
    from rmsearch.cli import main

    use_fakes(setattr)
    sys.argv = ["rmsearch", *sys.argv[1].split("."), *sys.argv[2:]]
    main()
