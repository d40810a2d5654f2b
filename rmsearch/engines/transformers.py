"""The transformers backend: scores and embeds on CPU or one GPU, in a thread of its own."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rmsearch.engines.dispatch import Limits
from rmsearch.errors import ConfigError, MissingExtraError, ModelError
from rmsearch.models.contract import Contract, model_facts, tensor_names
from rmsearch.models.heads import foreign_head, merge_adapter
from rmsearch.prompts.renderer import Rendered

Given = TypeVar("Given")
Result = TypeVar("Result")
# Per batch. On a CPU the activations of a small batch stay in its caches: 1024 ran 1.5 times as fast as 4096 (MiniLM).
CPU_TOKENS, GPU_TOKENS = 1024, 32768


def require_torch() -> None:
    """MissingExtraError when torch or transformers is not installed."""
    for package in ("torch", "transformers"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise MissingExtraError(package, "cpu") from None


def pick_device(device: str | None = None) -> str:
    """The device asked for, else the GPU when there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str, device: str, stored: str) -> Any:
    """The torch dtype: what was asked; "auto" is the stored one on a GPU, float32 on a CPU."""
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else stored
    if dtype not in names:
        raise ConfigError(f"unknown dtype {dtype!r}", remedy=f"One of: auto, {', '.join(names)}")
    return names[dtype]


def load_tokenizer(folder: Path) -> Any:
    """The model folder's tokenizer; ModelError when it does not load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer does not load: {_first_line(error)}", where=str(folder)) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what matters in them is checked and raised here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_weights(kind: Any, folder: Path, **options: Any) -> tuple[Any, set[str]]:
    """(the model, names of the weights that are missing and so random) of a transformers class; ModelError when the
    folder does not load."""
    try:
        with quiet():
            model, info = kind.from_pretrained(str(folder), output_loading_info=True, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"does not load: {_first_line(error)}", where=str(folder), remedy="Check the folder") from None
    return model, set(info["missing_keys"])


def load_classifier(
    folder: Path,
    tokenizer: Any,
    contract: Contract,
    *,
    dtype: str = "auto",
    device: str | None = None,
    lora: Any = None,
) -> Any:
    """The sequence classifier in ``folder`` with one label, its adapter merged, in eval mode on the device.

    ModelError when weights are missing, the head above all: a randomly initialised head is never served.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    where = pick_device(device)
    head = None if lora is not None and _has_head(lora) else foreign_head(folder, tokenizer)
    config = AutoConfig.from_pretrained(str(folder), num_labels=1)
    chosen = pick_dtype(dtype, where, contract.dtype)
    model, missing = load_weights(AutoModelForSequenceClassification, folder, config=config, dtype=chosen)
    if head is not None:
        model.score.weight.data.copy_(head)
        missing.discard("score.weight")
    if lora is not None:
        trained = {name.removeprefix("base_model.model.") for name in tensor_names(lora)}
        model = merge_adapter(model, lora)
        missing -= trained
    if missing:
        raise ModelError(
            f"these weights are missing and would be random: {', '.join(sorted(missing)[:4])}",
            where=str(folder),
            remedy="Train a head first (`rmsearch train lora`), or give a model that has one",
        )
    return model.eval().to(where, chosen)  # PEFT puts a trained head in as float32


def _has_head(adapter: Path) -> bool:
    return any(name.endswith(("score.weight", "classifier.weight")) for name in tensor_names(adapter))


