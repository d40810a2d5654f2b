"""Judging: verdicts, what models answer, the three judges, the split, and a stage that is killed again and again."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_server import Server, serving

from rmsearch.cli import run_command
from rmsearch.datasets.chain import AdvancedRow
from rmsearch.datasets.records import MessagePair, PreferencePair, read_preferences
from rmsearch.engines.generation import Generation
from rmsearch.errors import ConfigError, RecordError, RejectedError
from rmsearch.llm.instructions import instruction
from rmsearch.preferences.judge_flags import beside
from rmsearch.preferences.judging import side_of
from rmsearch.preferences.orders import levels
from rmsearch.preferences.verdicts import (
    Opinion,
    combined,
    from_grades,
    from_rewards,
    log_odds,
    opinion,
    without_circles,
)
from rmsearch.stage import Run, execute
from rmsearch.storage.records import read_models, read_records, write_records
from rmsearch.train.judge_adpo_dataset import judge_adpo_dataset
from rmsearch.train.judge_dataset import judge_dataset
from rmsearch.trainer.data import read_pairs
from rmsearch.trainer.ordered_rows import read_rows

TESTS = Path(__file__).parents[1]
ANSWERS = [json.loads(line) for line in (TESTS / "fixtures" / "answers" / "judge.jsonl").read_text().splitlines()]

# Verdicts

choices = st.sampled_from(["1", "2", "tie"])
numbers = st.floats(-50, 50)
opinions = st.builds(Opinion, choices, st.none() | numbers)


@given(opinions, opinions)
def test_swapping_the_keys_swaps_the_verdict(straight: Opinion, turned: Opinion) -> None:
    verdict = combined(straight, turned)
    assert combined(turned, straight) == verdict.swapped() and verdict.swapped().swapped() == verdict
    assert verdict.margin(6) == verdict.swapped().margin(6)
    assert verdict.margin(6) is None or 0 <= verdict.margin(6) <= 6
    named = (
        {(straight.choice, turned.choice): 1}.get(("1", "2")),
        {(straight.choice, turned.choice): -1}.get(("2", "1")),
    )
    assert verdict.winner == (named[0] or named[1] or 0)


@given(numbers, numbers, st.floats(0, 3), st.integers(-2, 3), st.integers(-2, 3))
def test_rewards_and_grades_are_symmetric_too(a: float, b: float, tie: float, first: int, second: int) -> None:
    assert from_rewards(a, b, 2.0, tie) == from_rewards(b, a, 2.0, tie).swapped()
    assert (from_rewards(a, b, 2.0, tie).winner == 0) == (abs(a - b) <= tie)
    assert from_grades(first, second) == from_grades(second, first).swapped()


@given(numbers, numbers)
def test_a_shift_towards_the_first_place_cancels(truth: float, bias: float) -> None:
    straight, turned = truth + bias, -truth + bias
    verdict = combined(Opinion("1", straight), Opinion("2", turned))
    assert verdict.score == pytest.approx(truth, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.none() | numbers), max_size=15))
def test_circles_are_broken_at_the_least_sure_pair(edges: list[tuple[int, int, float | None]]) -> None:
    pairs = [((a, b), score) for a, b, score in edges if a != b]
    kept, dropped = without_circles(pairs)
    assert sorted(kept + dropped) == list(range(len(pairs)))
    levels(6, [pairs[i][0] for i in kept])  # raises for a circle
    for lost in dropped:  # it is in a circle with pairs that are at least as sure
        surer = [pairs[i][0] for i in kept if _sure(pairs[i][1]) >= _sure(pairs[lost][1])]
        with pytest.raises(ValueError, match="circle"):
            levels(6, [*surer, pairs[lost][0]])


def _sure(score: float | None) -> float:
    return -1.0 if score is None else abs(score)


# Answers


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer["manner"])
def test_recorded_answers_are_read_as_a_careful_reader_does(answer: dict[str, Any]) -> None:
    generation = Generation(answer["text"], 1, answer["finish"])
    if answer["choice"] is not None:
        assert opinion(generation).choice == answer["choice"]
        return
    with pytest.raises(ValueError, match="the answer") as refusal:
        opinion(generation)
    assert "\n" not in str(refusal.value)


@given(st.text(max_size=80))
def test_any_text_gives_a_choice_or_a_reason(text: str) -> None:
    try:
        assert opinion(Generation(text, 1)).choice in ("1", "2", "tie")
    except ValueError as error:
        assert str(error).startswith("the answer")


def steps(*tokens: dict[str, float]) -> tuple[dict[str, float], ...]:
    return tuple({token: math.log(chance) for token, chance in step.items()} for step in tokens)


def test_confidence_is_read_where_the_choice_is_made() -> None:
    first = steps({"1": 0.5, " 1": 0.1, "2": 0.2, "tie": 0.1, "x": 0.1})
    assert log_odds(Generation("1", 1, logprobs=first)) == pytest.approx(math.log(0.6 / 0.2))
    prose = steps({"The": 0.9, "1": 0.05}, {"is": 1.0}, {"2": 0.75, "1": 0.25})
    assert log_odds(Generation("The answer is 2", 3, logprobs=prose)) == pytest.approx(math.log(0.25 / 0.75))
    one_listed = steps({"2": 0.9, "tie": 0.06, "x": 0.04})
    assert log_odds(Generation("2", 1, logprobs=one_listed)) == pytest.approx(math.log(0.04 / 0.9))
    twice = steps({"1": 1.0}, {"2": 1.0})
    assert log_odds(Generation("text 1 … answer: 2", 2, logprobs=twice)) is None
    assert log_odds(Generation("1", 1)) is None
    assert log_odds(Generation("tie", 1, logprobs=steps({"tie": 0.9, "x": 0.1}))) is None


# The llm judge, through a real server


def sets(folder: Path, count: int = 30, negatives: int = 1) -> str:
    """Sampled sets: the query's own key, the last one, shares its number; key ids are the numbers."""
    path = str(folder / "sampled_query_key_set.json")
    rows = []
    for i in range(count):
        others = [(i + 1 + n) % (count + negatives) for n in range(negatives)]
        keys = [f"about {n}" for n in others] + [f"about {i}"]
        ids = [*map(str, others), str(i)]
        rows.append({"query": f"what is {i}", "query_id": i, "keys": keys, "key_ids": ids, "positive_ids": [str(i)]})
    write_records(path, rows)
    return path


