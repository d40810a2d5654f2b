"""Loading: from a model's name and an engine's to a scorer, an embedder or a generator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmsearch.contract import CONTRACT_FILE, Contract, model_facts, resolve_contract
from rmsearch.engines.embedding import EmbeddingSpec, TextEmbedder, TextInputs, TokenInputs, pooled, resolve_embedding
from rmsearch.engines.heads import adapter_base, classifier_folder, is_adapter, merged_folder
from rmsearch.engines.scheduler import PairScorer
from rmsearch.errors import ConfigError
from rmsearch.prompts import Renderer, Template
from rmsearch.storage.models import PACKAGED_NAMES, open_model
from rmsearch.storage.uri import is_s3

if TYPE_CHECKING:
    from rmsearch.engines.generation import TextGenerator
    from rmsearch.engines.http import Server


@dataclass(frozen=True)
class Reward:
    """A reward model opened on this machine, before an engine has it. ``adapter``: a LoRA folder on top."""

    name: str
    folder: Path
    adapter: Path | None
    contract: Contract
    tokenizer: Any
    renderer: Renderer


def open_reward(name: str, lora: str | None, template: str | Template | None, max_length: int | None) -> Reward:
    """Opens a model folder, or an adapter folder with its base, and resolves its contract."""
    from rmsearch.engines.transformers import load_tokenizer, require_torch

    require_torch()
    folder, adapter = open_model(name), None if lora is None else open_model(lora)
    if is_adapter(folder):
        if adapter is not None:
            raise ConfigError(f"{name} is an adapter itself", remedy="Give its base as model, or leave lora away")
        folder, adapter = open_model(adapter_base(folder)), folder
    own = adapter if adapter is not None and (adapter / CONTRACT_FILE).exists() else None
    contract = resolve_contract(
        folder,
        name=name,
        template_name=template,
        max_length=max_length,
        contract_folder=own,
        headless=adapter is not None,
    )
    tokenizer = load_tokenizer(folder)
    return Reward(
        name, folder, adapter, contract, tokenizer, Renderer(tokenizer, contract.template, contract.max_length)
    )


def transformers_scorer(reward: Reward, *, dtype: str, batch_tokens: int | None, options: dict[str, Any]) -> PairScorer:
    """A scorer with torch on this machine."""
    from rmsearch.engines.transformers import load_classifier, scoring_backend

    _check_options(options, "transformers", {"device"})
    model = load_classifier(
        reward.folder, reward.tokenizer, reward.contract, dtype=dtype, lora=reward.adapter, **options
    )
    backend = scoring_backend(model, reward.contract, reward.tokenizer, batch_tokens)
    return PairScorer(backend, reward.renderer, reward.contract)


def vllm_scorer(reward: Reward, *, dtype: str, arguments: dict[str, Any]) -> PairScorer:
    """A scorer with vLLM in this process; what vLLM can't serve as it is gets merged or converted first."""
    from rmsearch.engines.vllm import scoring_engine

    folder, adapter = reward.folder, reward.adapter
    if adapter is not None and not _vllm_serves_adapter(reward):
        folder, adapter = _merged(reward, adapter), None
    folder = classifier_folder(folder, reward.tokenizer, reward.name)
    backend = scoring_engine(folder, reward.contract, dtype=dtype, adapter=adapter, arguments=arguments)
    return PairScorer(backend, reward.renderer, reward.contract)


def _vllm_serves_adapter(reward: Reward) -> bool:
    """vLLM knows LoRA for decoders only, and needs a base that has a head."""
    from rmsearch.contract import HEAD_NAMES, tensor_names

    names = tensor_names(reward.folder)
    return reward.contract.pooling == "last" and any(f"{head}.weight" in names for head in HEAD_NAMES)


def _merged(reward: Reward, adapter: Path) -> Path:
    from rmsearch.engines.transformers import load_classifier

    def merge() -> Any:
        options = {"dtype": reward.contract.dtype, "device": "cpu"}
        return load_classifier(reward.folder, reward.tokenizer, reward.contract, lora=adapter, **options)

    return merged_folder(reward.folder, adapter, reward.tokenizer, merge)


def is_local(name: str) -> bool:
    """Whether a model's name means files that we can open without asking a model hub."""
    return is_s3(name) or name in PACKAGED_NAMES or Path(name).expanduser().is_dir()


def http_scorer(
    name: str,
    base_url: str,
    *,
    lora: str | None,
    template: str | Template | None,
    max_length: int | None,
    concurrency: int | None,
    options: dict[str, Any],
) -> PairScorer:
    """A scorer behind a server.

    A model whose folder is here too is sent as token ids, or, when it needs token types (which ids over HTTP lack), as
    texts cut to its length. Any other name is the server's own, and gets texts.
    """
    from rmsearch.engines.http import HTTPScoring, Server, TextRenderer, served_model

    options = dict(options)
    model, route = options.pop("model", None), options.pop("route", "auto")
    _check_options(options, "http", {"timeout_s", "attempts"})
    if route not in ("auto", "classify", "score", "rerank"):
        raise ConfigError(f"unknown route {route!r}", remedy="One of: auto, classify, score, rerank")
    reward = open_reward(name, lora, template, max_length) if is_local(name) else None
    if reward is None and (template is not None or lora is not None or route == "classify"):
        raise ConfigError(
            f"{name!r} is no folder here, so a template, an adapter or token ids cannot be applied to it",
            remedy="Give the model's folder or s3:// URI, and the server's name for it as model=…",
        )
    route = _route(route, reward)
    server = Server(base_url, concurrency=concurrency, **options)
    try:
        length = None if reward is None else reward.contract.max_length
        served = served_model(server, model if reward is not None else model or name, length)
    except BaseException:
        server.close_sync()
        raise
    prefix_cache = reward is not None and reward.contract.pooling == "last"
    backend = HTTPScoring(server, served, route, prefix_cache=prefix_cache, fallback=reward is None)
    if reward is not None and route == "classify":
        return PairScorer(backend, reward.renderer, reward.contract)
    renderer = None if reward is None else reward.renderer
    return PairScorer(backend, TextRenderer(renderer), None if reward is None else reward.contract)


