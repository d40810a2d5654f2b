"""A corpus as files: a data set folder for `datasets.load_from_disk`, ``df.csv`` and a random part, ``df_small.csv``.

All have the columns ``index`` (the stable id), ``text``, ``split``, then the others. Rows are written as they come.
"""

from __future__ import annotations

import datetime
import decimal
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

from rmsearch.datasets.reservoir import reservoir
from rmsearch.errors import ConfigError, MissingExtraError, RecordError
from rmsearch.storage import local
from rmsearch.storage import uri as storage

_BATCH_ROWS = 2048
_BATCH_BYTES = 8 << 20
_ARROW_FILE = "data-00000-of-00001.arrow"


class TableRow(NamedTuple):
    """A row to write: its place in the source, and all columns in order, ``index`` and ``text`` first."""

    where: str
    values: dict[str, Any]


class TableWriter:
    """Writes the files below ``folder``. Use as a context manager; they are complete when `finish` has returned.

    Memory: one batch of rows (8 MiB of text). RecordError for a row that has a field which the first one lacks, or a
    value of another type than its column.
    """

    def __init__(self, folder: Path, split: str, n_small: int, seed: int) -> None:
        self.rows = 0
        self._folder, self._split, self._n_small, self._seed = folder, split, n_small, seed
        self._names: list[str] = []
        self._batch: list[TableRow] = []
        self._batch_bytes = 0
        self._schema: Any = None
        self._arrow: Any = None

    def __enter__(self) -> TableWriter:
        try:
            from datasets.arrow_writer import ArrowWriter
        except ImportError:
            raise MissingExtraError("datasets", "train") from None
        with ExitStack() as stack:
            self._small = stack.enter_context(reservoir(self._n_small, self._seed))
            self._csv = stack.enter_context((self._folder / "df.csv").open("wb", buffering=1 << 20))
            (self._folder / self._split).mkdir()
            self._arrow_type, self._arrow_path = ArrowWriter, self._folder / self._split / _ARROW_FILE
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._arrow is not None:
            self._arrow.close()
        self._stack.close()

    def add(self, entry: TableRow) -> None:
        """Write one row."""
        if not self._names:
            self._names = list(entry.values)
            self._csv.write(_csv_line(self._names))
        if len(entry.values) > len(self._names) or not entry.values.keys() <= set(self._names):
            name = min(entry.values.keys() - set(self._names))
            problem = f"has the field {name!r}, which the first record lacks"
            raise RecordError(problem, where=entry.where, remedy="Give every record the same fields")
        self.rows += 1
        self._batch.append(entry)
        self._batch_bytes += len(entry.values["text"])
        if len(self._batch) >= _BATCH_ROWS or self._batch_bytes >= _BATCH_BYTES:
            self._flush()

    def finish(self, fingerprint: str) -> None:
        """Write what is left, ``df_small.csv`` and the data set's own descriptions."""
        self._flush()
        self._arrow.finalize()
        self._csv.flush()
        with (self._folder / "df_small.csv").open("wb") as small:
            small.write(_csv_line(self._names))
            for line in self._small.items():
                small.write(line)
        _describe(self._folder, self._split, self._schema, fingerprint)

    def _flush(self) -> None:
        if not self._batch:
            return
        rows = [[entry.values.get(name) for name in self._names] for entry in self._batch]
        try:
            for line in [_csv_line(row) for row in rows]:
                self._csv.write(line)
                if (slot := self._small.slot()) is not None:
                    self._small.put(slot, line)
        except UnicodeEncodeError:
            problem = "holds a broken Unicode character (a lone surrogate)"
            raise RecordError(problem, where=self._places(), remedy="Correct that record") from None
        except ValueError:
            problem = "holds NaN or an infinity"
            raise RecordError(problem, where=self._places(), remedy="Write null for a missing value") from None
        table = self._table(rows)
        if self._arrow is None:
            self._schema = table.schema
            self._arrow = self._arrow_type(path=str(self._arrow_path), schema=table.schema)
        self._arrow.write_table(table, _BATCH_ROWS)
        self._batch, self._batch_bytes = [], 0

    def _table(self, rows: list[list[Any]]) -> Any:
        """The batch as columns. The first batch settles the types; a column that is empty in it holds strings."""
        import pyarrow as pa

        arrays = []
        for place, name in enumerate(self._names):
            column = [row[place] for row in rows]
            try:
                kind = pa.string() if self._schema is None and place < 2 else None
                array = pa.array(column, kind if self._schema is None else self._schema.field(name).type)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                said = (str(error).splitlines() or [type(error).__name__])[0]
                remedy = "Give each column one type in all rows"
                raise RecordError(f"{name}: {said}", where=self._places(), remedy=remedy) from error
            arrays.append(array.cast(pa.string()) if pa.types.is_null(array.type) else array)
        return pa.table(arrays, names=self._names) if self._schema is None else pa.table(arrays, schema=self._schema)

    def _places(self) -> str:
        first, last = self._batch[0].where, self._batch[-1].where
        return first if first == last else f"{first} to {last.rpartition(':')[2]}"


