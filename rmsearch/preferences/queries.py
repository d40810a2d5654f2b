"""The queries that are to be sampled for: what retrieval found for each, and the keys that are known to serve it.

Joined from relevance records (or a first stage's candidates), query records and labels. Of the query records only a
digest per query stays in memory; relevance records are streamed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from rmsearch.datasets.chain import IRRELEVANT, QueryRecord, RelevanceRecord
from rmsearch.datasets.records import Candidates
from rmsearch.errors import ConfigError
from rmsearch.storage.records import read_models, read_records

if TYPE_CHECKING:
    from rmsearch.datasets.beir import Beir
    from rmsearch.preferences.sampling import SampleFlags

Grades = Mapping[str, Mapping[str, int]]


class Found(NamedTuple):
    """A retrieved key. ``text`` is None where the file holds ids only."""

    id: str
    score: float | None
    text: str | None


@dataclass(frozen=True)
class Wanted:
    """A query. ``anchors``: the keys that sets are made for, best first; ``positives``: all that are known to serve it
    (an irrelevant question has its row as anchor and no positive); ``found``: what retrieval gave, best first."""

    query: str
    query_id: str
    query_type: str | None
    anchors: tuple[str, ...]
    positives: frozenset[str]
    found: tuple[Found, ...] = ()


class _Asked(NamedTuple):
    """What a query record says beside its text."""

    query_id: str
    df_id: str
    query_type: str | None


class _Known:
    """What the query records say, by the query's text."""

    def __init__(self) -> None:
        self._rows: dict[bytes, list[_Asked]] = defaultdict(list)

    def add(self, query: str, asked: _Asked) -> None:
        self._rows[_digest(query)].append(asked)

    def about(self, query: str) -> list[_Asked]:
        return self._rows.get(_digest(query), [])

    def positives(self, query: str) -> frozenset[str]:
        """The rows that the query was made from, except of irrelevant questions."""
        return frozenset(asked.df_id for asked in self.about(query) if asked.query_type != IRRELEVANT)

    def __len__(self) -> int:
        return len(self._rows)


