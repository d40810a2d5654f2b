"""The http backend: rewards and vectors from a vLLM server, or from any server with /score, /rerank or embeddings."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import numpy as np

from rmsearch.engines.dispatch import Limits
from rmsearch.engines.threads import LoopThread
from rmsearch.errors import ConfigError, ModelError, RetryableError
from rmsearch.prompts.renderer import Prepared, Rendered, Renderer

CONCURRENCY = 16  # requests at a time
BATCH, BATCH_TOKENS = 64, 65536  # per request
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 6, 0.5, 20.0  # seconds
RETRIED = frozenset([408, 425, 429, 500, 502, 503, 504])
Route = Literal["classify", "score", "rerank"]
logger = logging.getLogger(__name__)


class _Again(Exception):
    """A request that may succeed later; ``wait``: seconds that the server asked for."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class Server:
    """One HTTP server: requests with a cap on concurrency, retries with back-off, errors in one line.

    The API key is taken from RMSEARCH_API_KEY or OPENAI_API_KEY; it goes into the header and nowhere else.
    """

    def __init__(
        self, base_url: str, *, concurrency: int | None = None, timeout_s: float = 600.0, attempts: int = ATTEMPTS
    ) -> None:
        self.url = base_url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url {base_url!r} is no address", remedy="Give http://host:port")
        self.concurrency, self._attempts = concurrency or CONCURRENCY, attempts
        key = os.environ.get("RMSEARCH_API_KEY") or os.environ.get("OPENAI_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = httpx.Timeout(timeout_s, connect=10.0)
        self._thread = LoopThread("rmsearch-http")
        self._client, self._slots = self._thread.call_sync(self._open())

    async def _open(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        client = httpx.AsyncClient(headers=self._headers, timeout=self._timeout, limits=limits)
        return client, asyncio.Semaphore(self.concurrency)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer's JSON. RetryableError: out of reach; ConfigError or ModelError: refused."""
        return await self._thread.call(self._request("POST", path, body))

    def get(self, path: str) -> Any:
        """The same for a GET, blocking."""
        return self._thread.call_sync(self._request("GET", path, None))

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_attempt

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Again), stop=stop_after_attempt(self._attempts), wait=_waiting_time
        )
        try:
            async for attempt in retrying:
                with attempt:
                    async with self._slots:
                        return await self._once(method, path, body)
        except RetryError as error:
            raise RetryableError(
                f"{error.last_attempt.exception()} ({self._attempts} tries)",
                where=f"{self.url}{path}",
                remedy="Check that the server is up, then run again",
            ) from None

    async def _once(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            response = await self._client.request(method, f"{self.url}{path}", json=body)
        except httpx.TransportError as error:
            raise _Again(f"the server does not answer: {str(error) or type(error).__name__}") from None
        if response.status_code in RETRIED:
            raise _Again(f"the server answers {response.status_code}", _retry_after(response))
        if response.status_code >= 400:
            raise self._refusal(response, path)
        try:
            return response.json()
        except ValueError:
            raise ModelError("the answer is no JSON", where=f"{self.url}{path}", remedy="Check base_url") from None

    def _refusal(self, response: httpx.Response, path: str) -> Exception:
        where = f"{self.url}{path}"
        problem = f"the server answers {response.status_code}: {_message(response)}"
        if response.status_code in (401, 403):
            return ConfigError(problem, where=where, remedy="Set RMSEARCH_API_KEY to a key that the server takes")
        if response.status_code in (404, 405):
            return NoRouteError(problem, where=where, remedy="Check base_url, the model's name and its kind")
        return ModelError(problem, where=where, remedy="Check that model and server fit the request")

    async def close(self) -> None:
        """Closes the connections."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """Closes the connections."""
        self._thread.call_sync(self._client.aclose())
        self._thread.stop()


class NoRouteError(ModelError):
    """The server has no such path, or no such model."""


def _waiting_time(state: Any) -> float:
    """Seconds before the next try: what the server asked for, else twice as long each time, with jitter."""
    from tenacity import wait_exponential_jitter

    asked = getattr(state.outcome.exception(), "wait", None)
    if asked is not None:
        return min(asked, LONGEST_WAIT)
    return wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)(state)


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return None


def _message(response: httpx.Response) -> str:
    """The server's own words, at most 300 characters."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300]
    if isinstance(body, dict):
        found = body.get("error", body.get("detail", body.get("message", body)))
        body = found.get("message", found) if isinstance(found, dict) else found
    return str(body)[:300]


def served_model(server: Server, model: str | None, max_length: int | None) -> str | None:
    """The name to ask for: the one given, else the only one that the server has.

    max_length: tokens that requests may have; ConfigError when the server takes fewer. None when nothing is known.
    """
    try:
        models = server.get("/v1/models").get("data", [])
    except (NoRouteError, AttributeError):
        return model
    names = [each.get("id") for each in models]
    if model is None and len(names) != 1:
        raise ConfigError(
            f"the server has {len(names)} models", where=server.url, remedy=f"Name one (model=…): {', '.join(names)}"
        )
    if model is not None and names and model not in names:
        raise ConfigError(f"the server has no model {model!r}", where=server.url, remedy=f"It has {', '.join(names)}")
    chosen = model or names[0]
    longest = next((each.get("max_model_len") for each in models if each.get("id") == chosen), None)
    if longest is not None and max_length is not None and longest < max_length:
        raise ConfigError(
            f"the server takes {longest} tokens, the model's contract says {max_length}",
            where=server.url,
            remedy=f"Start the server with --max-model-len {max_length}, or give max_length={longest}",
        )
    return chosen


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

    async def close(self) -> None:
        """Closes the connections."""
        await self._server.close()

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

    async def close(self) -> None:
        """Closes the connections."""
        await self._server.close()

    def close_sync(self) -> None:
        """Closes the connections."""
        self._server.close_sync()
