"""Making a corpus: files, folders and the hub; stable ids, samples by seed, whole or nothing, no made-up rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hub_host import serving
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsearch.datasets.corpus import read_corpus
from rmsearch.datasets.reservoir import reservoir
from rmsearch.errors import ConfigError, InputMissingError, RecordError, RejectedError
from rmsearch.stage import execute
from rmsearch.storage.records import read_json, read_records, write_records
from rmsearch.train.process_data import process_data

STAGE = [sys.executable, "-m", "rmsearch.train.process_data"]


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows with quotes, commas and line breaks in their texts."""
    texts = (f'text {i}, "quoted"\r\nnext line' for i in range(first, first + count))
    return [{"_id": f"d{first + i}", "text": text, "title": f"T{i}", "n": i} for i, text in enumerate(texts)]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write_records("corpus.jsonl", rows(50))
    return "corpus.jsonl"


def ids(path: str) -> list[str]:
    return [row.id for row in read_corpus(path)]


def files(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json", "parquet", "jsonl.gz"])
def test_files_of_every_format(source: str, suffix: str) -> None:
    import datasets
    import pandas as pd

    write_records(f"c.{suffix}", rows(50))
    run = execute(process_data, dataset_name=f"c.{suffix}", output_dir="out", n_small=8)
    assert run.counts["rows"] == 50 and run.counts["small_rows"] == 8
    frame = pd.read_csv("out/df.csv", dtype=str)
    assert list(frame.columns) == ["index", "text", "split", "_id", "title", "n"]
    assert frame["index"].tolist() == [f"d{i}" for i in range(50)] == ids("out/df.csv")
    assert frame["text"].tolist() == [row["text"] for row in rows(50)]
    small = pd.read_csv("out/df_small.csv", dtype=str)
    assert small["index"].is_unique and len(small) == 8 and small.columns.tolist() == frame.columns.tolist()
    assert small.equals(frame[frame["index"].isin(small["index"])].reset_index(drop=True)), "the same rows and ids"
    loaded = datasets.load_from_disk("out")
    assert list(loaded) == ["train"] and loaded["train"]["text"] == frame["text"].tolist()
    assert loaded["train"]["n"][:2] == (["0", "1"] if suffix == "csv" else [0, 1])


def test_a_folder_of_texts_and_the_split_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "sub/b.md"):
        Path("texts", name).parent.mkdir(parents=True, exist_ok=True)
        Path("texts", name).write_text(f"words of {name}")
    execute(process_data, dataset_name="texts", output_dir="out", split="test")
    assert ids("out/df.csv") == ids("out/df_small.csv") == ["a.txt", "sub/b.md"]
    assert datasets.load_from_disk("out")["test"]["split"] == ["test", "test"]


def test_other_columns_move_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_records("c.jsonl", [{"key": "k", "index": 7, "text": "short", "body": "long", "tags": ["a", "b"]}])
    execute(process_data, dataset_name="c.jsonl", output_dir="out", text_column="body", id_column="key")
    (row,) = read_records("out/df.csv")
    assert row == {
        "index": "k", "text": "long", "split": "train", "key": "k", "source_index": "7", "source_text": "short",
        "tags": '["a", "b"]',
    }  # fmt: skip


def test_samples_by_seed(source: str) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        execute(process_data, dataset_name=source, output_dir=out, n_sample=20, n_small=5, random_seed=seed)
    a, b, c = files("a"), files("b"), files("c")
    state = "train/state.json"
    assert {n: d for n, d in a.items() if n != state} == {n: d for n, d in b.items() if n != state}
    assert a["df.csv"] != c["df.csv"] and a["df_small.csv"] != c["df_small.csv"]
    taken = ids("a/df.csv")
    assert len(set(taken)) == 20 and set(taken) < {f"d{i}" for i in range(50)}
    assert taken != sorted(taken, key=lambda name: int(name[1:])), "in random order"
    assert set(ids("a/df_small.csv")) < set(taken)
    execute(process_data, dataset_name=source, output_dir="all", n_sample=500)
    assert sorted(ids("all/df.csv")) == sorted(f"d{i}" for i in range(50))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 99))
