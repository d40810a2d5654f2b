"""The queries to sample for: what retrieval found for each, and the keys that are known to serve it.

Joined from relevance records (or a first stage's candidates), query records and labels. Of the query records only a
digest of the text, the ids and the type stay in memory; relevance records are streamed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

from pydantic import model_validator

from rmsearch.datasets.beir import Beir
from rmsearch.datasets.chain import IRRELEVANT, QueryRecord, RelevanceRecord, RetrievedKey
from rmsearch.datasets.records import Candidates
from rmsearch.errors import ConfigError
from rmsearch.flags import DatasetFlags
from rmsearch.preferences.negatives import Positives
from rmsearch.stage import option, source
from rmsearch.storage.records import read_models, read_records

Grades = Mapping[str, Mapping[str, int]]


class SampleFlags(DatasetFlags):
    """Flags of both sampling stages."""

    source_csv: str | None = source(
        None, "Corpus: .csv, .jsonl, .json, .parquet or a folder of text files; by default the data set's."
    )
    source_column: str = option("text", "Its column of texts.")
    id_column: str | None = option(None, "Its column of ids; by default index, _id, id …, else the row's position.")
    relevance_json: str | None = source(
        None, "What retrieval found: relevance records, or a first stage's --output. Without it negatives are random."
    )
    filtered_queries_json: str | None = source(None, "Query records; only these queries are taken.")
    split: str = option("train", "Split of the data set whose qrels name the positives.")
    random_seed: int = option(42, "Of all choices.", ge=0)
    rank_min: int = option(1, "First retrieved rank that negatives come from, counted from 1.", ge=1)
    rank_max: int | None = option(None, "Last one; by default all that were retrieved.", ge=1)
    random_share: float = option(0.0, "Share of negatives drawn at random from the whole corpus.", ge=0, le=1)
    max_relative_score: float = option(
        0.0,
        "Skip keys that retrieval scores above this share of the positive's score, as likely positives that nobody "
        "labelled (NV-Retriever: 0.95). For similarities above 0. 0: keep them.",
        ge=0,
    )
    min_score_margin: float | None = option(
        None, "Skip keys that score less than this below the positive. For rewards, which may be negative."
    )

    @model_validator(mode="after")
    def _complete(self) -> SampleFlags:
        if self.rank_max is not None and self.rank_max < self.rank_min:
            raise ValueError("--rank-max is below --rank-min")
        if not (self.source_csv or self.dataset_path or self.corpus):
            raise ValueError("--source-csv is needed (or --dataset-path)")
        if not (self.relevance_json or self.filtered_queries_json or self.dataset_path or self.queries):
            raise ValueError("there are no queries: give --relevance-json, --filtered-queries-json or --dataset-path")
        return self


@dataclass(frozen=True)
class LabelledQuery:
    """A query. ``own_keys``: the keys that sets are made for, best first; ``positives``: all that are known to serve it
    (an irrelevant question has its row as own key and no positive); ``retrieved``: what retrieval gave, best first."""

    query: str
    query_id: str
    query_type: str | None
    own_keys: tuple[str, ...]
    positives: Positives[str]
    retrieved: Sequence[RetrievedKey] = ()


class _Origin(NamedTuple):
    """The row that a query was made from."""

    query_id: str
    df_id: str
    query_type: str | None


class _Rows:
    """The rows that one query, by its text, was made from. Irrelevant questions have no positive."""

    def __init__(self, origins: Sequence[_Origin]) -> None:
        self.positives = Positives(each.df_id for each in origins if each.query_type != IRRELEVANT)
        self._first = next(iter(origins), None)
        self._of_row = {each.df_id: each for each in reversed(origins)}
        self._of_id = {each.query_id: each for each in reversed(origins)}

    def __bool__(self) -> bool:
        return self._first is not None

    def of(self, record: RelevanceRecord) -> _Origin | None:
        """What a relevance record came of: its row, else its id, else the first row of its text."""
        row = record.df_id or record.correct_id
        if row is not None:
            return self._of_row.get(row) or _Origin(record.query_id, row, record.query_type)
        return self._of_id.get(record.query_id, self._first)


class _Origins:
    """The rows of all queries, by a digest of the query's text."""

    def __init__(self, queries: Iterable[tuple[str, _Origin]]) -> None:
        self._origins: dict[bytes, list[_Origin]] = defaultdict(list)
        for query, origin in queries:
            self._origins[_digest(query)].append(origin)
        self._many: dict[bytes, _Rows] = {}

    def of(self, query: str) -> _Rows:
        """The rows of a query: the same object each time where there are several, to read their texts only once."""
        digest = _digest(query)
        if digest in self._many:
            return self._many[digest]
        rows = _Rows(origins := self._origins.get(digest, []))
        if len(origins) > 1:
            self._many[digest] = rows
        return rows