def shown(body: dict[str, Any]) -> list[str]:
    """Query and both texts, as numbers, in the order in which they stand in the prompt."""
    lines = body["messages"][-1]["content"].splitlines()
    return [line.split()[-1] for line in lines if line.startswith(("what is", "about "))]


def choice(name: str, odds: float = 3.0) -> dict[str, Any]:
    """A server's answer with probabilities: the named one is ``odds`` times as likely as the other one."""
    chances = {"1": 0.01, "2": 0.01, "tie": 0.01} | {name: 0.01 * odds}
    top = [{"token": token, "logprob": math.log(chance)} for token, chance in chances.items()]
    top.sort(key=lambda each: -each["logprob"])
    logprobs = {"content": [{"token": name, "logprob": 0.0, "top_logprobs": top}]}
    return {"message": {"content": name}, "finish_reason": "stop", "logprobs": logprobs}


def honest(body: dict[str, Any]) -> Any:
    query, first, second = shown(body)
    return choice("1" if first == query else "2" if second == query else "tie")


def judge(folder: Path, server: Server, stage: Any = judge_dataset, **more: Any) -> Run:
    given = {"query_key_set": str(folder / "sampled_query_key_set.json"), "model_name": "m", "base_url": server.url}
    return execute(stage, **given | {"output": str(folder / "dataset_list_train.json")} | more)


def records(folder: Path, side: str = "train") -> list[dict[str, Any]]:
    return list(read_records(str(folder / f"dataset_list_{side}.json")))


