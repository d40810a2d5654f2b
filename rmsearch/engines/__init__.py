"""Scorer, Embedder and Generator: one interface for a model in this process (transformers, vLLM) or behind HTTP.

What ``import rmsearch`` loads passes here, so nothing is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines.dispatch import Stats
    from rmsearch.engines.embedding import EmbeddingSpec, Pooling
    from rmsearch.engines.generation import Generation, Messages, Sampling
    from rmsearch.models.contract import Contract
    from rmsearch.prompts.renderer import Query
    from rmsearch.prompts.templates import Template


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


def load_scorer(
    model_name: str,
    *,
    max_length: int | None = None,
    template: str | Template | None = None,
    lora: str | None = None,
    **options: Any,
) -> Scorer:
    """Loads a reward model: a folder, s3:// URI or name, a LoRA adapter folder, or a name on a server ("": the only
    one it has).

    max_length: tokens per pair, by default the contract's. options: see `rmsearch.engines.options.engine_options`.
    Raises ConfigError, ModelError, ContractError, MissingExtraError and, when a server is out of reach, RetryableError.
    """
    from rmsearch.engines.loading import scorer

    return scorer(model_name, options, lora=lora, template=template, max_length=max_length)


def load_embedder(
    model_name: str,
    *,
    max_length: int | None = None,
    query_instruction: str | None = None,
    key_instruction: str | None = None,
    pooling: Pooling | None = None,
    **options: Any,
) -> Embedder:
    """Loads an embedding model. Instructions: see `rmsearch.engines.embedding.prefixes`; else as load_scorer."""
    given: dict[str, Any] = {"query_instruction": query_instruction, "key_instruction": key_instruction}
    given |= {"max_length": max_length, "pooling": pooling}
    from rmsearch.engines.loading import embedder

    return embedder(model_name, options, given)


def load_generator(model_name: str, *, max_length: int | None = None, **options: Any) -> Generator:
    """Loads a language model that answers chat messages, or names one on a server. Options as for load_scorer."""
    from rmsearch.engines.loading import generator

    return generator(model_name, options, max_length)
