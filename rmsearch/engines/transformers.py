"""The transformers backend: scores, embeds and generates on CPU or one GPU, in a thread of its own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rmsearch.cores import spare_cores
from rmsearch.engines.dispatch import Limits
from rmsearch.engines.generation import ChatRequest, Generation, prompt_ids
from rmsearch.engines.threads import LoopThread
from rmsearch.errors import ConfigError, MissingExtraError, ModelError, first_line
from rmsearch.models.contract import Contract
from rmsearch.models.folder import ModelFolder
from rmsearch.models.heads import foreign_head, merge_adapter
from rmsearch.prompts.renderer import Rendered

# Per batch. On a CPU the activations of a small batch stay in its caches: 1024 ran 1.5 times as fast as 4096 (MiniLM).
CPU_TOKENS, GPU_TOKENS = 1024, 32768


def require_torch() -> None:
    """Import torch and transformers, with threads that sleep while they wait; MissingExtraError without them."""
    spare_cores()
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


def load_weights(kind: Any, folder: Path, **options: Any) -> tuple[Any, set[str]]:
    """(the model, names of the weights that are missing and so random) of a transformers class; ModelError when the
    folder does not load."""
    try:
        with quiet():
            model, info = kind.from_pretrained(str(folder), output_loading_info=True, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = first_line(error)
        raise ModelError(f"does not load: {reason}", where=str(folder), remedy="Check the folder") from None
    return model, set(info["missing_keys"])


def load_classifier(
    folder: ModelFolder,
    contract: Contract,
    *,
    dtype: str = "auto",
    device: str | None = None,
    adapter: ModelFolder | None = None,
) -> Any:
    """The sequence classifier in ``folder`` with one label, the adapter merged, in eval mode on the device.

    ModelError when weights are missing, the head above all: a randomly initialised head is never served.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    where = pick_device(device)
    trained = frozenset() if adapter is None else adapter.tensors
    has_head = any(name.endswith(("score.weight", "classifier.weight")) for name in trained)
    head = None if has_head else foreign_head(folder)
    config = AutoConfig.from_pretrained(str(folder.path), num_labels=1)
    chosen = pick_dtype(dtype, where, contract.dtype)
    model, missing = load_weights(AutoModelForSequenceClassification, folder.path, config=config, dtype=chosen)
    if head is not None:
        model.score.weight.data.copy_(head)
        missing.discard("score.weight")
    if adapter is not None:
        model = merge_adapter(model, adapter.path)
        missing -= {name.removeprefix("base_model.model.") for name in trained}
    if missing:
        raise ModelError(
            f"these weights are missing and would be random: {', '.join(sorted(missing)[:4])}",
            where=str(folder.path),
            remedy="Train a head first (`rmsearch train lora`), or give a model that has one",
        )
    for parameter in model.parameters():  # a trained head may be float32; buffers (rotary frequencies) stay as they are
        parameter.data = parameter.data.to(chosen)
    return model.eval().to(where)


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
        self._thread = LoopThread("rmsearch-model")

    async def forward(self, batch: list[Rendered]) -> np.ndarray:
        """float32[n] or [n, d] for model inputs, in order."""
        return await self._thread.run(self._forward, batch)

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

    def close_sync(self) -> None:
        """Free the model."""
        import torch

        self._thread.stop()
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


def scoring_backend(
    model: Any, folder: ModelFolder, contract: Contract, batch_tokens: int | None
) -> TransformersBackend:
    """The backend of a reward model."""
    pads = (contract.pad_token_id, folder.tokenizer.pad_token_id, folder.tokenizer.eos_token_id, 0)
    pad = next(each for each in pads if each is not None)
    read_out = encoder_reward if contract.pooling == "cls" else decoder_reward
    return TransformersBackend(model, read_out, pad_token_id=pad, batch_tokens=batch_tokens)


def load_plain(kind: str, folder: ModelFolder, *, dtype: str = "auto", device: str | None = None) -> Any:
    """A model without a reward head in eval mode on the device; ModelError when weights are missing.

    kind: the class of transformers, "AutoModel" (whose pooler is not used) or "AutoModelForCausalLM".
    """
    import transformers

    where = pick_device(device)
    chosen = pick_dtype(dtype, where, folder.facts.dtype)
    model, missing = load_weights(getattr(transformers, kind), folder.path, dtype=chosen)
    missing = {name for name in missing if kind != "AutoModel" or "pooler" not in name}
    if missing:
        raise ModelError(
            f"these weights are missing: {', '.join(sorted(missing)[:4])}",
            where=str(folder.path),
            remedy="Copy the model folder again",
        )
    return model.eval().to(where)


class TransformersGeneration:
    """Generates with transformers, one conversation at a time, without schemas or choices."""

    in_flight = 2

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer, self._thread = model, tokenizer, LoopThread("rmsearch-model")

    async def generate(self, request: ChatRequest) -> Generation:
        """Answer one request; ConfigError for one with a form of answer, which this engine cannot hold."""
        if request.schema is not None or request.choices is not None:
            raise ConfigError(
                "the transformers engine cannot hold answers to a schema or choices",
                remedy="Use engine='vllm' or a server (base_url=…)",
            )
        abandoned = threading.Event()
        try:
            return await self._thread.run(self._generate, request, abandoned)
        finally:
            abandoned.set()

    def _generate(self, request: ChatRequest, abandoned: threading.Event) -> Generation:
        import torch

        sampling = request.sampling
        ids = torch.tensor([prompt_ids(self._tokenizer, request.messages)], device=self._model.device)
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0, "max_new_tokens": sampling.max_tokens}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
        if sampling.stop:
            options |= {"stop_strings": list(sampling.stop), "tokenizer": self._tokenizer}
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
                return_dict_in_generate=True,
                output_logits=sampling.logprobs is not None,
                stopping_criteria=[lambda *_, **__: abandoned.is_set()],
                **options,
            )
        new = out.sequences[0, ids.shape[1] :].tolist()
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        ended = len(new) < sampling.max_tokens or new[-1] == self._tokenizer.eos_token_id
        logprobs = None if sampling.logprobs is None else self._top(out.logits, sampling.logprobs)
        finish = "stop" if ended else "length"
        return Generation(_before(text, sampling.stop), len(new), finish, logprobs, ids.shape[1])

    def _top(self, logits: Any, count: int) -> tuple[dict[str, float], ...]:
        import torch

        rows = []
        for row in logits:
            values, ids = torch.log_softmax(row[0].float(), -1).topk(count)
            rows.append({self._tokenizer.decode([i]): v for i, v in zip(ids.tolist(), values.tolist(), strict=True)})
        return tuple(rows)

    def close_sync(self) -> None:
        """Free the model."""
        self._thread.stop()
        self._model = None


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string, as vLLM and servers give it."""
    found = [text.index(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text
