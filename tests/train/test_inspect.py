"""`train inspect`: what it measures, that each check passes a clean set and fails its own spoiled one, and the page."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pair_sets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rmsearch
from rmsearch.errors import RecordError, RejectedError
from rmsearch.reports.page import counted, percent
from rmsearch.reports.preference_columns import Columns
from rmsearch.reports.preference_entries import Entry
from rmsearch.reports.preference_measures import auc, compared, contradictions, histogram, measure
from rmsearch.stage import execute
from rmsearch.storage import uri as storage
from rmsearch.storage.records import write_records
from rmsearch.train.inspect import inspect

VOCABULARY = [f"word{i}" for i in range(800)]
Rows = list[dict[str, Any]]


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(VOCABULARY) for _ in range(length))


def clean(count: int = 120, seed: int = 0) -> Rows:
    """Pairs with nothing wrong: two for each query, keys of any length, each once."""
    rng = random.Random(seed)
    rows: Rows = []
    for i in range(count):
        query = rows[-1]["query"] if i % 2 else sentence(rng, 8)
        keys = {side: sentence(rng, rng.randint(20, 60)) for side in ("chosen_key", "rejected_key")}
        ids = {"query_id": f"{seed}-{i // 2}", "chosen_key_id": f"c{seed}-{i}", "rejected_key_id": f"r{seed}-{i}"}
        rows.append({"query": query, **keys, **ids})
    return rows


def look(path: Path, rows: Rows, test: Rows | None = None, **options: Any) -> dict[str, Any]:
    """What the stage writes as JSON."""
    train = path / "train.jsonl"
    write_records(str(train), rows)
    if test is not None:
        write_records(str(path / "test.jsonl"), test)
        options["dataset_list_test"] = str(path / "test.jsonl")
    out = path / "facts.json"
    options = {"output": str(path / "page.html"), "output_json": str(out)} | options
    execute(inspect, dataset_list_train=[str(train)], force=True, **options)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def failing(facts: dict[str, Any]) -> dict[str, str]:
    """Name of the failed check -> its line; a test set's checks under "name (test)"."""
    return {check["line"].partition(":")[0]: check["line"] for check in facts["checks"] if not check["passed"]}


def changed(rows: Rows, share: float, **change: Any) -> Rows:
    """The rows, the first ``share`` of them changed; a change may be a function of the row."""
    cut = int(len(rows) * share)
    return [
        row | ({name: new(row) if callable(new) else new for name, new in change.items()} if i < cut else {})
        for i, row in enumerate(rows)
    ]


def test_a_clean_set_passes_every_check(tmp_path: Path) -> None:
    facts = look(tmp_path, clean(), clean(40, seed=1), strict=True)
    assert failing(facts) == {} and len(facts["checks"]) == 13
    counts = facts["sets"]["train"]["counts"]
    assert (counts["pairs"], counts["queries"], counts["keys"], counts["repeated_pairs"]) == (120, 60, 240, 0)
    assert facts["overlap"] | {"keys": 0} == {
        "queries": 20, "same": 0, "same_share": 0.0, "nearly": 0, "nearly_share": 0.0, "ids": 20, "same_ids": 0,
        "other_text": 0, "keys": 0, "same_keys": 0,
    }  # fmt: skip


def test_length_bias_fails_either_way(tmp_path: Path) -> None:
    long = changed(clean(), 0.7, chosen_key=lambda row: row["chosen_key"] + " more" * 60)
    found = failing(look(tmp_path, long))
    assert list(found) == ["length"]
    assert re.fullmatch(
        r"length: the longer key is chosen in 8\d % of the pairs; length alone predicts the choice "
        r"\(right in 8\d %, AUC 0\.8\d, by \w+\)",
        found["length"],
    )
    short = changed(clean(), 0.9, rejected_key=lambda row: row["rejected_key"] + " more" * 60)
    assert "the shorter key is chosen in 9" in failing(look(tmp_path, short))["length"]
    assert failing(look(tmp_path, long, max_length_bias=0.95)) == {}


def test_one_key_that_is_chosen_most_fails(tmp_path: Path) -> None:
    text = sentence(random.Random(9), 40)
    found = failing(look(tmp_path, changed(clean(), 0.5, chosen_key=text, chosen_key_id="always")))
    assert found == {"key": "key: one key (always) is chosen in 50 % of the pairs (60 of 120)"}
    facts = look(tmp_path, changed(clean(), 0.2, chosen_key=text))
    assert failing(facts) == {}
    top = facts["sets"]["train"]["keys"]["chosen_most"]
    assert (top[0]["key"], top[0]["chosen"], top[0]["rejected"], len(top)) == (text, 24, 0, 1)


