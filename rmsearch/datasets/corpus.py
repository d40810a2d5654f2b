"""Corpora: rows with a stable id and a text, from one file of records or a folder of text files.

`read_corpus` streams, `CorpusIndex` keeps a whole corpus on disk for access by
position and by id. Memory does not grow with the texts: a row costs 8 bytes while reading, 24 in an index.
"""

from __future__ import annotations

import os
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np

from rmsearch.errors import ConfigError, RecordError, RMSearchError
from rmsearch.stage import StageConfig, option, source
from rmsearch.storage import uri as storage
from rmsearch.storage.local import local_errors
from rmsearch.storage.records import SUFFIXES, numbered_records

T = TypeVar("T")
ID_COLUMNS = ("index", "", "_id", "id", "df_id", "corpus-id")  # "": the index that pandas writes without a name
TEXT_SUFFIXES = (".txt", ".md")
_TABLE_SUFFIXES = tuple(f".{suffix}" for suffix in SUFFIXES)
_RUN = 1 << 16
_HEAD = struct.Struct("<I")  # bytes of the id, which comes before the text


class CorpusFlags(StageConfig):
    """Which corpus a stage reads."""

    input_csv: str = source(
        ..., "Corpus: .csv, .jsonl, .json or .parquet (each also .gz), or a folder of .txt and .md files."
    )
    text_column: str = option("text", "Column of the text.")
    id_column: str | None = option(
        None, "Column of the id; default: index, _id, id, df_id or corpus-id, else the position."
    )

    def rows(self) -> Iterator[Row]:
        """The corpus. Raises as `read_corpus`."""
        return read_corpus(self.input_csv, self.text_column, self.id_column)


class Row(NamedTuple):
    """A row of a corpus: its stable id, its text and all its columns."""

    id: str
    text: str
    values: dict[str, Any]


class IdentifiedRow(NamedTuple):
    """A row before its text is looked at: its place (``file:row``), its id, its columns."""

    where: str
    id: str
    values: dict[str, Any]


def read_corpus(uri: str, text_column: str = "text", id_column: str | None = None) -> Iterator[Row]:
    """The rows of a corpus, streamed, in the file's order.

    ``uri``: .csv, .jsonl, .json or .parquet (each also .gz), a folder of such files, or a folder of .txt and .md files,
    whose ids are their relative paths. Ids are those of ``id_column``, else of the first of `ID_COLUMNS` that is there,
    else the position (``"0"``, ``"1"``, …). Raises InputMissingError, ConfigError, and RecordError ``file:row`` for a
    missing column, an empty text or id, and an id that comes twice; RecordError for an empty corpus.
    """
    for where, identity, values in read_identified(uri, id_column):
        yield Row(identity, text_of(values, text_column, where), values)


def read_identified(uri: str, id_column: str | None = None) -> Iterator[IdentifiedRow]:
    """As `read_corpus`, without asking for a text: each row's place, id and columns."""
    records = distinct(lambda: numbered(located_records(uri), id_column))
    remedy = "Give a file with rows, or a folder of text"
    return nonempty(records, RecordError("is empty: a corpus has rows", where=uri, remedy=remedy))


def nonempty(items: Iterable[T], error: RMSearchError) -> Iterator[T]:
    """The items as they come; raises the error when there is none."""
    empty = True
    for each in items:
        empty = False
        yield each
    if empty:
        raise error


def numbered(rows: Iterable[tuple[str, dict[str, Any]]], id_column: str | None = None) -> Iterator[IdentifiedRow]:
    """Give (place, columns) their ids: those of the id column that the first row shows, else the position."""
    column: str | None = None
    for count, (where, values) in enumerate(rows):
        if not count:
            column = id_column if id_column is not None else find_id_column(values)
        yield IdentifiedRow(where, str(count) if column is None else id_of(values, column, where), values)


