"""Reward heads in all the forms that checkpoints carry them, adapters, and conversion to a sequence classifier."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmsearch.errors import ModelError
from rmsearch.models.contract import (
    HEAD_NAMES,
    infer_contract,
    load_json,
    make_contract,
    model_facts,
    read_contract,
    tensor_names,
    write_contract,
)
from rmsearch.models.folder import SCORE_FILE

ADAPTER_FILE = "adapter_config.json"
# Names under which GRM-like checkpoints keep a linear head of shape [1, hidden].
HEAD_ALIASES = ("v_head.weight", "v_head.summary.weight", "value_head.weight", "reward_head.weight")
# A Qwen3 tokenizer has several tokens that read yes; the reranker was trained with the lower-case ones.
YES, NO = "yes", "no"
_CAUSAL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"


def foreign_head(folder: Path, tokenizer: Any) -> Any:
    """The head's weight (float32 tensor [1, hidden]) when it is not where a sequence classifier has it, else None.

    Known: upstream's ``score.pt``; value-head names; a causal model that answers yes or no (logit(yes) - logit(no)).
    """
    names = tensor_names(folder)
    if any(f"{name}.weight" in names for name in HEAD_NAMES):
        return None
    if (folder / SCORE_FILE).exists():
        return _score_file(folder / SCORE_FILE)
    for alias in HEAD_ALIASES:
        if alias in names:
            return _one_row(read_tensor(folder, alias).float(), folder, alias)
    return yes_no_head(folder, tokenizer) if model_facts(folder).causal else None


def _score_file(path: Path) -> Any:
    import torch

    try:
        weight = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"is no tensor: {error}", where=str(path), remedy="Convert the model again") from None
    if not isinstance(weight, torch.Tensor):
        raise ModelError("is no tensor", where=str(path), remedy="Convert the model again")
    return _one_row(weight.float(), path.parent, path.name)


def _one_row(weight: Any, folder: Path, name: str) -> Any:
    if weight.dim() == 1:
        weight = weight[None]
    if weight.dim() != 2 or weight.shape[0] != 1:
        raise ModelError(
            f"the head {name} has the shape {list(weight.shape)}, not [1, hidden]",
            where=str(folder),
            remedy="Give a model with one scalar reward",
        )
    return weight


def yes_no_head(folder: Path, tokenizer: Any, yes: str = YES, no: str = NO) -> Any:
    """float32[1, hidden]: the row of ``yes`` minus the row of ``no`` in the language model's head."""
    names = tensor_names(folder)
    matrix = next((name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in names), None)
    if matrix is None:
        raise ModelError("has no language model head", where=str(folder), remedy="Give the model as it was released")
    rows = []
    for word in (yes, no):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ModelError(
                f"the answer {word!r} is {len(ids)} tokens of this tokenizer, not one",
                where=str(folder),
                remedy="Only a yes/no reranker such as Qwen3-Reranker can be scored this way",
            )
        rows.append(read_tensor(folder, matrix, row=ids[0]).float())
    return (rows[0] - rows[1])[None]


