"""Embeddings in blocks, each kept on disk as soon as it is there, and exact top-k over blocks in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rmsearch import engines
from rmsearch.engines import Embedder
from rmsearch.errors import ConfigError, InputMissingError, ModelError
from rmsearch.models import folder as model_folder
from rmsearch.stage import Run
from rmsearch.storage import uri as storage

AHEAD = 4  # blocks on their way to the model at a time, so that it never waits for the next one
_ROOM = 64  # free slots of a query, at least; more of them would mean a lowest score that is longer out of date
_POSITIONS = 1 << 32
_EMPTY = -2139095041 << 32  # a slot without a key: -inf at the last position, as `_packed` has it
Blocks = AsyncIterator[tuple[int, np.ndarray]]  # (first position, float32[n, d]), in order


@dataclass(frozen=True)
class TextsToEmbed:
    """Texts, what they are to the model, how many are handed to it at once, and the folder that keeps their vectors."""

    texts: Sequence[str] = field(repr=False)
    kind: Literal["query", "key"]
    size: int
    folder: str | None = None


def nearest(
    run: Run,
    model: dict[str, Any],
    queries: TextsToEmbed,
    keys: TextsToEmbed,
    k: int,
    *,
    own: Sequence[int] | None = None,
    compared: int = 1,
    device: str = "cpu",
    **vectors: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest keys of each query, exactly: (positions int64[n, k], scores float32[n, k]), best first.

    ``model`` and ``vectors``: see `embed_texts`. ``own``, ``device``: see `ExactSearch`. ``compared``: keys compared at
    once, at least. Memory grows with the queries' vectors; the keys' pass in blocks. Folders of vectors stay.
    """

    async def work() -> tuple[np.ndarray, np.ndarray]:
        async with _embedding(run, model, [queries, keys], **vectors) as blocks:
            found = await _joined(blocks(queries))
            search = ExactSearch(found, min(k, len(keys.texts)), own or [-1] * len(found), device)
            async for first, part in gathered(blocks(keys), compared):
                await asyncio.to_thread(search.add, first, part)
        return search.result()

    return asyncio.run(work())


def embed_texts(run: Run, model: dict[str, Any], parts: Sequence[TextsToEmbed], **vectors: Any) -> list[np.ndarray]:
    """The vectors of each part, float32[n, d].

    ``model``: arguments of `load_embedder`. ``vectors``: ``normalize=False`` keeps their lengths; ``identity`` is what
    kept vectors depend on beside their texts, by default `vector_identity`.
    """

    async def work() -> list[np.ndarray]:
        async with _embedding(run, model, parts, **vectors) as blocks:
            return [await _joined(blocks(part)) for part in parts]

    return asyncio.run(work())


@asynccontextmanager
async def _embedding(
    run: Run, model: dict[str, Any], parts: Sequence[TextsToEmbed], normalize: bool = True, identity: str | None = None
) -> AsyncIterator[Callable[[TextsToEmbed], Blocks]]:
    """Load the model and give a function that embeds a part; then put counts, rate and how it embeds into the run."""
    embedder = engines.load_embedder(**model)
    loaded = 0
    try:
        if not normalize:
            embedder.spec = replace(embedder.spec, normalize=False)
        identity = identity or vector_identity(embedder, **model)
        with run.progress(sum(len(part.texts) for part in parts), "texts") as shown:

            async def blocks(part: TextsToEmbed) -> Blocks:
                nonlocal loaded
                cache = VectorCache(part.folder, identity) if part.folder else None
                async for first, vectors in embedded(embedder, part.texts, part.kind, part.size, cache):
                    shown.advance(len(vectors))
                    yield first, vectors
                loaded += cache.loaded if cache else 0

            yield blocks
    finally:
        await embedder.close()
    stats = embedder.stats
    run.counts |= {"embedded": stats.scored, "cached": loaded, "tokens": stats.tokens, "truncated": stats.truncated}
    if stats.seconds > 0:
        run.counts["texts_per_second"] = round(stats.scored / stats.seconds, 1)
    run.note(embedding=asdict(embedder.spec), model_seconds=round(stats.seconds, 3))


async def _joined(blocks: Blocks) -> np.ndarray:
    parts = [vectors async for _, vectors in blocks]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def vector_identity(
    embedder: Embedder, model_name: str, base_url: str | None = None, dtype: str = "auto", **_: Any
) -> str:
    """All but the texts that affects a vector: the model's files, precision, pooling and instructions."""
    files = base_url or storage.digest(str(model_folder.open_model(model_name)))
    return f"{files} {model_name if base_url else ''} {dtype} {embedder.spec}"


