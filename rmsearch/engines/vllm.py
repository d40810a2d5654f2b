"""The vLLM backend: AsyncLLM in this process, with vLLM's own parallelism, for rewards, vectors and text."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import math
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from rmsearch.engines.dispatch import Limits
from rmsearch.engines.generation import Generation, Wish, prompt_ids
from rmsearch.engines.threads import LoopThread
from rmsearch.engines.vllm_start import prepare, spawning
from rmsearch.errors import ConfigError, ModelError, RetryableError
from rmsearch.models.contract import Contract, load_json
from rmsearch.models.folder import ADAPTER_FILE
from rmsearch.prompts.renderer import Rendered

CPU_BLOCK = 32  # tokens that share one cache entry; the CPU's default, 128, misses most shared prefixes
IN_FLIGHT, BATCH = 8, 128  # together as many requests as vLLM takes on a large GPU at a time


class VLLMEngine:
    """An AsyncLLM with its thread. ``arguments``: vLLM's engine arguments, None values left out."""

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        self.on_cpu = prepare()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        defaults = {"enforce_eager": self.on_cpu, "disable_log_stats": True, "use_tqdm_on_load": False, "seed": 0}
        chosen = defaults | {name: value for name, value in arguments.items() if value is not None}
        try:
            engine_args = AsyncEngineArgs(model=str(folder), **chosen)
        except TypeError as error:
            raise ConfigError(f"vLLM: {error}", remedy="Use the names of vLLM's engine arguments") from None
        self._prefix, self._count = uuid.uuid4().hex[:8], itertools.count()
        self._thread = LoopThread("rmsearch-vllm")

        async def start() -> Any:
            # vLLM's defaults for offline work: larger batches than those of a server
            return AsyncLLM.from_engine_args(engine_args, usage_context=UsageContext.LLM_CLASS)

        try:
            with spawning(self.on_cpu):
                self.llm = self._thread.call_sync(start())
        except Exception as error:
            self._thread.stop()
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"vLLM does not start: {reason}",
                where=str(folder),
                remedy="The cause stands in vLLM's log above (VLLM_LOGGING_LEVEL=INFO shows more)",
            ) from error

        atexit.register(self.close_sync)  # or an engine that nobody closed would keep the interpreter from ending

    def request_id(self) -> str:
        """An id that no other request of this process or another engine has."""
        return f"{self._prefix}-{next(self._count)}"

    async def gather(self, work: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Results of coroutines that talk to the engine, in order; on the first failure the others are cancelled."""
        return await self._thread.call(self._gather(work))

    async def _gather(self, work: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        tasks = [asyncio.ensure_future(each) for each in work]
        try:
            return await asyncio.gather(*tasks)
        except Exception as error:
            raise self._translated(error) from error
        finally:
            for task in tasks:
                task.cancel()

    def _translated(self, error: Exception) -> Exception:
        """The user's error for vLLM's."""
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, VLLMValidationError):
            return ConfigError(f"vLLM refuses a request: {error}", remedy="Check max_length and the model")
        if isinstance(error, EngineDeadError) or self.llm.errored:
            return RetryableError("the vLLM engine died", remedy="The cause stands in its log above; start again")
        return error

    def close_sync(self) -> None:
        """Ends the engine's processes."""
        llm, self.llm = self.llm, None
        if llm is None:
            return
        atexit.unregister(self.close_sync)
        if llm.output_handler is not None:
            self._thread.call_sync(_ended(llm.output_handler))  # or it would report the shutdown as a failure
        llm.shutdown()
        self._thread.stop()


async def _ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


class VLLMPooling:
    """Backend for rewards (task "classify") and vectors (task "embed")."""

    def __init__(self, engine: VLLMEngine, task: str, *, prefix_cache: bool, adapter: Path | None = None) -> None:
        from vllm import PoolingParams

        self._engine, self._task = engine, task
        self._params = PoolingParams(task=task, use_activation=False)
        self._lora = _lora_request(adapter)
        self.limits = Limits(
            batch_tokens=1 << 30, batch_size=BATCH, in_flight=IN_FLIGHT, padded=False, prefix_cache=prefix_cache
        )

    async def forward(self, batch: list[Rendered]) -> np.ndarray:
        """float32[n] rewards or [n, d] vectors, in order."""
        values = await self._engine.gather([self._one(each) for each in batch])
        return np.stack(values)[:, 0] if self._task == "classify" else np.stack(values)

    async def _one(self, item: Rendered) -> np.ndarray:
        from vllm import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=item.ids)
        params = self._params if item.token_types is None else self._typed(item.token_types)
        outputs = self._engine.llm.encode(prompt, params, self._engine.request_id(), lora_request=self._lora)
        async for output in outputs:
            if output.finished:
                return output.outputs.data.float().numpy()
        raise RetryableError("vLLM ended a request without an answer", remedy="Start again")

    def _typed(self, token_types: list[int]) -> Any:
        from vllm import PoolingParams
        from vllm.entrypoints.pooling.scoring.utils import compress_token_type_ids

        extra = {"compressed_token_type_ids": compress_token_type_ids(token_types)}
        return PoolingParams(task=self._task, use_activation=False, extra_kwargs=extra)

    def close_sync(self) -> None:
        """Ends the engine."""
        self._engine.close_sync()


