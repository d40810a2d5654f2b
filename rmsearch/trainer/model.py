"""The model to train: a base of any supported kind with a reward head, its tokenizer, and where LoRA goes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmsearch.errors import ConfigError, ModelError
from rmsearch.models.contract import DECODER_LENGTH, ModelFacts, infer_contract, model_facts, read_contract
from rmsearch.prompts.templates import Order, Template, default_template, template

if TYPE_CHECKING:
    from rmsearch.prompts.renderer import Renderer

ENCODER_LENGTH = 512
HEADS = ("score", "classifier")
_LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|blocks)\.(\d+)\.")


@dataclass
class Base:
    """A model that is ready to be wrapped and trained."""

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    renderer: Renderer = field(repr=False)
    facts: ModelFacts
    folder: Path
    new_parts: list[str]  # modules that start from random weights


def choose_template(
    folder: Path, facts: ModelFacts, name: str | None, order: Order | None, from_data: str | None
) -> Template:
    """The template to train with: the one asked for, else what the base was trained with, else the data's upstream
    prompt, else the family's own. ConfigError when it does not fit the model."""
    contract = read_contract(folder)
    if name is not None:
        spec = template(name)
    elif contract is not None and order in (None, contract.order):
        spec = contract.template
    elif from_data is not None and not facts.encoder:
        spec = template(from_data)
    elif facts.causal and "reranker" in folder.name.lower() and order is None:
        spec = template("qwen3_reranker")
    else:
        spec = default_template(encoder=facts.encoder, chat=facts.chat, order=order or "query_first")
    if order is not None and spec.order != order:
        raise ConfigError(f"the template {spec.name!r} is {spec.order}", where="--order", remedy="Leave --order away")
    if (spec.kind == "encoder") != facts.encoder:
        fitting = "encoder" if facts.encoder else "chat or plain"
        raise ConfigError(
            f"{spec.name!r} does not fit {facts.architecture}", where="--template", remedy=f"Use {fitting}"
        )
    if spec.token_types == "segment":
        # TRL's batches carry no token types, so training sees zeros and the model must be served with zeros.
        spec = default_template(encoder=True, chat=False, order=spec.order)
    return spec


def choose_length(folder: Path, facts: ModelFacts, asked: int | None) -> int:
    """Tokens per pair: what was asked, else the base's own, never more than the model has positions."""
    contract = read_contract(folder)
    own = contract.max_length if contract else ENCODER_LENGTH if facts.encoder else DECODER_LENGTH
    return min(asked or own, facts.max_positions)