def _digest(query: str) -> bytes:
    return blake2b(query.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def labelled_queries(
    config: SampleFlags, beir: Beir | None, grades: Grades | None, counts: Counter[str]
) -> Iterator[LabelledQuery]:
    """The queries, in the order of the relevance file, else of the query records, else of the data set.

    ``grades``: query id -> key id -> grade; where they are given, they say what serves a query, not ``df_id``. Queries
    that are left out are counted. Raises RecordError and ConfigError for files that do not belong together.
    """
    if config.relevance_json is not None:
        queries = _of_relevance(config.relevance_json, config.filtered_queries_json, beir, counts)
    elif config.filtered_queries_json is not None:
        queries = _of_records(config.filtered_queries_json)
    elif beir is not None:
        queries = (LabelledQuery(query, query_id, None, (), Positives(())) for query_id, query in beir.queries.items())
    else:
        remedy = "Give --relevance-json, --filtered-queries-json, or --dataset-path"
        raise ConfigError("there are no queries to sample for", remedy=remedy)
    empty = True
    for each in queries:
        labelled = each if grades is None else _labelled(each, grades)
        if labelled.own_keys:
            empty = False
            yield labelled
        else:
            counts["queries_without_positive"] += 1
    if empty:
        where = config.relevance_json or config.filtered_queries_json or config.dataset_path
        problem = "has no query with a key that is known to serve it"
        remedy = "Give --filtered-queries-json with a df_id per query, or --qrels of these queries"
        raise ConfigError(problem, where=where, remedy=remedy)


def _labelled(each: LabelledQuery, grades: Grades) -> LabelledQuery:
    own = {key: grade for key, grade in grades.get(each.query_id, {}).items() if grade > 0}
    return replace(each, own_keys=tuple(sorted(own, key=lambda key: (-own[key], key))), positives=Positives(own))


def _query_records(uri: str) -> Iterator[tuple[str, _Origin]]:
    for i, record in enumerate(read_models(uri, QueryRecord)):
        yield record.query, _Origin(record.query_id or str(i), record.df_id, record.query_type)


def _of_records(uri: str) -> Iterator[LabelledQuery]:
    origins = _Origins(_query_records(uri))
    for query, (query_id, row, kind) in _query_records(uri):
        yield LabelledQuery(query, query_id, kind, (row,), origins.of(query).positives)


def _of_relevance(uri: str, chosen: str | None, beir: Beir | None, counts: Counter[str]) -> Iterator[LabelledQuery]:
    """Relevance records with what the query records (``chosen``), else they themselves, say about their queries."""
    origins = _Origins(_query_records(chosen) if chosen else _named_rows(uri, beir))
    matched = False
    for record in _relevance(uri, beir, chosen):
        rows = origins.of(record.query)
        if chosen and not rows:
            counts["queries_filtered_out"] += 1
            continue
        matched = True
        origin = rows.of(record)
        own_keys = () if origin is None else (origin.df_id,)
        kind = record.query_type or (origin.query_type if origin else None)
        yield LabelledQuery(record.query, record.query_id, kind, own_keys, rows.positives, record.keys)
    if chosen and not matched:
        remedy = "Give the relevance file that was made from these queries"
        raise ConfigError(f"none of its queries is in {chosen}", where=uri, remedy=remedy)


def _named_rows(uri: str, beir: Beir | None) -> Iterator[tuple[str, _Origin]]:
    for record in _relevance(uri, beir, None):
        if (row := record.df_id or record.correct_id) is not None:
            yield record.query, _Origin(record.query_id, row, record.query_type)


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
