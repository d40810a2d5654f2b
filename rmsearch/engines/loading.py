"""Loading: from a model's name and an engine's to a scorer, an embedder or a generator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmsearch.engines.embedding import (
    EmbeddingSpec,
    TextEmbedder,
    TextInputs,
    TokenInputs,
    pooled,
    prefixes,
    resolve_embedding,
)
from rmsearch.engines.generation import TextGenerator
from rmsearch.engines.http import HTTPEmbedding, HTTPGeneration, HTTPScoring, TextRenderer
from rmsearch.engines.options import EngineOptions, engine_options
from rmsearch.engines.scheduler import PairScorer
from rmsearch.engines.server import Server, served_model
from rmsearch.engines.transformers import (
    TransformersBackend,
    TransformersGeneration,
    load_classifier,
    load_plain,
    require_torch,
    scoring_backend,
)
from rmsearch.engines.vllm import VLLMGeneration, embedding_engine, generating_engine, scoring_engine
from rmsearch.errors import ConfigError
from rmsearch.models.contract import Contract
from rmsearch.models.folder import PACKAGED_NAMES, ModelFolder, open_model
from rmsearch.models.heads import adapter_base, classifier_folder, merged_folder
from rmsearch.models.resolve import resolve_contract
from rmsearch.prompts.renderer import Renderer
from rmsearch.prompts.templates import Template
from rmsearch.storage.uri import is_s3

LOCAL_OPTIONS = {"device"}  # of the transformers engine
SERVER_OPTIONS = {"model", "timeout_s", "attempts"}


def scorer(
    name: str, given: dict[str, Any], *, lora: str | None, template: str | Template | None, max_length: int | None
) -> PairScorer:
    """The scorer that ``load_scorer`` returns."""
    options = engine_options(**given)
    if options.engine == "http":
        return http_scorer(name, options, lora=lora, template=template, max_length=max_length)
    reward = open_reward(name, lora, template, max_length)
    return vllm_scorer(reward, options) if options.engine == "vllm" else transformers_scorer(reward, options)


def embedder(name: str, given: dict[str, Any], embedding: dict[str, Any]) -> TextEmbedder:
    """The embedder that ``load_embedder`` returns."""
    options = engine_options(**given)
    return (
        http_embedder(name, options, embedding)
        if options.engine == "http"
        else local_embedder(name, options, embedding)
    )


def generator(name: str, given: dict[str, Any], max_length: int | None) -> TextGenerator:
    """The generator that ``load_generator`` returns."""
    options = engine_options(**given)
    return http_generator(name, options) if options.engine == "http" else local_generator(name, options, max_length)


@dataclass(frozen=True)
class RewardFolder:
    """A reward model opened on this machine, before an engine has it. ``adapter``: a LoRA folder on top."""

    folder: ModelFolder
    adapter: ModelFolder | None
    contract: Contract
    renderer: Renderer

    def load(self, **options: Any) -> Any:
        """The torch model, its adapter merged; options of `load_classifier`."""
        return load_classifier(self.folder, self.contract, adapter=self.adapter, **options)


def open_reward(name: str, lora: str | None, template: str | Template | None, max_length: int | None) -> RewardFolder:
    """Opens a model folder, or an adapter folder with its base, and resolves its contract."""
    require_torch()
    folder, adapter = ModelFolder.open(name), None if lora is None else ModelFolder.open(lora)
    if folder.is_adapter:
        if adapter is not None:
            raise ConfigError(f"{name} is an adapter itself", remedy="Give its base as model, or leave lora away")
        folder, adapter = ModelFolder(open_model(adapter_base(folder)), name), folder
    contract = resolve_contract(folder, template_name=template, max_length=max_length, adapter=adapter)
    renderer = Renderer(folder.tokenizer, contract.template, contract.max_length)
    return RewardFolder(folder, adapter, contract, renderer)


def transformers_scorer(reward: RewardFolder, options: EngineOptions) -> PairScorer:
    """A scorer with torch on this machine."""
    model = reward.load(dtype=options.dtype, **options.extra_of(LOCAL_OPTIONS))
    backend = scoring_backend(model, reward.folder, reward.contract, options.batch_tokens)
    return PairScorer(backend, reward.renderer, reward.contract)


def vllm_scorer(reward: RewardFolder, options: EngineOptions) -> PairScorer:
    """A scorer with vLLM in this process; what vLLM can't serve as it is gets merged or converted first.

    vLLM knows LoRA for decoders only, and needs a base that has a head.
    """
    folder, adapter, contract = reward.folder, reward.adapter, reward.contract
    if adapter is not None and not (contract.pooling == "last" and folder.has_head):
        merged = merged_folder(folder, adapter, lambda: reward.load(dtype=contract.dtype, device="cpu"))
        folder, adapter = ModelFolder(merged, folder.name), None
    path, lora = classifier_folder(folder), None if adapter is None else adapter.path
    arguments = options.vllm_arguments()
    backend = scoring_engine(path, contract, dtype=options.dtype, adapter=lora, arguments=arguments)
    return PairScorer(backend, reward.renderer, contract)


def is_local(name: str) -> bool:
    """Whether a model's name means files that we can open without asking a model hub."""
    return name != "" and (is_s3(name) or name in PACKAGED_NAMES or Path(name).expanduser().is_dir())


def _connect(options: EngineOptions) -> Server:
    assert options.base_url is not None, "pick_engine asks for one"
    settings = {name: value for name, value in options.extra.items() if name in ("timeout_s", "attempts")}
    return Server(options.base_url, concurrency=options.concurrency, **settings)


