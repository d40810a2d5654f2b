"""Round trip: does the row that a query was made from come back among the first keys for that query?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsearch.datasets.chain import RelevanceRecord
from rmsearch.datasets.corpus import CorpusIndex, unknown_ids
from rmsearch.errors import ConfigError, RecordError
from rmsearch.retrieval.corpus_search import KeyTexts
from rmsearch.retrieval.vectors import TextsToEmbed, nearest
from rmsearch.stage import Run
from rmsearch.storage import uri as storage
from rmsearch.storage.records import read_models

BLOCK = 256  # texts handed to the model at once


class GeneratedQuery(NamedTuple):
    """A query, its id, and the id of the row that it was made from."""

    id: str
    query: str
    row: str


def by_records(uri: str, queries: Sequence[GeneratedQuery], rank: int) -> list[bool]:
    """Per query whether its row is among the first ``rank`` keys of its relevance record. The records stream.

    Raises ConfigError for a query without a record, with another text there, or whose record has too few keys to tell;
    RecordError for a malformed record and for two of one query.
    """
    places = {query.id: place for place, query in enumerate(queries)}
    found: list[bool | None] = [None] * len(queries)
    remedy = "Give the relevance file that was made from these queries"
    for record in read_models(uri, RelevanceRecord):
        place = places.get(record.query_id)
        if place is None:
            continue
        query = queries[place]
        if record.query != query.query:
            raise ConfigError(f"has another text for the query {query.id!r}", where=uri, remedy=remedy)
        if found[place] is not None:
            raise RecordError(f"the query {query.id!r} comes twice", where=uri, remedy="Keep one record per query")
        found[place] = query.row in [key.key_id for key in record.keys[:rank]]
        if not found[place] and len(record.keys) < rank:
            problem = f"has {len(record.keys)} keys for the query {query.id!r}, too few to tell its row's rank"
            raise ConfigError(problem, where=uri, remedy="Lower --round-trip-rank, or retrieve more keys")
    missing = [query.id for query, each in zip(queries, found, strict=True) if each is None]
    if missing:
        problem = f"has no record of the query {missing[0]!r} ({len(missing)} of {len(queries)} are not there)"
        raise ConfigError(problem, where=uri, remedy=remedy)
    return [bool(each) for each in found]


def by_embedding(
    run: Run, queries: Sequence[GeneratedQuery], corpus: CorpusIndex, keys_uri: str, rank: int, model: dict[str, Any]
) -> list[bool]:
    """Per query whether its row is among the first ``rank`` keys by cosine, exactly; equal ones in the corpus's order.

    ``model``: arguments of `load_embedder`. Holds the queries' vectors; the corpus's texts stay on disk. Vectors are
    kept beside the output until the end, so that a run that was stopped goes on. Raises ConfigError when a query's row
    is not in the corpus, and the engines' errors.
    """
    rows = [corpus.position(query.row) for query in queries]
    if unknown := {query.row for query, row in zip(queries, rows, strict=True) if row is None}:
        raise unknown_ids(keys_uri, unknown, len({query.row for query in queries}))
    folder = f"{run.first_output}.vectors"
    texts = TextsToEmbed([query.query for query in queries], "query", BLOCK, folder)
    keys = TextsToEmbed(KeyTexts(corpus), "key", BLOCK, folder)
    first, _ = nearest(run, model, texts, keys, rank, device="auto", identity=run.fingerprint)
    storage.remove(folder)
    return (first == np.array(rows, np.int64)[:, None]).any(axis=1).tolist()
