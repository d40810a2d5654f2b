"""A model as a search uses it: loaded with the template asked for, scoring pairs, with a checkpoint or not."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rmsearch import engines
from rmsearch.engines import Scorer
from rmsearch.engines.pairs import NumberedPairs
from rmsearch.engines.scheduler import PairScorer
from rmsearch.errors import ModelError
from rmsearch.models.folder import PACKAGED_NAMES
from rmsearch.models.resolve import require_template
from rmsearch.prompts.renderer import Renderer
from rmsearch.prompts.templates import Template, template, template_hash
from rmsearch.scoring.journaled import PairEntries, Put, digest_names, in_thread, score_journaled
from rmsearch.storage import uri
from rmsearch.storage.journal import Journal, journal_key

Arrived = Callable[[NumberedPairs, np.ndarray, np.ndarray], None]  # takes pairs, positions in them, their rewards

FOLDER_NAME = "scores.journal"
SMALL = 64  # pairs of a call that may share a batch; larger ones fill batches by themselves
_SHARED = 256  # pairs of a shared batch: about what a model takes in one pass, so that nobody waits for many passes
_LANES = 2  # shared batches at a time: one is being tokenised while the other is with the model
logger = logging.getLogger("rmsearch.search")


@dataclass
class SearchModel:
    """What to load, and how pairs are scored with it. Lives in the engine's thread and does not know its Search."""

    name: str
    options: dict[str, Any]
    template: str | None
    prompt: Callable[..., str] | None
    any_template: bool
    scorer: Scorer | None
    truncation_said: bool = False
    shared: SharedBatches | None = None

    def load(self) -> Scorer:
        """The scorer, with the template asked for. Raises what loading raises, and ContractError."""
        if self.scorer is not None:
            return self.scorer
        if self.prompt is None and not (self.template and self.any_template):
            return engines.load_scorer(self.name, template=self.template, **self.options)
        scorer = engines.load_scorer(self.name, **self.options)
        if self.prompt is None:
            return _with_template(scorer, template(self.template or ""), self.name, True)
        # "joint": control tokens in the prompt count, as its author means them.
        whole = Template(name="llm_template", kind="text", text="{query}{key}", tokenization="joint")
        return _with_template(scorer, whole, self.name, self.any_template)

    def scoring(
        self,
        pairs: NumberedPairs,
        arrived: Arrived,
        checkpoint: str | None,
        advance: Callable[[int], None] | None = None,
    ) -> Callable[[Scorer], Coroutine[Any, Any, None]]:
        """The coroutine function that scores ``pairs`` with a scorer. ``advance`` is told of scored pairs; without it,
        results come as soon as the model has them, even those of a few pairs."""

        async def run(scorer: Scorer) -> None:
            ordered = replace(pairs, key_first=getattr(scorer.contract, "order", None) == "key_first")

            def put(positions: np.ndarray, rewards: np.ndarray) -> None:
                if self.scorer is not None:  # an engine of ours has looked
                    _require_finite(rewards)
                arrived(ordered, positions, rewards)
                if advance is not None:
                    advance(len(positions))

            # a user's prompt function may be slow: not in this loop
            few = len(pairs) <= SMALL and pairs.prompt is None and advance is not None
            if checkpoint is not None:
                await self._resume(scorer, ordered, checkpoint, put)
            elif few:
                await self._score_few(scorer, ordered, put)
            else:
                async with aclosing(scorer.stream(ordered)) as results:
                    async for positions, rewards in results:
                        put(positions, rewards)
            self._say_truncation(scorer)

        return run

    async def _score_few(self, scorer: Scorer, pairs: NumberedPairs, put: Put) -> None:
        """Score a few pairs, in one batch with those of other callers."""
        if self.shared is None:
            self.shared = SharedBatches(scorer)
        put(np.arange(len(pairs)), await self.shared.score(list(pairs)))

    async def _resume(self, scorer: Scorer, pairs: NumberedPairs, checkpoint: str, put: Put) -> None:
        """Take what the checkpoint holds and score the rest into it."""
        fingerprint = journal_key("search", 1, await in_thread(self._facts, scorer))
        place = await in_thread(journal_uri, checkpoint)
        with ExitStack() as stack:
            journal = await in_thread(stack.enter_context, Journal(place, fingerprint))
            entries = PairEntries(journal, await in_thread(digest_names, pairs))
            await score_journaled(lambda: scorer, pairs, entries, put)

    def _facts(self, scorer: Scorer) -> dict[str, Any]:
        """Everything but the texts that a score depends on."""
        contract = scorer.contract
        digest = _model_digest(self.name)
        served = getattr(getattr(scorer, "backend", None), "model", None)  # what a server calls a model left unnamed
        facts = {
            "model": digest or served or "",
            "server": self.options.get("base_url")
            if digest == self.name
            else None,  # a name means what its server says
            "options": {name: self.options.get(name) for name in ("dtype", "model", "quantization")},
            "lora": _model_digest(self.options.get("lora") or ""),
            "template": self.template if self.prompt is None else "llm_template",
            "contract": None if contract is None else contract.model_dump(mode="json", exclude={"calibration"}),
        }
        return facts if self.scorer is None else facts | {"scorer": type(self.scorer).__qualname__}

    def _say_truncation(self, scorer: Scorer) -> None:
        cut = getattr(getattr(scorer, "stats", None), "truncated", 0)
        if cut and not self.truncation_said:
            self.truncation_said = True
            logger.warning(
                "%d pairs were longer than the model's max_length and cut by its template; this is said once, "
                "search.stats.truncated goes on counting",
                cut,
            )