def distinct(records: Callable[[], Iterator[IdentifiedRow]]) -> Iterator[IdentifiedRow]:
    """The records that ``records()`` gives, checked to have an id each of their own. Called a second time, to name the
    places, when hashes are equal. Raises RecordError."""
    ids = _Ids()
    for record in records():
        if suspects := ids.add(record.id):
            _refuse_doubles(records(), suspects)
        yield record
    if suspects := ids.fold():
        _refuse_doubles(records(), suspects)


def unknown_ids(uri: str, unknown: Iterable[str], asked: int) -> ConfigError:
    """The error for ids that a corpus does not have."""
    missing = sorted(unknown)
    problem = f"has no row with the id {missing[0]!r} ({len(missing)} of the {asked} ids asked for are not there)"
    return ConfigError(problem, where=uri, remedy="Use the corpus that the ids were made from, or name its id column")


@contextmanager
def indexed(rows: Iterable[Row]) -> Iterator[CorpusIndex]:
    """Write the rows into a temporary file and give access to them while the block runs."""
    with tempfile.TemporaryFile() as file:
        yield CorpusIndex(rows, cast(BinaryIO, file))


class CorpusIndex(Sequence[tuple[str, str]]):
    """A corpus in a file (see `indexed`): (id, text) by position, position and text by id.

    Holds 24 bytes per row in memory, whatever the length of the texts. Ids must be distinct, as `read_corpus` gives
    them.
    """

    def __init__(self, rows: Iterable[Row], file: BinaryIO) -> None:
        self._file = file
        ends, hashes = array("Q", [0]), array("q")
        with local_errors(tempfile.gettempdir()):  # it may be full
            for row in rows:
                identity, text = row.id.encode(errors="surrogatepass"), row.text.encode(errors="surrogatepass")
                file.write(_HEAD.pack(len(identity)) + identity + text)
                ends.append(ends[-1] + _HEAD.size + len(identity) + len(text))
                hashes.append(hash(row.id))
            file.flush()
        self._ends = np.frombuffer(ends, np.uint64)
        self._order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable")
        self._hashes = np.frombuffer(hashes, np.int64)[self._order]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, at: Any) -> Any:
        """(id, text) at a position; a list of them for a slice."""
        if isinstance(at, slice):
            return [self._row(position) for position in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self._row(at % len(self))

    def _row(self, position: int) -> tuple[str, str]:
        start, end = int(self._ends[position]), int(self._ends[position + 1])
        data = os.pread(self._file.fileno(), end - start, start)
        text = _HEAD.size + _HEAD.unpack_from(data)[0]
        identity = data[_HEAD.size : text]
        return identity.decode(errors="surrogatepass"), data[text:].decode(errors="surrogatepass")

    def first_of_id(self) -> np.ndarray:
        """For each row the position of the first row with its id, int64[n], where an id may come again with its text.
        Raises ConfigError for an id with two texts."""
        first = np.empty(len(self), np.int64)
        for at in range(len(self)):
            identity, text = self._row(at)
            position = self.position(identity)
            assert position is not None
            if position != at and self._row(position)[1] != text:
                problem = f"the key id {identity!r} comes with two different texts"
                raise ConfigError(problem, remedy="Make the ids unique: one id, one text")
            first[at] = position
        return first

    def position(self, identity: str) -> int | None:
        """Where the row with that id is; None when there is none."""
        return self._find(identity)[0]

    def text(self, identity: str) -> str | None:
        """The text of the row with that id; None when there is none."""
        return self._find(identity)[1]

    def _find(self, identity: str) -> tuple[int, str] | tuple[None, None]:
        value = np.int64(hash(identity))
        at = int(self._hashes.searchsorted(value))
        while at < len(self._hashes) and self._hashes[at] == value:
            position = int(self._order[at])
            found, text = self._row(position)
            if found == identity:
                return position, text
            at += 1
        return None, None


class _Ids:
    """The ids so far as sorted runs of 64-bit hashes, so that one costs 8 bytes. Runs are merged as in a merge sort."""

    def __init__(self) -> None:
        self._fresh: set[int] = set()
        self._runs: list[np.ndarray] = []

    def add(self, identity: str) -> set[int]:
        """Hashes that came twice: of equal ids or, rarely, of different ones."""
        value = hash(identity)
        if value in self._fresh:
            return {value}
        self._fresh.add(value)
        return self.fold() if len(self._fresh) >= _RUN else set()

    def fold(self) -> set[int]:
        """Compare the latest ids with all before them; returns as `add`."""
        run = np.fromiter(self._fresh, np.int64, len(self._fresh))
        run.sort()
        self._fresh.clear()
        doubles = [np.intersect1d(run, older, assume_unique=True) for older in self._runs]
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")
        self._runs.append(run)
        return {int(value) for found in doubles for value in found}


def _refuse_doubles(records: Iterator[IdentifiedRow], suspects: set[int]) -> None:
    """Raise for the first id that really comes twice among those with these hashes."""
    first: dict[str, str] = {}
    for where, identity, _ in records:
        if hash(identity) not in suspects:
            continue
        if identity in first:
            problem = f"the id {identity!r} comes twice, first at {first[identity]}"
            raise RecordError(problem, where=where, remedy="Make the ids unique, or name another id column")
        first[identity] = where


def find_id_column(values: dict[str, Any]) -> str | None:
    """The column of a record that holds its id, if it has one. Without a name only the first column counts."""
    present = [name for name in ID_COLUMNS if name in values]
    return next((name for name in present if name or next(iter(values)) == ""), None)


def text_of(values: dict[str, Any], column: str, where: str) -> str:
    """A record's text. Raises RecordError when it is missing, no text or empty."""
    text = values.get(column)
    if isinstance(text, str) and text.strip():
        return text
    if column not in values:
        names = ", ".join(map(repr, values)) or "none"
        raise RecordError(f"has no column {column!r}", where=where, remedy=f"Columns there: {names}")
    problem = "is empty" if text is None or isinstance(text, str) else f"must be text, not {type(text).__name__}"
    raise RecordError(f"{column}: {problem}", where=where, remedy="Correct or leave out that row")


def id_of(values: dict[str, Any], column: str, where: str) -> str:
    """A record's id as text. Raises RecordError when it is missing, empty, or neither text nor a whole number."""
    value = values.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value:
        return value
    if column not in values:
        names = ", ".join(map(repr, values)) or "none"
        raise RecordError(f"has no id column {column!r}", where=where, remedy=f"Columns there: {names}")
    problem = "is empty" if value in (None, "") else f"must be text or a whole number, not {type(value).__name__}"
    raise RecordError(f"{column}: {problem}", where=where, remedy="Give every row an id, or name another id column")


def located_records(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:row``, columns) of a file of records, of a folder of them, or of a folder of text files: its columns are
    ``index`` (the relative path) and ``text``."""
    if not storage.is_folder(uri):
        yield from ((f"{uri}:{number}", values) for number, values in numbered_records(uri))
        return
    base = uri.rstrip("/")
    prefix = storage.join(base) + "/"
    names = [name for file in storage.list_files(base) if not _hidden(name := file.removeprefix(prefix))]
    texts = [name for name in names if name.lower().endswith(TEXT_SUFFIXES)]
    tables = [name for name in names if name.lower().removesuffix(".gz").endswith(_TABLE_SUFFIXES)]
    if not texts and not tables:
        remedy = f"Put {' or '.join(TEXT_SUFFIXES)} files there, or files of records ({', '.join(_TABLE_SUFFIXES)})"
        raise RecordError("holds neither text files nor files of records", where=uri, remedy=remedy)
    if texts and tables:
        problem = f"holds text files ({texts[0]}) and files of records ({tables[0]})"
        raise ConfigError(problem, where=uri, remedy="Name the one file, or a folder of one kind")
    for name in tables:
        where = storage.join(base, name)
        yield from ((f"{where}:{number}", values) for number, values in numbered_records(where))
    for name in texts:
        where = storage.join(base, name)
        yield where, {"index": name, "text": _text_file(where)}


def _text_file(uri: str) -> str:
    with storage.reader(uri) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text ({error.reason} at byte {error.start})"
        raise RecordError(problem, where=uri, remedy="Convert or leave out that file") from None


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