def load_base(folder: Path, spec: Template, max_length: int, *, dtype: str, attention: str | None, seed: int) -> Base:
    """Loads a sequence classifier with one label, or a bare encoder or causal model that gets a new head.

    dtype: of the weights. attention: "eager", "sdpa", … or None for the library's choice. A yes/no reranker or a folder
    with ``score.pt`` starts from its own head. Raises ModelError for other heads and for missing weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

    from rmsearch.engines.transformers import load_tokenizer, load_weights
    from rmsearch.models.heads import is_adapter
    from rmsearch.prompts.renderer import Renderer

    if is_adapter(folder):
        remedy = (
            "Merge it first: rmsearch evaluation convert --type checkpoint --check-point-path … --base-model-path …"
        )
        raise ModelError("is a LoRA adapter, not a model", where=str(folder), remedy=remedy)
    facts = model_facts(folder)
    if facts.classifier and facts.num_labels != 1:
        remedy = "Take its base model; a new head with one label is added"
        raise ModelError(f"the head has {facts.num_labels} labels, not one", where=str(folder), remedy=remedy)
    tokenizer = load_tokenizer(folder)
    config = AutoConfig.from_pretrained(str(folder), num_labels=1)
    config.problem_type = None
    set_seed(seed)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    classifier = AutoModelForSequenceClassification
    model, missing = load_weights(classifier, folder, config=config, dtype=getattr(torch, dtype), **options)
    new = _new_parts(folder, facts, model, tokenizer, missing)
    renderer = Renderer(tokenizer, spec, max_length)
    _set_padding(model, tokenizer, renderer, folder)
    model.config.use_cache = False
    return Base(model, tokenizer, renderer, facts, folder, new)


def _new_parts(folder: Path, facts: ModelFacts, model: Any, tokenizer: Any, missing: set[str]) -> list[str]:
    """Names of the modules that are new; a known head of another form is put in place first."""
    from rmsearch.models.heads import foreign_head

    if any(name.startswith("score.") for name in missing) and _head_is_known(folder, facts):
        head = foreign_head(folder, tokenizer)
        if head is not None:
            model.score.weight.data.copy_(head)
            missing = missing - {"score.weight"}
    parts = {name.rpartition(".")[0] for name in missing}
    strange = sorted(
        p for p in parts if p.split(".")[0] not in HEADS and "pooler" not in p and "pre_classifier" not in p
    )
    if strange:
        shown = ", ".join(strange[:4])
        raise ModelError(f"these weights are missing: {shown}", where=str(folder), remedy="Copy the model again")
    return sorted(parts)


def _head_is_known(folder: Path, facts: ModelFacts) -> bool:
    if not facts.causal:
        return True
    try:
        return infer_contract(folder).template.kind == "text"
    except ModelError:  # a plain language model: the head is new
        return False


def _set_padding(model: Any, tokenizer: Any, renderer: Renderer, folder: Path) -> None:
    """Sets a pad token that no input ends with: a sequence classifier reads the reward at the last token that is not
    the pad token, so an input that ends with it would be scored one token early."""
    last = renderer.render("a", "b").ids[-1]
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    known = [i for i in dict.fromkeys([*special, *tokenizer.all_special_ids]) if i is not None]
    encoder = renderer.template.kind == "encoder"
    usable = [i for i in known if i != last] if not encoder else known
    if not usable:
        remedy = "Add a pad token to the tokenizer and its row to the embeddings"
        raise ModelError("has no special token that could pad", where=str(folder), remedy=remedy)
    if tokenizer.pad_token_id != usable[0]:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable[0])
    model.config.pad_token_id = usable[0]
    model.config.get_text_config().pad_token_id = usable[0]


def layer_linears(model: Any) -> dict[str, int]:
    """Linear modules inside the stack of layers: full name -> layer number. (Attention and MLP, not the head.)"""
    import torch

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (match := _LAYER.search(name)):
            found[name] = int(match[1])
    return found


def choose_layers(wish: str, count: int) -> list[int]:
    """Layer numbers of "all", "last-N", "3", "13-27" or "25,26,27". ConfigError for what the model lacks."""
    where = "--lora-layers"
    if wish == "all":
        return list(range(count))
    layers: list[int] = []
    for part in wish.split(","):
        if match := re.fullmatch(r"\s*last-(\d+)\s*", part):
            if not 0 < int(match[1]) <= count:
                raise ConfigError(f"the model has {count} layers, not {match[1]}", where=where)
            layers += range(count - int(match[1]), count)
        elif match := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part):
            layers += range(int(match[1]), int(match[2] or match[1]) + 1)
        else:
            raise ConfigError(f"cannot read {wish!r}", where=where, remedy="Write all, last-4, 25,26,27 or 13-27")
    if not layers or max(layers) >= count:
        most = max(layers, default=0)
        remedy = f"Give 0 to {count - 1}, or last-N"
        raise ConfigError(f"the model has the layers 0 to {count - 1}, not {most}", where=where, remedy=remedy)
    return sorted(set(layers))


def lora_config(base: Base, *, rank: int, alpha: float, dropout: float, targets: str, layers: str) -> Any:
    """PEFT's LoraConfig for a base: targets "auto" or comma-separated leaf names, layers as in `choose_layers`.

    The head, and the pooler where there is one, train in full (``modules_to_save``).
    """
    from peft import LoraConfig

    linears = layer_linears(base.model)
    if not linears:
        raise ModelError("no linear layers were found in a stack of layers", where=str(base.folder))
    picked = choose_layers(layers, max(linears.values()) + 1)
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    wanted = leaves if targets == "auto" else [part.strip() for part in targets.split(",")]
    if unknown := sorted(set(wanted) - set(leaves)):
        remedy = f"It has: {', '.join(leaves)}"
        raise ConfigError(f"the model has no linear {', '.join(unknown)}", where="--lora-targets", remedy=remedy)
    every = len(picked) == max(linears.values()) + 1
    options: dict[str, Any] = {"target_modules": wanted}
    if _outside(base.model, wanted, linears):
        numbers = r"\d+" if every else f"(?:{'|'.join(map(str, picked))})"
        options["target_modules"] = rf".*\.(?:layer|layers|h|blocks)\.{numbers}\..*?({'|'.join(wanted)})"
    elif not every:
        options |= {"layers_to_transform": picked, "layers_pattern": "layers"}
    return LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        modules_to_save=trained_whole(base.model),
        **options,
    )


def _outside(model: Any, leaves: list[str], linears: dict[str, int]) -> bool:
    """Whether a leaf name also occurs outside the stack of layers, or the stack is not named ``layers``."""
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves]
    return any(name not in linears or ".layers." not in f".{name}" for name in names)


def trained_whole(model: Any) -> list[str]:
    """Modules outside the layers that feed the reward directly: head, pooler, pre-classifier."""
    parts = [name for name, _ in model.named_modules() if name in (*HEADS, "pre_classifier")]
    if any(name.endswith(".pooler") or name == "pooler" for name, _ in model.named_modules()):
        parts.append("pooler")
    return parts


def freeze_outside(model: Any, layers: str, *, embeddings: bool) -> None:
    """For training without LoRA: only these layers (and head and pooler) learn; embeddings only if asked."""
    linears = layer_linears(model)
    count = max(linears.values()) + 1
    picked = set(choose_layers(layers, count))
    for name, parameter in model.named_parameters():
        match = _LAYER.search(name)
        if match:
            parameter.requires_grad_(int(match[1]) in picked)
        elif "embed" in name:
            parameter.requires_grad_(embeddings and len(picked) == count)


def start_pooler(model: Any, how: str, std: float = 0.02) -> None:
    """Sets the pooler of a BERT-like classifier: "keep", "new" (random) or "identity". A sentence encoder with mean
    pooling never trained the one in its file. ConfigError when the model has none and one is asked for."""
    import torch

    if how == "keep":
        return
    pooler = next((module for name, module in model.named_modules() if name.endswith("pooler.dense")), None)
    if pooler is None:
        raise ConfigError("the model has no pooler", where="--pooler", remedy="Leave it at keep")
    if how == "identity":
        torch.nn.init.eye_(pooler.weight)
    else:
        torch.nn.init.normal_(pooler.weight, std=std)
    torch.nn.init.zeros_(pooler.bias)


def set_dropout(model: Any, share: float) -> None:
    """Sets every dropout of the base model (not LoRA's own, which comes later)."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
