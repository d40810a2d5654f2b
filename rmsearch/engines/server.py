"""A model server: requests with a cap on concurrency, retries with back-off, errors in one line."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import httpx
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from rmsearch.engines.threads import LoopThread
from rmsearch.errors import ConfigError, ModelError, RetryableError

CONCURRENCY = 16  # requests at a time
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 6, 0.5, 20.0  # seconds
RETRIED = frozenset([408, 425, 429, 500, 502, 503, 504])


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

    def close_sync(self) -> None:
        """Closes the connections."""
        self._thread.stop(self._client.aclose)


class NoRouteError(ModelError):
    """The server has no such path, or no such model."""


def _waiting_time(state: Any) -> float:
    """Seconds before the next try: what the server asked for, else twice as long each time, with jitter."""
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
