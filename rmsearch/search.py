"""Search: the best keys for each query, ranked by a reward model.

    search = Search("path/to/reward-model")
    results = await search(["how do I sort a list?"], ["list.sort()", "dict.get()"], k=1)
    search.close()

Results are ``[{"query", "query_id", "keys": [{"key_id", "key", "relevance"}]}]``, best first; ids are positions in the
arguments; ``relevance`` is the raw reward. Equal rewards go by key_id. Equal texts are scored once and keep their ids.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rmsearch.scoring.arguments import (
    InputError,
    candidate_pairs,
    frame_rows,
    group_limits,
    key_texts,
    old_spelling,
    optional_number,
    prompt_text,
    query_texts,
    takes_row,
    template_choice,
    whole_number,
)
from rmsearch.scoring.model import RewardModel
from rmsearch.scoring.pairs import Unique, Work
from rmsearch.scoring.service import ClosedError, SharedScorer
from rmsearch.scoring.topk import TopK

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines import Scorer
    from rmsearch.scoring.model import Put

__all__ = ["ClosedError", "InputError", "Result", "Search", "SearchUpdate"]

Result = dict[str, Any]


class Search:
    """Ranks keys for queries with a reward model. One instance serves any number of concurrent callers and event loops.

    model_name: a model folder, s3:// folder, hub name, or a server's name for its model (None: the only one it has). It
    loads at the first use (or in ``async with``), so the constructor is cheap anywhere. engine: "auto", "transformers",
    "vllm" or "http" (with ``base_url``). tensor_parallel_size, pipeline_parallel_size: GPUs of the vLLM engine. dtype:
    "auto" is the model's own on a GPU, float32 on a CPU.
    max_length: tokens per pair (None: as trained); longer texts are cut by the template and counted in `stats`.
    template: name of the prompt template, for models that do not carry theirs. llm_template: such a name, or a function
    ``(query, key) -> str`` (for frames also ``(row) -> str``) that writes the whole prompt. lora: an adapter folder.
    allow_template_mismatch: use the template given here although the model was trained with another.
    query_batch_size: queries whose pairs are all asked before the next ones start (None: as suits the model); it never
    changes results. scorer: your own `rmsearch.engines.Scorer` instead of a model. engine_options go to the engine.

    Every method raises InputError (also a ValueError) for arguments, ClosedError after `close`, and what loading raises
    at first use: ModelError, ContractError (another template than trained with), RetryableError.
    """

    def __init__(
        self,
        model_name: str | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        llm_template: str | Callable[..., str] | None = None,
        *,
        engine: str = "auto",
        query_batch_size: int | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        template: str | None = None,
        base_url: str | None = None,
        lora: str | None = None,
        allow_template_mismatch: bool = False,
        scorer: Scorer | None = None,
        **engine_options: Any,
    ) -> None:
        if scorer is None and not model_name and not (base_url and engine in ("auto", "http")):
            raise InputError("model_name is missing", remedy='Name a reward model: Search("…")')
        template, prompt = template_choice(template, llm_template)
        self._prompt = prompt
        self._by_row = prompt is not None and takes_row(prompt)
        self._query_block = optional_number(query_batch_size, "query_batch_size")
        options = {
            "engine": engine,
            "dtype": dtype,
            "max_length": optional_number(max_length, "max_length"),
            "lora": lora,
            "base_url": base_url,
            "tensor_parallel_size": whole_number(tensor_parallel_size, "tensor_parallel_size"),
            "pipeline_parallel_size": whole_number(pipeline_parallel_size, "pipeline_parallel_size"),
            **engine_options,
        }
        self._model = RewardModel(str(model_name or ""), options, template, prompt, allow_template_mismatch, scorer)
        self._engine = SharedScorer(self._model.load)
        weakref.finalize(self, self._engine.close)  # a Search that nobody closed ends its engine when it goes away

    # ---- searching

    async def __call__(
        self,
        queries: Any = None,
        keys: Any = None,
        k: int = 5,
        return_relevance: bool = True,
        disable_log: bool = False,
        progress_bar: Any = None,
        batch_size: int | None = None,
        query_batch_size: int | None = None,
        *,
        candidates: Sequence[Sequence[int]] | None = None,
        checkpoint: str | None = None,
        queires: Any = None,
    ) -> list[Result]:
        """The ``k`` best keys of each query, best first.

        queries: strings, chat messages ([{"role", "content"}] or {"message": […]}), or objects with ``.message``.
        k: at most this many keys, clipped to what there is. candidates: per query the key_ids to consider (all by
        default). checkpoint: a file, folder or s3:// URI that keeps every score as it arrives; the same call with it
        goes on where the last one stopped, other texts for the same model add to it. It stays until you delete it.
        disable_log: no progress lines. progress_bar: False for none, or an object with ``update(n)`` such as tqdm's.
        batch_size: accepted for compatibility; the engine packs its batches by tokens. queires: an old spelling.
        """
        optional_number(batch_size, "batch_size")
        block = optional_number(query_batch_size, "query_batch_size")
        task = self._task(old_spelling(queries, queires), keys, k, candidates, block)
        board = task.board()
        await self._score(task.work, partial(_rank, board), checkpoint, disable_log, progress_bar)
        return task.results(board.snapshot(), return_relevance)

    async def stream(
        self,
        queries: Any,
        keys: Any,
        k: int = 5,
        *,
        candidates: Sequence[Sequence[int]] | None = None,
        checkpoint: str | None = None,
        updates_per_second: float = 10.0,
    ) -> AsyncGenerator[SearchUpdate, None]:
        """Rankings that improve while scores arrive: at most ``updates_per_second``, then the final one at once.

        The last update has ``final=True`` and equals what a plain call returns. Leaving the loop early cancels the
        remaining work.
        """
        if not updates_per_second > 0:
            raise InputError(f"updates_per_second is {updates_per_second}", remedy="Give a number above 0")
        task = self._task(queries, keys, k, candidates, None)
        board, total = task.board(), len(task.work)
        if total:
            work = self._model.scoring(task.work, partial(_rank, board), checkpoint)
            future = self._engine.submit(work)
            waiter = asyncio.ensure_future(self._engine.wait(future))
            waiter.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, even if nobody listens
            try:
                async for done in _steps(waiter, board, 1 / updates_per_second):
                    yield SearchUpdate(done, total, False, task, board.snapshot())
                await waiter
            finally:
                future.cancel()
                waiter.cancel()
        yield SearchUpdate(total, total, True, task, board.snapshot())

    async def get_relevance(
        self,
        queries: Any,
        keys: Any,
        disable_log: bool = False,
        progress_bar: Any = None,
        *,
        checkpoint: str | None = None,
    ) -> np.ndarray:
        """Rewards of every query with every key: a numpy float32 array [len(queries), len(keys)]."""
        import numpy as np

        task = self._task(queries, keys, 1, None, None)
        matrix = np.empty((len(task.queries.texts), len(task.keys.texts)), np.float32)

        def put(work: Work, positions: np.ndarray, rewards: np.ndarray) -> None:
            matrix[work.locate(positions)] = rewards

        await self._score(task.work, put, checkpoint, disable_log, progress_bar)
        return matrix[np.ix_(task.queries.inverse, task.keys.inverse)]

    # ---- data frames

    async def search_by_df(
        self,
        df: Any,
        k: int = 10,
        topk_with_group: bool = False,
        disable_log: bool = False,
        progress_bar: Any = None,
        *,
        checkpoint: str | None = None,
    ) -> list[dict[str, Any]] | dict[Any, list[dict[str, Any]]]:
        """The best rows of a pandas frame with the columns ``query`` and ``key``: row dicts with ``relevance`` added.

        With ``topk_with_group`` the frame also has ``group`` and ``k`` (taken from a group's first row), and the answer
        is {group: [rows]}. Equal rewards keep the frame's order. The frame itself stays as it is.
        """
        k = whole_number(k, "k")
        rows = frame_rows(df, () if self._by_row else ("query", "key"), ("group", "k") if topk_with_group else ())
        limits = group_limits(rows) if topk_with_group else {}
        rewards = await self._score_frame(df, rows, checkpoint, disable_log, progress_bar)
        ranked = [{**rows[i], "relevance": rewards[i]} for i in sorted(range(len(rows)), key=lambda i: -rewards[i])]
        if not topk_with_group:
            return ranked[:k]
        return {group: [row for row in ranked if row["group"] == group][:limit] for group, limit in limits.items()}

    async def get_relevance_by_df(
        self, df: Any, disable_log: bool = False, progress_bar: Any = None, *, checkpoint: str | None = None
    ) -> Any:
        """A copy of the frame (columns ``query`` and ``key``) with a float32 column ``relevance``."""
        import numpy as np

        rows = frame_rows(df, () if self._by_row else ("query", "key"), ())
        rewards = await self._score_frame(df, rows, checkpoint, disable_log, progress_bar)
        scored = df.copy()
        scored["relevance"] = np.array(rewards, np.float32)
        return scored

    async def _score_frame(
        self, df: Any, rows: list[dict[str, Any]], checkpoint: str | None, disable_log: bool, progress_bar: Any
    ) -> list[float]:
        """The reward of each row of a frame."""
        import numpy as np

        if not rows:
            return []
        if self._by_row and self._prompt is not None:
            queries = Unique.of([""] * len(rows))
            keys = Unique.of([prompt_text(self._prompt, row) for _, row in df.iterrows()])
        else:
            queries = Unique.of(query_texts([row["query"] for row in rows], "df['query']"))
            keys = Unique.of(key_texts([row["key"] for row in rows], "df['key']"))
        pairs = np.stack([queries.inverse, keys.inverse], axis=1)
        pairs, inverse = np.unique(pairs, axis=0, return_inverse=True)
        rewards = np.empty(len(pairs), np.float32)

        def put(work: Work, positions: np.ndarray, values: np.ndarray) -> None:
            rewards[positions] = values

        work = Work(queries.texts, keys.texts, pairs, None if self._by_row else self._prompt)
        await self._score(work, put, checkpoint, disable_log, progress_bar)
        return rewards[inverse.reshape(-1)].tolist()

    # ---- results on disk

    def save_results(self, results: Sequence[Mapping[str, Any]], path: str) -> int:
        """Write results to a local path or s3:// URI, whole or not at all; returns the number of records. Not a
        coroutine.

        ``.json`` and ``.jsonl`` (also ``.gz``) hold one record per query, as returned. ``.csv`` and ``.parquet`` hold
        one row per ranked key: query_id, query, rank (from 1), key_id, key, relevance.
        """
        from rmsearch.storage.records import suffix_of, write_records

        nested = suffix_of(path).startswith("json")
        return write_records(path, (dict(each) for each in results) if nested else _flat_rows(results))

    # ---- life time

    async def start(self) -> Search:
        """Load the model now rather than at the first search."""
        await self._engine.call(_nothing)
        return self

    async def __aenter__(self) -> Search:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def close(self, *, kill: bool = False) -> None:
        """End the engine and free its memory; calls still running raise ClosedError.

        Not a coroutine; works inside a running event loop and may be called again. ``kill`` is accepted for
        compatibility: closing never waits for work that is not yet with the model.
        """
        self._engine.close()

    @property
    def stats(self) -> Any:
        """Counts of the engine since it was loaded (pairs, scored, tokens, truncated, seconds); None before."""
        return getattr(self._engine.scorer, "stats", None)

    @property
    def contract(self) -> Any:
        """How the loaded model was trained (template, length, head); None before it is loaded."""
        return getattr(self._engine.scorer, "contract", None)

    # ---- inside

    def _task(
        self, queries: Any, keys: Any, k: Any, candidates: Sequence[Sequence[int]] | None, block: int | None
    ) -> _Task:
        if self._by_row:
            raise InputError("llm_template takes a frame's row", remedy="Use search_by_df, or take (query, key)")
        k, every_key, every_query = whole_number(k, "k"), key_texts(keys), query_texts(queries)
        if candidates is None:
            unique_queries, unique_keys, pairs = Unique.of(every_query), Unique.of(every_key), None
        else:  # equal texts may have different candidates, so they stay apart; the engine still scores them once
            unique_queries, unique_keys = Unique.apart(every_query), Unique.apart(every_key)
            pairs = candidate_pairs(candidates, len(every_query), len(every_key))
        work = Work(unique_queries.texts, unique_keys.texts, pairs, self._prompt, block or self._query_block)
        return _Task(unique_queries, unique_keys, every_key, work, min(k, len(every_key)))

    async def _score(self, work: Work, put: Put, checkpoint: str | None, disable_log: bool, progress_bar: Any) -> None:
        """Have the engine score the work; ``put(work, positions, rewards)`` gets every position once."""
        if not len(work):
            return
        with _Reporter(len(work), disable_log, progress_bar) as reporter:
            await self._engine.call(self._model.scoring(work, put, checkpoint, reporter.advance))


@dataclass(frozen=True)
class SearchUpdate:
    """A state of a running search. done, total: unique (query, key) pairs; final: nothing more will change."""

    done: int
    total: int
    final: bool
    _task: _Task = field(repr=False, compare=False)
    _snapshot: tuple[np.ndarray, np.ndarray] = field(repr=False, compare=False)

    @cached_property
    def results(self) -> list[Result]:
        """The rankings so far, as a plain call returns them; a query with no score yet has no keys."""
        return self._task.results(self._snapshot, True)


@dataclass(frozen=True)
class _Task:
    """One call: its texts, its pairs, and how many keys each query gets."""

    queries: Unique
    keys: Unique
    every_key: list[str]
    work: Work
    k: int

    def board(self) -> TopK:
        """An empty ranking of the unique queries. ``k`` unique keys suffice: each stands for one key or more."""
        return TopK(len(self.queries.texts), min(self.k, len(self.keys.texts)))

    @cached_property
    def _key_ids(self) -> list[list[int]]:
        return self.keys.positions()

    def results(self, snapshot: tuple[np.ndarray, np.ndarray], relevance: bool) -> list[Result]:
        """Rankings (unique keys and scores, [queries, k]) as documented results."""
        keys, scores = snapshot
        ranked = [self._ranking(*row) for row in zip(keys.tolist(), scores.tolist(), strict=True)]
        return [
            {
                "query": self.queries.texts[row],
                "query_id": query_id,
                "keys": [_key_record(i, self.every_key[i], score if relevance else None) for i, score in ranked[row]],
            }
            for query_id, row in enumerate(self.queries.inverse.tolist())
        ]

    def _ranking(self, keys: list[int], scores: list[float]) -> list[tuple[int, float]]:
        """(key_id, score) of one query, equal texts with all their ids; empty slots (score -inf) are left out."""
        ids = self._key_ids
        found = [(i, score) for key, score in zip(keys, scores, strict=True) if score > -math.inf for i in ids[key]]
        return sorted(found, key=lambda item: (-item[1], item[0]))[: self.k]


def _key_record(key_id: int, key: str, relevance: float | None) -> dict[str, Any]:
    record: dict[str, Any] = {"key_id": key_id, "key": key}
    if relevance is not None:
        record["relevance"] = relevance
    return record


def _rank(board: TopK, work: Work, positions: np.ndarray, rewards: np.ndarray) -> None:
    board.add(*work.locate(positions), rewards)


async def _steps(waiter: asyncio.Future[None], board: TopK, seconds: float) -> AsyncGenerator[int, None]:
    """The number of scores so far, whenever it grew, at most once per ``seconds``, until ``waiter`` is done."""
    said = 0
    while not (await asyncio.wait({waiter}, timeout=seconds))[0]:
        if (done := board.added) > said:
            said = done
            yield done


async def _nothing(scorer: Scorer) -> None:
    """Work that only needs the model to be loaded."""


def _flat_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for result in results:
        for rank, key in enumerate(result["keys"], 1):
            yield {
                "query_id": result["query_id"],
                "query": result["query"],
                "rank": rank,
                "key_id": key["key_id"],
                "key": key["key"],
                "relevance": key.get("relevance"),
            }


class _Reporter:
    """Progress of one call, shown once it has run for a second, and for one call of the process at a time."""

    _shown = threading.Lock()

    def __init__(self, total: int, disable_log: bool, progress_bar: Any) -> None:
        self._total = total
        self._update: Callable[[int], Any] | None = getattr(progress_bar, "update", None)
        self._quiet = disable_log or progress_bar is False or self._update is not None
        self._show_at = time.monotonic() + 1
        self._stack = ExitStack()
        self._progress: Any = None
        self._before_shown = 0

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._quiet = True
        self._stack.close()

    def advance(self, pairs: int) -> None:
        """So many more pairs have their score."""
        if self._update is not None:
            self._update(pairs)
        if self._quiet:
            return
        if self._progress is None and not self._show():
            self._before_shown += pairs
            return
        self._progress.advance(pairs + self._before_shown)
        self._before_shown = 0

    def _show(self) -> bool:
        from rmsearch.progress import progress

        if time.monotonic() < self._show_at or not self._shown.acquire(blocking=False):
            return False
        self._stack.callback(self._shown.release)
        self._progress = self._stack.enter_context(progress("search", self._total, "pairs"))
        return True
