"""Embeddings in blocks, each kept on disk as soon as it is there, and exact top-k over blocks in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Literal

from rmsearch.errors import ConfigError, InputMissingError
from rmsearch.storage import uri as storage
from rmsearch.topk import TopK

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines import Embedder

AHEAD = 4  # blocks on their way to the model at a time, so that it never waits for the next one
_SIMILARITIES = 1 << 24  # numbers in one similarity matrix: 64 MiB


class VectorCache:
    """A folder (local or S3) of vectors, one file per block of texts, named by all that affects them."""

    def __init__(self, folder: str, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.found = 0

    def load(self, texts: Sequence[str], kind: str) -> np.ndarray | None:
        """float32[len(texts), d], or None."""
        import numpy as np

        try:
            with storage.reader(self._path(texts, kind)) as file:
                vectors = np.load(io.BytesIO(file.read()), allow_pickle=False)
        except InputMissingError:
            return None
        self.found += len(texts)
        return vectors

    def keep(self, texts: Sequence[str], kind: str, vectors: np.ndarray) -> None:
        import numpy as np

        packed = io.BytesIO()
        np.save(packed, vectors, allow_pickle=False)
        with storage.writer(self._path(texts, kind)) as file:
            file.write(packed.getvalue())

    def discard(self) -> None:
        storage.remove(self.folder)

    def _path(self, texts: Sequence[str], kind: str) -> str:
        state = hashlib.blake2b(json.dumps([self.identity, kind, *texts]).encode(), digest_size=16)
        return storage.join(self.folder, f"{state.hexdigest()}.npy")


async def embedded(
    embedder: Embedder, texts: Sequence[str], kind: Literal["query", "key"], size: int, cache: VectorCache
) -> AsyncIterator[tuple[int, np.ndarray]]:
    """(first position, float32[n, d]) of blocks of ``size`` texts, in order; from the cache where it has them."""

    async def block(start: int) -> np.ndarray:
        part = texts[start : start + size]
        vectors = await asyncio.to_thread(cache.load, part, kind)
        if vectors is None:
            vectors = await embedder.embed(part, kind)
            await asyncio.to_thread(cache.keep, part, kind, vectors)
        return vectors

    starts = iter(range(0, len(texts), size))
    running: list[tuple[int, asyncio.Task[np.ndarray]]] = []
    try:
        while True:
            while len(running) < AHEAD and (start := next(starts, None)) is not None:
                running.append((start, asyncio.create_task(block(start))))
            if not running:
                return
            first, task = running[0]
            vectors = await task
            running.pop(0)
            yield first, vectors
    finally:
        for _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)


class ExactSearch:
    """The ``k`` best keys of each query by inner product, over blocks of keys that come in ascending position.

    Ties go to the lower position. ``own`` (int[n], -1 for none) is a key position that a query must not get.
    Memory: the queries' vectors, 12 bytes per query and candidate, and one block's similarities (64 MiB).
    """

    def __init__(self, queries: np.ndarray, k: int, own: Sequence[int], device: str) -> None:
        import numpy as np

        self._best, self._own = TopK(len(queries), k), np.asarray(own, dtype=np.int64)
        self._queries, self._multiply = queries, product(device)

    def add(self, first: int, keys: np.ndarray) -> None:
        """Compare all queries with the keys (float32[n, d]) at positions from ``first``."""
        import numpy as np

        rows = max(1, _SIMILARITIES // max(len(keys), 1))
        lowest = self._best.snapshot()[1][:, -1]
        for start in range(0, len(self._queries), rows):
            part = slice(start, start + rows)
            scores = self._multiply(self._queries[part], keys)
            promising = scores > lowest[part, None]  # an equal score comes later by position, so it loses
            own = self._own[part] - first
            mine = np.flatnonzero((own >= 0) & (own < len(keys)))
            promising[mine, own[mine]] = False
            row, column = np.nonzero(promising)
            self._best.add(row + start, column + first, scores[row, column])

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions int64[n, k], scores float32[n, k]), best first; -inf marks an empty slot."""
        return self._best.snapshot()


def product(device: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function for queries @ keys.T in float32 on ``cpu``, ``cuda``, or (``auto``) a GPU if there is one."""
    if device != "cpu":
        import torch

        if torch.cuda.is_available():

            def on_gpu(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
                left, right = torch.from_numpy(queries).cuda(), torch.from_numpy(keys).cuda()
                return (left @ right.T).cpu().numpy()

            return on_gpu
        if device == "cuda":
            raise ConfigError("there is no CUDA GPU", where="--similarity-device", remedy="Use cpu or auto")
    return lambda queries, keys: queries @ keys.T
