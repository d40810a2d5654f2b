"""The model to train: a base of any supported kind with a reward head, its tokenizer and its template."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmsearch.engines.transformers import load_weights
from rmsearch.errors import ConfigError, MissingExtraError, ModelError
from rmsearch.models.contract import Contract, Head
from rmsearch.models.folder import ModelFacts, ModelFolder
from rmsearch.models.heads import foreign_head
from rmsearch.models.resolve import infer_contract, make_contract, own_length
from rmsearch.prompts.renderer import Renderer
from rmsearch.prompts.templates import Order, Template, default_template, template
from rmsearch.storage import uri
from rmsearch.trainer.config import TrainingConfig

HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Base:
    """A model that is ready to be wrapped and trained. bf16: whether its passes run in bfloat16 autocast."""

    model: Any = field(repr=False)
    renderer: Renderer = field(repr=False)
    folder: ModelFolder
    bf16: bool = False

    @property
    def tokenizer(self) -> Any:
        return self.folder.tokenizer

    @property
    def facts(self) -> ModelFacts:
        return self.folder.facts

    @property
    def name(self) -> str:
        """A local folder by its full path, any other model by the name that it was given."""
        path = Path(self.folder.where).expanduser()
        return str(path.resolve()) if path.is_dir() else self.folder.where

    def digest(self) -> str:
        """The digest of the weights, or of the whole folder when they are in several files."""
        weights = sorted(str(path) for path in self.folder.path.glob("*.safetensors"))
        return uri.digest(weights[0] if len(weights) == 1 else str(self.folder.path))

    def checkpoint_contract(self) -> Contract:
        """The contract of this model's checkpoints, which hold an adapter or the weights and no template."""
        head = getattr(self.model, "classifier", None) or getattr(self.model, "score", None)
        bias = any(name.endswith("bias") for name, _ in head.named_parameters()) if head is not None else False
        return make_contract(
            self.folder,
            self.renderer.template,
            self.renderer.max_length,
            architecture=type(self.model).__name__,
            head=Head(bias=bias),
            pad_token_id=self.tokenizer.pad_token_id,
            base_model=self.name,
        )


def require_train() -> None:
    """MissingExtraError when a package for training is not installed; keeps libraries from calling home."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for package in ("torch", "transformers", "datasets", "accelerate", "peft", "trl"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise MissingExtraError(package, "train") from None


def prepare_base(config: TrainingConfig, data_template: str | None) -> Base:
    """Loads the base model with its head, tokenizer and template, in the precision that fits machine and config.

    data_template: the name of the template that the training data was rendered with, if it was.
    """
    require_train()
    folder = ModelFolder.open(config.model_name)
    spec = choose_template(folder, config.template, config.order, data_template)
    own = folder.contract.max_length if folder.contract else own_length(folder)
    length = min(config.max_length or own, folder.facts.max_positions)
    bf16, attention, dtype = precision(config, folder.facts.dtype)
    return load_base(folder, spec, length, dtype=dtype, attention=attention, seed=config.seed, bf16=bf16)


def choose_template(folder: ModelFolder, name: str | None, order: Order | None, from_data: str | None) -> Template:
    """The template to train with: the one asked for, else what the base was trained with, else the data's upstream
    prompt, else the family's own. ConfigError when it does not fit the model."""
    facts, contract = folder.facts, folder.contract
    if name is not None:
        spec = template(name)
    elif contract is not None and order in (None, contract.order):
        spec = contract.template
    elif from_data is not None and not facts.encoder:
        spec = template(from_data)
    elif facts.causal and "reranker" in folder.path.name.lower() and order is None:
        spec = template("qwen3_reranker")
    else:
        spec = default_template(encoder=facts.encoder, chat=facts.chat, order=order or "query_first")
    if order is not None and spec.order != order:
        raise ConfigError(f"the template {spec.name!r} is {spec.order}", where="--order", remedy="Leave --order away")
    if (spec.kind == "encoder") != facts.encoder:
        kinds = "encoder" if facts.encoder else "chat or plain"
        raise ConfigError(f"{spec.name!r} does not fit {facts.architecture}", where="--template", remedy=f"Use {kinds}")
    if spec.token_types == "segment":
        # TRL's batches carry no token types, so training sees zeros and the model must be served with zeros.
        spec = default_template(encoder=True, chat=False, order=spec.order)
    return spec


