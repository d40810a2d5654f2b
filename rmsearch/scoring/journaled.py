"""Pairs scored, each score kept in a journal as it arrives, so that killed work pays for no pair twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import Protocol, TypeVar

import numpy as np

from rmsearch.engines import Scorer
from rmsearch.engines.pairs import NumberedPairs, UniquePairs, pair_digest, text_digest
from rmsearch.errors import RetryableError
from rmsearch.progress import Progress
from rmsearch.stage import Run
from rmsearch.storage.journal import Journal, journal_key

T = TypeVar("T")
Put = Callable[[np.ndarray, np.ndarray], None]  # takes positions int64[n] and their rewards float32[n]
Scored = AsyncGenerator[tuple[np.ndarray, np.ndarray], None]

SLAB = 1 << 20  # pairs whose state is in memory at a time


class Entries(Protocol):
    """The form in which a journal holds rewards."""

    @property
    def slab(self) -> int | None:
        """Pairs that are read and scored before the next ones are read; None: all."""

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of the positions (one slab's, ascending) whose rewards are there, and these: int64[n], float32[n]."""

    def keep(self, positions: np.ndarray, rewards: np.ndarray) -> None:
        """Keep rewards, now or at the next `flush`."""

    def flush(self) -> None:
        """Write what waits."""


class PairEntries:
    """An entry for each pair, under a name made of its texts: they stay of use whatever else is asked later.

    ``names`` gives the names of the pairs at some positions: `digest_names` or `key_names`.
    """

    def __init__(self, journal: Journal, names: Callable[[np.ndarray], list[str]]) -> None:
        self._journal, self._names = journal, names

    @property
    def slab(self) -> int | None:
        return SLAB

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rewards = [self._journal.get(name) for name in self._names(positions)]
        known = np.array([reward is not None for reward in rewards], bool)
        return positions[known], np.array([reward for reward in rewards if reward is not None], np.float32)

    def keep(self, positions: np.ndarray, rewards: np.ndarray) -> None:
        self._journal.put_many(zip(self._names(positions), rewards.tolist(), strict=True))

    def flush(self) -> None:
        """Nothing waits."""


def digest_names(pairs: NumberedPairs) -> Callable[[np.ndarray], list[str]]:
    """Names of a search's pairs: 32 hex digits over both texts, or over the finished prompt."""
    if pairs.prompt is not None:
        return lambda positions: [text_digest(prompt).hex() for _, prompt in pairs.texts(positions)]
    queries, keys = ([text_digest(text) for text in texts] for texts in (pairs.queries, pairs.keys))

    def names(positions: np.ndarray) -> list[str]:
        query, key = pairs.locate(positions)
        return [pair_digest(queries[q], keys[k]).hex() for q, k in zip(query.tolist(), key.tolist(), strict=True)]

    return names


def key_names(pairs: NumberedPairs) -> Callable[[np.ndarray], list[str]]:
    """Names of a stage's pairs."""
    return lambda positions: [journal_key(*texts) for texts in pairs.texts(positions)]


class BlockEntries:
    """Entries of ``size`` pairs or more, ``[positions, rewards]``, for pairs whose positions the inputs settle.

    They are numbered from 0: as ``number``, or as ``first position of the slab:number`` where ``sliced``.
    """

    def __init__(self, journal: Journal, size: int, *, sliced: bool = False) -> None:
        self._journal, self._size, self._sliced = journal, size, sliced
        self._first = self._number = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def slab(self) -> int | None:
        return SLAB if self._sliced else None

    @property
    def _name(self) -> str:
        return f"{self._first}:{self._number}" if self._sliced else str(self._number)

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._first, self._number = int(positions[0]), 0
        blocks: list[tuple[list[int], list[float]]] = []
        while (entry := self._journal.get(self._name)) is not None:
            blocks.append(entry)
            self._number += 1
        known, rewards = ([value for block in blocks for value in block[part]] for part in (0, 1))
        return np.array(known, np.int64), np.array(rewards, np.float32)

    def keep(self, positions: np.ndarray, rewards: np.ndarray) -> None:
        self._waiting.append((positions, rewards))
        if sum(len(part) for part, _ in self._waiting) >= self._size:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            positions, rewards = (np.concatenate(part).tolist() for part in zip(*self._waiting, strict=True))
            self._waiting.clear()
            self._journal.put(self._name, [positions, rewards])
            self._number += 1