class VectorCache:
    """A folder (local or S3) of vectors, one file per block of texts, named by all that affects them."""

    def __init__(self, folder: str, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.loaded = 0

    def load(self, texts: Sequence[str], kind: str) -> np.ndarray | None:
        """float32[len(texts), d], or None."""
        try:
            with storage.reader(self._path(texts, kind)) as file:
                vectors = np.load(io.BytesIO(file.read()), allow_pickle=False)
        except InputMissingError:
            return None
        self.loaded += len(texts)
        return vectors

    def keep(self, texts: Sequence[str], kind: str, vectors: np.ndarray) -> None:
        packed = io.BytesIO()
        np.save(packed, vectors, allow_pickle=False)
        with storage.writer(self._path(texts, kind)) as file:
            file.write(packed.getvalue())

    def _path(self, texts: Sequence[str], kind: str) -> str:
        state = hashlib.blake2b(json.dumps([self.identity, kind, *texts]).encode(), digest_size=16)
        return storage.join(self.folder, f"{state.hexdigest()}.npy")


async def embedded(
    embedder: Embedder, texts: Sequence[str], kind: Literal["query", "key"], size: int, cache: VectorCache | None
) -> Blocks:
    """(first position, float32[n, d]) of blocks of ``size`` texts, in order; from the cache where it has them."""

    async def block(start: int) -> np.ndarray:
        part = texts[start : start + size]
        if cache is None:
            return await embedder.embed(part, kind)
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


async def gathered(blocks: Blocks, size: int) -> Blocks:
    """Small blocks that follow each other as larger ones, of at least ``size`` vectors but for the last."""
    first, parts, count = 0, list[np.ndarray](), 0
    async for start, vectors in blocks:
        first = first if parts else start
        parts.append(vectors)
        count += len(vectors)
        if count >= size:
            yield first, np.concatenate(parts)
            parts, count = [], 0
    if parts:
        yield first, np.concatenate(parts)


class ExactSearch:
    """The ``k`` best keys of each query by inner product, over blocks of keys that come in ascending position.

    Ties go to the lower position. ``own`` (int[n], -1 for none) is a key position that a query must not get.
    Every query has ``k`` slots and some room; a block's scores above its lowest so far go to the room, and when that is
    full the best k stay. A slot is one int64 that orders by score, then position, so that a partition of plain numbers
    is exact. Memory: the queries' vectors, 12 bytes per query and candidate, and a matrix of similarities (8 MiB; on a
    GPU 64).
    """

    def __init__(self, queries: np.ndarray, k: int, own: Sequence[int], device: str) -> None:
        _require_finite(queries)
        self.k, self._own, self._count = k, np.asarray(own, dtype=np.int64), len(queries)
        self._multiply, self._queries, self._at_once = product(device), _placed(queries, device), _at_once(device)
        self._workers = len(os.sched_getaffinity(0)) if _where(device) == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._workers)  # numpy's comparisons use one core each; rows are independent
        self._slots = np.full((len(queries), k + max(k // 2, _ROOM)), _EMPTY, np.int64)
        self._filled = np.full(len(queries), k)  # the first k slots always count: at the start they are empty ones
        self._lowest = np.full(len(queries), -np.inf, np.float32)

    def add(self, first: int, keys: np.ndarray) -> None:
        """Compare all queries with the keys (float32[n, d]) at positions from ``first``. Raises ModelError for vectors
        that are not finite."""
        _require_finite(keys)
        if first + len(keys) > _POSITIONS:
            raise ConfigError(f"a search holds at most {_POSITIONS} keys", remedy="Search parts of the corpus")
        rows = max(1, self._at_once // max(len(keys), 1))
        for start in range(0, self._count, rows):
            part = slice(start, min(start + rows, self._count))
            scores = self._multiply(self._queries[part], keys)
            own = self._own[part] - first
            mine = np.flatnonzero((own >= 0) & (own < len(keys)))
            if len(mine):
                scores[mine, own[mine]] = -np.inf
            step = -(-len(scores) // self._workers)
            starts = range(0, len(scores), step)
            takers = [slice(part.start + s, min(part.start + s + step, part.stop)) for s in starts]
            for _ in self._pool.map(self._take, takers, [first] * len(starts), [scores[s : s + step] for s in starts]):
                pass

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions int64[n, k], scores float32[n, k]), best first; -inf marks an empty slot."""
        self._keep_best(np.arange(self._count))
        best = -np.sort(-self._slots[:, : self.k], axis=1)
        return _POSITIONS - 1 - (best & (_POSITIONS - 1)), _unpacked(best)

    def _take(self, part: slice, first: int, scores: Any) -> None:
        """Put the promising of these scores ([queries of the part, keys from ``first``]) into free slots."""
        row, column, score = _above(scores, self._lowest[part])
        counts = np.bincount(row, minlength=part.stop - part.start)
        full = np.flatnonzero(self._filled[part] + counts > self._slots.shape[1])
        if len(full):
            self._keep_best(full + part.start)
            still = score > self._lowest[part][row]
            row, column, score = row[still], column[still], score[still]
            counts = np.bincount(row, minlength=part.stop - part.start)
        if (self._filled[part] + counts > self._slots.shape[1]).any():  # as in the first block: half of it at a time
            half = scores.shape[1] // 2
            self._take(part, first, scores[:, :half])
            self._take(part, first + half, scores[:, half:])
            return
        before = np.cumsum(counts) - counts
        slot = np.arange(len(row)) + (self._filled[part] - before)[row]
        self._slots[row + part.start, slot] = _packed(score, column + first)
        self._filled[part] += counts

    def _keep_best(self, rows: np.ndarray) -> None:
        """Make room in these rows: their best k go to the front, and only what is above the lowest of them counts."""
        slots = self._slots[rows]
        slots.partition(slots.shape[1] - self.k, axis=1)
        best = slots[:, -self.k :]
        self._slots[rows, : self.k] = best
        self._slots[rows, self.k :] = _EMPTY
        self._filled[rows] = self.k
        self._lowest[rows] = _unpacked(best.min(axis=1))


def _packed(scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """int64 that order as (score, lower position first): a float's bits order as its value, once negatives are
    turned round."""
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0: they are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.astype(np.int64) << 32) | (_POSITIONS - 1 - positions)


def _unpacked(packed: np.ndarray) -> np.ndarray:
    ordered = (packed >> 32).astype(np.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(np.float32)


def _above(scores: Any, lowest: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, score) of all scores above their row's lowest, in order of rows."""
    if not isinstance(scores, np.ndarray):  # a CUDA tensor: only what is found leaves the GPU
        import torch

        row, column = torch.nonzero(scores > torch.from_numpy(lowest).to(scores.device)[:, None], as_tuple=True)
        return row.cpu().numpy(), column.cpu().numpy(), scores[row, column].cpu().numpy()
    row, column = np.divmod(np.flatnonzero(scores > lowest[:, None]), scores.shape[1])
    return row, column, scores[row, column]


def _require_finite(vectors: np.ndarray) -> None:
    if not np.isfinite(vectors).all():
        remedy = "Use dtype float32 or bfloat16, and check that the model's weights are whole"
        raise ModelError("the model gave a vector that is not finite", remedy=remedy)


def _where(device: str) -> Literal["cpu", "cuda"]:
    """Where ``cpu``, ``cuda`` or ``auto`` (a GPU if there is one) computes. ConfigError when the GPU is missing."""
    if device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ConfigError("there is no CUDA GPU", where="--similarity-device", remedy="Use cpu or auto")
    return "cpu"


def _at_once(device: str) -> int:
    """Similarities in one matrix: 8 MiB stay in a CPU's cache; a GPU wants more."""
    return 1 << 21 if _where(device) == "cpu" else 1 << 24


def _placed(vectors: np.ndarray, device: str) -> Any:
    """The vectors where they are multiplied."""
    if _where(device) == "cpu":
        return vectors
    import torch

    return torch.from_numpy(vectors).cuda()


def product(device: str) -> Callable[[Any, np.ndarray], Any]:
    """A function for queries @ keys.T in float32 on ``cpu``, ``cuda``, or (``auto``) a GPU if there is one; on a GPU it
    gives a tensor that stays there."""
    if _where(device) == "cpu":
        return lambda queries, keys: queries @ keys.T
    import torch

    return lambda queries, keys: torch.as_tensor(queries, device="cuda") @ torch.from_numpy(keys).cuda().T
