"""The judges: a language model that reads both orders, a teacher reward model, or labels. A verdict per comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, NamedTuple

from rmsearch import engines
from rmsearch.datasets.beir import read_qrels, split_qrels
from rmsearch.errors import ConfigError
from rmsearch.llm.asking import Question, ask
from rmsearch.llm.budget import Fitting
from rmsearch.llm.instructions import instruction
from rmsearch.preferences.verdicts import CHOICES, Opinion, Verdict, combined, from_grades, from_rewards, opinion
from rmsearch.scoring.journaled import window_scorer
from rmsearch.stage import Run

if TYPE_CHECKING:
    from rmsearch.preferences.judge_flags import JudgeFlags

CHOICE_TOKENS = 8  # room that is left for an answer held to CHOICES
WINDOW = 4096  # comparisons whose rewards are fetched at a time


@dataclass(frozen=True)
class Contest:
    """A query and the keys that are compared for it. ``positive_ids``: those known to serve it, None when unknown;
    ``roles``: what each key is (correspond, sampled), where the data says."""

    query: str
    query_id: str
    query_type: str | None
    keys: Sequence[str]
    key_ids: Sequence[str]
    positive_ids: Sequence[str] | None = None
    roles: Sequence[str] | None = None


class Comparison(NamedTuple):
    """Two keys of a contest, by position. ``number``: of the comparison; ``place``: of the contest in the file."""

    number: int
    place: int
    contest: Contest
    first: int
    second: int

    @property
    def keys(self) -> tuple[str, str]:
        """Both texts."""
        return self.contest.keys[self.first], self.contest.keys[self.second]


Judged = tuple[Comparison, Verdict]


def judged(config: JudgeFlags, run: Run, comparisons: Iterable[Comparison], total: int) -> Iterator[Judged]:
    """Each comparison with its verdict, in order, a window at a time; one without an answer is left out.

    total: how many there are, for the forecast. Puts what the judge's verdicts look like into ``run.counts``.
    """
    judges = {"llm": _by_llm, "reward": _by_reward, "labels": _by_labels}
    counts: Counter[str] = Counter()
    for comparison, verdict in judges[config.judge](config, run, comparisons, total):
        counts["judged"] += 1
        counts["ties"] += not verdict.winner
        yield comparison, verdict
    done = counts["judged"]
    run.counts |= {"compared": total, "judged": done, "ties": counts["ties"]}
    run.counts["tie_rate"] = round(counts["ties"] / done, 4) if done else 0.0


def decided_by(config: JudgeFlags) -> str:
    """What the records' ``source`` says."""
    if config.judge == "labels":
        return "labels"
    name = config.model_name.rstrip("/").rpartition("/")[2]
    if config.judge == "reward":
        return f"reward of {name}"
    return f"{instruction('judge').tag} by {name}"


def _by_llm(config: JudgeFlags, run: Run, comparisons: Iterable[Comparison], total: int) -> Iterator[Judged]:
    spec = instruction("judge")
    choices: tuple[str, ...] | None = CHOICES if config.constrain else None
    room = config.model_copy(update={"max_tokens": CHOICE_TOKENS}) if config.constrain else config
    fit = Fitting(room, spec.messages(query="", first="", second=""), config.max_characters, texts=3)

    def questions() -> Iterator[Question[Comparison]]:
        for comparison in comparisons:
            query, *keys = map(fit, (comparison.contest.query, *comparison.keys))
            for first, second in (keys, keys[::-1]):
                chat = spec.messages(query=query, first=first, second=second)
                yield Question(comparison, chat, choices=choices, logprobs=config.top_logprobs or None)

    seen: Counter[str] = Counter()
    answers = ask(run, config, questions(), lambda _, generation: opinion(generation), 2 * total)
    for _, group in groupby(answers, key=lambda answer: answer.item.number):
        both = list(group)
        if len(both) == 2:  # else the other order was refused
            opinions = [answer.value for answer in both]
            _observe(seen, *opinions)
            yield both[0].item, combined(*opinions)
    _report(run, seen, total)
    run.check_rejects(2 * total)


def _observe(seen: Counter[str], straight: Opinion, turned: Opinion) -> None:
    seen["pairs"] += 1
    seen["agree"] += combined(straight, turned).reason != "the orders disagree"
    for each in (straight, turned):
        seen[each.choice] += 1
        seen["without_confidence"] += each.log_odds is None


def _report(run: Run, seen: Counter[str], total: int) -> None:
    """first_preferred: of the answers that name a text, how many name the one shown first; 0.5 is no bias."""
    named = seen["1"] + seen["2"]
    run.counts["unanswered"] = total - seen["pairs"]
    run.counts["agreement"] = round(seen["agree"] / seen["pairs"], 4) if seen["pairs"] else 0.0
    run.counts["first_preferred"] = round(seen["1"] / named, 4) if named else 0.0
    run.counts["without_confidence"] = seen["without_confidence"]


def _by_labels(config: JudgeFlags, run: Run, comparisons: Iterable[Comparison], total: int) -> Iterator[Judged]:
    grades, labelled = _grades(config), set[str]()
    with run.progress(total, "comparisons") as bar:
        for comparison in comparisons:
            contest = comparison.contest
            if grades is None:
                own: Mapping[str, int] | None = dict.fromkeys(contest.positive_ids or (), 1)
            else:
                own = grades.get(contest.query_id)
            if own:
                labelled.add(contest.query_id)
            ids = contest.key_ids
            first, second = ((own or {}).get(ids[at], 0) for at in (comparison.first, comparison.second))
            bar.advance(1)
            yield comparison, from_grades(first, second)
    if not labelled:
        where = config.qrels or config.dataset_path or config.sets
        problem = "knows no query of the sets" if grades is not None else "names no positive_ids to judge by"
        raise ConfigError(problem, where=where, remedy="Give the --qrels that the sets' query ids come from")
    run.counts["labelled_queries"] = len(labelled)


def _grades(config: JudgeFlags) -> Mapping[str, Mapping[str, int]] | None:
    """Query id -> key id -> grade; None when the sets' own positive_ids are to decide."""
    if config.qrels:
        return read_qrels(config.qrels)
    return split_qrels(config.dataset_path, config.split) if config.dataset_path else None


def _by_reward(config: JudgeFlags, run: Run, comparisons: Iterable[Comparison], total: int) -> Iterator[Judged]:
    source = iter(comparisons)

    def load() -> engines.Scorer:
        return engines.load_scorer(config.model_name, **config.engine_arguments())

    with (
        run.journal() as journal,
        window_scorer(load, journal) as teacher,
        run.progress(total, "comparisons") as bar,
    ):
        while window := list(islice(source, WINDOW)):
            rewards = teacher((each.contest.query, key) for each in window for key in each.keys)
            for comparison, (first, second) in zip(window, rewards.reshape(-1, 2).tolist(), strict=True):
                bar.advance(1)
                yield comparison, from_rewards(first, second, config.margin_scale, config.tie_margin)
    run.counts |= {"scored": teacher.scored, "from_journal": teacher.from_journal}
