"""The contract: written, read, inferred, and held against what the user asks for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from rmsearch.errors import ConfigError, ContractError, ModelError
from rmsearch.models.contract import CONTRACT_FILE, Calibration, read_contract, write_contract
from rmsearch.models.folder import ModelFolder
from rmsearch.models.resolve import infer_contract, make_contract, resolve_contract
from rmsearch.prompts.templates import template, template_hash


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return tiny_models.bert_cross_encoder(tmp_path / "bert")


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return tiny_models.decoder_reward_model(tmp_path / "qwen3")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_written_contract_is_read_back(bert: Path) -> None:
    facts = {"base_model": "mini", "base_digest": "ab", "training": {"steps": 3}, "calibration": Calibration(a=2, b=1)}
    contract = make_contract(ModelFolder(bert), template("encoder"), 128, **facts)
    assert contract.architecture == "BertForSequenceClassification"
    assert (contract.pooling, contract.head.bias, contract.pad_token_id) == ("cls", True, 0)
    assert contract.versions["transformers"]
    write_contract(bert, contract)
    assert read_contract(bert) == contract
    assert resolve_contract(ModelFolder(bert)) == contract


def test_missing_contract_is_inferred(bert: Path, qwen3: Path, tmp_path: Path, caplog: Any) -> None:
    assert read_contract(bert) is None
    encoder = resolve_contract(ModelFolder(bert))
    assert (encoder.template.name, encoder.token_types, encoder.max_length) == ("encoder_segment", "segment", 512)
    with caplog.at_level(logging.WARNING):
        decoder = resolve_contract(ModelFolder(qwen3))
    assert (decoder.template.name, decoder.pooling, decoder.inferred) == ("upstream_search", "last", True)
    assert "useless scores" in caplog.text
    silent = tiny_models.decoder_reward_model(tmp_path / "plain", chat_template=None)
    assert resolve_contract(ModelFolder(silent)).template.name == "plain"
    assert decoder.max_length == 1024  # the model's positions, fewer than the default
    assert resolve_contract(ModelFolder(qwen3), template_name="plain_key_first").order == "key_first"


def test_causal_model_is_a_reward_model_only_when_called_so(tmp_path: Path) -> None:
    folder = tiny_models.causal_model(tmp_path / "qwen3-4b")
    with pytest.raises(ModelError, match=r"template='qwen3_reranker'"):
        resolve_contract(ModelFolder(folder))
    assert infer_contract(ModelFolder(folder, "Qwen/Qwen3-Reranker-4B")).template.name == "qwen3_reranker"
    assert resolve_contract(ModelFolder(folder), template_name="qwen3_reranker").template.name == "qwen3_reranker"


def test_models_without_one_reward_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="3 labels"):
        resolve_contract(ModelFolder(tiny_models.bert_cross_encoder(tmp_path / "three", num_labels=3)))
    with pytest.raises(ModelError, match="BertModel has no reward head"):
        resolve_contract(ModelFolder(tiny_models.sentence_encoder(tmp_path / "encoder")))
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_contract(ModelFolder(tmp_path))


def test_other_use_than_trained_for_is_refused(bert: Path, qwen3: Path) -> None:
    write_contract(bert, make_contract(ModelFolder(bert), template("encoder"), 128))
    with pytest.raises(ContractError, match="trained with the template 'encoder'"):
        resolve_contract(ModelFolder(bert), template_name="encoder_key_first")
    assert resolve_contract(ModelFolder(bert), template_name="encoder").max_length == 128
    assert resolve_contract(ModelFolder(bert), max_length=64).max_length == 64
    with pytest.raises(ConfigError, match="512 positions"):
        resolve_contract(ModelFolder(bert), max_length=1024)
    with pytest.raises(ContractError, match="is for encoders"):
        resolve_contract(ModelFolder(qwen3), template_name="encoder")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template_hash": "0" * 16}, "changed after"),
        ({"order": "key_first"}, "changed after"),
        ({"architecture": "LlamaForSequenceClassification"}, "mixes two models"),
        ({"activation": "sigmoid"}, "activation"),
        ({"max_length": "long"}, "max_length"),
        ({"format": 9}, "format"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_contract_that_does_not_hold_together_is_refused(bert: Path, changes: dict[str, Any], words: str) -> None:
    write_contract(bert, make_contract(ModelFolder(bert), template("encoder"), 128))
    edit(bert / CONTRACT_FILE, **changes)
    with pytest.raises(ContractError, match=words):
        resolve_contract(ModelFolder(bert))


def test_broken_files_are_named(bert: Path) -> None:
    (bert / CONTRACT_FILE).write_text("{")
    with pytest.raises(ModelError, match=r"rmsearch\.json: cannot be read"):
        read_contract(bert)
    (bert / CONTRACT_FILE).write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        read_contract(bert)
    (bert / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="no complete safetensors"):
        _ = ModelFolder(bert).tensors


def test_own_template_travels_with_the_model(qwen3: Path) -> None:
    mine = template("chat", instruction="Pick the agent that will get this done.")
    write_contract(qwen3, make_contract(ModelFolder(qwen3), mine, 256))
    assert resolve_contract(ModelFolder(qwen3)).template.instruction.startswith("Pick the agent")
    assert template_hash(resolve_contract(ModelFolder(qwen3)).template) != template_hash(template("chat"))


def test_facts_of_a_model(qwen3: Path) -> None:
    facts = ModelFolder(qwen3).facts
    assert (facts.classifier, facts.encoder, facts.num_labels, facts.chat) == (True, False, 1, True)
    assert "score.weight" in ModelFolder(qwen3).tensors


def test_calibrated_probability() -> None:
    calibration = Calibration(a=2.0, b=-1.0)
    assert calibration.probability(0.5) == 0.5
    assert calibration.probability(-1e6) == 0.0
    assert calibration.probability(1e6) == 1.0