def _connect_to_model(options: EngineOptions, model: str | None, max_length: int | None) -> tuple[Server, str | None]:
    """The server and its name for the model; see `rmsearch.engines.server.served_model`."""
    server = _connect(options)
    try:
        return server, served_model(server, model, max_length)
    except BaseException:
        server.close_sync()
        raise


def http_scorer(
    name: str, options: EngineOptions, *, lora: str | None, template: str | Template | None, max_length: int | None
) -> PairScorer:
    """A scorer behind a server.

    A model whose folder is here too is sent as token ids, or, when it needs token types (which ids over HTTP lack), as
    texts cut to its length. Any other name is the server's own, and gets texts; without one the server's only model is
    meant.
    """
    extra = options.extra_of(SERVER_OPTIONS | {"route"})
    model, route = extra.get("model"), extra.get("route", "auto")
    if route not in ("auto", "classify", "score", "rerank"):
        raise ConfigError(f"unknown route {route!r}", remedy="One of: auto, classify, score, rerank")
    reward = open_reward(name, lora, template, max_length) if is_local(name) else None
    if reward is None and (template is not None or lora is not None or route == "classify"):
        raise ConfigError(
            f"the model {name!r} is no folder here, so a template, an adapter or token ids cannot be applied to it",
            remedy="Give the model's folder or s3:// URI, and the server's name for it as model=…",
        )
    if reward is None:
        server, served = _connect_to_model(options, model or name or None, None)
        backend = HTTPScoring(server, served, "score" if route == "auto" else route, prefix_cache=False, fallback=True)
        return PairScorer(backend, TextRenderer(None), None)
    route, contract = _route(route, reward), reward.contract
    server, served = _connect_to_model(options, model, contract.max_length)
    backend = HTTPScoring(server, served, route, prefix_cache=contract.pooling == "last", fallback=False)
    return PairScorer(backend, reward.renderer if route == "classify" else TextRenderer(reward.renderer), contract)


def _route(route: str, reward: RewardFolder) -> Any:
    """The route to take; ConfigError for one that would give other scores than the model's own."""
    segment, template = reward.contract.token_types == "segment", reward.contract.template.name
    if route == "auto":
        return "score" if segment else "classify"
    if segment and route == "classify":
        problem = f"{reward.folder.where} needs token types, which ids sent to /classify lack"
        raise ConfigError(problem, remedy="Leave route away, or use route='score'")
    if not segment and route != "classify" and template != "encoder":
        problem = f"/{route} joins texts without the template {template!r}"
        raise ConfigError(problem, remedy="Leave route away: token ids go to /classify")
    return route


def local_embedder(name: str, options: EngineOptions, given: dict[str, Any]) -> TextEmbedder:
    """An embedder with transformers or vLLM on this machine."""
    require_torch()
    folder = ModelFolder.open(name)
    spec = resolve_embedding(folder, **given)
    inputs = TokenInputs(folder.tokenizer, spec.max_length)
    if options.engine == "vllm":
        stored, arguments = folder.facts.dtype, options.vllm_arguments()
        backend = embedding_engine(folder.path, spec, dtype=options.dtype, stored=stored, arguments=arguments)
        return TextEmbedder(backend, inputs, spec)
    model = load_plain("AutoModel", folder, dtype=options.dtype, **options.extra_of(LOCAL_OPTIONS))
    pad = folder.tokenizer.pad_token_id if folder.tokenizer.pad_token_id is not None else 0
    read_out, tokens = pooled(spec.pooling), options.batch_tokens
    return TextEmbedder(TransformersBackend(model, read_out, pad_token_id=pad, batch_tokens=tokens), inputs, spec)


def http_embedder(name: str, options: EngineOptions, given: dict[str, Any]) -> TextEmbedder:
    """An embedder behind /v1/embeddings: ids for a model whose folder is here too, else texts."""
    model = options.extra_of(SERVER_OPTIONS).get("model")
    inputs: TokenInputs | TextInputs
    if is_local(name):
        folder = ModelFolder.open(name)
        spec = resolve_embedding(folder, **given)
        inputs = TokenInputs(folder.tokenizer, spec.max_length)
    else:
        query, key = prefixes(name, given["query_instruction"], given["key_instruction"])
        spec = EmbeddingSpec(given["pooling"] or "mean", given["max_length"] or 0, query, key)
        inputs, model = TextInputs(), model or name
    server, served = _connect_to_model(options, model, None)
    return TextEmbedder(HTTPEmbedding(server, served), inputs, spec)


def local_generator(name: str, options: EngineOptions, max_length: int | None) -> TextGenerator:
    """A generator with transformers or vLLM on this machine."""
    require_torch()
    folder = ModelFolder.open(name)
    if options.engine == "vllm":
        engine = generating_engine(
            folder.path,
            dtype=options.dtype,
            stored=folder.facts.dtype,
            max_length=max_length,
            arguments=options.vllm_arguments(),
        )
        return TextGenerator(VLLMGeneration(engine, folder.tokenizer))
    model = load_plain("AutoModelForCausalLM", folder, dtype=options.dtype, **options.extra_of(LOCAL_OPTIONS))
    return TextGenerator(TransformersGeneration(model, folder.tokenizer))


def http_generator(name: str, options: EngineOptions) -> TextGenerator:
    """A generator behind /v1/chat/completions."""
    model = options.extra_of(SERVER_OPTIONS).get("model") or name
    return TextGenerator(HTTPGeneration(_connect(options), model))
