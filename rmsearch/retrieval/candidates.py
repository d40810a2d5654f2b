"""Candidates that are scored anew, checked against the queries and keys that their texts come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rmsearch.datasets.beir import Beir
from rmsearch.datasets.chain import RelevanceRecord
from rmsearch.datasets.corpus import CorpusIndex, Row, indexed
from rmsearch.datasets.records import Candidates
from rmsearch.engines.pairs import NumberedPairs
from rmsearch.errors import ConfigError, RecordError, RMSearchError
from rmsearch.retrieval.corpus_search import KeyTexts, Question
from rmsearch.retrieval.runs import read_candidates
from rmsearch.storage import uri as storage
from rmsearch.storage.records import read_json, read_models

RERUN = "Run embed again on this data set and split"
_AGAIN = "Run get_top_relevant_keys_embed again on these queries and keys"


@dataclass(frozen=True)
class FirstStage:
    """A first stage's candidates for the queries of a data set. Of all (query, candidate) pairs as one list those of
    query ``q`` begin at ``offsets[q]`` (int64[queries + 1]). skipped: queries of other splits; missing: of this split,
    without candidates."""

    beir: Beir
    candidates: list[Candidates]
    skipped: int
    missing: int

    @cached_property
    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *(len(each.key_ids) for each in self.candidates)], dtype=np.int64)

    @cached_property
    def pairs(self) -> NumberedPairs:
        """All pairs."""
        number: dict[str, int] = {}
        keys = [number.setdefault(key, len(number)) for each in self.candidates for key in each.key_ids]
        queries = np.repeat(np.arange(len(self.candidates)), np.diff(self.offsets))
        texts = [self.beir.queries[each.query_id] for each in self.candidates]
        return NumberedPairs(texts, BeirKeys(self.beir, list(number)), np.stack([queries, keys], axis=1))

    def scores_of(self, q: int, scores: np.ndarray) -> dict[str, float]:
        """Key id -> score of one query, from the scores of all pairs."""
        part = scores[int(self.offsets[q]) : int(self.offsets[q + 1])]
        return dict(zip(self.candidates[q].key_ids, part.tolist(), strict=True))


@dataclass(frozen=True)
class BeirKeys(Sequence[str]):
    """The texts of some keys, made as they are taken."""

    beir: Beir
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: Any) -> Any:
        return self.beir.key_text(self.ids[at])


def read_first_stage(uri: str, beir: Beir) -> FirstStage:
    """Read a first stage's output (or a run file) and check it against the data set.

    Queries of other splits are skipped and counted, queries of this split that it lacks are counted. Raises
    RecordError for ids that the data set does not have, ConfigError when the file was made from other data.
    """
    _check_record(uri, beir)
    kept, skipped = [], 0
    for number, each in enumerate(read_candidates(uri), 1):
        if each.query_id in beir.unjudged:
            skipped += 1
            continue
        where = f"{uri}:{number}"
        if each.query_id not in beir.queries:
            raise RecordError(f"the query id {each.query_id!r} is not in the data set", where=where, remedy=RERUN)
        if unknown := next((key for key in each.key_ids if key not in beir.corpus), None):
            raise RecordError(f"the key id {unknown!r} is not in the corpus", where=where, remedy=RERUN)
        kept.append(each)
    if not kept:
        problem = f"holds no candidates for the {len(beir.queries)} queries of the split {beir.split!r}"
        raise ConfigError(problem, where=uri, remedy=RERUN)
    return FirstStage(beir, kept, skipped, len(beir.queries) - len(kept))


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
    records, digest = [], storage.digest(uri) if places else ""
    for place in places:
        try:
            record = read_json(place)
        except RMSearchError:
            continue
        outputs = record.get("outputs", {}) if isinstance(record, dict) else {}
        if any(storage.name(name) == storage.name(uri) and digest == of for name, of in outputs.items()):
            records.append(record)
    return records


def _files_in(folder: str) -> list[str]:
    if not storage.is_s3(folder):
        return sorted(str(path) for path in Path(folder).iterdir() if path.is_file())
    return [file for file in storage.list_files(folder) if storage.parent(file) == folder]


@dataclass(frozen=True)
class KeyChoices:
    """Queries and the keys that are scored for them: those of ``chosen`` (int[n, 2]: query, key), else all."""

    questions: Sequence[Question]
    keys: CorpusIndex
    chosen: np.ndarray | None = None

    def pairs(self, key_first: bool) -> NumberedPairs:
        """The pairs; those of one key stand next to each other for a model that reads the key first."""
        texts = [question.query for question in self.questions]
        pairs = NumberedPairs(texts, KeyTexts(self.keys), self.chosen, key_first=key_first)
        if self.chosen is None or not key_first:
            return pairs
        return pairs.at(pairs.by_key(np.arange(len(pairs))))


@contextmanager
def recorded_candidates(
    uri: str, keys: CorpusIndex | None, questions: Sequence[Question] | None
) -> Iterator[KeyChoices]:
    """The candidates in a file of relevance records, whose own texts are used when no keys are given.

    Raises RecordError ``file:row`` for candidates of other keys or queries than those given, a key that comes twice,
    a query without candidates.
    """
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

    with indexed(rows()) as own:
        if not sum(counts):
            raise RecordError("holds no candidates", where=uri, remedy=_AGAIN)
        places = own.first_of_id() if keys is None else np.concatenate(chosen)
        pairs = np.stack([np.repeat(np.arange(len(counts)), counts), places], axis=1, dtype=np.int32, casting="unsafe")
        yield KeyChoices(asked, own if keys is None else keys, pairs)


def _question(record: RelevanceRecord, known: dict[str, Question] | None, where: str) -> Question:
    question = Question(record.query, record.query_id, record.df_id, record.query_type, record.correct_id)
    if known is not None:
        if record.query_id not in known:
            raise RecordError(f"the query id {record.query_id!r} is not among the queries", where=where, remedy=_AGAIN)
        if known[record.query_id].query != record.query:
            problem = f"was made from other queries: {record.query_id!r} has another text here"
            raise RecordError(problem, where=where, remedy=_AGAIN)
        question = known[record.query_id]
    return question


def _position(keys: CorpusIndex, identity: str, text: str, where: str) -> int:
    position = keys.position(identity)
    if position is None:
        raise RecordError(f"the key id {identity!r} is not among the keys", where=where, remedy=_AGAIN)
    if keys[position][1] != text:
        problem = f"was made from another corpus: the key {identity!r} has another text here"
        raise RecordError(problem, where=where, remedy=_AGAIN)
    return position
