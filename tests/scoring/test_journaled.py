"""Scores in journals: read, completed, kept; also journals that older code left behind when it was stopped.

``tests/fixtures/journals`` holds what runs of the code before NumberedPairs had written when they were interrupted.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Callable, Iterable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_models import FakeScorer, overlap
from hypothesis import given, settings
from hypothesis import strategies as st

import rmsearch.engines
from rmsearch.datasets.beir import Beir, Document
from rmsearch.datasets.chain import KeyLadder
from rmsearch.datasets.corpus import Row, indexed
from rmsearch.datasets.records import Candidates
from rmsearch.engines.pairs import NumberedPairs
from rmsearch.errors import RetryableError
from rmsearch.preferences.ladder_order import OrderFlags, verified
from rmsearch.retrieval.candidates import FirstStage, KeyChoices
from rmsearch.retrieval.corpus_search import Question
from rmsearch.scoring import journaled
from rmsearch.scoring.journaled import (
    BlockEntries,
    Entries,
    PairEntries,
    digest_names,
    key_names,
    score_journaled,
    window_scorer,
)
from rmsearch.stage import Run
from rmsearch.storage.journal import Journal

JOURNALS = Path(__file__).parents[1] / "fixtures" / "journals"
QUERIES = ["train price", "gene data", "python code"]
WORDS = [*QUERIES, "train data", "gene price", "salt water", "price price", "code data"]
KEYS = [f"{words} {i}" for i, words in enumerate(WORDS)]
CHOSEN = [[5, 2, 0, 7], [1, 0, 3], [2, 7, 6, 1, 5, 0, 3]]


class OrderedScorer(FakeScorer):
    """Keeps what it is asked; may be stopped after some batches."""

    def __init__(self, order: str | None = None, batches: int | None = None) -> None:
        super().__init__()
        self.pairs: list[tuple[str, str]] = []
        self.batches = batches
        if order:
            self.contract = SimpleNamespace(order=order)  # type: ignore[assignment]

    async def stream(self, pairs: Iterable[tuple[str, str]]) -> AsyncGenerator[tuple[np.ndarray, np.ndarray], None]:
        async for positions, rewards in super().stream(pairs):
            if self.batches is not None:
                self.batches -= 1
                if self.batches < 0:
                    raise RetryableError("stopped")
            yield positions, rewards

    async def score(self, pairs: Any) -> np.ndarray:
        self.pairs += pairs
        return await super().score(pairs)


def opened(name: str, folder: Path) -> Journal:
    """A copy of a journal that older code wrote, opened as the same work opens it."""
    shutil.copy(JOURNALS / name, folder / name)
    head = json.loads((folder / name).read_text().partition("\n")[0])
    return Journal(str(folder / name), head["fingerprint"])


def completed(journal: Journal, scorer: Any, pairs: NumberedPairs, entries: Callable[[Journal], Entries]) -> int:
    """Score the pairs with the journal, check every reward, and return how many the journal had."""
    rewards = np.full(len(pairs), np.nan, np.float32)
    with journal:
        known = asyncio.run(score_journaled(lambda: scorer, pairs, entries(journal), rewards.__setitem__))
    assert rewards.tolist() == pytest.approx([overlap(*texts) for texts in pairs], abs=1e-6)
    return known


@pytest.mark.parametrize("order", ["query_first", "key_first"])
def test_rerank_goes_on_with_a_journal_of_older_code(order: str, tmp_path: Path) -> None:
    documents = {str(i): Document("", key) for i, key in enumerate(KEYS)}
    beir = Beir("tiny", "test", {f"q{i}": query for i, query in enumerate(QUERIES)}, documents, {})
    lists = [
        Candidates(query_id=f"q{i}", key_ids=list(map(str, row)), embed_relevances=[0.5] * len(row))
        for i, row in enumerate(CHOSEN)
    ]
    pairs, scorer = FirstStage(beir, lists, 0, 0).pairs, OrderedScorer(order)
    journal = opened(f"rerank_{order}.journal", tmp_path)
    assert completed(journal, scorer, pairs, lambda journal: BlockEntries(journal, 4)) == 10
    assert len(scorer.pairs) == len(pairs) - 10 == 4


@pytest.mark.parametrize("order", ["query_first", "key_first"])
@pytest.mark.parametrize("chosen", [False, True])
def test_retrieval_goes_on_with_a_journal_of_older_code(order: str, chosen: bool, tmp_path: Path) -> None:
    numbers = np.array([(q, k) for q, row in enumerate(CHOSEN) for k in row], np.int32) if chosen else None
    name = f"top_{'candidates' if chosen else 'keys'}_{order}.journal"
    with indexed(Row(f"k{i}", key, {}) for i, key in enumerate(KEYS)) as keys:
        questions = [Question(query, str(i)) for i, query in enumerate(QUERIES)]
        pairs, scorer = KeyChoices(questions, keys, numbers).pairs(order == "key_first"), OrderedScorer(order)
        known = completed(opened(name, tmp_path), scorer, pairs, lambda journal: BlockEntries(journal, 4, sliced=True))
    assert known == 10 and len(scorer.pairs) == len(pairs) - 10


@pytest.mark.parametrize("name", ["search", "search_prompts"])
def test_a_search_goes_on_with_a_checkpoint_of_older_code(name: str, tmp_path: Path) -> None:
    prompt = None if name == "search" else lambda query, key: f"{query}\n{key}"
    pairs, scorer = NumberedPairs(QUERIES, KEYS, prompt=prompt), OrderedScorer()
    known = completed(
        opened(f"{name}.journal", tmp_path), scorer, pairs, lambda journal: PairEntries(journal, digest_names(pairs))
    )
    assert known == 15 and len(scorer.pairs) == 24 - 15


def test_a_judge_goes_on_with_rewards_of_older_code(tmp_path: Path) -> None:
    asked = [(QUERIES[q], KEYS[k]) for q, row in enumerate(CHOSEN) for k in row]
    scorer = OrderedScorer()
    with opened("judge_rewards.journal", tmp_path) as journal, window_scorer(lambda: scorer, journal) as rewards:
        assert rewards(asked).tolist() == [overlap(*texts) for texts in asked]
        assert (rewards.from_journal, rewards.scored) == (10, 4) == (10, len(scorer.pairs))


def test_the_order_of_ladders_goes_on_with_rewards_of_older_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their entries were one for each ladder."""
    keys = [[KEYS[k] for k in row] for row in CHOSEN]
    ladders = [
        KeyLadder(query=query, correspond_key=row[0], less_relevant_keys=row[1:], df_id=query)
        for query, row in zip(QUERIES, keys, strict=True)
    ]
    scorer = OrderedScorer()
    monkeypatch.setattr(rmsearch.engines, "load_scorer", lambda *_, **__: scorer)
    run = Run("ladders", str(tmp_path / "ladders.json"), "ladders", 0.0)
    shutil.copy(JOURNALS / "ladder_rewards.journal", tmp_path / "ladders.json.rewards.journal")
    flags = OrderFlags(input_csv="x", output="y", model_name="g", verify="reward", verify_model="m")
    checked = list(verified(run, flags, iter(ladders), 3))
    assert scorer.pairs == [(QUERIES[2], key) for key in keys[2]], "only those of the third ladder"
    for ladder, row in zip(checked, keys, strict=True):
        rewards = [overlap(ladder.query, key) for key in row]
        assert ladder.violations == sum(better <= worse for better, worse in pairwise(rewards))


