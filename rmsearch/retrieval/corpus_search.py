"""What retrieval over a corpus shares: the queries, the keys on disk, known answers, and the records that come out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from pydantic import model_validator

from rmsearch.datasets.corpus import CorpusIndex, indexed, numbered_records, read_corpus
from rmsearch.errors import ConfigError, RecordError
from rmsearch.flags import EngineFlags
from rmsearch.retrieval.runs import short
from rmsearch.stage import option, source
from rmsearch.storage.records import read_json

QUERY_IDS = ("query_id", "query-id", "_id", "id")


class RetrievalFlags(EngineFlags):
    """Which queries search which keys. A file's suffix tells its format, whichever flag names it."""

    queries_json: str | None = source(None, "Queries: records with query, and query_id, df_id, query-type if known.")
    queries_csv: str | None = source(None, "The same as a table, in place of --queries-json.")
    query_column: str = option("query", "Column or field of the query.")
    keys_json: str | None = source(None, "Keys: records with a text and an id (index, _id, id, df_id or corpus-id).")
    key_json_field: str = option("text", "Field of the text in --keys-json.")
    keys_csv: str | None = source(None, "Keys as a table or a folder of texts, in place of --keys-json.")
    key_column: str = option("text", "Column of the text in --keys-csv.")
    key_id_column: str | None = option(None, "Column of the key's id; by default the first of those that is there.")
    correct_ids_json: str | None = source(
        None, "Keys known to serve: an object {query id: key id}, or an array in the order of the queries."
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> RetrievalFlags:
        for json, csv in (("queries_json", "queries_csv"), ("keys_json", "keys_csv")):
            if getattr(self, json) and getattr(self, csv):
                raise ValueError(f"--{json.replace('_', '-')} and --{csv.replace('_', '-')} are both given: name one")
        return self

    @property
    def queries(self) -> str | None:
        """The file of the queries."""
        return self.queries_json or self.queries_csv

    @property
    def keys(self) -> str | None:
        """The file or folder of the keys."""
        return self.keys_json or self.keys_csv


class RetrievalQuery(NamedTuple):
    """A query and what is known of it."""

    query: str
    query_id: str
    df_id: str | None = None
    query_type: str | None = None
    correct_id: str | None = None


def read_questions(config: RetrievalFlags) -> list[RetrievalQuery]:
    """The queries in the file's order, each id once (a table may repeat a query with each of its keys).

    Raises ConfigError when none are named, RecordError ``file:row`` for a missing or empty query or an id that comes
    with two texts.
    """
    uri = config.queries
    if uri is None:
        raise ConfigError("no queries are given", remedy="Name a file with --queries-json or --queries-csv")
    by_id: dict[str, RetrievalQuery] = {}
    for position, (row, values) in enumerate(numbered_records(uri)):
        question = _question(values, config.query_column, str(position), f"{uri}:{row}")
        known = by_id.setdefault(question.query_id, question)
        if known.query != question.query:
            problem = f"the query id {question.query_id!r} comes twice, with different queries"
            raise RecordError(problem, where=f"{uri}:{row}", remedy="Make the ids unique")
    if not by_id:
        raise RecordError("holds no queries", where=uri)
    questions = list(by_id.values())
    return with_correct_ids(questions, config.correct_ids_json) if config.correct_ids_json else questions


def _question(values: dict[str, Any], column: str, position: str, where: str) -> RetrievalQuery:
    query = values.get(column)
    if not isinstance(query, str) or not query.strip():
        problem = "is missing" if column not in values else "is empty" if not query else "must be text"
        raise RecordError(f"{column}: {problem}", where=where, remedy=f"Fields there: {', '.join(values) or 'none'}")
    identity = next((name for name in QUERY_IDS if values.get(name) not in (None, "")), None)
    return RetrievalQuery(
        query,
        position if identity is None else _id(values[identity], identity, where),
        _optional(values, ("df_id",), where),
        _optional(values, ("query-type", "query_type"), where),
        _optional(values, ("correct_id",), where),
    )


def _optional(values: dict[str, Any], names: Sequence[str], where: str) -> str | None:
    name = next((name for name in names if values.get(name) not in (None, "")), None)
    return None if name is None else _id(values[name], name, where)


def _id(value: Any, name: str, where: str) -> str:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise RecordError(f"{name}: must be text or a whole number, not {type(value).__name__}", where=where)


def with_correct_ids(questions: list[RetrievalQuery], uri: str) -> list[RetrievalQuery]:
    """The queries with the keys that a file says serve them. Raises ConfigError when it does not fit the queries."""
    given = read_json(uri)
    if isinstance(given, list):
        if len(given) != len(questions):
            problem = f"holds {len(given)} ids for {len(questions)} queries"
            raise ConfigError(problem, where=uri, remedy="Give one for each, or an object {query id: key id}")
        given = {question.query_id: key for question, key in zip(questions, given, strict=True)}
    if not isinstance(given, dict):
        raise ConfigError("must be an object {query id: key id} or an array of key ids", where=uri)
    if unknown := given.keys() - {question.query_id for question in questions}:
        problem = f"names the query {min(unknown)!r}, which is not among the queries"
        raise ConfigError(problem, where=uri, remedy="Use the file that was made for these queries")
    return [
        question._replace(correct_id=_id(given[question.query_id], question.query_id, uri))
        if given.get(question.query_id) is not None
        else question
        for question in questions
    ]


@contextmanager
def open_keys(config: RetrievalFlags) -> Iterator[CorpusIndex]:
    """The keys, copied to a temporary file, so that memory does not grow with them. Raises as `read_corpus`."""
    if config.keys is None:
        raise ConfigError("no keys are given", remedy="Name a file with --keys-json or --keys-csv")
    column = config.key_json_field if config.keys_json else config.key_column
    with indexed(read_corpus(config.keys, column, config.key_id_column)) as keys:
        yield keys


def check_correct_ids(questions: Sequence[RetrievalQuery], keys: CorpusIndex, uri: str | None) -> None:
    """ConfigError when a key that is known to serve a query is not among the keys."""
    for question in questions:
        if question.correct_id is not None and keys.position(question.correct_id) is None:
            problem = f"the key {question.correct_id!r} of the query {question.query_id!r} is not among the keys"
            raise ConfigError(problem, where=uri, remedy="Use the keys that the ids were made from")


class KeyTexts(Sequence[str]):
    """The texts of the keys alone."""

    def __init__(self, keys: CorpusIndex) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [text for _, text in self._keys[at]]
        return self._keys[at][1]


def relevance_records(
    questions: Sequence[RetrievalQuery], keys: CorpusIndex, positions: np.ndarray, scores: np.ndarray, score: str
) -> Iterator[dict[str, Any]]:
    """Relevance records from positions int64[n, k] and scores float32[n, k], best first (-inf: an empty slot), under
    the name ``score``; the keys' texts are read as each record is made."""
    for row, question in enumerate(questions):
        best = []
        for position, value in zip(positions[row].tolist(), scores[row].tolist(), strict=True):
            if value != float("-inf"):
                key_id, key = keys[position]
                best.append({"key_id": key_id, "key": key, score: short(value)})
        known = {name: value for name, value in question._asdict().items() if value is not None}
        yield {**known, "keys": best}
