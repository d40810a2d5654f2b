"""Round trip: does the row that a query was made from come back among the first keys for that query?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rmsearch.errors import ConfigError, RecordError

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.datasets.corpus import CorpusIndex
    from rmsearch.engines import Embedder
    from rmsearch.retrieval.vectors import VectorCache
    from rmsearch.stage import Run

BLOCK = 256  # texts handed to the model at once


class Asked(NamedTuple):
    """A query, its id, and the id of the row that it was made from."""

    id: str
    query: str
    row: str


def by_records(uri: str, queries: Sequence[Asked], rank: int) -> list[bool]:
    """Per query whether its row is among the first ``rank`` keys of its relevance record. The records stream.

    Raises ConfigError for a query without a record, with another text there, or whose record has too few keys to tell;
    RecordError for a malformed record and for two of one query.
    """
    from rmsearch.datasets.chain import RelevanceRecord
    from rmsearch.storage.records import read_models

    places = {query.id: place for place, query in enumerate(queries)}
    found: list[bool | None] = [None] * len(queries)
    remedy = "Give the relevance file that was made from these queries"
    for record in read_models(uri, RelevanceRecord):
        place = places.get(record.query_id)
        if place is None:
            continue
        asked = queries[place]
        if record.query != asked.query:
            raise ConfigError(f"has another text for the query {asked.id!r}", where=uri, remedy=remedy)
        if found[place] is not None:
            raise RecordError(f"the query {asked.id!r} comes twice", where=uri, remedy="Keep one record per query")
        found[place] = asked.row in [key.key_id for key in record.keys[:rank]]
        if not found[place] and len(record.keys) < rank:
            problem = f"has {len(record.keys)} keys for the query {asked.id!r}, too few to tell its row's rank"
            raise ConfigError(problem, where=uri, remedy="Lower --round-trip-rank, or retrieve more keys")
    missing = [query.id for query, each in zip(queries, found, strict=True) if each is None]
    if missing:
        problem = f"has no record of the query {missing[0]!r} ({len(missing)} of {len(queries)} are not there)"
        raise ConfigError(problem, where=uri, remedy=remedy)
    return [bool(each) for each in found]


def by_embedding(
    run: Run, queries: Sequence[Asked], corpus: CorpusIndex, keys_uri: str, rank: int, engine: dict[str, Any]
) -> list[bool]:
    """Per query whether its row is among the first ``rank`` keys by cosine, exactly; equal ones in the corpus's order.

    ``engine``: arguments of `load_embedder`. Holds the queries' vectors; the corpus's texts stay on disk. Vectors are
    kept beside the output until the end, so that a run that was stopped goes on. Raises ConfigError when a query's row
    is not in the corpus, and the engines' errors.
    """
    import numpy as np

    from rmsearch.datasets.corpus import unknown_ids

    rows = [corpus.position(query.row) for query in queries]
    if unknown := {query.row for query, row in zip(queries, rows, strict=True) if row is None}:
        raise unknown_ids(keys_uri, unknown, len({query.row for query in queries}))
    own = np.array(rows, np.int64)
    first = asyncio.run(_first_keys(run, [query.query for query in queries], corpus, rank, engine))
    return (first == own[:, None]).any(axis=1).tolist()


async def _first_keys(
    run: Run, queries: list[str], corpus: CorpusIndex, rank: int, engine: dict[str, Any]
) -> np.ndarray:
    """int64[n, rank]: positions of the first keys."""
    from rmsearch.engines import load_embedder
    from rmsearch.retrieval.vectors import VectorCache

    embedder = load_embedder(**engine)
    try:
        cache = VectorCache(f"{run.first_output}.vectors", run.fingerprint)
        with run.progress(len(queries) + len(corpus), "texts") as bar:
            found = await _search(embedder, cache, queries, _Texts(corpus), min(rank, len(corpus)), bar)
    finally:
        await embedder.close()
    cache.discard()
    run.counts |= {"embedded": embedder.stats.scored, "cached": cache.found, "tokens": embedder.stats.tokens}
    return found


async def _search(
    embedder: Embedder, cache: VectorCache, queries: list[str], keys: Sequence[str], rank: int, bar: Any
) -> np.ndarray:
    import numpy as np

    from rmsearch.retrieval.vectors import ExactSearch, embedded

    parts = []
    async for _, vectors in embedded(embedder, queries, "query", BLOCK, cache):
        parts.append(vectors)
        bar.advance(len(vectors))
    search = ExactSearch(np.concatenate(parts), rank, [-1] * len(queries), "auto")
    async for first, vectors in embedded(embedder, keys, "key", BLOCK, cache):
        await asyncio.to_thread(search.add, first, vectors)
        bar.advance(len(vectors))
    return search.result()[0]


class _Texts(Sequence[str]):
    """The texts of a corpus, without its ids."""

    def __init__(self, corpus: CorpusIndex) -> None:
        self._corpus = corpus

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, at: Any) -> Any:
        found = self._corpus[at]
        return [text for _, text in found] if isinstance(at, slice) else found[1]
