"""The scheduler: every pair answered once and in its place, bounded, fair, and nothing left behind on failure."""

from __future__ import annotations

import asyncio
import itertools
import tracemalloc
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsearch.engines import pairs as pairs_module
from rmsearch.engines import scheduler as scheduler_module
from rmsearch.engines.dispatch import Limits, split_batches
from rmsearch.engines.pairs import NumberedPairs
from rmsearch.engines.scheduler import PairScorer
from rmsearch.errors import ConfigError, ModelError
from rmsearch.prompts.renderer import Renderer
from rmsearch.prompts.templates import template

TEXTS = st.sampled_from(["", "a", "b", "gene", "protein cancer", "weather " * 5, "price of train " * 20])
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), max_size=40)
RENDERER = Renderer(tiny_models.bert_tokenizer(), template("encoder_segment"), 48)


def true_reward(ids: Sequence[int]) -> float:
    """A reward that depends on every token and its place."""
    return float(sum((i + 1) * token for i, token in enumerate(ids)) % 99991)


def expected(pairs: Sequence[tuple[str, str]]) -> list[float]:
    return [true_reward(RENDERER.render(*pair).ids) for pair in pairs]


class Backend:
    """Answers with true_reward after some turns of the loop; keeps what it was sent."""

    def __init__(
        self, *, turns: Sequence[int] = (0,), seconds: float = 0, fail_at: int | None = None, **limits: Any
    ) -> None:
        defaults: dict[str, Any] = {"batch_tokens": 200, "batch_size": 5, "in_flight": 3}
        self.limits = Limits(**(defaults | {"padded": True, "prefix_cache": False} | limits))
        self.sent: list[list[int]] = []
        self.batches = self.most_at_once = self.now = self.cancelled = self.closed = 0
        self._turns, self._seconds, self._fail_at = itertools.cycle(turns), seconds, fail_at

    async def forward(self, batch: list[Any]) -> np.ndarray:
        self.batches += 1
        if self._fail_at == self.batches:
            raise ModelError("this batch fails")
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            for _ in range(next(self._turns)):
                await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        self.sent += [each.ids for each in batch]
        return np.array([true_reward(each.ids) for each in batch], dtype=np.float32)

    async def close(self) -> None:
        self.closed += 1

    def close_sync(self) -> None:
        self.closed += 1


async def nothing_left(backend: Backend) -> None:
    """No batch runs and no task of the scheduler is alive."""
    await asyncio.sleep(0)
    assert backend.now == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


@settings(max_examples=150, deadline=None)
@given(
    pairs=PAIRS,
    turns=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    in_flight=st.integers(1, 4),
    size=st.integers(1, 6),
    padded=st.booleans(),
    prefix_cache=st.booleans(),
)
def test_every_pair_is_answered_in_its_place_and_sent_once(
    pairs: list[tuple[str, str]], turns: list[int], in_flight: int, size: int, padded: bool, prefix_cache: bool
) -> None:
    backend = Backend(turns=turns, in_flight=in_flight, batch_size=size, padded=padded, prefix_cache=prefix_cache)
    scorer = PairScorer(backend, RENDERER, None)

    async def use() -> None:
        assert (await scorer.score(pairs)).tolist() == expected(pairs)
        await nothing_left(backend)

    asyncio.run(use())
    assert len(backend.sent) == len(set(pairs)) == scorer.stats.scored
    assert scorer.stats.pairs == len(pairs)
    assert backend.most_at_once <= in_flight


async def gathered(scorer: PairScorer, pairs: Any) -> dict[int, float]:
    """All answers of a stream by position, each of which comes once."""
    answers: dict[int, float] = {}
    async for positions, rewards in scorer.stream(pairs):
        for position, reward in zip(positions.tolist(), rewards.tolist(), strict=True):
            assert position not in answers
            answers[position] = reward
    return answers


@settings(max_examples=60, deadline=None)
@given(
    queries=st.lists(TEXTS, max_size=6),
    keys=st.lists(TEXTS, max_size=6),
    window=st.integers(1, 20),
    key_first=st.booleans(),
    part=st.one_of(st.none(), st.lists(st.integers(0, 35), max_size=12)),
)
def test_numbered_pairs_are_answered_in_their_places_and_unique_texts_scored_once(
    queries: list[str], keys: list[str], window: int, key_first: bool, part: list[int] | None
) -> None:
    """A whole grid, and some of its pairs, which may come again."""
    pairs = NumberedPairs(queries, keys, key_first=key_first)
    if part is not None and len(pairs):
        pairs = pairs.at(np.array(part, np.int64) % len(pairs))
    backend = Backend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "WINDOW", window)
        answers = asyncio.run(gathered(PairScorer(backend, RENDERER, None), pairs))
    assert [answers[i] for i in range(len(pairs))] == expected(list(pairs))
    assert len(backend.sent) == len(set(pairs))
    if part is None:
        assert sorted(pairs) == sorted((q, k) for q in queries for k in keys)
        assert len(backend.sent) == len(set(queries)) * len(set(keys))


