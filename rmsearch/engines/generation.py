"""Text generation: what a generator takes and gives, and the generator in front of every backend."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rmsearch.engines.closing import Closable, Owner
from rmsearch.errors import AnswerError, ConfigError, ModelError
from rmsearch.prompts.renderer import PINNED_DATE

Messages = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0: the most likely token each time. logprobs: so many alternatives per token."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Generation:
    """An answer. tokens: generated; finish: "stop" or "length" (cut at max_tokens); logprobs: token -> logprob each;
    prompt_tokens: read, 0 when a server does not say."""

    text: str
    tokens: int
    finish: str = "stop"
    logprobs: tuple[dict[str, float], ...] | None = None
    prompt_tokens: int = 0

    def parsed(self) -> Any:
        """The text as JSON. ModelError when it is cut or none: a caller counts and rejects it, never fills it in."""
        try:
            return json.loads(self.text)
        except ValueError:
            cut = " (cut at max_tokens)" if self.finish == "length" else ""
            raise ModelError(f"the answer is no JSON{cut}: {self.text[:80]!r}", remedy="Raise max_tokens") from None


@dataclass(frozen=True)
class Wish:
    """One request: messages, and what form the answer must have (a JSON schema, or one of some choices)."""

    messages: list[dict[str, str]]
    sampling: Sampling
    schema: dict[str, Any] | None = None
    choices: tuple[str, ...] | None = None


class GenerationBackend(Closable, Protocol):
    """A model that answers one wish at a time; ``in_flight`` of them together."""

    in_flight: int

    async def generate(self, wish: Wish) -> Generation: ...


class TextGenerator(Owner[GenerationBackend]):
    """A generation backend with bounded concurrency: what ``load_generator`` returns."""

    async def generate(
        self,
        messages_list: Sequence[Messages],
        schema: Mapping[str, Any] | None = None,
        sampling: Sampling | None = None,
        choices: Sequence[str] | None = None,
    ) -> list[Generation]:
        """One answer per conversation (a string is one user message), in order.

        schema: JSON schema that each answer follows; choices: the only answers allowed. The first failure is raised
        and the other requests are cancelled.
        """
        self.require_open()
        if schema is not None and choices is not None:
            raise ConfigError("a schema and choices exclude each other", remedy="Give one of them")
        form = (None if schema is None else dict(schema), None if choices is None else tuple(choices))
        wishes = [
            Wish(conversation(messages, i), sampling or Sampling(), *form) for i, messages in enumerate(messages_list)
        ]
        slots = asyncio.Semaphore(self.backend.in_flight)

        async def one(wish: Wish) -> Generation:
            async with slots:
                answer = await self.backend.generate(wish)
            if wish.choices is not None and answer.text not in wish.choices:
                raise AnswerError(
                    f"the answer {answer.text[:60]!r} is none of the choices",
                    remedy="The server takes no choices: use a vLLM server or a schema",
                    answer=answer,
                )
            return answer

        tasks = [asyncio.create_task(one(wish)) for wish in wishes]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def conversation(messages: Messages, position: int) -> list[dict[str, str]]:
    """Chat messages as plain dicts; ConfigError names the position of anything else."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    try:
        found = [{"role": str(each["role"]), "content": each["content"]} for each in messages]
    except (TypeError, KeyError):
        found = []
    if not found or not all(isinstance(each["content"], str) for each in found):
        raise ConfigError(
            "is no list of chat messages", where=f"messages[{position}]", remedy='Give [{"role": …, "content": …}]'
        )
    return found


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the answer starts, with the date pinned."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("this model has no chat template", remedy="Give an instruction-tuned model")
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=True,
        date_string=PINNED_DATE.strftime("%d %b %Y"),
        strftime_now=PINNED_DATE.strftime,
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class TransformersGeneration:
    """Generates with transformers, one conversation at a time, without schemas or choices."""

    in_flight = 2

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from rmsearch.engines.transformers import ModelThread

        self._model, self._tokenizer, self._thread = model, tokenizer, ModelThread()

    async def generate(self, wish: Wish) -> Generation:
        """The answer to one wish; ConfigError for a form of answer, which this engine can't hold."""
        if wish.schema is not None or wish.choices is not None:
            raise ConfigError(
                "the transformers engine cannot hold answers to a schema or choices",
                remedy="Use engine='vllm' or a server (base_url=…)",
            )
        return await self._thread(self._generate, wish)

    def _generate(self, wish: Wish) -> Generation:
        import torch

        sampling = wish.sampling
        ids = torch.tensor([prompt_ids(self._tokenizer, wish.messages)], device=self._model.device)
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

    async def close(self) -> None:
        """Frees the model."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """Frees the model."""
        self._thread.close()
        self._model = None


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string, as vLLM and servers give it."""
    found = [text.index(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text


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

    async def close(self) -> None:
        """Ends the engine."""
        await self._engine.close()

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


class HTTPGeneration:
    """Generates with /v1/chat/completions of any OpenAI-compatible server."""

    def __init__(self, server: Any, model: str | None) -> None:
        self._server, self._model, self.in_flight = server, model, server.concurrency

    async def generate(self, wish: Wish) -> Generation:
        """The answer to one wish. Schemas go as response_format, choices in vLLM's own field."""
        answer = await self._server.post("/v1/chat/completions", _chat_body(self._model, wish))
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            usage = answer.get("usage") or {}
            tokens, read = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
            steps = (choice.get("logprobs") or {}).get("content")
            logprobs = None
            if steps is not None:
                logprobs = tuple({top["token"]: top["logprob"] for top in step["top_logprobs"]} for step in steps)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ModelError("the answer holds no message", where=self._server.url, remedy="Check base_url") from None
        return Generation(text, tokens, choice.get("finish_reason") or "stop", logprobs, read)

    async def close(self) -> None:
        """Closes the connections."""
        await self._server.close()

    def close_sync(self) -> None:
        """Closes the connections."""
        self._server.close_sync()


def _chat_body(model: str | None, wish: Wish) -> dict[str, Any]:
    sampling = wish.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": wish.messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    if wish.schema is not None:
        schema = {"name": "answer", "schema": wish.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if wish.choices is not None:
        body["structured_outputs"] = {"choice": list(wish.choices)}
    return body
