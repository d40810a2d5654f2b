"""Training end to end on tiny models: it learns, resumes, refuses, exports what every loader reads."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pair_sets
import pytest
import tiny_models
import tiny_sets

from rmsearch.cli import run_command
from rmsearch.errors import ConfigError, MissingExtraError, ModelError, RejectedError
from rmsearch.models.contract import read_contract
from rmsearch.stage import execute
from rmsearch.train.lora import lora

SEED = 3  # of a base that starts out wrong on most pairs
pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {
    "dtype": "fp32",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-3,
    "evaluation_steps": 10,
    "save_steps": 10,
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Flags that name a training and a test file."""
    train = pair_sets.write(tmp_path / "train.json", pair_sets.pairs(64))
    test = pair_sets.write(tmp_path / "test.json", pair_sets.pairs(24, seed=1))
    return {"dataset_list_train": train, "dataset_list_test": test}


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    return str(tiny_models.bert_cross_encoder(tmp_path / "base", seed=SEED))


def scores(folder: Path | str, rows: list[dict[str, Any]], **options: Any) -> np.ndarray:
    """Rewards of chosen and rejected keys, float32[n, 2], through our own loader."""
    from rmsearch.engines import load_scorer

    scorer = load_scorer(str(folder), engine="transformers", **options)
    pairs = [(row["query"], row[key]) for row in rows for key in ("chosen_key", "rejected_key")]
    found = asyncio.run(scorer.score(pairs))
    scorer.close_sync()
    return found.reshape(-1, 2)