def test_a_reservoir_holds_distinct_items_in_order(size: int, count: int, seed: int) -> None:
    with reservoir(size, seed) as sample:
        for item in range(count):
            if (slot := sample.slot()) is not None:
                sample.put(slot, str(item).encode())
        kept = [int(item) for item in sample.items()]
        assert len(kept) == min(size, count) == len(set(kept)) and kept == sorted(kept)
        assert sorted(int(item) for item in sample.items(shuffled=True)) == kept


def test_a_reservoir_takes_every_position_equally_often() -> None:
    taken: Counter[int] = Counter()
    for seed in range(4000):
        with reservoir(3, seed) as sample:
            for item in range(12):
                if (slot := sample.slot()) is not None:
                    sample.put(slot, bytes([item]))
            taken.update(item[0] for item in sample.items())
    assert all(abs(taken[item] - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for item in range(12))


def test_rows_without_text_are_set_aside(source: str) -> None:
    write_records("gaps.jsonl", [*rows(50), {"_id": "e", "text": " ", "title": "", "n": 1}, {"_id": "f", "n": 1}])
    with pytest.raises(RejectedError, match=r"2 of 52 records were rejected \(2 × text is empty\)"):
        execute(process_data, dataset_name="gaps.jsonl", output_dir="out")
    assert not Path("out").exists()
    run = execute(process_data, dataset_name="gaps.jsonl", output_dir="out", max_reject_rate=0.1)
    assert run.counts["rejected"] == 2 and len(ids("out/df.csv")) == 50
    assert [r["record"]["id"] for r in read_records("out.rejects.jsonl")] == ["e", "f"]


def test_it_does_nothing_twice_and_leaves_others_files_alone(source: str) -> None:
    execute(process_data, dataset_name=source, output_dir="out")
    assert execute(process_data, dataset_name=source, output_dir="out").skipped
    Path("out/query_recs.json").write_text("[]")  # of a later stage
    before, time_of = files("out"), Path("out/df.csv").stat().st_mtime_ns
    run = execute(process_data, dataset_name=source, output_dir="out")
    assert run.counts["rows"] == 50 and Path("out/df.csv").stat().st_mtime_ns == time_of, "not written again"
    assert execute(process_data, dataset_name=source, output_dir="out").skipped
    execute(process_data, dataset_name=source, output_dir="out", split="dev", random_seed=7)
    after = files("out")
    assert after["query_recs.json"] == b"[]" and "dev/state.json" in after and "train/state.json" not in after
    assert json.loads(after["dataset_dict.json"]) == {"splits": ["dev"]} != json.loads(before["dataset_dict.json"])


BAD: list[tuple[str, str, dict[str, Any], type[Exception], str]] = [
    ("c.jsonl", "", {}, RecordError, r"c\.jsonl: is empty"),
    ("c.jsonl", '{"text": " "}\n', {"max_reject_rate": 1.0}, RecordError, r"c\.jsonl: is empty"),
    ("c.jsonl", '{"body": "x"}\n', {}, RecordError, r"c\.jsonl:1: has no column 'text'\. Name one with --text-column"),
    ("c.csv", "index,text\n1,a\n1,b\n", {}, RecordError, r"c\.csv:3: the id '1' comes twice, first at c\.csv:2"),
    ("c.jsonl", '{"text": "a"}\n{"text": "b", "x": 1}\n', {}, RecordError, r":2: has the field 'x', which the first"),
    ("c.jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n', {}, RecordError, r"c\.jsonl:1 to 2: n: "),
    ("c.jsonl", '{"text": "a"}\n{"te', {}, RecordError, r"c\.jsonl:2: "),
    ("c.jsonl", '{"text": "a"}\n', {"id_column": "key"}, RecordError, r"c\.jsonl:1: has no id column 'key'"),
    ("c.jsonl", '{"text": "a"}\n', {"dataset_config": "x"}, ConfigError, "is for hub data sets"),
    ("c.jsonl", '{"text": "a"}\n', {"split": "../up"}, ConfigError, "is not the name of one split"),
    ("other.txt", "", {}, InputMissingError, r"c\.jsonl: no such file or folder"),
]


@pytest.mark.parametrize(("name", "content", "more", "error", "message"), BAD)
def test_bad_input_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, more: Any, error: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    with pytest.raises(error, match=message):
        execute(process_data, dataset_name=name if name.startswith("c.") else "c.jsonl", output_dir="out", **more)
    assert [path.name for path in tmp_path.iterdir() if "rejects" not in path.name] == [name]


def test_killed_in_the_middle_it_leaves_nothing_and_starts_anew(source: str, tmp_path: Path) -> None:
    write_records("big.jsonl", rows(60_000))
    command = [*STAGE, "--dataset-name", "big.jsonl", "--output-dir", "out", "--n-small", "100"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not any(path.suffix == ".arrow" for path in tmp_path.rglob(".out.*/*/*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9 and not Path("out").exists()
    execute(process_data, dataset_name="big.jsonl", output_dir="out", n_small=100)
    execute(process_data, dataset_name="big.jsonl", output_dir="whole", n_small=100)
    assert files("out") == files("whole")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no half folder stays"


@pytest.mark.s3
def test_from_s3_to_s3(source: str, s3_bucket: str) -> None:
    write_records(f"{s3_bucket}/in/c.csv.gz", rows(20))
    execute(process_data, dataset_name=f"{s3_bucket}/in/c.csv.gz", output_dir=f"{s3_bucket}/out", n_small=5)
    assert ids(f"{s3_bucket}/out/df.csv") == [f"d{i}" for i in range(20)]
    assert read_json(f"{s3_bucket}/out/dataset_dict.json") == {"splits": ["train"]}
    assert len(ids(f"{s3_bucket}/out/df_small.csv")) == 5


def on_the_hub(url: str, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The documented command in a process of its own, whose hub is at ``url``."""
    command = [*STAGE, "--dataset-name", "owner/corpus", "--output-dir", "out", *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": "hf", "HF_HUB_DISABLE_XET": "1", **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_hub_data_set(source: str, stream: bool) -> None:
    """D1: sampled by seed, streamed or not."""
    write_records("shard.jsonl", [{"text": row["text"], "n": row["n"]} for row in rows(40)])
    with serving("owner/corpus", {"data/train.jsonl": Path("shard.jsonl").read_bytes()}) as hub:
        flags = ["--n-sample", "10", *(["--stream"] if stream else [])]
        first = on_the_hub(hub.url, *flags)
        assert first.returncode == 0, first.stderr
        found = list(read_records("out/df.csv"))
        assert len(found) == 10 and {row["text"] for row in found} <= {row["text"] for row in rows(40)}
        again = on_the_hub(hub.url, *flags, "--force")
        assert again.returncode == 0 and list(read_records("out/df.csv")) == found
        if not stream:
            assert all(row["index"] == row["n"] for row in found), "the id is the position in the split"
        missing = on_the_hub(hub.url, "--split", "nothing", "--force", *flags)
        assert missing.returncode == 2 and "nothing" in missing.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_tried_again_later(source: str) -> None:
    with serving("owner/corpus", {}) as hub:
        url = hub.url
    for more in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_DATASETS_OFFLINE": "1"}):
        found = on_the_hub(url, **more)
        assert found.returncode == 75, found.stderr
        assert found.stderr.splitlines()[-1].startswith("error: owner/corpus: the hub did not give the data set")
        assert not Path("out").exists()


def test_an_unknown_data_set_is_the_users_to_mend(source: str) -> None:
    with serving("someone/else", {}) as hub:
        found = on_the_hub(hub.url)
    assert found.returncode == 2 and "error: owner/corpus: " in found.stderr
    assert not Path("out").exists()
