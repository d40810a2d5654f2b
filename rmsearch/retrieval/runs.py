"""Run files: for each query the keys it got and their scores, as JSON or in TREC's six columns.

A run in memory is ``{query_id: {key_id: score}}``, keys best first. Equal scores are ordered by key id, so that a run
does not depend on the order in which scores arrived. (trec_eval itself breaks ties its own way when it reads a run.)
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, cast

from rmsearch.datasets.records import Candidates, Reranked
from rmsearch.datasets.sources import lines
from rmsearch.errors import ConfigError, RecordError
from rmsearch.storage import uri as storage
from rmsearch.storage.records import read_json, read_models, read_records, suffix_of, write_json

TREC_SUFFIX = re.compile(r"\.(trec|run|txt)(\.gz)?$", re.IGNORECASE)


def ordered(scores: Mapping[str, float]) -> dict[str, float]:
    """Best first, ties by key id."""
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def short(score: float) -> float:
    """The shortest number that is the same float32 (nine digits are enough), so files are small and exact."""
    return float(f"{score:.9g}")


def write_run(uri: str, run: Iterable[tuple[str, Mapping[str, float]]], tag: str) -> int:
    """Write (query id, scores) pairs, best first; by suffix .json[.gz], or .trec, .run, .txt[.gz] for six columns.

    Returns the number of queries. Raises ConfigError for another suffix, or an id with blanks in a TREC file.
    """
    if not TREC_SUFFIX.search(uri):
        whole = {query: ordered(scores) for query, scores in run}
        write_json(uri, whole)
        return len(whole)
    count, tag = 0, re.sub(r"\s+", "_", tag) or "run"
    with storage.writer(uri) as raw:
        packed = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if uri.endswith(".gz") else None
        out = cast(BinaryIO, packed or raw)
        for query, scores in run:
            count += 1
            for rank, (key, score) in enumerate(ordered(scores).items(), 1):
                if len(f"{query} {key}".split()) != 2:
                    problem = f"the ids {query!r} and {key!r} hold blanks, which six columns cannot hold"
                    raise ConfigError(problem, where=uri, remedy="Name a .json file")
                out.write(f"{query} Q0 {key} {rank} {score!r} {tag}\n".encode())
        if packed is not None:
            packed.close()
    return count


def read_run(uri: str) -> dict[str, dict[str, float]]:
    """Read a run: JSON ``{query: {key: score}}``, TREC's six columns, or the records that embed, bm25 and rerank write
    with ``--output`` (rerank's scores where there are any).

    Raises InputMissingError, and RecordError at ``file:row`` for what is malformed or scored twice.
    """
    if TREC_SUFFIX.search(uri):
        return _read_trec(uri)
    if holds_records(uri):
        return {query: ordered(scores) for query, scores in _record_scores(uri)}
    run = read_json(uri)
    for query, scores in run.items():
        if not isinstance(scores, dict):
            raise RecordError(f"query {query!r} must map to {{key id: score}}", where=uri)
        for key, score in scores.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise RecordError(f"query {query!r}, key {key!r}: the score {score!r} is no finite number", where=uri)
    return {query: ordered(scores) for query, scores in run.items()}


def read_candidates(uri: str) -> Iterator[Candidates]:
    """What a first stage found, from its ``--output`` records or from any run file; best first, ties by key id."""
    if TREC_SUFFIX.search(uri) or not holds_records(uri):
        for query, scores in read_run(uri).items():
            yield Candidates(query_id=query, key_ids=list(scores), embed_relevances=list(scores.values()))
        return
    seen: set[str] = set()
    for number, record in enumerate(read_models(uri, Candidates), 1):
        if record.query_id in seen:
            raise RecordError(f"the query id {record.query_id!r} comes twice", where=f"{uri}:{number}")
        seen.add(record.query_id)
        scores = ordered(dict(zip(record.key_ids, record.embed_relevances, strict=True)))
        yield record.model_copy(update={"key_ids": list(scores), "embed_relevances": list(scores.values())})


def holds_records(uri: str) -> bool:
    """Whether the file holds records (jsonl, csv, parquet, a JSON array) rather than one JSON object."""
    suffix = suffix_of(uri)
    if suffix.removesuffix(".gz") != "json":
        return True
    with storage.reader(uri) as raw:
        stream = gzip.GzipFile(fileobj=raw) if suffix.endswith(".gz") else raw
        try:
            head = stream.read(256)
        except (OSError, EOFError) as error:
            raise RecordError(f"is not a gzip file ({error})", where=uri) from None
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _record_scores(uri: str) -> Iterator[tuple[str, dict[str, float]]]:
    if "rerank_relevances" in next(read_records(uri), {}):
        for reranked in read_models(uri, Reranked):
            yield reranked.query_id, dict(zip(reranked.key_ids, reranked.rerank_relevances, strict=True))
        return
    for record in read_models(uri, Candidates):
        yield record.query_id, dict(zip(record.key_ids, record.embed_relevances, strict=True))


def _read_trec(uri: str) -> dict[str, dict[str, float]]:
    run: dict[str, dict[str, float]] = {}
    with storage.reader(uri) as raw:
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if uri.lower().endswith(".gz") else raw
        for number, line in lines(stream, uri):
            where, fields = f"{uri}:{number}", line.split()
            if len(fields) != 6:
                problem = f"has {len(fields)} columns, not 6 (query Q0 key rank score tag)"
                raise RecordError(problem, where=where)
            query, _, key, _, score, _ = fields
            try:
                value = float(score)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise RecordError(f"the score {score!r} is no finite number", where=where)
            if key in run.setdefault(query, {}):
                raise RecordError(f"query {query!r} has the key {key!r} twice", where=where)
            run[query][key] = value
    return {query: ordered(scores) for query, scores in run.items()}
