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
from rmsearch.models.contract import load_json, write_contract
from rmsearch.models.folder import ADAPTER_FILE, SCORE_FILE, ModelFolder
from rmsearch.models.resolve import infer_contract, make_contract
from rmsearch.storage.folders import cache_folder
from rmsearch.storage.uri import digest

# Names under which GRM-like checkpoints keep a linear head of shape [1, hidden].
HEAD_ALIASES = ("v_head.weight", "v_head.summary.weight", "value_head.weight", "reward_head.weight")
# A Qwen3 tokenizer has several tokens that read yes; the reranker was trained with the lower-case ones.
YES, NO = "yes", "no"
_CAUSAL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"


def foreign_head(folder: ModelFolder) -> Any:
    """The head's weight (float32 tensor [1, hidden]) when it is not where a sequence classifier has it, else None.

    Known: upstream's ``score.pt``; value-head names; a causal model that answers yes or no (logit(yes) - logit(no)).
    """
    if folder.has_head:
        return None
    if folder.score_file.exists():
        return _score_file(folder.score_file)
    for alias in HEAD_ALIASES:
        if alias in folder.tensors:
            return _one_row(read_tensor(folder.path, alias).float(), folder.path, alias)
    return yes_no_head(folder) if folder.facts.causal else None


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


def yes_no_head(folder: ModelFolder) -> Any:
    """float32[1, hidden]: the row of ``yes`` minus the row of ``no`` in the language model's head."""
    where = str(folder.path)
    matrix = next((name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in folder.tensors), None)
    if matrix is None:
        raise ModelError("has no language model head", where=where, remedy="Give the model as it was released")
    rows = []
    for word in (YES, NO):
        ids = folder.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ModelError(
                f"the answer {word!r} is {len(ids)} tokens of this tokenizer, not one",
                where=where,
                remedy="Only a yes/no reranker such as Qwen3-Reranker can be scored this way",
            )
        rows.append(read_tensor(folder.path, matrix, row=ids[0]).float())
    return (rows[0] - rows[1])[None]


def read_tensor(folder: Path, name: str, row: int | None = None) -> Any:
    """A tensor of the folder's safetensors files, or one row of it without reading the others."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  safe_open is no mapping
                return file.get_tensor(name) if row is None else file.get_slice(name)[row]
    raise ModelError(f"the tensor {name} is not there", where=str(folder), remedy="Copy the model folder again")


def causal_to_classifier(folder: ModelFolder, out: Path) -> ModelFolder:
    """Writes a causal reranker, or a causal folder with ``score.pt`` or a value head, as a sequence classifier.

    Works shard by shard, so memory stays at one shard. The head is written in the checkpoint's dtype, all else as it
    is, without the language model's head. Returns ``out``, which all engines load. ModelError when there is no head.
    """
    architecture, tokenizer = folder.facts.architecture, folder.tokenizer
    contract = folder.contract or infer_contract(folder)
    head = foreign_head(folder)
    if head is None:
        raise ModelError(f"{architecture} needs no conversion", where=str(folder.path), remedy="Use it as it is")
    out.mkdir(parents=True, exist_ok=True)
    _copy_side_files(folder.path, out)
    _write_shards(folder.path, out, head)
    config = folder.config | {"architectures": [architecture.replace(_CAUSAL, _CLASSIFIER)]}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    kept = contract.model_dump(include={"calibration", "base_model", "base_digest", "training", "dtype"})
    write_contract(out, make_contract(ModelFolder(out), contract.template, contract.max_length, **kept))
    return ModelFolder(out)


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


def classifier_folder(folder: ModelFolder) -> Path:
    """A folder that any engine loads as a sequence classifier: this one, or its conversion, made once and cached.

    ModelError when the model has no head: engines other than transformers would start with a random one.
    """
    if folder.has_head:
        return folder.path
    if foreign_head(folder) is None:
        raise ModelError("has no reward head", where=str(folder.path), remedy="Train one with `rmsearch train lora`")
    return _cached("classifiers", [folder.path], lambda out: causal_to_classifier(folder, out))


def merged_folder(folder: ModelFolder, adapter: ModelFolder, merge: Callable[[], Any]) -> Path:
    """A folder with the adapter merged in, made once by ``merge() -> model`` and cached."""

    def build(out: Path) -> None:
        model = merge()
        out.mkdir(parents=True)
        model.save_pretrained(str(out))
        folder.tokenizer.save_pretrained(str(out))

    return _cached("merged", [folder.path, adapter.path], build)


def _cached(kind: str, sources: list[Path], build: Callable[[Path], object]) -> Path:
    """``build(out)`` into the cache under the digest of its sources; another process may do the same meanwhile."""
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


def adapter_base(folder: ModelFolder) -> str:
    """The name or path of the model that an adapter was trained on."""
    path = folder.path / ADAPTER_FILE
    base = load_json(path).get("base_model_name_or_path")
    if not base:
        raise ModelError("names no base model", where=str(path), remedy="Give the base as model and this as lora")
    beside = folder.path / str(base)
    return str(beside) if beside.is_dir() else str(base)


def merge_adapter(model: Any, adapter: Path) -> Any:
    """The model with the adapter's weights (and its trained head) merged in, in the model's dtype."""
    from peft import PeftModel

    dtype = next(model.parameters()).dtype
    try:
        return merged(PeftModel.from_pretrained(model, str(adapter)), dtype)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"does not fit the base model: {reason}", where=str(adapter), remedy="Give the base it was trained on"
        ) from None


def merged(trained: Any, dtype: Any) -> Any:
    """A PeftModel's base with the adapter merged in: computed in float32, its weights stored in ``dtype``.

    Weights become bfloat16 by stochastic rounding (Gupta et al. 2015, arXiv:1502.02551). Rounding to the nearest would
    lose what was learned: on a bfloat16 base most of LoRA's updates are smaller than half a step of the weight, and
    vanish (SmolLM2-135M, rank 16, 60 steps: rewards up to 2.97 off by 0.96; rounded this way, by 0.02).
    """
    import torch

    model = trained.float().merge_and_unload()
    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if dtype == torch.bfloat16:
            parameter.data = rounded_at_random(parameter.data, draws)
        parameter.data = parameter.data.to(dtype)
    return model


def rounded_at_random(weights: Any, draws: Any) -> Any:
    """float32 values, each one of the two bfloat16 values around it, the nearer one more often, so that the mean stays.
    A bfloat16 value is the upper half of a float32's bits."""
    import torch

    bits = weights.view(torch.int32)
    if not bool((bits & 0xFFFF).any()):  # as all weights that nothing was merged into
        return weights
    noise = torch.randint(0, 1 << 16, bits.shape, generator=draws, dtype=torch.int32)
    return ((bits + noise.to(bits.device)) & ~0xFFFF).view(torch.float32)
