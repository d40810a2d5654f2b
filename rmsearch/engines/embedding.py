"""Embedding models: how each one wants its texts (prefix, length, pooling), and the embedder itself."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rmsearch.engines.dispatch import Backend, Dispatcher, Job, split_batches
from rmsearch.errors import ConfigError, ModelError
from rmsearch.models.folder import ModelFolder
from rmsearch.prompts.renderer import Rendered
from rmsearch.prompts.tokens import TextTokens, special_ends

WINDOW = 8192
LONGEST = 8192  # tokens, of a model that states no maximum of its own
TASK = "Given a web search query, retrieve relevant passages that answer the query"
QUERY_PROMPTS = ("query", "web_search_query", "s2p_query")
KEY_PROMPTS = ("document", "passage", "corpus")
Kind = Literal["query", "key"]
Pooling = Literal["mean", "cls", "last"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddingSpec:
    """How a model embeds. max_length counts special tokens; the prefixes stand before every query and key."""

    pooling: Pooling
    max_length: int
    query_prefix: str = ""
    key_prefix: str = ""
    normalize: bool = True

    def prefix(self, kind: Kind) -> str:
        """The text before every text of that kind."""
        return self.query_prefix if kind == "query" else self.key_prefix


def resolve_embedding(
    folder: ModelFolder,
    *,
    query_instruction: str | None = None,
    key_instruction: str | None = None,
    max_length: int | None = None,
    pooling: Pooling | None = None,
) -> EmbeddingSpec:
    """The spec of a model: explicit values, then its own files, then its family, known by its name."""
    facts, name = folder.facts, f"{folder.where} {folder.path.name}"
    query_prefix, key_prefix = prefixes(name, query_instruction, key_instruction, _prompts(folder))
    own_length = folder.json_file("sentence_bert_config.json").get("max_seq_length")
    longest = max_length or own_length or min(facts.max_positions, LONGEST)
    if longest > facts.max_positions:
        raise ConfigError(
            f"max_length {longest} is more than the {facts.max_positions} positions of the model",
            where=folder.where,
            remedy=f"Give at most {facts.max_positions}",
        )
    pooled_by = pooling or _own_pooling(folder) or ("mean" if facts.encoder else "last")
    return EmbeddingSpec(pooled_by, longest, query_prefix, key_prefix)


def prefixes(
    name: str, query_instruction: str | None, key_instruction: str | None, own: dict[str, str] | None = None
) -> tuple[str, str]:
    """The text before queries and before keys.

    An instruction is put before the text as it is given, except that models of the "Instruct: …" kind (e5-mistral,
    Qwen3-Embedding) get a plain task sentence wrapped in their form. Without one: the model's own prompts, else the
    convention of its family, known by ``name``.
    """
    query, key = _family_prefixes(name, query_instruction)
    own = own or {}
    query = next((own[each] for each in QUERY_PROMPTS if own.get(each)), query)
    key = next((own[each] for each in KEY_PROMPTS if own.get(each)), key)
    if query_instruction is not None:
        wrapped = _instruct_form(name) is not None and query_instruction and "Query:" not in query_instruction
        query = _family_prefixes(name, query_instruction)[0] if wrapped else query_instruction
    return query, key if key_instruction is None else key_instruction


def _instruct_form(name: str) -> str | None:
    lower = name.lower()
    if "e5-mistral" in lower or "multilingual-e5-large-instruct" in lower:
        return "Instruct: {}\nQuery: "
    return "Instruct: {}\nQuery:" if "qwen3-embedding" in lower else None


def _family_prefixes(name: str, task: str | None) -> tuple[str, str]:
    form = _instruct_form(name)
    if form is not None:
        return form.format(task or TASK), ""
    if re.search(r"(^|[^a-z0-9])e5-(small|base|large)", name.lower()):
        return "query: ", "passage: "
    return "", ""


def _prompts(folder: ModelFolder) -> dict[str, str]:
    config = folder.json_file("config_sentence_transformers.json")
    prompts = {str(name): str(text) for name, text in (config.get("prompts") or {}).items()}
    default = config.get("default_prompt_name")
    if default in prompts:
        prompts = {"query": prompts[default], "document": prompts[default]} | {k: v for k, v in prompts.items() if v}
    return prompts


def _own_pooling(folder: ModelFolder) -> Pooling | None:
    """The pooling that the sentence-transformers files name, None without such files; ModelError for one we lack."""
    if not (folder.path / "modules.json").exists():
        return None
    for path in sorted(folder.path.glob("*_Dense")):
        raise ModelError("has a dense layer after pooling", where=str(path), remedy="Give a model without one")
    config = folder.json_file("1_Pooling/config.json")
    if not config:
        return None
    mode = config.get("pooling_mode")
    flags = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
    chosen = [name for name, flag in flags.items() if config.get(flag) or name in (mode, mode and mode[0])]
    if mode == "lasttoken":
        chosen = ["last"]
    others = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or (others and others != [flags[chosen[0]]]):
        raise ModelError(
            "has a pooling other than mean, cls or last token",
            where=str(folder.path / "1_Pooling" / "config.json"),
            remedy="Name pooling=",
        )
    return chosen[0]  # type: ignore[return-value]


class TokenInputs:
    """Texts as token ids with the tokenizer's own special tokens, at most ``max_length`` of them."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._first, self._last = special_ends(tokenizer)
        self._room = max_length - len(self._first) - len(self._last)
        if self._room < 1:
            raise ConfigError(f"max_length {max_length} leaves no room for text", remedy="Raise max_length")
        self._tokens = TextTokens(tokenizer, self._room, plain=False)

    def __call__(self, texts: list[str]) -> tuple[Sequence[Any], np.ndarray]:
        """(model inputs, their lengths int64[n])."""
        rendered = [self._render(ids) for ids in self._tokens(texts)]
        return rendered, np.array([len(each.ids) for each in rendered])

    def _render(self, ids: Sequence[int]) -> Rendered:
        return Rendered([*self._first, *ids[: self._room], *self._last], None, len(ids) > self._room)


