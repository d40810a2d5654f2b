"""Retrieval for training data: exact top keys by vectors and by rewards, resumed after kills, bad input refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_models import FakeScorer, bag, overlap, use_fakes
from tiny_sets import write_beir

import rmsearch.engines
from rmsearch.cli import run_command
from rmsearch.datasets.beir import load_beir
from rmsearch.datasets.chain import QueryRecord, RelevanceRecord
from rmsearch.datasets.records import PreferencePair
from rmsearch.errors import ConfigError, InputMissingError, RecordError, RetryableError
from rmsearch.retrieval.vectors import ExactSearch
from rmsearch.scoring import journaled
from rmsearch.stage import execute
from rmsearch.storage.records import read_models, read_records, write_records
from rmsearch.train.get_top_relevant_keys_embed import get_top_relevant_keys_embed as embed_keys
from rmsearch.train.get_top_relevant_keys_rm import get_top_relevant_keys_rm as reward_keys
from rmsearch.train.make_test_set import make_test_set

WITH_FAKES = """
import sys
sys.path.insert(0, {tests!r})
from fake_models import use_fakes
from rmsearch.cli import main
from rmsearch.train.{name} import {name}
use_fakes(setattr)
main({name})
"""
WORDS = ["cat", "dog", "tax", "rain", "bread", "chess", "piano", "moon", "old", "new", "red", "blue"]


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 4, replace=False)) + f" {seed}{i}" for i in range(count)]


KEYS = texts(60, 1)
QUERIES = texts(9, 2)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with queries.json and keys.csv, current, and models that need no weights."""
    monkeypatch.chdir(tmp_path)
    use_fakes(monkeypatch.setattr)
    write_records("keys.csv", [{"index": f"row{i}", "text": text, "more": "x"} for i, text in enumerate(KEYS)])
    rows = [{"query": text, "df_id": f"row{i}", "query-type": "questions"} for i, text in enumerate(QUERIES)]
    write_records("queries.json", rows)
    return tmp_path


def options(**more: Any) -> dict[str, Any]:
    return {"queries_json": "queries.json", "keys_csv": "keys.csv", "model_name": "m", "k_key": 7, **more}


def with_fakes(name: str, flags: str) -> list[str]:
    """The command of a stage in a process of its own, with models that need no weights."""
    code = WITH_FAKES.format(tests=str(Path(__file__).parents[1] / "support"), name=name)
    return [sys.executable, "-c", code, *flags.split()]


def nearest(query: str, k: int) -> list[str]:
    scores = [float(bag(query) @ bag(key)) for key in KEYS]
    return [f"row{i}" for i in sorted(range(len(KEYS)), key=lambda i: (-np.float32(scores[i]), i))[:k]]


def best(query: str, among: list[str], k: int) -> list[str]:
    numbers = [int(name.removeprefix("row")) for name in among]
    order = sorted(numbers, key=lambda i: (-np.float32(overlap(query, KEYS[i])), i))
    return [f"row{i}" for i in order[:k]]


def test_the_nearest_keys_of_each_query(place: Path) -> None:
    run = execute(embed_keys, **options())
    records = json.loads(Path("relevance_records_embed.json").read_text())
    assert list(records[0]) == ["query", "query_id", "df_id", "query_type", "keys"]
    assert list(records[0]["keys"][0]) == ["key_id", "key", "similarity"]
    for number, record in enumerate(records):
        assert record["query_id"] == str(number) and record["df_id"] == f"row{number}"
        similarities = [key["similarity"] for key in record["keys"]]
        assert similarities == sorted(similarities, reverse=True) and len(similarities) == 7
        for key in record["keys"]:
            text = KEYS[int(key["key_id"].removeprefix("row"))]
            assert key["key"] == text and key["similarity"] == pytest.approx(float(bag(record["query"]) @ bag(text)))
        assert {key["key_id"] for key in record["keys"]} == set(nearest(record["query"], 7))
    assert run.counts["queries"] == 9 and run.counts["keys"] == 60 == int(run.counts["embedded"]) - 9
    assert sorted(path.name for path in place.iterdir()) == [
        "keys.csv", "queries.json", "relevance_records_embed.json", "relevance_records_embed.json.run.json",
    ]  # fmt: skip
    assert execute(embed_keys, **options()).skipped


