"""The http backend: rewards from a vLLM server, or from any with /score or /rerank; vectors and text from any."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rmsearch.engines.dispatch import Limits
from rmsearch.engines.generation import Generation, Wish
from rmsearch.engines.server import NoRouteError, Server
from rmsearch.errors import ModelError
from rmsearch.prompts.renderer import Prepared, Rendered, Renderer

BATCH, BATCH_TOKENS = 64, 65536  # per request
Route = Literal["classify", "score", "rerank"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextPair:
    """A pair for a server that tokenises itself."""

    query: str
    key: str
    truncated: bool = False
    ids: tuple[int, ...] = ()  # none are counted: only the server knows them


class TextRenderer:
    """Leaves pairs as text; with a Renderer the texts are cut where its token ids would be."""

    def __init__(self, renderer: Renderer | None = None) -> None:
        self._renderer = renderer

    def prepare(self, queries: Sequence[str], keys: Sequence[str]) -> TextPairs:
        """See Renderer.prepare."""
        prepared = None if self._renderer is None else self._renderer.prepare(queries, keys)
        return TextPairs(queries, keys, prepared)


class TextPairs:
    """See Prepared."""

    def __init__(self, queries: Sequence[str], keys: Sequence[str], prepared: Prepared | None) -> None:
        self._queries, self._keys, self._prepared = queries, keys, prepared

    def lengths(self, pairs: np.ndarray) -> np.ndarray:
        """Tokens of each pair, guessed as a quarter of the characters when there is no tokenizer."""
        if self._prepared is not None:
            return self._prepared.lengths(pairs)
        sizes = [np.array([len(text) // 4 + 1 for text in texts]) for texts in (self._queries, self._keys)]
        return sizes[0][pairs[:, 0]] + sizes[1][pairs[:, 1]]

    def render(self, pairs: Sequence[tuple[int, int]]) -> list[TextPair]:
        """The pairs of texts."""
        if self._prepared is None:
            return [TextPair(self._queries[q], self._keys[k]) for q, k in pairs]
        cut = [self._prepared.cut(q, k) for q, k in pairs]
        # vLLM takes an empty text for none at all, and then leaves out its separator; a space is no token either
        return [TextPair(query or " ", key or " ", truncated) for query, key, truncated in cut]


class HTTPScoring:
    """Backend for rewards: ids to /classify, or texts to /score or /rerank (raw rewards asked for in each).

    model: the server's name for it.
    """

    def __init__(self, server: Server, model: str | None, route: Route, *, prefix_cache: bool, fallback: bool) -> None:
        self.model, self._server, self._route, self._fallback = model, server, route, fallback
        self.limits = Limits(
            batch_tokens=BATCH_TOKENS,
            batch_size=BATCH,
            in_flight=server.concurrency,
            padded=False,
            prefix_cache=prefix_cache,
        )

    async def forward(self, batch: list[Any]) -> np.ndarray:
        """float32[n], in order."""
        if self._route == "classify":
            return await self._classify(batch)
        if self._route == "score":
            try:
                return await self._score(batch)
            except NoRouteError:
                if not self._fallback:
                    raise
                logger.info("%s has no /score: using /rerank", self._server.url)
                self._route = "rerank"
        return await self._rerank(batch)

    def _body(self, **fields: Any) -> dict[str, Any]:
        return ({"model": self.model} if self.model else {}) | {"use_activation": False} | fields

    async def _classify(self, batch: list[Rendered]) -> np.ndarray:
        answer = await self._server.post("/classify", self._body(input=[each.ids for each in batch]))
        return self._collect(answer, "data", len(batch), lambda item: _only(item["probs"]))

    async def _score(self, batch: list[TextPair]) -> np.ndarray:
        texts = {"text_1": [each.query for each in batch], "text_2": [each.key for each in batch]}
        answer = await self._server.post("/score", self._body(**texts, truncate_prompt_tokens=-1))
        return self._collect(answer, "data", len(batch), lambda item: item["score"])

    async def _rerank(self, batch: list[TextPair]) -> np.ndarray:
        """One request per query, since /rerank takes one."""
        groups: dict[str, list[int]] = {}
        for i, pair in enumerate(batch):
            groups.setdefault(pair.query, []).append(i)
        rewards = np.empty(len(batch), dtype=np.float32)
        for query, rows in groups.items():
            body = self._body(query=query, documents=[batch[i].key for i in rows], truncate_prompt_tokens=-1)
            answer = await self._server.post("/rerank", body)
            rewards[rows] = self._collect(answer, "results", len(rows), lambda item: item["relevance_score"])
        return rewards

    def _collect(self, answer: Any, field: str, count: int, value: Any) -> np.ndarray:
        """The values of an answer's list, put in the order of their ``index``."""
        rewards = np.full(count, np.nan, dtype=np.float32)
        try:
            for item in answer[field]:
                rewards[item["index"]] = value(item)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ModelError(
                f"the answer of /{self._route} is not as expected: {type(error).__name__} {error}",
                where=self._server.url,
                remedy="Give a reward model (one label) behind a vLLM server, or another route",
            ) from None
        return rewards

    def close_sync(self) -> None:
        """Closes the connections."""
        self._server.close_sync()


