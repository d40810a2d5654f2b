"""The reader of preference files: both forms of a pair, and malformed records at file:row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pair_sets
import pytest

from rmsearch.datasets.preferences import common_template, read_pairs, read_preferences
from rmsearch.datasets.records import MessagePair, PreferencePair
from rmsearch.errors import RecordError
from rmsearch.storage.records import write_records


def test_raw_and_upstream_records_give_the_same_pairs(tmp_path: Path) -> None:
    rows = pair_sets.pairs(5)
    raw = pair_sets.write(tmp_path / "raw.json", rows)
    chats = pair_sets.write(tmp_path / "chats.json", [pair_sets.upstream_form(row) for row in rows])
    assert [pair[:4] for pair in read_pairs(raw)] == [pair[:4] for pair in read_pairs(chats)]
    assert common_template([chats], read_pairs) == "upstream_lora"
    assert common_template([raw], read_pairs) is None
    assert common_template([raw, chats], read_pairs) is None


def test_a_question_and_answer_chat_is_query_and_key(tmp_path: Path) -> None:
    def chat(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "which gene?"}, {"role": "assistant", "content": answer}]

    path = pair_sets.write(tmp_path / "qa.json", [{"chosen_msg": chat("this"), "rejected_msg": chat("that")}])
    assert next(read_pairs(path))[:3] == ("which gene?", "this", "that")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"query": "q", "chosen_key": "same", "rejected_key": "same"}, "same text"),
        ({"query": "q", "chosen_key": "a"}, "rejected_key"),
        ({"query": "q", "chosen_key": "a", "rejected_key": 3}, "rejected_key"),
        (
            {"chosen_msg": [{"role": "user", "content": "a"}], "rejected_msg": [{"role": "user", "content": "b"}]},
            "no known prompt",
        ),
    ],
)
def test_bad_rows_are_refused_with_file_and_row(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = pair_sets.write(tmp_path / "bad.json", [*pair_sets.pairs(2), row])
    with pytest.raises(RecordError, match=problem) as error:
        list(read_pairs(path))
    assert "bad.json:2" in str(error.value)


def test_an_empty_cell_of_a_csv_is_no_margin(tmp_path: Path) -> None:
    write_records(
        str(tmp_path / "a.csv"), [row | {"margin": m} for row, m in zip(pair_sets.pairs(2), (0.5, None), strict=True)]
    )
    assert [pair.margin for pair in read_pairs(str(tmp_path / "a.csv"))] == [0.5, None]


def test_chats_are_refused_with_the_line_of_a_jsonl(tmp_path: Path) -> None:
    chats = [pair_sets.upstream_form(row) for row in pair_sets.pairs(2)]
    write_records(str(tmp_path / "a.jsonl"), [chats[0], chats[0] | {"rejected_msg": chats[1]["rejected_msg"]}])
    with pytest.raises(RecordError, match=r"a\.jsonl:2: .*do not share one query"):
        list(read_pairs(str(tmp_path / "a.jsonl")))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no pairs"):
        list(read_pairs(pair_sets.write(tmp_path / "none.json", [])))


def test_preferences_in_both_forms(tmp_path: Path) -> None:
    raw = {"query": "q", "chosen_key": "a", "rejected_key": "b", "query_id": 3, "margin": 0.5, "extra": 1}
    chat = {
        "chosen_msg": [{"role": "user", "content": "q a"}],
        "rejected_msg": [{"role": "user", "content": "q b"}],
        "chosen_sentence_id": 12,
        "query_id": 0,
    }
    (tmp_path / "p.json").write_text(json.dumps([raw, chat]))
    first, second = read_preferences(str(tmp_path / "p.json"))
    assert isinstance(first, PreferencePair) and first.query_id == "3" and first.margin == 0.5
    assert isinstance(second, MessagePair) and second.chosen_sentence_id == "12"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "q", "chosen_key": "a"}, r"p\.jsonl:2: .*rejected_key: Field required"),
        ({"query": "q", "chosen_key": "a", "rejected_key": "a"}, "the same text"),
        ({"query": "q", "chosen_key": "a", "rejected_key": "b", "margin": -1}, "margin"),
        ({"chosen_msg": [], "rejected_msg": []}, "chosen_msg"),
        ({"chosen_msg": [{"role": "robot", "content": ""}], "rejected_msg": []}, "role"),
    ],
)
def test_malformed_preferences(tmp_path: Path, record: object, message: str) -> None:
    good = {"query": "q", "chosen_key": "a", "rejected_key": "b"}
    (tmp_path / "p.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(RecordError, match=message):
        list(read_preferences(str(tmp_path / "p.jsonl")))
