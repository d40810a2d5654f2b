"""Queries from rows: answers of a real model, the stage through a server and through real vLLM, bad input."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_server import Server, serving

from rmsearch.cli import run_command
from rmsearch.datasets.chain import QUERY_TYPES, QueryRecord
from rmsearch.engines.generation import Generation
from rmsearch.errors import ConfigError, RecordError, RejectedError, RMSearchError
from rmsearch.llm.answers import QueryAnswer, folded, read_queries, unnumbered
from rmsearch.llm.asking import GeneratorFlags
from rmsearch.llm.budget import Fitting
from rmsearch.stage import Run, execute
from rmsearch.storage.records import read_models, read_records, write_records
from rmsearch.train.make_query_recs import MakeQueryRecsConfig, make_query_recs

ANSWERS = Path(__file__).parents[1] / "fixtures" / "answers" / "make_query_recs.jsonl"
FIXTURES: list[dict[str, Any]] = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
GOOD = {fixture["row"]: fixture["answer"] for fixture in reversed(FIXTURES) if fixture["kind"].startswith("well")}
DOCUMENT = re.compile(r"<document>\n(.*)\n</document>", re.DOTALL)


def shown(body: dict[str, Any]) -> str:
    """The row's text in a request."""
    found = DOCUMENT.search(body["messages"][-1]["content"])
    assert found is not None
    return found[1]


