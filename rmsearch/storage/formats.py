"""Readers and writers of the record formats, over byte streams. `rmsearch.storage.records` is the way in."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn, cast

from rmsearch.errors import RecordError, first_line

PARQUET_ROWS = 8192  # rows per group: what a reader or writer holds at a time
_BOM = b"\xef\xbb\xbf"
Record = dict[str, Any]


def malformed(uri: str, row: int | None, error: Exception) -> RecordError:
    """The RecordError for what a parser or encoder said."""
    said = {
        UnicodeDecodeError: "not UTF-8 text",
        UnicodeEncodeError: "holds a broken Unicode character (a lone surrogate)",
        RecursionError: "nested too deep",
    }.get(type(error)) or first_line(error)
    if "integer overflow" in said:
        said = "holds a whole number beyond 64 bits; write it as a string"
    if "not JSON compliant" in said:
        said = "holds NaN or an infinity, which no format here may hold"
    return RecordError(said[:200], where=uri if row is None else f"{uri}:{row}", remedy="Correct that record.")


def plain(value: Any) -> Any:
    """JSON's form of a value that the encoder does not know: numpy scalars and arrays, pydantic models."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=plain).encode


def not_json(constant: str) -> NoReturn:
    """Refuse NaN and infinities, which Python's decoder would take."""
    raise ValueError(f"{constant} is not a JSON value; write null")


_decode = json.JSONDecoder(parse_constant=not_json).decode


def _encoded(record: Any, uri: str, row: int) -> bytes:
    try:
        return _encode(record).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise malformed(uri, row, error) from error


def _skip_bom(stream: BinaryIO) -> BinaryIO:
    buffered = cast(Any, stream if hasattr(stream, "peek") else io.BufferedReader(cast(Any, stream)))
    if buffered.peek(3)[:3] == _BOM:
        buffered.read(3)
    return cast(BinaryIO, buffered)


def _as_record(value: Any, uri: str, row: int) -> Record:
    if not isinstance(value, dict):
        problem = f"is a JSON {_json_type(value)}, and a record is an object with named fields"
        raise RecordError(problem, where=f"{uri}:{row}", remedy='Write {"field": value, …}.')
    return value


def _json_type(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "null")


def read_jsonl(stream: BinaryIO, uri: str) -> Iterator[tuple[int, Record]]:
    first = True
    for row, line in enumerate(_skip_bom(stream), 1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            remedy = "Name it .json, or write one object per line."
            raise RecordError("is a JSON array, not JSON lines", where=f"{uri}:{row}", remedy=remedy)
        first = False
        try:
            value = _decode(line.decode())
        except (ValueError, RecursionError) as error:
            raise malformed(uri, row, error) from error
        yield row, _as_record(value, uri, row)


def write_jsonl(stream: BinaryIO, rows: Iterator[Record], uri: str) -> int:
    count = 0
    for record in rows:
        stream.write(_encoded(record, uri, count + 1) + b"\n")
        count += 1
    return count


def read_json_array(stream: BinaryIO, uri: str) -> Iterator[tuple[int, Record]]:
    import ijson

    stream = _skip_bom(stream)
    head = cast(Any, stream).peek(1 << 16)[: 1 << 16].lstrip()
    if not head.startswith(b"["):
        raise RecordError(*_not_an_array(head), where=uri, remedy="Write an array of objects, or see .jsonl.")
    row = 0
    try:
        for row, value in enumerate(ijson.items(stream, "item", use_float=True)):
            yield row, _as_record(value, uri, row)
            row += 1
    except (ijson.JSONError, UnicodeDecodeError, OverflowError) as error:
        raise malformed(uri, row, error) from error


def _not_an_array(head: bytes) -> tuple[str]:
    if not head:
        return ("is empty; an empty list of records is []",)
    line, newline, rest = head.partition(b"\n")
    if newline and rest.lstrip().startswith(b"{"):
        try:
            json.loads(line)
            return ("holds JSON lines, not a JSON array; name it .jsonl",)
        except ValueError:
            pass
    return ("holds no JSON array of records",)


def write_json_array(stream: BinaryIO, rows: Iterator[Record], uri: str) -> int:
    count = 0
    for record in rows:
        stream.write((b",\n" if count else b"[\n") + _encoded(record, uri, count))
        count += 1
    stream.write(b"\n]\n" if count else b"[]\n")
    return count


def read_csv(stream: BinaryIO, uri: str) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(1 << 31)  # documents are longer than the module's default of 128 KiB
    # detach at the end: the text wrapper must not close a stream that is not its own
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        yield from _csv_rows(csv.reader(text, strict=True), uri)
    finally:
        text.detach()


def _csv_rows(table: Any, uri: str) -> Iterator[tuple[int, Record]]:
    line = 1
    try:
        names = next(table, None)
        if names is None:
            return
        if len(set(names)) != len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise RecordError(f"two columns are named {double!r}", where=f"{uri}:1", remedy="Rename one.")
        line = table.line_num + 1
        for cells in table:
            if cells and len(cells) != len(names):
                problem = f"has {len(cells)} cells, and the header names {len(names)} columns"
                raise RecordError(problem, where=f"{uri}:{line}", remedy="Correct that row; quote cells with commas.")
            if cells:
                yield line, dict(zip(names, cells, strict=True))
            line = table.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise malformed(uri, line, error) from error


def write_csv(stream: BinaryIO, rows: Iterator[Record], uri: str) -> int:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=False)
    # RFC 4180 line ends: with them the module quotes cells that hold a lone CR or LF
    table = csv.writer(text, lineterminator="\r\n")
    count, names = 0, list[str]()
    for record in rows:
        if not count:
            names = list(record)
            table.writerow(names)
        if unknown := record.keys() - set(names):
            problem = f"has the field {min(unknown)!r}, which the first record lacks"
            raise RecordError(
                problem, where=f"{uri}:{count + 2}", remedy="Give every record the same fields, or use .jsonl."
            )
        try:
            table.writerow([_cell(record.get(name)) for name in names])
        except (TypeError, ValueError, RecursionError) as error:
            raise malformed(uri, count + 2, error) from error
        count += 1
    text.flush()
    text.detach()
    return count


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else _encode(value)


