"""Search through its public door: the documented API, hostile arguments, concurrency, streams, checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsearch import Search
from rmsearch.engines.pairs import NumberedPairs
from rmsearch.errors import ConfigError, ContractError, ModelError, RetryableError, RMSearchError
from rmsearch.scoring.arguments import InputError
from rmsearch.scoring.service import ClosedError
from rmsearch.scoring.topk import TopK

QUERIES = ["which gene codes for the protein", "train price", "python error in code", "weather data"]
KEYS = [
    "market price of a train",
    "protein and gene data",
    "salt water recipe",
    "python code test",
    "cancer research",
    "weather in the market",
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.bert_cross_encoder(tmp_path_factory.mktemp("models") / "encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.decoder_reward_model(tmp_path_factory.mktemp("models") / "decoder"))


@pytest.fixture(scope="module")
def shared(encoder: str) -> Iterator[Search]:
    """One Search for all tests that do not close it: they run in event loops of their own, so this tests that too."""
    search = Search(encoder, engine="transformers")
    yield search
    search.close()


class TableScorer:
    """A scorer whose reward is a function of the texts; batches arrive in a random order and may fail or wait."""

    def __init__(self, reward: Any, *, seed: int = 0, fail_after: int | None = None, seconds: float = 0.0) -> None:
        self.contract, self.stats = None, SimpleNamespace(truncated=0)
        self.reward, self.seed, self.fail_after, self.seconds = reward, seed, fail_after, seconds
        self.asked: list[tuple[str, str]] = []
        self.closed = 0

    async def stream(self, pairs: Iterable[tuple[Any, str]]) -> AsyncGenerator[tuple[np.ndarray, np.ndarray], None]:
        chance = random.Random(self.seed)
        numbered = list(enumerate(pairs))
        chance.shuffle(numbered)
        while numbered:
            n = chance.randint(1, 7)
            batch, numbered = numbered[:n], numbered[n:]
            await asyncio.sleep(self.seconds)
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise RetryableError("the network is gone")
            self.asked += [pair for _, pair in batch]
            yield np.array([i for i, _ in batch]), np.array([self.reward(*pair) for _, pair in batch], np.float32)

    async def score(self, pairs: Any) -> np.ndarray:
        rewards = np.empty(len(pairs), np.float32)
        async for at, values in self.stream(pairs):
            rewards[at] = values
        return rewards

    async def close(self) -> None:
        self.closed += 1

    def close_sync(self) -> None:
        self.closed += 1


def length_reward(query: str, key: str) -> float:
    """A reward with many ties."""
    return float((len(query) * 7 + len(key) * 3) % 5)


def expected(queries: list[str], keys: list[str], k: int, reward: Any = length_reward) -> list[dict[str, Any]]:
    """What the documentation says, computed the plain way."""
    results = []
    for query_id, query in enumerate(queries):
        ranked = sorted(range(len(keys)), key=lambda i: (-reward(query, keys[i]), i))[:k]
        records = [{"key_id": i, "key": keys[i], "relevance": reward(query, keys[i])} for i in ranked]
        results.append({"query": query, "query_id": query_id, "keys": records})
    return results


def ids(results: list[dict[str, Any]]) -> list[list[int]]:
    return [[key["key_id"] for key in result["keys"]] for result in results]


# ---- the documented API (P1 to P12 of the compatibility list)


def test_p1_the_readme_snippet(encoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> list[dict[str, Any]]:
        search = Search(
            model_name=encoder,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
        )
        queries = ["Summarise retrieval augmented generation."]
        keys = [
            "Retrieval augmented generation (RAG) combines external documents with LLMs.",
            "An unrelated sentence about cooking pasta.",
        ]
        results = await search(queries, keys, k=1)
        print(results[0]["keys"][0])
        search.close()
        search.close()
        return results

    results = asyncio.run(main())
    assert "key" in capsys.readouterr().out
    assert [len(result["keys"]) for result in results] == [1]
    assert set(results[0]["keys"][0]) == {"key_id", "key", "relevance"}


async def test_p2_k_is_five_and_clipped(shared: Search) -> None:
    assert [len(result["keys"]) for result in await shared(QUERIES, KEYS)] == [5] * 4
    assert [len(result["keys"]) for result in await shared(QUERIES, KEYS[:2])] == [2] * 4
    results = await shared(QUERIES, KEYS, k=100)
    assert [sorted(found) for found in ids(results)] == [list(range(6))] * 4
    for result in results:
        scores = [key["relevance"] for key in result["keys"]]
        assert scores == sorted(scores, reverse=True)


async def test_p3_relevance_on_request(shared: Search) -> None:
    with_relevance = await shared(QUERIES, KEYS, k=1, return_relevance=True)
    assert isinstance(with_relevance[0]["keys"][0]["relevance"], float)
    without = await shared(QUERIES, KEYS, k=1, return_relevance=False)
    assert set(without[0]["keys"][0]) == {"key_id", "key"}
    assert ids(without) == ids(with_relevance)
    json.dumps(with_relevance)


async def test_p4_the_old_spelling(shared: Search) -> None:
    assert ids(await shared(queires=QUERIES, keys=KEYS)) == ids(await shared(QUERIES, KEYS))
    with pytest.raises(InputError, match="both given"):
        await shared(QUERIES, KEYS, queires=QUERIES)


async def test_p5_relevance_matrix(shared: Search) -> None:
    matrix = await shared.get_relevance(QUERIES + QUERIES[:1], KEYS + KEYS[:2])
    assert matrix.shape == (5, 8) and matrix.dtype == np.float32
    assert (matrix[4] == matrix[0]).all() and (matrix[:, 6:] == matrix[:, :2]).all()
    results = await shared(QUERIES, KEYS, k=6)
    for query_id, result in enumerate(results):
        for key in result["keys"]:
            assert key["relevance"] == pytest.approx(matrix[query_id, key["key_id"]], abs=1e-5)


async def test_p6_frames(shared: Search) -> None:
    frame = pd.DataFrame(
        {
            "query": [QUERIES[i % 2] for i in range(6)],
            "key": KEYS,
            "group": ["b", "a", "b", "a", "b", "b"],
            "k": [2, 1, 9, 9, 9, 9],
            "number": range(6),
        },
        index=[3, 3, 8, 8, 1, 1],
    )
    before = frame.copy(deep=True)
    matrix = await shared.get_relevance(QUERIES, KEYS)
    rewards = [float(matrix[i % 2, i]) for i in range(6)]
    best = sorted(range(6), key=lambda i: -rewards[i])
    rows = await shared.search_by_df(frame, k=3)
    assert [row["number"] for row in rows] == best[:3]
    assert [row["relevance"] for row in rows] == pytest.approx([rewards[i] for i in best[:3]], abs=1e-5)
    grouped = await shared.search_by_df(frame, topk_with_group=True)
    assert isinstance(grouped, dict) and list(grouped) == ["b", "a"]
    assert [row["number"] for row in grouped["b"]] == [i for i in best if i in (0, 2, 4, 5)][:2]
    assert len(grouped["a"]) == 1
    scored = await shared.get_relevance_by_df(frame)
    assert list(scored["relevance"]) == pytest.approx(rewards, abs=1e-5) and scored["relevance"].dtype == np.float32
    pd.testing.assert_frame_equal(frame, before)
    assert await shared.search_by_df(frame.iloc[:0]) == []
    assert len(await shared.get_relevance_by_df(frame.iloc[:0])) == 0


async def test_p7_a_converted_folder_with_score_pt(tmp_path: Path, decoder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(decoder)
    folder = tiny_models.causal_model(tmp_path / "model-converted-model")
    causal = AutoModelForCausalLM.from_pretrained(folder)
    causal.model.load_state_dict(classifier.model.state_dict())
    causal.save_pretrained(folder)
    torch.save(classifier.score.weight.data, folder / "score.pt")
    async with Search(str(folder), tensor_parallel_size=1) as converted, Search(decoder) as original:
        one, other = await converted.get_relevance(QUERIES, KEYS), await original.get_relevance(QUERIES, KEYS)
    assert np.abs(one - other).max() < 1e-4


async def test_p8_llm_template_and_query_batch_size(decoder: str) -> None:
    seen = []

    def write(query: str, key: str) -> str:
        seen.append((query, key))
        return f"<|im_start|>user\n{query}<|im_end|>\n{key}"

    async with (
        Search(decoder, llm_template=write, query_batch_size=2) as by_pair,
        Search(decoder, llm_template=lambda row: write(row["query"], row["key"])) as by_row,
        Search(decoder, llm_template="upstream_search") as named,
        Search(decoder) as plain,
    ):
        matrix = await by_pair.get_relevance(QUERIES, KEYS)
        assert sorted(seen) == sorted((query, key) for query in QUERIES for key in KEYS)
        frame = pd.DataFrame({"query": QUERIES, "key": KEYS[:4]})
        for search in (by_pair, by_row):
            scored = await search.get_relevance_by_df(frame)
            assert list(scored["relevance"]) == pytest.approx(matrix.diagonal(), abs=1e-5)
        with pytest.raises(InputError, match="search_by_df"):
            await by_row(QUERIES, KEYS)
        usual = await plain.get_relevance(QUERIES, KEYS)
        assert np.abs(usual - await named.get_relevance(QUERIES, KEYS)).max() < 1e-5
        assert np.abs(usual - matrix).max() > 1e-3


async def test_p9_chat_messages(shared: Search) -> None:
    messages = [{"role": "user", "content": "train price"}]
    as_object = SimpleNamespace(message=[SimpleNamespace(role="user", content="train price")])
    queries = [{"message": messages}, messages, as_object, "user: train price"]
    results = await shared(queries, KEYS, k=2, batch_size=2)
    assert [result["query"] for result in results] == ["user: train price"] * 4
    assert [result["keys"] for result in results] == [results[3]["keys"]] * 4


async def test_p10_save_results(shared: Search, tmp_path: Path) -> None:
    results = await shared(QUERIES, KEYS, k=2)
    assert shared.save_results(results, str(tmp_path / "new" / "results.json")) == 4
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
    shared.save_results(results, str(tmp_path / "results.jsonl"))
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == results
    for name, read in (("results.csv", pd.read_csv), ("results.parquet", pd.read_parquet)):
        assert shared.save_results(results, str(tmp_path / name)) == 8
        table = read(tmp_path / name)
        assert list(table.columns) == ["query_id", "query", "rank", "key_id", "key", "relevance"]
        assert list(table["key_id"]) == [i for found in ids(results) for i in found]
    with pytest.raises(ConfigError):
        shared.save_results(results, str(tmp_path / "results.docx"))


def test_p11_several_event_loops_and_many_callers(encoder: str) -> None:
    search = Search(encoder)
    frame = pd.DataFrame({"query": QUERIES, "key": KEYS[:4]})

    async def call(number: int) -> tuple[Any, Any]:
        queries, keys = [f"train {number}", "data"], [f"price {number} {i}" for i in range(number % 5 + 1)]
        return keys, await search(queries, keys, k=3)

    async def many() -> list[Any]:
        return await asyncio.gather(*(call(number) for number in range(64)))

    together = asyncio.run(many())
    for number in (0, 3, 17, 63):
        keys, alone = asyncio.run(call(number))
        assert keys == together[number][0]
        assert ids(alone) == ids(together[number][1])
    for keys, results in together:
        assert all(key["key"] == keys[key["key_id"]] for result in results for key in result["keys"])
        assert [len(result["keys"]) for result in results] == [min(3, len(keys))] * 2
    assert asyncio.run(search.get_relevance(QUERIES, KEYS)).shape == (4, 6)
    assert len(asyncio.run(search.search_by_df(frame))) == 4
    assert len(asyncio.run(search.get_relevance_by_df(frame))) == 4
    search.close()


def test_the_documented_module_name() -> None:
    import rmsearch.rmsearch

    assert rmsearch.rmsearch.Search is Search


# ---- arguments


async def test_duplicates_keep_their_ids_and_are_scored_once() -> None:
    scorer = TableScorer(length_reward)
    async with Search(scorer=scorer) as search:
        keys, queries = ["aa", "b", "aa", "ccc", "b"], ["q", "qq", "q"]
        assert await search(queries, keys, k=4) == expected(queries, keys, 4)
    assert len(scorer.asked) == len(set(scorer.asked)) == 6


async def test_empty_arguments(shared: Search) -> None:
    assert await shared([], KEYS) == []
    assert (await shared.get_relevance([], KEYS)).shape == (0, 6)
    for call in (shared(QUERIES, []), shared.get_relevance(QUERIES, [])):
        with pytest.raises(ConfigError, match="keys is empty"):
            await call
    with pytest.raises(ValueError, match="keys is empty"):
        await shared(QUERIES, [])
    assert (await shared(["", " "], ["", "a"], k=2))[0]["query"] == ""


@pytest.mark.parametrize(
    ("queries", "keys", "k", "said"),
    [
        (["a", None], ["b"], 1, r"queries\[1\]"),
        (["a", 3.5], ["b"], 1, r"queries\[1\]"),
        ([[{"role": "user"}]], ["b"], 1, r"queries\[0\]"),
        ([{"message": 3}], ["b"], 1, r"queries\[0\]"),
        (["a"], ["b", "c", None], 1, r"keys\[2\].*None"),
        (["a"], ["b", float("nan")], 1, r"keys\[1\]"),
        (["a"], [b"bytes"], 1, r"keys\[0\]"),
        ("a question", ["b"], 1, "queries is one str"),
        (["a"], "a key", 1, "keys is one str"),
        ({"a": 1}, ["b"], 1, "queries is one dict"),
        (None, ["b"], 1, "queries is missing"),
        (["a"], None, 1, "keys is missing"),
        (["a"], 7, 1, "keys is one int"),
        (["a"], ["b"], 0, "k is 0"),
        (["a"], ["b"], -3, "k is -3"),
        (["a"], ["b"], 2.5, "k is 2.5"),
        (["a"], ["b"], None, "k is None"),
    ],
)
async def test_arguments_that_cannot_be_used(shared: Search, queries: Any, keys: Any, k: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        await shared(queries, keys, k=k)
    assert caught.value.remedy and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=said):
        async for _ in shared.stream(queries, keys, k=k):
            pass


async def test_any_sequence_is_taken(shared: Search) -> None:
    usual = ids(await shared(QUERIES, KEYS))
    assert usual == ids(await shared(tuple(QUERIES), iter(KEYS), k=np.int64(5)))
    assert usual == ids(await shared(pd.Series(QUERIES), np.array(KEYS)))


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ([1], "df is a list"),
        (pd.DataFrame({"query": ["a"]}), "no column key"),
        (pd.DataFrame({"query": ["a"], "key": ["b"], "relevance": [1]}), "already has a column relevance"),
        (pd.DataFrame({"query": ["a"], "key": [None]}), r"df\['key'\]\[0\]"),
        (pd.DataFrame({"query": ["a", 3], "key": ["b", "c"]}), r"df\['query'\]\[1\]"),
        (pd.DataFrame([["a", "b", "c"]], columns=["query", "key", "key"]), "same name"),
    ],
)
async def test_frames_that_cannot_be_used(shared: Search, frame: Any, said: str) -> None:
    for call in (shared.search_by_df(frame), shared.get_relevance_by_df(frame)):
        with pytest.raises(InputError, match=said):
            await call


async def test_groups_that_cannot_be_used(shared: Search) -> None:
    frame = pd.DataFrame({"query": ["a"], "key": ["b"], "group": [None], "k": [1]})
    with pytest.raises(InputError, match="group is missing"):
        await shared.search_by_df(frame, topk_with_group=True)
    with pytest.raises(InputError, match="no column group, k"):
        await shared.search_by_df(frame[["query", "key"]], topk_with_group=True)
    with pytest.raises(InputError, match=r"df\['k'\]\[0\] is 0"):
        await shared.search_by_df(frame.assign(group="a", k=0), topk_with_group=True)


async def test_candidates() -> None:
    scorer = TableScorer(length_reward)
    async with Search(scorer=scorer) as search:
        keys, candidates = ["aa", "b", "aa", "ccc", "b"], [[4, 2, 2], [], [0, 1, 2, 3, 4]]
        results = await search(["q", "qq", "q"], keys, k=4, candidates=candidates)
        whole = expected(["q", "qq", "q"], keys, 5)
        for result, full, allowed in zip(results, whole, candidates, strict=True):
            assert result["keys"] == [key for key in full["keys"] if key["key_id"] in allowed][:4]
        for wrong in ([[0], [5], [1]], [[0], [-1], [1]], [[0.5], [], []], [["a"], [], []], [0, 1, 2], [[0]]):
            with pytest.raises(InputError, match="candidates"):
                await search(["q", "qq", "q"], keys, candidates=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "model_name is missing"),
        ({"model_name": "m", "tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
        ({"model_name": "m", "max_length": "long"}, "max_length is 'long'"),
        ({"model_name": "m", "query_batch_size": -1}, "query_batch_size is -1"),
        ({"model_name": "m", "llm_template": 3}, "llm_template is a int"),
        ({"model_name": "m", "llm_template": lambda: ""}, "neither"),
        ({"model_name": "m", "llm_template": lambda q, k: "", "template": "chat"}, "Give one of them"),
    ],
)
def test_settings_that_cannot_be_used(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Search(**options)


async def test_a_model_that_is_not_there_fails_at_first_use_for_every_caller(tmp_path: Path) -> None:
    search = Search(str(tmp_path / "nothing"))
    found = await asyncio.gather(*(search(QUERIES, KEYS) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(error, RMSearchError) and "nothing" in str(error) for error in found)
    search.close()
    unknown = Search(str(tmp_path), engine="abacus")
    with pytest.raises(ConfigError, match="abacus"):
        await unknown.start()
    unknown.close()


async def test_very_long_text_is_cut_counted_and_said_once(encoder: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Search(encoder, max_length=64) as search:
        with caplog.at_level(logging.WARNING, "rmsearch.search"):
            results = await search(["train"], ["price " * 200_000, "data"], k=2)
            await search(["weather"], ["price " * 100], k=2)
        assert len(results[0]["keys"]) == 2
        assert search.stats.truncated == 2
        assert sum("max_length" in record.message for record in caplog.records) == 1


async def test_a_reward_that_is_not_finite_is_an_error() -> None:
    async with Search(scorer=TableScorer(lambda query, key: float("nan"))) as search:
        with pytest.raises(ModelError, match="not finite"):
            await search(QUERIES, KEYS)
        with pytest.raises(ModelError, match="not finite"):
            await search.get_relevance(QUERIES, KEYS)


async def test_a_template_other_than_trained_with(tmp_path: Path) -> None:
    from rmsearch.models.contract import write_contract
    from rmsearch.models.folder import ModelFolder
    from rmsearch.models.resolve import make_contract
    from rmsearch.prompts.templates import template

    folder = tiny_models.decoder_reward_model(tmp_path / "trained")
    write_contract(folder, make_contract(ModelFolder(folder), template("chat"), 128))

    def write(query: str, key: str) -> str:
        return f"{key} {query}"

    for other in (write, "plain", "chat_key_first"):
        search = Search(str(folder), llm_template=other)
        with pytest.raises(ContractError, match="trained with the template 'chat'"):
            await search(QUERIES, KEYS)
        search.close()
        async with Search(str(folder), llm_template=other, allow_template_mismatch=True) as allowed:
            assert len(await allowed(QUERIES, KEYS)) == 4
    async with Search(str(folder), llm_template="chat") as same:
        assert len(await same(QUERIES, KEYS)) == 4
    with pytest.raises(InputError, match="returned NoneType"):
        async with Search(str(folder), llm_template=lambda q, k: None, allow_template_mismatch=True) as broken:  # type: ignore[arg-type,return-value]
            await broken(QUERIES, KEYS)


# ---- ranking


texts = st.lists(st.text("ab", max_size=3), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.integers(1, 15), st.integers(0, 9999), st.one_of(st.none(), st.integers(1, 4)), st.booleans())
def test_call_and_stream_equal_the_plain_computation(
    queries: list[str], keys: list[str], k: int, seed: int, block: int | None, key_first: bool
) -> None:
    """Random arrivals, duplicates and ties: the last update is the call's result, which is the sorted full grid."""

    async def both() -> tuple[Any, Any, Any]:
        scorer = TableScorer(length_reward, seed=seed)
        scorer.contract = SimpleNamespace(order="key_first" if key_first else "query_first")  # type: ignore[assignment]
        async with Search(scorer=scorer, query_batch_size=block) as search:  # type: ignore[arg-type]
            called = await search(queries, keys, k)
            assert len(scorer.asked) == len(set(queries)) * len(set(keys))
            updates = [update async for update in search.stream(queries, keys, k, updates_per_second=1e6)]
            return called, updates, await search.get_relevance(queries, keys)

    called, updates, matrix = asyncio.run(both())
    assert called == updates[-1].results == expected(queries, keys, k)
    assert matrix.tolist() == [[length_reward(query, key) for key in keys] for query in queries]
    assert [update.final for update in updates] == [False] * (len(updates) - 1) + [True]
    done = [update.done for update in updates]
    assert done[:-1] == sorted(set(done[:-1])) and updates[-1].done == updates[-1].total == done[-1]
    for before, after in itertools.pairwise(updates):  # rankings only improve
        for old, new in zip(before.results, after.results, strict=True):
            old_scores = [key["relevance"] for key in old["keys"]]
            assert all(a <= b["relevance"] for a, b in zip(old_scores, new["keys"], strict=False))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.lists(st.integers(0, 4), min_size=54, max_size=54), st.randoms())