async def score_journaled(
    load: Callable[[], Scorer],
    pairs: NumberedPairs,
    entries: Entries,
    put: Put,
    *,
    timeout: float | None = None,
    where: str | None = None,
    shown: Progress | None = None,
) -> int:
    """Give every pair's reward to ``put`` once: from the journal, else from the model, whence it is kept at once.

    ``load`` is called when a reward is missing. Returns how many the journal had. Raises RetryableError when no reward
    came for ``timeout`` seconds.
    """

    def arrived(positions: np.ndarray, rewards: np.ndarray) -> None:
        put(positions, rewards)
        if shown is not None:
            shown.advance(len(positions))

    from_journal = 0
    size = entries.slab or max(len(pairs), 1)
    for first in range(0, len(pairs), size):
        positions = np.arange(first, min(first + size, len(pairs)))
        known, rewards = await in_thread(entries.read, positions)
        if len(known):
            from_journal += len(known)
            arrived(known, rewards)
        left = np.setdiff1d(positions, known, assume_unique=True)
        if not len(left):
            continue
        scorer = load()
        if getattr(scorer.contract, "order", None) == "key_first":
            left = pairs.by_key(left)
        try:
            async with aclosing(in_time(scorer.stream(pairs.at(left)), timeout, where)) as results:
                async for at, rewards in results:
                    entries.keep(left[at], rewards)
                    arrived(left[at], rewards)
        finally:
            entries.flush()
    return from_journal


async def in_time(results: Scored, timeout: float | None, where: str | None = None) -> Scored:
    """What a scorer streams. RetryableError when nothing came for ``timeout`` seconds."""
    async with aclosing(results):
        while True:
            try:
                async with asyncio.timeout(timeout):
                    scored = await anext(results)
            except StopAsyncIteration:
                return
            except TimeoutError:
                problem = f"no score came for {timeout:g} seconds"
                remedy = "Run again; it goes on where it stopped"
                raise RetryableError(problem, where=where, remedy=remedy) from None
            yield scored


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """``asyncio.to_thread`` that, when cancelled, waits for the function's end, so that what it opened gets closed."""
    inner = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(inner)
    except asyncio.CancelledError:
        await asyncio.wait({inner})
        raise


class WindowScorer:
    """Rewards of (query, key) texts for a stage that asks for them a window at a time; see `window_scorer`."""

    def __init__(self, load: Callable[[], Scorer], journal: Journal, runner: asyncio.Runner) -> None:
        self._load, self._journal, self._runner = load, journal, runner
        self._scorer: Scorer | None = None
        self.scored = self.from_journal = 0

    def __call__(self, texts: Iterable[tuple[str, str]]) -> np.ndarray:
        """float32[n] rewards, in order; equal pairs are scored once."""
        asked = UniquePairs.of(texts)
        pairs = NumberedPairs(asked.queries, asked.keys, asked.pairs, distinct=True)
        rewards = np.empty(len(pairs), np.float32)
        entries = PairEntries(self._journal, key_names(pairs))
        known = self._runner.run(score_journaled(self._loaded, pairs, entries, rewards.__setitem__))
        self.from_journal += known
        self.scored += len(pairs) - known
        return rewards[asked.inverse]

    def _loaded(self) -> Scorer:
        if self._scorer is None:
            self._scorer = self._load()
        return self._scorer

    def close(self) -> None:
        """Free the model."""
        if self._scorer is not None:
            self._runner.run(self._scorer.close())


@contextmanager
def window_scorer(load: Callable[[], Scorer], journal: Journal) -> Iterator[WindowScorer]:
    """A scorer whose rewards are journaled; the model is loaded when the first one is missing."""
    with asyncio.Runner() as runner:
        scorer = WindowScorer(load, journal, runner)
        try:
            yield scorer
        finally:
            scorer.close()


def count_scores(run: Run, scorer: Scorer, **more: int) -> None:
    """Put what was scored, ``more`` counts, the rate and the model's contract into the run."""
    stats = scorer.stats
    run.counts |= {"scored": stats.scored, **more, "tokens": stats.tokens, "truncated": stats.truncated}
    if stats.seconds > 0:
        run.counts["pairs_per_second"] = round(stats.scored / stats.seconds, 1)
    run.note(model_seconds=round(stats.seconds, 3))
    if (contract := scorer.contract) is not None:
        facts = contract.model_dump(mode="json", include={"architecture", "template_hash", "order", "max_length"})
        run.note(contract=facts | {"template": contract.template.name})