def plain_values(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The columns as JSON has them: dates and decimals become text. Raises RecordError for bytes and the like."""
    if _JSON_TYPES.issuperset(map(type, values.values())):
        return values
    try:
        return cast(dict[str, Any], json.loads(json.dumps(values, default=_plain, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "Leave out that column: a corpus holds text, numbers, and lists of them"
        raise RecordError(str(error), where=where, remedy=remedy) from None


_JSON_TYPES = frozenset([str, int, float, bool, type(None)])


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time | datetime.datetime):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"holds a {type(value).__name__}")


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _csv_line(values: Iterable[Any]) -> bytes:
    """A line of RFC 4180, as `rmsearch.storage.records` writes it, but several times as fast as the csv module."""
    return (",".join(map(_cell, values)) + "\r\n").encode()


def _cell(value: Any) -> str:
    if type(value) is not str:
        if value is None:
            return ""
        value = repr(value) if type(value) is int else _encode(value)
    if '"' in value:
        return '"' + value.replace('"', '""') + '"'
    return f'"{value}"' if "," in value or "\n" in value or "\r" in value else value


def _describe(folder: Path, split: str, schema: Any, fingerprint: str) -> None:
    """The JSON files that `datasets.load_from_disk` reads."""
    from datasets import DatasetInfo, Features

    state: dict[str, Any] = {
        "_data_files": [{"filename": _ARROW_FILE}],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    info = asdict(DatasetInfo(features=Features.from_arrow_schema(schema)))
    documents = {f"{split}/state.json": state, f"{split}/dataset_info.json": info}
    for name, value in {**documents, "dataset_dict.json": {"splits": [split]}}.items():
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(uri: str, former: Iterable[str] = ()) -> Iterator[Path]:
    """A local folder to fill; what is in it appears at ``uri`` on a clean exit, all at once, else nothing changes.

    ``former``: names of files from the last time, which go. All others that lie there stay.
    """
    target = None if storage.is_s3(uri) else local.as_path(uri).resolve()
    if target is None or target.is_mount():  # a volume's own root cannot be swapped
        with tempfile.TemporaryDirectory() as temp:
            yield Path(temp)
            storage.upload_folder(temp, uri)
        return
    if target.exists() and not target.is_dir():
        raise ConfigError("is a file, and a folder is needed", where=uri, remedy="Choose another path")
    local.make_folder(target.parent, uri)
    with local.local_errors(uri), local.temp_folder(target) as folder:
        yield folder
        ours = local.walk(folder)
        for name in ours:
            local.fsync_path(folder / name)
        if not target.exists():
            folder.rename(target)
        else:
            for name in set(local.walk(target)) - set(ours) - set(former):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).hardlink_to(target / name)
            try:
                local.swap(folder, target)  # now the temporary one is the old folder, which goes
            except OSError:  # a mount without the exchange: two renames
                target.rename(old := local.temp_beside(target))
                folder.rename(target)
                shutil.rmtree(old)
        local.fsync_path(target.parent)
