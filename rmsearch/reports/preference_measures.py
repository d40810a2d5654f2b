"""What is to be known about a preference set, measured from its columns: plain facts that a JSON file can hold.

Texts stand in the facts as a `Place` until `filled` puts them in, since only few are shown and none are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rmsearch.datasets.duplicates import words
from rmsearch.datasets.preferences import Preference
from rmsearch.reports.preference_columns import Columns, Distinct, Place

Facts = dict[str, Any]
SHOWN = 10  # keys, openings, types of each sort
EXAMPLES = 5  # of contradictions and of near-duplicates, each
BINS = 40
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


def measure(columns: Columns, near: float) -> Facts:
    """The facts of one set. ``near``: similarity from which two texts are near-duplicates."""
    known = {name: columns[name][~np.isnan(columns[name])] for name in ("margin", "confidence")}
    return {
        "counts": _counts(columns),
        "types": [
            {"query_type": kind or None, "source": source or None, "pairs": pairs}
            for (kind, source), pairs in columns.origins.most_common()
        ],
        "prompts": [{"prompt": prompt, "pairs": pairs} for prompt, pairs in columns.prompts.most_common()],
        "lengths": {
            unit: compared(columns[f"chosen_{unit}"], columns[f"rejected_{unit}"]) for unit in ("characters", "words")
        },
        "scores": {
            name: {"known": len(values), **spread(values), "histogram": histogram({name: values})}
            for name, values in known.items()
            if len(values)
        },
        "keys": _keys(columns),
        "openings": _openings(columns),
        "contradictions": contradictions(columns["query"], columns["chosen"], columns["rejected"]),
        "near_duplicates": {
            "similarity": near,
            "queries": repeats(columns.queries, near),
            "keys": repeats(columns.keys, near),
        },
    }


def _counts(columns: Columns) -> Facts:
    of_query = np.unique(columns["query"], return_counts=True)[1]
    return {
        "pairs": len(columns),
        "queries": len(of_query),
        "keys": len(np.unique(_keys_of(columns))),
        "pairs_per_query": spread(of_query),
        "query_words": spread(columns["query_words"]),
        "repeated_pairs": len(columns) - len(np.unique(_mixed(columns, "query", "chosen", "rejected"))),
        "compares_queries": columns.compares["queries"],
        "compares_both": columns.compares["both"],
    }


def spread(values: np.ndarray) -> Facts:
    """Mean and quantiles of numbers; nothing of none."""
    if not len(values):
        return {}
    quantiles = np.quantile(values, list(QUANTILES.values()))
    return {"mean": float(values.mean()), **dict(zip(QUANTILES, quantiles.tolist(), strict=True))}


def histogram(series: Mapping[str, np.ndarray]) -> Facts:
    """Counts per bin of equal width from the least value to the 99th percentile; the last bin holds what is above, too.

    Bins of whole numbers are whole numbers wide.
    """
    values = np.concatenate(list(series.values()))
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    width = max(high - low, 0.0) / BINS
    if values.dtype.kind in "iu":
        width = max(1, math.ceil(width))
    width = width or 1.0
    bins = min(BINS, int((high - low) / width) + 1)
    counts = {
        name: np.bincount(np.minimum(((each - low) / width).astype(np.int64), bins - 1), minlength=bins).tolist()
        for name, each in series.items()
    }
    return {"start": low, "width": width, "counts": counts, "more": bool(values.max() > low + bins * width)}


def compared(chosen: np.ndarray, rejected: np.ndarray) -> Facts:
    """How far the size of a key tells which one was chosen.

    longer_chosen, equal: shares of the pairs; guess: how often "the longer one" (or "the shorter one") is right, a
    tie being right half the time; auc: chance that a chosen key is longer than a rejected key of any pair.
    """
    longer, equal = float((chosen > rejected).mean()), float((chosen == rejected).mean())
    right = longer + equal / 2
    return {
        "chosen": spread(chosen),
        "rejected": spread(rejected),
        "longer_chosen": longer,
        "equal": equal,
        "guess": max(right, 1 - right),
        "auc": auc(chosen, rejected),
        "histogram": histogram({"chosen": chosen, "rejected": rejected}),
    }


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive's value is above a negative's, ties counting half
    (Mann-Whitney's U over the number of pairs)."""
    ordered = np.sort(negative)
    below, upto = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below.sum() + upto.sum()) / 2 / (len(positive) * len(negative)))


def _keys_of(columns: Columns) -> np.ndarray:
    return np.concatenate([columns["chosen"], columns["rejected"]])