def read_parquet(stream: BinaryIO, uri: str) -> Iterator[tuple[int, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as whole:
        source: Any = stream
        if not isinstance(
            getattr(stream, "raw", None), io.FileIO
        ):  # the format needs seeks: S3 and gzip go to disk first
            shutil.copyfileobj(stream, whole, 1 << 20)
            source = whole
        row = 0
        try:
            file = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
            for batch in file.iter_batches(PARQUET_ROWS):
                _refuse_nan(batch, uri, row)
                for record in batch.to_pylist():
                    yield row, record
                    row += 1
        except pa.ArrowException as error:
            raise malformed(uri, row or None, error) from error


def _refuse_nan(table: Any, uri: str, first_row: int) -> None:
    """NaN may hide in columns of floats and of lists of floats (embeddings)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name, column in zip(table.schema.names, table.columns, strict=True):
        flat = column
        while (
            pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type)
        ):
            flat = pc.list_flatten(flat)
        if pa.types.is_floating(flat.type) and not pc.all(pc.is_finite(flat), min_count=0).as_py():
            rows = enumerate(column.to_pylist())
            bad = next((index for index, value in rows if _not_finite(value)), 0)
            problem = f"{name}: holds NaN or an infinity, which no format here may hold"
            raise RecordError(problem, where=f"{uri}:{first_row + bad}", remedy="Write null for a missing value.")


def _not_finite(value: Any) -> bool:
    if isinstance(value, list):
        return any(_not_finite(one) for one in value)
    return isinstance(value, float) and not math.isfinite(value)


def write_parquet(stream: BinaryIO, rows: Iterator[Record], uri: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, writer, schema = 0, None, None
    try:
        while (batch := list(itertools.islice(rows, PARQUET_ROWS))) or writer is None:
            try:
                table = _table(batch, schema)
                _refuse_nan(table, uri, count)
                if writer is None:
                    schema = table.schema
                    writer = pq.ParquetWriter(stream, schema)
                writer.write_table(table)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                said = str(malformed(uri, None, error).problem)
                remedy = "Give each field one type in all records, or use .jsonl."
                raise RecordError(said, where=f"{uri}:{count}-{count + len(batch) - 1}", remedy=remedy) from error
            count += len(batch)
            if not batch:
                break
    finally:
        if writer is not None:
            writer.close()
    return count


def _table(batch: list[Record], schema: Any) -> Any:
    """Columns of a batch. The first batch settles the types; a column that is empty in it becomes a string column."""
    import pyarrow as pa

    names = list(dict.fromkeys(name for record in batch for name in record))
    if schema is not None:
        if unknown := set(names) - set(schema.names):
            raise ValueError(f"the field {min(unknown)!r} does not occur in the first {PARQUET_ROWS} records")
        return pa.Table.from_pylist(batch, schema=schema)
    columns = [pa.array([_arrow(record.get(name)) for record in batch]) for name in names]
    columns = [column.cast(pa.string()) if pa.types.is_null(column.type) else column for column in columns]
    return pa.table(dict(zip(names, columns, strict=True)))


def _arrow(value: Any) -> Any:
    return value if not hasattr(value, "model_dump") else value.model_dump(mode="json")


Reader = Callable[[BinaryIO, str], Iterator[tuple[int, Record]]]
Writer = Callable[[BinaryIO, Iterator[Record], str], int]
NUMBERED_READERS: dict[str, Reader] = {
    "json": read_json_array,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
}
WRITERS: dict[str, Writer] = {
    "json": write_json_array,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}
