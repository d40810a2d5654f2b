"""The options that all load functions share, carried from there to the engine."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rmsearch.engines.transformers import require_torch
from rmsearch.errors import ConfigError

Engine = Literal["auto", "transformers", "vllm", "http"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How to run a model. parallel: the tensor, pipeline and data parallel sizes; extra: the engine's own arguments."""

    engine: Engine
    dtype: str
    parallel: tuple[int, int, int]
    base_url: str | None
    batch_tokens: int | None
    concurrency: int | None
    extra: dict[str, Any]

    def extra_of(self, known: Set[str]) -> dict[str, Any]:
        """The engine's own arguments; ConfigError for one that is not ``known``."""
        if unknown := sorted(set(self.extra) - known):
            problem = f"the {self.engine} engine does not know {', '.join(unknown)}"
            raise ConfigError(problem, remedy=f"It knows {', '.join(sorted(known))}")
        return self.extra

    def vllm_arguments(self) -> dict[str, Any]:
        """vLLM's engine arguments; None leaves vLLM's default."""
        tensor, pipeline, data = self.parallel
        return {
            "tensor_parallel_size": tensor,
            "pipeline_parallel_size": pipeline,
            "data_parallel_size": data,
            "max_num_batched_tokens": self.batch_tokens,
        } | self.extra


def engine_options(
    *,
    engine: str = "auto",
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int = 1,
    base_url: str | None = None,
    max_batch_tokens: int | None = None,
    concurrency: int | None = None,
    **extra: Any,
) -> EngineOptions:
    """The options of every load function, as they are called there.

    engine: auto, transformers, vllm or http. dtype "auto": float32 on a CPU, the model's own on a GPU. base_url: the
    server of the http engine. max_batch_tokens: tokens in one pass of the model. concurrency: requests to a server at
    a time. extra: further arguments of the engine (transformers: device; vllm: any engine argument of vLLM; http:
    model, route, timeout_s, attempts).
    """
    sizes = (tensor_parallel_size, pipeline_parallel_size, data_parallel_size)
    chosen = pick_engine(engine, base_url)
    return EngineOptions(chosen, dtype, sizes, base_url, max_batch_tokens, concurrency, extra)


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
    require_torch()
    import torch

    return torch.cuda.is_available()
