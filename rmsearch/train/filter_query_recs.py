"""Choose among query records: by type, language, length, repetition, and whether their row comes back for them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from rmsearch.cli import main
from rmsearch.datasets.chain import IRRELEVANT, QUERY_TYPES, TYPE_NAMES, QueryRecord
from rmsearch.datasets.corpus import indexed, read_corpus
from rmsearch.datasets.duplicates import near_duplicates, words
from rmsearch.errors import ConfigError, RecordError
from rmsearch.flags import EngineFlags
from rmsearch.llm.languages import Languages
from rmsearch.retrieval.round_trip import GeneratedQuery, by_embedding, by_records
from rmsearch.stage import Run, StageConfig, model, option, source, stage, target
from rmsearch.storage.records import read_models, read_records, suffix_of, write_records

KEPT = 0
REASONS = ("type", "language", "short", "long", "near_duplicate", "round_trip")  # verdicts from 1


def _parts(value: Any) -> Any:
    """``["a,b", "c"]`` and ``"a,b,c"`` as ``["a", "b", "c"]``."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        return value
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


Parts = Annotated[list[str], BeforeValidator(_parts)]


class FilterFlags(StageConfig):
    """What to keep."""

    input: str = source(..., "Query records, as make_query_recs writes them.")
    output: str = target(..., "Those that are left (.json, .jsonl, .csv, .parquet, each also .gz).")
    filter: Parts = option(
        ["questions"], "Types to keep, comma-separated: titles, keywords, questions, irr_questions.", min_length=1
    )
    languages: Parts = option(
        [],
        "Languages to keep, as ISO 639 codes (en,ja,de). Queries of a word or two can often not be told and are kept, "
        "so are up to 6 Chinese characters for ja and zh; sentences are seldom mistaken.",
    )
    min_words: int | None = option(None, "Words at least; each Chinese character and each kana counts as one.", ge=1)
    max_words: int | None = option(None, "Words at most.", ge=1)
    min_characters: int | None = option(None, "Characters at least.", ge=1)
    max_characters: int | None = option(None, "Characters at most.", ge=1)
    near_duplicates: float | None = option(
        None,
        "Keep the first of queries that are at least this similar (0 to 1; 0.8 suits): the share of three-word "
        "sequences that two have in common, estimated by MinHash. irr_questions are compared among themselves.",
        gt=0,
        le=1,
    )
    round_trip_rank: int | None = option(
        None,
        "Keep queries for which the row that they were made from is among so many first keys. irr_questions are the "
        "other way round: they go when it is, for then the row is not irrelevant to them.",
        ge=1,
    )
    relevance_json: str | None = source(None, "Relevance records of these queries that give the ranks.")
    keys_csv: str | None = source(None, "Corpus to rank with --model-name where there are no relevance records.")
    key_column: str = option("text", "Its column of texts.")
    id_column: str | None = option(None, "Its column of ids, which df_id names; default as in make_query_recs.")


class FilterQueryRecsConfig(EngineFlags, FilterFlags):
    """Config of `rmsearch train filter_query_recs`."""

    model_name: str | None = model(  # type: ignore[assignment]
        None, "Embedding model of the round trip: folder, s3:// URI, packaged or hub name."
    )


class TypedQuery(QueryRecord):
    """A query record whose type is known."""

    query_type: str = Field(min_length=1, validation_alias=TYPE_NAMES)


NEXT = "rmsearch train get_top_relevant_keys_embed --queries-json {output} --keys-csv CORPUS --model-name MODEL"


@stage("train.filter_query_recs", next_step=NEXT)
def filter_query_recs(config: FilterQueryRecsConfig, run: Run) -> None:
    """Choose among query records: by type, language, length, near-duplicates and round trip.

    Only the type is filtered by default. The filters run in this order, and each reports how many it dropped. Records
    are written as they were read. The input is read once per filter that is asked for and never held: a record costs
    9 bytes, near-duplicates 256 more per query that is left by then, and the round trip holds the queries left by then
    and, with --model-name, a vector and --round-trip-rank positions for each; for millions of queries retrieve first
    and give --relevance-json.
    """
    _check(config)
    suffix_of(config.output)
    verdicts, types = _by_record(config)
    if config.near_duplicates is not None:
        _drop_near_duplicates(config, verdicts, config.near_duplicates)
    if config.round_trip_rank is not None and KEPT in verdicts:
        _drop_by_round_trip(config, run, verdicts, config.round_trip_rank)
    counts = Counter(verdicts)
    dropped = {f"dropped_{reason}": counts[code] for code, reason in enumerate(REASONS, 1) if counts[code]}
    if not counts[KEPT]:
        why = ", ".join(f"{count} by {name.removeprefix('dropped_')}" for name, count in dropped.items())
        problem = f"no query is left of {len(verdicts)} (dropped {why})"
        raise ConfigError(problem, where=config.input, remedy=f"Types there: {', '.join(sorted(types))}")
    kept = (record for record, verdict in zip(read_records(config.input), verdicts, strict=True) if verdict == KEPT)
    written = write_records(config.output, map(_respelt, kept))
    run.counts |= {"queries": len(verdicts), "kept": written} | dropped