class TextInputs:
    """Texts as they are, for a server that tokenises itself; lengths are guessed from characters."""

    def __call__(self, texts: list[str]) -> tuple[Sequence[Any], np.ndarray]:
        """(model inputs, their lengths int64[n])."""
        return [PlainText(text) for text in texts], np.array([len(text) // 4 + 1 for text in texts])


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text for a server; its tokens are not known here, so none are counted."""

    text: str
    truncated: bool = False
    ids: tuple[int, ...] = ()


class TextEmbedder(Dispatcher):
    """A backend that gives vectors, behind windows and token-budget batches: what ``load_embedder`` returns."""

    def __init__(self, backend: Backend, inputs: TokenInputs | TextInputs, spec: EmbeddingSpec) -> None:
        super().__init__(backend)
        self.spec, self._inputs = spec, inputs

    async def embed(self, texts: Sequence[str], kind: Kind = "key") -> np.ndarray:
        """float32[len(texts), d] vectors of unit length, in order; equal texts are embedded once."""
        unique: dict[str, int] = {}
        numbers = [unique.setdefault(checked_text(text, kind, i), len(unique)) for i, text in enumerate(texts)]
        self.stats.pairs += len(texts)
        prefix = self.spec.prefix(kind)
        vectors: np.ndarray | None = None
        async with aclosing(self.run(self._jobs([prefix + text for text in unique]))) as results:
            async for job, values in results:
                if vectors is None:
                    vectors = np.empty((len(unique), values.shape[1]), dtype=np.float32)
                vectors[job.index] = values
        if vectors is None:
            return np.empty((0, 0), dtype=np.float32)
        return unit(vectors)[np.array(numbers)] if self.spec.normalize else vectors[np.array(numbers)]

    async def _jobs(self, texts: list[str]) -> AsyncGenerator[Job, None]:
        for start in range(0, len(texts), WINDOW):
            rendered, lengths = await asyncio.to_thread(self._inputs, texts[start : start + WINDOW])
            order = np.argsort(-lengths, kind="stable")
            for part in split_batches(lengths[order], self.backend.limits):
                chosen = order[part]
                yield Job(chosen + start, [rendered[i] for i in chosen])


def checked_text(text: object, kind: Kind, position: int) -> str:
    """The text; ConfigError names the position of one that is no string."""
    if isinstance(text, str):
        return text
    shown = "None" if text is None else f"{type(text).__name__} {str(text)[:60]!r}"
    raise ConfigError(f"a text to embed is a string, not {shown}", where=f"{kind} {position}")


def unit(vectors: np.ndarray) -> np.ndarray:
    """The rows at unit length; a row of zeros stays."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32, copy=False)


def pooled(pooling: Pooling) -> Any:
    """The read-out of a torch model for TransformersBackend: [n, d]."""

    def read_out(model: Any, inputs: dict[str, Any], lengths: Any) -> Any:
        import torch

        hidden = model(**inputs).last_hidden_state.float()
        if pooling == "cls":
            return hidden[:, 0]
        if pooling == "last":
            return hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1]
        mask = torch.arange(hidden.shape[1], device=hidden.device)[None] < lengths[:, None]
        return (hidden * mask[..., None]).sum(1) / lengths[:, None]

    return read_out