def test_the_documented_command_writes_train_and_test_pairs(tmp_path: Path) -> None:
    path, out = sets(tmp_path, 60), str(tmp_path / "dataset_list_train.json")
    with serving(honest) as server:
        arguments = ["--query-key-set", path, "--model-name", "m", "--progress-dir", str(tmp_path / "progress")]
        arguments += ["--max-model-len", "10000", "--output", out, "--base-url", server.url]
        assert run_command(judge_dataset, arguments) == 0
        assert run_command(judge_dataset, [*arguments, "--force"]) == 0
        assert len(server.requests) == 120  # both orders once; the second run took all from the journal
        for alias in ("--query-key-s", "--relevant-json"):
            assert run_command(judge_dataset, [alias, path, *arguments[2:], "--force", "--restart"]) == 0
        assert len(server.requests) == 120
    assert (tmp_path / "progress" / "answers.journal").exists()
    pairs = records(tmp_path) + records(tmp_path, "test")
    assert len(pairs) == 60 and 1 <= len(records(tmp_path, "test")) <= 15
    for pair in pairs:
        assert pair["query"] == f"what is {pair['query_id']}" and pair["chosen_key_id"] == pair["query_id"]
        assert pair["chosen_key"] == f"about {pair['query_id']}" != pair["rejected_key"]
        assert pair["margin"] == pytest.approx(math.log(3), abs=1e-6)
        assert pair["source"] == f"{instruction('judge').tag} by m"
    assert all(isinstance(each, PreferencePair) for each in read_preferences(out))
    body = server.requests[0]
    assert body["structured_outputs"] == {"choice": ["1", "2", "tie"]} and body["top_logprobs"] == 20


def test_a_judge_that_likes_the_first_place_gives_ties_only(tmp_path: Path) -> None:
    sets(tmp_path, 10)
    with serving(lambda _: choice("1")) as server, pytest.raises(ConfigError, match="no preference is left: 10 ties"):
        judge(tmp_path, server)
    assert not (tmp_path / "dataset_list_train.json").exists()


def test_ties_agreement_and_position_bias_are_counted(tmp_path: Path) -> None:
    sets(tmp_path, 40)

    def reply(body: dict[str, Any]) -> Any:
        number = int(shown(body)[0])
        return choice("1") if number < 10 else choice("tie") if number < 15 else honest(body)

    with serving(reply) as server:
        run = judge(tmp_path, server)
    facts = {"compared": 40, "judged": 40, "ties": 15, "tie_rate": 0.375, "agreement": 0.75, "overlap": 0}
    assert {name: run.counts[name] for name in facts} == facts
    assert run.counts["first_preferred"] == pytest.approx((20 + 25) / 70, abs=1e-4)
    ties = records(tmp_path, "ties")
    assert [tie["reason"] for tie in ties] == ["the orders disagree"] * 10 + ["both orders say tie"] * 5
    assert ties[0]["lean"] == 0 and {ties[0]["first_key"], ties[0]["second_key"]} == {"about 0", "about 1"}
    pairs = records(tmp_path) + records(tmp_path, "test")
    assert sorted(int(pair["query_id"]) for pair in pairs) == list(range(15, 40))


def test_margins_are_clipped_and_unknown_without_probabilities(tmp_path: Path) -> None:
    sets(tmp_path, 4)
    with serving(lambda body: choice(str(honest(body)["message"]["content"]), 1e6)) as server:
        judge(tmp_path, server, margin_max=5.0, test_share=0)
        assert {pair["margin"] for pair in records(tmp_path)} == {5.0}
    with serving(lambda body: f"<ID>{honest(body)['message']['content']}</ID>") as server:
        run = judge(tmp_path, server, test_share=0, top_logprobs=0, constrain=False)
        assert {pair["margin"] for pair in records(tmp_path)} == {None}
        assert run.counts["without_confidence"] == 8
        assert "structured_outputs" not in server.requests[0] and "logprobs" not in server.requests[0]


