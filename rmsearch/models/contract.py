"""``rmsearch.json``: what a reward model was trained with, and so how it must be used. Lies in every model folder.

A folder without one gets an inferred contract; using a model in another way than its contract says is a ContractError.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rmsearch.errors import ConfigError, ContractError, ModelError
from rmsearch.prompts.templates import TEMPLATES, Order, Template, template, template_hash

CONTRACT_FILE = "rmsearch.json"
DECODER_LENGTH = 2048  # of a decoder without a contract; far below what it could read, above what a pair needs
ENCODER_LENGTH = 512
ENCODERS = frozenset(
    [
        "albert",
        "bert",
        "camembert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
    ]
)
HEAD_NAMES = ("score", "classifier", "classifier.out_proj")
Dtype = Literal["float32", "bfloat16", "float16"]
logger = logging.getLogger(__name__)


class Head(BaseModel):
    """The linear layer that gives the reward."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_labels: int = 1
    bias: bool = False


class Calibration(BaseModel):
    """Platt scaling fitted on held-out pairs: probability = sigmoid(a * reward + b)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    a: float
    b: float

    def probability(self, reward: float) -> float:
        """In [0, 1]; a separate number, never a replacement of the reward."""
        x = self.a * reward + self.b
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


class Contract(BaseModel):
    """How a model was trained and must be used. ``inferred`` is True when no file said so (never written)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    architecture: str
    head: Head = Head()
    template: Template
    template_hash: str
    order: Order
    token_types: Literal["zero", "segment"] = "zero"
    max_length: int
    dtype: Dtype = "float32"
    pooling: Literal["cls", "last"]
    activation: Literal["none"] = "none"
    pad_token_id: int | None = None
    calibration: Calibration | None = None
    base_model: str | None = None
    base_digest: str | None = None
    training: dict[str, Any] = {}
    versions: dict[str, str] = {}
    inferred: bool = False


class ModelFacts(BaseModel):
    """What ``config.json`` and the tokenizer files of a model folder say."""

    model_config = ConfigDict(frozen=True)
    architecture: str
    model_type: str
    num_labels: int
    max_positions: int
    pad_token_id: int | None
    dtype: Dtype
    chat: bool

    @property
    def encoder(self) -> bool:
        return self.model_type in ENCODERS

    @property
    def classifier(self) -> bool:
        return self.architecture.endswith("ForSequenceClassification")

    @property
    def causal(self) -> bool:
        return self.architecture.endswith("ForCausalLM")


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; ModelError when it is missing or does not parse."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no {path.name} there", where=str(path.parent), remedy="Give a model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(path), remedy="Copy the model folder again") from None
    if not isinstance(value, dict):
        raise ModelError("is no JSON object", where=str(path), remedy="Copy the model folder again")
    return value


def model_facts(folder: Path) -> ModelFacts:
    """Reads a model folder's configuration."""
    config = load_json(folder / "config.json")
    text = config.get("text_config", config)
    positions = int(text.get("max_position_embeddings", ENCODER_LENGTH))
    if "roberta" in str(config.get("model_type")):
        positions -= 2  # RoBERTa's positions start after the padding id
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ModelFacts(
        architecture=(config.get("architectures") or [""])[0],
        model_type=str(config.get("model_type", "")),
        num_labels=len(config["id2label"]) if "id2label" in config else int(config.get("num_labels", 2)),
        max_positions=positions,
        pad_token_id=config.get("pad_token_id"),
        dtype=dtype if dtype in ("float32", "bfloat16", "float16") else "float32",
        chat=_has_chat_template(folder),
    )


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    path = folder / "tokenizer_config.json"
    return path.exists() and bool(load_json(path).get("chat_template"))


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in the folder's safetensors files, from their headers alone."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        names |= set(_header(path)) - {"__metadata__"}
    return names


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(size))
    except (OSError, struct.error, ValueError, MemoryError, OverflowError):
        raise ModelError(
            "is no complete safetensors file", where=str(path), remedy="Copy the model folder again"
        ) from None