def _route(route: str, reward: Reward | None) -> Any:
    """The route to take; ConfigError for one that would give other scores than the model's own."""
    if reward is None:
        return "score" if route == "auto" else route
    if reward.contract.token_types == "segment":
        if route == "classify":
            raise ConfigError(
                f"{reward.name} needs token types, which ids sent to /classify lack",
                remedy="Leave route away, or use route='score'",
            )
        return "score" if route == "auto" else route
    if route in ("score", "rerank") and reward.contract.template.name != "encoder":
        raise ConfigError(
            f"/{route} joins texts without the template {reward.contract.template.name!r}",
            remedy="Leave route away: token ids go to /classify",
        )
    return "classify" if route == "auto" else route


def _check_options(options: dict[str, Any], engine: str, known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(
            f"the {engine} engine does not know {', '.join(unknown)}", remedy=f"It knows {', '.join(sorted(known))}"
        )


def local_embedder(
    engine: str, name: str, *, dtype: str, batch_tokens: int | None, wishes: dict[str, Any], options: dict[str, Any]
) -> TextEmbedder:
    """An embedder with transformers or vLLM on this machine."""
    from rmsearch.engines.transformers import TransformersBackend, load_encoder, load_tokenizer, require_torch

    require_torch()
    folder = open_model(name)
    spec = resolve_embedding(folder, name, **wishes)
    tokenizer = load_tokenizer(folder)
    inputs = TokenInputs(tokenizer, spec.max_length)
    if engine == "vllm":
        from rmsearch.engines.vllm import embedding_engine

        stored = model_facts(folder).dtype
        return TextEmbedder(embedding_engine(folder, spec, dtype=dtype, stored=stored, arguments=options), inputs, spec)
    _check_options(options, "transformers", {"device"})
    model = load_encoder(folder, dtype=dtype, **options)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    backend = TransformersBackend(model, pooled(spec.pooling), pad_token_id=pad, batch_tokens=batch_tokens)
    return TextEmbedder(backend, inputs, spec)


def http_embedder(
    name: str, base_url: str, *, concurrency: int | None, wishes: dict[str, Any], options: dict[str, Any]
) -> TextEmbedder:
    """An embedder behind /v1/embeddings: ids for a model whose folder is here too, else texts."""
    from rmsearch.engines.embedding import prefixes
    from rmsearch.engines.http import HTTPEmbedding, Server, served_model
    from rmsearch.engines.transformers import load_tokenizer

    options = dict(options)
    model = options.pop("model", None)
    _check_options(options, "http", {"timeout_s", "attempts"})
    inputs: TokenInputs | TextInputs
    if is_local(name):
        folder = open_model(name)
        spec = resolve_embedding(folder, name, **wishes)
        inputs = TokenInputs(load_tokenizer(folder), spec.max_length)
    else:
        query, key = prefixes(name, wishes["query_instruction"], wishes["key_instruction"])
        spec = EmbeddingSpec(wishes["pooling"] or "mean", wishes["max_length"] or 0, query, key)
        inputs, model = TextInputs(), model or name
    server = Server(base_url, concurrency=concurrency, **options)
    try:
        served = served_model(server, model, None)
    except BaseException:
        server.close_sync()
        raise
    return TextEmbedder(HTTPEmbedding(server, served), inputs, spec)


def local_generator(
    engine: str, name: str, *, dtype: str, max_length: int | None, options: dict[str, Any]
) -> TextGenerator:
    """A generator with transformers or vLLM on this machine."""
    from rmsearch.engines.generation import TextGenerator, TransformersGeneration, VLLMGeneration
    from rmsearch.engines.transformers import load_causal, load_tokenizer, require_torch

    require_torch()
    folder = open_model(name)
    tokenizer = load_tokenizer(folder)
    if engine == "vllm":
        from rmsearch.engines.vllm import generating_engine

        stored = model_facts(folder).dtype
        started = generating_engine(folder, dtype=dtype, stored=stored, max_length=max_length, arguments=options)
        return TextGenerator(VLLMGeneration(started, tokenizer))
    _check_options(options, "transformers", {"device"})
    return TextGenerator(TransformersGeneration(load_causal(folder, dtype=dtype, **options), tokenizer))


def http_generator(name: str, base_url: str, *, concurrency: int | None, options: dict[str, Any]) -> TextGenerator:
    """A generator behind /v1/chat/completions."""
    from rmsearch.engines.generation import HTTPGeneration, TextGenerator
    from rmsearch.engines.http import Server

    options = dict(options)
    model = options.pop("model", None) or name
    _check_options(options, "http", {"timeout_s", "attempts"})
    server: Server = Server(base_url, concurrency=concurrency, **options)
    return TextGenerator(HTTPGeneration(server, model))
