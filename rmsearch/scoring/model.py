"""A model as a search uses it: loaded with the template asked for, scoring work, with a checkpoint or not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from rmsearch.errors import ContractError, ModelError
from rmsearch.scoring.pairs import Work
from rmsearch.scoring.shared_batches import SMALL, Together
from rmsearch.scoring.topk import require_finite

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines import Scorer
    from rmsearch.prompts.renderer import Template

    Put = Callable[[Work, np.ndarray, np.ndarray], None]

T = TypeVar("T")
logger = logging.getLogger("rmsearch.search")


@dataclass
class RewardModel:
    """What to load, and how pairs are scored with it. Lives in the engine's thread and does not know its Search."""

    name: str
    options: dict[str, Any]
    template: str | None
    prompt: Callable[..., str] | None
    any_template: bool
    scorer: Scorer | None
    truncation_said: bool = False
    together: Together | None = None

    def load(self) -> Scorer:
        """The scorer, with the template asked for. Raises what loading raises, and ContractError."""
        if self.scorer is not None:
            return self.scorer
        from rmsearch.engines import load_scorer

        if self.prompt is None and not (self.template and self.any_template):
            return load_scorer(self.name, template=self.template, **self.options)
        from rmsearch.prompts.renderer import Template, template

        scorer = load_scorer(self.name, **self.options)
        if self.prompt is None:
            return _with_template(scorer, template(self.template or ""), self.name, True)
        # "joint": control tokens in the prompt count, as its author means them.
        whole = Template(name="llm_template", kind="text", text="{query}{key}", tokenization="joint")
        return _with_template(scorer, whole, self.name, self.any_template)

    def scoring(
        self, work: Work, put: Put, checkpoint: str | None, advance: Callable[[int], None] | None = None
    ) -> Callable[[Scorer], Coroutine[Any, Any, None]]:
        """The coroutine function that scores ``work`` with a scorer. ``advance`` is told of scored pairs; without it,
        results come as soon as the model has them, even those of little work."""

        async def run(scorer: Scorer) -> None:
            ordered = replace(work, key_first=getattr(scorer.contract, "order", None) == "key_first")

            def arrived(positions: np.ndarray, rewards: np.ndarray) -> None:
                require_finite(rewards)
                put(ordered, positions, rewards)
                if advance is not None:
                    advance(len(positions))

            little = (
                len(work) <= SMALL and work.prompt is None
            )  # a user's prompt function may be slow: not in this loop
            if checkpoint is None and advance is not None and little:
                await self._score_small(scorer, ordered, arrived)
            elif checkpoint is None:
                await _score_positions(scorer, ordered, None, arrived)
            else:
                await self._resume(scorer, ordered, checkpoint, arrived)
            self._say_truncation(scorer)

        return run

    async def _score_small(self, scorer: Scorer, work: Work, arrived: Callable[[np.ndarray, np.ndarray], None]) -> None:
        """Score a few pairs, in one batch with those of other callers."""
        import numpy as np

        if self.together is None:
            self.together = Together(scorer)
        rewards = await self.together.score(list(work.texts()))
        arrived(np.arange(len(work)), rewards)

    async def _resume(
        self, scorer: Scorer, work: Work, checkpoint: str, arrived: Callable[[np.ndarray, np.ndarray], None]
    ) -> None:
        """Take what the checkpoint holds and score the rest into it."""
        from rmsearch.scoring import journaled as kept
        from rmsearch.storage.journal import Journal

        fingerprint = kept.fingerprint(await _in_thread(self._facts, scorer))
        uri = await _in_thread(kept.journal_uri, checkpoint)
        with ExitStack() as stack:
            journal = await _in_thread(stack.enter_context, Journal(uri, fingerprint))
            keys = await _in_thread(kept.PairKeys, work)
            known, rewards, left = await _in_thread(kept.known_scores, journal, work, keys)
            arrived(known, rewards)

            def keep(positions: np.ndarray, fresh: np.ndarray) -> None:
                kept.keep(journal, keys, positions, fresh)
                arrived(positions, fresh)

            await _score_positions(scorer, work, left, keep)

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


async def _score_positions(
    scorer: Scorer, work: Work, positions: np.ndarray | None, arrived: Callable[[np.ndarray, np.ndarray], None]
) -> None:
    """Stream the pairs at ``positions`` of the work (all by default) through the scorer."""
    async with aclosing(scorer.stream(work.texts(positions))) as stream:
        async for at, rewards in stream:
            arrived(at if positions is None else positions[at], rewards)


def _with_template(scorer: Scorer, spec: Template, name: str, any_template: bool) -> Scorer:
    """The same model behind another template; ContractError when trained with another and that is not allowed."""
    from rmsearch.engines.scheduler import PairScorer
    from rmsearch.prompts.renderer import Renderer, template_hash

    contract, tokenizer = scorer.contract, getattr(getattr(scorer, "renderer", None), "tokenizer", None)
    if not isinstance(scorer, PairScorer) or contract is None or tokenizer is None:
        scorer.close_sync()
        problem = "this engine renders its own prompts, so another template cannot be used"
        raise ModelError(problem, where=name, remedy="Use engine='transformers' or 'vllm'")
    if not (any_template or contract.inferred or contract.template_hash == template_hash(spec)):
        scorer.close_sync()
        raise ContractError(
            f"trained with the template {contract.template.name!r}, asked to use {spec.name!r}",
            where=name,
            remedy="Leave llm_template away, or pass allow_template_mismatch=True to measure what it costs",
        )
    facts = {"template": spec, "template_hash": template_hash(spec), "order": spec.order, "inferred": True}
    return PairScorer(scorer.backend, Renderer(tokenizer, spec, contract.max_length), contract.model_copy(update=facts))


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """``asyncio.to_thread`` that, when cancelled, waits for the function's end, so that what it opened gets closed."""
    inner = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(inner)
    except asyncio.CancelledError:
        await asyncio.wait({inner})
        raise


def _model_digest(name: str) -> str:
    """The digest of the files behind a model's name; the name itself when they are not here (a server's model)."""
    from rmsearch.models.folder import PACKAGED_NAMES
    from rmsearch.storage import uri

    return uri.digest(name) if name and name not in PACKAGED_NAMES and uri.exists(name) else name
