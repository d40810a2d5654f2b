"""Ladders of keys and of queries: recorded answers of a language model, order, conversion, the documented commands."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from fake_models import FakeScorer, overlap, use_fakes
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_server import Server, serving

from rmsearch.cli import run_command
from rmsearch.datasets.chain import AdvancedRow, KeyLadder, QueryChoices, QueryLadder
from rmsearch.datasets.preferences import ordered_row, read_preferences
from rmsearch.engines import load_scorer
from rmsearch.errors import ConfigError, RejectedError
from rmsearch.llm.budget import cut
from rmsearch.llm.instructions import instruction
from rmsearch.preferences.ladders import (
    combination,
    key_ladder_pairs,
    key_ladder_row,
    query_choices_row,
    query_ladder_row,
    require_distinct,
)
from rmsearch.stage import Run, Stage, execute
from rmsearch.storage.records import read_models, read_records, write_records
from rmsearch.train.make_query_and_less_relevant_keys_recs import make_query_and_less_relevant_keys_recs
from rmsearch.train.make_query_dpo_pairs import make_query_dpo_pairs
from rmsearch.train.make_query_dpo_pairs_v3 import make_query_dpo_pairs_v3
from rmsearch.trainer.ordered_rows import read_trainable_rows, refuse_circles

ANSWERS = Path(__file__).parents[1] / "fixtures" / "answers"
TEXT = re.compile(r"<text>\n(.*)\n</text>", re.DOTALL)
Reply = Callable[[dict[str, Any]], Any]


def recorded(name: str) -> list[dict[str, Any]]:
    return list(read_records(str(ANSWERS / f"{name}.jsonl")))


def asked_about(body: dict[str, Any]) -> str:
    found = TEXT.search(body["messages"][-1]["content"])
    assert found is not None
    return found[1]


def replaying(answers: list[dict[str, Any]]) -> Reply:
    by_row = {each["row"]: each for each in answers}
    assert len(by_row) == len(answers)

    def reply(body: dict[str, Any]) -> Any:
        found = by_row[asked_about(body)]
        return {"message": {"content": found["answer"]}, "finish_reason": found["finish"]}

    return reply


def key_answer(body: dict[str, Any]) -> str:
    """A well-formed ladder about any row, each key one word of the row further from it."""
    text, count = asked_about(body), body["response_format"]["json_schema"]["schema"]["properties"]["keys"]["minItems"]
    words = text.split()
    keys = [" ".join([*words[: len(words) - i], *(f"other{j}" for j in range(i))]) for i in range(1, count + 1)]
    return json.dumps({"query": f"find {text}", "keys": keys})


def query_answer(body: dict[str, Any]) -> str:
    form = body["response_format"]["json_schema"]["schema"]
    lists = {name: [f"{name} {i} on {asked_about(body)}" for i in range(5)] for name in form["required"]}
    return json.dumps(lists)


def corpus(folder: Path, texts: list[str]) -> str:
    path = str(folder / "df.csv")
    write_records(path, ({"index": 100 + i, "text": text} for i, text in enumerate(texts)))
    return path


def words(count: int) -> list[str]:
    return [f"row {i} one two three four five six" for i in range(count)]


def make(stage: Stage[Any], folder: Path, server: Server, **options: Any) -> Run:
    where = {"input_csv": str(folder / "df.csv"), "output": str(folder / "out.json")}
    return execute(stage, **where | {"model_name": "m", "engine": "http", "base_url": server.url} | options)


def reasons(folder: Path) -> dict[str, str]:
    rejects = read_records(str(folder / "out.json.rejects.jsonl"))
    found = ((TEXT.search(each["record"]["question"]), each["reason"]) for each in rejects)
    return {match[1]: reason for match, reason in found if match is not None}


# Recorded answers


def test_recorded_key_ladders_are_accepted_or_refused_with_the_right_reason(tmp_path: Path) -> None:
    answers = recorded("less_relevant_keys")
    corpus(tmp_path, [each["row"] for each in answers])
    with serving(replaying(answers)) as server:
        run = make(make_query_and_less_relevant_keys_recs, tmp_path, server, max_reject_rate=1.0)
    good = [each["row"] for each in answers if each["expected"] == "accepted"]
    ladders = list(read_models(str(tmp_path / "out.json"), KeyLadder))
    assert [ladder.correspond_key for ladder in ladders] == good
    assert reasons(tmp_path) == {each["row"]: each["expected"] for each in answers if each["expected"] != "accepted"}
    first = ladders[0]
    assert (first.df_id, first.query_type, first.strategy) == ("100", "title", "synonym substitution")
    assert first.prompt == "less_relevant_keys@1"
    assert all(len(ladder.less_relevant_keys) == 5 for ladder in ladders)
    assert run.counts["ladders"] == len(good) and run.counts["rejected"] == len(answers) - len(good)
    assert len(run.notes["mean_length_ratios"]) == 5
    off = sum(
        abs(len(key) / len(ladder.correspond_key) - 1) > 0.1 for ladder in ladders for key in ladder.less_relevant_keys
    )
    assert run.counts["keys_off_length"] == off


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_recorded_query_ladders_are_accepted_or_refused_with_the_right_reason(tmp_path: Path, variant: int) -> None:
    answers = [each for each in recorded("query_ladder") if each["variant"] == variant]
    corpus(tmp_path, [each["row"] for each in answers])
    adpo = str(tmp_path / "adpo.jsonl")
    with serving(replaying(answers)) as server:
        options = {"variant": variant, "adpo_output": adpo, "max_reject_rate": 1.0}
        make(make_query_dpo_pairs, tmp_path, server, **options)
    good = [each["row"] for each in answers if each["expected"] == "accepted"]
    records = list(read_records(str(tmp_path / "out.json")))
    assert [record["key"] for record in records] == good
    assert reasons(tmp_path) == {each["row"]: each["expected"] for each in answers if each["expected"] != "accepted"}
    lists = ["chosen_queries", "rejected_queries"] if variant == 3 else ["queries"]
    assert set(records[0]) == {*lists, "key", "df_id", "query-types", "prompt"}
    assert records[0]["query-types"] == ["title"] * 5 * len(lists)
    rows = list(read_trainable_rows(adpo))
    assert len(rows) == len(good)
    assert len(rows[0].candidates) == 5 * len(lists) and len({key for _, key in rows[0].candidates}) == 1
    assert len(rows[0].pairs) == (25 if variant == 3 else 10)


# Which instruction comes next


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12))
def test_any_run_of_positions_holds_every_combination_once(start: int, first: int, second: int) -> None:
    start -= start % first
    found = {combination(i, first, second) for i in range(start, start + first * second)}
    assert len(found) == first * second


def test_a_hundred_rows_ask_in_all_styles_and_strategies(tmp_path: Path) -> None:
    corpus(tmp_path, words(100))
    with serving(key_answer) as server:
        make(make_query_and_less_relevant_keys_recs, tmp_path, server, n_key_generation=1)
        asked = [body["messages"][-1]["content"] for body in server.requests]
    spec = instruction("less_relevant_keys")
    styles, strategies = ([part["text"] for part in spec.parts[name]] for name in ("styles", "strategies"))
    assert len(styles) == len(strategies) == 10
    seen = {(s, t) for content in asked for s in styles for t in strategies if s in content and t in content}
    assert len(seen) == 100
    ladders = list(read_models(str(tmp_path / "out.json"), KeyLadder))
    wanted = {"title", "question", "one_sentence", "two_to_three_sentences", "paragraph", "multi_paragraph"}
    assert {ladder.query_type for ladder in ladders} == wanted
    assert len({ladder.strategy for ladder in ladders[:10]}) == 10


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_each_variant_has_24_instructions(tmp_path: Path, variant: int) -> None:
    corpus(tmp_path, words(24))
    with serving(query_answer) as server:
        make(make_query_dpo_pairs, tmp_path, server, variant=variant)
        asked = {body["messages"][-1]["content"].partition("<text>")[0] for body in server.requests}
    assert len(asked) == 24


# Conversion

TEXTS = st.lists(st.text(min_size=1), min_size=3, max_size=8, unique=True)


@settings(deadline=None)
@given(TEXTS, st.text(min_size=1), st.booleans())
def test_a_key_ladder_becomes_a_row_and_pairs(texts: list[str], query: str, typed: bool) -> None:
    kind = "title" if typed else None
    ladder = KeyLadder(query=query, correspond_key=texts[0], less_relevant_keys=texts[1:], df_id="7", query_type=kind)
    row = again(key_ladder_row(ladder))
    pairs = list(key_ladder_pairs(ladder))
    assert [candidate.key for candidate in row.batch] == texts and {c.query for c in row.batch} == {query}
    assert [(texts[a], texts[b]) for a, b in row.dpo_pairs] == [(p.chosen_key, p.rejected_key) for p in pairs]
    assert len(pairs) == len(texts) * (len(texts) - 1) // 2
    assert [candidate.key_role for candidate in row.batch[:2]] == ["correspond", "less_relevant"]


@settings(deadline=None)
@given(TEXTS, st.text(min_size=1), st.integers(1, 2), st.booleans())
def test_query_ladders_become_rows(texts: list[str], key: str, split: int, typed: bool) -> None:
    types = ["title"] * len(texts) if typed else None
    row = again(query_ladder_row(QueryLadder(queries=texts, key=key, df_id="7", query_types=types)))
    assert [candidate.query for candidate in row.batch] == texts
    assert all(better < worse for better, worse in row.dpo_pairs)
    chosen, rejected = texts[:split], texts[split:]
    choices = QueryChoices(chosen_queries=chosen, rejected_queries=rejected, key=key, df_id="7", query_types=types)
    row = again(query_choices_row(choices))
    found = [(row.batch[a].query, row.batch[b].query) for a, b in row.dpo_pairs]
    assert found == [(a, b) for a in chosen for b in rejected]


def again(row: AdvancedRow) -> AdvancedRow:
    """As training reads it back: ranges, circles and equal texts are checked."""
    read = AdvancedRow.model_validate(row.model_dump(mode="json"))
    refuse_circles(ordered_row(read))
    return read


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_ladders_give_rows_and_pairs_to_train_on_in_every_format(tmp_path: Path, suffix: str) -> None:
    corpus(tmp_path, words(4))
    files = {name: str(tmp_path / f"{name}{suffix}") for name in ("output", "adpo_output", "pairs_output")}
    with serving(key_answer) as server:
        make(make_query_and_less_relevant_keys_recs, tmp_path, server, n_key_generation=3, **files)
    rows = list(read_models(files["adpo_output"], AdvancedRow))
    assert [len(row.batch) for row in rows] == [4] * 4 and [len(row.dpo_pairs) for row in rows] == [6] * 4
    pairs = list(read_preferences(files["pairs_output"]))
    assert len(pairs) == 24 and pairs[0].source == "ladder"  # type: ignore[union-attr]


# Order


def falling(body: dict[str, Any]) -> str:
    """A ladder whose word overlap with its query falls; in that of row 1 the first two keys change places."""
    answer = json.loads(key_answer(body))
    if asked_about(body).startswith("row 1 "):
        answer["keys"][:2] = reversed(answer["keys"][:2])
    return json.dumps(answer)


def test_a_reward_model_verifies_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch.setattr)
    corpus(tmp_path, words(70))
    with serving(falling) as server:
        options = {"verify": "reward", "verify_model": "rm"}
        run = make(make_query_and_less_relevant_keys_recs, tmp_path, server, **options)
        asked = len(server.requests)
        strict = make(make_query_and_less_relevant_keys_recs, tmp_path, server, max_violations=0, **options)
        assert len(server.requests) == asked
    assert run.counts["verified"] == run.counts["ladders"] == 70
    assert run.counts["violations"] == 1 and run.counts["violation_rate"] == pytest.approx(1 / 350)
    assert strict.counts["ladders"] == 69 and strict.counts["dropped_by_order"] == 1
    kept = {ladder.df_id: ladder.violations for ladder in read_models(str(tmp_path / "out.json"), KeyLadder)}
    assert "101" not in kept and set(kept.values()) == {0}


def test_rewards_are_kept_when_the_run_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch.setattr)
    corpus(tmp_path, words(130))
    scored: list[int] = []

    class Failing(FakeScorer):
        async def score(self, pairs: Any) -> Any:
            scored.append(len(pairs))
            if len(scored) == 30:  # in the second window of 64 ladders
                raise RejectedError("cut short")
            return await super().score(pairs)

    monkeypatch.setattr("rmsearch.engines.load_scorer", Failing)
    with serving(key_answer) as server:
        options = {"verify": "reward", "verify_model": "rm"}
        with pytest.raises(RejectedError, match="cut short"):
            make(make_query_and_less_relevant_keys_recs, tmp_path, server, **options)
        assert not (tmp_path / "out.json").exists()
        make(make_query_and_less_relevant_keys_recs, tmp_path, server, **options)
    assert sum(scored) == 130 * 6 + scored[29], "only the batch that failed is asked for again"


@pytest.mark.slow
def test_a_real_reward_model_counts_as_it_scores(tmp_path: Path) -> None:
    folder = str(tiny_models.bert_cross_encoder(tmp_path / "rm"))
    answers = [each for each in recorded("less_relevant_keys") if each["kind"] == "well formed"]
    corpus(tmp_path, [each["row"] for each in answers])
    with serving(replaying(answers)) as server:
        options = {"verify": "reward", "verify_model": folder, "verify_engine": "transformers"}
        run = make(make_query_and_less_relevant_keys_recs, tmp_path, server, **options)
    scorer = load_scorer(folder, engine="transformers")
    try:
        for ladder in read_models(str(tmp_path / "out.json"), KeyLadder):
            keys = [ladder.correspond_key, *ladder.less_relevant_keys]
            rewards = asyncio.run(scorer.score([(ladder.query, key) for key in keys])).tolist()
            assert ladder.violations == sum(rewards[i] <= rewards[i + 1] for i in range(5))
    finally:
        scorer.close_sync()
    assert 0 < run.counts["violation_rate"] < 1  # type: ignore[operator]


def judging(prefer: Callable[[str, str, str], str]) -> Reply:
    """Makes ladders, and judges with ``prefer(query, first, second)``."""

    def reply(body: dict[str, Any]) -> str:
        if "response_format" in body:
            return falling(body)
        assert body["structured_outputs"] == {"choice": ["1", "2", "tie"]} and body["model"] == "j"
        tags = ("query", "text_1", "text_2")
        texts = [re.search(f"<{tag}>\n(.*)\n</{tag}>", body["messages"][-1]["content"], re.DOTALL) for tag in tags]
        return prefer(*(match[1] for match in texts if match is not None))

    return reply


def by_overlap(query: str, first: str, second: str) -> str:
    return "1" if overlap(query, first) > overlap(query, second) else "2"


def test_a_judge_verifies_the_order_in_both_orders(tmp_path: Path) -> None:
    corpus(tmp_path, words(6))
    options = {"verify": "judge", "verify_model": "j", "max_violations": 0}
    with serving(judging(by_overlap)) as server:
        run = make(make_query_and_less_relevant_keys_recs, tmp_path, server, **options)
        assert len(server.requests) == 6 + 6 * 5 * 2
    assert run.counts["violations"] == 1 and run.counts["tie_rate"] == 0 and run.counts["ladders"] == 5


def test_a_judge_that_always_says_1_decides_nothing(tmp_path: Path) -> None:
    corpus(tmp_path, words(2))
    with serving(judging(lambda query, first, second: "1")) as server:
        run = make(make_query_and_less_relevant_keys_recs, tmp_path, server, verify="judge", verify_model="j")
    assert run.counts["violations"] == 0 and run.counts["tie_rate"] == 1 and run.counts["ladders"] == 2


def test_a_ladder_that_is_not_judged_in_full_is_left_out(tmp_path: Path) -> None:
    corpus(tmp_path, words(3))

    def prefer(query: str, first: str, second: str) -> str:
        return "Both are fine." if "row 2 one two three other" in first + second else by_overlap(query, first, second)

    options = {"verify": "judge", "verify_model": "j", "max_reject_rate": 1.0}
    with serving(judging(prefer)) as server:
        run = make(make_query_and_less_relevant_keys_recs, tmp_path, server, **options)
    assert run.counts["not_judged"] == 1 and run.counts["ladders"] == 2


def test_no_ladder_left_is_an_error(tmp_path: Path) -> None:
    corpus(tmp_path, ["row 1 one two three four"])
    options = {"verify": "judge", "verify_model": "j", "max_violations": 0}
    with (
        serving(judging(by_overlap)) as server,
        pytest.raises(ConfigError, match="none of 1 ladders has at most 0 wrong steps"),
    ):
        make(make_query_and_less_relevant_keys_recs, tmp_path, server, **options)
    assert not (tmp_path / "out.json").exists()


# Texts


@settings(deadline=None)
@given(st.text(alphabet="ab .!?\n。", max_size=300), st.integers(20, 100))
def test_a_cut_text_is_a_start_of_it_that_is_not_too_long(text: str, limit: int) -> None:
    found = cut(text, limit)
    assert len(found) <= limit and (text.startswith(found) or found == found.strip() in text)
    if len(text) <= limit:
        assert found == text


def test_a_text_is_cut_at_a_sentence_or_a_word() -> None:
    assert cut("One is here. Two is there. Three is far.", 30) == "One is here. Two is there."
    assert cut("One is here without an end to it", 20) == "One is here without"
    assert cut("x" * 30, 20) == "x" * 20


def test_long_rows_are_cut_so_that_an_answer_fits(tmp_path: Path) -> None:
    corpus(tmp_path, ["A short row.", " ".join(f"This is sentence {i}." for i in range(500))])
    with serving(key_answer) as server:
        run = make(make_query_and_less_relevant_keys_recs, tmp_path, server)
    lengths = [len(each.correspond_key) for each in read_models(str(tmp_path / "out.json"), KeyLadder)]
    assert lengths[0] == len("A short row.") and 500 < lengths[1] <= 1200 * 3 // 6 and run.counts["cut_rows"] == 1


def test_equal_but_for_case_and_punctuation_is_equal() -> None:
    with pytest.raises(ValueError, match="keys: one comes twice"):
        require_distinct(["A  dog.", "a dog"], "keys", [], "")
    with pytest.raises(ValueError, match="keys: one is the row itself"):
        require_distinct(["A dog!"], "keys", ["a dog"], "the row itself")
    require_distinct(["in C++", "in C#", "1.5", "15"], "keys", ["in C"], "the row itself")


# Commands

COMMON = "--text-column text --tensor-parallel-size 1 --max-model-len 10000"
KEYS = f"{COMMON} --num-instances 1 --n-key-generation 5 --batch-size 8"
QUERIES = f"{COMMON} --n-query-generation 5 --batch-size 20 --model-name /workspace/gpt-oss-20b"
DOCUMENTED = {
    "make_query_and_less_relevant_keys_recs": f"{KEYS} --model-name /workspace/qwen4b",
    "make_query_and_less_relevant_keys_recs-gptoss": f"{KEYS} --model-name /workspace/gpt-oss-20b",
    "make_query_and_less_relevant_keys_recs_gptoss": f"{KEYS} --model-name /workspace/gpt-oss-20b",
    "make_query_dpo_pairs": f"{QUERIES} --num-instances 1",
    "make_query_dpo_pairs_v2": f"{QUERIES} --num-instances 3",
    "make_query_dpo_pairs_v3": f"{QUERIES} --num-instances 3 --seed 1 --min-tokens 512",
}
FIELDS = {
    "keys": {"query", "correspond_key", "less_relevant_keys", "df_id", "query-type", "strategy", "prompt"},
    "make_query_dpo_pairs": {"queries", "key", "df_id", "query-types", "prompt"},
    "make_query_dpo_pairs_v2": {"queries", "key", "df_id", "query-types", "prompt"},
    "make_query_dpo_pairs_v3": {"chosen_queries", "rejected_queries", "key", "df_id", "query-types", "prompt"},
}


@pytest.mark.parametrize("module", DOCUMENTED)
def test_documented_commands_run_as_written(tmp_path: Path, module: str) -> None:
    keys = "keys" in module
    corpus(tmp_path, words(3))
    stage = "make_query_and_less_relevant_keys_recs" if keys else module
    with serving(key_answer if keys else query_answer) as server:
        prefix = f"RMSEARCH_TRAIN_{stage.upper()}"
        environment = os.environ | {f"{prefix}_ENGINE": "http", f"{prefix}_BASE_URL": server.url}
        files = ["--input-csv", "./df.csv", "--output", "./out.json"]
        command = [sys.executable, "-m", f"rmsearch.train.{module}", *files, *DOCUMENTED[module].split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        longest, warmth = server.requests[0]["max_tokens"], server.requests[0]["temperature"]
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["df_id"] for record in records] == ["100", "101", "102"]
    assert set(records[0]) == FIELDS["keys" if keys else module]
    variant = "less_relevant_keys" if keys else f"query_ladder_{module[-1] if module[-1].isdigit() else 1}"
    assert records[0]["prompt"] == f"{variant}@1"
    assert (longest, warmth) == (6000 if module.endswith("v3") else 1200, 0.2)


def test_variant_3_has_its_own_length_however_it_is_chosen() -> None:
    options = {"input_csv": "a.csv", "output": "b.json", "model_name": "m"}
    assert make_query_dpo_pairs.config(**options).max_tokens == 1200
    assert make_query_dpo_pairs.config(**options, variant="3").max_tokens == 6000
    assert make_query_dpo_pairs_v3.config(**options).max_tokens == 6000
    assert make_query_dpo_pairs_v3.config(**options, max_tokens=700).max_tokens == 700


KEY, QUERY = make_query_and_less_relevant_keys_recs, make_query_dpo_pairs
BAD: list[tuple[Stage[Any], str, list[dict[str, Any]], str]] = [
    (KEY, "--text-column body", [{"index": 1, "text": "a"}], "has no column 'body'"),
    (QUERY, "--id-column key", [{"index": 1, "text": "a"}], "has no id column 'key'"),
    (KEY, "", [], "empty"),
    (QUERY, "", [{"index": 1, "text": "a"}, {"index": 2, "text": " "}], "is empty"),
    (KEY, "", [{"index": 1, "text": "a"}, {"index": 1, "text": "b"}], "the id '1' comes twice"),
    (KEY, "--adpo-output rows.txt", [{"index": 1, "text": "a"}], "unknown suffix"),
    (QUERY, "--adpo-output out.jsonl", [{"index": 1, "text": "a"}], "is named for two outputs"),
    (KEY, "--verify reward", [{"index": 1, "text": "a"}], "names no reward model"),
    (KEY, "--max-violations 1", [{"index": 1, "text": "a"}], "needs --verify"),
    (KEY, "--n-key-generation 0", [{"index": 1, "text": "a"}], "--n-key-generation"),
    (QUERY, "--n-query-generation 1", [{"index": 1, "text": "a"}], "a ladder has two queries"),
    (QUERY, "--variant 4", [{"index": 1, "text": "a"}], "--variant"),
]


@pytest.mark.parametrize(("stage", "flags", "rows", "problem"), BAD)
def test_bad_input_is_one_line_and_exit_2_and_costs_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    stage: Stage[Any],
    flags: str,
    rows: list[dict[str, Any]],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records("in.jsonl", rows)
    with serving(key_answer) as server:
        engine = ["--model-name", "m", "--engine", "http", "--base-url", server.url]
        code = run_command(stage, ["--input-csv", "in.jsonl", "--output", "out.jsonl", *engine, *flags.split()])
        assert not server.requests
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and problem in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_model_that_only_refuses_fails_the_stage(tmp_path: Path) -> None:
    corpus(tmp_path, words(5))
    with serving(lambda body: "I cannot help with that.") as server, pytest.raises(RejectedError, match="5 of 5"):
        make(make_query_dpo_pairs, tmp_path, server)
    with (
        serving(lambda body: "I cannot help with that.") as server,
        pytest.raises(ConfigError, match="gave no ladder at all"),
    ):
        make(make_query_dpo_pairs, tmp_path, server, max_reject_rate=1.0)
    assert not (tmp_path / "out.json").exists()


# vLLM


def short_writer(folder: Path) -> str:
    """A tiny random generator that soon ends its strings: the quotation mark is likelier than any other token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny_models.causal_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    quote = tokenizer.convert_tokens_to_ids('"')
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 0] = 30.0  # one direction that all hidden states share
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[quote, 0] = 0.5
    model.config.max_position_embeddings = 8192
    model.save_pretrained(path)
    return str(path)


@pytest.mark.vllm
@pytest.mark.slow
def test_ladders_through_vllm(tmp_path: Path) -> None:
    folder = short_writer(tmp_path / "generator")
    corpus(tmp_path, ["query document answer", "weather train plane", "protein gene cancer", "salt water recipe"])
    adpo = str(tmp_path / "adpo.jsonl")
    run = execute(
        make_query_and_less_relevant_keys_recs,
        input_csv=str(tmp_path / "df.csv"),
        output=str(tmp_path / "out.json"),
        adpo_output=adpo,
        model_name=folder,
        engine="vllm",
        max_model_len=6000,
        temperature=1.0,
        max_length_ratio=0,
        max_reject_rate=1.0,
    )
    ladders = list(read_models(str(tmp_path / "out.json"), KeyLadder))
    assert run.counts["ladders"] == len(ladders) > 0
    assert all(len(ladder.less_relevant_keys) == 5 for ladder in ladders)
    assert len(list(read_trainable_rows(adpo))) == len(ladders)