def test_top_k_does_not_depend_on_the_order_of_arrival(queries: int, k: int, rewards: list[int], chance: Any) -> None:
    pairs = [(query, key) for query in range(queries) for key in range(9)]
    scores = {pair: float(reward) for pair, reward in zip(pairs, rewards, strict=False)}
    chance.shuffle(pairs)
    board = TopK(queries, k)
    while pairs:
        n = chance.randint(1, len(pairs))
        batch, pairs = pairs[:n], pairs[n:]
        board.add(*np.array(batch).T, np.array([scores[pair] for pair in batch], np.float32))
    found, _ = board.snapshot()
    for query in range(queries):
        assert found[query].tolist() == sorted(range(9), key=lambda key: (-scores[query, key], key))[:k]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 30), st.one_of(st.none(), st.integers(1, 40)), st.booleans(), st.integers(1, 9)
)
def test_a_grid_is_walked_once_in_every_order(
    queries: int, keys: int, block: int | None, key_first: bool, tile: int
) -> None:
    texts = [f"q{i}" for i in range(queries)], [f"k{i}" for i in range(keys)]
    pairs = NumberedPairs(*texts, key_first=key_first, block=block, tile=tile)
    query, key = pairs.locate(np.arange(len(pairs)))
    assert sorted(zip(query.tolist(), key.tolist(), strict=True)) == [
        (q, k) for q in range(queries) for k in range(keys)
    ]
    assert list(pairs.texts()) == [(f"q{q}", f"k{k}") for q, k in zip(query, key, strict=True)]
    if block:
        assert (query // block).tolist() == sorted((query // block).tolist())


async def test_memory_of_a_large_grid_is_that_of_its_ranking() -> None:
    """A million pairs with 3 keys kept per query: no full matrix, no list of pairs."""
    import tracemalloc

    class Counting(TableScorer):
        async def stream(self, pairs: Iterable[tuple[Any, str]]) -> AsyncGenerator[tuple[np.ndarray, np.ndarray], None]:
            from itertools import islice

            source, start = iter(pairs), 0
            while batch := list(islice(source, 8192)):
                at = np.arange(start, start + len(batch))
                start += len(batch)
                yield at, (at % 1009).astype(np.float32)

    async with Search(scorer=Counting(length_reward)) as search:  # type: ignore[arg-type]
        queries, keys = [f"q{i}" for i in range(1000)], [f"k{i}" for i in range(1000)]
        tracemalloc.start()
        results = await search(queries, keys, k=3, disable_log=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(results) == 1000 and peak < 12 << 20


# ---- life time


async def test_use_after_close_and_close_under_a_running_call() -> None:
    scorer = TableScorer(length_reward, seconds=0.05)
    search = Search(scorer=scorer)  # type: ignore[arg-type]
    running = asyncio.create_task(search(QUERIES, KEYS))
    waiting = asyncio.create_task(_last(search.stream(QUERIES, KEYS)))
    await asyncio.sleep(0.1)
    search.close()
    for task in (running, waiting):
        with pytest.raises(ClosedError, match="closed"):
            await task
    for call in (search(QUERIES, KEYS), search.get_relevance(QUERIES, KEYS), search.start()):
        with pytest.raises(ClosedError, match="Make a new Search"):
            await call
    search.close()
    assert scorer.closed == 1
    Search("never-loaded").close()


async def _last(updates: AsyncIterator[Any]) -> Any:
    return [update async for update in updates][-1]


async def test_cancelling_one_caller_leaves_the_others_alone() -> None:
    scorer = TableScorer(length_reward, seconds=0.01)
    async with Search(scorer=scorer) as search:  # type: ignore[arg-type]
        tasks = [asyncio.create_task(search([f"q{i}"], KEYS, k=3)) for i in range(8)]
        await asyncio.sleep(0.02)
        tasks[3].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[3], asyncio.CancelledError)
        for i, results in enumerate(done):
            assert i == 3 or results == expected([f"q{i}"], KEYS, 3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(search(QUERIES * 50, [f"{i}" for i in range(1000)]), 0.05)
        assert await search(QUERIES, KEYS, 2) == expected(QUERIES, KEYS, 2)


async def test_small_calls_share_batches_and_nothing_else(encoder: str) -> None:
    batches: list[int] = []

    class Refusing(TableScorer):
        async def score(self, pairs: Any) -> np.ndarray:
            batches.append(len(pairs))
            await asyncio.sleep(0.02)
            if any(query == "refused" for query, _ in pairs):
                raise ConfigError("this text is refused")
            return await super().score(pairs)

    async with Search(scorer=Refusing(length_reward)) as search:  # type: ignore[arg-type]
        queries = [f"q{i}" if i % 40 else "refused" for i in range(100)]
        calls = [asyncio.create_task(search([query], KEYS, 3)) for query in queries]
        await asyncio.sleep(0.03)
        calls[50].cancel()
        done = await asyncio.gather(*calls, return_exceptions=True)
        for i, (query, results) in enumerate(zip(queries, done, strict=True)):
            if query == "refused":
                assert isinstance(results, ConfigError)
            elif i == 50:
                assert isinstance(results, asyncio.CancelledError)
            else:
                assert results == expected([query], KEYS, 3)
    assert 6 < max(batches) <= 256

    async with Search(encoder) as search:
        calls = [
            asyncio.create_task(search([query], ["price", "\ud800"][: 1 + i % 2]))
            for i, query in enumerate(QUERIES * 8)
        ]
        done = await asyncio.gather(*calls, return_exceptions=True)
        for i, results in enumerate(done):
            assert isinstance(results, ConfigError if i % 2 else list)


async def test_breaking_out_of_a_stream_cancels_the_rest() -> None:
    scorer = TableScorer(length_reward, seconds=0.001)
    async with Search(scorer=scorer) as search:  # type: ignore[arg-type]
        keys = [f"key {i}" for i in range(20_000)]
        async for update in search.stream(["q"], keys, k=2, updates_per_second=50):
            assert not update.final and 0 < update.done < update.total == 20_000
            break
        await asyncio.sleep(0.1)
        asked = len(scorer.asked)
        await asyncio.sleep(0.2)
        assert len(scorer.asked) == asked < 20_000


async def test_updates_are_bounded_per_second(shared: Search) -> None:
    scorer = TableScorer(length_reward, seconds=0.002)
    async with Search(scorer=scorer) as search:  # type: ignore[arg-type]
        started = time.monotonic()
        updates = [
            update async for update in search.stream(QUERIES, [f"{i}" for i in range(200)], updates_per_second=20)
        ]
        seconds = time.monotonic() - started
    assert 2 <= len(updates) <= seconds * 20 + 1
    with pytest.raises(AttributeError):
        updates[0].done = 3  # type: ignore[misc]
    with pytest.raises(InputError, match="updates_per_second"):
        await _last(shared.stream(QUERIES, KEYS, updates_per_second=0))
    assert (await _last(shared.stream([], KEYS))).results == []


async def test_a_stream_equals_a_call_with_a_real_model(shared: Search) -> None:
    keys = [f"{key} {i}" for i in range(40) for key in KEYS]
    last = await _last(shared.stream(QUERIES, keys, k=7))
    assert last.final and last.done == last.total == 4 * 240
    assert last.results == await shared(QUERIES, keys, k=7)


async def test_an_error_of_the_engine_reaches_the_stream() -> None:
    async with Search(scorer=TableScorer(length_reward, fail_after=3)) as search:  # type: ignore[arg-type]
        with pytest.raises(RetryableError, match="network"):
            await _last(search.stream(QUERIES, KEYS))


def test_a_search_that_nobody_closes_ends_its_thread_and_its_process(encoder: str) -> None:
    before = set(threading.enumerate())

    async def use() -> None:
        search = Search(scorer=TableScorer(length_reward))  # type: ignore[arg-type]
        await search(QUERIES, KEYS)

    asyncio.run(use())
    gc.collect()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    code = (
        "import asyncio, sys\nfrom rmsearch import Search\nsearch = Search(sys.argv[1])\n"
        "print(len(asyncio.run(search(['a'], ['b', 'c']))[0]['keys']))"
    )
    done = subprocess.run([sys.executable, "-c", code, encoder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "2" and "Traceback" not in done.stderr, done.stderr


async def test_the_garbage_collector_may_close_in_the_engines_own_thread() -> None:
    scorer = TableScorer(length_reward)
    search = Search(scorer=scorer)  # type: ignore[arg-type]
    await search(QUERIES, KEYS)
    engine = search._engine
    assert engine._thread
    loop, thread = engine._thread._loop, engine._thread._thread
    loop.call_soon_threadsafe(engine.close)
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive() and scorer.closed == 1


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_is_told(shared: Search) -> None:
    asyncio.run(shared(QUERIES, KEYS))
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(shared(QUERIES, KEYS))
        except ConfigError as error:
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsearch import progress

    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.05)
    counted = SimpleNamespace(n=0)
    counted.update = lambda n: setattr(counted, "n", counted.n + n)
    keys = [f"{i}" for i in range(700)]

    async def main() -> None:
        async with Search(scorer=TableScorer(length_reward, seconds=0.01)) as search:  # type: ignore[arg-type]
            await asyncio.gather(search(["q"], keys), search(["q"], keys, progress_bar=counted))
            assert "progress stage=search" in capsys.readouterr().err
            await search(["q"], keys, disable_log=True)
            assert "progress" not in capsys.readouterr().err

    asyncio.run(main())
    assert counted.n == 700


# ---- checkpoints


async def test_a_checkpoint_pays_for_no_pair_twice(tmp_path: Path) -> None:
    path, paid = str(tmp_path / "scores.jsonl"), []
    for attempt, fail_after in enumerate((5, 9, None, None)):
        scorer = TableScorer(length_reward, seed=attempt, fail_after=fail_after)
        async with Search(scorer=scorer) as search:  # type: ignore[arg-type]
            with contextlib.suppress(RetryableError):
                assert await search(QUERIES, KEYS, k=3, checkpoint=path) == expected(QUERIES, KEYS, 3)
        paid += scorer.asked
        assert bool(scorer.asked) == (attempt < 3)
    assert sorted(paid) == sorted((query, key) for query in QUERIES for key in KEYS)
    scorer = TableScorer(length_reward)
    async with Search(scorer=scorer) as search:  # type: ignore[arg-type]
        more = await search([*QUERIES, "new"], KEYS[::-1], k=6, checkpoint=path)
        assert more == expected([*QUERIES, "new"], KEYS[::-1], 6)
        assert len(scorer.asked) == 6
        assert (await search.get_relevance(QUERIES, KEYS, checkpoint=path)).shape == (4, 6)
        last = await _last(search.stream(QUERIES, KEYS, 3, checkpoint=path))
        assert last.results == expected(QUERIES, KEYS, 3)
        frame = pd.DataFrame({"query": QUERIES, "key": KEYS[:4]})
        assert len(await search.search_by_df(frame, checkpoint=path)) == 4
        assert len(scorer.asked) == 6


async def test_checkpoints_of_real_models(
    tmp_path: Path, encoder: str, decoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    async with Search(encoder) as search:
        first = await search(QUERIES, KEYS, k=3, checkpoint=str(folder))
        assert [path.name for path in folder.iterdir()] == ["scores.journal"]
        assert first == await search(QUERIES, KEYS, k=3, checkpoint=str(folder))
        assert search.stats.scored == 24
    for other in (Search(decoder), Search(encoder, max_length=32), Search(decoder, llm_template=lambda q, k: k + q)):
        async with other:  # scores of another model, length or template are not taken
            await other(QUERIES, KEYS, checkpoint=str(folder))
            assert other.stats.scored == 24
    async with Search(decoder, llm_template=lambda q, k: k + q) as same:
        await same(QUERIES, KEYS, checkpoint=str(folder))
        assert same.stats.scored == 0


async def test_results_and_checkpoint_on_s3(s3_bucket: str, encoder: str) -> None:
    from rmsearch.storage.records import read_json

    async with Search(encoder) as search:
        first = await search(QUERIES, KEYS, k=3, checkpoint=f"{s3_bucket}/run/scores")
        assert first == await search(QUERIES, KEYS, k=3, checkpoint=f"{s3_bucket}/run/scores")
        assert search.stats.scored == 24
        search.save_results(first, f"{s3_bucket}/run/results.json")
        assert read_json(f"{s3_bucket}/run/results.json") == first
        with pytest.raises(RMSearchError, match="bucket"):
            await search(QUERIES, KEYS, checkpoint="s3://no-such-bucket-here/scores")


_KILLED = """
import asyncio, sys, time
from rmsearch import Search
from rmsearch.engines import dispatch

async def main():
    search = Search(sys.argv[1], max_batch_tokens=64)
    results = await search(["train price", "code"], [f"key {i}" for i in range(150)], k=4, checkpoint=sys.argv[2])
    print(search.stats.scored)
    search.save_results(results, sys.argv[3])
asyncio.run(main())
"""


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path, encoder: str) -> None:
    def start(name: str, checkpoint: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _KILLED, encoder, checkpoint, str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    journal, kept = tmp_path / "scores", 0
    killed = start("results.json", str(journal))
    while killed.poll() is None and kept < 40:
        with contextlib.suppress(FileNotFoundError):
            kept = journal.read_bytes().count(b"\n") - 1
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = journal.read_bytes().count(b"\n") - 1
    assert not (tmp_path / "results.json").exists() and 40 <= kept < 300
    again, whole = start("results.json", str(journal)), start("whole.json", str(tmp_path / "other"))
    scored = int(again.communicate(timeout=400)[0])
    assert scored == 300 - kept
    assert int(whole.communicate(timeout=400)[0]) == 300
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("results.json", "whole.json"))
    assert ids(first) == ids(second)
    for one, other in zip(first, second, strict=True):
        rewards = [[key["relevance"] for key in result["keys"]] for result in (one, other)]
        assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


# ---- a server


class LengthServer(BaseHTTPRequestHandler):
    """Answers /score as a vLLM server does; the reward is `length_reward`."""

    models: ClassVar[list[str]] = ["served"]
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._answer({"data": [{"id": name} for name in self.models]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(asked)
        pairs = zip(asked["text_1"], asked["text_2"], strict=True)
        self._answer({"data": [{"index": i, "score": length_reward(*pair)} for i, pair in enumerate(pairs)]})

    def _answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """No log."""


async def test_a_model_behind_a_server(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), LengthServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base_url, path = f"http://127.0.0.1:{server.server_port}", str(tmp_path / "scores")
    async with Search("served", base_url=base_url) as search:
        assert await search(QUERIES, KEYS, 3, checkpoint=path) == expected(QUERIES, KEYS, 3)
        calls = (search([f"q{i}"], KEYS, 2) for i in range(64))
        for i, results in enumerate(await asyncio.gather(*calls)):
            assert results == expected([f"q{i}"], KEYS, 2)
    server.shutdown()
    gone = Search("served", base_url="http://127.0.0.1:9", attempts=1)  # nothing listens there
    with pytest.raises(RetryableError):
        await gone(QUERIES, KEYS)
    gone.close()


async def test_the_only_model_of_a_server_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), LengthServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base_url, path = f"http://127.0.0.1:{server.server_port}", str(tmp_path / "scores")
    monkeypatch.setattr(LengthServer, "models", ["one"])
    monkeypatch.setattr(LengthServer, "asked", [])
    async with Search(base_url=base_url) as search:
        assert await search(QUERIES, KEYS, 3, checkpoint=path) == expected(QUERIES, KEYS, 3)
    assert all(body["model"] == "one" for body in LengthServer.asked)
    monkeypatch.setattr(LengthServer, "asked", [])
    async with Search(base_url=base_url) as search:
        assert await search(QUERIES, KEYS, 3, checkpoint=path) == expected(QUERIES, KEYS, 3)
    assert not LengthServer.asked
    monkeypatch.setattr(LengthServer, "models", ["another"])  # whose scores are others
    async with Search(base_url=base_url) as search:
        await search(QUERIES, KEYS, 3, checkpoint=path)
    assert len(LengthServer.asked) == 1 and LengthServer.asked[0]["model"] == "another"
    monkeypatch.setattr(LengthServer, "models", ["one", "another"])
    several = Search(base_url=base_url)
    with pytest.raises(ConfigError, match="the server has 2 models") as caught:
        await several.start()
    assert "one, another" in str(caught.value) and "\n" not in str(caught.value)
    several.close()
    with pytest.raises(InputError, match="model_name is missing"):
        Search(base_url=base_url, engine="transformers")
    server.shutdown()


# ---- vLLM


_VLLM = """
import asyncio, json, sys
from rmsearch import Search

async def call(search, number):
    return await search([f"train {number}"], ["price", "data code", "weather"], k=2)

async def main():
    search = Search(sys.argv[1], engine="vllm", dtype="float32", max_length=256)
    matrix = await search.get_relevance(["train price", "code"], ["python code test", "water", "market price"])
    many = await asyncio.gather(*(call(search, number) for number in range(16)))
    async for update in search.stream(["train"], [f"key {i}" for i in range(50)], k=3):
        last = update
    again = await asyncio.to_thread(asyncio.run, search.get_relevance(["code"], ["water"]))
    search.close()
    print(json.dumps({"matrix": matrix.tolist(), "many": len(many), "final": last.final, "again": again.tolist()}))

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.vllm
@pytest.mark.slow
async def test_vllm(tmp_path: Path, decoder: str) -> None:
    """The real vLLM engine: started in the background loop, shared by callers and loops, closed in a running loop."""
    pytest.importorskip("vllm")
    script = tmp_path / "script.py"
    script.write_text(_VLLM)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, str(script), decoder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    async with Search(decoder, engine="transformers", max_length=256) as search:
        matrix = await search.get_relevance(["train price", "code"], ["python code test", "water", "market price"])
    assert np.abs(matrix - np.array(found["matrix"])).max() < 1e-4
    assert found["many"] == 16 and found["final"] and abs(found["again"][0][0] - matrix[1, 1]) < 1e-4