def _mixed(columns: Columns, *names: str) -> np.ndarray:
    """One digest of several columns' digests."""
    mixed = np.zeros(len(columns), np.uint64)
    for name in names:
        mixed = (mixed ^ columns[name]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _keys(columns: Columns) -> Facts:
    """The keys that are chosen, and that are rejected, in most pairs."""
    pairs = len(columns)
    _, first, number = np.unique(_keys_of(columns), return_index=True, return_inverse=True)
    counts = {
        "chosen": np.bincount(number[:pairs], minlength=len(first)),
        "rejected": np.bincount(number[pairs:], minlength=len(first)),
    }

    def facts(key: int) -> Facts:
        position, side = int(first[key]) % pairs, ("chosen", "rejected")[int(first[key]) // pairs]
        shown = {"key_id": Place(position, f"{side}_id"), "key": Place(position, side)}
        return shown | {name: int(of[key]) for name, of in counts.items()}

    return {
        f"{name}_most": [
            facts(key) for i, key in enumerate(np.argsort(-of, kind="stable")[:SHOWN].tolist()) if i == 0 or of[key] > 1
        ]
        for name, of in counts.items()
    }


def _openings(columns: Columns) -> list[Facts]:
    """The commonest first words, by distinct queries."""
    _, first = np.unique(columns["query"], return_index=True)
    openings, place, count = np.unique(columns["opening"][first], return_index=True, return_counts=True)
    order = [i for i in np.argsort(-count, kind="stable").tolist() if openings[i] and count[i] > 1]
    return [
        {
            "opening": Place(int(first[place[i]]), "query", columns.opening_words),
            "example": Place(int(first[place[i]]), "query"),
            "queries": int(count[i]),
            "share": int(count[i]) / len(first),
        }
        for i in order[:SHOWN]
    ]


def contradictions(query: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Facts:
    """Pairs a > b whose reverse b > a is there for the same query, counted on both sides. Digests, one per pair."""
    low, high, upward = np.minimum(chosen, rejected), np.maximum(chosen, rejected), chosen < rejected
    order = np.lexsort((upward, high, low, query))
    query, low, high, upward = (each[order] for each in (query, low, high, upward))
    fresh = (query[1:] != query[:-1]) | (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    starts = np.concatenate(([0], np.flatnonzero(fresh) + 1))
    sizes = np.diff(np.append(starts, len(order)))
    both = ~upward[starts] & upward[starts + sizes - 1]  # sorted, so a mixed group starts down and ends up
    count = int(sizes[both].sum())
    # the first and last pair of a mixed group say the opposite of each other
    ends = starts[both] + sizes[both] - 1
    shown = np.stack([order[starts[both]], order[ends]], axis=1)[:EXAMPLES].tolist()
    return {
        "pairs": count,
        "share": count / len(order),
        "examples": [
            {"query": Place(min(pair), "query"), "one": Place(min(pair), "chosen"), "other": Place(max(pair), "chosen")}
            for pair in shown
        ],
    }


def repeats(distinct: Distinct, near: float) -> Facts:
    """How many of the compared texts nearly repeat an earlier one."""
    first = distinct.sketches.duplicates(near)
    found = [(earlier, later) for later, earlier in enumerate(first) if earlier is not None]
    return {
        "compared": len(first),
        "found": len(found),
        "share": len(found) / max(len(first), 1),
        "examples": [
            {"one": distinct.place(earlier), "other": distinct.place(later)} for earlier, later in found[:EXAMPLES]
        ],
    }


def overlap(train: Columns, test: Columns, near: float) -> Facts:
    """How far the test set's queries, ids and keys are those of the training set, as shares of the test set's.

    nearly: test queries that only nearly repeat a training query; other_text: ids that both sets have, but with
    different queries.
    """
    queries, keys = np.unique(test["query"]), np.unique(_keys_of(test))
    same = np.isin(queries, train["query"])
    sketches = train.queries.sketches.followed_by(test.queries.sketches)
    before = len(train.queries)
    first = sketches.duplicates(near)[before:]
    close = [i for i, earlier in enumerate(first) if earlier is not None and earlier < before]
    places = [test.queries.place(i).position for i in close]
    nearly = int((~np.isin(test["query"][places], train["query"])).sum()) if places else 0
    ids = np.unique(test["query_id"][test["query_id"] > 0])
    shared = np.intersect1d(ids, train["query_id"])
    agreeing = np.isin(_mixed(test, "query_id", "query"), _mixed(train, "query_id", "query"))
    same_text = np.intersect1d(shared, test["query_id"][agreeing])
    return {
        "queries": len(queries),
        "same": int(same.sum()),
        "same_share": float(same.mean()),
        "nearly": nearly,
        "nearly_share": nearly / max(len(first), 1),
        "ids": len(ids),
        "same_ids": len(shared),
        "other_text": len(shared) - len(same_text),
        "keys": len(keys),
        "same_keys": int(np.isin(keys, _keys_of(train)).sum()),
    }


def places_in(facts: Any) -> Iterable[Place]:
    """The places of all texts that the facts name."""
    if isinstance(facts, Place):
        yield facts
    elif isinstance(facts, dict):
        for value in facts.values():
            yield from places_in(value)
    elif isinstance(facts, list):
        for value in facts:
            yield from places_in(value)


def filled(facts: Any, preferences: Mapping[int, Preference]) -> Any:
    """The facts with texts in place of the places."""
    if isinstance(facts, Place):
        text = getattr(preferences[facts.position], facts.field)
        return " ".join(words(text)[: facts.first_words]) if facts.first_words else text
    if isinstance(facts, dict):
        return {name: filled(value, preferences) for name, value in facts.items()}
    return [filled(value, preferences) for value in facts] if isinstance(facts, list) else facts


def sample(columns: Columns, size: int, seed: int) -> list[Facts]:
    """Random pairs to read, in the order of the file."""
    chosen = np.random.default_rng(seed).choice(len(columns), min(size, len(columns)), replace=False)
    shown = Preference._fields
    return [{name: Place(position, name) for name in shown} for position in np.sort(chosen).tolist()]


def reports(made: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Facts]:
    """What judges say in the run records of files (file -> records): the numbers, each record once."""
    found: list[Facts] = []
    for uri, records in made.items():
        for record in records:
            if "judge" in str(record.get("stage")):
                counts = record.get("counts", {})
                numbers = {name: value for name, value in counts.items() if isinstance(value, int | float)}
                found.append({"file": uri, "fingerprint": record.get("fingerprint"), **numbers})
    return list({each["fingerprint"]: each for each in reversed(found)}.values())[::-1]
