"""Sampling sets: what is beside a query's own key, that nothing known to serve it is a negative, and bad input."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_sets
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsearch.cli import run_command
from rmsearch.datasets.beir import load_beir
from rmsearch.datasets.chain import AdvancedSet, SampledSet
from rmsearch.errors import ConfigError, RecordError, RMSearchError
from rmsearch.stage import Run, execute
from rmsearch.storage.records import read_models, write_records
from rmsearch.train.sample_advanced_dpo_batch import sample_advanced_dpo_batch
from rmsearch.train.sample_dpo_batch import sample_dpo_batch

TEXTS = [f"text number {i}" for i in range(30)]


def chain(folder: Path, queries: int = 20, found: int = 10, texts: list[str] = TEXTS) -> dict[str, str]:
    """Corpus, query records and relevance records; query i belongs to row i and finds rows i, i+1, …, best first."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: str(folder / name) for name in ("df.csv", "queries.json", "relevance.json", "sets.json")}
    rows = [{"index": i, "text": text, "split": "train"} for i, text in enumerate(texts)]
    asked = [{"query": f"query {i}", "df_id": i, "query-type": "questions"} for i in range(queries)]

    def keys(i: int) -> list[dict[str, Any]]:
        near = [(i + n) % len(texts) for n in range(found)]
        return [{"key_id": at, "key": texts[at], "similarity": 0.9 - 0.05 * n} for n, at in enumerate(near)]

    write_records(paths["df.csv"], rows)
    write_records(paths["queries.json"], asked)
    write_records(
        paths["relevance.json"],
        [
            {"query": each["query"], "query_id": i, "query_type": "questions", "keys": keys(i)}
            for i, each in enumerate(asked)
        ],
    )
    return paths


def flags(paths: dict[str, str], **more: Any) -> dict[str, Any]:
    given = {"source_csv": "df.csv", "filtered_queries_json": "queries.json", "relevance_json": "relevance.json"}
    return {name: paths[file] for name, file in given.items()} | {"output": paths["sets.json"]} | more


def sample(paths: dict[str, str], **more: Any) -> tuple[list[SampledSet], Run]:
    run = execute(sample_dpo_batch, **flags(paths, **more))
    return list(read_models(paths["sets.json"], SampledSet)), run


