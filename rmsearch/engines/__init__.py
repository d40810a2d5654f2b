"""Scorer, Embedder and Generator: one interface for a model in this process (transformers, vLLM) or behind HTTP."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from rmsearch.contract import Contract, resolve_contract
from rmsearch.errors import ConfigError
from rmsearch.prompts import Query, Renderer, Template

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines.dispatch import Stats
    from rmsearch.engines.embedding import EmbeddingSpec

Engine = Literal["auto", "transformers", "vllm", "http"]
logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """Gives rewards (raw logits). Async, keeps order, any number of callers at a time."""

    contract: Contract | None
    stats: Stats

    async def score(self, pairs: Sequence[tuple[Query, str]]) -> np.ndarray:
        """float32[n]."""

    async def score_grid(self, queries: Sequence[Query], keys: Sequence[str]) -> np.ndarray:
        """float32[len(queries), len(keys)]."""

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


def open_reward_folder(model_name: str, lora: str | None) -> tuple[Path, Path | None]:
    """(model folder, adapter folder); a ``model_name`` that is an adapter is opened with its base."""
    from rmsearch.engines.heads import adapter_base, is_adapter
    from rmsearch.storage.models import open_model

    folder = open_model(model_name)
    if not is_adapter(folder):
        return folder, None if lora is None else open_model(lora)
    if lora is not None:
        raise ConfigError(f"{model_name} is an adapter itself", remedy="Give its base as model, or leave lora away")
    return open_model(adapter_base(folder)), folder


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
    """Loads a reward model: a folder, s3:// URI or name, a LoRA adapter folder, or a name on a server.

    dtype "auto": float32 on a CPU, the model's own on a GPU. max_length: tokens per pair, by default the contract's.
    engine_options: further arguments of the engine (transformers: device; vllm: its engine arguments; http: timeout_s,
    model, route). Errors: ConfigError, ModelError, ContractError, MissingExtraError, RetryableError.
    """
    from rmsearch.engines.scheduler import PairScorer

    pick_engine(engine, base_url)
    folder, adapter = open_reward_folder(model_name, lora)
    from rmsearch.engines import transformers

    transformers.require_torch()
    contract = reward_contract(folder, adapter, model_name, template, max_length)
    tokenizer = transformers.load_tokenizer(folder)
    renderer = Renderer(tokenizer, contract.template, contract.max_length)
    model = transformers.load_classifier(folder, tokenizer, contract, dtype=dtype, lora=adapter, **engine_options)
    return PairScorer(transformers.scoring_backend(model, contract, tokenizer, max_batch_tokens), renderer, contract)


def reward_contract(
    folder: Path, adapter: Path | None, name: str, template: str | Template | None, max_length: int | None
) -> Contract:
    """The contract to use a model with: the adapter's own when it has one, else the model's."""
    from rmsearch.contract import CONTRACT_FILE

    own = adapter is not None and (adapter / CONTRACT_FILE).exists()
    wishes: dict[str, Any] = {"name": name, "template_name": template, "max_length": max_length}
    return resolve_contract(folder, contract_folder=adapter if own else folder, **wishes)


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
    """Loads an embedding model. Instructions: see :func:`rmsearch.engines.embedding.prefixes`."""
    from rmsearch.engines import transformers
    from rmsearch.engines.embedding import TextEmbedder, pooled, resolve_embedding
    from rmsearch.storage.models import open_model

    pick_engine(engine, base_url)
    transformers.require_torch()
    folder = open_model(model_name)
    spec = resolve_embedding(
        folder,
        model_name,
        query_instruction=query_instruction,
        key_instruction=key_instruction,
        max_length=max_length,
        pooling=pooling,
    )
    tokenizer = transformers.load_tokenizer(folder)
    model = transformers.load_encoder(folder, dtype=dtype, **engine_options)
    backend = transformers.TransformersBackend(
        model, pooled(spec.pooling), pad_token_id=tokenizer.pad_token_id or 0, batch_tokens=max_batch_tokens
    )
    return TextEmbedder(backend, tokenizer, spec)
