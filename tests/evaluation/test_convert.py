"""Conversion of adapters, yes/no rerankers and upstream's folders; scores agree, or nothing is written."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from rmsearch.cli import run_command
from rmsearch.errors import ConfigError, ModelError
from rmsearch.evaluation import convert as module
from rmsearch.evaluation.convert import SAMPLE, convert
from rmsearch.models.contract import read_contract, write_contract
from rmsearch.models.folder import ModelFolder
from rmsearch.models.resolve import make_contract
from rmsearch.prompts.templates import TEMPLATES
from rmsearch.stage import execute


def scores(folder: Path | str, **options: str) -> np.ndarray:
    from rmsearch.engines import load_scorer

    scorer = load_scorer(str(folder), engine="transformers", **options)
    found = asyncio.run(scorer.score(list(SAMPLE)))
    scorer.close_sync()
    return found


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_adapter_and_its_base_become_one_folder(kind: str, tmp_path: Path) -> None:
    make = tiny_models.bert_cross_encoder if kind == "encoder" else tiny_models.decoder_reward_model
    base = make(tmp_path / "base")
    adapter = tiny_models.lora_adapter(tmp_path / "adapter", base)
    write_contract(adapter, make_contract(ModelFolder(base), TEMPLATES["encoder" if kind == "encoder" else "chat"], 96))
    flags = ["--type", "checkpoint", "--check-point-path", str(adapter), "--base-model-path", str(base)]
    from rmsearch.evaluation.utils import convert as documented

    assert run_command(documented, flags) == 0
    out = tmp_path / "adapter-converted-model"
    assert np.allclose(scores(out), scores(adapter), atol=1e-4)
    assert not np.allclose(scores(out), scores(base, template="encoder" if kind == "encoder" else "chat"), atol=1e-2)
    contract = read_contract(out)
    assert contract is not None and contract.max_length == 96
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert adapter.exists() and execute(convert, check_point_path=str(adapter), base_model_path=str(base)).skipped


def test_an_adapter_without_contract_takes_the_bases(tmp_path: Path) -> None:
    base = tiny_models.bert_cross_encoder(tmp_path / "base")  # no rmsearch.json: segment token types are inferred
    adapter = tiny_models.lora_adapter(tmp_path / "adapter", base)
    execute(convert, check_point_path=str(adapter), output=str(tmp_path / "out"))
    contract = read_contract(tmp_path / "out")
    assert contract is not None and contract.token_types == "segment"
    assert np.allclose(scores(tmp_path / "out"), scores(adapter), atol=1e-4)


def test_a_yes_no_reranker_becomes_a_classifier(tmp_path: Path) -> None:
    reranker = tiny_models.causal_model(tmp_path / "Qwen3-Reranker-tiny", tied=True)
    run = execute(convert, type="model", model_path=str(reranker))
    out = Path(f"{reranker}-converted-model")
    assert run.counts["largest_difference"] < 1e-4
    assert np.allclose(scores(out), scores(reranker), atol=1e-4)
    contract = read_contract(out)
    assert contract is not None and contract.template.name == "qwen3_reranker"
    assert "Qwen3ForSequenceClassification" in (out / "config.json").read_text()


def test_upstreams_folder_with_score_pt_becomes_a_classifier(tmp_path: Path) -> None:
    folder = tiny_models.causal_model(tmp_path / "rm-converted-model")
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    torch.save(head, folder / "score.pt")
    execute(convert, type="model", model_path=str(folder), template="upstream_search", output=str(tmp_path / "out"))
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["score.weight"], head) and "lm_head.weight" not in tensors
    assert not (tmp_path / "out" / "score.pt").exists()
    assert np.allclose(scores(tmp_path / "out"), scores(folder, template="upstream_search"), atol=1e-4)


def test_changed_scores_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = tiny_models.causal_model(tmp_path / "Qwen3-Reranker-tiny")
    monkeypatch.setattr(module, "_causal_scores", lambda *_: np.ones(len(SAMPLE), np.float32))
    with pytest.raises(ModelError, match="scores change"):
        execute(convert, type="model", model_path=str(reranker), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_original_goes_only_when_asked(tmp_path: Path) -> None:
    reranker = tiny_models.causal_model(tmp_path / "Qwen3-Reranker-tiny")
    flags = ["--type", "model", "--model-path", str(reranker), "--output", str(tmp_path / "out")]
    assert run_command(convert, [*flags, "--no-keep-original"]) == 0
    assert not reranker.exists() and (tmp_path / "out" / "model.safetensors").exists()


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    base = tiny_models.bert_cross_encoder(tmp_path / "base")
    with pytest.raises(ConfigError, match="--check-point-path"):
        execute(convert)
    with pytest.raises(ConfigError, match="--model-path"):
        execute(convert, type="model")
    with pytest.raises(ModelError, match="no adapter"):
        execute(convert, check_point_path=str(base))
    with pytest.raises(ModelError, match="needs no conversion"):
        execute(convert, type="model", model_path=str(base))
    plain = tiny_models.causal_model(tmp_path / "plain")
    with pytest.raises(ModelError, match="without a reward head"):
        execute(convert, type="model", model_path=str(plain))
    torch.save({"not": "a tensor"}, plain / "score.pt")
    with pytest.raises(ModelError):
        execute(convert, type="model", model_path=str(plain))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "plain"}