def test_a_template_that_dominates_fails(tmp_path: Path) -> None:
    rows = changed(clean(), 0.5, query=lambda row: f"What is the {row['query']}")
    found = failing(look(tmp_path, rows))
    assert found == {"template": "template: 50 % of the queries begin with the same words ('what is the')"}
    assert failing(look(tmp_path, rows, opening_words=4)) == {}
    prompts = changed([row | {"prompt": "b@1"} for row in clean()], 0.75, prompt="a@1")
    assert failing(look(tmp_path, prompts)) == {"template": "template: the prompt a@1 made 75 % of the pairs"}
    assert failing(look(tmp_path, [row | {"prompt": "a@1"} for row in clean()])) == {}


def test_contradictions_fail(tmp_path: Path) -> None:
    rows = clean()
    turned = [row | {"chosen_key": row["rejected_key"], "rejected_key": row["chosen_key"]} for row in rows[:6]]
    other_query = [row | {"query": "another one entirely"} for row in turned]
    assert failing(look(tmp_path, rows + other_query)) == {}
    facts = look(tmp_path, rows + turned)
    assert (
        list(failing(facts)) == ["contradictions"] and "12 pairs have their reverse" in failing(facts)["contradictions"]
    )
    example = facts["sets"]["train"]["contradictions"]["examples"][0]
    row = next(row for row in rows if row["query"] == example["query"])
    assert {example["one"], example["other"]} == {row["chosen_key"], row["rejected_key"]}


def test_near_duplicates_fail(tmp_path: Path) -> None:
    rows, base = clean(), clean()[0]["query"]
    for i, row in enumerate(rows[:60]):
        row["query"] = f"{base} and all that goes with it in the end and after {i // 20}"
    facts = look(tmp_path, rows, max_near_duplicates=0.05)
    assert list(failing(facts)) == ["near-duplicate queries"]
    assert facts["sets"]["train"]["near_duplicates"]["queries"]["found"] == 2
    rows = clean()
    copies = [row | {"rejected_key": rows[i]["rejected_key"] + "!"} for i, row in enumerate(rows[1:], 0)]
    assert list(failing(look(tmp_path, rows + copies))) == ["near-duplicate keys"]
    few = look(tmp_path, rows + copies, compared_texts=50)["sets"]["train"]["near_duplicates"]["keys"]
    assert few["compared"] == 50


def test_overlap_of_queries_fails_ids_alone_do_not(tmp_path: Path) -> None:
    train, test = clean(), clean(40, seed=1)
    shared = changed(test, 0.2, query=lambda row: train[int(row["query_id"][2:]) * 2]["query"].upper() + "!")
    facts = look(tmp_path, train, shared)
    assert failing(facts) == {
        "overlap": "overlap: 20 % of the test queries (4 of 20) are in the training set, 0 % more nearly"
    }
    nearly = changed(test, 0.1, query=lambda row: f"{train[0]['query']} " * 4 + "x")
    assert facts["overlap"]["same_ids"] == 0
    long = changed(train, 0.1, query=f"{train[0]['query']} " * 4 + "y")
    facts = look(tmp_path, long, nearly)
    assert facts["overlap"]["same"] == 0 and facts["overlap"]["nearly"] == 1
    renamed = [row | {"query_id": row["query_id"].replace("1-", "0-")} for row in test]
    facts = look(tmp_path, train, renamed)
    assert (facts["overlap"]["same_ids"], facts["overlap"]["other_text"], failing(facts)) == (20, 20, {})


def test_a_judges_report_is_found_and_judged(tmp_path: Path) -> None:
    def reported(**counts: Any) -> dict[str, Any]:
        write_records(str(tmp_path / "train.jsonl"), clean())
        write_records(str(tmp_path / "test.jsonl"), clean(40, seed=1))
        outputs = {str(tmp_path / name): storage.digest(str(tmp_path / name)) for name in ("train.jsonl", "test.jsonl")}
        record = {"stage": "train.judge_dataset", "fingerprint": "f", "outputs": outputs, "counts": counts}
        (tmp_path / "train.jsonl.run.json").write_text(json.dumps(record))
        return look(tmp_path, clean(), clean(40, seed=1))

    facts = reported(judged=200, ties=20, tie_rate=0.1, agreement=0.9, first_preferred=0.52)
    assert failing(facts) == {} and len(facts["checks"]) == 15 and len(facts["reports"]) == 1
    assert "first_preferred" in (tmp_path / "page.html").read_text()
    facts = reported(judged=200, ties=120, tie_rate=0.6, agreement=0.4, first_preferred=0.31)
    assert failing(facts) == {
        "ties": "ties: the judge found 60 % ties",
        "position bias": "position bias: the judge preferred the text shown first in 31 % of its answers "
        "(50 % is no bias)",
    }