def test_no_model_is_loaded_where_the_journal_has_all(tmp_path: Path) -> None:
    def load() -> Any:
        raise AssertionError("the model is not needed")

    for scorer in (OrderedScorer, load):
        with Journal(str(tmp_path / "j"), "f") as journal, window_scorer(scorer, journal) as rewards:
            assert rewards([("a b", "b"), ("a", "b"), ("a b", "b")]).tolist() == [
                overlap("a b", "b"),
                overlap("a", "b"),
                overlap("a b", "b"),
            ]


FORMS: dict[str, Callable[[NumberedPairs], Callable[[Journal], Entries]]] = {
    "digests": lambda pairs: lambda journal: PairEntries(journal, digest_names(pairs)),
    "names": lambda pairs: lambda journal: PairEntries(journal, key_names(pairs)),
    "blocks": lambda pairs: lambda journal: BlockEntries(journal, 5),
    "sliced": lambda pairs: lambda journal: BlockEntries(journal, 5, sliced=True),
}


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    slab=st.integers(1, 30),
    order=st.sampled_from(["query_first", "key_first"]),
    chosen=st.booleans(),
    stops=st.lists(st.integers(0, 3), max_size=3),
)
def test_stopped_anywhere_no_kept_pair_is_scored_twice(
    form: str, slab: int, order: str, chosen: bool, stops: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pairs = NumberedPairs([f"{q} a" for q in range(9)], [f"{k} a b" for k in range(11)], key_first=order == "key_first")
    if chosen:
        pairs = pairs.at(np.arange(0, len(pairs), 2))
    path, paid = tmp_path_factory.mktemp("journal") / "j", 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journaled, "SLAB", slab)
        for batches in stops:
            scorer = OrderedScorer(order, batches)
            with Journal(str(path), "f") as journal:
                entries, rewards = FORMS[form](pairs)(journal), np.empty(len(pairs), np.float32)
                try:
                    asyncio.run(score_journaled(lambda s=scorer: s, pairs, entries, rewards.__setitem__))  # type: ignore[misc]
                except RetryableError:
                    paid += len(scorer.pairs) - min(len(scorer.pairs), 16)  # the batch on its way is lost
                else:
                    paid += len(scorer.pairs)
        scorer = OrderedScorer(order)
        known = completed(Journal(str(path), "f"), scorer, pairs, FORMS[form](pairs))
    assert known >= paid and known + len(scorer.pairs) == len(pairs)
