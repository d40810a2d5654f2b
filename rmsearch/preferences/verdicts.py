"""Which of two keys serves a query better: what judges say, read from answers, rewards and grades, and combined.

A judge reads each pair in both orders; only what both orders say is a preference (Wang et al. 2023, "Large Language
Models are not Fair Evaluators", arXiv:2305.17926). A preference for a place, however strong, so ends as a tie, and as
an additive shift of the log-odds it cancels in their mean over the orders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rmsearch.engines.generation import Generation
from rmsearch.preferences.orders import Positions

Choice = Literal["1", "2", "tie"]
CHOICES: tuple[Choice, ...] = ("1", "2", "tie")
_NAMES: dict[str, Choice] = {"1": "1", "2": "2", "a": "1", "b": "2", "tie": "tie", "draw": "tie", "neither": "tie"}
_VALUE: dict[Choice, Literal[-1, 0, 1]] = {"1": 1, "2": -1, "tie": 0}

_NOUN = r"(?i:(?:the\s+)?(?:text|key|sentence|passage|document|option|result|number|id)[\s_#]*)?"
_ONE = r"(?P<name>[12]|[AB]|[Tt]ie|[Dd]raw|[Nn]either)"
_QUOTES = r"[\s\"'*`]*"
_END = r"[\"'*`]*(?=[.,;:!})\]]?(?:\s|$))(?!\s+[a-z])"  # a clause ends here: not 1.5, 12 or "2 of them"
# From the clearest form to the vaguest; the first that occurs decides.
_FORMS = (
    re.compile(rf"<(?i:id|answer|choice)>\s*{_NOUN}{_ONE}\s*</"),
    re.compile(rf"\\boxed\{{\s*{_NOUN}{_ONE}\s*\}}"),
    re.compile(
        r"\b(?i:answer|verdict|choice|winner|(?:better|preferred)(?: text| key| sentence)?)[\"'*]*\s*(?i:is|[:：=])+"
        rf"{_QUOTES}{_NOUN}{_ONE}{_END}"
    ),
    re.compile(rf"(?:^|[:：]){_QUOTES}{_NOUN}{_ONE}[\s\"'*`.。!]*$", re.MULTILINE),
)
_FENCE = re.compile(r"^```\w*\s*\n(.*?)\n?```$", re.DOTALL)
_AROUND = " \t\r\n\"'`*.,:;!()[]<>。「」"


@dataclass(frozen=True)
class Opinion:
    """An answer in the order in which two keys were shown. log_odds: of the first over the second, if known."""

    choice: Choice
    log_odds: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Which of two keys serves better: winner 1 the first, -1 the second, 0 neither (a tie, and ``reason`` says why).

    score: how far the first is ahead, in rewards (log-odds or a difference of rewards), None when the judge has none.
    """

    winner: Literal[-1, 0, 1]
    score: float | None = None
    reason: str = ""

    def swapped(self) -> Verdict:
        """The same verdict with the keys named the other way round."""
        turned: Literal[-1, 0, 1] = 0 if not self.winner else -1 if self.winner > 0 else 1
        return Verdict(turned, None if self.score is None else -self.score, self.reason)

    def margin(self, most: float) -> float | None:
        """How far the winner is ahead, within [0, most]; None when unknown."""
        return None if self.score is None else round(min(max(0.0, self.winner * self.score), most), 6)


def combined(straight: Opinion, turned: Opinion) -> Verdict:
    """The verdict of two opinions, the second one with the keys shown the other way round."""
    first, second = _VALUE[straight.choice], -_VALUE[turned.choice]
    score = None
    if straight.log_odds is not None and turned.log_odds is not None:
        score = (straight.log_odds - turned.log_odds) / 2
    if first != second:
        return Verdict(0, score, "the orders disagree")
    return Verdict(_VALUE[straight.choice], score, "" if first else "both orders say tie")


def from_rewards(first: float, second: float, scale: float, tie_margin: float) -> Verdict:
    """The verdict of a reward model; a difference of at most ``tie_margin`` (before scaling) is a tie."""
    difference = first - second
    if abs(difference) <= tie_margin:
        return Verdict(0, scale * difference, "the rewards differ too little")
    return Verdict(1 if difference > 0 else -1, scale * difference)


