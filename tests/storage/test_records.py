"""Records: the same rows come back in every format, in bounded memory, and what is wrong is named with its row."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rmsearch.errors import ConfigError, InputMissingError, RecordError
from rmsearch.storage import formats, records

TYPED = ["json", "jsonl", "json.gz", "jsonl.gz"]
ALL = [*TYPED, "csv", "csv.gz", "parquet", "parquet.gz"]
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalar = (
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
value = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)


@pytest.mark.parametrize("suffix", TYPED)
@given(rows=st.lists(st.dictionaries(text, value, max_size=4), max_size=6))
@quick
def test_json_round_trip(tmp_path: Path, suffix: str, rows: list[dict[str, Any]]) -> None:
    file = str(tmp_path / f"a.{suffix}")
    assert records.write_records(file, iter(rows)) == len(rows)
    back = list(records.read_records(file))
    assert back == rows and json.dumps(back) == json.dumps(rows)  # 1, 1.0 and True are equal in Python, not in JSON


columns = {
    "id": text,
    "text": text | st.none(),
    "count": st.integers(1 - 2**63, 2**63 - 1) | st.none(),
    "yes": st.booleans(),
    "score": st.floats(allow_nan=False, allow_infinity=False) | st.none(),
    "ids": st.lists(text, max_size=3),
}


@pytest.mark.parametrize("suffix", ["parquet", "parquet.gz"])
@given(rows=st.lists(st.fixed_dictionaries(columns), max_size=6))
@quick
def test_parquet_round_trip(tmp_path: Path, suffix: str, rows: list[dict[str, Any]]) -> None:
    file = str(tmp_path / f"a.{suffix}")
    assert records.write_records(file, iter(rows)) == len(rows)
    assert list(records.read_records(file)) == rows


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
@given(rows=st.lists(st.fixed_dictionaries({"a": text, "b,\n": text, "c": text | st.none()}), max_size=6))
@quick
def test_csv_round_trip(tmp_path: Path, suffix: str, rows: list[dict[str, Any]]) -> None:
    file = str(tmp_path / f"a.{suffix}")
    assert records.write_records(file, iter(rows)) == len(rows)
    assert list(records.read_records(file)) == [{**row, "c": row["c"] or ""} for row in rows]


@pytest.mark.parametrize("suffix", ALL)
def test_same_records_same_bytes(tmp_path: Path, suffix: str) -> None:
    rows = [{"a": str(number), "b": number} for number in range(100)]
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    records.write_records(str(one), rows)
    records.write_records(str(two), rows)
    assert one.read_bytes() == two.read_bytes()


def test_values_in_csv(tmp_path: Path) -> None:
    file = str(tmp_path / "a.csv")
    records.write_records(file, [{"n": 1, "f": 0.5, "t": True, "l": ["x", 1], "s": "1"}, {"n": None}])
    assert list(records.read_records(file)) == [
        {"n": "1", "f": "0.5", "t": "true", "l": '["x", 1]', "s": "1"},
        {"n": "", "f": "", "t": "", "l": "", "s": ""},
    ]


@pytest.mark.parametrize("suffix", ALL)
def test_batches(tmp_path: Path, suffix: str) -> None:
    file = str(tmp_path / f"a.{suffix}")
    records.write_records(file, ({"a": str(number)} for number in range(25)))
    batches = list(records.read_batches(file, 10))
    assert [len(batch) for batch in batches] == [10, 10, 5] and batches[2][4] == {"a": "24"}


def test_many_parquet_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PARQUET_ROWS", 10)
    file = str(tmp_path / "a.parquet")
    rows = [{"id": str(number), "score": number / 2, "note": None} for number in range(35)]
    assert records.write_records(file, rows) == 35 and list(records.read_records(file)) == rows
    with pytest.raises(RecordError, match=r"a\.parquet:10-19: .*'new'"):
        records.write_records(file, [*rows[:10], *({"id": "x", "new": 1} for _ in range(10))])
    with pytest.raises(RecordError, match=r"a\.parquet:10-19: "):
        records.write_records(file, [*rows[:10], *({"id": 5.5} for _ in range(10))])
    assert list(records.read_records(file)) == rows  # the old output stays


@pytest.mark.parametrize("suffix", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, [1.0, math.nan]])
def test_nan_is_refused_on_writing(tmp_path: Path, suffix: str, bad: Any) -> None:
    file = tmp_path / f"a.{suffix}"
    rows = [{"score": [1.0] if isinstance(bad, list) else 1.0}, {"score": bad}]
    with pytest.raises(RecordError, match="NaN or an infinity"):
        records.write_records(str(file), rows)
    assert not file.exists()


def test_nan_is_refused_on_reading(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"s": [0.5, float("nan")]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"s": 0.5}\n{"s": NaN}\n')
    (tmp_path / "a.json").write_text('[{"s": 0.5}, {"s": NaN}]')
    for name, row in (("a.parquet", 1), ("a.jsonl", 2), ("a.json", 1)):
        with pytest.raises(RecordError, match=rf"{name}:{row}: "):
            list(records.read_records(str(tmp_path / name)))
    with pytest.raises(RecordError, match="NaN is not a JSON value"):
        records.read_json(str(tmp_path / "a.json"))


MALFORMED = [
    ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: "),
    ("a.jsonl", b'\n{"a": 1}\n\n[1]\n', r"a\.jsonl:4: is a JSON array, and a record"),
    ("a.jsonl", b'[{"a": 1}]', r"a\.jsonl:1: is a JSON array, not JSON lines\. Name it \.json"),
    ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    ("a.jsonl", b"[" * 100000, r"a\.jsonl:1: is a JSON array"),
    ("a.jsonl", b'{"a":' * 100000, r"a\.jsonl:1: nested too deep"),
    ("a.json", b'[{"a": 1}, {"a": 2},, {}]', r"a\.json:2: "),
    ("a.json", b'[{"a": 1}, {"a"', r"a\.json:1: "),
    ("a.json", b'[{"a": 1}, "text"]', r"a\.json:1: is a JSON string"),
    ("a.json", b'[{"a": 12345678901234567890123}]', r"a\.json:0: holds a whole number beyond 64 bits"),
    ("a.json", b'[{"a": 1}] more', r"a\.json:1: "),
    ("a.json", b'{"a": 1}\n{"a": 2}\n', r"a\.json: holds JSON lines.* name it \.jsonl"),
    ("a.json", b'{"q1": {"k1": 1.0}}', r"a\.json: holds no JSON array"),
    ("a.json", b"", r"a\.json: is empty"),
    ("a.json", b'[{"a": "\xff"}]', r"a\.json:0: "),
    ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv:3: has 3 cells"),
    ("a.csv", b'a,b\n"x\ny",2\n1\n', r"a\.csv:4: has 1 cells"),
    ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: two columns are named 'a'"),
    ("a.csv", b'a,b\n1,"2', r"a\.csv:2: "),
    ("a.csv", b"a,b\n1,\xff\n", r"a\.csv:1: not UTF-8|a\.csv:2: not UTF-8"),
    ("a.parquet", b"not parquet at all", r"a\.parquet: "),
    ("a.parquet.gz", gzip.compress(b"neither", mtime=0), r"a\.parquet\.gz: "),
    ("a.jsonl.gz", b'{"a": 1}\n', r"a\.jsonl\.gz: not a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999, mtime=0)[:-9], r"a\.jsonl\.gz: not a whole gzip file"),
    ("a.csv.gz", gzip.compress(b"a,b\n1,2\n" * 9999, mtime=0)[:60], r"a\.csv\.gz: not a whole gzip file"),
]


@pytest.mark.parametrize(("name", "data", "said"), MALFORMED)
def test_malformed_files(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RecordError, match=said) as caught:
        list(records.read_records(str(tmp_path / name)))
    message = str(caught.value)
    assert caught.value.remedy and len(message) < 700 and "\n" not in message


@pytest.mark.parametrize("suffix", ALL)
def test_a_missing_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputMissingError):
        list(records.read_records(str(tmp_path / f"none.{suffix}")))


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", "jsonl", "a.json.zip"])
def test_unknown_suffix(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.json, \.jsonl, \.csv, \.parquet, each also with \.gz"):
        records.suffix_of(name)


def test_suffixes() -> None:
    assert records.suffix_of("s3://b/x.Y/a.JSONL.GZ") == "jsonl.gz"
    assert records.suffix_of("a.json") == "json"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_is_tolerated(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    records.write_records(str(file), [{"a": "é"}])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert list(records.read_records(str(file))) == [{"a": "é"}]
    packed = tmp_path / f"a.{suffix}.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert list(records.read_records(str(packed))) == [{"a": "é"}]


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "1"}\r\n{"a": "2"}')
    (tmp_path / "a.csv").write_bytes(b"a\r\n1\r\n2")
    for name in ("a.jsonl", "a.csv"):
        assert list(records.read_records(str(tmp_path / name))) == [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize("suffix", ALL)
def test_no_records(tmp_path: Path, suffix: str) -> None:
    file = str(tmp_path / f"a.{suffix}")
    assert records.write_records(file, []) == 0 and list(records.read_records(file)) == []


@pytest.mark.parametrize("suffix", ALL)
@pytest.mark.parametrize("bad", [["no", "dict"], {1: "x"}, {"a": object()}, {"a": "\ud800"}])
def test_what_cannot_be_written(tmp_path: Path, suffix: str, bad: Any) -> None:
    file = tmp_path / f"a.{suffix}"
    with pytest.raises(RecordError, match=rf"a\.{suffix}:\d"):
        records.write_records(str(file), [{"a": "1"}, bad])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ALL)
def test_an_error_of_the_rows_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    records.write_records(str(file), [{"a": "old"}])

    def rows() -> Any:
        yield {"a": "new"}
        raise KeyError("of the caller")

    with pytest.raises(KeyError):
        records.write_records(str(file), rows())
    assert list(records.read_records(str(file))) == [{"a": "old"}] and len(list(tmp_path.iterdir())) == 1


class Row(BaseModel):
    id: str
    score: float | None = None
    ids: list[str] = []


@pytest.mark.parametrize("suffix", ALL)
def test_models_and_numpy_values(tmp_path: Path, suffix: str) -> None:
    file = str(tmp_path / f"a.{suffix}")
    rows = [Row(id="1", score=0.5, ids=["x"]), Row(id="")]
    records.write_records(file, rows)
    assert list(records.read_models(file, Row)) == rows
    records.write_records(file, [{"id": "1", "score": np.float32(0.5), "ids": np.array(["x"])}])
    assert list(records.read_models(file, Row)) == rows[:1]


def test_a_record_that_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": "1"}\n\n{"id": "2", "score": "high", "ids": 3}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl:3: score: .* \(and 1 more\)\. "):
        list(records.read_models(str(file), Row))
    table = tmp_path / "a.csv"
    table.write_text("id,score\n1,high\n")
    with pytest.raises(RecordError, match=r"a\.csv:2: score: "):
        list(records.read_models(str(table), Row))


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_whole_documents(tmp_path: Path, suffix: str) -> None:
    file = str(tmp_path / f"run.{suffix}")
    run = {"q1": {"k1": 0.25, "k2": np.float32(0.5)}, "é": {}}
    records.write_json(file, run)
    assert records.read_json(file) == run
    with pytest.raises(RecordError, match="NaN"):
        records.write_json(file, {"q1": math.nan})
    assert records.read_json(file) == run
    for bad in ("run.jsonl", "run.csv"):
        with pytest.raises(ConfigError):
            records.write_json(str(tmp_path / bad), run)


def test_a_malformed_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1,\n\n "b": }')
    with pytest.raises(RecordError, match=r"a\.json:3: not JSON"):
        records.read_json(str(tmp_path / "a.json"))


FLAT = """
import resource, sys
from rmsearch.storage import records
folder = sys.argv[1]
rows = lambda n: ({"query": f"q{i}", "key": "text " * 40 + str(i), "score": i / 7} for i in range(n))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
grown = []
for suffix in ("json", "jsonl", "csv", "parquet"):
    for n in (20_000, 120_000):  # the first warms up imports and buffers
        before = peak()
        assert records.write_records(f"{folder}/a.{suffix}", rows(n)) == n
        assert sum(1 for _ in records.read_records(f"{folder}/a.{suffix}")) == n
        grown.append(peak() - before)
print(*grown[1::2])
"""


def test_memory_stays_flat(tmp_path: Path) -> None:
    code = [sys.executable, "-c", FLAT, str(tmp_path)]
    grown = subprocess.run(code, capture_output=True, text=True, check=True).stdout
    assert all(int(mib) < 40 for mib in grown.split()), grown  # the rows take about 60 MiB as objects, per format