class ModelThread:
    """One thread that runs the model, so that the event loop stays alive and batches never overlap."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rmsearch-model")

    async def __call__(self, work: Callable[[Given], Result], batch: Given) -> Result:
        """Runs ``work(batch)``. A cancelled batch that has begun ends unseen."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, batch)

    def close(self) -> None:
        """Drops the batches that wait, ends after the one that runs."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class TransformersBackend:
    """Batches through a torch model. ``read_out(model, inputs, lengths)`` gives the tensor [n] or [n, d] to return."""

    def __init__(
        self,
        model: Any,
        read_out: Callable[[Any, dict[str, Any], Any], Any],
        *,
        pad_token_id: int,
        batch_tokens: int | None = None,
    ) -> None:
        self._model, self._read_out, self._pad = model, read_out, pad_token_id
        self._device = next(model.parameters()).device
        tokens = batch_tokens or (CPU_TOKENS if self._device.type == "cpu" else GPU_TOKENS)
        self.limits = Limits(batch_tokens=tokens, batch_size=256, in_flight=2, padded=True, prefix_cache=False)
        self._thread = ModelThread()

    async def forward(self, batch: list[Rendered]) -> np.ndarray:
        """float32[n] or [n, d] for model inputs, in order."""
        return await self._thread(self._forward, batch)

    def _forward(self, batch: list[Rendered]) -> np.ndarray:
        import torch

        lengths = [len(each.ids) for each in batch]
        inputs = {"input_ids": _padded([each.ids for each in batch], self._pad)}
        if min(lengths) < max(lengths):
            inputs["attention_mask"] = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        if batch[0].token_types is not None:
            inputs["token_type_ids"] = _padded([each.token_types or [] for each in batch], 0)
        try:
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
                out = self._read_out(self._model, tensors, torch.tensor(lengths, device=self._device))
                return out.float().cpu().numpy()
        except torch.OutOfMemoryError:
            raise ModelError(
                f"a batch of {len(batch)} x {max(lengths)} tokens does not fit on {self._device}",
                remedy=f"Lower max_batch_tokens (now {self.limits.batch_tokens})",
            ) from None

    async def close(self) -> None:
        """Frees the model."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """Frees the model."""
        import torch

        self._thread.close()
        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _padded(rows: Sequence[list[int]], pad: int) -> np.ndarray:
    """int64[n, longest], filled up on the right."""
    out = np.full((len(rows), max(map(len, rows))), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def encoder_reward(model: Any, inputs: dict[str, Any], lengths: Any) -> Any:
    """The one logit of an encoder classifier, [n]."""
    return model(**inputs).logits[:, 0]


def decoder_reward(model: Any, inputs: dict[str, Any], lengths: Any) -> Any:
    """The head on the last real token of each row, [n]; the head in float32, as vLLM does it.

    Rows are filled up on the right and attention looks to the left only, so no mask is needed.
    """
    import torch

    hidden = model.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1]
    return torch.nn.functional.linear(
        last.float(), model.score.weight.float(), None if model.score.bias is None else model.score.bias.float()
    )[:, 0]


def scoring_backend(model: Any, contract: Contract, tokenizer: Any, batch_tokens: int | None) -> TransformersBackend:
    """The backend of a reward model."""
    pads = (contract.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(each for each in pads if each is not None)
    read_out = encoder_reward if contract.pooling == "cls" else decoder_reward
    return TransformersBackend(model, read_out, pad_token_id=pad, batch_tokens=batch_tokens)


def load_encoder(folder: Path, *, dtype: str = "auto", device: str | None = None) -> Any:
    """The bare model in ``folder`` (no head) in eval mode on the device; ModelError when weights are missing."""
    from transformers import AutoModel

    return _load_whole(AutoModel, folder, dtype, device, unused="pooler")


def load_causal(folder: Path, *, dtype: str = "auto", device: str | None = None) -> Any:
    """The language model in ``folder`` in eval mode on the device; ModelError when weights are missing."""
    from transformers import AutoModelForCausalLM

    return _load_whole(AutoModelForCausalLM, folder, dtype, device, unused=None)


def _load_whole(kind: Any, folder: Path, dtype: str, device: str | None, unused: str | None) -> Any:
    where = pick_device(device)
    chosen = pick_dtype(dtype, where, model_facts(folder).dtype)
    model, missing = load_weights(kind, folder, dtype=chosen)
    missing = {name for name in missing if unused is None or unused not in name}
    if missing:
        raise ModelError(
            f"these weights are missing: {', '.join(sorted(missing)[:4])}",
            where=str(folder),
            remedy="Copy the model folder again",
        )
    return model.eval().to(where)
