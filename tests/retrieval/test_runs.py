"""Run files: both forms, whole or not at all, malformed input at file:row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmsearch.errors import ConfigError, RecordError
from rmsearch.retrieval.runs import ordered, read_candidates, read_run, short, write_run

RUN = {"q 1": {"b": 0.5, "a": 0.5, "c": 0.75}, "2": {"x": -1.25}}
BLANKLESS = {"q1": RUN["q 1"], "2": RUN["2"]}


@pytest.mark.parametrize("name", ["r.json", "r.json.gz"])
def test_json_round_trip(tmp_path: Path, name: str) -> None:
    assert write_run(str(tmp_path / name), RUN.items(), "t") == 2
    found = read_run(str(tmp_path / name))
    assert found == RUN and list(found["q 1"]) == ["c", "a", "b"], "best first, ties by id"


@pytest.mark.parametrize("name", ["r.trec", "r.run", "r.txt", "r.trec.gz"])
def test_trec_round_trip(tmp_path: Path, name: str) -> None:
    write_run(str(tmp_path / name), BLANKLESS.items(), "my tag")
    assert read_run(str(tmp_path / name)) == BLANKLESS


def test_trec_columns(tmp_path: Path) -> None:
    write_run(str(tmp_path / "r.trec"), BLANKLESS.items(), "my tag")
    lines = (tmp_path / "r.trec").read_text().splitlines()
    assert lines == ["q1 Q0 c 1 0.75 my_tag", "q1 Q0 a 2 0.5 my_tag", "q1 Q0 b 3 0.5 my_tag", "2 Q0 x 1 -1.25 my_tag"]


def test_blank_ids_do_not_fit_six_columns(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hold blanks.*Name a \.json"):
        write_run(str(tmp_path / "r.trec"), RUN.items(), "t")
    assert list(tmp_path.iterdir()) == []


BAD = [
    ("r.trec", "q Q0 a 1 0.5\n", r"r\.trec:1: has 5 columns"),
    ("r.trec", "q Q0 a 1 0.5 t\nq Q0 b 2 nan t\n", r"r\.trec:2: the score 'nan'"),
    ("r.trec", "q Q0 a 1 0.5 t\nq Q0 a 2 0.4 t\n", r"r\.trec:2: query 'q' has the key 'a' twice"),
    ("r.json", '{"q": [1]}', "query 'q' must map to"),
    ("r.json", '{"q": {"a": "x"}}', "the score 'x' is no finite number"),
    ("r.json", '{"q": {"a": true}}', "the score True is no finite number"),
    ("r.json", "{", "not JSON"),
    ("c.json", '[{"query_id": "1", "key_ids": ["a"], "embed_relevances": []}]', "1 key_ids, but 0 embed_relevances"),
    ("c.json", '[{"query_id": "1", "key_ids": ["a", "a"], "embed_relevances": [1, 2]}]', "comes twice in key_ids"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_malformed(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecordError, match=message):
        read_run(str(tmp_path / name))


def test_runs_from_records(tmp_path: Path) -> None:
    first = [{"query_id": 7, "key_ids": ["a", "b"], "embed_relevances": [0.5, 0.9]}]
    (tmp_path / "e.json").write_text(json.dumps(first))
    assert read_run(str(tmp_path / "e.json")) == {"7": {"b": 0.9, "a": 0.5}}
    more = {**first[0], "pre_key_ids": ["a", "b"], "key_ids": ["a"], "rerank_relevances": [3.0]}
    (tmp_path / "r.jsonl").write_text(json.dumps(more) + "\n")
    assert read_run(str(tmp_path / "r.jsonl")) == {"7": {"a": 3.0}}


def test_candidates_come_best_first_from_either_form(tmp_path: Path) -> None:
    rows = [{"query_id": "7", "key_ids": ["a", "b"], "embed_relevances": [0.5, 0.9], "positive_key_ids": ["b"]}]
    (tmp_path / "e.json").write_text(json.dumps(rows))
    (tmp_path / "r.trec").write_text("7 Q0 a 2 0.5 t\n7 Q0 b 1 0.9 t\n")
    for name in ("e.json", "r.trec"):
        (found,) = read_candidates(str(tmp_path / name))
        assert (found.query_id, found.key_ids, found.embed_relevances) == ("7", ["b", "a"], [0.9, 0.5])
    (tmp_path / "e.json").write_text(json.dumps(rows * 2))
    with pytest.raises(RecordError, match=r"e\.json:2: the query id '7' comes twice"):
        list(read_candidates(str(tmp_path / "e.json")))


def test_short_numbers_are_the_same_float32() -> None:
    import numpy as np

    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert all(np.float32(short(float(v))) == v for v in values)
    assert list(ordered({"b": 1.0, "a": 1.0, "c": 2.0})) == ["c", "a", "b"]