def _only(values: list[float]) -> float:
    if len(values) != 1:
        raise ValueError(f"{len(values)} labels, a reward model has one")
    return values[0]


class HTTPEmbedding:
    """Backend for vectors: /v1/embeddings with ids, or with text where the tokenizer is only on the server."""

    def __init__(self, server: Server, model: str | None) -> None:
        self._server, self._model = server, model
        self.limits = Limits(
            batch_tokens=BATCH_TOKENS, batch_size=BATCH, in_flight=server.concurrency, padded=False, prefix_cache=False
        )

    async def forward(self, batch: list[Any]) -> np.ndarray:
        """float32[n, d], in order."""
        inputs = [each.ids if isinstance(each, Rendered) else each.text for each in batch]
        body = {"model": self._model, "input": inputs, "encoding_format": "float"}
        answer = await self._server.post("/v1/embeddings", body)
        try:
            rows = sorted(answer["data"], key=lambda item: item["index"])
            vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
        except (KeyError, TypeError, ValueError):
            raise ModelError("the answer holds no vectors", where=self._server.url, remedy="Check the model") from None
        if len(vectors) != len(batch):
            raise ModelError(f"{len(vectors)} vectors for {len(batch)} texts", where=self._server.url)
        return vectors

    def close_sync(self) -> None:
        """Closes the connections."""
        self._server.close_sync()


class HTTPGeneration:
    """Generates with /v1/chat/completions of any OpenAI-compatible server."""

    def __init__(self, server: Any, model: str | None) -> None:
        self._server, self._model, self.in_flight = server, model, server.concurrency

    async def generate(self, wish: Wish) -> Generation:
        """The answer to one wish. Schemas go as response_format, choices in vLLM's own field."""
        answer = await self._server.post("/v1/chat/completions", _chat_body(self._model, wish))
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            usage = answer.get("usage") or {}
            tokens, read = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
            steps = (choice.get("logprobs") or {}).get("content")
            logprobs = None
            if steps is not None:
                logprobs = tuple({top["token"]: top["logprob"] for top in step["top_logprobs"]} for step in steps)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ModelError("the answer holds no message", where=self._server.url, remedy="Check base_url") from None
        return Generation(text, tokens, choice.get("finish_reason") or "stop", logprobs, read)

    def close_sync(self) -> None:
        """Closes the connections."""
        self._server.close_sync()


def _chat_body(model: str | None, wish: Wish) -> dict[str, Any]:
    sampling = wish.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": wish.messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    if wish.schema is not None:
        schema = {"name": "answer", "schema": wish.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if wish.choices is not None:
        body["structured_outputs"] = {"choice": list(wish.choices)}
    return body
