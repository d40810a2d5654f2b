"""The options that all load functions share, carried from there to the engine."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal

from rmsearch.errors import ConfigError

Engine = Literal["auto", "transformers", "vllm", "http"]


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
