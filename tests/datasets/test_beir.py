"""The BEIR loader: every layout, bad input at file:row, and downloads that are whole or not there."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from beir_host import Host, serving

from rmsearch.datasets import download
from rmsearch.datasets.beir import Document, load_beir, read_qrels
from rmsearch.errors import EXIT_RETRY, ConfigError, InputMissingError, RecordError, RetryableError

QUERIES = [{"_id": "007", "text": "héllo?"}, {"_id": "q 2", "text": "two"}, {"_id": "unjudged", "text": "x"}]
CORPUS = [
    {"_id": "1e3", "title": "T", "text": "one"},
    {"_id": "d2", "title": "", "text": "zwei"},
    {"_id": "3", "text": ""},
]
QRELS = "query-id\tcorpus-id\tscore\n007\t1e3\t2\n007\td2\t0\nq 2\td2\t1\n"


def lines(records: list[dict[str, str]]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "tiny"
    (root / "qrels").mkdir(parents=True)
    (root / "corpus.jsonl").write_text(lines(CORPUS))
    (root / "queries.jsonl").write_text(lines(QUERIES))
    (root / "qrels" / "test.tsv").write_text(QRELS)
    return root


def zipped(folder: Path, top: str = "tiny/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, top + str(file.relative_to(folder)))
    return buffer.getvalue()


def test_folder(folder: Path) -> None:
    beir = load_beir(str(folder), "test")
    assert beir.queries == {"007": "héllo?", "q 2": "two"}, "ids stay text; only the split's queries"
    assert list(beir.corpus) == ["1e3", "d2", "3"]
    assert beir.qrels == {"007": {"1e3": 2, "d2": 0}, "q 2": {"d2": 1}}
    assert beir.positives("007") == ["1e3"], "grade 0 is not a positive"
    assert beir.corpus["1e3"].key == "T one" and beir.corpus["d2"].key == "zwei" and Document("a", "").key == "a"
    assert "unjudged" in load_beir(str(folder), all_queries=True).queries
    assert beir.name == "tiny"


def test_a_folder_may_be_written_in_many_ways(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    expected = load_beir(str(folder), "test").digests
    for place in (".", "./", "../tiny", "./../tiny/", f"{folder}//", "~/tiny"):
        assert load_beir(place, "test").digests == expected


@pytest.mark.parametrize("top", ["tiny/", ""])
def test_zip_is_read_in_place_and_has_the_folders_digests(folder: Path, top: str) -> None:
    (folder.parent / "packed.zip").write_bytes(zipped(folder, top))
    beir = load_beir(str(folder.parent / "packed.zip"), "test")
    assert beir.digests == load_beir(str(folder), "test").digests
    assert sorted(p.name for p in folder.parent.iterdir()) == ["packed.zip", "tiny"]


def test_hub_layout_parquet(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    hub = tmp_path / "hub"
    for part in ("corpus", "queries", "default"):
        (hub / part).mkdir(parents=True)
    whole = [{"_id": d["_id"], "title": d.get("title"), "text": d["text"]} for d in CORPUS]
    for n in range(2):  # two shards
        pq.write_table(
            pa.Table.from_pylist(whole[n * 2 : n * 2 + 2]), hub / "corpus" / f"corpus-0000{n}-of-00002.parquet"
        )
    pq.write_table(pa.Table.from_pylist(QUERIES), hub / "queries" / "queries-00000-of-00001.parquet")
    rows = [line.split("\t") for line in QRELS.splitlines()[1:]]
    table = pa.Table.from_pylist([{"query-id": q, "corpus-id": k, "score": float(s)} for q, k, s in rows])
    pq.write_table(table, hub / "default" / "test-00000-of-00001.parquet")
    assert load_beir(str(hub), "test").digests == load_beir(str(folder), "test").digests


def test_gzip_and_jsonl_qrels(folder: Path) -> None:
    expected = load_beir(str(folder), "test").digests
    for name in ("corpus.jsonl", "queries.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    rows = [line.split("\t") for line in QRELS.splitlines()[1:]]
    records = [{"query-id": q, "corpus-id": k, "score": int(s)} for q, k, s in rows]
    (folder / "qrels" / "test.tsv").unlink()
    (folder / "qrels" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert load_beir(str(folder), "test").digests == expected


def test_single_files_take_precedence(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(lines([{"_id": "007", "text": "new"}, {"_id": "q 2", "text": "newer"}]))
    assert load_beir(str(folder), queries=str(other)).queries["007"] == "new"
    corpus, qrels = str(folder / "corpus.jsonl"), str(folder / "qrels" / "test.tsv")
    assert load_beir(None, queries=str(other), corpus=corpus, qrels=qrels).qrels["q 2"] == {"d2": 1}
    assert load_beir(None, queries=str(other), corpus=corpus).queries.keys() == {"007", "q 2"}
    with pytest.raises(ConfigError, match="--dataset-path"):
        load_beir(None, queries=str(other))


def test_trec_qrels(tmp_path: Path) -> None:
    (tmp_path / "q.qrels").write_text("1 0 a 1\n1 0 b -1\n2 0 a 0\n")
    assert read_qrels(str(tmp_path / "q.qrels")) == {"1": {"a": 1, "b": -1}, "2": {"a": 0}}


BAD = [
    ("corpus.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "2", "text"\n', r"corpus\.jsonl:2: is not JSON"),
    ("corpus.jsonl", '{"_id": "1", "text": "a"}\n\n[1]\n', r"corpus\.jsonl:3: must be a JSON object, not list"),
    (
        "corpus.jsonl",
        '{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n',
        r"corpus\.jsonl:2: the id '1' comes twice",
    ),
    ("corpus.jsonl", '{"text": "a"}\n', r"corpus\.jsonl:1: the field '_id' is missing"),
    ("corpus.jsonl", '{"_id": "1", "title": "a"}\n', r"corpus\.jsonl:1: the field 'text' is missing"),
    ("corpus.jsonl", '{"_id": "1", "text": ["a"]}\n', r"corpus\.jsonl:1: the field 'text' must be text, not list"),
    ("corpus.jsonl", '{"_id": "", "text": "a"}\n', r"corpus\.jsonl:1: the id is empty"),
    ("corpus.jsonl", "", r"corpus\.jsonl: holds no records"),
    ("queries.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "2"}\n', r"queries\.jsonl:2: the field 'text' is missing"),
    ("qrels/test.tsv", QRELS + "007\tnope\t1\n", r"test\.tsv:5: the key id 'nope' is not in the corpus"),
    ("qrels/test.tsv", QRELS + "nope\td2\t1\n", r"test\.tsv:5: the query id 'nope' is not in the queries"),
    ("qrels/test.tsv", QRELS + "007\td2\n", r"test\.tsv:5: has 2 columns"),
    ("qrels/test.tsv", QRELS + "007\td2\t0.5\n", r"test\.tsv:5: the score must be a whole number, got '0\.5'"),
    ("qrels/test.tsv", QRELS + "007\td2\tnan\n", r"test\.tsv:5: the score must be a whole number"),
    ("qrels/test.tsv", QRELS + "007\td2\t1\n", r"test\.tsv:5: .* come twice with different scores"),
    ("qrels/test.tsv", QRELS.splitlines()[0] + "\n", r"test\.tsv: the split is empty"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_input_is_one_line_with_file_and_row(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(RecordError, match=message) as caught:
        load_beir(str(folder), "test")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_not_utf8(folder: Path) -> None:
    (folder / "queries.jsonl").write_bytes(b'{"_id": "007", "text": "\xff"}\n')
    with pytest.raises(RecordError, match=r"queries\.jsonl:1: is not UTF-8"):
        load_beir(str(folder), "test")


def test_missing_split_file_or_zip(folder: Path) -> None:
    with pytest.raises(InputMissingError, match=r"no qrels for the split 'dev'.*Splits there: test"):
        load_beir(str(folder), "dev")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(InputMissingError, match=r"has no corpus\.jsonl"):
        load_beir(str(folder), "test")
    (folder / "bad.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(RecordError, match="is not a zip archive"):
        load_beir(str(folder / "bad.zip"), "test")


def test_s3_folder_and_zip(folder: Path, s3_bucket: str) -> None:
    from rmsearch.storage import uri

    uri.upload_folder(folder, f"{s3_bucket}/sets/tiny")
    with uri.writer(f"{s3_bucket}/sets/packed.zip") as out:
        out.write(zipped(folder))
    expected = load_beir(str(folder), "test")
    for place in (f"{s3_bucket}/sets/tiny", f"{s3_bucket}/sets/tiny/", f"{s3_bucket}/sets/packed.zip"):
        assert load_beir(place, "test").digests == expected.digests
    qrels = f"{s3_bucket}/sets/tiny/qrels/test.tsv"
    assert load_beir(str(folder), "test", qrels=qrels).qrels == expected.qrels
    with pytest.raises(InputMissingError, match="no such folder or object"):
        load_beir(f"{s3_bucket}/sets/nothing", "test")


def test_parts_are_named(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "tiny2")
    (tmp_path / "many").mkdir()
    (tmp_path / "tiny2").rename(tmp_path / "many" / "android")
    with pytest.raises(InputMissingError, match="Name one of its parts: android"):
        load_beir(str(tmp_path / "many"), "test")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    monkeypatch.setenv("RMSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "FIRST_WAIT_SECONDS", 0.01)
    with serving() as server:
        monkeypatch.setenv(download.BASE_URL_VARIABLE, server.url)
        yield server


def test_download_to_a_missing_path_and_by_name(folder: Path, host: Host, tmp_path: Path) -> None:
    host.answers["/sets/tiny.zip"] = [(200, zipped(folder), None)]
    expected = load_beir(str(folder), "test").digests
    target = tmp_path / "beir_out" / "tiny"
    assert load_beir(str(target), "test").digests == expected
    assert [p.name for p in target.parent.iterdir()] == ["tiny"], "nothing else stays"
    assert load_beir("tiny", "test").digests == expected
    assert load_beir("tiny", "test").digests == expected
    assert host.asked == ["/sets/tiny.zip"] * 2, "a downloaded set is not downloaded again"


def test_a_failing_host_is_asked_again(folder: Path, host: Host) -> None:
    whole = zipped(folder)
    host.answers["/sets/tiny.zip"] = [(503, b"", None), (200, whole[:50], len(whole)), (200, whole, None)]
    assert load_beir("tiny", "test").queries
    assert len(host.asked) == 3


@pytest.mark.parametrize("answer", [(503, b"", None), (200, b"short", 50), (200, b"<html>", None)])
def test_what_never_comes_whole_leaves_nothing(
    host: Host, tmp_path: Path, answer: tuple[int, bytes, int | None]
) -> None:
    host.answers["/sets/tiny.zip"] = [answer]
    with pytest.raises(RetryableError) as caught:
        load_beir(str(tmp_path / "out" / "tiny"), "test")
    assert caught.value.exit_code == EXIT_RETRY
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_checksum(folder: Path, host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host.answers["/sets/tiny.zip"] = [(200, zipped(folder), None)]
    monkeypatch.setitem(download.MD5, "tiny", "0" * 32)
    with pytest.raises(RetryableError, match=r"md5 .* published 000"):
        load_beir(str(tmp_path / "tiny3" / "tiny"), "test")
    right = hashlib.md5(host.answers["/sets/tiny.zip"][0][1], usedforsecurity=False).hexdigest()
    monkeypatch.setitem(download.MD5, "tiny", right)
    assert load_beir(str(tmp_path / "tiny3" / "tiny"), "test").queries


def test_a_name_nobody_knows_is_the_users(host: Host, tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"no such file or folder, and no BEIR set of that name.*scifact"):
        load_beir(str(tmp_path / "nope"), "test")
    with pytest.raises(InputMissingError, match="no such folder, archive or data set"):
        load_beir(str(tmp_path / "scifact.zip"), "test")


def test_an_archive_cannot_write_outside(host: Host, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("corpus.jsonl", "")
        archive.writestr("../evil", "x")
    host.answers["/sets/tiny.zip"] = [(200, buffer.getvalue(), None)]
    with pytest.raises(RetryableError, match="would leave the folder"):
        load_beir(str(tmp_path / "out" / "tiny"), "test")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "out" / "evil").exists()


def test_unreachable_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(download.BASE_URL_VARIABLE, "http://127.0.0.1:9/sets")
    monkeypatch.setattr(download, "FIRST_WAIT_SECONDS", 0.01)
    with pytest.raises(RetryableError, match="RMSEARCH_BEIR_URL"):
        load_beir(str(tmp_path / "scifact"), "test")


def test_the_packaged_demo() -> None:
    splits = {split: load_beir("demo", split) for split in ("train", "dev", "test")}
    assert all(beir.qrels and len(beir.corpus) >= 120 for beir in splits.values())
    assert not set(splits["train"].queries) & set(splits["test"].queries)


def test_scifact(scifact: str) -> None:
    beir = load_beir(scifact, "test")
    assert (len(beir.corpus), len(beir.queries), sum(map(len, beir.qrels.values()))) == (5183, 300, 339)


@pytest.fixture
def scifact() -> str:
    folder = Path(__file__).parents[2].resolve().parent / "shared" / "data" / "scifact"
    if not folder.is_dir():
        pytest.skip(f"no SciFact at {folder}")
    return str(folder)
