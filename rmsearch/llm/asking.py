"""Asking a language model about many items: journaled, checked, retried, counted. What the LLM stages share.

An answer is kept under a key of the chat, the form, the model and the sampling, beside the output or in --progress-dir,
and stays there: a killed or repeated run pays for nothing twice, and a changed prompt is asked anew.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rmsearch.engines.generation import Generation, Sampling
from rmsearch.errors import AnswerError
from rmsearch.flags import EngineFlags
from rmsearch.stage import Run, ignored, option, tuning

if TYPE_CHECKING:
    from rmsearch.engines import Generator
    from rmsearch.storage.journal import Journal

T = TypeVar("T")
V = TypeVar("V")
RETRY_TEMPERATURE = 0.5  # a changed seed changes nothing at temperature 0
JOURNAL = "answers 1"  # the form of the journal's values
FORECAST_SECONDS = 30.0


class GeneratorFlags(EngineFlags):
    """Which language model, how it samples, where its answers are kept."""

    tokenizer_name: str | None = ignored(None, "a model's own tokenizer is used.")
    trust_remote_code: bool = ignored(False, "code from model folders is not run.")
    batch_size: int = ignored(8, "the engine makes its batches; see --in-flight.")
    in_flight: int = tuning(256, "Questions on their way to the model at a time.", ge=1)
    temperature: float = option(0.0, "Sampling temperature; 0 takes the likeliest token.", ge=0)
    top_p: float = option(0.95, "Nucleus sampling.", gt=0, le=1)
    max_tokens: int = option(3000, "Tokens of an answer at most.", ge=1)
    seed: int = option(42, "Of sampling and of all choices.", ge=0)
    max_attempts: int = option(3, "Times to ask for an answer of the right form, each with another seed.", ge=1)
    timeout_s: float = tuning(600.0, "Seconds that a server may take for one answer.", gt=0)
    price_per_million_tokens: float | None = tuning(
        None, "Price of a million tokens (read and written): shows cost so far and in the end.", ge=0
    )
    progress_dir: str | None = tuning(None, "Folder of the journal of answers; by default beside the output.")
    restart: bool = ignored(False, "work always goes on from the journal.")

    def generator_arguments(self) -> dict[str, Any]:
        """Arguments for load_generator. As for scoring, but an installed vLLM is taken without a GPU, too: it alone
        holds answers to a form here."""
        if self.engine == "auto" and self.base_url is None and importlib.util.find_spec("vllm"):
            return self.model_copy(update={"engine": "vllm"}).generator_arguments()
        arguments = self.engine_arguments()
        if arguments["engine"] == "http":
            arguments |= {"concurrency": self.in_flight, "timeout_s": self.timeout_s}
        return arguments

    def sampling(self, attempt: int, logprobs: int | None) -> Sampling:
        """How to sample at an attempt from 0."""
        warmer = self.temperature if attempt == 0 else max(self.temperature, RETRY_TEMPERATURE)
        return Sampling(warmer, self.top_p, self.max_tokens, self.seed + attempt, logprobs=logprobs)


@dataclass(frozen=True)
class Question(Generic[T]):
    """What to ask about ``item``: a chat, and the form of the answer (a JSON schema, or one of some choices)."""

    item: T
    messages: list[dict[str, str]]
    schema: dict[str, Any] | None = None
    choices: tuple[str, ...] | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Answer(Generic[T, V]):
    """The parsed ``value`` of the answer about ``item``."""

    item: T
    value: V
    generation: Generation


def ask(
    run: Run,
    flags: GeneratorFlags,
    questions: Iterable[Question[T]],
    parse: Callable[[T, Generation], V],
    total: int | None = None,
) -> Iterator[Answer[T, V]]:
    """Answers in the order of the questions, of which only a window is held at a time.

    ``parse`` turns a generation into a value and raises ValueError (the reason, one line) for one of the wrong form;
    then the question is asked again with another seed, and after ``max_attempts`` it goes to ``run.reject`` with reason
    and text and is left out. Counts questions, tokens and rejects in ``run.counts``. The model is loaded when the first
    answer is not in the journal. Raises the engines' errors; RetryableError when another run has the journal open.
    """
    from rmsearch.storage import uri
    from rmsearch.storage.journal import Journal

    assert run.first_output is not None
    where = uri.join(flags.progress_dir, "answers.journal") if flags.progress_dir else f"{run.first_output}.answers"
    with Journal(where, JOURNAL) as journal, asyncio.Runner() as runner, run.progress(total, "questions") as bar:
        asking = _Asking(run, flags, parse, journal, total)
        stream = asking.stream(questions)  # the runner closes it, whatever ends this block
        while answers := runner.run(_next(stream)):
            bar.advance(1)
            yield from (answer for answer in answers if answer is not None)
        asking.count()


async def _next(stream: AsyncIterator[V]) -> list[V]:
    """The next of a stream alone, or nothing at its end."""
    async for each in stream:
        return [each]
    return []


class _Asking(Generic[T, V]):
    def __init__(
        self,
        run: Run,
        flags: GeneratorFlags,
        parse: Callable[[T, Generation], V],
        journal: Journal,
        total: int | None,
    ) -> None:
        self._run, self._flags, self._parse, self._journal, self._total = run, flags, parse, journal, total
        self._model = _identity(flags.model_name)
        self._generator: Generator | None = None
        self._held = True  # whether the engine holds answers to a schema or choices
        self._asked: dict[str, asyncio.Task[Generation]] = {}
        self._tally: Counter[str] = Counter()
        self._started = self._said = time.monotonic()

    async def stream(self, questions: Iterable[Question[T]]) -> AsyncIterator[Answer[T, V] | None]:
        """An answer, or None for a rejected question, in the questions' order."""
        slots = asyncio.Semaphore(self._flags.in_flight)
        waiting: deque[asyncio.Task[Answer[T, V] | None]] = deque()
        source = iter(questions)
        try:
            while True:
                # Twice the slots: one slow answer at the head does not keep the model waiting.
                while len(waiting) < 2 * self._flags.in_flight and (question := next(source, None)) is not None:
                    waiting.append(asyncio.create_task(self._one(question, slots)))
                if not waiting:
                    return
                answer = await waiting[0]
                waiting.popleft()
                self._forecast()
                yield answer
        finally:
            tasks = [*waiting, *self._asked.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._generator is not None:
                await self._generator.close()

    async def _one(self, question: Question[T], slots: asyncio.Semaphore) -> Answer[T, V] | None:
        self._tally["questions"] += 1
        reason, text = "", ""
        for attempt in range(self._flags.max_attempts):
            generation = await self._generation(question, attempt, slots)
            try:
                return Answer(question.item, self._parse(question.item, generation), generation)
            except ValueError as error:
                reason, text = str(error), generation.text
                if generation.finish == "length":
                    reason = "the answer was cut at --max-tokens"
                self._tally["malformed"] += 1
        self._run.reject({"question": question.messages[-1]["content"], "answer": text}, reason)
        return None

    async def _generation(self, question: Question[T], attempt: int, slots: asyncio.Semaphore) -> Generation:
        from rmsearch.storage.journal import journal_key

        sampling = self._flags.sampling(attempt, question.logprobs)
        parts = [question.messages, question.schema, question.choices, self._model, vars(sampling)]
        key = journal_key("answer", *parts)
        kept = self._journal.get(key)
        if kept is not None:
            self._tally["from_journal"] += 1
            return Generation(**kept | {"logprobs": None if kept["logprobs"] is None else tuple(kept["logprobs"])})
        if key not in self._asked:  # the same question twice at a time is asked once
            task = asyncio.create_task(self._paid(key, question, sampling, slots))
            task.add_done_callback(lambda _: self._asked.pop(key, None))
            self._asked[key] = task
        return await asyncio.shield(self._asked[key])

    async def _paid(self, key: str, question: Question[T], sampling: Sampling, slots: asyncio.Semaphore) -> Generation:
        async with slots:
            if self._generator is None:
                self._generator = self._load()
            form = {"schema": question.schema, "choices": question.choices} if self._held else {}
            try:
                answers = await self._generator.generate([question.messages], sampling=sampling, **form)  # type: ignore[arg-type]
            except AnswerError as error:  # none of the choices: for the parser to refuse
                assert isinstance(error.answer, Generation)
                answers = [error.answer]
        generation = answers[0]
        self._journal.put(key, vars(generation))
        self._tally["asked"] += 1
        self._tally["prompt_tokens"] += generation.prompt_tokens
        self._tally["tokens"] += generation.tokens
        return generation

    def _load(self) -> Generator:
        from rmsearch.engines import load_generator

        arguments = self._flags.generator_arguments()
        self._held = arguments["engine"] != "transformers"
        if not self._held:
            self._run.say("warning", problem="the transformers engine holds answers to no form: more may be rejected")
        return load_generator(self._flags.model_name, **arguments)

    def _forecast(self) -> None:
        """Says the rate, the time left and the cost every half minute."""
        now = time.monotonic()
        if now - self._said < FORECAST_SECONDS or not self._tally["asked"]:
            return
        self._said = now
        done, seconds = self._tally["questions"], now - self._started
        share = None if not self._total else min(done / self._total, 1.0)
        left = None if not share else seconds * (1 - share) / share
        cost = self._cost()
        total_cost = None if cost is None or not share else cost / share
        rate = self._tally["tokens"] / seconds
        self._run.say("forecast", tokens_per_second=rate, seconds_left=left, cost=cost, cost_in_the_end=total_cost)

    def _cost(self) -> float | None:
        price = self._flags.price_per_million_tokens
        tokens = self._tally["prompt_tokens"] + self._tally["tokens"]
        return None if price is None else tokens * price / 1e6

    def count(self) -> None:
        """Puts the counts into the run."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        for name in ("questions", "from_journal", "asked", "malformed", "prompt_tokens", "tokens"):
            self._run.counts[name] = self._run.counts.get(name, 0) + self._tally[name]  # type: ignore[operator]
        self._run.counts["tokens_per_second"] = self._tally["tokens"] / seconds
        if (cost := self._cost()) is not None:
            self._run.counts["cost"] = cost


def _identity(name: str) -> str:
    """What tells the model from another: its content where it lies in reach, else its name."""
    from rmsearch.storage import uri

    return uri.digest(name) if uri.exists(name) else name


def json_value(generation: Generation) -> Any:
    """The JSON of an answer, also from within a code fence or prose around it. ValueError says why there is none."""
    import json

    text = generation.text.strip()
    if "</think>" in text:
        text = text.rpartition("</think>")[2].strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].rpartition("```")[0].strip() or text
    decoder = json.JSONDecoder(strict=False)  # raw line breaks in strings: models and grammars let them through
    try:
        return decoder.decode(text)
    except ValueError:
        pass
    for start, mark in enumerate(text):
        if mark in "{[":
            try:
                return decoder.raw_decode(text, start)[0]
            except ValueError:
                continue
    raise ValueError("the answer holds no JSON" if text else "the answer is empty")