def test_answers_that_name_no_choice_are_asked_again_and_then_rejected(tmp_path: Path) -> None:
    sets(tmp_path, 50)
    refusal = next(each["text"] for each in ANSWERS if each["manner"] == "refusing")

    def reply(body: dict[str, Any]) -> Any:
        query, first, _ = shown(body)
        if query == "3" and first == "3":
            return refusal
        return refusal if query == "5" and body["seed"] == 42 else honest(body)

    with serving(reply) as server:
        with pytest.raises(RejectedError, match=r"1 of 100 .*1 × the answer names no choice"):
            judge(tmp_path, server, max_reject_rate=0.001)
        assert not (tmp_path / "dataset_list_train.json").exists()
        run = judge(tmp_path, server)
    assert run.counts["unanswered"] == 1 and run.counts["judged"] == 49 and run.counts["malformed"] == 5
    (reject,) = read_records(str(tmp_path / "dataset_list_train.json.rejects.jsonl"))
    assert reject["record"]["answer"] == refusal and "about 3" in reject["record"]["question"]


def test_long_texts_are_cut_to_what_the_judge_can_read(tmp_path: Path) -> None:
    path, longest = str(tmp_path / "sampled_query_key_set.json"), 1500
    keys = [f"Text {i}. " + "A sentence that says little. " * 400 for i in range(2)]
    write_records(path, [{"query": "what", "query_id": "q", "keys": keys, "key_ids": ["a", "b"]}])

    def prefer_text_0(body: dict[str, Any]) -> Any:
        prompt = body["messages"][-1]["content"]
        return choice("1" if prompt.index("Text 0") < prompt.index("Text 1") else "2")

    with serving(prefer_text_0) as server:
        judge(tmp_path, server, max_characters=1000, test_share=0)
        judge(tmp_path, server, max_model_len=longest, max_tokens=8, test_share=0)
        sizes = [len(body["messages"][-1]["content"]) for body in server.requests]
        whole = [sum(len(message["content"]) for message in body["messages"]) for body in server.requests]
    assert len(sizes) == 4 and all(1800 < size < 2600 for size in sizes[:2])
    assert all(size < longest + 1000 and size > 500 for size in whole[2:])  # a byte counts as a token


def test_upstreams_form_is_read_back_as_the_same_pairs(tmp_path: Path) -> None:
    sets(tmp_path, 8)
    with serving(honest) as server:
        judge(tmp_path, server, test_share=0)
        raw = records(tmp_path)
        judge(tmp_path, server, test_share=0, record_form="messages")
    chats = records(tmp_path)
    names = ["chosen_msg", "rejected_msg", "chosen_sentence_id", "rejected_sentence_id", "query_id", "margin"]
    assert list(chats[0]) == names and chats[0]["chosen_msg"][0]["content"].endswith("Sentence:```about 0```")
    out = str(tmp_path / "dataset_list_train.json")
    assert all(isinstance(each, MessagePair) for each in read_preferences(out))
    for pair, record in zip(read_pairs(out), raw, strict=True):
        assert (pair.query, pair.chosen, pair.rejected) == (
            record["query"],
            record["chosen_key"],
            record["rejected_key"],
        )
        assert pair.template == "upstream_lora"


def test_a_sample_of_the_pairs_or_all_of_them(tmp_path: Path) -> None:
    sets(tmp_path, 10, negatives=3)
    with serving(honest) as server:
        assert judge(tmp_path, server).counts["compared"] == 10
        assert judge(tmp_path, server, sample_pairs=2).counts["compared"] == 20
        assert judge(tmp_path, server, sample_pairs=0).counts["compared"] == 30  # the own key with each other one


# The split


@given(st.lists(st.text(max_size=8), min_size=1), st.integers(0, 5), st.floats(0, 1))
def test_a_query_has_one_side_whatever_else_is_there(queries: list[str], seed: int, share: float) -> None:
    sides = [side_of(query, seed, share) for query in queries]
    assert sides == [side_of(query, seed, share) for query in queries]
    assert sides == [side_of(f"  {query}\n", seed, share) for query in queries]
    assert {side_of(query, seed, 0.0) for query in queries} == {"train"}
    for query, side in zip(queries, sides, strict=True):  # a larger share takes queries from train only
        assert side == "train" or side_of(query, seed, min(1.0, share + 0.1)) == "test"


