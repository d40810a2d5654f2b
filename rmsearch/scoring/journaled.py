"""Scores kept pair by pair while a search runs, so that a killed search pays for no pair twice."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.scoring.pairs import Work
    from rmsearch.storage.journal import Journal

FOLDER_NAME = "scores.journal"


def journal_uri(checkpoint: str) -> str:
    """Where the scores lie: ``checkpoint`` itself, or a file in it when it is a folder (exists, or ends with /)."""
    from rmsearch.storage import uri

    if checkpoint.endswith("/") or (not uri.is_s3(checkpoint) and uri.is_folder(checkpoint)):
        return uri.join(checkpoint, FOLDER_NAME)
    return checkpoint


class PairKeys:
    """The journal key of each pair of a piece of work: 32 hex digits over both texts (or the finished prompt)."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._queries = [_digest(text) for text in work.queries]
        self._keys = [_digest(text) for text in work.keys]

    def of(self, positions: np.ndarray) -> list[str]:
        """Keys of the positions, in order."""
        if self._work.prompt is not None:
            return [
                hashlib.blake2b(_bytes(text), digest_size=16).hexdigest() for _, text in self._work.texts(positions)
            ]
        query, key = self._work.locate(positions)
        pairs = zip(query.tolist(), key.tolist(), strict=True)
        return [hashlib.blake2b(self._queries[q] + self._keys[k], digest_size=16).hexdigest() for q, k in pairs]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(_bytes(text), digest_size=16).digest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def known_scores(journal: Journal, work: Work, keys: PairKeys) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits the work: (positions int64[n] with their kept rewards float32[n], positions int64[m] still to score)."""
    import numpy as np

    known: list[int] = []
    rewards: list[float] = []
    left: list[int] = []
    for part in work.chunks():
        for position, key in zip(part.tolist(), keys.of(part), strict=True):
            reward = journal.get(key)
            if reward is None:
                left.append(position)
            else:
                known.append(position)
                rewards.append(reward)
    return np.array(known, np.int64), np.array(rewards, np.float32), np.array(left, np.int64)


def keep(journal: Journal, keys: PairKeys, positions: np.ndarray, rewards: np.ndarray) -> None:
    """Write a batch of float32 rewards; JSON gives them back bit by bit."""
    journal.put_many(zip(keys.of(positions), rewards.tolist(), strict=True))


def fingerprint(facts: dict[str, Any]) -> str:
    """Stands for the model and its use; a checkpoint of another one is not reused."""
    from rmsearch.storage.journal import journal_key

    return journal_key("search", 1, facts)
