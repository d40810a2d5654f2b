"""Corpora: ids that stay, one-line errors with their place, memory that does not hold the texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsearch.datasets import corpus
from rmsearch.datasets.corpus import Row, indexed, read_corpus
from rmsearch.errors import ConfigError, InputMissingError, RecordError
from rmsearch.storage.records import write_records

ROWS = [{"_id": f"d{i}", "text": f"text {i}", "title": "t"} for i in range(5)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet", "csv.gz", "jsonl.gz", "json.gz", "parquet.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"c.{suffix}")
    write_records(path, ROWS)
    found = list(read_corpus(path))
    assert found == [Row(row["_id"], row["text"], row) for row in ROWS]


@pytest.mark.parametrize(
    ("columns", "ids"),
    [
        ({"text": "a", "other": 3}, ["0", "1"]),
        ({"id": 7, "_id": "x", "text": "a"}, ["x0", "x1"]),
        ({"df_id": 7, "id": 3, "text": "a"}, ["30", "31"]),
        ({"index": "i", "_id": "x", "text": "a"}, ["i0", "i1"]),
        ({"text": "a", "corpus-id": "c"}, ["c0", "c1"]),
    ],
)
def test_the_id_column(tmp_path: Path, columns: dict[str, Any], ids: list[str]) -> None:
    """Text ids get a number behind them, so that two rows differ; whole numbers become text."""
    path = str(tmp_path / "c.jsonl")
    rows = [{n: (int(f"{v}{i}") if isinstance(v, int) else f"{v}{i}") for n, v in columns.items()} for i in range(2)]
    write_records(path, rows)
    assert [row.id for row in read_corpus(path)] == ids


def test_pandas_index_without_a_name(tmp_path: Path) -> None:
    import pandas as pd

    path = str(tmp_path / "c.csv")
    pd.DataFrame({"text": ["a", "b"], "id": ["x", "y"]}, index=[17, 4]).to_csv(path)
    assert [row.id for row in read_corpus(path)] == ["17", "4"]
    assert [row.id for row in read_corpus(path, id_column="id")] == ["x", "y"]
    Path(path).write_text("text,\r\na,1\r\nb,1\r\n")  # an unnamed column elsewhere is no index
    assert [row.id for row in read_corpus(path)] == ["0", "1"]


def test_a_folder_of_texts(tmp_path: Path) -> None:
    for name, text in {"b.txt": "bee", "sub/a.md": "\ufeffay", ".git/x.txt": "no", "sub/pic.png": "no"}.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    for place in (str(tmp_path / "texts"), f"{tmp_path}/texts/"):
        assert [row[:2] for row in read_corpus(place)] == [("b.txt", "bee"), ("sub/a.md", "ay")]
    (tmp_path / "texts" / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RecordError, match=r"c\.txt: is not UTF-8 text"):
        list(read_corpus(str(tmp_path / "texts")))
    with pytest.raises(RecordError, match=r"b\.txt: has no id column 'id'"):
        list(read_corpus(str(tmp_path / "texts"), id_column="id"))
    (tmp_path / "none").mkdir()
    with pytest.raises(RecordError, match="holds neither text files nor files of records"):
        list(read_corpus(str(tmp_path / "none")))


def test_a_folder_of_shards_counts_on(tmp_path: Path) -> None:
    for shard in range(2):
        write_records(str(tmp_path / "c" / f"{shard}.jsonl.gz"), [{"text": f"{shard} {i}"} for i in range(2)])
    found = [row[:2] for row in read_corpus(str(tmp_path / "c"))]
    assert found == [("0", "0 0"), ("1", "0 1"), ("2", "1 0"), ("3", "1 1")]
    (tmp_path / "c" / "README.md").write_text("of another kind")
    with pytest.raises(ConfigError, match=r"holds text files \(README\.md\) and files of records \(0\.jsonl\.gz\)"):
        list(read_corpus(str(tmp_path / "c")))


@pytest.mark.s3
def test_a_folder_and_a_file_on_s3(s3_bucket: str) -> None:
    from rmsearch.storage import uri

    for name in ("texts/b.txt", "texts/sub/a.md"):
        with uri.writer(f"{s3_bucket}/{name}") as file:
            file.write(name.encode())
    found = [row[:2] for row in read_corpus(f"{s3_bucket}/texts")]
    assert found == [("b.txt", "texts/b.txt"), ("sub/a.md", "texts/sub/a.md")]
    write_records(f"{s3_bucket}/c.jsonl.gz", ROWS)
    assert [row.id for row in read_corpus(f"{s3_bucket}/c.jsonl.gz")] == [row["_id"] for row in ROWS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"c\.jsonl: is empty"),
        ('{"_id": "a", "body": "x"}\n', r"c\.jsonl:1: has no column 'text'\. Columns there: '_id', 'body'"),
        ('{"_id": "a", "text": "x"}\n{"_id": "b", "text": "  "}\n', r"c\.jsonl:2: text: is empty"),
        ('{"_id": "a", "text": null}\n', r"c\.jsonl:1: text: is empty"),
        ('{"_id": "a", "text": 3}\n', r"c\.jsonl:1: text: must be text, not int"),
        ('{"_id": "a", "text": "x"}\n\n{"_id": "a", "text": "y"}\n', r":3: the id 'a' comes twice, first at .*:1"),
        ('{"_id": "", "text": "x"}\n', r"c\.jsonl:1: _id: is empty"),
        ('{"_id": 1.5, "text": "x"}\n', r"c\.jsonl:1: _id: must be text or a whole number, not float"),
        ('{"_id": "a", "text": "x"}\n{"text": "x"}\n', r"c\.jsonl:2: has no id column '_id'"),
        ('{"_id": "a", "text": "x"}\n{"_i', r"c\.jsonl:2: "),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(RecordError, match=message):
        list(read_corpus(str(tmp_path / "c.jsonl")))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError):
        list(read_corpus(str(tmp_path / "c.jsonl")))
    (tmp_path / "c.doc").write_text("x")
    with pytest.raises(ConfigError, match="unknown suffix"):
        list(read_corpus(str(tmp_path / "c.doc")))
    with gzip.open(tmp_path / "c.csv.gz", "wt") as file:
        file.write("text\n")
    with pytest.raises(RecordError, match=r"c\.csv\.gz: is empty"):
        list(read_corpus(str(tmp_path / "c.csv.gz")))


def test_a_double_far_away_is_found_and_equal_hashes_are_not_doubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_RUN", 8)
    path = tmp_path / "c.jsonl"
    lines = [json.dumps({"id": i, "text": "x"}) for i in range(100)]
    path.write_text("\n".join(lines))
    assert len(list(read_corpus(str(path)))) == 100
    path.write_text("\n".join([*lines, json.dumps({"id": 3, "text": "x"})]))
    with pytest.raises(RecordError, match=r"c\.jsonl:101: the id '3' comes twice, first at .*c\.jsonl:4"):
        list(read_corpus(str(path)))
    monkeypatch.setattr(corpus, "hash", lambda text: len(text), raising=False)
    path.write_text("\n".join(lines))
    assert len(list(read_corpus(str(path)))) == 100


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"))))
def test_an_index_gives_back_what_was_put_in(texts: dict[str, str]) -> None:
    with indexed(Row(identity, text, {}) for identity, text in texts.items()) as index:
        pairs = list(texts.items())
        assert len(index) == len(pairs) and list(index) == pairs and index[1:3] == pairs[1:3]
        for position, (identity, text) in enumerate(pairs):
            assert index.position(identity) == position and index.text(identity) == text
            assert index.position(identity + "?") == (
                list(texts).index(identity + "?") if identity + "?" in texts else None
            )
        assert index.text("nobody's id") is texts.get("nobody's id")


def test_an_index_tells_equal_hashes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "hash", lambda text: 1, raising=False)
    with indexed(Row(str(i), f"text {i}", {}) for i in range(5)) as index:
        assert [index.text(str(i)) for i in range(6)] == [*(f"text {i}" for i in range(5)), None]
        assert index[-1] == ("4", "text 4")
        with pytest.raises(IndexError):
            index[5]
