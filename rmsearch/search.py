"""Search: the best keys for each query, ranked by a reward model.

    search = Search("path/to/reward-model")
    results = await search(["how do I sort a list?"], ["list.sort()", "dict.get()"], k=1)
    search.close()

Results are ``[{"query", "query_id", "keys": [{"key_id", "key", "relevance"}]}]``, best first; ids are positions in the
arguments; ``relevance`` is the raw reward. Equal rewards go by key_id. Equal texts are scored once and keep their ids.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from rmsearch.engines import Scorer
from rmsearch.engines.pairs import NumberedPairs
from rmsearch.prompts.renderer import Query
from rmsearch.scoring.arguments import (
    InputError,
    candidate_pairs,
    frame_rows,
    group_limits,
    key_texts,
    optional_number,
    prompt_text,
    query_texts,
    takes_row,
    template_choice,
    whole_number,
)
from rmsearch.scoring.model import Arrived, SearchModel
from rmsearch.scoring.service import ClosedError, SharedScorer
from rmsearch.scoring.task import (
    RankedKey,
    Reporter,
    Result,
    SearchTask,
    SearchUpdate,
    UniqueTexts,
    flat_rows,
    numbered,
)
from rmsearch.scoring.topk import TopK
from rmsearch.storage.records import suffix_of, write_records

__all__ = ["ClosedError", "InputError", "RankedKey", "Result", "Search", "SearchUpdate"]


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
        self._model = SearchModel(str(model_name or ""), options, template, prompt, allow_template_mismatch, scorer)
        self._engine = SharedScorer(self._model.load)
        weakref.finalize(self, self._engine.close)  # a Search that nobody closed ends its engine when it goes away

    # ---- searching

    async def __call__(
        self,
        queries: Sequence[Query],
        keys: Sequence[str],
        k: int = 5,
        return_relevance: bool = True,
        disable_log: bool = False,
        progress_bar: Any = None,
        *,
        query_batch_size: int | None = None,
        candidates: Sequence[Sequence[int]] | None = None,
        checkpoint: str | None = None,
    ) -> list[Result]:
        """The ``k`` best keys of each query, best first.

        queries: strings, chat messages ([{"role", "content"}] or {"message": […]}), or objects with ``.message``.
        k: at most this many keys, clipped to what there is. candidates: per query the key_ids to consider (all by
        default). checkpoint: a file, folder or s3:// URI that keeps every score as it arrives; the same call with it
        goes on where the last one stopped, other texts for the same model add to it. It stays until you delete it.
        disable_log: no progress lines. progress_bar: False for none, or an object with ``update(n)`` such as tqdm's.
        query_batch_size: as for the constructor, for this call.
        """
        task = self._task(queries, keys, k, candidates, optional_number(query_batch_size, "query_batch_size"))
        board = task.board()
        await self._score(task.pairs, partial(_rank, board), checkpoint, disable_log, progress_bar)
        return task.results(board.snapshot(), return_relevance)

    async def stream(
        self,
        queries: Sequence[Query],
        keys: Sequence[str],
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
        board, total = task.board(), len(task.pairs)
        if total:
            future = self._engine.submit(self._model.scoring(task.pairs, partial(_rank, board), checkpoint))
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
        queries: Sequence[Query],
        keys: Sequence[str],
        disable_log: bool = False,
        progress_bar: Any = None,
        *,
        checkpoint: str | None = None,
    ) -> np.ndarray:
        """Rewards of every query with every key: a numpy float32 array [len(queries), len(keys)]."""
        task = self._task(queries, keys, 1, None, None)
        matrix = np.empty((len(task.queries.texts), len(task.keys.texts)), np.float32)

        def arrived(pairs: NumberedPairs, positions: np.ndarray, rewards: np.ndarray) -> None:
            matrix[pairs.locate(positions)] = rewards

        await self._score(task.pairs, arrived, checkpoint, disable_log, progress_bar)
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
        rows = frame_rows(df, () if self._by_row else ("query", "key"), ())
        rewards = await self._score_frame(df, rows, checkpoint, disable_log, progress_bar)
        scored = df.copy()
        scored["relevance"] = np.array(rewards, np.float32)
        return scored

    async def _score_frame(
        self, df: Any, rows: list[dict[str, Any]], checkpoint: str | None, disable_log: bool, progress_bar: Any
    ) -> list[float]:
        """The reward of each row of a frame."""
        if not rows:
            return []
        if self._by_row and self._prompt is not None:
            queries = UniqueTexts.of([""] * len(rows))
            keys = UniqueTexts.of([prompt_text(self._prompt, row) for _, row in df.iterrows()])
        else:
            queries = UniqueTexts.of(query_texts([row["query"] for row in rows], "df['query']"))
            keys = UniqueTexts.of(key_texts([row["key"] for row in rows], "df['key']"))
        chosen, inverse = np.unique(np.stack([queries.inverse, keys.inverse], axis=1), axis=0, return_inverse=True)
        rewards = np.empty(len(chosen), np.float32)

        def arrived(pairs: NumberedPairs, positions: np.ndarray, values: np.ndarray) -> None:
            rewards[positions] = values

        pairs = numbered(queries, keys, chosen, None if self._by_row else self._prompt)
        await self._score(pairs, arrived, checkpoint, disable_log, progress_bar)
        return rewards[inverse.reshape(-1)].tolist()

    # ---- results on disk

    def save_results(self, results: Sequence[Mapping[str, Any]], path: str) -> int:
        """Write results to a local path or s3:// URI, whole or not at all; returns the number of records. Not a
        coroutine.

        ``.json`` and ``.jsonl`` (also ``.gz``) hold one record per query, as returned. ``.csv`` and ``.parquet`` hold
        one row per ranked key: query_id, query, rank (from 1), key_id, key, relevance.
        """
        nested = suffix_of(path).startswith("json")
        return write_records(path, (dict(each) for each in results) if nested else flat_rows(results))

    # ---- life time

    async def start(self) -> Self:
        """Load the model now rather than at the first search."""
        await self._engine.call(_nothing)
        return self

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End the engine and free its memory; calls still running raise ClosedError.

        Not a coroutine; works inside a running event loop and may be called again. It waits for no work that is not yet
        with the model.
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
    ) -> SearchTask:
        if self._by_row:
            raise InputError("llm_template takes a frame's row", remedy="Use search_by_df, or take (query, key)")
        k, every_key, every_query = whole_number(k, "k"), key_texts(keys), query_texts(queries)
        chosen = None if candidates is None else candidate_pairs(candidates, len(every_query), len(every_key))
        return SearchTask.of(every_query, every_key, k, chosen, self._prompt, block or self._query_block)

    async def _score(
        self, pairs: NumberedPairs, arrived: Arrived, checkpoint: str | None, disable_log: bool, progress_bar: Any
    ) -> None:
        """Have the engine score the pairs; ``arrived(pairs, positions, rewards)`` gets every position once."""
        if not len(pairs):
            return
        with Reporter(len(pairs), disable_log, progress_bar) as reporter:
            await self._engine.call(self._model.scoring(pairs, arrived, checkpoint, reporter.advance))


def _rank(board: TopK, pairs: NumberedPairs, positions: np.ndarray, rewards: np.ndarray) -> None:
    board.add(*pairs.locate(positions), rewards)


async def _steps(waiter: asyncio.Future[None], board: TopK, seconds: float) -> AsyncGenerator[int, None]:
    """The number of scores so far, whenever it grew, at most once per ``seconds``, until ``waiter`` is done."""
    said = 0
    while not (await asyncio.wait({waiter}, timeout=seconds))[0]:
        if (done := board.added) > said:
            said = done
            yield done


async def _nothing(scorer: Scorer) -> None:
    """Work that only needs the model to be loaded."""