def test_adding_rows_moves_no_query_and_the_share_is_kept(tmp_path: Path) -> None:
    with serving(honest) as server:
        sets(tmp_path, 50)
        judge(tmp_path, server, test_share=0.3)
        before = {side: {pair["query"] for pair in records(tmp_path, side)} for side in ("train", "test")}
        sets(tmp_path, 100)
        run = judge(tmp_path, server, test_share=0.3)
    after = {side: {pair["query"] for pair in records(tmp_path, side)} for side in ("train", "test")}
    assert before["train"] <= after["train"] and before["test"] <= after["test"]
    assert not after["train"] & after["test"] and run.counts["overlap"] == 0
    assert run.counts["train_queries"] == len(after["train"]) and 15 <= len(after["test"]) <= 45


def test_names_of_the_other_files() -> None:
    assert beside("s3://b/train/dataset_list_train.json", "test") == "s3://b/train/dataset_list_test.json"
    assert beside("./train/dataset_list.jsonl.gz", "ties") == "./train/dataset_list_ties.jsonl.gz"
    assert beside("data", "test") == "data_test"


# Labels and teachers


def test_labels_decide_and_equal_grades_tie(tmp_path: Path) -> None:
    path = sets(tmp_path, 6, negatives=2)
    qrels = tmp_path / "qrels.tsv"
    lines = ["0\t0\t2", "0\t1\t1", "1\t1\t1", "1\t2\t1", "2\t2\t-1", "3\t4\t1", "3\t3\t0"]
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    out = str(tmp_path / "dataset_list_train.json")
    run = execute(
        judge_dataset, judge="labels", query_key_set=path, qrels=str(qrels), output=out, sample_pairs=0, test_share=0
    )
    found = [(pair["query_id"], pair["chosen_key_id"], pair["rejected_key_id"]) for pair in records(tmp_path)]
    assert found == [("0", "0", "1"), ("0", "0", "2"), ("1", "1", "3"), ("3", "4", "3")]
    assert {pair["margin"] for pair in records(tmp_path)} == {None} and records(tmp_path)[0]["source"] == "labels"
    assert run.counts["ties"] == 8 and run.counts["labelled_queries"] == 4
    execute(judge_dataset, judge="labels", query_key_set=path, output=out, test_share=0)  # by positive_ids
    assert [pair["chosen_key_id"] for pair in records(tmp_path)] == [str(i) for i in range(6)]


def test_labels_of_other_queries_are_refused(tmp_path: Path) -> None:
    path = sets(tmp_path, 3)
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nx1\t0\t1\n")
    with pytest.raises(ConfigError, match=r"qrels\.tsv: knows no query of the sets"):
        execute(
            judge_dataset, judge="labels", query_key_set=path, qrels=str(qrels), output=str(tmp_path / "train.json")
        )
    assert not (tmp_path / "train.json").exists()


