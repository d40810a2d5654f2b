"""The files of a data set wherever they lie: a folder, a zip archive or an S3 prefix, and the rows in them.

Rows keep their place: ``row.where`` is ``file:row`` with the row as a person counts it (the header is row 1).
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rmsearch.errors import InputMissingError, RecordError
from rmsearch.storage import uri as storage
from rmsearch.storage.formats import read_csv

PARQUET_ROWS = 2048


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One record of a file and its place."""

    where: str
    values: dict[str, Any]

    def error(self, problem: str, remedy: str | None = None) -> RecordError:
        return RecordError(problem, where=self.where, remedy=remedy)

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of the named fields that is there, as text (whole numbers too, as ids). Raises RecordError."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, str):
                return value
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            if value is not None:
                raise self.error(f"the field {name!r} must be text, not {type(value).__name__}")
        if default is None:
            raise self.error(f"the field {names[0]!r} is missing", f"Fields there: {', '.join(self.values) or 'none'}")
        return default


class Files:
    """Files below a place, by their relative names."""

    def __init__(self, place: str, names: list[str]) -> None:
        self.place, self.names = place, sorted(names)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A seekable binary stream, decompressed when the name ends in .gz. Raises InputMissingError, RecordError."""
        with self._open(name) as raw:
            if not name.endswith(".gz"):
                yield raw
                return
            with gzip.open(raw, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        path = storage.fetch(storage.join(self.place, name) if name else self.place)
        with storage.reader(str(path)) as stream:
            yield stream

    def shown(self, name: str) -> str:
        return storage.join(self.place, name) if name else self.place


class ZipFiles(Files):
    """Files in a zip archive, read without unpacking; a single top folder is looked through."""

    def __init__(self, place: str) -> None:
        self._path = storage.fetch(place)
        try:
            with zipfile.ZipFile(self._path) as archive:
                names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
        except zipfile.BadZipFile:
            raise RecordError("is not a zip archive", where=place, remedy="Download it again") from None
        tops = {n.partition("/")[0] for n in names if "/" in n}
        self._top = f"{tops.pop()}/" if len(tops) == 1 and all("/" in n for n in names) else ""
        super().__init__(place, [n.removeprefix(self._top) for n in names])

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._top + name) as stream:
                yield stream  # type: ignore[misc]
        except KeyError:
            raise InputMissingError("no such file", where=self.shown(name)) from None
        except (zipfile.BadZipFile, EOFError) as error:
            raise RecordError(f"is damaged ({error})", where=self.shown(name), remedy="Download it again") from None


def folder_files(place: str) -> Files:
    """The files of a local folder or an S3 prefix."""
    if storage.is_s3(place):
        root = place.rstrip("/")
        return Files(root, [file.removeprefix(f"{root}/") for file in storage.list_files(root)])
    folder = Path(place).expanduser() if place.startswith("~/") else Path(place)
    return Files(str(folder), [str(Path(file).relative_to(folder)) for file in storage.list_files(str(folder))])


def one_file(place: str) -> tuple[Files, str]:
    """A single file given by its own URI. Raises InputMissingError."""
    if not storage.exists(place):
        raise InputMissingError("no such file", where=place)
    return Files(storage.parent(place), [storage.name(place)]), storage.name(place)


def rows(files: Files, name: str) -> Iterator[SourceRow]:
    """The records of a file by its suffix: jsonl, json (one object a line or one array), parquet, tsv, csv; each also
    .gz. Raises RecordError at the row that does not parse."""
    plain = name.removesuffix(".gz")
    suffix = Path(plain).suffix.lower()
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".tsv": _tsv, ".csv": _csv}
    if suffix not in readers:
        raise RecordError("is of no known kind", where=files.shown(name), remedy=f"Known: {', '.join(sorted(readers))}")
    with files.open(name) as stream:
        try:
            yield from readers[suffix](stream, files.shown(name))
        except (EOFError, gzip.BadGzipFile) as error:
            raise RecordError(f"is damaged ({error})", where=files.shown(name)) from None


def lines(stream: BinaryIO, shown: str) -> Iterator[tuple[int, str]]:
    """Non-empty lines with their numbers from 1. Raises RecordError for what is not UTF-8."""
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise RecordError(f"is not UTF-8 ({error.reason})", where=f"{shown}:{number}") from None
        if line.strip():
            yield number, line


def _jsonl(stream: BinaryIO, shown: str) -> Iterator[SourceRow]:
    for number, line in lines(stream, shown):
        where = f"{shown}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordError(f"is not JSON ({error.msg} at column {error.colno})", where=where) from None
        except RecursionError:
            raise RecordError("is JSON nested too deeply", where=where) from None
        yield _object(value, where)


def _json(stream: BinaryIO, shown: str) -> Iterator[SourceRow]:
    head = stream.read(64).lstrip()
    stream.seek(0)
    if not head.startswith(b"["):
        yield from _jsonl(stream, shown)
        return
    try:
        values = json.load(stream)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"is not JSON ({error})", where=shown) from None
    for number, value in enumerate(values, 1):
        yield _object(value, f"{shown}:{number}")


def _object(value: Any, where: str) -> SourceRow:
    if not isinstance(value, dict):
        raise RecordError(f"must be a JSON object, not {type(value).__name__}", where=where)
    return SourceRow(where, value)


def _parquet(stream: BinaryIO, shown: str) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(stream).iter_batches(PARQUET_ROWS):
            for value in batch.to_pylist():
                number += 1
                yield SourceRow(f"{shown}:{number}", value)
    except pa.ArrowException as error:
        raise RecordError(f"is not a parquet file ({error})", where=shown) from None


def _tsv(stream: BinaryIO, shown: str) -> Iterator[SourceRow]:
    """Rows under a header line, fields split at tabs; quotes mean nothing (BEIR's form)."""
    header: list[str] = []
    for number, line in lines(stream, shown):
        where, fields = f"{shown}:{number}", line.split("\t")
        if not header:
            header = [name.strip() for name in fields]
        elif len(fields) != len(header):
            problem = f"has {len(fields)} fields, the header has {len(header)}: {', '.join(header)}"
            raise RecordError(problem, where=where)
        else:
            yield SourceRow(where, dict(zip(header, fields, strict=True)))


def _csv(stream: BinaryIO, shown: str) -> Iterator[SourceRow]:
    for number, values in read_csv(stream, shown):
        yield SourceRow(f"{shown}:{number}", values)
