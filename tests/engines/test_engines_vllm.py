"""The real vLLM CPU build in this process: same rewards as transformers, adapters, vectors, text, and its death."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from rmsearch.engines import load_embedder, load_generator, load_scorer
from rmsearch.engines.generation import Sampling
from rmsearch.errors import ConfigError, ModelError, RetryableError
from rmsearch.models.contract import write_contract
from rmsearch.models.folder import ModelFolder
from rmsearch.models.resolve import make_contract
from rmsearch.prompts.templates import template

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUERIES = ["which gene is in cancer", "weather", "", "price of the train " * 9]
KEYS = ["protein and gene " * n for n in (1, 3, 9, 27)] + ["python code error", "", "recipe of salt water"]
PAIRS = [(query, key) for query in QUERIES for key in KEYS]
AGREE = 1e-4


def rewards(folder: Path, **options: object) -> np.ndarray:
    """Rewards of PAIRS through one engine, which is closed again."""
    scorer = load_scorer(str(folder), **options)  # type: ignore[arg-type]
    try:
        return asyncio.run(scorer.score(PAIRS))
    finally:
        scorer.close_sync()


def test_encoder_agrees_with_transformers_also_with_token_types(tmp_path: Path) -> None:
    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    expected = rewards(folder, engine="transformers", max_length=128)
    scorer = load_scorer(str(folder), engine="vllm", max_length=128)
    try:
        assert scorer.contract.token_types == "segment"
        assert np.abs(asyncio.run(scorer.score(PAIRS)) - expected).max() <= AGREE
        again = asyncio.run(scorer.score(PAIRS))  # a second event loop on the same engine
        assert np.abs(again - expected).max() <= AGREE

        async def many_callers() -> None:
            answers = await asyncio.gather(*(scorer.score([pair]) for pair in PAIRS))
            assert np.abs(np.concatenate(answers) - expected).max() <= AGREE

        asyncio.run(many_callers())
    finally:
        scorer.close_sync()
        scorer.close_sync()
    with pytest.raises(ConfigError, match="closed"):
        asyncio.run(scorer.score(PAIRS))


def test_decoder_with_adapter_agrees_with_transformers(tmp_path: Path) -> None:
    base = tiny_models.decoder_reward_model(tmp_path / "qwen3")
    adapter = tiny_models.lora_adapter(tmp_path / "adapter", base)
    options = {"template": "chat_key_first", "max_length": 256}
    expected = rewards(base, engine="transformers", **options)
    adapted = rewards(adapter, engine="transformers", **options)
    assert np.abs(expected - adapted).max() > 0.01
    assert np.abs(rewards(adapter, engine="vllm", **options) - adapted).max() <= AGREE
    assert np.abs(rewards(base, engine="vllm", **options) - expected).max() <= AGREE


def test_encoder_adapter_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSEARCH_CACHE", str(tmp_path / "cache"))
    base = tiny_models.bert_cross_encoder(tmp_path / "bert")
    write_contract(base, make_contract(ModelFolder(base), template("encoder"), 128))
    adapter = tiny_models.lora_adapter(tmp_path / "adapter", base)
    expected = rewards(adapter, engine="transformers")
    assert np.abs(rewards(adapter, engine="vllm") - expected).max() <= AGREE
    assert len(list((tmp_path / "cache" / "merged").iterdir())) == 1


def test_yes_no_reranker_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSEARCH_CACHE", str(tmp_path / "cache"))
    folder = tiny_models.causal_model(tmp_path / "Tiny-Reranker", tied=True)
    expected = rewards(folder, engine="transformers", max_length=512)
    assert np.abs(rewards(folder, engine="vllm", max_length=512) - expected).max() <= AGREE
    assert len(list((tmp_path / "cache" / "classifiers").iterdir())) == 1


def test_vectors_agree_with_transformers(tmp_path: Path) -> None:
    folder = tiny_models.sentence_encoder(tmp_path / "encoder")
    texts = [*KEYS, "long text " * 100]
    embedder = load_embedder(str(folder), engine="transformers")
    expected = asyncio.run(embedder.embed(texts))
    embedder = load_embedder(str(folder), engine="vllm")
    try:
        assert np.abs(asyncio.run(embedder.embed(texts)) - expected).max() <= 1e-5
    finally:
        embedder.close_sync()


def test_answers_follow_schema_and_choices_then_the_engine_dies(tmp_path: Path) -> None:
    folder = tiny_models.causal_model(tmp_path / "generator")
    generator = load_generator(str(folder), engine="vllm", max_length=512)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}

    async def use() -> None:
        plain = await generator.generate(["hello", "again"], sampling=Sampling(max_tokens=5, logprobs=2))
        assert [answer.tokens for answer in plain] == [5, 5]
        assert plain[0].finish == "length"
        assert len(plain[0].logprobs) == 5
        (answer,) = await generator.generate(["hello"], schema=schema, sampling=Sampling(max_tokens=64))
        assert isinstance(answer.parsed()["ok"], bool)
        answers = await generator.generate(["a", "b"], choices=["left", "right"])
        assert {each.text for each in answers} <= {"left", "right"}

    async def lose() -> None:
        core = generator.backend._engine.llm.engine_core.resources.engine_manager.processes[0]
        running = asyncio.create_task(generator.generate(["hello"] * 8, sampling=Sampling(max_tokens=400)))
        await asyncio.sleep(0.2)
        os.kill(core.pid, signal.SIGKILL)
        with pytest.raises(RetryableError, match="engine died"):
            await asyncio.wait_for(running, 60)
        with pytest.raises(RetryableError, match="engine died"):
            await asyncio.wait_for(generator.generate(["hello"]), 60)

    try:
        asyncio.run(use())
        asyncio.run(lose())
    finally:
        generator.close_sync()


def test_model_without_head_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.sentence_encoder(tmp_path / "encoder")
    with pytest.raises(ModelError, match="no reward head"):
        load_scorer(str(folder), engine="vllm")


def test_unknown_engine_argument_is_named(tmp_path: Path) -> None:
    folder = tiny_models.decoder_reward_model(tmp_path / "qwen3")
    with pytest.raises(ConfigError, match="no_such_argument"):
        load_scorer(str(folder), engine="vllm", no_such_argument=1)
