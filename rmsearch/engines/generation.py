"""Text generation: what a generator takes and gives, and the generator in front of every backend."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rmsearch.engines.loaded import Closable, LoadedModel
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


class TextGenerator(LoadedModel[GenerationBackend]):
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