def by_row(fixtures: list[dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What a server answers that gives each row its fixture's answer."""

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        (fixture,) = [each for each in fixtures if each["row"].strip().startswith(shown(body)[:200])]
        return {"message": {"role": "assistant", "content": fixture["answer"]}, "finish_reason": fixture["finish"]}

    return reply


def run_stage(folder: Path, url: str, **options: Any) -> Run:
    settings: dict[str, Any] = {"model_name": "m", "engine": "http", "base_url": url}
    settings |= {"input_csv": str(folder / "df.csv"), "output": str(folder / "query_recs.json")}
    return execute(make_query_recs, **(settings | options))


def corpus(folder: Path, texts: list[str], name: str = "df.csv") -> str:
    path = str(folder / name)
    write_records(path, ({"index": 100 + i, "text": text} for i, text in enumerate(texts)))
    return path


def rounds() -> list[list[dict[str, Any]]]:
    """The fixtures in sets in which every row comes once."""
    seen: Counter[str] = Counter()
    sets: dict[int, list[dict[str, Any]]] = {}
    for fixture in FIXTURES:
        sets.setdefault(seen[fixture["row"]], []).append(fixture)
        seen[fixture["row"]] += 1
    return list(sets.values())


@pytest.mark.parametrize("fixtures", rounds(), ids=lambda fixtures: f"{len(fixtures)} rows")
def test_recorded_answers_are_read_or_refused_for_the_right_reason(
    tmp_path: Path, fixtures: list[dict[str, Any]]
) -> None:
    corpus(tmp_path, [fixture["row"] for fixture in fixtures])
    with serving(by_row(fixtures)) as server:
        run = run_stage(tmp_path, server.url, max_attempts=1, max_reject_rate=1.0)
    records = list(read_models(str(tmp_path / "query_recs.json"), QueryRecord))
    rows = {str(100 + i): fixture for i, fixture in enumerate(fixtures)}
    accepted = [row for row, fixture in rows.items() if fixture["expected"] == "accepted"]
    assert list(dict.fromkeys(record.df_id for record in records)) == accepted
    dropped: Counter[str] = Counter()
    for fixture in fixtures:
        dropped.update(fixture.get("dropped", {}))
    found = {name.removeprefix("dropped_"): n for name, n in run.counts.items() if name.startswith("dropped_")}
    assert found == dropped
    reasons = {fixture["kind"]: fixture["expected"] for fixture in fixtures if fixture["expected"] != "accepted"}
    rejects = tmp_path / "query_recs.json.rejects.jsonl"
    told = [record["reason"] for record in read_records(str(rejects))] if rejects.exists() else []
    assert Counter(told) == Counter(reasons.values())


@pytest.mark.parametrize("fixture", [each for each in FIXTURES if each["kind"].startswith("well")])
def test_recorded_answers_follow_the_schema_and_are_kept_whole(fixture: dict[str, Any]) -> None:
    answer = QueryAnswer.model_validate_json(fixture["answer"])
    assert read_queries(Generation(fixture["answer"], 1)).by_type == answer.model_dump()


def test_records_have_upstreams_fields_ids_and_the_prompts_version(tmp_path: Path) -> None:
    row = next(iter(GOOD))
    corpus(tmp_path, [row])
    with serving(lambda body: GOOD[row]) as server:
        run = run_stage(tmp_path, server.url)
        (request,) = server.requests
    records = list(read_records(str(tmp_path / "query_recs.json")))
    answer = json.loads(GOOD[row])
    assert [record["query"] for record in records] == [text for name in QUERY_TYPES for text in answer[name]]
    assert records[0] == {
        "query": answer["titles"][0],
        "df_id": "100",
        "query-type": "titles",
        "query_id": "100-titles-1",
        "prompt": "make_query_recs@1",
    }
    assert len({record["query_id"] for record in records}) == len(records) == run.counts["queries"]
    assert run.counts["written_questions"] == len(answer["questions"]) and run.counts["questions"] == 1
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["titles"]["minItems"] == 2 and schema["properties"]["titles"]["maxItems"] == 3
    assert "3 to 5 keyword queries" in request["messages"][-1]["content"] and request["temperature"] == 0


def test_a_refused_answer_is_asked_for_again(tmp_path: Path) -> None:
    row = next(iter(GOOD))
    corpus(tmp_path, [row])
    answers = ["I'm sorry, but I can't help with that.", '{"titles": []}', GOOD[row]]
    with serving(lambda body: answers[body["seed"] - 42]) as server:
        run = run_stage(tmp_path, server.url)
    assert run.counts["malformed"] == 2 and "rejected" not in run.counts


def test_too_many_refused_answers_fail_and_write_nothing(tmp_path: Path) -> None:
    corpus(tmp_path, list(GOOD))
    with serving(lambda body: "No.") as server, pytest.raises(RejectedError, match=r"13 of 13 .*holds no JSON"):
        run_stage(tmp_path, server.url)
    assert not (tmp_path / "query_recs.json").exists()


def test_a_long_row_is_cut_for_the_prompt(tmp_path: Path) -> None:
    row = max(GOOD, key=len)
    corpus(tmp_path, [row])
    with serving(lambda body: GOOD[row]) as server:
        assert run_stage(tmp_path, server.url).counts["cut_rows"] == 1
        run_stage(tmp_path, server.url, max_characters=500)
        run_stage(tmp_path, server.url, max_model_len=4500)
        full, short, fitted = (shown(body) for body in server.requests)
    assert row.startswith(full) and 7800 < len(full) <= 8000
    assert row.startswith(short) and 400 < len(short) <= 500
    assert row.startswith(fitted) and 300 < len(fitted) < 1000


def test_corpora_of_all_kinds(tmp_path: Path) -> None:
    row = "Salt water freezes at a lower temperature than fresh water."
    answer = json.dumps({name: [f"about salt water {name}"] for name in QUERY_TYPES})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text(row)
    sources = {str(tmp_path / "texts"): "a.md"}
    for name in ("df.csv", "df.jsonl", "df.json", "df.parquet"):
        sources[corpus(tmp_path, [row], name)] = "100"
    write_records(str(tmp_path / "own.jsonl"), [{"doc": "x7", "body": row}])
    with serving(lambda body: answer) as server:
        for path, df_id in sources.items():
            run_stage(tmp_path, server.url, input_csv=path)
            assert {record["df_id"] for record in read_records(str(tmp_path / "query_recs.json"))} == {df_id}
        own = {"input_csv": str(tmp_path / "own.jsonl"), "text_column": "body", "id_column": "doc"}
        run_stage(tmp_path, server.url, **own, output=str(tmp_path / "q.parquet"))
        assert len(server.requests) == 2  # the second output has a journal of its own
    assert {record["df_id"] for record in read_records(str(tmp_path / "q.parquet"))} == {"x7"}


def test_the_documented_command(tmp_path: Path) -> None:
    row = next(iter(GOOD))
    source, out = corpus(tmp_path, [row]), tmp_path / "query_recs.json"
    with serving(lambda body: GOOD[row]) as server:
        command = (
            f"--input-csv {source} --text-column text --model-name /workspace/qwen4b --tensor-parallel-size 1 "
            f"--num-instances 1 --batch-size 8 --max-model-len 10000 --output {out} "
            f"--base-url {server.url} --engine http"
        )
        assert run_command(make_query_recs, command.split()) == 0
    assert all({"query", "df_id", "query-type"} <= record.keys() for record in read_records(str(out)))


BAD = {
    "empty": ("index,text\n", "is empty"),
    "no such column": ("index,body\n1,a\n", "no column 'text'"),
    "doubles": ("index,text\n1,a\n2,b\n1,c\n", "the id '1' comes twice"),
    "empty text": ("index,text\n1,a\n2,\n", "text: is empty"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_corpora_are_refused_before_anything_is_asked(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "df.csv").write_text(content)
    out = tmp_path / "query_recs.json"

    def refused(server: Server) -> None:
        command = f"--input-csv {tmp_path}/df.csv --model-name m --output {out} --base-url {server.url} --engine http"
        assert run_command(make_query_recs, command.split()) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0]
        assert server.requests == [] and not out.exists()

    with serving(lambda body: "{}") as server:
        refused(server)


def test_a_model_too_small_for_prompt_and_answer_is_refused(tmp_path: Path) -> None:
    corpus(tmp_path, ["text"])
    with serving(lambda body: "{}") as server:
        with pytest.raises(ConfigError, match=r"--max-tokens 3000: .* no room for a text in 3500 tokens"):
            run_stage(tmp_path, server.url, max_model_len=3500)
        with pytest.raises(RMSearchError):
            run_stage(tmp_path, server.url, output=str(tmp_path / "out.xml"))
        with pytest.raises(RecordError):
            run_stage(tmp_path, server.url, id_column="no such")
        assert server.requests == []


class FakeTarget(GeneratorFlags):
    model_name: str = "m"


@settings(deadline=None)
@given(st.text(max_size=400), st.integers(100, 300), st.integers(120, 400))
def test_fitted_texts_are_beginnings_within_both_limits(text: str, characters: int, tokens: int) -> None:
    flags = FakeTarget(engine="http", base_url="http://127.0.0.1:1", max_tokens=8, max_model_len=tokens)
    fitted = Fitting(flags, [], characters)(text)
    assert fitted == text or (text.lstrip().startswith(fitted) and len(fitted) <= characters)
    assert len(fitted.encode()) <= max(tokens - 8 - 64, 16)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(QUERY_TYPES), st.lists(st.text(max_size=12), max_size=8)))
def test_queries_that_are_read_are_distinct_and_not_empty(answer: dict[str, list[str]]) -> None:
    try:
        queries = read_queries(Generation(json.dumps(answer), 1))
    except ValueError as error:
        assert "\n" not in str(error)
        return
    found = [query for texts in queries.by_type.values() for query in texts]
    assert len({folded(query) for query in found}) == len(found)
    assert len(found) + sum(queries.dropped.values()) == sum(map(len, answer.values()))


def test_numbers_go_only_where_they_count_the_list() -> None:
    assert unnumbered(["1. What?", "2) Why?"]) == ["What?", "Why?"]
    assert unnumbered(["6. Juni 1944", "Landung"]) == ["6. Juni 1944", "Landung"]
    assert unnumbered(["3.5 mm jack"]) == ["3.5 mm jack"] and unnumbered([]) == []


@pytest.mark.vllm
@pytest.mark.slow
def test_real_vllm_keeps_a_random_model_to_the_form(tmp_path: Path) -> None:
    folder = tiny_models.causal_model(tmp_path / "generator")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    corpus(tmp_path, ["price of the train " * 2000])
    run = execute(
        make_query_recs,
        MakeQueryRecsConfig(
            input_csv=str(tmp_path / "df.csv"),
            output=str(tmp_path / "query_recs.json"),
            model_name=str(folder),
            engine="vllm",
            dtype="float32",
            max_characters=20000,
            max_tokens=4000,
            temperature=1.0,
            same_language=False,
        ),
    )
    records = list(read_models(str(tmp_path / "query_recs.json"), QueryRecord))
    assert {record.df_id for record in records} == {"100"} and run.counts["cut_rows"] == 1
    assert {record.query_type for record in records} == set(QUERY_TYPES)
    assert int(run.counts["tokens"]) > 0