def read_tensor(folder: Path, name: str, row: int | None = None) -> Any:
    """A tensor of the folder's safetensors files, or one row of it without reading the others."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  safe_open is no mapping
                return file.get_tensor(name) if row is None else file.get_slice(name)[row]
    raise ModelError(f"the tensor {name} is not there", where=str(folder), remedy="Copy the model folder again")


def causal_to_classifier(folder: Path, out: Path, *, name: str | None = None) -> Path:
    """Writes a causal reranker, or a causal folder with ``score.pt`` or a value head, as a sequence classifier.

    Works shard by shard, so memory stays at one shard. The head is written in the checkpoint's dtype, all else as it
    is, without the language model's head. Returns ``out``, which all engines load. ModelError when there is no head.
    """
    from transformers import AutoTokenizer

    facts = model_facts(folder)
    contract = read_contract(folder) or infer_contract(folder, name)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    head = foreign_head(folder, tokenizer)
    if head is None:
        raise ModelError(f"{facts.architecture} needs no conversion", where=str(folder), remedy="Use it as it is")
    out.mkdir(parents=True, exist_ok=True)
    _copy_side_files(folder, out)
    _write_shards(folder, out, head)
    config = load_json(folder / "config.json")
    config["architectures"] = [facts.architecture.replace(_CAUSAL, _CLASSIFIER)]
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    kept = contract.model_dump(include={"calibration", "base_model", "base_digest", "training", "dtype"})
    write_contract(out, make_contract(out, contract.template, contract.max_length, **kept))
    return out


def _copy_side_files(folder: Path, out: Path) -> None:
    skipped = {"config.json", "rmsearch.json", SCORE_FILE, "model.safetensors.index.json"}
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in {".safetensors", ".bin", ".pt", ".pth"} and path.name not in skipped:
            shutil.copyfile(path, out / path.name)


def _write_shards(folder: Path, out: Path, head: Any) -> None:
    """Copies all tensors but the old heads, adds ``score.weight`` to the last shard, writes the index."""
    from safetensors.torch import load_file, save_file

    dropped = {"lm_head.weight", *HEAD_ALIASES}
    shards = sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    total = 0
    for i, path in enumerate(shards):
        tensors = {name: tensor for name, tensor in load_file(path).items() if name not in dropped}
        if i == len(shards) - 1:
            dtype = next(iter(tensors.values())).dtype if tensors else head.dtype
            tensors["score.weight"] = head.to(dtype).contiguous()
        save_file(tensors, out / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def classifier_folder(folder: Path, tokenizer: Any, name: str | None = None) -> Path:
    """A folder that any engine loads as a sequence classifier: this one, or its conversion, made once and cached.

    ModelError when the model has no head: engines other than transformers would start with a random one.
    """
    names = tensor_names(folder)
    if any(f"{head}.weight" in names for head in HEAD_NAMES):
        return folder
    if foreign_head(folder, tokenizer) is None:
        raise ModelError("has no reward head", where=str(folder), remedy="Train one with `rmsearch train lora`")
    return _cached("classifiers", [folder], lambda out: causal_to_classifier(folder, out, name=name))


def merged_folder(folder: Path, adapter: Path, tokenizer: Any, merge: Callable[[], Any]) -> Path:
    """A folder with the adapter merged in, made once by ``merge() -> model`` and cached."""

    def build(out: Path) -> None:
        model = merge()
        out.mkdir(parents=True)
        model.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))

    return _cached("merged", [folder, adapter], build)


def _cached(kind: str, sources: list[Path], build: Callable[[Path], object]) -> Path:
    """``build(out)`` into the cache under the digest of its sources; another process may do the same meanwhile."""
    from rmsearch.storage.folders import cache_folder
    from rmsearch.storage.uri import digest

    key = hashlib.sha256("".join(digest(str(source)) for source in sources).encode()).hexdigest()[:32]
    target = cache_folder() / kind / key
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        out = Path(scratch) / "model"
        build(out)
        with contextlib.suppress(OSError):
            out.rename(target)
    if not target.exists():
        raise ModelError("cannot be written", where=str(target), remedy="Set RMSEARCH_CACHE to a folder with room")
    return target


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a LoRA adapter rather than a model."""
    return (folder / ADAPTER_FILE).exists() and not (folder / "config.json").exists()


def adapter_base(folder: Path) -> str:
    """The name or path of the model that an adapter was trained on."""
    base = load_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            "names no base model", where=str(folder / ADAPTER_FILE), remedy="Give the base as model and this as lora"
        )
    beside = folder / str(base)
    return str(beside) if beside.is_dir() else str(base)


def merge_adapter(model: Any, adapter: Path) -> Any:
    """The model with the adapter's weights (and its trained head) merged in."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"does not fit the base model: {reason}", where=str(adapter), remedy="Give the base it was trained on"
        ) from None
