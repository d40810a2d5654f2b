"""The candidates that a reranker gets, checked against the data set that it reads their texts from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rmsearch.datasets.beir import Beir
from rmsearch.datasets.records import Candidates
from rmsearch.errors import ConfigError, RecordError, RMSearchError
from rmsearch.retrieval.runs import read_candidates
from rmsearch.storage import uri as storage
from rmsearch.storage.records import read_json

if TYPE_CHECKING:
    import numpy as np

RERUN = "Run embed again on this data set and split"


@dataclass(frozen=True)
class Pairs:
    """All (query, candidate key) pairs as one numbered list: pair ``i`` is candidate ``i - offsets[q]`` of query ``q``,
    the last query whose offset is not above ``i``. ``offsets`` is int64[queries + 1]."""

    beir: Beir
    candidates: list[Candidates]
    offsets: np.ndarray
    skipped: int
    missing: int

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def texts(self, positions: np.ndarray) -> Iterator[tuple[str, str]]:
        """(query text, key text) of the pairs, made as they are taken."""
        import numpy as np

        owners = np.searchsorted(self.offsets, positions, side="right") - 1
        for pair, q in zip(positions.tolist(), owners.tolist(), strict=True):
            found = self.candidates[q]
            key = found.key_ids[pair - int(self.offsets[q])]
            yield self.beir.queries[found.query_id], self.beir.key_text(key)

    def by_key(self, positions: np.ndarray) -> np.ndarray:
        """The same pairs with those of one key next to each other, for models that read the key first."""
        import numpy as np

        number: dict[str, int] = {}
        ids = (number.setdefault(key, len(number)) for found in self.candidates for key in found.key_ids)
        numbers = np.fromiter(ids, dtype=np.int64, count=len(self))
        return positions[np.argsort(numbers[positions], kind="stable")]

    def scores_of(self, q: int, scores: np.ndarray) -> dict[str, float]:
        """Key id -> score of one query, from the scores of all pairs."""
        part = scores[int(self.offsets[q]) : int(self.offsets[q + 1])]
        return dict(zip(self.candidates[q].key_ids, part.tolist(), strict=True))


def load_pairs(uri: str, beir: Beir) -> Pairs:
    """Read a first stage's output (or a run file) and check it against the data set.

    Queries of other splits are skipped and counted, queries of this split that it lacks are counted. Raises
    RecordError for ids that the data set does not have, ConfigError when the file was made from other data.
    """
    import numpy as np

    _check_record(uri, beir)
    kept, skipped = [], 0
    for number, found in enumerate(read_candidates(uri), 1):
        if found.query_id in beir.unjudged:
            skipped += 1
            continue
        where = f"{uri}:{number}"
        if found.query_id not in beir.queries:
            raise RecordError(f"the query id {found.query_id!r} is not in the data set", where=where, remedy=RERUN)
        if unknown := next((key for key in found.key_ids if key not in beir.corpus), None):
            raise RecordError(f"the key id {unknown!r} is not in the corpus", where=where, remedy=RERUN)
        kept.append(found)
    if not kept:
        problem = f"holds no candidates for the {len(beir.queries)} queries of the split {beir.split!r}"
        raise ConfigError(problem, where=uri, remedy=RERUN)
    offsets = np.cumsum([0, *(len(found.key_ids) for found in kept)], dtype=np.int64)
    return Pairs(beir, kept, offsets, skipped, len(beir.queries) - len(kept))


def _check_record(uri: str, beir: Beir) -> None:
    """Compare the data set with the one in the run record beside the candidates, if there is one of that file."""
    for record in records_of(uri):
        made_from = record.get("notes", {}).get("dataset", {})
        digests = made_from.get("digests", {})
        for part in ("corpus", "queries"):
            if part in digests and digests[part] != beir.digests[part]:
                made = f"{made_from.get('name')!r}, split {made_from.get('split')!r}"
                problem = (
                    f"was made from other {part} ({made}) than --dataset-path holds ({beir.name!r}, {beir.split!r})"
                )
                raise ConfigError(problem, where=uri, remedy=RERUN)


def records_of(uri: str) -> list[dict[str, Any]]:
    """The run records of stages that wrote this file as it is now: its own, or one beside it that names it."""
    own = f"{uri}.run.json"
    places = [own] if storage.exists(own) else []
    if not places and storage.exists(uri):
        folder = storage.parent(uri)
        places = [each for each in _files_in(folder) if each.endswith(".run.json")]
    found, digest = [], storage.digest(uri) if places else ""
    for place in places:
        try:
            record = read_json(place)
        except RMSearchError:
            continue
        outputs = record.get("outputs", {}) if isinstance(record, dict) else {}
        if any(storage.name(name) == storage.name(uri) and digest == of for name, of in outputs.items()):
            found.append(record)
    return found


def _files_in(folder: str) -> list[str]:
    if not storage.is_s3(folder):
        from pathlib import Path

        return sorted(str(path) for path in Path(folder).iterdir() if path.is_file())
    return [file for file in storage.list_files(folder) if storage.parent(file) == folder]
