"""What of a model learns: where LoRA goes, which layers train without it, how pooler and dropout start."""

from __future__ import annotations

import re
from typing import Any

from rmsearch.errors import ConfigError, ModelError
from rmsearch.trainer.config import TrainingConfig
from rmsearch.trainer.model import HEADS, Base

_LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|blocks)\.(\d+)\.")


def wrap(config: TrainingConfig, base: Base) -> Any:
    """The base as it is trained: with LoRA, or with its own weights (all or some layers) learning."""
    set_dropout(base.model, config.dropout)
    start_pooler(base.model, config.pooler)
    if not config.lora_r:
        freeze_outside(base.model, config.lora_layers, embeddings=config.train_embeddings)
        return base.model
    from peft import get_peft_model

    adapter = lora_config(
        base,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_targets,
        layers=config.lora_layers,
    )
    model = get_peft_model(base.model, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:  # small updates vanish in bfloat16
            parameter.data = parameter.data.float()
    return model


def layer_linears(model: Any) -> dict[str, int]:
    """Linear modules inside the stack of layers: full name -> layer number. (Attention and MLP, not the head.)"""
    import torch

    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (match := _LAYER.search(name)):
            linears[name] = int(match[1])
    return linears


def choose_layers(text: str, count: int) -> list[int]:
    """Layer numbers of "all", "last-N", "3", "13-27" or "25,26,27". ConfigError for what the model lacks."""
    where = "--lora-layers"
    if text == "all":
        return list(range(count))
    layers: list[int] = []
    for part in text.split(","):
        if match := re.fullmatch(r"\s*last-(\d+)\s*", part):
            if not 0 < int(match[1]) <= count:
                raise ConfigError(f"the model has {count} layers, not {match[1]}", where=where)
            layers += range(count - int(match[1]), count)
        elif match := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part):
            layers += range(int(match[1]), int(match[2] or match[1]) + 1)
        else:
            raise ConfigError(f"cannot read {text!r}", where=where, remedy="Write all, last-4, 25,26,27 or 13-27")
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
        raise ModelError("no linear layers were found in a stack of layers", where=str(base.folder.path))
    picked = choose_layers(layers, max(linears.values()) + 1)
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    names = leaves if targets == "auto" else [part.strip() for part in targets.split(",")]
    if unknown := sorted(set(names) - set(leaves)):
        remedy = f"It has: {', '.join(leaves)}"
        raise ConfigError(f"the model has no linear {', '.join(unknown)}", where="--lora-targets", remedy=remedy)
    every = len(picked) == max(linears.values()) + 1
    options: dict[str, Any] = {"target_modules": names}
    if _outside(base.model, names, linears):
        numbers = r"\d+" if every else f"(?:{'|'.join(map(str, picked))})"
        options["target_modules"] = rf".*\.(?:layer|layers|h|blocks)\.{numbers}\..*?({'|'.join(names)})"
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
