"""How a model must be used: its contract as written, or as inferred from what its folder holds."""

from __future__ import annotations

import logging
from typing import Any

from rmsearch.errors import ConfigError, ContractError, ModelError
from rmsearch.models.contract import CONTRACT_FILE, Contract, Head, package_versions
from rmsearch.models.folder import ENCODER_LENGTH, HEAD_NAMES, ModelFolder
from rmsearch.prompts.templates import TEMPLATES, Template, template, template_hash

DECODER_LENGTH = 2048  # of a decoder without a contract; far below what it could read, above what a pair needs
_TRAIN_REMEDY = "Train one with `rmsearch train lora`, or give a sequence-classification model with one label"
logger = logging.getLogger(__name__)


def make_contract(
    folder: ModelFolder, spec: Template, max_length: int, *, inferred: bool = False, **facts: Any
) -> Contract:
    """The contract of the model in ``folder`` used with a template.

    facts: further fields of Contract (dtype, base_model, base_digest, training, calibration, versions, …), which win
    over what the folder's configuration says.
    """
    fields: dict[str, Any] = {
        "architecture": folder.facts.architecture,
        "head": Head(bias=any(f"{name}.bias" in folder.tensors for name in HEAD_NAMES)),
        "pooling": "cls" if folder.facts.encoder else "last",
        "pad_token_id": folder.facts.pad_token_id,
        "dtype": folder.facts.dtype,
        "versions": {} if inferred else package_versions(),
    }
    return Contract(
        **(fields | facts),
        template=spec,
        template_hash=template_hash(spec),
        order=spec.order,
        token_types=spec.token_types,
        max_length=max_length,
        inferred=inferred,
    )


def own_length(folder: ModelFolder) -> int:
    """Tokens per pair of a model without a contract."""
    return min(ENCODER_LENGTH if folder.facts.encoder else DECODER_LENGTH, folder.facts.max_positions)


def infer_contract(folder: ModelFolder, spec: Template | None = None, *, headless: bool = False) -> Contract:
    """The contract of a released model that carries none; ModelError when the folder holds no reward model."""
    facts = folder.facts
    if facts.classifier and facts.num_labels != 1:
        problem = f"the head has {facts.num_labels} labels, a reward model's has one"
        raise ModelError(problem, where=folder.where, remedy=_TRAIN_REMEDY)
    if headless and not facts.classifier and spec is None:
        problem = f"the adapter has no {CONTRACT_FILE}, so its template is unknown"
        raise ContractError(problem, where=folder.where, remedy="Name template=…")
    chosen = spec or _inferred_template(folder)
    return make_contract(folder, chosen, own_length(folder), inferred=True, base_model=folder.name)


def _inferred_template(folder: ModelFolder) -> Template:
    facts, where = folder.facts, folder.where
    if facts.classifier and facts.encoder:
        return TEMPLATES["encoder_segment"]
    if facts.classifier or (facts.causal and folder.score_file.exists()):
        spec = TEMPLATES["upstream_search" if facts.chat else "plain"]
        logger.warning(
            "%s has no %s: using the template %r. If it was trained with another, name it (template=…): "
            "a wrong template gives useless scores without any error",
            where,
            CONTRACT_FILE,
            spec.name,
        )
        return spec
    if facts.causal and "reranker" in f"{where} {folder.path.name}".lower():
        logger.warning("%s is a causal model named reranker: scoring its answer yes against no", where)
        return TEMPLATES["qwen3_reranker"]
    if facts.causal:
        raise ModelError(
            f"{facts.architecture} is a language model without a reward head",
            where=where,
            remedy="If it is a yes/no reranker, name its template (template='qwen3_reranker'). " + _TRAIN_REMEDY,
        )
    raise ModelError(f"{facts.architecture or 'the model'} has no reward head", where=where, remedy=_TRAIN_REMEDY)


def resolve_contract(
    folder: ModelFolder,
    *,
    template_name: str | Template | None = None,
    max_length: int | None = None,
    adapter: ModelFolder | None = None,
) -> Contract:
    """The contract to use the model in ``folder`` with, checked against its configuration and what the user asks for.

    adapter: a LoRA folder that goes on top; its contract comes first, and the model needs no head of its own.
    """
    asked = None if template_name is None else template(template_name)
    adapted = None if adapter is None else adapter.contract
    contract = adapted or folder.contract
    if contract is None:
        contract = infer_contract(folder, asked, headless=adapter is not None)
    elif asked is not None:
        require_template(contract, asked, folder.where, "or train the model with the other one")
    if adapted is None and contract.architecture != folder.facts.architecture:
        raise ContractError(
            f"{CONTRACT_FILE} speaks of {contract.architecture}, config.json of {folder.facts.architecture}",
            where=folder.where,
            remedy="The folder mixes two models: export it again",
        )
    if folder.facts.encoder != (contract.template.kind == "encoder"):
        kind, remedy = ("decoders", "Use template='encoder'") if folder.facts.encoder else ("encoders", _DECODERS)
        problem = f"the template {contract.template.name!r} is for {kind}"
        raise ContractError(problem, where=folder.where, remedy=remedy)
    return contract if max_length is None else _with_length(contract, max_length, folder)


def require_template(contract: Contract, asked: Template, where: str, otherwise: str) -> None:
    """ContractError when the model was trained with another template; ``otherwise`` ends its remedy."""
    if not contract.inferred and template_hash(asked) != contract.template_hash:
        raise ContractError(
            f"trained with the template {contract.template.name!r} ({contract.template_hash}), "
            f"asked to use {asked.name!r} ({template_hash(asked)})",
            where=where,
            remedy=f"Leave the template away, {otherwise}",
        )


_DECODERS = "Use 'chat' or 'plain'"


def _with_length(contract: Contract, max_length: int, folder: ModelFolder) -> Contract:
    positions = folder.facts.max_positions
    if max_length > positions:
        raise ConfigError(
            f"max_length {max_length} is more than the {positions} positions of the model",
            where=folder.where,
            remedy=f"Give at most {positions}",
        )
    if max_length > contract.max_length and not contract.inferred:
        logger.warning("%s was trained with %s tokens, used with %s", folder.where, contract.max_length, max_length)
    return contract.model_copy(update={"max_length": max_length})