@pytest.mark.parametrize("order", ["query_first", "key_first"])
def test_a_prefix_cache_gets_the_shared_beginnings_of_numbered_pairs_together(order: str) -> None:
    class Contract:
        pass

    Contract.order = order  # type: ignore[attr-defined]
    name = "encoder_key_first" if order == "key_first" else "encoder_segment"
    backend = Backend(padded=False, prefix_cache=True, batch_size=100, batch_tokens=10**6, in_flight=1)
    scorer = PairScorer(backend, Renderer(tiny_models.bert_tokenizer(), template(name), 48), Contract())  # type: ignore[arg-type]
    texts = [f"query {i}" for i in range(7)], [f"key {i}" for i in range(5)]
    asyncio.run(gathered(scorer, NumberedPairs(*texts, key_first=order == "key_first", distinct=True)))
    firsts = [tuple(ids[: ids.index(3)]) for ids in backend.sent]  # [SEP] in the tiny vocabulary
    assert len(list(itertools.groupby(firsts))) == len(set(firsts)) == len(texts[order == "key_first"])


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, window=st.integers(1, 9), turns=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_stream_answers_every_position_once_across_windows(
    pairs: list[tuple[str, str]], window: int, turns: list[int]
) -> None:
    backend = Backend(turns=turns)
    scorer = PairScorer(backend, RENDERER, None)

    async def use() -> None:
        answers = await gathered(scorer, iter(pairs))
        assert [answers[i] for i in range(len(pairs))] == expected(pairs)
        await nothing_left(backend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "WINDOW", window)
        asyncio.run(use())
    assert len(backend.sent) == len(set(pairs))


@settings(max_examples=80, deadline=None)
@given(pairs=PAIRS.filter(bool), fail_at=st.integers(1, 8), turns=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_failing_batch_is_raised_and_leaves_nothing_behind(
    pairs: list[tuple[str, str]], fail_at: int, turns: list[int]
) -> None:
    backend = Backend(turns=turns, fail_at=fail_at, batch_size=2)
    scorer = PairScorer(backend, RENDERER, None)

    async def use() -> None:
        try:
            async with asyncio.timeout(10):
                await scorer.score(pairs)
        except ModelError as error:
            assert "this batch fails" in str(error)
        else:
            assert backend.batches < fail_at
        await nothing_left(backend)
        backend._fail_at = None
        assert (await scorer.score(pairs[:1])).tolist() == expected(pairs[:1]), "it works on after a failure"

    asyncio.run(use())


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    tokens=st.integers(1, 100),
    size=st.integers(1, 8),
    padded=st.booleans(),
)
def test_batches_cover_all_rows_within_the_budget(lengths: list[int], tokens: int, size: int, padded: bool) -> None:
    limits = Limits(batch_tokens=tokens, batch_size=size, in_flight=1, padded=padded, prefix_cache=False)
    parts = [lengths[part] for part in split_batches(np.array(lengths, dtype=np.int64), limits)]
    assert list(itertools.chain.from_iterable(parts)) == lengths
    for part in parts:
        cost = max(part) * len(part) if padded else sum(part)
        assert len(part) == 1 or (cost <= tokens and len(part) <= size)


async def test_cancelling_a_caller_stops_its_work_and_no_one_elses() -> None:
    backend = Backend(turns=[1], seconds=0.005)
    scorer = PairScorer(backend, RENDERER, None)
    mine = [("mine", f"key {i}") for i in range(30)]
    other = [("other", f"key {i}") for i in range(30)]
    first, second = asyncio.create_task(scorer.score(mine)), asyncio.create_task(scorer.score(other))
    while not backend.sent:
        await asyncio.sleep(0.001)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).tolist() == expected(other)
    await nothing_left(backend)
    assert len(backend.sent) < 60