class VLLMGeneration:
    """Generates with an AsyncLLM."""

    in_flight = 256

    def __init__(self, engine: Any, tokenizer: Any) -> None:
        self._engine, self._tokenizer = engine, tokenizer

    async def generate(self, wish: Wish) -> Generation:
        """The answer to one wish."""
        return (await self._engine.gather([self._one(wish)]))[0]

    async def _one(self, wish: Wish) -> Generation:
        from vllm import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=prompt_ids(self._tokenizer, wish.messages))
        final = None
        async for output in self._engine.llm.generate(prompt, _sampling_params(wish), self._engine.request_id()):
            final = output
        if final is None or not final.outputs:
            raise ModelError("vLLM ended a request without an answer", remedy="Start again")
        best = final.outputs[0]
        logprobs = None
        if best.logprobs is not None:
            logprobs = tuple(
                # what the form forbids has -inf: it is no alternative, and JSON could not keep it
                {each.decoded_token or "": each.logprob for each in row.values() if math.isfinite(each.logprob)}
                for row in best.logprobs
            )
        read = len(prompt["prompt_token_ids"])
        return Generation(best.text, len(best.token_ids), best.finish_reason or "stop", logprobs, read)

    def close_sync(self) -> None:
        """Ends the engine."""
        self._engine.close_sync()


def _sampling_params(wish: Wish) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    form = None
    if wish.schema is not None:
        form = StructuredOutputsParams(json=wish.schema)
    elif wish.choices is not None:
        form = StructuredOutputsParams(choice=list(wish.choices))
    sampling = wish.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        stop=list(sampling.stop),
        logprobs=sampling.logprobs,
        structured_outputs=form,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _lora_request(adapter: Path | None) -> Any:
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(adapter))


def lora_arguments(adapter: Path | None) -> dict[str, Any]:
    """Engine arguments for serving an adapter."""
    if adapter is None:
        return {}
    rank = int(load_json(adapter / ADAPTER_FILE).get("r", 16))
    # vLLM takes these ranks only; a larger one than the adapter's costs memory and nothing else
    return {"enable_lora": True, "max_lora_rank": next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)}


def scoring_engine(
    folder: Path, contract: Contract, *, dtype: str, adapter: Path | None, arguments: dict[str, Any]
) -> VLLMPooling:
    """The backend of a reward model folder (a sequence classifier), with an adapter that vLLM serves beside it."""
    on_cpu = prepare()
    decoder = contract.pooling == "last"
    own: dict[str, Any] = {
        "runner": "pooling",
        "dtype": explicit_dtype(dtype, on_cpu, contract.dtype),
        "max_model_len": contract.max_length,
        "block_size": CPU_BLOCK if on_cpu and decoder else None,
        "enable_prefix_caching": decoder,
    }
    engine = VLLMEngine(folder, own | lora_arguments(adapter) | arguments)
    return VLLMPooling(engine, "classify", prefix_cache=decoder, adapter=adapter)


def explicit_dtype(dtype: str, on_cpu: bool, stored: str) -> str:
    """vLLM's own "auto" makes float32 checkpoints float16 without a word; ours is float32 on a CPU, else the stored."""
    if dtype != "auto":
        return dtype
    return "float32" if on_cpu else stored


def embedding_engine(folder: Path, spec: Any, *, dtype: str, stored: str, arguments: dict[str, Any]) -> VLLMPooling:
    """The backend of an embedding model; ``spec`` is its EmbeddingSpec."""
    from vllm.config import PoolerConfig

    on_cpu = prepare()
    own = {
        "runner": "pooling",
        "dtype": explicit_dtype(dtype, on_cpu, stored),
        "max_model_len": spec.max_length,
        "pooler_config": PoolerConfig(seq_pooling_type=spec.pooling.upper()),
    }
    return VLLMPooling(VLLMEngine(folder, own | arguments), "embed", prefix_cache=False)


def generating_engine(folder: Path, *, dtype: str, stored: str, max_length: int | None, arguments: Any) -> VLLMEngine:
    """The engine of a language model; JSON answers hold no free whitespace, which weak models would go on writing."""
    on_cpu = prepare()
    own = {
        "dtype": explicit_dtype(dtype, on_cpu, stored),
        "max_model_len": max_length,
        "block_size": CPU_BLOCK if on_cpu else None,
        # On a CPU a seeded request whose prompt is read in parts kills the engine (vLLM 0.32: no generator offset).
        "enable_chunked_prefill": False if on_cpu else None,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    return VLLMEngine(folder, own | arguments)
