"""``rmsearch.json``: what a reward model was trained with, and so how it must be used. Lies in every model folder.

A folder without one gets an inferred contract; using a model in another way than its contract says is a ContractError.
"""

from __future__ import annotations

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rmsearch.errors import ContractError, ModelError
from rmsearch.prompts.templates import Order, Template, template_hash

CONTRACT_FILE = "rmsearch.json"
Dtype = Literal["float32", "bfloat16", "float16"]


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
        """The probability of relevance, in [0, 1]; a separate number, never a replacement of the reward."""
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


def read_contract(folder: Path) -> Contract | None:
    """The contract in a folder, None when there is none; ContractError when it does not hold together."""
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


def package_versions() -> dict[str, str]:
    """Versions of the packages that a score depends on, of those installed."""
    versions = {}
    for package in ("rmsearch", "torch", "transformers", "trl", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