def _check(config: FilterQueryRecsConfig) -> None:
    for unit in ("words", "characters"):
        least, most = getattr(config, f"min_{unit}"), getattr(config, f"max_{unit}")
        if least is not None and most is not None and most < least:
            raise ConfigError(f"is below --min-{unit}", where=f"--max-{unit}")
    given = [config.relevance_json is not None, config.keys_csv is not None or config.model_name is not None]
    if config.round_trip_rank is None:
        if any(given):
            raise ConfigError("is needed to use relevance records, keys or a model", where="--round-trip-rank")
    elif given == [True, True]:
        raise ConfigError("give one of them", where="--relevance-json and --keys-csv with --model-name")
    elif not (given[0] or (config.keys_csv and config.model_name)):
        raise ConfigError("needs --relevance-json, or --keys-csv and --model-name", where="--round-trip-rank")


def _by_record(config: FilterQueryRecsConfig) -> tuple[bytearray, set[str]]:
    """The verdicts of the filters that look at one record at a time, and the types that there are."""
    languages = Languages(config.languages) if config.languages else None
    verdicts, types, ids = bytearray(), set(), array("q")
    for record in read_models(config.input, TypedQuery):
        types.add(record.query_type)
        if record.query_id is not None:
            ids.append(hash(record.query_id))
        verdicts.append(_code(_fault(config, record, languages)))
    if not verdicts:
        raise RecordError("holds no query records", where=config.input, remedy="Run make_query_recs first")
    _refuse_doubles(config.input, ids)
    if unknown := [name for name in config.filter if name not in types and name not in QUERY_TYPES]:
        remedy = f"Types in {config.input}: {', '.join(sorted(types))}"
        raise ConfigError(f"there is no query type {unknown[0]!r}", where="--filter", remedy=remedy)
    return verdicts, types


def _code(reason: str | None) -> int:
    return KEPT if reason is None else REASONS.index(reason) + 1


def _fault(config: FilterQueryRecsConfig, record: TypedQuery, languages: Languages | None) -> str | None:
    if record.query_type not in config.filter:
        return "type"
    if languages is not None and not languages.may_be(record.query, config.languages):
        return "language"
    lengths = [(len(record.query), config.min_characters, config.max_characters)]
    if config.min_words is not None or config.max_words is not None:
        lengths.append((len(words(record.query)), config.min_words, config.max_words))
    for length, least, most in lengths:
        if least is not None and length < least:
            return "short"
        if most is not None and length > most:
            return "long"
    return None


def _refuse_doubles(uri: str, hashes: array[int]) -> None:
    """RecordError when a query_id comes twice."""
    values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    if not (counts > 1).any():
        return
    suspects, seen = set(values[counts > 1].tolist()), set()
    for position, record in enumerate(read_models(uri, TypedQuery)):
        if record.query_id is None or hash(record.query_id) not in suspects:
            continue
        if record.query_id in seen:
            problem = f"the query_id {record.query_id!r} comes twice, again in record {position}"
            raise RecordError(problem, where=uri, remedy="Make the ids unique, or leave them out")
        seen.add(record.query_id)


def _left(config: FilterQueryRecsConfig, verdicts: bytearray) -> Iterator[tuple[int, TypedQuery]]:
    """Positions and records that no filter has dropped so far."""
    for position, record in enumerate(read_models(config.input, TypedQuery)):
        if verdicts[position] == KEPT:
            yield position, record


def _drop_near_duplicates(config: FilterQueryRecsConfig, verdicts: bytearray, threshold: float) -> None:
    for irrelevant in (False, True):
        positions = array("q")

        def texts(irrelevant: bool = irrelevant, positions: array[int] = positions) -> Iterator[str]:
            for position, record in _left(config, verdicts):
                if (record.query_type == IRRELEVANT) == irrelevant:
                    positions.append(position)
                    yield record.query

        repeated = near_duplicates(texts(), threshold)
        _drop(
            verdicts, "near_duplicate", (p for p, first in zip(positions, repeated, strict=True) if first is not None)
        )


def _drop_by_round_trip(config: FilterQueryRecsConfig, run: Run, verdicts: bytearray, rank: int) -> None:
    positions, wanted = array("q"), bytearray()
    queries: list[GeneratedQuery] = []
    for position, record in _left(config, verdicts):
        positions.append(position)
        wanted.append(record.query_type != IRRELEVANT)
        queries.append(GeneratedQuery(record.query_id or str(position), record.query, record.df_id))
    if config.relevance_json is not None:
        found = by_records(config.relevance_json, queries, rank)
    else:
        assert config.keys_csv is not None, "_check asks for it"
        engine = {"model_name": config.model_name, **config.engine_arguments()}
        with indexed(read_corpus(config.keys_csv, config.key_column, config.id_column)) as corpus:
            found = by_embedding(run, queries, corpus, config.keys_csv, rank, engine)
    wrong = (p for p, want, have in zip(positions, wanted, found, strict=True) if bool(want) != have)
    _drop(verdicts, "round_trip", wrong)


def _drop(verdicts: bytearray, reason: str, positions: Iterable[int]) -> None:
    for position in positions:
        verdicts[position] = _code(reason)


def _respelt(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it was read, but for the spelling of its type."""
    return {"query-type" if name == "query_type" else name: value for name, value in record.items()}


if __name__ == "__main__":
    main(filter_query_recs)