def weights(folder: Path | str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


def test_it_learns_and_every_loader_gives_the_same_scores(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = tmp_path / "model"
    run = execute(lora, model_name=encoder, output_dir=str(out), **files, **FAST)
    assert run.counts["accuracy_after"] >= 0.9 > run.counts["accuracy_before"]
    assert run.counts["pairs"] == 64 and run.notes["test_queries_in_train"] == 0
    rows = pair_sets.pairs(24, seed=1)
    ours = scores(out, rows)
    assert np.mean(ours[:, 0] > ours[:, 1]) >= 0.9
    assert np.allclose(scores(out / "adapter", rows), ours, atol=1e-4)

    model = AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(rows[0]["query"], rows[0]["chosen_key"], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert abs(float(model(input_ids=ids).logits) - ours[0, 0]) < 1e-4
    assert model.config.num_labels == 1 and model.config.architectures == ["BertForSequenceClassification"]

    contract = read_contract(out)
    assert contract is not None and contract.template.name == "encoder" and contract.token_types == "zero"
    assert contract.training["data"]["pairs"] == 64 and contract.base_model == encoder
    card = (out / "README.md").read_text()
    assert "accuracy" in card and "Search(" in card
    state, settings = (json.loads((out / f"trainer_{name}.json").read_text()) for name in ("state", "config"))
    assert state["global_step"] == 32 and settings["config"]["learning_rate"] == 5e-3
    assert (out / "checkpoint-32" / "adapter_model.safetensors").exists() and not (out / ".training").exists()
    assert execute(lora, model_name=encoder, output_dir=str(out), **files, **FAST).skipped


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "causal"])
def test_decoders_train_and_export(files: dict[str, Any], family: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    if family == "causal":
        tiny_models.causal_model(folder)
    else:
        tiny_models.decoder_reward_model(folder, family)
    out = tmp_path / "model"
    run = execute(lora, model_name=str(folder), output_dir=str(out), **files, **(FAST | {"lora_layers": "last-1"}))
    assert run.counts["accuracy_after"] > run.counts["accuracy_before"] or run.counts["accuracy_after"] >= 0.9
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification") and config["pad_token_id"] is not None
    assert "lm_head.weight" not in weights(out) and weights(out)["score.weight"].shape[0] == 1
    rows = pair_sets.pairs(6, seed=1)
    assert np.allclose(scores(out, rows), scores(out / "adapter", rows), atol=1e-4)
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["layers_to_transform"] == [1] and "score" in adapter["modules_to_save"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_bfloat16_base_trains_exports_and_goes_on(files: dict[str, Any], family: str, tmp_path: Path) -> None:
    from rmsearch.trainer import export

    base, out = tmp_path / "base", tmp_path / "model"
    if family == "bert":
        tiny_models.bert_cross_encoder(base, dtype="bfloat16")
    else:
        tiny_models.decoder_reward_model(base, family, dtype="bfloat16")
    options = {**files, "model_name": str(base), "output_dir": str(out), **FAST, "dtype": "bf16", "max_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "save_model_folder", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(lora, **options)
    run = execute(lora, **options)
    assert run.notes["resumed_at_step"] == 2 == run.counts["steps"]
    contract = read_contract(out)
    assert contract is not None and contract.dtype == "bfloat16"
    assert {str(weight.dtype) for weight in weights(out).values()} == {"torch.bfloat16"}
    rows = pair_sets.pairs(6, seed=1)
    exported = scores(out, rows, dtype="bfloat16")
    assert exported.std() > 0.25
    assert np.allclose(scores(out / "adapter", rows, dtype="bfloat16"), exported, atol=0.05)
    assert np.allclose(scores(out, rows), exported, atol=0.15)  # in float32


def test_a_sentence_encoder_gets_a_new_head_and_all_weights_can_train(files: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_models.sentence_encoder(tmp_path / "sentence")
    out = tmp_path / "model"
    options = FAST | {"lora_r": 0, "learning_rate": 1e-3, "head_learning_rate": 5e-3, "loss": "listwise"}
    run = execute(lora, model_name=str(base), output_dir=str(out), **files, **options)
    assert run.counts["accuracy_after"] >= 0.9
    assert not (out / "adapter").exists()
    assert not bool((weights(out)["bert.embeddings.word_embeddings.weight"] == weights_of_base(base)).all())


def weights_of_base(folder: Path) -> Any:
    return next(value for name, value in weights(folder).items() if name.endswith("word_embeddings.weight"))


def test_one_training_reads_each_file_of_the_base_once(
    files: dict[str, Any], encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmsearch.models import folder

    reads = Counter[str]()

    def counted(name: str, real: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def read(path: Path) -> Any:
            if Path(encoder) in (path, path.parent):
                reads[f"{name} {path.name}"] += 1
            return real(path)

        return read

    for name in ("load_json", "read_contract", "_tensor_names"):
        monkeypatch.setattr(folder, name, counted(name, getattr(folder, name)))
    execute(lora, model_name=encoder, output_dir=str(tmp_path / "model"), **files, **(FAST | {"max_steps": 1}))
    assert reads["load_json config.json"] == 1 and set(reads.values()) == {1}, reads


def test_a_useless_training_says_so(
    files: dict[str, Any], encoder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    options = FAST | {"learning_rate": 1e-12, "max_steps": 3}
    run = execute(lora, model_name=encoder, output_dir=str(out), **files, **options)
    assert "no better than before training" in run.notes["warning"]
    assert "WARNING" in capfd.readouterr().err and "**WARNING" in (out / "README.md").read_text()


def test_dev_ndcg_chooses_the_checkpoint(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    data = tiny_sets.write_beir(tmp_path / "beir")
    run_file = tmp_path / "first.json"
    ids = [f"k{i:03d}" for i in range(40)]
    run_file.write_text(json.dumps({f"q{q:03d}": {key: 40.0 - i for i, key in enumerate(ids)} for q in range(24)}))
    dev = {"dev_dataset_path": str(data), "dev_split": "dev", "dev_embed_output": str(run_file), "dev_top_k": 40}
    out = tmp_path / "model"
    run = execute(lora, model_name=encoder, output_dir=str(out), **files, **dev, **(FAST | {"max_steps": 20}))
    measured = run.notes["history"]
    assert [step for step, _ in measured] == [0, 10, 20]
    best = max(measured[1:], key=lambda each: each[1]["eval_ndcg@10"])
    assert run.counts["ndcg@10_after"] == best[1]["eval_ndcg@10"]
    assert 0 < run.notes["measures"]["first_stage_ndcg@10"] < 1


def test_the_best_step_is_exported_not_the_last(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    from rmsearch.trainer.evaluation import Evaluation

    real = Evaluation.measure

    def better_early(self: Any, score: Any, margin_scale: float) -> dict[str, float]:
        found = real(self, score, margin_scale)
        return found | {"eval_accuracy": 1.0 if len(self.history) == 1 else 0.1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "measure", better_early)
        best = execute(lora, model_name=encoder, output_dir=str(tmp_path / "best"), **files, **FAST)
    assert best.counts["kept_step"] == 10 and best.counts["steps"] == 32
    rows = pair_sets.pairs(4, seed=1)
    kept = tmp_path / "best" / "checkpoint-20"
    assert not np.allclose(scores(tmp_path / "best", rows), scores(kept, rows), atol=1e-4)


def test_margins_and_upstream_records(encoder: str, tmp_path: Path) -> None:
    rows = [pair_sets.upstream_form(row) | {"margin": 3.0} for row in pair_sets.pairs(16)]
    train = pair_sets.write(tmp_path / "train.json", rows)
    options = FAST | {"max_steps": 2}
    folders = {scale: tmp_path / f"margin{scale}" for scale in (0.0, 1.0)}
    for scale, folder in folders.items():
        run = execute(
            lora,
            dataset_list_train=train,
            model_name=encoder,
            output_dir=str(folder),
            margin_scale=scale,
            **options,
        )
        assert run.notes["train"]["with_margin"] == 16
    losses = [json.loads((f / "trainer_state.json").read_text())["log_history"][0]["loss"] for f in folders.values()]
    assert losses[1] > losses[0] + 0.5
    decoder = tiny_models.decoder_reward_model(tmp_path / "qwen3")
    out = tmp_path / "decoder"
    execute(lora, dataset_list_train=train, model_name=str(decoder), output_dir=str(out), **options)
    contract = read_contract(out)
    assert contract is not None and contract.template.name == "upstream_lora"


def test_a_killed_training_goes_on_to_the_same_weights(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    options = FAST | {"lora_dropout": 0.1, "save_steps": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    execute(lora, model_name=encoder, output_dir=str(whole), **files, **options)
    command = [sys.executable, "-m", "rmsearch.train.lora", "--model-name", encoder, "--output-dir", str(broken)]
    for name, value in {**files, **options}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    marker = broken / "checkpoint-6" / "rmsearch_checkpoint.json"
    limit = time.monotonic() + 240
    while not marker.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert marker.exists() and not (broken / "rmsearch.json").exists()
    half = broken / "checkpoint-9999"  # as if the kill had come while a checkpoint was written
    half.mkdir()
    run = execute(lora, model_name=encoder, output_dir=str(broken), **files, **options)
    assert run.notes["resumed_at_step"] >= 6 and not half.exists()
    assert same(weights(whole), weights(broken))
    histories = [json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (whole, broken)]
    kept = [
        [{k: e.get(k) for k in ("step", "loss", "eval_accuracy")} for e in h if "runtime" not in str(e)]
        for h in histories
    ]
    assert kept[0] == kept[1]


def crash_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Ends the training with an error right after that step's checkpoint is complete."""
    from rmsearch.trainer.checkpoints import Checkpoints

    real = Checkpoints.complete

    def complete(self: Checkpoints, at: int) -> None:
        real(self, at)
        if at == step:
            raise RuntimeError("crash")

    patch.setattr(Checkpoints, "complete", complete)


def test_other_settings_are_refused_until_forced(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(10, patch)
        with pytest.raises(RuntimeError, match="crash"):
            execute(lora, model_name=encoder, output_dir=str(out), **files, **FAST)
    other = FAST | {"seed": 7, "max_steps": 12}
    with pytest.raises(ConfigError, match="max_steps: -1 then, 12 now, seed: 42 then, 7 now"):
        execute(lora, model_name=encoder, output_dir=str(out), **files, **other)
    run = execute(lora, model_name=encoder, output_dir=str(out), force=True, **files, **other)
    assert run.counts["steps"] == 12 and "resumed_at_step" not in run.notes
    again = execute(lora, model_name=encoder, output_dir=str(out), **files, **(other | {"seed": 8}))
    assert not again.skipped and "resumed_at_step" not in again.notes  # a finished run is replaced without asking


def test_checkpoints_and_model_live_on_s3(
    files: dict[str, Any], encoder: str, tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmsearch.storage import uri

    out = f"{s3_bucket}/models/rm"
    options = FAST | {"num_train_epochs": 3}
    with pytest.MonkeyPatch.context() as patch:
        crash_at(10, patch)
        with pytest.raises(RuntimeError, match="crash"):
            execute(lora, model_name=encoder, output_dir=out, **files, **options)
    monkeypatch.setenv("RMSEARCH_CACHE", str(tmp_path / "another_machine"))
    run = execute(lora, model_name=encoder, output_dir=out, **files, **options)
    assert run.notes["resumed_at_step"] == 10
    assert uri.exists(f"{out}/rmsearch.json") and uri.exists(f"{out}/checkpoint-24/rmsearch_checkpoint.json")
    assert not uri.exists(f"{out}/.training")
    local = tmp_path / "local"
    execute(lora, model_name=encoder, output_dir=str(local), **files, **options)
    rows = pair_sets.pairs(4, seed=1)
    assert np.array_equal(scores(out, rows), scores(local, rows))


def test_a_run_killed_while_exporting_only_exports(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    from rmsearch.trainer import export

    out, options = tmp_path / "model", FAST | {"max_steps": 10}

    def fail(*_: Any) -> None:
        raise RuntimeError("crash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_model", fail)
        with pytest.raises(RuntimeError, match="crash"):
            execute(lora, model_name=encoder, output_dir=str(out), **files, **options)
    run = execute(lora, model_name=encoder, output_dir=str(out), **files, **options)
    assert run.notes["resumed_at_step"] == 10 == run.counts["steps"]
    whole = tmp_path / "whole"
    execute(lora, model_name=encoder, output_dir=str(whole), **files, **options)
    assert same(weights(whole), weights(out))


def test_an_export_that_changes_scores_writes_nothing(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    from rmsearch.trainer import export

    out, real = tmp_path / "model", export._save_plain

    def spoiled(model: Any, folder: Path, tokenizer: Any) -> None:
        model.classifier.bias.data += 1
        real(model, folder, tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_save_plain", spoiled)
        with pytest.raises(ModelError, match="scores change by 1"):
            execute(lora, model_name=encoder, output_dir=str(out), **files, **(FAST | {"max_steps": 2}))
    assert not (out / "model.safetensors").exists() and not (out / "rmsearch.json").exists()


def test_a_time_limit_stops_and_still_exports(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    out = tmp_path / "model"
    run = execute(lora, model_name=encoder, output_dir=str(out), time_limit_minutes=1e-6, **files, **FAST)
    assert run.counts["steps"] == 1 and (out / "rmsearch.json").exists()


def test_too_many_useless_pairs_fail(encoder: str, tmp_path: Path) -> None:
    same_start = "word " * 100
    rows = [{"query": "q", "chosen_key": same_start + "a", "rejected_key": same_start + "b"}] * 2 + pair_sets.pairs(8)
    train = pair_sets.write(tmp_path / "train.json", rows)
    out = tmp_path / "model"
    with pytest.raises(RejectedError, match="same tokens"):
        execute(lora, dataset_list_train=train, model_name=encoder, output_dir=str(out), max_length=32, **FAST)
    assert not out.exists()


def test_the_documented_command_runs_as_written(
    files: dict[str, Any], encoder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from rmsearch.train import lora_example

    documented = f"""
      --dataset-list-train {files["dataset_list_train"]}
      --dataset-list-test {files["dataset_list_test"]}
      --model-name {encoder}
      --output-dir {tmp_path}/exp1/model1
      --wandb-project rmsearch
      --wandb-run-name example-lora
    """
    assert run_command(lora_example.lora, [*documented.split(), "--max-steps", "2"]) == 0
    said = capfd.readouterr().err
    assert "wandb" in said  # not installed here, or offline: said, and no reason to fail
    assert list((tmp_path / "exp1" / "model1").glob("checkpoint-*"))


def test_tensorboard_logs_are_written(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "model"
    execute(lora, model_name=encoder, output_dir=str(out), tensorboard=True, **files, **(FAST | {"max_steps": 2}))
    assert list((out / "logs").glob("events*"))


def test_a_missing_package_names_the_extra(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "trl", None)
        with pytest.raises(MissingExtraError, match=r"rmsearch\[train\]"):
            execute(lora, model_name=encoder, output_dir=str(tmp_path / "model"), **files)


def test_rmtrainer_prepares_and_trains(encoder: str, tmp_path: Path) -> None:
    from peft import LoraConfig
    from trl import RewardConfig

    from rmsearch import RMTrainer

    trainer = RMTrainer(model_name=encoder)
    rows = pair_sets.pairs(40)
    rows[0] = {name: [{"role": "user", "content": text}] for name, text in rows[0].items()}
    prepared = trainer.prepare_dataset(rows, base_dir=str(tmp_path / "exp"), test_size=0.25)
    assert len(prepared.train_ids) == 30 and len(prepared.test_ids) == 10
    assert json.loads((tmp_path / "exp" / "test_ids.json").read_text()) == prepared.test_ids
    arguments = RewardConfig(
        output_dir=str(tmp_path / "out"), max_steps=12, learning_rate=5e-3, use_cpu=True, bf16=False, report_to=[]
    )
    peft = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"], layers_to_transform=[1]
    )
    run = trainer.train(prepared, training_args=arguments, peft_config=peft)
    assert run.counts["steps"] == 12 and (tmp_path / "out" / "rmsearch.json").exists()
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.slow
def test_two_processes_train_together(files: dict[str, Any], encoder: str, tmp_path: Path) -> None:
    out = tmp_path / "model"
    # accelerate launch starts several CPU processes through MPI only; this is what it starts several GPU processes with
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "rmsearch.train.lora", "--model-name", encoder, "--output-dir", str(out)]
    for name, value in {**files, **FAST, "per_device_train_batch_size": 4}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("done stage=train.lora") == 1
    record = json.loads(Path(f"{out}.run.json").read_text())
    assert record["counts"]["steps"] == 32 and record["counts"]["accuracy_after"] >= 0.9
    single = tmp_path / "single"
    execute(lora, model_name=encoder, output_dir=str(single), **files, **FAST)
    rows = pair_sets.pairs(8, seed=1)
    assert np.corrcoef(scores(out, rows).ravel(), scores(single, rows).ravel())[0, 1] > 0.9