def test_the_documented_command(place: Path) -> None:
    """D4: with upstream's flags; a corpus with fewer keys than asked for."""
    flags = (
        "--queries-json queries.json --keys-csv keys.csv --key-column text --model-name m --tensor-parallel-size 1 "
        "--num-instances 1 --k-key 100 --similarity-device auto --max-num-seqs 64 --query-batch-size 512 "
        "--key-batch-size 128 --gpu-memory-utilization 0.9 --output out/records.jsonl"
    )
    assert run_command(embed_keys, flags.split()) == 0
    records = list(read_models("out/records.jsonl", RelevanceRecord))
    assert [len(record.keys) for record in records] == [60] * 9 and records[0].query_type == "questions"


def test_named_vector_folders_serve_another_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOG", "log")
    kept = {"query_checkpoint": "q.vectors", "key_checkpoint": "k.vectors", "key_batch_size": 16}
    execute(embed_keys, **options(**kept))
    asked = Path("log").read_text().splitlines()
    assert len(asked) == len(set(asked)) == 69, "each text once"
    run = execute(embed_keys, **options(**kept, k_key=3, output="other.json"))
    assert run.counts["cached"] == 69 and run.counts["embedded"] == 0
    write_records("queries.json", [{"query": "another one"}])
    run = execute(embed_keys, **options(**kept, k_key=3, output="other.json"))
    assert (run.counts["cached"], run.counts["embedded"]) == (60, 1)
    Path("file").write_text("{}")
    with pytest.raises(ConfigError, match="file: is a file, and vectors are kept in a folder"):
        execute(embed_keys, **options(key_checkpoint="file", output="new.json"))