async def test_small_caller_is_not_kept_waiting_by_a_large_one() -> None:
    backend = Backend(turns=[1], seconds=0.005, batch_size=2, in_flight=2)
    scorer = PairScorer(backend, RENDERER, None)
    large = asyncio.create_task(scorer.score([("large", f"key {i}") for i in range(400)]))
    while len(backend.sent) < 10:
        await asyncio.sleep(0.001)
    before = len(backend.sent)
    await scorer.score([("small", "key")])
    assert len(backend.sent) - before < 60
    await large


async def test_concurrent_callers_get_their_own_answers() -> None:
    backend = Backend(turns=[2, 0, 5])
    scorer = PairScorer(backend, RENDERER, None)
    asked = [[(f"query {n}", f"key {i}") for i in range(n)] for n in range(12)]
    answers = await asyncio.gather(*(scorer.score(pairs) for pairs in asked))
    assert [answer.tolist() for answer in answers] == [expected(pairs) for pairs in asked]
    assert backend.most_at_once <= backend.limits.in_flight


async def test_stream_reads_no_further_than_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "WINDOW", 8)
    read = 0

    def endless() -> Any:
        nonlocal read
        for i in itertools.count():
            read = i
            yield "query", f"key {i % 20}"

    backend = Backend()
    async with aclosing(PairScorer(backend, RENDERER, None).stream(endless())) as stream:
        seen = 0
        async for positions, _ in stream:
            seen += len(positions)
            if seen >= 100:
                break
    assert read < 200
    await nothing_left(backend)
    assert len(backend.sent) == 20


def test_prefix_cache_gets_shared_beginnings_together() -> None:
    class Contract:
        order = "key_first"

    backend = Backend(padded=False, prefix_cache=True, batch_size=100, batch_tokens=10**6, in_flight=1)
    scorer = PairScorer(backend, Renderer(tiny_models.bert_tokenizer(), template("encoder_key_first"), 48), Contract())
    asyncio.run(scorer.score([(f"query {i % 7}", f"key {i % 5}") for i in range(35)]))
    between = backend.sent[0].index(3)  # [SEP] in the tiny vocabulary
    firsts = [tuple(ids[:between]) for ids in backend.sent]
    assert len(list(itertools.groupby(firsts))) == len(set(firsts)) == 5


def test_reward_that_is_no_number_is_refused() -> None:
    class Broken(Backend):
        async def forward(self, batch: list[Any]) -> np.ndarray:
            return np.full(len(batch), np.nan, dtype=np.float32)

    with pytest.raises(ModelError, match="no finite number"):
        asyncio.run(PairScorer(Broken(), RENDERER, None).score([("a", "b")]))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([("a", "b"), (None, "b")], r"pairs\[1\] query.*not None"),
        ([("a", None)], r"pairs\[0\] key.*not None"),
        ([("a", 3.5)], r"pairs\[0\] key.*float"),
        ([("a", "b", "c")], r"pairs\[0\]: a pair is"),
        ([None], r"pairs\[0\]: a pair is"),
    ],
)
def test_what_is_no_pair_is_named(pairs: list[Any], words: str) -> None:
    scorer = PairScorer(Backend(), RENDERER, None)
    with pytest.raises(ConfigError, match=words):
        asyncio.run(scorer.score(pairs))


def test_what_is_no_text_is_named_far_into_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "WINDOW", 4)
    scorer = PairScorer(Backend(), RENDERER, None)

    async def read() -> None:
        async for _ in scorer.stream([("a", f"{i}") for i in range(9)] + [("a", None)]):  # type: ignore[list-item]
            pass

    with pytest.raises(ConfigError, match=r"pairs\[9\]"):
        asyncio.run(read())


async def test_closing_is_final_and_harmless_twice() -> None:
    backend = Backend()
    scorer = PairScorer(backend, RENDERER, None)
    await scorer.close()
    scorer.close_sync()
    assert backend.closed == 1
    with pytest.raises(ConfigError, match="closed"):
        await scorer.score([("a", "b")])


def test_memory_of_a_long_stream_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "REMEMBERED", 2_000)
    monkeypatch.setattr(scheduler_module, "WINDOW", 500)

    class Null(Backend):
        async def forward(self, batch: list[Any]) -> np.ndarray:
            return np.zeros(len(batch), dtype=np.float32)

    scorer = PairScorer(Null(batch_size=100, batch_tokens=10**6), RENDERER, None)

    async def peak(count: int) -> int:
        tracemalloc.start()
        async for _ in scorer.stream((f"query {i}", "key") for i in range(count)):
            pass
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    asyncio.run(peak(1_000))
    small, large = asyncio.run(peak(5_000)), asyncio.run(peak(20_000))
    assert large < small * 1.5 + 4_000_000
