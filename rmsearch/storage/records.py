"""Records by suffix: ``.json`` (an array), ``.jsonl``, ``.csv``, ``.parquet``, each also ``.gz``; streamed both ways.

What a value becomes: JSON and JSON lines keep JSON's types. CSV has no types: numbers, booleans and nested values are
written as JSON text, None as an empty cell, and every cell is read back as a string. Parquet keeps typed columns; a
field that a record lacks is read back as None. NaN and infinities are refused in every format, on writing and on
reading: a missing value is null, and a reward that is not a number is a fault to be seen. Row numbers in errors are
lines from 1 (jsonl, csv) or positions from 0 (json, parquet).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

from pydantic import BaseModel, ValidationError

from rmsearch.errors import ConfigError, RecordError
from rmsearch.storage import uri as uris
from rmsearch.storage.formats import NUMBERED_READERS, WRITERS, malformed, not_json, plain

SUFFIXES = ("json", "jsonl", "csv", "parquet")
M = TypeVar("M", bound=BaseModel)


def suffix_of(uri: str) -> str:
    """The record format that the name says: ``json``, ``jsonl``, ``csv`` or ``parquet``, with ``.gz`` when compressed
    (``"a/b.jsonl.gz"`` gives ``"jsonl.gz"``). Raises ConfigError for another suffix."""
    name = uri.rstrip("/").rpartition("/")[2].lower()
    stem = name.removesuffix(".gz")
    for suffix in SUFFIXES:
        if stem.endswith(f".{suffix}"):
            return suffix + (".gz" if stem != name else "")
    known = ", ".join(f".{suffix}" for suffix in SUFFIXES)
    raise ConfigError("unknown suffix for records", where=uri, remedy=f"Use one of {known}, each also with .gz.")


def read_records(uri: str) -> Iterator[dict[str, Any]]:
    """The records of a file, one at a time, in bounded memory.

    Raises ConfigError (suffix), InputMissingError, and RecordError with ``file:row`` for what does not parse.
    """
    return (record for _, record in numbered_records(uri))


def numbered_records(uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of a file, one at a time; errors name the record by that number. Raises as `read_records`."""
    read = NUMBERED_READERS[suffix_of(uri).removesuffix(".gz")]
    with _input(uri) as stream, _broken_gzip(uri):
        yield from read(stream, uri)


def read_models(uri: str, model: type[M]) -> Iterator[M]:
    """The records as instances of a pydantic model. Raises as `read_records`, and RecordError
    ``file:row: field: problem`` for a record that does not fit."""
    return (each for _, each in numbered_models(uri, lambda _: model))


def numbered_models(uri: str, form: Callable[[dict[str, Any]], type[M]]) -> Iterator[tuple[int, M]]:
    """(number, record) as `read_models`, where ``form`` says which model a record is of."""

    from_csv = suffix_of(uri).startswith("csv")
    for row, record in numbered_records(uri):
        model = form(record)
        try:
            yield row, model.model_validate(record)
        except ValidationError as error:
            if from_csv:
                try:
                    yield row, model.model_validate(_csv_values(record, error))
                    continue
                except ValidationError as second:
                    error = second
            _refuse(f"{uri}:{row}", error)


def _csv_values(record: dict[str, Any], error: Any) -> dict[str, Any]:
    """CSV has no null and no lists: an empty cell may mean None, and a nested value is JSON text."""
    changed = dict(record)
    for name in {problem["loc"][0] for problem in error.errors() if problem["loc"]}:
        value = changed.get(name)
        if value == "":
            changed[name] = None
        elif isinstance(value, str) and value[:1] in ("[", "{"):
            try:
                changed[name] = json.loads(value)
            except ValueError:
                pass
    return changed


def _refuse(where: str, error: Any) -> NoReturn:
    first, more = error.errors()[0], error.error_count() - 1
    field = ".".join(str(part) for part in first["loc"]) or "record"
    others = f" (and {more} more)" if more else ""
    raise RecordError(f"{field}: {first['msg']}{others}", where=where, remedy="Correct that record.") from error


def write_records(uri: str, rows: Iterable[Any]) -> int:
    """Write records (dicts or pydantic models), streamed; the file appears whole or not at all. Returns their number.

    The same records give the same bytes, compressed or not. Raises ConfigError (suffix) and RecordError ``file:row``
    for a record that the format cannot hold.
    """
    kind = suffix_of(uri).removesuffix(".gz")
    with _output(uri) as stream:
        return WRITERS[kind](stream, _dicts(uri, rows), uri)


def read_json(uri: str) -> Any:
    """A whole JSON document (``.json`` or ``.json.gz``).

    Raises ConfigError, InputMissingError and RecordError ``file:line``.
    """
    _json_only(uri)
    with _input(uri) as stream, _broken_gzip(uri):
        data = stream.read()
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=not_json)
    except json.JSONDecodeError as error:
        remedy = "Correct the file, or name it .jsonl if it holds one object per line."
        raise RecordError(f"not JSON: {error.msg}", where=f"{uri}:{error.lineno}", remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise malformed(uri, None, error) from error


def write_json(uri: str, value: Any, *, indent: int | None = None) -> None:
    """Write a whole JSON document; it appears whole or not at all. Raises ConfigError (suffix), RecordError (NaN, or a
    value that JSON cannot hold)."""
    _json_only(uri)
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, indent=indent, default=plain)
    with _output(uri) as stream:
        try:
            for piece in encoder.iterencode(value):
                stream.write(piece.encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise malformed(uri, None, error) from error
        stream.write(b"\n")


def _json_only(uri: str) -> None:
    if not suffix_of(uri).startswith("json") or suffix_of(uri).startswith("jsonl"):
        raise ConfigError("a JSON document is needed here", where=uri, remedy="Name a .json or .json.gz file.")


def _dicts(uri: str, rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(rows):
        record = row if isinstance(row, dict) else row.model_dump(mode="json") if hasattr(row, "model_dump") else None
        if record is None or not all(isinstance(name, str) for name in record):
            remedy = "Give dicts with string keys, or pydantic models."
            raise RecordError(f"a {type(row).__name__} is not a record", where=f"{uri}:{index}", remedy=remedy)
        yield record


@contextmanager
def _input(uri: str) -> Iterator[BinaryIO]:
    with uris.reader(uri) as stream:
        if not suffix_of(uri).endswith(".gz"):
            yield stream
            return
        with gzip.GzipFile(fileobj=stream, mode="rb") as unpacked:
            yield cast(BinaryIO, unpacked)


@contextmanager
def _output(uri: str) -> Iterator[BinaryIO]:
    with uris.writer(uri) as stream:
        if not suffix_of(uri).endswith(".gz"):
            yield stream
            return
        # No name and no time in the header: the same records give the same bytes.
        with gzip.GzipFile(filename="", fileobj=stream, mode="wb", compresslevel=6, mtime=0) as packed:
            yield cast(BinaryIO, packed)


@contextmanager
def _broken_gzip(uri: str) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        remedy = "Compress it again with gzip, or drop .gz from its name if it is not compressed."
        raise RecordError(f"not a whole gzip file: {error}", where=uri, remedy=remedy) from error