def test_killed_embedding_goes_on_where_it_stopped(place: Path) -> None:
    flags = "--queries-json queries.json --keys-csv keys.csv --model-name m --k-key 7 --key-batch-size 8"
    command = with_fakes("get_top_relevant_keys_embed", f"{flags} --output killed.json --engine transformers")
    environment = {**os.environ, "FAKE_LOG": "log", "FAKE_DIE_AFTER": "45"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    assert not Path("killed.json").exists()
    del environment["FAKE_DIE_AFTER"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = Counter(Path("log").read_text().splitlines())
    assert len(asked) == 69 and sum(asked.values()) <= 69 + 4 * 8, "only the blocks in flight are paid for again"
    execute(embed_keys, **options(key_batch_size=8, output="whole.json"))
    assert Path("killed.json").read_bytes() == Path("whole.json").read_bytes()


@pytest.mark.parametrize("form", ["object", "array"])
def test_known_answers_are_carried_over(place: Path, form: str) -> None:
    given = {str(i): f"row{i}" for i in range(9)}
    Path("correct.json").write_text(json.dumps(given if form == "object" else list(given.values())))
    execute(embed_keys, **options(correct_ids_json="correct.json"))
    records = list(read_models("relevance_records_embed.json", RelevanceRecord))
    assert [record.correct_id for record in records] == [f"row{i}" for i in range(9)]


def test_a_table_repeats_a_query_with_each_of_its_keys(place: Path) -> None:
    rows = [{"query-id": "a", "corpus-id": key, "query": "red cat", "corpus": f"text {key}"} for key in "xy"]
    write_records("df2.csv", [*rows, {"query-id": "b", "corpus-id": "z", "query": "old dog", "corpus": "text z"}])
    flags = {"queries_json": None, "queries_csv": "df2.csv", "keys_csv": "df2.csv", "key_column": "corpus"}
    execute(embed_keys, **options(**flags))
    records = list(read_models("relevance_records_embed.json", RelevanceRecord))
    assert [record.query_id for record in records] == ["a", "b"]
    assert {key.key_id for key in records[0].keys} == {"x", "y", "z"}


BAD: list[tuple[dict[str, Any], dict[str, str], type[Exception], str]] = [
    ({}, {"queries.json": "[]"}, RecordError, r"queries\.json: holds no queries"),
    ({}, {"queries.json": '[{"text": "x"}]'}, RecordError, r"queries\.json:0: query: is missing\. Fields there: text"),
    ({}, {"queries.json": '[{"query": ""}]'}, RecordError, r"queries\.json:0: query: is empty"),
    ({}, {"queries.json": '[{"query": "x", "query_id": 1}, {"query": "y", "query_id": "1"}]'}, RecordError,
     r"queries\.json:1: the query id '1' comes twice, with different queries"),
    ({}, {"queries.json": '[{"query": "x", "df_id": 1.5}]'}, RecordError, r"df_id: must be text or a whole number"),
    ({}, {"keys.csv": "index,text\r\n"}, RecordError, r"keys\.csv: is empty"),
    ({}, {"keys.csv": "index,text\r\n1,a\r\n1,b\r\n"}, RecordError, r"keys\.csv:3: the id '1' comes twice"),
    ({"key_column": "body"}, {}, RecordError, r"keys\.csv:2: has no column 'body'"),
    ({"keys_csv": None}, {}, ConfigError, "no keys are given"),
    ({"keys_json": "keys.json"}, {}, ConfigError, "--keys-json and --keys-csv are both given"),
    ({"queries_json": None}, {}, ConfigError, "no queries are given"),
    ({"keys_csv": "nothing.csv"}, {}, InputMissingError, "nothing"),
    ({"correct_ids_json": "c.json"}, {"c.json": '["row1"]'}, ConfigError, "holds 1 ids for 9 queries"),
    ({"correct_ids_json": "c.json"}, {"c.json": '{"99": "row1"}'}, ConfigError, "names the query '99'"),
    ({"correct_ids_json": "c.json"}, {"c.json": '{"0": "elsewhere"}'}, ConfigError,
     r"c\.json: the key 'elsewhere' of the query '0' is not among the keys"),
    ({"correct_ids_json": "c.json"}, {"c.json": '"x"'}, ConfigError, "must be an object"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "files", "error", "message"), BAD)
def test_bad_input_is_refused_before_any_work(
    place: Path, more: dict[str, Any], files: dict[str, str], error: type[Exception], message: str
) -> None:
    for name, content in files.items():
        Path(name).write_text(content)
    before = sorted(place.iterdir())
    for stage in (embed_keys, reward_keys):
        with pytest.raises(error, match=message):
            execute(stage, **options(output="out.json", **more))
        assert sorted(place.iterdir()) == before, "nothing is written"


def test_candidates_are_scored_anew(place: Path) -> None:
    execute(embed_keys, **options(k_key=20))
    run = execute(reward_keys, model_name="m", candidates="relevance_records_embed.json")
    records = json.loads(Path("relevance_records_rm.json").read_text())
    for record in records:
        among = nearest(record["query"], 20)
        ids = [key["key_id"] for key in record["keys"]]
        assert len(ids) == 10 and set(ids) <= set(among) and record["df_id"].startswith("row")
        rewards = [key["relevance"] for key in record["keys"]]
        assert rewards == sorted(rewards, reverse=True)
        assert rewards == [pytest.approx(overlap(record["query"], key["key"])) for key in record["keys"]]
        worst = {name: overlap(record["query"], KEYS[int(name[3:])]) for name in among if name not in ids}
        assert max(worst.values()) <= rewards[-1] + 1e-6
    assert run.counts["pairs"] == 180 == run.counts["scored"]
    assert not Path("relevance_records_rm.json.journal").exists()
    execute(reward_keys, **options(candidates="relevance_records_embed.json", output="with_keys.json", k_key=10))
    found = json.loads(Path("with_keys.json").read_text())
    rewards_of = [[[key["relevance"] for key in record["keys"]] for record in each] for each in (records, found)]
    assert rewards_of[0] == rewards_of[1], "only ties may be ordered otherwise: by place in the corpus"


def test_without_candidates_all_keys_are_scored(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [f"row{i}" for i in range(60)]
    for order in ("query_first", "key_first"):
        for slab in (1 << 20, 50):
            monkeypatch.setattr(journaled, "SLAB", slab)
            monkeypatch.setattr(rmsearch.engines, "load_scorer", lambda *_, order=order, **__: ordered_scorer(order))
            run = execute(reward_keys, **options(output=f"{order}{slab}.json", candidates=None))
            records = json.loads(Path(f"{order}{slab}.json").read_text())
            assert [[key["key_id"] for key in r["keys"]] for r in records] == [best(q, every, 7) for q in QUERIES]
            assert run.counts["pairs"] == 540 == run.counts["scored"]


def ordered_scorer(order: str) -> FakeScorer:
    """The fake with a contract that names the order of query and key."""
    scorer = FakeScorer()
    contract = SimpleNamespace(order=order, template=SimpleNamespace(name="t"), model_dump=lambda **_: {"order": order})
    scorer.contract = contract  # type: ignore[assignment]
    return scorer


@pytest.mark.parametrize("checkpoint", [None, "saved.journal"])
def test_killed_scoring_goes_on_where_it_stopped(place: Path, checkpoint: str | None) -> None:
    execute(embed_keys, **options(k_key=20))
    flags = "--candidates relevance_records_embed.json --model-name m --request-batch-size 16 --output killed.json"
    more = f"--engine transformers --checkpoint {checkpoint}" if checkpoint else "--engine transformers"
    command = with_fakes("get_top_relevant_keys_rm", f"{flags} {more}")
    environment = {**os.environ, "FAKE_LOG": "log"}
    for after in ("70", "40"):
        killed = subprocess.run(command, env={**environment, "FAKE_DIE_AFTER": after}, capture_output=True)
        assert killed.returncode == -9 and not Path("killed.json").exists()
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert len(Path("log").read_text().splitlines()) <= 180 + 2 * 16, "only the batch in flight is paid for again"
    execute(reward_keys, model_name="m", candidates="relevance_records_embed.json", output="whole.json")
    assert Path("killed.json").read_bytes() == Path("whole.json").read_bytes()


def edit(change: Any) -> None:
    records = json.loads(Path("relevance_records_embed.json").read_text())
    change(records)
    Path("candidates.json").write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[2]["keys"][0].update(key_id="row999"), r":3: the key id 'row999' is not among the keys"),
        (lambda r: r[2]["keys"][0].update(key="other"), r":3: was made from another corpus: the key 'row\d+' has"),
        (lambda r: r[1].update(query="other"), r":2: was made from other queries: '1' has another text here"),
        (lambda r: r[1].update(query_id="77"), r":2: the query id '77' is not among the queries"),
        (lambda r: r[1].update(query_id="0", query=r[0]["query"]), r":2: the query id '0' comes twice"),
        (lambda r: r[0]["keys"].append(r[0]["keys"][0]), r":1: a key id comes twice among the keys"),
        (lambda r: r.clear(), r"holds no candidates"),
    ],
)
def test_candidates_of_other_data_are_refused(place: Path, change: Any, message: str) -> None:
    execute(embed_keys, **options())
    edit(change)
    with pytest.raises(RecordError, match=message):
        execute(reward_keys, **options(candidates="candidates.json", output="out.json"))
    assert not Path("out.json").exists()


