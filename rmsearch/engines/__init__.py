"""Scorer, Embedder and Generator: one interface for a model in this process (transformers, vLLM) or behind HTTP."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from rmsearch.engines.generation import Generation, Messages, Sampling
from rmsearch.engines.options import Engine, EngineOptions
from rmsearch.errors import ConfigError
from rmsearch.models.contract import Contract
from rmsearch.prompts.renderer import Query, Template

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines.dispatch import Stats
    from rmsearch.engines.embedding import EmbeddingSpec

logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """Gives rewards (raw logits). Async, keeps order, any number of callers at a time."""

    contract: Contract | None
    stats: Stats

    async def score(self, pairs: Sequence[tuple[Query, str]]) -> np.ndarray:
        """float32[n]."""

    def stream(self, pairs: Iterable[tuple[Query, str]]) -> AsyncGenerator[tuple[np.ndarray, np.ndarray], None]:
        """(positions int64[n], rewards float32[n]) as they come."""

    async def close(self) -> None: ...

    def close_sync(self) -> None: ...


class Embedder(Protocol):
    """Gives unit vectors."""

    spec: EmbeddingSpec
    stats: Stats

    async def embed(self, texts: Sequence[str], kind: Literal["query", "key"] = "key") -> np.ndarray:
        """float32[len(texts), d]."""

    async def close(self) -> None: ...

    def close_sync(self) -> None: ...


class Generator(Protocol):
    """Answers chat messages."""

    async def generate(
        self,
        messages_list: Sequence[Messages],
        schema: Mapping[str, Any] | None = None,
        sampling: Sampling | None = None,
        choices: Sequence[str] | None = None,
    ) -> list[Generation]:
        """One answer each, in order."""

    async def close(self) -> None: ...

    def close_sync(self) -> None: ...


def pick_engine(engine: str, base_url: str | None) -> Engine:
    """The engine to use; for "auto" the reason is logged. ConfigError for one that does not exist."""
    if engine not in get_args(Engine):
        raise ConfigError(f"unknown engine {engine!r}", remedy=f"One of: {', '.join(get_args(Engine))}")
    if engine == "http" and not base_url:
        raise ConfigError("engine http needs base_url", remedy="Give the server's address, http://host:port")
    if engine != "auto":
        return engine  # type: ignore[return-value]
    chosen, reason = _automatic(base_url)
    logger.info("engine auto: %s, because %s", chosen, reason)
    return chosen


def _automatic(base_url: str | None) -> tuple[Engine, str]:
    if base_url:
        return "http", "a base_url is given"
    if importlib.util.find_spec("vllm") is None:
        return "transformers", "vllm is not installed"
    if not _has_gpu():
        return "transformers", "there is no CUDA GPU"
    return "vllm", "vllm and a CUDA GPU are there"


def _has_gpu() -> bool:
    from rmsearch.engines.transformers import require_torch

    require_torch()
    import torch

    return torch.cuda.is_available()


def load_scorer(
    model_name: str,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    max_length: int | None = None,
    template: str | Template | None = None,
    lora: str | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int = 1,
    base_url: str | None = None,
    max_batch_tokens: int | None = None,
    concurrency: int | None = None,
    **engine_options: Any,
) -> Scorer:
    """Loads a reward model: a folder, s3:// URI or name, a LoRA adapter folder, or a name on a server ("": the only
    one it has).

    dtype "auto": float32 on a CPU, the model's own on a GPU. max_length: tokens per pair, by default the contract's.
    max_batch_tokens: tokens in one pass of the model. concurrency: requests to a server at a time.
    engine_options: further arguments of the engine (transformers: device; vllm: any engine argument of vLLM; http:
    model, route, timeout_s, attempts). Raises ConfigError, ModelError, ContractError, MissingExtraError and, when a
    server is out of reach, RetryableError.
    """
    sizes = (tensor_parallel_size, pipeline_parallel_size, data_parallel_size)
    chosen = pick_engine(engine, base_url)
    options = EngineOptions(chosen, dtype, sizes, base_url, max_batch_tokens, concurrency, engine_options)
    from rmsearch.engines import loading

    return loading.scorer(model_name, options, lora=lora, template=template, max_length=max_length)


def load_embedder(
    model_name: str,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    max_length: int | None = None,
    query_instruction: str | None = None,
    key_instruction: str | None = None,
    pooling: Literal["mean", "cls", "last"] | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int = 1,
    base_url: str | None = None,
    max_batch_tokens: int | None = None,
    concurrency: int | None = None,
    **engine_options: Any,
) -> Embedder:
    """Loads an embedding model. Instructions: see :func:`rmsearch.engines.embedding.prefixes`; else as load_scorer."""
    sizes = (tensor_parallel_size, pipeline_parallel_size, data_parallel_size)
    chosen = pick_engine(engine, base_url)
    options = EngineOptions(chosen, dtype, sizes, base_url, max_batch_tokens, concurrency, engine_options)
    from rmsearch.engines import loading

    wishes = {
        "query_instruction": query_instruction,
        "key_instruction": key_instruction,
        "max_length": max_length,
        "pooling": pooling,
    }
    return loading.embedder(model_name, options, wishes)


def load_generator(
    model_name: str,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    max_length: int | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int = 1,
    base_url: str | None = None,
    max_batch_tokens: int | None = None,
    concurrency: int | None = None,
    **engine_options: Any,
) -> Generator:
    """Loads a language model that answers chat messages, or names one on a server. Options as for load_scorer."""
    sizes = (tensor_parallel_size, pipeline_parallel_size, data_parallel_size)
    chosen = pick_engine(engine, base_url)
    options = EngineOptions(chosen, dtype, sizes, base_url, max_batch_tokens, concurrency, engine_options)
    from rmsearch.engines import loading

    return loading.generator(model_name, options, max_length)
