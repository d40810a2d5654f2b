"""Model folders: where they are found, what is refused, and that half of one never passes for a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmsearch.errors import ConfigError, InputMissingError, ModelError, RetryableError
from rmsearch.models import folder as models
from rmsearch.storage import local, uri


def model(folder: Path, **more: bytes) -> Path:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "chat_template.jinja": b"x", **more}
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


WEIGHTS = {"model.safetensors": b"weights"}


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", **WEIGHTS)
    assert models.open_model(str(folder)) == folder and models.open_model(f"{folder}/") == folder


def test_the_packaged_model_under_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {models.open_model(name) for name in models.PACKAGED_NAMES}
    assert len(found) == 1 and (found.pop() / "model.safetensors").exists()
    own = model(tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2", **WEIGHTS)
    assert models.open_model("sentence-transformers/all-MiniLM-L6-v2").resolve() == own  # a local folder goes first


def test_tampered_packaged_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PACKAGED_SHA256", "0" * 64)
    models._packaged.cache_clear()
    with pytest.raises(ModelError, match="not the published ones"):
        models.open_model(models.PACKAGED)
    models._packaged.cache_clear()


@pytest.mark.parametrize("name", ["/no/such/model", "./no", "~/no-such-model", "a/b/c", "exp/model/"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(InputMissingError, match="no such model folder") as caught:
        models.open_model(name)
    assert caught.value.exit_code == 2


def test_pickles_and_half_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="only pickled weights"):
        models.open_model(str(model(tmp_path / "pickle", **{"pytorch_model.bin": b""})))
    with pytest.raises(ModelError, match="no weights"):
        models.open_model(str(model(tmp_path / "none")))
    (tmp_path / "data").mkdir()
    with pytest.raises(InputMissingError, match="an empty one"):
        models.open_model(str(tmp_path / "data"))
    (tmp_path / "data" / "a.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.open_model(str(tmp_path / "data"))
    with pytest.raises(ModelError, match="is a file"):
        models.open_model(str(tmp_path / "data" / "a.safetensors"))
    with pytest.raises(ConfigError):
        models.open_model("")
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    shards = {"model-1.safetensors": b"", "model.safetensors.index.json": index}
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing, first model-2\.safetensors"):
        models.open_model(str(model(tmp_path / "half", **shards)))
    with pytest.raises(ModelError, match="does not parse"):
        models.open_model(str(model(tmp_path / "bad", **WEIGHTS, **{"model.safetensors.index.json": b"{"})))


def test_saving_keeps_what_a_model_needs(tmp_path: Path) -> None:
    extra = {
        "training_args.bin": b"",
        "optimizer.pt": b"",
        "old__score.pt": b"",
        ".git__config": b"",
        "1_Pooling__config.json": b"{}",
    }
    folder = model(tmp_path / "m", **WEIGHTS, **extra)
    models.save_model_folder(folder, str(tmp_path / "out"))
    kept = ["1_Pooling/config.json", "_manifest.json", "chat_template.jinja", "config.json", "model.safetensors"]
    assert local.walk(tmp_path / "out") == [*kept, "tokenizer.json"]
    with pytest.raises(ModelError):
        models.save_model_folder(model(tmp_path / "p", **{"pytorch_model.bin": b""}), str(tmp_path / "out"))
    assert models.open_model(str(tmp_path / "out")) == tmp_path / "out"


@pytest.mark.s3
def test_models_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    folder, where = model(tmp_path / "m", **WEIGHTS), f"{s3_bucket}/models/m"
    models.save_model_folder(folder, where)
    opened = models.open_model(where)
    assert local.walk(opened) == local.walk(folder) and models.open_model(f"{where}/") == opened
    with uri.writer(f"{where}/pytorch_model.bin") as stream:
        stream.write(b"evil")
    assert not list(models.open_model(where).glob("*.bin"))
    uri.remove(f"{where}/model.safetensors")
    with pytest.raises((ModelError, InputMissingError)):
        models.open_model(where)
    with pytest.raises(InputMissingError):
        models.open_model(f"{s3_bucket}/models/none")


def test_each_file_is_read_once(tmp_path: Path) -> None:
    import tiny_models

    folder = models.ModelFolder.open(str(tiny_models.decoder_reward_model(tmp_path / "m")))
    assert folder.has_head and folder.facts.classifier and folder.contract is None and not folder.is_adapter
    tokenizer = folder.tokenizer
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder.path / name).unlink()
    assert folder.has_head and folder.facts.classifier and folder.tokenizer is tokenizer
    with pytest.raises(ModelError, match=r"no config\.json"):
        _ = models.ModelFolder(folder.path).config


@pytest.mark.s3
def test_upstreams_head_beside_a_model_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    import tiny_models
    import torch

    from rmsearch.models.heads import foreign_head

    folder, where = tiny_models.causal_model(tmp_path / "rm-converted-model"), f"{s3_bucket}/models/rm-converted-model"
    head = torch.randn(1, json.loads((folder / "config.json").read_text())["hidden_size"])
    torch.save(head, folder / "score.pt")
    (folder / "optimizer.pt").write_bytes(b"")
    models.save_model_folder(folder, where)
    opened = models.open_model(where)
    assert [path.name for path in opened.glob("*.pt")] == ["score.pt"]
    assert torch.equal(foreign_head(models.ModelFolder(opened)), head)


@pytest.mark.s3
def test_a_pickle_under_the_heads_name_on_s3_runs_nothing(s3_bucket: str, tmp_path: Path) -> None:
    import pickle

    import tiny_models

    from rmsearch.models.heads import foreign_head

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    folder, where = tiny_models.causal_model(tmp_path / "m"), f"{s3_bucket}/models/evil"
    (folder / "score.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    models.save_model_folder(folder, where)
    with pytest.raises(ModelError, match=r"score\.pt: is no tensor"):
        foreign_head(models.ModelFolder.open(where))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match="only pickled weights"):
        models.open_model(str(model(tmp_path / "lone", **{"score.pt": b""})))


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def unreachable(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(RetryableError, match="hub cannot be reached") as caught:
        models.open_model("someone/some-model")
    assert caught.value.exit_code == 75
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        models.open_model("someone/some-model")
    with pytest.raises(InputMissingError, match="no such"):
        monkeypatch.undo()
        models.open_model("./someone")