def test_one_key_id_with_two_texts_is_refused(place: Path) -> None:
    execute(embed_keys, **options())
    edit(lambda r: r[1]["keys"][0].update(key_id=r[0]["keys"][0]["key_id"], key="something else"))
    with pytest.raises((ConfigError, RecordError), match=r"comes with two different texts|comes twice"):
        execute(reward_keys, model_name="m", candidates="candidates.json")


def test_a_flag_of_the_tag_tree_is_unknown_until_there_is_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--queries-json queries.json --keys-csv keys.csv --model-name m --tag-tree tree.json"
    assert run_command(reward_keys, flags.split()) == 2
    assert "--tag-tree" in capsys.readouterr().err


def test_a_model_that_never_answers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    async def stuck(self: Any, pairs: Any) -> Any:
        await asyncio.sleep(60)
        yield

    monkeypatch.setattr(FakeScorer, "stream", stuck)
    with pytest.raises(RetryableError, match=r"no score came for 0\.05 seconds"):
        execute(reward_keys, **options(timeout=0.05))


@pytest.fixture
def beir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A labelled set whose first query is a key itself, with its own id, as in ArguAna."""
    monkeypatch.chdir(tmp_path)
    use_fakes(monkeypatch.setattr)
    folder = write_beir(tmp_path / "beir")
    first = json.loads((folder / "queries.jsonl").read_text().splitlines()[1])
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": first["_id"], "title": "", "text": first["text"]}) + "\n")
    return folder


def test_a_test_set_of_labels(beir: Path) -> None:
    run = execute(make_test_set, dataset_path=str(beir))
    data = load_beir(str(beir), "test")
    pairs = list(read_models("dataset_list_test.json", PreferencePair))
    assert len(pairs) == sum(len(data.positives(query)) for query in data.queries) == run.counts["pairs"]
    for pair in pairs:
        assert pair.query_id and pair.chosen_key_id in data.positives(pair.query_id) and pair.source == "labels"
        assert pair.rejected_key_id not in data.positives(pair.query_id) and pair.rejected_key_id != pair.query_id
        assert pair.chosen_key == data.key_text(pair.chosen_key_id) and pair.query == data.queries[pair.query_id]
        assert pair.rejected_key not in {data.key_text(key) for key in data.positives(pair.query_id)} | {pair.query}
    table = list(read_records("df2.csv"))
    assert list(table[0]) == ["query-id", "corpus-id", "score", "query", "corpus"] and len(table) == len(pairs)
    records = list(read_models("query_recs.json", QueryRecord))
    assert [record.query_id for record in records] == list(data.queries)
    assert all(record.query_type == "arguana-normal" for record in records)
    assert {data.qrels[record.query_id or ""][record.df_id] for record in records} == {2}, "the best-graded key"
    before = Path("dataset_list_test.json").read_bytes()
    assert execute(make_test_set, dataset_path=str(beir)).skipped
    execute(make_test_set, dataset_path=str(beir), force=True)
    assert Path("dataset_list_test.json").read_bytes() == before
    execute(make_test_set, dataset_path=str(beir), random_seed=1, n_sample=3)
    assert Path("dataset_list_test.json").read_bytes() != before
    assert len({pair.query_id for pair in read_models("dataset_list_test.json", PreferencePair)}) == 3


def test_rejected_keys_from_retrieval(beir: Path) -> None:
    """D10: the records that the test set writes are what retrieval takes, and its output comes back as negatives."""
    execute(make_test_set, dataset_path=str(beir))
    keys = {"queries_json": "query_recs.json", "keys_json": str(beir / "corpus.jsonl")}
    execute(embed_keys, **keys, model_name="m", k_key=12, output="found.json", key_json_field="text")
    whole = json.loads(Path("found.json").read_text())
    texts = {key: document.key for key, document in load_beir(str(beir), "test").corpus.items()}
    for record in whole:  # the field text lacks the title
        for key in record["keys"]:
            key["key"] = texts[key["key_id"]]
    Path("found.json").write_text(json.dumps(whole))
    retrieved = {record["query_id"]: {key["key_id"] for key in record["keys"]} for record in whole}
    run = execute(make_test_set, dataset_path=str(beir), relevance_json="found.json")
    pairs = list(read_models("dataset_list_test.json", PreferencePair))
    inside = sum(pair.rejected_key_id in retrieved[pair.query_id or ""] for pair in pairs)
    assert inside == len(pairs) - int(run.counts.get("rejected_at_random", 0)) > len(pairs) / 2

    whole[2]["keys"][0]["key_id"] = "elsewhere"
    Path("found.json").write_text(json.dumps(whole))
    for change, message in [
        ({"key_id": "elsewhere"}, r"found\.json:3: the key id 'elsewhere' is not in the corpus"),
        (
            {"key_id": "k000", "key": "x"},
            r"found\.json:3: was made from another corpus: the key 'k000' has another text",
        ),
    ]:
        whole[2]["keys"][0].update(change)
        Path("found.json").write_text(json.dumps(whole))
        with pytest.raises(RecordError, match=message):
            execute(make_test_set, dataset_path=str(beir), relevance_json="found.json", output="new.json")
    whole[2]["query"] = "another"
    Path("found.json").write_text(json.dumps(whole))
    with pytest.raises(RecordError, match="is not in the data set with this text"):
        execute(make_test_set, dataset_path=str(beir), relevance_json="found.json", output="new.json")
    assert not Path("new.json").exists()


def test_a_query_is_no_answer_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = [{"_id": "a", "text": "same words"}, {"_id": "b", "text": "same words"}, {"_id": "c", "text": "counter"}]
    write_records("corpus.jsonl", [*corpus, {"_id": "d", "text": "far"}])
    write_records("queries.jsonl", [{"_id": "a", "text": "same words"}])
    (tmp_path / "qrels").mkdir()
    rows = "".join(f"a\t{key}\t1\n" for key in "abc")
    (tmp_path / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    run = execute(make_test_set, dataset_path=".")
    (pair,) = read_models("dataset_list_test.json", PreferencePair)
    assert (pair.chosen_key_id, pair.rejected_key_id) == ("c", "d") and run.counts["self_matches"] == 2
    write_records("corpus.jsonl", [*corpus])
    with pytest.raises(ConfigError, match="no other key is left to reject"):
        execute(make_test_set, dataset_path=".", output="new.json")
    assert not Path("new.json").exists()


def test_a_key_that_differs_in_case_and_white_space_is_not_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {"a": "Salt harms mice", "b": "SALT  harms mice\n", "c": "does salt HARM?", "d": "far"}
    write_records("corpus.jsonl", [{"_id": key, "text": text} for key, text in texts.items()])
    write_records("queries.jsonl", [{"_id": f"q{i}", "text": "Does salt harm?"} for i in range(20)])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("".join(f"q{i}\ta\t1\n" for i in range(20)))
    execute(make_test_set, dataset_path=".")
    pairs = list(read_models("dataset_list_test.json", PreferencePair))
    assert len(pairs) == 20 and {pair.rejected_key_id for pair in pairs} == {"d"}


@pytest.mark.parametrize("block", [1, 3, 300, 4096])
def test_exact_search_keeps_the_best_however_scores_come(block: int) -> None:
    """Scores that rise, fall and tie, with more keys than the search has room for."""
    rng = np.random.default_rng(block)
    queries = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    rising = np.arange(2000, dtype=np.float32)
    keys = np.stack([rising, -rising, rng.integers(-3, 4, 2000).astype(np.float32)], axis=1)
    own = [1999, -1, 5, 0, -1, -1]
    search = ExactSearch(queries, 20, own, "cpu")
    for first in range(0, len(keys), block):
        search.add(first, keys[first : first + block])
    positions, scores = search.result()
    for q in range(6):
        every = queries[q] @ keys.T
        expected = sorted((i for i in range(2000) if i != own[q]), key=lambda i: (-every[i], i))[:20]
        assert positions[q].tolist() == expected and scores[q].tolist() == every[expected].tolist()


def test_exact_search_takes_scores_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU gives are tensors; the same steps on tensors of the CPU."""
    import torch

    from rmsearch.retrieval import vectors

    monkeypatch.setattr(vectors, "_placed", lambda found, device: torch.from_numpy(found))
    monkeypatch.setattr(vectors, "product", lambda device: lambda queries, keys: queries @ torch.from_numpy(keys).T)
    rng = np.random.default_rng(0)
    queries, keys = (rng.integers(-3, 4, (count, 6)).astype(np.float32) for count in (30, 1500))
    own = rng.integers(-1, 1500, 30).tolist()
    search = ExactSearch(queries, 17, own, "cpu")
    for first in range(0, 1500, 256):
        search.add(first, keys[first : first + 256])
    positions, _ = search.result()
    for q in range(30):
        every = queries[q] @ keys.T
        assert (
            positions[q].tolist() == sorted((i for i in range(1500) if i != own[q]), key=lambda i: (-every[i], i))[:17]
        )


def test_exact_search_of_fewer_keys_than_slots_and_of_broken_vectors() -> None:
    from rmsearch.errors import ModelError

    search = ExactSearch(np.eye(2, dtype=np.float32), 3, [0, -1], "cpu")
    search.add(0, np.eye(2, dtype=np.float32))
    positions, scores = search.result()
    assert scores.tolist() == [[0.0, -np.inf, -np.inf], [1.0, 0.0, -np.inf]]
    assert positions[0, 0] == 1 and positions[1, :2].tolist() == [1, 0]
    with pytest.raises(ModelError, match="a vector that is not finite"):
        search.add(2, np.full((1, 2), np.nan, np.float32))