def _digest(query: str) -> bytes:
    return blake2b(query.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def wanted(config: SampleFlags, beir: Beir | None, grades: Grades | None, counts: Counter[str]) -> Iterator[Wanted]:
    """The queries, in the order of the relevance file, else of the query records, else of the data set.

    ``grades``: query id -> key id -> grade; where they are given, they say what serves a query, not ``df_id``. Queries
    that are left out are counted. Raises RecordError and ConfigError for files that do not belong together.
    """
    if config.relevance_json is None:
        source = _of_records(config) if config.filtered_queries_json or beir is None else _of_data_set(beir)
    else:
        source = _of_relevance(config, beir, counts)
    empty = True
    for each in source:
        labelled = each if grades is None else _labelled(each, grades)
        if labelled.anchors:
            empty = False
            yield labelled
        else:
            counts["queries_without_positive"] += 1
    if empty:
        where = config.relevance_json or config.filtered_queries_json or config.dataset_path
        problem = "has no query with a key that is known to serve it"
        remedy = "Give --filtered-queries-json with a df_id per query, or --qrels of these queries"
        raise ConfigError(problem, where=where, remedy=remedy)


def _labelled(each: Wanted, grades: Grades) -> Wanted:
    own = {key: grade for key, grade in grades.get(each.query_id, {}).items() if grade > 0}
    anchors = tuple(sorted(own, key=lambda key: (-own[key], key)))
    return Wanted(each.query, each.query_id, each.query_type, anchors, frozenset(own), each.found)


def _of_data_set(beir: Beir) -> Iterator[Wanted]:
    for query_id, query in beir.queries.items():
        yield Wanted(query, query_id, None, (), frozenset())


def _query_records(uri: str) -> Iterator[tuple[str, _Asked]]:
    for i, record in enumerate(read_models(uri, QueryRecord)):
        yield record.query, _Asked(record.query_id or str(i), record.df_id, record.query_type)


def _of_records(config: SampleFlags) -> Iterator[Wanted]:
    uri = config.filtered_queries_json
    if uri is None:
        remedy = "Give --relevance-json, --filtered-queries-json, or --dataset-path"
        raise ConfigError("there are no queries to sample for", remedy=remedy)
    known = _read_known(uri)
    for query, asked in _query_records(uri):
        yield Wanted(query, asked.query_id, asked.query_type, (asked.df_id,), known.positives(query))


def _read_known(uri: str) -> _Known:
    known = _Known()
    for query, asked in _query_records(uri):
        known.add(query, asked)
    return known


def _of_relevance(config: SampleFlags, beir: Beir | None, counts: Counter[str]) -> Iterator[Wanted]:
    """Relevance records with what the query records say about their queries."""
    uri, chosen = str(config.relevance_json), config.filtered_queries_json
    known = _read_known(chosen) if chosen else _from_relevance(uri, beir, chosen)
    matched = False
    for record in _relevance(uri, beir, chosen):
        about = known.about(record.query)
        if chosen and not about:
            counts["queries_filtered_out"] += 1
            continue
        matched = True
        asked = _pick(record, about)
        anchors = () if asked is None else (asked.df_id,)
        kind = record.query_type or (asked.query_type if asked else None)
        found = tuple(Found(key.key_id, key.score, key.key or None) for key in record.keys)
        yield Wanted(record.query, record.query_id, kind, anchors, known.positives(record.query), found)
    if chosen and not matched:
        remedy = "Give the relevance file that was made from these queries"
        raise ConfigError(f"none of its queries is in {chosen}", where=uri, remedy=remedy)


def _from_relevance(uri: str, beir: Beir | None, chosen: str | None) -> _Known:
    known = _Known()
    for record in _relevance(uri, beir, chosen):
        if (row := record.df_id or record.correct_id) is not None:
            known.add(record.query, _Asked(record.query_id, row, record.query_type))
    return known


def _pick(record: RelevanceRecord, about: list[_Asked]) -> _Asked | None:
    """The query record that a relevance record came of: that of its row, else of its id, else the first of its text."""
    row = record.df_id or record.correct_id
    if row is not None:
        same = [asked for asked in about if asked.df_id == row]
        return same[0] if same else _Asked(record.query_id, row, record.query_type)
    return next((asked for asked in about if asked.query_id == record.query_id), about[0] if about else None)


def _relevance(uri: str, beir: Beir | None, chosen: str | None) -> Iterator[RelevanceRecord]:
    """Relevance records; a first stage's candidates (ids only, ``embed --output``) take their queries' texts from the
    data set, else from the query records."""
    first = next(read_records(uri), None)
    if first is None:
        raise ConfigError("holds no records", where=uri, remedy="Make some with get_top_relevant_keys_embed")
    if "key_ids" not in first:
        for record in read_models(uri, RelevanceRecord):
            if beir is not None and beir.queries.get(record.query_id, record.query) != record.query:
                problem = f"the query {record.query_id!r} has another text than in {beir.name}"
                raise ConfigError(problem, where=uri, remedy="Give the relevance file of this data set")
            yield record
        return
    texts = beir.queries if beir else {a.query_id: q for q, a in _query_records(chosen)} if chosen else {}
    for each in read_models(uri, Candidates):
        if each.query_id not in texts:
            problem = f"the query id {each.query_id!r} is not known"
            raise ConfigError(problem, where=uri, remedy="Give the --dataset-path and --split that it was made from")
        scored = zip(each.key_ids, each.embed_relevances, strict=True)
        keys = [{"key_id": key, "key": "", "similarity": score} for key, score in scored]
        yield RelevanceRecord.model_validate({"query": texts[each.query_id], "query_id": each.query_id, "keys": keys})