def from_grades(first: int, second: int) -> Verdict:
    """The verdict of labels. Grades of 0 and below mean the same as none: not known to serve."""
    difference = max(first, 0) - max(second, 0)
    if not difference:
        return Verdict(0, None, "both have the same grade")
    return Verdict(1 if difference > 0 else -1)


def opinion(generation: Generation) -> Opinion:
    """What an answer says. ValueError: it was cut, or names no choice or several."""
    choice = _bare(generation.text)
    if choice is None:
        if generation.finish == "length":
            raise ValueError("the answer was cut")
        choice = read_choice(generation.text)
    return Opinion(choice, log_odds(generation))


def read_choice(text: str) -> Choice:
    """The choice that an answer names: alone on a line ("1", "Text 1"), in tags (``<ID>1</ID>``), or after "answer:"
    and the like. A and B stand for 1 and 2.

    ValueError when it names none, or several. A choice that is told in prose only counts as none: to guess at it would
    poison data, to ask again costs one answer.
    """
    text = _final(text)
    if (alone := _bare(text)) is not None:
        return alone
    for form in _FORMS:
        named = {_NAMES[match["name"].lower()] for match in form.finditer(text)}
        if len(named) == 1:
            return named.pop()
        if named:
            raise ValueError("the answer names more than one choice")
    raise ValueError("the answer names no choice" if text else "the answer is empty")


def _final(text: str) -> str:
    """The text without what a model thinks aloud, and without a code fence."""
    if "<think>" in text and "</think>" not in text:
        raise ValueError("the answer ends while the model thinks")
    text = text.rpartition("</think>")[2].strip()
    fenced = _FENCE.match(text)
    return fenced[1].strip() if fenced else text


def _bare(text: str) -> Choice | None:
    """The choice when the text is nothing else."""
    text = text.strip(_AROUND)
    return None if text in ("a", "b") else _NAMES.get(text.lower())


def log_odds(generation: Generation) -> float | None:
    """log P(1) / P(2) where the answer takes its choice; None when that is not known.

    That place is the first token of an answer that is nothing but the choice, else the only token that is one. A
    choice that is not among the listed alternatives counts with the least of theirs, so the odds are never overstated.
    """
    step = _deciding(generation)
    if step is None:
        return None
    chances = {"1": 0.0, "2": 0.0}
    for token, logprob in step.items():
        if (name := token.strip(_AROUND)) in chances:
            chances[name] += math.exp(logprob)
    if not any(chances.values()):
        return None
    least = min(math.exp(logprob) for logprob in step.values())
    known = {name: chance or least for name, chance in chances.items()}
    return math.log(known["1"] / known["2"]) if all(known.values()) else None


def _deciding(generation: Generation) -> dict[str, float] | None:
    steps = [step for step in generation.logprobs or () if step]
    if steps and _bare(generation.text) is not None:
        return steps[0]
    naming = [step for step in steps if max(step, key=lambda t: step[t]).strip(_AROUND) in ("1", "2")]
    return naming[0] if len(naming) == 1 else None


def without_circles(pairs: Sequence[tuple[Positions, float | None]]) -> tuple[list[int], list[int]]:
    """(kept, dropped) indices of (chosen, rejected) pairs: the least sure pair of every circle is dropped.

    Pairs are taken surest first, those of unknown sureness last, and one that contradicts the ones taken is dropped.
    """
    below: dict[int, set[int]] = {}
    dropped = set()
    for i, ((chosen, rejected), _) in sorted(enumerate(pairs), key=lambda item: -_sureness(item[1][1])):
        if chosen in _reached(below, rejected):
            dropped.add(i)
        else:
            below.setdefault(chosen, set()).add(rejected)
    return [i for i in range(len(pairs)) if i not in dropped], sorted(dropped)


def _sureness(score: float | None) -> float:
    return -1.0 if score is None else abs(score)


def _reached(below: Mapping[int, set[int]], start: int) -> set[int]:
    """``start`` and all that it is preferred to, directly or not."""
    found, waiting = {start}, [start]
    while waiting:
        fresh = below.get(waiting.pop(), set()) - found
        found |= fresh
        waiting += fresh
    return found