def with_fakes(stage: str, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a stage in a process whose reward model counts shared words, and may kill itself (see fake_models)."""
    code = (
        "import sys, fake_models; fake_models.use_fakes(setattr); from importlib import import_module\n"
        "from rmsearch.cli import run_command\n"
        f"raise SystemExit(run_command(import_module('rmsearch.train.{stage}').{stage}, sys.argv[1:]))"
    )
    env = {**os.environ, "PYTHONPATH": f"{TESTS / 'support'}:{TESTS.parent}", **environment}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)


def test_a_teacher_that_dies_goes_on_and_scores_nothing_twice(tmp_path: Path) -> None:
    path, out, log = sets(tmp_path, 90), str(tmp_path / "dataset_list_train.json"), tmp_path / "asked.txt"
    arguments = ["--judge", "reward", "--query-key-set", path, "--model-name", "teacher", "--output", out]
    arguments += ["--tie-margin", "0.01", "--margin-scale", "2"]
    died = with_fakes("judge_dataset", arguments, FAKE_LOG=str(log), FAKE_DIE_AFTER="100")
    assert died.returncode == -signal.SIGKILL and not Path(out).exists()
    done = with_fakes("judge_dataset", arguments, FAKE_LOG=str(log))
    assert done.returncode == 0, done.stderr
    asked = log.read_text().splitlines()
    assert len(set(asked)) == 180 and len(asked) - len(set(asked)) <= 16  # the batch that died is asked again
    pairs = records(tmp_path) + records(tmp_path, "test")
    assert len(pairs) == 90 and all(pair["chosen_key_id"] == pair["query_id"] for pair in pairs)
    assert all(2 <= pair["margin"] <= 2.2 and pair["source"] == "reward of teacher" for pair in pairs)
    before = Path(out).read_bytes()
    assert with_fakes("judge_dataset", [*arguments, "--force"]).returncode == 0
    assert Path(out).read_bytes() == before and not Path(f"{out}.journal").exists()


# Batches


def advanced(folder: Path, count: int = 12, sampled: int = 3, correspond: int = 1) -> str:
    """Advanced sets; the keys' numbers fall with their place, the best first."""
    path = str(folder / "sampled_query_key_set.json")
    rows = []
    for i in range(count):
        keys = [f"about {i * 100 + 50 - n}" for n in range(correspond + sampled)]
        ids = [key.split()[-1] for key in keys]
        rows.append({"query": f"what is {i}", "query_id": i, "query-type": "questions"})
        rows[-1] |= {"correspond_keys": keys[:correspond], "correspond_key_ids": ids[:correspond]}
        rows[-1] |= {"sampled_keys": keys[correspond:], "sampled_key_ids": ids[correspond:]}
    write_records(path, rows)
    return path


def larger(body: dict[str, Any]) -> Any:
    _, first, second = shown(body)
    return choice("1" if int(first) > int(second) else "2")


def test_batches_hold_every_judged_pair(tmp_path: Path) -> None:
    path, out = advanced(tmp_path), str(tmp_path / "dataset_list_train.json")
    with serving(larger) as server:
        arguments = ["--query-key-set", path, "--model-name", "m", "--progress-dir", str(tmp_path / "progress")]
        arguments += ["--batch-size", "20", "--max-model-len", "10000", "--output", out, "--base-url", server.url]
        assert run_command(judge_adpo_dataset, arguments) == 0
    rows = [*read_models(out, AdvancedRow), *read_models(str(tmp_path / "dataset_list_test.json"), AdvancedRow)]
    assert len(rows) == 12
    for row in rows:
        assert row.dpo_pairs == [(0, 1), (0, 2), (0, 3)] and row.margins == [pytest.approx(math.log(3), abs=1e-6)] * 3
        assert [each.key_role for each in row.batch] == ["correspond", "sampled", "sampled", "sampled"]
        assert {each.query for each in row.batch} == {f"what is {row.batch[0].query_id}"}
        assert row.batch[0].query_type == "questions"
    assert sum(1 for _ in read_rows(out)) == len(records(tmp_path))
    assert len(records(tmp_path)[0]["batch"]) == 4 and records(tmp_path, "ties") == []


def test_correspond_keys_are_compared_with_each_other_and_ties_are_left_out(tmp_path: Path) -> None:
    advanced(tmp_path, correspond=2, sampled=2)
    with serving(
        lambda body: choice("tie") if "what is 4\n" in body["messages"][-1]["content"] else larger(body)
    ) as server:
        run = judge(tmp_path, server, judge_adpo_dataset, test_share=0)
        assert [row["dpo_pairs"] for row in records(tmp_path)] == [[[0, 1], [0, 2], [0, 3], [1, 2], [1, 3]]] * 11
        assert run.counts["ties"] == 5 == len(records(tmp_path, "ties")) and run.counts["batches_without_pairs"] == 1
        assert run.counts["pairs"] == 55 and run.counts["circles"] == 0
        few = judge(tmp_path, server, judge_adpo_dataset, test_share=0, sample_pairs=2)
    assert few.counts["compared"] == 24


def test_a_circle_loses_its_least_sure_pair(tmp_path: Path) -> None:
    advanced(tmp_path, count=1, correspond=2, sampled=1)  # 50 and 49 correspond, 48 is sampled

    def reply(body: dict[str, Any]) -> Any:
        _, first, second = shown(body)
        odds = {frozenset(("50", "49")): 9.0, frozenset(("49", "48")): 5.0, frozenset(("50", "48")): 2.0}
        best = {frozenset(("50", "49")): "50", frozenset(("49", "48")): "49", frozenset(("50", "48")): "48"}
        both = frozenset((first, second))
        return choice("1" if best[both] == first else "2", odds[both])

    with serving(reply) as server:
        run = judge(tmp_path, server, judge_adpo_dataset, test_share=0)
    (row,) = records(tmp_path)
    assert row["dpo_pairs"] == [[0, 1], [1, 2]] and run.counts["circles"] == 1
    assert row["margins"] == pytest.approx([math.log(9), math.log(5)], abs=1e-5)


def test_batches_in_upstreams_form(tmp_path: Path) -> None:
    advanced(tmp_path, count=3)
    with serving(larger) as server:
        judge(tmp_path, server, judge_adpo_dataset, test_share=0, record_form="messages")
    rows = list(read_rows(str(tmp_path / "dataset_list_train.json")))
    assert rows[0].candidates[0] == ("what is 0", "about 50") and rows[0].template == "upstream_lora"
    assert list(records(tmp_path)[0]["batch"][0]) == ["msg", "query_id", "key_id", "key_role", "query_type"]


def test_other_forms_and_empty_files_are_refused_before_anything_is_paid(tmp_path: Path) -> None:
    with serving(honest) as server:
        advanced(tmp_path)
        with pytest.raises(RecordError, match=r"set\.json:0: keys: Field required"):
            judge(tmp_path, server)
        sets(tmp_path)
        with pytest.raises(RecordError, match=r"set\.json:0: correspond_keys: Field required"):
            judge(tmp_path, server, judge_adpo_dataset)
        rows = list(read_records(str(tmp_path / "sampled_query_key_set.json")))
        write_records(str(tmp_path / "sampled_query_key_set.json"), [*rows, rows[0] | {"keys": ["same", "same"]}])
        with pytest.raises(RecordError, match=r"set\.json:30: .*the same text is there twice"):
            judge(tmp_path, server)
        write_records(str(tmp_path / "sampled_query_key_set.json"), [])
        with pytest.raises(ConfigError, match="holds no sets to judge"):
            judge(tmp_path, server)
        assert not server.requests
    with pytest.raises(ConfigError, match="--query-key-set is needed"):
        execute(judge_dataset, judge="labels")
    with pytest.raises(ConfigError, match="--judge llm needs --model-name"):
        execute(judge_dataset, query_key_set="x.json")
    with pytest.raises(ConfigError, match="--output-ties must differ"):
        execute(judge_dataset, query_key_set="x.json", judge="labels", output="a.json", output_ties="a.json")


# Killed ten times

KILLS, IN_FLIGHT = 10, 4


def test_killed_ten_times_it_ends_with_the_same_file_and_no_journaled_answer_is_paid_twice(tmp_path: Path) -> None:
    serials = itertools.count(1)

    def reply(body: dict[str, Any]) -> Any:
        """An honest answer that carries the number of its request, as an alternative that is never likely."""
        time.sleep(0.004)
        answer, body["serial"] = honest(body), next(serials)
        answer["logprobs"]["content"][0]["top_logprobs"].append({"token": f"#{body['serial']}", "logprob": -30.0})
        return answer

    with serving(reply) as server:
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        for folder in (whole, killed):
            folder.mkdir()
            sets(folder, 100)
        judge(whole, server, in_flight=IN_FLIGHT)
        assert len(server.requests) == 200
        server.requests.clear()
        journaled = [_die_at_random(killed, server, random.Random(i)) for i in range(KILLS)]
        _judge_process(killed, server.url).wait()
        requests = list(server.requests)
    for side in ("train", "test", "ties"):
        name = f"dataset_list_{side}.json"
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    final = _journaled(killed)
    asked = defaultdict(list)
    for body in requests:
        asked[json.dumps(body["messages"])].append(body.get("serial"))
    assert len(asked) == 200 == len(final) and [len(found) for found in journaled] == sorted(map(len, journaled))
    for times in asked.values():  # only the last request's answer is in the journal, so none in it was asked again
        assert times[-1] in final and not final & set(times[:-1])
    assert len(requests) - 200 <= KILLS * IN_FLIGHT
    assert all(found <= final for found in journaled) and 0 < len(journaled[0]) < len(journaled[-1]) < 200


def _judge_process(folder: Path, url: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rmsearch.train.judge_dataset", "--model-name", "m", "--base-url", url]
    command += ["--query-key-set", str(folder / "sampled_query_key_set.json"), "--in-flight", str(IN_FLIGHT)]
    command += ["--output", str(folder / "dataset_list_train.json")]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def _die_at_random(folder: Path, server: Server, chance: random.Random) -> set[int]:
    """Kill the stage once it has asked some questions more; returns the answers that its journal then holds."""
    process = _judge_process(folder, server.url)
    enough = len(server.requests) + chance.randint(6, 18)
    while len(server.requests) < enough:
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(chance.random() * 0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return _journaled(folder)


def _journaled(folder: Path) -> set[int]:
    """The requests whose answers are in the journal (a torn last line is none)."""
    lines = (folder / "dataset_list_train.json.answers").read_bytes().splitlines(keepends=True)
    values = [json.loads(line)[1] for line in lines[1:] if line.endswith(b"\n")]
    return {int(token[1:]) for value in values for token in value["logprobs"][0] if token.startswith("#")}


# Real engines


def with_teacher(folder: Path, engine: str) -> list[dict[str, Any]]:
    """What a tiny reward model, which is the same every time, makes of the sets."""
    import tiny_models

    teacher, out = tiny_models.bert_cross_encoder(folder / "teacher"), str(folder / f"{engine}.json")
    options = {"query_key_set": sets(folder, 12), "output": out, "test_share": 0.0, "max_model_len": 128}
    run = execute(judge_dataset, judge="reward", model_name=str(teacher), engine=engine, **options)
    assert run.counts["judged"] == 12 and run.counts["scored"] == 24
    return list(read_records(out))


def test_a_teacher_in_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = with_teacher(tmp_path, "transformers")
    assert with_teacher(tmp_path, "auto") == pairs
    if not torch.cuda.is_available():  # vLLM on a CPU is for generation only
        assert "engine auto: transformers" in caplog.text
    assert len(pairs) == 12 and all(pair["margin"] > 0 for pair in pairs)
    assert {pair["source"] for pair in pairs} == {"reward of teacher"}


def test_a_generator_that_can_hold_no_form_has_its_answers_refused(tmp_path: Path) -> None:
    import tiny_models

    generator = tiny_models.causal_model(tmp_path / "generator")
    options = {"query_key_set": sets(tmp_path, 2), "output": str(tmp_path / "train.json"), "max_model_len": 1024}
    with pytest.raises(RejectedError, match="4 of 4"):  # random words name no choice
        execute(
            judge_dataset, model_name=str(generator), engine="transformers", max_tokens=3, max_attempts=1, **options
        )
    assert not (tmp_path / "train.json").exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_generator_and_a_teacher_in_vllm(tmp_path: Path) -> None:
    import tiny_models

    generator = tiny_models.causal_model(tmp_path / "generator")
    options = {"query_key_set": sets(tmp_path, 12), "output": str(tmp_path / "llm.json"), "max_model_len": 1024}
    try:
        run = execute(judge_dataset, model_name=str(generator), engine="vllm", **options)
    except ConfigError as error:  # random weights may well like one place only
        assert "no preference is left: 12 ties" in str(error)
    else:
        assert run.counts["judged"] == 12 and run.counts["malformed"] == 0
    expected, found = with_teacher(tmp_path, "transformers"), with_teacher(tmp_path, "vllm")
    assert [pair["chosen_key"] for pair in found] == [pair["chosen_key"] for pair in expected]
    assert [pair["margin"] for pair in found] == pytest.approx([pair["margin"] for pair in expected], abs=1e-3)
