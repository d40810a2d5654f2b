"""The harness of the LLM stages, through a small stage and a real HTTP server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_server import serving

from rmsearch.engines.generation import Generation
from rmsearch.errors import ConfigError, RejectedError
from rmsearch.llm.asking import GeneratorFlags, Question, ask, json_value
from rmsearch.llm.instructions import Instruction, instruction
from rmsearch.stage import Run, execute, source, stage, target
from rmsearch.storage.records import read_records, write_records


class EchoConfig(GeneratorFlags):
    input: str = source(..., "Texts.")
    output: str = target(..., "Answers.")


@stage("train.echo")
def echo(config: EchoConfig, run: Run) -> None:
    """Asks about every text."""

    def questions() -> Iterator[Question[str]]:
        for record in read_records(config.input):
            yield Question(record["text"], [{"role": "user", "content": record["text"]}], schema={"type": "object"})

    def parse(item: str, generation: Generation) -> Any:
        value = json_value(generation)
        if not isinstance(value, dict) or "n" not in value:
            raise ValueError("no field n")
        return value["n"]

    def records() -> Iterator[dict[str, Any]]:
        for answer in ask(run, config, questions(), parse):
            yield {"text": answer.item, "n": answer.value}
        run.check_rejects(int(run.counts["questions"]))

    write_records(config.output, records())


def texts(folder: Path, count: int) -> str:
    path = str(folder / "in.jsonl")
    write_records(path, ({"text": f"text {i}"} for i in range(count)))
    return path


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].split()[-1])


def run_echo(folder: Path, url: str, **options: Any) -> Run:
    settings = {"model_name": "m", "engine": "http", "base_url": url, "output": str(folder / "out.jsonl")}
    return execute(echo, **(settings | {"input": str(folder / "in.jsonl")} | options))


def test_answers_come_in_order_whatever_comes_first(tmp_path: Path) -> None:
    texts(tmp_path, 60)

    def reply(body: dict[str, Any]) -> str:
        time.sleep(0.02 if number(body) % 7 == 0 else 0)
        return json.dumps({"n": number(body)})

    with serving(reply) as server:
        run = run_echo(tmp_path, server.url, in_flight=8)
    assert [record["n"] for record in read_records(str(tmp_path / "out.jsonl"))] == list(range(60))
    assert run.counts["asked"] == 60 and run.counts["tokens"] == 300 and run.counts["prompt_tokens"] == 600


def test_a_rerun_asks_nothing_and_a_changed_prompt_asks_anew(tmp_path: Path) -> None:
    texts(tmp_path, 10)
    with serving(lambda body: json.dumps({"n": number(body)})) as server:
        run_echo(tmp_path, server.url)
        again = run_echo(tmp_path, server.url, force=True)
        assert again.counts["asked"] == 0 and again.counts["from_journal"] == 10 and len(server.requests) == 10
        texts(tmp_path, 12)
        more = run_echo(tmp_path, server.url)
        assert more.counts["asked"] == 2
        warmer = run_echo(tmp_path, server.url, temperature=0.5)
        assert warmer.counts["asked"] == 12


def test_a_rerun_from_the_journal_needs_no_model(tmp_path: Path) -> None:
    texts(tmp_path, 4)
    with serving(lambda body: json.dumps({"n": number(body)})) as server:
        run_echo(tmp_path, server.url)
    assert run_echo(tmp_path, "http://127.0.0.1:1", force=True).counts["from_journal"] == 4


def test_malformed_answers_are_asked_again_with_another_seed(tmp_path: Path) -> None:
    texts(tmp_path, 6)
    seen: dict[int, int] = {}

    def reply(body: dict[str, Any]) -> str:
        seen[number(body)] = seen.get(number(body), 0) + 1
        return json.dumps({"n": number(body)}) if seen[number(body)] > number(body) % 3 else "I cannot do that."

    with serving(reply) as server:
        run = run_echo(tmp_path, server.url)
        assert run.counts["malformed"] == 6 and len(list(read_records(str(tmp_path / "out.jsonl")))) == 6
        of_five = [body for body in server.requests if number(body) == 5]
    assert [body["seed"] for body in of_five] == [42, 43, 44]
    assert of_five[0]["temperature"] == 0 and of_five[1]["temperature"] > 0


def test_rejects_are_kept_with_reason_and_text_and_fail_above_the_limit(tmp_path: Path) -> None:
    texts(tmp_path, 10)

    def reply(body: dict[str, Any]) -> Any:
        if number(body) == 3:
            return {"message": {"content": '{"n": 1, "tex'}, "finish_reason": "length"}
        return "Lo siento" if number(body) == 4 else json.dumps({"n": number(body)})

    with serving(reply) as server:
        with pytest.raises(RejectedError, match=r"2 of 10 .*1 × .*--max-tokens"):
            run_echo(tmp_path, server.url)
        assert not (tmp_path / "out.jsonl").exists()
        asked = len(server.requests)
        run_echo(tmp_path, server.url, max_reject_rate=0.2)
        assert len(server.requests) == asked  # refused answers are not paid twice either
    rejects = list(read_records(str(tmp_path / "out.jsonl.rejects.jsonl")))
    assert {r["record"]["answer"] for r in rejects} == {'{"n": 1, "tex', "Lo siento"}
    assert [r["n"] for r in read_records(str(tmp_path / "out.jsonl"))] == [0, 1, 2, 5, 6, 7, 8, 9]


def test_the_same_question_twice_is_asked_once(tmp_path: Path) -> None:
    write_records(str(tmp_path / "in.jsonl"), [{"text": "text 1"}] * 30)
    with serving(lambda body: json.dumps({"n": 1})) as server:
        run_echo(tmp_path, server.url)
        assert len(server.requests) == 1


def test_cost_is_counted(tmp_path: Path) -> None:
    texts(tmp_path, 4)
    with serving(lambda body: json.dumps({"n": 0})) as server:
        run = run_echo(tmp_path, server.url, price_per_million_tokens=100.0)
    assert run.counts["cost"] == pytest.approx(4 * 15 * 100 / 1e6)


FORMS = [
    ('{"n": 1}', {"n": 1}),
    ('```json\n{"n": 1}\n```', {"n": 1}),
    ("```\n[1, 2]\n```\n", [1, 2]),
    ('Sure! Here it is:\n{"n": {"a": "}"}} Anything else?', {"n": {"a": "}"}}),
    ('{"n": "two\nlines"}', {"n": "two\nlines"}),
    ('<think>{"n": 0} or so</think>\n{"n": 1}', {"n": 1}),
]


@pytest.mark.parametrize(("text", "value"), FORMS)
def test_json_is_found_in_what_models_write(text: str, value: Any) -> None:
    assert json_value(Generation(text, 1)) == value


@given(st.text(max_size=200))
def test_json_value_gives_json_or_a_reason(text: str) -> None:
    try:
        json_value(Generation(text, 1))
    except ValueError as error:
        assert "\n" not in str(error)


def test_a_field_may_hold_braces_and_a_missing_one_is_named() -> None:
    spec = Instruction(name="x", version=2, user="{{a}} and {{b}} {plain}")
    assert spec.tag == "x@2"
    assert spec.messages(a="{{b}}", b="{a}") == [{"role": "user", "content": "{{b}} and {a} {plain}"}]
    with pytest.raises(ConfigError, match=r"x@2: needs the field 'b'"):
        spec.messages(a=1)


def test_all_instructions_load_and_an_unknown_one_names_the_others() -> None:
    names = [path.name.removesuffix(".yaml") for path in (files("rmsearch.llm") / "prompts").iterdir()]
    assert len(names) >= 6 and all(instruction(name).version >= 1 and instruction(name).user for name in names)
    with pytest.raises(ConfigError, match="There are:"):
        instruction("nothing")