def journal_uri(checkpoint: str) -> str:
    """Where the scores lie: ``checkpoint`` itself, or a file in it when it is a folder (exists, or ends with /)."""
    if checkpoint.endswith("/") or (not uri.is_s3(checkpoint) and uri.is_folder(checkpoint)):
        return uri.join(checkpoint, FOLDER_NAME)
    return checkpoint


def _require_finite(rewards: np.ndarray) -> None:
    """ModelError when a reward is NaN or infinite: it would order the keys at random."""
    if not np.isfinite(rewards).all():
        raise ModelError("the scorer gave a reward that is not finite", remedy="Check the scorer given to Search")


def _with_template(scorer: Scorer, spec: Template, name: str, any_template: bool) -> Scorer:
    """The same model behind another template; ContractError when trained with another and that is not allowed."""
    try:
        contract, tokenizer = scorer.contract, getattr(getattr(scorer, "renderer", None), "tokenizer", None)
        if not isinstance(scorer, PairScorer) or contract is None or tokenizer is None:
            problem = "this engine renders its own prompts, so another template cannot be used"
            raise ModelError(problem, where=name, remedy="Use engine='transformers' or 'vllm'")
        if not any_template:
            otherwise = "or pass allow_template_mismatch=True to measure what it costs"
            require_template(contract, spec, name, otherwise)
        renderer = Renderer(tokenizer, spec, contract.max_length)
    except BaseException:
        scorer.close_sync()
        raise
    facts = {"template": spec, "template_hash": template_hash(spec), "order": spec.order, "inferred": True}
    return PairScorer(scorer.backend, renderer, contract.model_copy(update=facts))


def _model_digest(name: str) -> str:
    """The digest of the files behind a model's name; the name itself when they are not here (a server's model)."""
    return uri.digest(name) if name and name not in PACKAGED_NAMES and uri.exists(name) else name


@dataclass(frozen=True)
class _Part:
    """One caller's pairs and where the rewards go."""

    pairs: list[tuple[str, str]]
    rewards: asyncio.Future[np.ndarray]


class SharedBatches:
    """Merges small calls on one scorer. Lives in the engine's loop; adds no waiting when the model is idle."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._waiting: deque[_Part] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """float32[n] rewards, in order. Cancelling one caller leaves the others of its batch alone."""
        part = _Part(pairs, asyncio.get_running_loop().create_future())
        self._waiting.append(part)
        self._start()
        return await part.rewards

    def _start(self) -> None:
        while self._waiting and len(self._running) < _LANES:
            task = asyncio.create_task(self._run(self._take()))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    def _take(self) -> list[_Part]:
        """The parts that waited longest, at least one, `_SHARED` pairs at most; cancelled ones are dropped."""
        taken: list[_Part] = []
        size = 0
        while self._waiting and (not taken or size + len(self._waiting[0].pairs) <= _SHARED):
            part = self._waiting.popleft()
            if not part.rewards.done():
                taken.append(part)
                size += len(part.pairs)
        return taken

    async def _run(self, parts: list[_Part]) -> None:
        try:
            rewards = await self._scorer.score([pair for part in parts for pair in part.pairs])
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs to the callers
            await self._fail(parts, error)
            return
        start = 0
        for part in parts:
            stop = start + len(part.pairs)
            if not part.rewards.done():
                part.rewards.set_result(rewards[start:stop])
            start = stop

    async def _fail(self, parts: list[_Part], error: Exception) -> None:
        """A batch of several may have failed for one caller's texts, so each is tried by itself."""
        if len(parts) > 1:
            for part in parts:
                await self._run([part])
        elif parts and not parts[0].rewards.done():
            parts[0].rewards.set_exception(error)
