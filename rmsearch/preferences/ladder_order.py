"""The order of a ladder's keys verified: neighbours compared by a reward model, or by a language model as the judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice, pairwise
from typing import Literal, NamedTuple

from rmsearch import engines
from rmsearch.datasets.chain import KeyLadder
from rmsearch.errors import ConfigError
from rmsearch.llm.asking import Question, ask
from rmsearch.llm.instructions import instruction
from rmsearch.preferences.ladders import LadderFlags, rungs
from rmsearch.preferences.verdicts import CHOICES, combined, opinion
from rmsearch.scoring.journaled import WindowScorer, window_scorer
from rmsearch.stage import Run, model, option
from rmsearch.storage.journal import Journal, journal_key

WINDOW = 64  # ladders that are scored together


class OrderFlags(LadderFlags):
    """How many keys per query, and whether and how their order is verified."""

    n_key_generation: int = option(5, "Keys per query, from the most to the least relevant.", ge=1)
    verify: Literal["none", "reward", "judge"] = option(
        "none", "Verify the order: by a reward model, or by a language model that sees neighbours in both orders."
    )
    verify_model: str | None = model(None, "The reward model, or the judge (default: --model-name).")
    verify_engine: Literal["auto", "transformers", "vllm", "http"] = option("auto", "What runs --verify-model.")
    verify_base_url: str | None = option(None, "Its server, for the engine http.")
    max_violations: int | None = option(None, "Leave out ladders with more wrong steps than so many.", ge=0)

    def check(self) -> int:
        """As `LadderFlags.check`, for these flags, too."""
        if self.verify == "reward" and not self.verify_model:
            raise ConfigError("names no reward model", where="--verify-model", remedy="Give a folder or name")
        given = [self.verify_model, self.verify_base_url, self.max_violations]
        if self.verify == "none" and any(each is not None for each in given):
            raise ConfigError("needs --verify reward or --verify judge", where="--verify-model, --max-violations")
        return super().check()

    def verifier(self) -> OrderFlags:
        """These flags as those of the model that verifies."""
        changed: dict[str, object] = {"temperature": 0.0}
        if self.verify_model:
            changed |= {"model_name": self.verify_model, "max_model_len": None}
        if self.verify == "reward" or self.verify_engine != "auto" or self.verify_base_url:
            changed |= {"engine": self.verify_engine, "base_url": self.verify_base_url}
        return self.model_copy(update=changed)


class CheckedLadder(NamedTuple):
    """Wrong and undecided steps of a ladder."""

    ladder: KeyLadder
    violations: int
    ties: int


def verified(run: Run, flags: OrderFlags, ladders: Iterable[KeyLadder], total: int) -> Iterator[KeyLadder]:
    """The ladders with their ``violations``, less those above --max-violations; the rates go into the run.

    A step from a key to the next is wrong when the later key gets at least the reward of the earlier one, or when the
    judge prefers it in both orders; one about which the judge says tie or contradicts itself is undecided. A ladder
    that the judge could not judge in full is left out. Raises the engines' errors, and ConfigError when no ladder is
    left.
    """
    verify = _by_reward if flags.verify == "reward" else _by_judge
    checked = stepped = wrong = tied = clean = kept = 0
    for ladder, violations, ties in verify(run, flags, ladders, total):
        checked, stepped = checked + 1, stepped + len(ladder.less_relevant_keys)
        wrong, tied, clean = wrong + violations, tied + ties, clean + (violations == 0)
        if flags.max_violations is None or violations <= flags.max_violations:
            kept += 1
            yield ladder.model_copy(update={"violations": violations})
    run.counts |= {"verified": checked, "violations": wrong, "violation_rate": wrong / max(stepped, 1)}
    run.counts |= {"ladders_in_order": clean, "dropped_by_order": checked - kept}
    if flags.verify == "judge":
        run.counts |= {"tie_rate": tied / max(stepped, 1), "not_judged": total - checked}
    if checked and not kept:
        problem = f"none of {checked} ladders has at most {flags.max_violations} wrong steps"
        raise ConfigError(problem, where="--max-violations", remedy="Allow more, or use a better --model-name")


def _by_reward(run: Run, flags: OrderFlags, ladders: Iterable[KeyLadder], total: int) -> Iterator[CheckedLadder]:
    asked = flags.verifier()
    source = iter(ladders)

    def load() -> engines.Scorer:
        return engines.load_scorer(asked.model_name, **asked.engine_arguments())

    with (
        run.journal("rewards") as journal,
        window_scorer(load, journal) as scorer,
        run.progress(total, "ladders") as bar,
    ):
        while window := list(islice(source, WINDOW)):
            for ladder, rewards in zip(window, _rewards(scorer, journal, window), strict=True):
                yield CheckedLadder(ladder, _wrong(rewards), 0)
            bar.advance(len(window))


def _rewards(scorer: WindowScorer, journal: Journal, ladders: Sequence[KeyLadder]) -> list[list[float]]:
    """Each ladder's rewards. Older journals hold those of a whole ladder under one name."""
    whole = [journal.get(journal_key("rewards", ladder.query, rungs(ladder))) for ladder in ladders]
    missing = [ladder for ladder, known in zip(ladders, whole, strict=True) if known is None]
    fresh = iter(scorer((ladder.query, key) for ladder in missing for key in rungs(ladder)).tolist())
    return [known or list(islice(fresh, len(rungs(ladder)))) for ladder, known in zip(ladders, whole, strict=True)]


def _wrong(rewards: Sequence[float]) -> int:
    return sum(better <= worse for better, worse in pairwise(rewards))


class _Step(NamedTuple):
    """Compare the key at ``step`` with the next one; ``swapped``: the next one is shown first."""

    position: int
    ladder: KeyLadder
    step: int
    swapped: bool


def _by_judge(run: Run, flags: OrderFlags, ladders: Iterable[KeyLadder], total: int) -> Iterator[CheckedLadder]:
    spec = instruction("judge")

    def questions() -> Iterator[Question[_Step]]:
        for position, ladder in enumerate(ladders):
            keys = rungs(ladder)
            for step in range(len(keys) - 1):
                for swapped in (False, True):
                    first, second = reversed(keys[step : step + 2]) if swapped else keys[step : step + 2]
                    messages = spec.messages(query=ladder.query, first=first, second=second)
                    yield Question(_Step(position, ladder, step, swapped), messages, choices=CHOICES)

    answers = ask(
        run,
        flags.verifier(),
        questions(),
        lambda _, generation: opinion(generation),
        2 * flags.n_key_generation * total,
    )
    for _, group in groupby(answers, key=lambda answer: answer.item.position):
        judged = list(group)
        ladder = judged[0].item.ladder
        if len(judged) < 2 * len(ladder.less_relevant_keys):
            continue
        winners = [combined(a.value, b.value).winner for a, b in zip(judged[::2], judged[1::2], strict=True)]
        yield CheckedLadder(ladder, winners.count(-1), winners.count(0))