def test_the_documented_command_mixes_a_retrieved_key_with_the_own_row(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    given = ["--relevance-json", paths["relevance.json"], "--filtered-queries-json", paths["queries.json"]]
    assert run_command(sample_dpo_batch, [*given, "--source-csv", paths["df.csv"], "--output", paths["sets.json"]]) == 0
    sets = json.loads(Path(paths["sets.json"]).read_text())
    assert len(sets) == 20
    for i, each in enumerate(sets):
        assert each["query"] == f"query {i}" and each["query-type"] == "questions" and each["query_id"] == str(i)
        assert each["key_ids"][1] == str(i) and each["keys"][1] == TEXTS[i] and each["positive_ids"] == [str(i)]
        assert each["keys"][0] == TEXTS[int(each["key_ids"][0])] != each["keys"][1]
        assert 1 <= (int(each["key_ids"][0]) - i) % 30 < 10


def test_ranks_come_from_the_window_and_random_ones_from_everywhere(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    window, run = sample(paths, rank_min=3, rank_max=5, negatives_per_query=3)
    for i, each in enumerate(window):
        assert sorted((int(key) - i) % 30 for key in each.key_ids[:-1]) == [2, 3, 4]
    assert run.counts["from_ranks"] == 60 and "from_random" not in run.counts
    mixed, run = sample(paths, rank_min=2, rank_max=3, negatives_per_query=2, random_share=0.5)
    assert 8 <= int(run.counts["from_random"]) <= 32
    assert all(len(each.keys) == 3 for each in mixed)


def test_keys_close_to_the_positive_are_skipped(tmp_path: Path) -> None:
    paths = chain(tmp_path)  # scores 0.9 (the positive), 0.85, 0.8, 0.75 …
    share, run = sample(paths, max_relative_score=0.9, negatives_per_query=7)
    assert all((int(key) - i) % 30 >= 2 for i, each in enumerate(share) for key in each.key_ids[:-1])
    assert run.counts["false_negatives_skipped"] == 20  # rank 2
    margin, _ = sample(paths, min_score_margin=0.22, negatives_per_query=5)
    assert all((int(key) - i) % 30 >= 5 for i, each in enumerate(margin) for key in each.key_ids[:-1])


def test_a_positive_that_was_not_retrieved_lets_no_retrieved_key_pass(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    records = json.loads(Path(paths["relevance.json"]).read_text())
    write_records(paths["relevance.json"], [each | {"keys": each["keys"][1:]} for each in records])
    sets, run = sample(paths, max_relative_score=0.95)
    assert run.counts["positives_not_retrieved"] == 20 and run.counts["from_random"] == 20
    assert len(sets) == 20


def test_without_relevance_negatives_are_random_rows(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    sets, run = sample(paths, relevance_json=None, negatives_per_query=4)
    assert run.counts["from_random"] == 80 and all(len(set(each.keys)) == 5 for each in sets)
    assert len({key for each in sets for key in each.key_ids[:-1]}) > 20


def test_a_query_of_two_rows_has_both_as_positives(tmp_path: Path) -> None:
    paths = chain(tmp_path, texts=TEXTS[:3])
    asked = [{"query": "same", "df_id": i, "query-type": "keywords"} for i in range(2)]
    write_records(paths["queries.json"], asked)
    sets, _ = sample(paths, relevance_json=None)
    assert [each.key_ids for each in sets] == [["2", "0"], ["2", "1"]]


def test_an_irrelevant_question_has_no_positive_and_no_advanced_set(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    rows = [{"query": f"query {i}", "df_id": i, "query-type": ["questions", "irr_questions"][i % 2]} for i in range(4)]
    write_records(paths["queries.json"], rows)
    sets, _ = sample(paths, relevance_json=None)
    assert [each.positive_ids for each in sets] == [["0"], [], ["2"], []]
    run = execute(sample_advanced_dpo_batch, **flags(paths, relevance_json=None))
    assert run.counts["queries_without_correspond_key"] == 2 and run.counts["sets"] == 2


def test_relevance_records_that_name_their_row_need_no_query_records(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    records = json.loads(Path(paths["relevance.json"]).read_text())
    write_records(paths["relevance.json"], [each | {"df_id": i} for i, each in enumerate(records)])
    alone, _ = sample(paths, filtered_queries_json=None)
    both, _ = sample(paths)
    assert alone == both and len(alone) == 20
    write_records(paths["queries.json"], [{"query": "query 7", "df_id": 7}])
    few, run = sample(paths)
    assert [each.query_id for each in few] == ["7"] and run.counts["queries_filtered_out"] == 19


def test_other_rows_do_not_change_what_is_drawn_for_a_query(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    before, _ = sample(paths, negatives_per_query=3)
    fewer, _ = sample(chain(tmp_path / "less", queries=9), negatives_per_query=3)
    assert fewer == before[:9]
    other, _ = sample(paths, negatives_per_query=3, random_seed=7)
    assert other != before


corpora = st.lists(st.text("aB \u0130", min_size=1, max_size=3).filter(str.strip), min_size=2, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    texts=corpora, count=st.integers(1, 4), seed=st.integers(0, 9), share=st.sampled_from([0.0, 0.5]), data=st.data()
)
def test_no_positive_is_a_negative_and_no_text_comes_twice(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], count: int, seed: int, share: float, data: st.DataObject
) -> None:
    paths = chain(tmp_path_factory.mktemp("chain"), queries=0, texts=texts)
    rows = st.integers(0, len(texts) - 1)
    asked = data.draw(st.lists(st.tuples(st.sampled_from("xyz"), rows), min_size=1, max_size=8))
    write_records(paths["queries.json"], [{"query": query, "df_id": row} for query, row in asked])
    ids = data.draw(st.lists(rows, unique=True, min_size=1))
    keys = [{"key_id": i, "key": texts[i], "similarity": 0.5 - i / 100} for i in ids]
    write_records(paths["relevance.json"], [{"query": q, "query_id": q, "keys": keys} for q in {q for q, _ in asked}])
    settings_ = {"negatives_per_query": count, "random_seed": seed, "random_share": share, "max_relative_score": 0.99}
    try:
        sets, _ = sample(paths, **settings_)
    except ConfigError as error:
        assert "no query has another key" in str(error) and not Path(paths["sets.json"]).exists()
        return
    again, _ = sample(paths, force=True, **settings_)
    assert sets == again
    for each in sets:
        own = {str(row) for query, row in asked if query == each.query}
        *negatives, positive = each.key_ids
        assert positive in own and not own & set(negatives)
        folded = [" ".join(text.split()).casefold() for text in each.keys]
        assert len(set(folded)) == len(folded) <= count + 1
        assert not set(folded[:-1]) & {" ".join(texts[int(key)].split()).casefold() for key in own}


def test_labels_of_a_data_set_name_the_positives(tmp_path: Path) -> None:
    beir = load_beir(str(tiny_sets.write_beir(tmp_path / "beir")), "dev")
    ids = list(beir.corpus)
    candidates = str(tmp_path / "embed.json")
    ranked = [1 - n / 100 for n in range(len(ids))]
    write_records(candidates, [{"query_id": q, "key_ids": ids, "embed_relevances": ranked} for q in beir.queries])
    data = {"dataset_path": str(tmp_path / "beir"), "split": "dev", "relevance_json": candidates}
    output = str(tmp_path / "sets.jsonl")
    run = execute(sample_dpo_batch, output=output, negatives_per_query=2, rank_max=20, **data)
    sets = list(read_models(output, SampledSet))
    own = {query: [k for k in beir.positives(query)] for query in beir.queries}
    wanted = {(query, key) for query, keys in own.items() for key in keys}
    assert {(each.query_id, each.key_ids[-1]) for each in sets} == wanted
    for each in sets:
        texts = {beir.key_text(key) for key in own[each.query_id]}
        assert not texts & set(each.keys[:-1])
        assert each.keys == [beir.key_text(key) for key in each.key_ids]
    assert run.counts["sets"] == len(wanted) and run.counts["from_ranks"] == 2 * len(wanted)

    advanced = str(tmp_path / "advanced.jsonl")
    execute(sample_advanced_dpo_batch, output=advanced, n_sampled_keys=3, **data)
    for group in read_models(advanced, AdvancedSet):
        grades = [beir.qrels[group.query_id][key] for key in group.correspond_key_ids]
        assert grades == sorted(grades, reverse=True) and not set(group.sampled_key_ids) & set(own[group.query_id])


def test_advanced_sets_have_the_documented_schema(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    out = str(tmp_path / "adpo_sampled_query_key_set.json")
    given = ["--relevance-json", paths["relevance.json"], "--filtered-queries-json", paths["queries.json"]]
    given += ["--source-csv", paths["df.csv"], "--source-column", "text", "--n-sampled-keys", "5", "--output", out]
    assert run_command(sample_advanced_dpo_batch, given) == 0
    sets = json.loads(Path(out).read_text())
    names = [
        "query",
        "query_id",
        "correspond_keys",
        "correspond_key_ids",
        "sampled_keys",
        "sampled_key_ids",
        "query-type",
    ]
    assert len(sets) == 20 and list(sets[3]) == names
    for i, each in enumerate(sets):
        assert each["correspond_key_ids"] == [str(i)] and len(each["sampled_keys"]) == 5
        assert str(i) not in each["sampled_key_ids"]


def test_queries_with_too_few_other_keys_are_left_out_and_counted(tmp_path: Path) -> None:
    paths = chain(tmp_path, texts=["one", "two", "three", " One", "four"])
    rows = [("first", 0), ("second", 1), ("second", 2)]  # beside "second" there are only "one" and "four"
    write_records(paths["queries.json"], [{"query": query, "df_id": row} for query, row in rows])
    run = execute(sample_advanced_dpo_batch, **flags(paths, relevance_json=None, n_sampled_keys=3))
    assert run.counts["queries_without_negatives"] == 2
    (only,) = read_models(paths["sets.json"], AdvancedSet)
    assert sorted(only.sampled_keys) == ["four", "three", "two"] and only.correspond_keys == ["one"]


def change(paths: dict[str, str], name: str, **fields: Any) -> None:
    write_records(paths[name], [each | fields for each in json.loads(Path(paths[name]).read_text())])


def bad_row(paths: dict[str, str]) -> None:
    change(paths, "queries.json", df_id=77)


def other_corpus(paths: dict[str, str]) -> None:
    write_records(paths["df.csv"], [{"index": i, "text": f"other text {i}"} for i in range(30)])


def fewer_rows(paths: dict[str, str]) -> None:
    write_records(paths["df.csv"], [{"index": i, "text": TEXTS[i]} for i in range(20)])


def other_column(paths: dict[str, str]) -> None:
    write_records(paths["df.csv"], [{"index": i, "body": text} for i, text in enumerate(TEXTS)])


def twice(paths: dict[str, str]) -> None:
    write_records(paths["df.csv"], [{"index": i // 2, "text": text} for i, text in enumerate(TEXTS)])


def other_queries(paths: dict[str, str]) -> None:
    write_records(paths["queries.json"], [{"query": "unknown", "df_id": 1}])


def no_rows(paths: dict[str, str]) -> None:
    write_records(paths["df.csv"], [])


BAD = [
    (bad_row, r"no row with the id '77'"),
    (other_corpus, r"df\.csv: the row '\d+' has another text.*relevance\.json"),
    (fewer_rows, r"has no row with the id '2\d'"),
    (other_column, r"df\.csv:\d: has no column 'text'"),
    (twice, r"df\.csv:\d: the id '0' comes twice"),
    (other_queries, r"relevance\.json: none of its queries is in"),
    (no_rows, r"df\.csv: is empty"),
]


@pytest.mark.parametrize(("spoil", "says"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
@pytest.mark.parametrize("stage", [sample_dpo_batch, sample_advanced_dpo_batch], ids=["dpo", "adpo"])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, stage: Any, spoil: Any, says: str) -> None:
    paths = chain(tmp_path)
    spoil(paths)
    with pytest.raises(RMSearchError, match=says) as error:
        execute(stage, **flags(paths))
    assert "\n" not in str(error.value) and not Path(paths["sets.json"]).exists()


def test_missing_and_contradicting_flags_are_named(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    with pytest.raises(ConfigError, match="there are no queries"):
        execute(sample_dpo_batch, source_csv=paths["df.csv"])
    with pytest.raises(ConfigError, match="--source-csv is needed"):
        execute(sample_dpo_batch, filtered_queries_json=paths["queries.json"])
    with pytest.raises(ConfigError, match="--rank-max is below"):
        execute(sample_dpo_batch, **flags(paths, rank_min=5, rank_max=4))
    change(paths, "queries.json", query=3)
    with pytest.raises(RecordError, match=r"queries\.json:0: query"):
        execute(sample_dpo_batch, **flags(paths))


def test_draws_are_spread_over_the_window(tmp_path: Path) -> None:
    paths = chain(tmp_path, queries=30)
    sets, _ = sample(paths, rank_min=2, rank_max=4)
    offsets = Counter((int(each.key_ids[0]) - i) % 30 for i, each in enumerate(sets))
    assert set(offsets) == {1, 2, 3} and max(offsets.values()) < 20


@pytest.mark.parametrize("source", ["labels", "query records", "relevance records"])
def test_a_set_costs_no_more_texts_where_a_query_has_many_positives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def reads_per_set(folder: Path, queries: int, positives: int) -> float:
        paths = chain(folder, queries=0, texts=[f"text number {i}" for i in range(200)])
        rows = [(f"query {at % queries}", at) for at in range(queries * positives)]  # one query's rows lie apart
        asked = [{"query": query, "df_id": row, "query_id": f"{query} {row}"} for query, row in rows]
        change = {"filtered_queries_json": None, "relevance_json": None}
        if source == "labels":
            data = folder / "data"
            (data / "qrels").mkdir(parents=True)
            write_records(str(data / "corpus.jsonl"), [{"_id": str(i), "text": f"text number {i}"} for i in range(200)])
            write_records(
                str(data / "queries.jsonl"), [{"_id": f"query {q}", "text": f"q {q}"} for q in range(queries)]
            )
            (data / "qrels" / "train.tsv").write_text("".join(f"{query}\t{row}\t1\n" for query, row in rows))
            change |= {"source_csv": None, "dataset_path": str(data)}
        elif source == "query records":
            write_records(paths["queries.json"], asked)
            change["filtered_queries_json"] = paths["queries.json"]
        else:
            keys = [{"key_id": row, "key": f"text number {row}", "similarity": 0.5} for row in range(120, 130)]
            write_records(paths["relevance.json"], [each | {"keys": keys} for each in asked])
            change["relevance_json"] = paths["relevance.json"]
        read, count = os.pread, Counter[str]()

        def counted(*where: int) -> bytes:
            count["reads"] += 1
            return read(*where)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", counted)
            sets, _ = sample(paths, negatives_per_query=2, **change)
        assert len(sets) == queries * positives
        return count["reads"] / len(sets)

    few, many = reads_per_set(tmp_path / "few", 24, 5), reads_per_set(tmp_path / "many", 2, 60)
    assert many <= 1.3 * few