def test_failed_checks_are_warnings_and_with_strict_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, page = changed(clean(), 0.5, chosen_key=sentence(random.Random(9), 40)), tmp_path / "page.html"
    look(tmp_path, rows)
    said = capsys.readouterr()
    assert 'check="key: one key' in said.err and "remedy=" in said.err and str(page) in said.out
    assert execute(inspect, dataset_list_train=[str(tmp_path / "train.jsonl")], output=str(page)).skipped
    said = capsys.readouterr()
    assert 'check="key: one key' in said.err and str(page) in said.out  # asking twice says the same
    page.unlink()
    with pytest.raises(RejectedError, match="--strict: key: failed") as error:
        look(tmp_path, rows, strict=True)
    assert error.value.exit_code == 2 and page.exists()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_facts(tmp_path: Path, name: str) -> None:
    rows = [row | {"margin": 0.5 if i % 3 else None, "query-type": "titles"} for i, row in enumerate(clean(40))]
    expected = look(tmp_path, rows)["sets"]["train"]
    write_records(str(tmp_path / name), rows)
    out = tmp_path / "other.json"
    execute(inspect, dataset_list_train=[str(tmp_path / name)], output=str(tmp_path / "p.html"), output_json=str(out))
    assert json.loads(out.read_text())["sets"]["train"] | {"files": 0} == expected | {"files": 0}
    assert expected["scores"]["margin"]["known"] == 26
    assert expected["types"] == [{"query_type": "titles", "source": None, "pairs": 40}]


def test_upstreams_chats_are_the_same_pairs(tmp_path: Path) -> None:
    rows = pair_sets.pairs(40)
    raw = look(tmp_path, rows)["sets"]["train"]
    chats = look(tmp_path, [pair_sets.upstream_form(row) for row in rows])["sets"]["train"]
    assert chats["counts"] == raw["counts"] and chats["lengths"] == raw["lengths"]