def read_contract(folder: Path) -> Contract | None:
    """The folder's contract; None when it has none; ContractError when it does not hold together."""
    path = folder / CONTRACT_FILE
    if not path.exists():
        return None
    remedy = "Copy the model folder again, or delete the file to have the contract inferred"
    try:
        contract = Contract.model_validate(load_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ContractError(f"{field}: {first['msg']}", where=str(path), remedy=remedy) from None
    spec = contract.template
    agrees = contract.order == spec.order and contract.token_types == spec.token_types
    if not agrees or contract.template_hash != template_hash(spec):
        raise ContractError("the template was changed after the model was trained", where=str(path), remedy=remedy)
    return contract


def write_contract(folder: Path, contract: Contract) -> None:
    """Writes ``rmsearch.json`` into a model folder."""
    text = contract.model_dump_json(indent=2, exclude={"inferred"})
    (folder / CONTRACT_FILE).write_text(text + "\n", encoding="utf-8")


def make_contract(folder: Path, spec: Template, max_length: int, *, inferred: bool = False, **facts: Any) -> Contract:
    """The contract of the model in ``folder`` used with a template.

    facts: further fields of Contract (dtype, base_model, base_digest, training, calibration, versions, …), which win
    over what the folder's configuration says.
    """
    config = model_facts(folder)
    names = tensor_names(folder)
    fields: dict[str, Any] = {
        "architecture": config.architecture,
        "head": Head(bias=any(f"{name}.bias" in names for name in HEAD_NAMES)),
        "pooling": "cls" if config.encoder else "last",
        "pad_token_id": config.pad_token_id,
        "dtype": config.dtype,
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


def package_versions() -> dict[str, str]:
    """Versions of the packages that a score depends on, of those installed."""
    found = {}
    for package in ("rmsearch", "torch", "transformers", "trl", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def infer_contract(
    folder: Path, name: str | None = None, spec: Template | None = None, *, headless: bool = False
) -> Contract:
    """The contract of a released model that carries none; ``name`` is what the user called it.

    ModelError when the folder holds no reward model.
    """
    facts = model_facts(folder)
    where = name or str(folder)
    if facts.classifier and facts.num_labels != 1:
        raise ModelError(
            f"the head has {facts.num_labels} labels, a reward model's has one", where=where, remedy=_TRAIN_REMEDY
        )
    if headless and not facts.classifier and spec is None:
        raise ContractError(
            f"the adapter has no {CONTRACT_FILE}, so its template is unknown", where=where, remedy="Name template=…"
        )
    chosen = spec or _inferred_template(facts, folder, where)
    length = min(ENCODER_LENGTH if facts.encoder else DECODER_LENGTH, facts.max_positions)
    return make_contract(folder, chosen, length, inferred=True, base_model=name)


_TRAIN_REMEDY = "Train one with `rmsearch train lora`, or give a sequence-classification model with one label"


def _inferred_template(facts: ModelFacts, folder: Path, where: str) -> Template:
    if facts.classifier and facts.encoder:
        return TEMPLATES["encoder_segment"]
    if facts.classifier or (facts.causal and (folder / "score.pt").exists()):
        spec = TEMPLATES["upstream_search" if facts.chat else "plain"]
        logger.warning(
            "%s has no %s: using the template %r. If it was trained with another, name it (template=…): "
            "a wrong template gives useless scores without any error",
            where,
            CONTRACT_FILE,
            spec.name,
        )
        return spec
    if facts.causal and "reranker" in f"{where} {folder.name}".lower():
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
    folder: Path,
    *,
    name: str | None = None,
    template_name: str | Template | None = None,
    max_length: int | None = None,
    contract_folder: Path | None = None,
    headless: bool = False,
) -> Contract:
    """The contract to use the model in ``folder`` with, checked against its configuration and the user's wishes.

    contract_folder: where ``rmsearch.json`` lies when not beside the model, such as an adapter's folder.
    headless: the folder is the base of an adapter that brings the head, so it needs none of its own.
    """
    asked = None if template_name is None else template(template_name)
    contract = read_contract(contract_folder or folder)
    where = name or str(folder)
    if contract is None:
        contract = infer_contract(folder, name, asked, headless=headless)
    elif asked is not None and template_hash(asked) != contract.template_hash:
        raise ContractError(
            f"trained with the template {contract.template.name!r} ({contract.template_hash}), "
            f"asked to use {asked.name!r} ({template_hash(asked)})",
            where=where,
            remedy="Leave the template away, or train the model with the other one",
        )
    facts = model_facts(folder)
    if contract_folder in (None, folder):
        _check_architecture(contract, facts, where)
    _check_template(contract, facts, where)
    return contract if max_length is None else _with_length(contract, max_length, facts, where)


def _check_architecture(contract: Contract, facts: ModelFacts, where: str) -> None:
    if contract.architecture != facts.architecture:
        raise ContractError(
            f"{CONTRACT_FILE} speaks of {contract.architecture}, config.json of {facts.architecture}",
            where=where,
            remedy="The folder mixes two models: export it again",
        )


def _check_template(contract: Contract, facts: ModelFacts, where: str) -> None:
    if facts.encoder == (contract.template.kind == "encoder"):
        return
    if facts.encoder:
        raise ContractError(
            f"the template {contract.template.name!r} is for decoders", where=where, remedy="Use template='encoder'"
        )
    raise ContractError(
        f"the template {contract.template.name!r} is for encoders", where=where, remedy="Use 'chat' or 'plain'"
    )


def _with_length(contract: Contract, max_length: int, facts: ModelFacts, where: str) -> Contract:
    if max_length > facts.max_positions:
        raise ConfigError(
            f"max_length {max_length} is more than the {facts.max_positions} positions of the model",
            where=where,
            remedy=f"Give at most {facts.max_positions}",
        )
    if max_length > contract.max_length and not contract.inferred:
        logger.warning("%s was trained with %s tokens, used with %s", where, contract.max_length, max_length)
    return contract.model_copy(update={"max_length": max_length})
