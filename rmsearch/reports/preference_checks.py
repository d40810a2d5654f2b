"""The checks that a preference set must pass, each with its limit, what was found and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rmsearch.reports.page import counted, percent
from rmsearch.stage import StageConfig, option

Facts = Mapping[str, Any]


class CheckFlags(StageConfig):
    """From where on a finding fails a set."""

    max_length_bias: float = option(
        0.7, "Fail when guessing by length is right in this share of the pairs, or with this AUC.", gt=0.5, le=1
    )
    max_key_share: float = option(0.25, "Fail when one key is chosen in this share of the pairs.", gt=0, le=1)
    max_template_share: float = option(
        0.4,
        "Fail when this share of the queries begins with the same words, or comes of one of several prompts.",
        gt=0,
        le=1,
    )
    max_overlap: float = option(
        0.01, "Fail when this share of the test queries is in the training set, as it is or nearly.", gt=0, le=1
    )
    max_contradictions: float = option(
        0.01, "Fail when this share of the pairs is contradicted by another one of the same query.", gt=0, le=1
    )
    max_near_duplicates: float = option(
        0.2, "Fail when this share of the queries, or of the keys, nearly repeats an earlier one.", gt=0, le=1
    )
    max_tie_rate: float = option(0.5, "Fail when a judge found this share of ties.", gt=0, le=1)
    max_position_bias: float = option(
        0.1,
        "Fail when a judge preferred the text shown first this much more, or less, often than in half.",
        gt=0,
        le=0.5,
    )


@dataclass(frozen=True)
class Check:
    """One check of one set: ``value`` is what was measured, ``limit`` the value from which it fails."""

    name: str
    of: str
    passed: bool
    value: float
    limit: float
    finding: str
    remedy: str

    @property
    def title(self) -> str:
        """The check's name, with the set's unless it is ``train``."""
        return self.name if self.of == "train" else f"{self.name} ({self.of})"

    @property
    def line(self) -> str:
        """``length: the longer key is chosen in 83 % of the pairs; …``"""
        return f"{self.title}: {self.finding}"

    def facts(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self) | {"line": self.line}


def check_set(of: str, facts: Facts, limits: CheckFlags) -> list[Check]:
    """The checks of one set by itself."""
    return [
        _length(of, facts["lengths"], limits.max_length_bias),
        _key(of, facts, limits.max_key_share),
        _template(of, facts, limits.max_template_share),
        _contradictions(of, facts["contradictions"], limits.max_contradictions),
        *(_repeats(of, sort, facts["near_duplicates"], limits.max_near_duplicates) for sort in ("queries", "keys")),
    ]


def _check(name: str, of: str, value: float, limit: float, finding: str, remedy: str) -> Check:
    return Check(name, of, value < limit, value, limit, finding, remedy)


def _length(of: str, lengths: Facts, limit: float) -> Check:
    """By the unit that predicts best."""
    unit, facts = max(lengths.items(), key=lambda item: _strength(item[1]))
    longer = facts["longer_chosen"] + facts["equal"] / 2 >= 0.5
    share = facts["longer_chosen"] if longer else 1 - facts["longer_chosen"] - facts["equal"]
    predicts = "alone predicts the choice" if _strength(facts) >= limit else "does not predict the choice"
    auc = facts["auc"] if longer else 1 - facts["auc"]
    finding = (
        f"the {'longer' if longer else 'shorter'} key is chosen in {percent(share)} of the pairs; length {predicts} "
        f"(right in {percent(facts['guess'])}, AUC {auc:.2f}, by {unit})"
    )
    remedy = "Add negatives as long as the chosen keys, or cut the keys to one length"
    return _check("length", of, _strength(facts), limit, finding, remedy)


def _strength(facts: Facts) -> float:
    return float(max(facts["guess"], facts["auc"], 1 - facts["auc"]))


def _key(of: str, facts: Facts, limit: float) -> Check:
    top, pairs = facts["keys"]["chosen_most"][0], facts["counts"]["pairs"]
    share = top["chosen"] / pairs
    name = f" ({top['key_id']})" if top["key_id"] else ""
    finding = f"one key{name} is chosen in {percent(share)} of the pairs ({top['chosen']:,} of {pairs:,})"
    remedy = "Take fewer pairs of that key (rmsearch train mine --balance 0.5), or add queries that other keys serve"
    return _check("key", of, share, limit, finding, remedy)


def _template(of: str, facts: Facts, limit: float) -> Check:
    """The commonest opening of queries, or the commonest prompt where several were used."""
    pairs, prompts = facts["counts"]["pairs"], facts["prompts"]
    if len(prompts) > 1 and (share := prompts[0]["pairs"] / pairs) >= limit:
        finding = f"the prompt {prompts[0]['prompt']} made {percent(share)} of the pairs"
        return _check("template", of, share, limit, finding, "Make as many pairs with the other prompts")
    if not facts["openings"]:
        return _check("template", of, 0.0, limit, "no two queries begin with the same words", "")
    top = facts["openings"][0]
    finding = f"{percent(top['share'])} of the queries begin with the same words ({top['opening']!r})"
    remedy = "Make queries with several instructions, or take fewer of that kind"
    return _check("template", of, top["share"], limit, finding, remedy)


def _contradictions(of: str, facts: Facts, limit: float) -> Check:
    pairs = "1 pair has its reverse" if facts["pairs"] == 1 else f"{counted(facts['pairs'], 'pair')} have their reverse"
    finding = f"{pairs} for the same query ({percent(facts['share'])})"
    remedy = "Drop both pairs, or judge them again in both orders"
    return _check("contradictions", of, facts["share"], limit, finding, remedy)


def _repeats(of: str, sort: str, near: Facts, limit: float) -> Check:
    facts = near[sort]
    finding = (
        f"{percent(facts['share'])} of the {sort} nearly repeat an earlier one "
        f"({facts['found']:,} of {facts['compared']:,}; similarity ≥ {near['similarity']:g})"
    )
    remedy = {
        "queries": "Filter them (rmsearch train filter_query_recs)",
        "keys": "Drop repeated rows of the corpus: one of two equal keys is a false negative",
    }[sort]
    return _check(f"near-duplicate {sort}", of, facts["share"], limit, finding, remedy)


def check_judges(reports: Sequence[Facts], limits: CheckFlags) -> list[Check]:
    """The worst of what the judges report; nothing when none does."""
    found = []
    ties = max((each["tie_rate"] for each in reports if "tie_rate" in each), default=None)
    if ties is not None:
        finding, remedy = (
            f"the judge found {percent(ties)} ties",
            "Sample keys that differ more, or use a stronger judge",
        )
        found.append(_check("ties", "train", ties, limits.max_tie_rate, finding, remedy))
    first = [each["first_preferred"] for each in reports if "first_preferred" in each]
    if first:
        worst = max(first, key=lambda share: abs(share - 0.5))
        finding = f"the judge preferred the text shown first in {percent(worst)} of its answers (50 % is no bias)"
        remedy = "Use a stronger judge; where its two orders disagree it learned nothing about the texts"
        found.append(_check("position bias", "train", abs(worst - 0.5), limits.max_position_bias, finding, remedy))
    return found


def check_overlap(facts: Facts, limits: CheckFlags) -> Check:
    """Whether test queries were trained on."""
    share = facts["same_share"] + facts["nearly_share"]
    finding = (
        f"{percent(facts['same_share'])} of the test queries ({facts['same']:,} of {facts['queries']:,}) "
        f"are in the training set, {percent(facts['nearly_share'])} more nearly"
    )
    remedy = "Split by query, and drop test queries that training has"
    return _check("overlap", "train", share, limits.max_overlap, finding, remedy)


def failed(checks: Sequence[Check]) -> list[Check]:
    """Those that did not pass."""
    return [check for check in checks if not check.passed]