def test_advanced_rows_count_pair_by_pair(tmp_path: Path) -> None:
    texts = [row["chosen_key"] for row in clean(4)]
    batch = [
        {"query": "which one", "key": text, "key_id": i, "query_id": 5, "query-type": "titles"}
        for i, text in enumerate(texts)
    ]
    ladder = [{"query": query, "key": texts[0]} for query in ("the first", "the second")]
    unlike = [{"query": f"q{i}", "key": text} for i, text in enumerate(texts[:2])]
    rows: Rows = [
        {"batch": batch, "dpo_pairs": [[0, 1], [0, 2], [3, 2]], "margins": [1.0, 2.0, 3.0]},
        {"batch": ladder, "dpo_pairs": [[0, 1]]},
        {"batch": unlike, "dpo_pairs": [[1, 0]]},
    ]
    facts = look(tmp_path, rows, max_key_share=1.0)
    counts = facts["sets"]["train"]["counts"]
    assert (counts["pairs"], counts["queries"], counts["compares_queries"], counts["compares_both"]) == (5, 3, 1, 1)
    assert facts["sets"]["train"]["scores"]["margin"]["known"] == 3
    swapped = next(pair for pair in facts["sample"] if pair["compares"] == "queries")
    assert (swapped["query"], swapped["chosen"], swapped["rejected"]) == (texts[0], "the first", "the second")
    assert facts["sample"][0]["chosen_id"] == "0" and facts["sample"][0]["query_type"] == "titles"


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], r"a\.json: holds no pairs\. Make some"),
        ([{"query": "q", "keys": []}], r"a\.json: holds no preferences \(its fields: keys, query\)"),
        ([{"query": "q", "chosen_key": "a", "rejected_key": "a"}], r"a\.json:0: .*the same text"),
        ([{"query": "q", "chosen_key": "a", "rejected_key": "b"}, {"batch": []}], r"a\.json:1: query: Field required"),
        ([{"query": "q", "chosen_key": "a", "rejected_key": "b", "confidence": 7}], r"a\.json:0: confidence:"),
        ([{"batch": [{"query": "q", "key": "a"}] * 2, "dpo_pairs": [[0, 1]]}], r"a\.json:0: .*the same text"),
        ([{"batch": [{"query": "q", "key": "a"}] * 2, "dpo_pairs": [[0, 5]]}], r"a\.json:0: .*does not fit"),
        (
            [{"chosen_msg": [{"role": "user", "content": "x"}], "rejected_msg": [{"role": "user", "content": "y"}]}],
            r"a\.json:0: .*known prompt",
        ),
    ],
)
def test_bad_files_get_one_line(tmp_path: Path, rows: Rows, problem: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(RecordError, match=problem) as error:
        execute(inspect, dataset_list_train=[str(tmp_path / "a.json")], output=str(tmp_path / "page.html"))
    assert "\n" not in str(error.value) and not (tmp_path / "page.html").exists()


class Checker(HTMLParser):
    """Counts open elements and what would load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.loads += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.loads += [name for name, _ in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_loads_nothing_and_escapes_data(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & <b>"
    rows = [row | {"query": f"{evil} {row['query']}", "source": evil, "margin": 1.0} for row in clean(30)]
    facts = look(tmp_path, rows, clean(30), examples=20)
    page = (tmp_path / "page.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and checker.loads == [] and "nan" not in page
    assert len(facts["sample"]) == 20 and "20 pairs to read" in checker.texts
    assert all(pair["chosen"] in checker.texts for pair in facts["sample"])
    assert look(tmp_path, rows)["sample"] == facts["sample"] != look(tmp_path, rows, seed=1)["sample"]
    assert look(tmp_path, rows, examples=0)["sample"] == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(positive: list[int], negative: list[int]) -> None:
    expected = np.mean([(a > b) + (a == b) / 2 for a in positive for b in negative])
    assert auc(np.array(positive), np.array(negative)) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_a_guess_by_length_is_never_worse_than_chance(pairs: list[tuple[int, int]]) -> None:
    chosen, rejected = (np.array(side, np.uint32) for side in zip(*pairs, strict=True))
    facts, turned = compared(chosen, rejected), compared(rejected, chosen)
    assert 0.5 <= facts["guess"] <= 1 and facts["guess"] == pytest.approx(turned["guess"])
    assert facts["auc"] == pytest.approx(1 - turned["auc"])
    assert facts["longer_chosen"] + facts["equal"] + turned["longer_chosen"] == pytest.approx(1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25))
def test_contradictions_are_the_pairs_whose_reverse_is_there(triples: list[tuple[int, int, int]]) -> None:
    triples = [(q, a, b) for q, a, b in triples if a != b] or [(0, 0, 1)]
    facts = contradictions(*(np.array(column, np.uint64) for column in zip(*triples, strict=True)))
    assert facts["pairs"] == sum((q, b, a) in triples for q, a, b in triples)
    for example in facts["examples"]:
        one, other = triples[example["one"].position], triples[example["other"].position]
        assert one[0] == other[0] and one[1:] == other[:0:-1]


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50),
    st.sampled_from([np.float32, np.uint32]),
)
def test_every_value_is_in_a_bin(values: list[float], kind: type) -> None:
    series = {"a": np.abs(np.array(values)).astype(kind), "b": np.abs(np.array(values[:1])).astype(kind)}
    facts = histogram(series)
    assert {name: sum(counts) for name, counts in facts["counts"].items()} == {"a": len(values), "b": 1}
    assert facts["width"] > 0 and all(len(counts) <= 41 for counts in facts["counts"].values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from("abcd")] * 3).filter(lambda t: t[1] != t[2]), min_size=1, max_size=30))
def test_counts_are_those_of_the_texts(triples: list[tuple[str, str, str]]) -> None:
    columns = Columns(opening_words=3, compared_texts=10)
    for triple in triples:
        columns.add(Entry(*triple))
    facts = measure(columns, 0.8)
    counts = facts["counts"]
    assert counts["queries"] == len({q for q, _, _ in triples})
    assert counts["keys"] == len({key for _, *keys in triples for key in keys})
    assert counts["repeated_pairs"] == len(triples) - len(set(triples))
    most = max([c for _, c, _ in triples].count(key) for key in "abcd")
    assert facts["keys"]["chosen_most"][0]["chosen"] == most


@pytest.mark.parametrize("name", ["inspect", "mine"])
def test_files_of_the_folder_can_be_run_by_path(name: str) -> None:
    path = Path(rmsearch.__file__).parent / "train" / f"{name}.py"
    ran = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, cwd="/")
    assert ran.returncode == 0 and f"rmsearch train {name}" in ran.stdout, ran.stderr


def test_shares_and_counts_read_well() -> None:
    assert [percent(share) for share in (0, 0.0001, 0.004, 0.083, 0.5, 0.996, 0.9999, 1)] == [
        "0 %", "< 0.1 %", "0.4 %", "8.3 %", "50 %", "99.6 %", "> 99.9 %", "100 %",
    ]  # fmt: skip
    assert [counted(1, "query"), counted(1200, "query"), counted(2, "key")] == ["1 query", "1,200 queries", "2 keys"]