def precision(config: TrainingConfig, stored: str) -> tuple[bool, str | None, str]:
    """(bf16 autocast, attention implementation, dtype of the weights) for this machine.

    Measured on two Xeon cores with AMX, MiniLM, 64 × 48 tokens, forward and backward: fp32 0.65 s, bf16 with sdpa
    0.62 s, bf16 with eager attention 0.34 s: on a CPU sdpa's backward pass is slow in bf16.
    """
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        able = torch.cuda.is_bf16_supported()
    else:
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        able = bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    if config.dtype == "bf16" and cuda and not able:
        raise ConfigError("this GPU has no bfloat16", where="--dtype", remedy="Use --dtype fp32")
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and able)
    frozen = config.lora_r and stored == "bfloat16" and (cuda or config.dtype == "bf16")
    weights = "bfloat16" if bf16 and frozen else "float32"
    return bf16, "eager" if bf16 and not cuda else None, weights


def load_base(
    folder: ModelFolder,
    spec: Template,
    max_length: int,
    *,
    dtype: str,
    attention: str | None,
    seed: int,
    bf16: bool = False,
) -> Base:
    """Loads a sequence classifier with one label, or a bare encoder or causal model that gets a new head.

    dtype: of the weights. attention: "eager", "sdpa", … or None for the library's choice. A yes/no reranker or a folder
    with ``score.pt`` starts from its own head. Raises ModelError for other heads and for missing weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

    where = str(folder.path)
    if folder.is_adapter:
        remedy = (
            "Merge it first: rmsearch evaluation convert --type checkpoint --check-point-path … --base-model-path …"
        )
        raise ModelError("is a LoRA adapter, not a model", where=where, remedy=remedy)
    facts = folder.facts
    if facts.classifier and facts.num_labels != 1:
        remedy = "Take its base model; a new head with one label is added"
        raise ModelError(f"the head has {facts.num_labels} labels, not one", where=where, remedy=remedy)
    config = AutoConfig.from_pretrained(where, num_labels=1)
    config.problem_type = None
    set_seed(seed)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    classifier = AutoModelForSequenceClassification
    model, missing = load_weights(classifier, folder.path, config=config, dtype=getattr(torch, dtype), **options)
    if "score.weight" in missing and _head_is_known(folder) and (head := foreign_head(folder)) is not None:
        model.score.weight.data.copy_(head)
        missing.discard("score.weight")
    _check_missing(missing, where)
    renderer = Renderer(folder.tokenizer, spec, max_length)
    _set_padding(model, renderer, where)
    model.config.use_cache = False
    return Base(model, renderer, folder, bf16)


def _head_is_known(folder: ModelFolder) -> bool:
    if not folder.facts.causal:
        return True
    try:
        return infer_contract(folder).template.kind == "text"
    except ModelError:  # a plain language model: the head is new
        return False


def _check_missing(missing: set[str], where: str) -> None:
    """ModelError for weights that are missing outside the head and the pooler, which may start anew."""
    modules = {name.rpartition(".")[0] for name in missing}
    strange = sorted(m for m in modules if m.split(".")[0] not in (*HEADS, "pre_classifier") and "pooler" not in m)
    if strange:
        problem = f"these weights are missing: {', '.join(strange[:4])}"
        raise ModelError(problem, where=where, remedy="Copy the model again")


def _set_padding(model: Any, renderer: Renderer, where: str) -> None:
    """Sets a pad token that no input ends with: a sequence classifier reads the reward at the last token that is not
    the pad token, so an input that ends with it would be scored one token early."""
    tokenizer = renderer.tokenizer
    last = renderer.render("a", "b").ids[-1]
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    known = [i for i in dict.fromkeys([*special, *tokenizer.all_special_ids]) if i is not None]
    encoder = renderer.template.kind == "encoder"
    usable = [i for i in known if i != last] if not encoder else known
    if not usable:
        remedy = "Add a pad token to the tokenizer and its row to the embeddings"
        raise ModelError("has no special token that could pad", where=where, remedy=remedy)
    if tokenizer.pad_token_id != usable[0]:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable[0])
    model.config.pad_token_id = usable[0]
    model.config.get_text_config().pad_token_id = usable[0]
