"""(query, key) pairs scored by a reward model: all keys of each query or given candidates, best k kept, journaled."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rmsearch.datasets.chain import RelevanceRecord
from rmsearch.datasets.corpus import CorpusIndex, Row, indexed
from rmsearch.errors import RecordError
from rmsearch.retrieval.corpus_search import Question
from rmsearch.scoring.timed import scores_in_time
from rmsearch.scoring.topk import TopK
from rmsearch.storage.journal import Journal
from rmsearch.storage.records import read_models

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines import Scorer
    from rmsearch.progress import Progress

SLAB = 1 << 20  # pairs whose state is in memory at a time


@dataclass(frozen=True)
class Pairs:
    """Numbered pairs. ``offsets`` int64[queries + 1] and ``chosen`` int64[pairs]: pair ``i`` is the key at position
    ``chosen[i]`` for the last query whose offset is not above ``i``; without them every query has all keys.

    ``key_major``: number the pairs of one key next to each other, for models that read the key first.
    """

    questions: Sequence[Question]
    keys: CorpusIndex
    offsets: np.ndarray | None = None
    chosen: np.ndarray | None = None
    key_major: bool = False
    order: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.questions) * len(self.keys) if self.chosen is None else len(self.chosen)

    def by_key(self) -> Pairs:
        """The same pairs in key-major order."""
        import numpy as np

        order = None if self.chosen is None else np.argsort(self.chosen, kind="stable")
        return replace(self, key_major=True, order=order)

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query numbers, key positions), int64[n] each."""
        import numpy as np

        if self.chosen is None or self.offsets is None:
            first, second = np.divmod(numbers, len(self.questions) if self.key_major else len(self.keys))
            return (second, first) if self.key_major else (first, second)
        at = numbers if self.order is None else self.order[numbers]
        return np.searchsorted(self.offsets, at, side="right") - 1, self.chosen[at]

    def texts(self, numbers: np.ndarray) -> Iterator[tuple[str, str]]:
        """(query text, key text) of the pairs, made as they are taken."""
        for start in range(0, len(numbers), 1024):
            queries, keys = self.places(numbers[start : start + 1024])
            for query, key in zip(queries.tolist(), keys.tolist(), strict=True):
                yield self.questions[query].query, self.keys[key][1]


@contextmanager
def candidate_pairs(uri: str, keys: CorpusIndex | None, questions: Sequence[Question] | None) -> Iterator[Pairs]:
    """The pairs of a file of relevance records, whose own texts are used when no keys are given.

    Raises RecordError ``file:row`` for candidates of other keys or queries than those given, a key that comes twice,
    a query without candidates.
    """
    import numpy as np

    asked: list[Question] = []
    counts: list[int] = []
    chosen: list[np.ndarray] = []
    known = None if questions is None else {question.query_id: question for question in questions}

    def rows() -> Iterator[Row]:
        seen = set[str]()
        for number, record in enumerate(read_models(uri, RelevanceRecord), 1):
            where = f"{uri}:{number}"
            asked.append(_question(record, known, where))
            if asked[-1].query_id in seen:
                raise RecordError(f"the query id {record.query_id!r} comes twice", where=where)
            seen.add(record.query_id)
            ids = {key.key_id for key in record.keys}
            if len(ids) < len(record.keys):
                raise RecordError("a key id comes twice among the keys", where=where, remedy=_AGAIN)
            counts.append(len(record.keys))
            if keys is None:
                yield from (Row(key.key_id, key.key, {}) for key in record.keys)
            else:
                chosen.append(np.array([_position(keys, key.key_id, key.key, where) for key in record.keys], np.int64))

    with ExitStack() as stack:
        own = stack.enter_context(indexed(rows()))
        if not sum(counts):
            raise RecordError("holds no candidates", where=uri, remedy=_AGAIN)
        offsets = np.cumsum([0, *counts], dtype=np.int64)
        if keys is None:
            yield Pairs(asked, own, offsets, own.first_of_id())
        else:
            yield Pairs(asked, keys, offsets, np.concatenate(chosen))


_AGAIN = "Run get_top_relevant_keys_embed again on these queries and keys"


def _question(record: RelevanceRecord, known: dict[str, Question] | None, where: str) -> Question:
    found = Question(record.query, record.query_id, record.df_id, record.query_type, record.correct_id)
    if known is not None:
        if record.query_id not in known:
            raise RecordError(f"the query id {record.query_id!r} is not among the queries", where=where, remedy=_AGAIN)
        if known[record.query_id].query != record.query:
            problem = f"was made from other queries: {record.query_id!r} has another text here"
            raise RecordError(problem, where=where, remedy=_AGAIN)
        found = known[record.query_id]
    return found


def _position(keys: CorpusIndex, identity: str, text: str, where: str) -> int:
    position = keys.position(identity)
    if position is None:
        raise RecordError(f"the key id {identity!r} is not among the keys", where=where, remedy=_AGAIN)
    if keys[position][1] != text:
        problem = f"was made from another corpus: the key {identity!r} has another text here"
        raise RecordError(problem, where=where, remedy=_AGAIN)
    return position


async def score_pairs(
    scorer: Scorer, pairs: Pairs, k: int, journal: Journal, shown: Progress, *, save: int, timeout: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """(positions int64[n, k], rewards float32[n, k], pairs from the journal): each query's best keys.

    Scores are journaled every ``save`` pairs; memory holds a slab of `SLAB` pairs and the best k. Raises RetryableError
    when no score came for ``timeout`` seconds.
    """
    import numpy as np

    best, from_journal = TopK(len(pairs.questions), k), 0
    for start in range(0, len(pairs), SLAB):
        done, saved = np.zeros(min(SLAB, len(pairs) - start), bool), 0
        while (entry := journal.get(f"{start}:{saved}")) is not None:
            numbers = np.asarray(entry[0], np.int64)
            best.add(*pairs.places(numbers), np.asarray(entry[1], np.float32))
            done[numbers - start] = True
            saved += 1
        from_journal += int(done.sum())
        shown.advance(int(done.sum()))
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        async with aclosing(_stream(scorer, pairs, np.flatnonzero(~done) + start, timeout)) as results:
            async for numbers, rewards in results:
                best.add(*pairs.places(numbers), rewards)
                waiting.append((numbers, rewards))
                if sum(len(part) for part, _ in waiting) >= save:
                    _save(journal, f"{start}:{saved}", waiting)
                    saved += 1
                shown.advance(len(numbers))
        if waiting:
            _save(journal, f"{start}:{saved}", waiting)
    return (*best.snapshot(), from_journal)


def _save(journal: Journal, key: str, waiting: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Journal what waits, and empty it."""
    import numpy as np

    numbers, rewards = (np.concatenate(part) for part in zip(*waiting, strict=True))
    journal.put(key, [numbers.tolist(), rewards.tolist()])
    waiting.clear()


async def _stream(
    scorer: Scorer, pairs: Pairs, left: np.ndarray, timeout: float
) -> AsyncGenerator[tuple[np.ndarray, np.ndarray]]:
    """(pair numbers, rewards) of the pairs that are left, as they come."""
    if not len(left):
        return
    async with aclosing(scores_in_time(scorer, pairs.texts(left), timeout)) as results:
        async for positions, rewards in results:
            yield left[positions], rewards
