"""The http engine: against a small scripted server (retries, refusals, routes) and against real vLLM servers."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from vllm_server import vllm_server

from rmsearch.engines import load_embedder, load_generator, load_scorer, server
from rmsearch.engines.generation import Sampling
from rmsearch.errors import ConfigError, ModelError, RetryableError
from rmsearch.models.contract import write_contract
from rmsearch.models.folder import ModelFolder
from rmsearch.models.resolve import make_contract
from rmsearch.prompts.templates import template

Answer = tuple[int, Any]
PAIRS = [(f"query {i % 3}", f"key {i}") for i in range(7)]


class Scripted:
    """A server whose answer to each request is a function of (path, body); it keeps what it was asked."""

    def __init__(self, answer: Callable[[str, Any], Answer], models: Any = None) -> None:
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        self.most_at_once = self._now = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = models if models is not None else {"data": [{"id": "m", "max_model_len": 512}]}
                self.reply(200, found)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.asked.append((self.path, body, dict(self.headers)))
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                status, value = answer(self.path, body)
                with lock:
                    outer._now -= 1
                self.reply(status, value)

            def reply(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(answer: Callable[[str, Any], Answer], **options: Any) -> Scripted:
        servers.append(Scripted(answer, **options))
        return servers[-1]

    yield start
    for each in servers:
        each.stop()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(server, "LONGEST_WAIT", 0.05)


def reward(query: str, key: str) -> float:
    """What the scripted servers answer."""
    return float(sum(map(ord, query)) * 10 + sum(map(ord, key)))


def scoring(path: str, body: Any) -> Answer:
    """A server with /score and /rerank, whose items come in reverse."""
    if path == "/score":
        items = [
            {"index": i, "score": reward(q, k)}
            for i, (q, k) in enumerate(zip(body["text_1"], body["text_2"], strict=True))
        ]
        return 200, {"data": items[::-1]}
    if path == "/rerank":
        items = [{"index": i, "relevance_score": reward(body["query"], k)} for i, k in enumerate(body["documents"])]
        return 200, {"results": items[::-1]}
    return 404, {"detail": "Not Found"}


EXPECTED = np.array([reward(q, k) for q, k in PAIRS], dtype=np.float32)


@pytest.mark.parametrize("route", ["auto", "score", "rerank"])
def test_foreign_server_gets_texts(serve: Callable[..., Scripted], route: str) -> None:
    server = serve(scoring)
    scorer = load_scorer("m", base_url=f"{server.url}/v1/", route=route)
    assert asyncio.run(scorer.score(PAIRS + PAIRS)).tolist() == [*EXPECTED, *EXPECTED]
    assert scorer.stats.scored == len(PAIRS)
    assert all(body["use_activation"] is False and body["model"] == "m" for _, body, _ in server.asked)
    scorer.close_sync()


def test_server_without_score_is_asked_to_rerank(serve: Callable[..., Scripted]) -> None:
    server = serve(lambda path, body: scoring(path, body) if path == "/rerank" else (404, {}))
    scorer = load_scorer("m", base_url=server.url)
    assert asyncio.run(scorer.score(PAIRS)).tolist() == EXPECTED.tolist()
    scorer.close_sync()


def test_busy_server_is_asked_again_and_never_too_often_at_once(serve: Callable[..., Scripted]) -> None:
    failures = iter([429, 503, 500, 502])

    def answer(path: str, body: Any) -> Answer:
        status = next(failures, 200)
        time.sleep(0.01)
        return scoring(path, body) if status == 200 else (status, {"error": "busy"})

    server = serve(answer)
    scorer = load_scorer("m", base_url=server.url, concurrency=2)
    pairs = [("q", f"key {i}") for i in range(64 * 6)]
    assert len(asyncio.run(scorer.score(pairs))) == len(pairs)
    assert server.most_at_once <= 2
    assert len(server.asked) == 6 + 4
    scorer.close_sync()


def test_dead_server_is_retryable(serve: Callable[..., Scripted]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RetryableError, match=r"does not answer.*\(3 tries\)") as error:
            load_scorer("m", base_url=url, attempts=3)
    assert error.value.exit_code == 75
    server = serve(lambda *_: (503, {"error": "loading"}))
    scorer = load_scorer("m", base_url=server.url, attempts=2)
    with pytest.raises(RetryableError, match="answers 503"):
        asyncio.run(scorer.score(PAIRS))
    scorer.close_sync()


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [(400, ModelError, "too long by far"), (401, ConfigError, "RMSEARCH_API_KEY"), (422, ModelError, "too long")],
)
def test_refusal_is_one_line_and_not_repeated(
    serve: Callable[..., Scripted], status: int, kind: type[Exception], words: str
) -> None:
    server = serve(lambda *_: (status, {"error": {"message": "too long by far"}}))
    scorer = load_scorer("m", base_url=server.url)
    with pytest.raises(kind, match=words) as error:
        asyncio.run(scorer.score(PAIRS))
    assert "\n" not in str(error.value)
    assert len(server.asked) == 1
    scorer.close_sync()


def test_answers_that_are_no_rewards_are_refused(serve: Callable[..., Scripted]) -> None:
    for answer in ({"data": [{"index": 0, "score": 1.0}]}, {"other": 1}, {"data": [{"index": 99, "score": 1.0}]}):
        server = serve(lambda *_, answer=answer: (200, answer))
        scorer = load_scorer("m", base_url=server.url)
        with pytest.raises(ModelError):
            asyncio.run(scorer.score(PAIRS))
        scorer.close_sync()


def test_key_goes_into_the_header_only(
    serve: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "other-secret")
    monkeypatch.setenv("RMSEARCH_API_KEY", "top-secret")
    caplog.set_level(logging.DEBUG)
    server = serve(lambda *_: (401, {"error": "wrong key"}))
    scorer = load_scorer("m", base_url=server.url)
    with pytest.raises(ConfigError) as error:
        asyncio.run(scorer.score(PAIRS))
    headers = {name.lower(): value for name, value in server.asked[0][2].items()}
    assert headers["authorization"] == "Bearer top-secret"
    assert "top-secret" not in str(error.value) + caplog.text
    scorer.close_sync()


def test_wrong_model_and_wrong_address_are_named(serve: Callable[..., Scripted]) -> None:
    server = serve(scoring, models={"data": [{"id": "one"}, {"id": "two"}]})
    with pytest.raises(ConfigError, match="It has one, two"):
        load_scorer("three", base_url=server.url)
    with pytest.raises(ConfigError, match="is no address"):
        load_scorer("m", base_url="localhost:8000")
    with pytest.raises(ConfigError, match="needs base_url"):
        load_scorer("m", engine="http")
    with pytest.raises(ConfigError, match="no folder here"):
        load_scorer("one", base_url=server.url, template="plain")
    with pytest.raises(ConfigError, match="does not know colour"):
        load_scorer("one", base_url=server.url, colour="red")


def test_own_model_is_sent_as_ids_and_checked_against_the_server(
    serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    folder = tiny_models.decoder_reward_model(tmp_path / "qwen3")
    write_contract(folder, make_contract(ModelFolder(folder), template("plain"), 64))

    def answer(path: str, body: Any) -> Answer:
        items = [{"index": i, "probs": [float(sum(ids))]} for i, ids in enumerate(body["input"])]
        return (200, {"data": items}) if path == "/classify" else (404, {})

    server = serve(answer)
    scorer = load_scorer(str(folder), base_url=server.url)
    expected = [float(sum(scorer.renderer.render(q, k).ids)) for q, k in PAIRS]
    assert asyncio.run(scorer.score(PAIRS)).tolist() == expected
    scorer.close_sync()
    with pytest.raises(ConfigError, match="without the template"):
        load_scorer(str(folder), base_url=server.url, route="score")
    small = serve(answer, models={"data": [{"id": "m", "max_model_len": 32}]})
    with pytest.raises(ConfigError, match="--max-model-len 64"):
        load_scorer(str(folder), base_url=small.url)


def test_model_with_token_types_is_never_sent_as_ids(serve: Callable[..., Scripted], tmp_path: Path) -> None:
    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    server = serve(scoring)
    scorer = load_scorer(str(folder), base_url=server.url, max_length=16)
    long = "protein gene cancer market price weather " * 9 + "0"
    asyncio.run(scorer.score([("which gene", "key 1"), ("which gene", long)]))
    sent = dict(zip(server.asked[0][1]["text_2"], server.asked[0][1]["text_1"], strict=True))
    assert "key 1" in sent
    (cut,) = set(sent) - {"key 1"}
    assert long.startswith(cut)
    assert len(scorer.renderer._renderer.tokenizer("which gene", cut)["input_ids"]) == 16
    assert scorer.stats.truncated == 1
    scorer.close_sync()
    with pytest.raises(ConfigError, match="token types"):
        load_scorer(str(folder), base_url=server.url, route="classify")


def test_vectors_and_answers_from_a_foreign_server(serve: Callable[..., Scripted]) -> None:
    def answer(path: str, body: Any) -> Answer:
        if path == "/v1/embeddings":
            rows = [{"index": i, "embedding": [3.0, len(text)]} for i, text in enumerate(body["input"])]
            return 200, {"data": rows[::-1]}
        text = json.dumps({"asked": body["messages"][0]["content"], "schema": "response_format" in body})
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {}}

    server = serve(answer, models={"data": [{"id": "e5-base"}]})
    embedder = load_embedder("e5-base", base_url=server.url)
    vectors = asyncio.run(embedder.embed(["a", "bb"], kind="query"))
    assert np.allclose(vectors[1], np.array([3, 9]) / np.hypot(3, 9))  # "query: bb" has nine characters
    generator = load_generator("g", base_url=server.url)
    answers = asyncio.run(generator.generate(["one", "two"], schema={"type": "object"}))
    assert [each.parsed() for each in answers] == [{"asked": "one", "schema": True}, {"asked": "two", "schema": True}]
    with pytest.raises(ModelError, match="none of the choices"):
        asyncio.run(generator.generate(["one"], choices=["a"]))
    embedder.close_sync()
    generator.close_sync()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "bert-segment", "qwen3"])
def test_real_server_agrees_with_transformers(tmp_path: Path, family: str) -> None:
    if family == "qwen3":
        folder = tiny_models.decoder_reward_model(tmp_path / "model")
        write_contract(folder, make_contract(ModelFolder(folder), template("chat_key_first"), 128))
    else:
        folder = tiny_models.bert_cross_encoder(tmp_path / "model")
        name = "encoder" if family == "bert" else "encoder_segment"
        write_contract(folder, make_contract(ModelFolder(folder), template(name), 128))
    pairs = [(q, k) for q in ("which gene", "weather " * 80) for k in ("protein " * 3, "key " * 200, "", "salt")]
    local = load_scorer(str(folder), engine="transformers")
    expected = asyncio.run(local.score(pairs))
    with vllm_server(folder, 128) as url:
        remote = load_scorer(str(folder), base_url=url)
        assert np.abs(asyncio.run(remote.score(pairs)) - expected).max() <= 1e-4
        assert np.abs(asyncio.run(remote.score(pairs)) - expected).max() <= 1e-4
        assert remote.stats.truncated == local.stats.truncated * 2 > 0
        remote.close_sync()


@pytest.mark.vllm
@pytest.mark.slow
def test_real_generation_server(tmp_path: Path) -> None:
    folder = tiny_models.causal_model(tmp_path / "model")
    with vllm_server(folder, 256, runner="generate") as url:
        generator = load_generator("m", base_url=url)
        schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}

        async def use() -> None:
            (plain,) = await generator.generate(["hello"], sampling=Sampling(max_tokens=4, logprobs=2))
            assert plain.tokens == 4
            assert len(plain.logprobs) == 4
            (chosen,) = await generator.generate(["hello"], choices=["left", "right"], sampling=Sampling(max_tokens=8))
            assert chosen.text in ("left", "right")
            (answer,) = await generator.generate(["hello"], schema=schema, sampling=Sampling(max_tokens=100, seed=1))
            assert answer.finish == "length" or isinstance(answer.parsed()["ok"], bool)

        asyncio.run(use())
        generator.close_sync()
