"""Convert reward models: adapter + base to one folder, yes/no rerankers and upstream's folders to classifiers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from rmsearch.cli import main
from rmsearch.engines.transformers import load_classifier, quiet
from rmsearch.errors import ConfigError, ModelError
from rmsearch.models.contract import Contract, read_contract, write_contract
from rmsearch.models.folder import ADAPTER_FILE, ModelFolder, save_model_folder
from rmsearch.models.heads import adapter_base, causal_to_classifier, foreign_head
from rmsearch.models.resolve import infer_contract, make_contract, resolve_contract
from rmsearch.progress import say
from rmsearch.prompts.renderer import Renderer
from rmsearch.prompts.templates import default_template, template
from rmsearch.stage import Run, StageConfig, model, option, stage, target
from rmsearch.storage import uri
from rmsearch.trainer.evaluation import score_inputs
from rmsearch.trainer.export import check_equal

# Queries and keys of several lengths, so that padding and truncation are compared too.
SAMPLE = (
    ("What removes a coffee stain?", "Blot it at once, then use cold water and a little vinegar."),
    ("What removes a coffee stain?", "The train leaves at nine."),
    ("How does a reward model rank keys?", "It scores each query and key together and sorts by the score."),
    ("How does a reward model rank keys?", "Bake at 180 degrees for forty minutes. " * 12),
    ("capital of France", "Paris"),
    ("capital of France", "Berlin is the capital of Germany, and Rome that of Italy."),
)


class ConvertConfig(StageConfig):
    """Config of `rmsearch evaluation convert`."""

    type: Literal["checkpoint", "model"] = option(
        "checkpoint", "checkpoint: a LoRA adapter with its base; model: a reranker or upstream's folder (score.pt)."
    )
    check_point_path: str | None = model(None, "Adapter folder (or checkpoint-N of a training).")
    base_model_path: str | None = model(None, "The adapter's base; default: what the adapter names.")
    model_path: str | None = model(None, "Folder, URI or name to convert with --type model.")
    output: str | None = target(None, "Folder to write; default: the source's path + -converted-model.")
    template: str | None = option(None, "Its prompt template, when no rmsearch.json says so.")
    keep_original: bool = option(True, "Keep the source folder; --no-keep-original deletes a local one afterwards.")

    @model_validator(mode="before")
    @classmethod
    def _name_output(cls, given: Any) -> Any:
        if isinstance(given, dict) and not given.get("output"):
            source = given.get("model_path" if given.get("type") == "model" else "check_point_path")
            if isinstance(source, str) and source:
                return given | {"output": f"{source.rstrip('/')}-converted-model"}
        return given

    @property
    def source(self) -> str:
        """The path of what is converted."""
        name = "check_point_path" if self.type == "checkpoint" else "model_path"
        given: str | None = getattr(self, name)
        if not given:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"--type {self.type} needs {flag}", where="convert", remedy=f"Give {flag} FOLDER")
        return given.rstrip("/")


@stage("evaluation.convert", next_step="rmsearch evaluation rerank --model-name {output} --embed-output …")
def convert(config: ConvertConfig, run: Run) -> None:
    """Merge adapters, convert rerankers and upstream's folders; verify the scores.

    Writes a sequence-classification folder (safetensors, rmsearch.json) that search, transformers and vLLM load as it
    is. Scores of sample pairs before and after must agree, else nothing is written.
    """
    source, target_folder = config.source, str(config.output)
    with tempfile.TemporaryDirectory(prefix="rmsearch-convert-") as temp:
        folder = Path(temp) / "model"
        largest = _merge(config, source, folder) if config.type == "checkpoint" else _classifier(config, source, folder)
        save_model_folder(folder, target_folder)
    run.counts |= {"largest_difference": largest, "pairs_compared": len(SAMPLE)}
    run.note(folder=target_folder)
    run.say("converted", folder=target_folder, largest_difference=largest)
    if not config.keep_original:
        _delete(source, target_folder)


def _merge(config: ConvertConfig, source: str, out: Path) -> float:
    """Writes adapter and base as one folder; returns the largest difference of the sample scores."""
    adapter = ModelFolder.open(source)
    if not (adapter.path / ADAPTER_FILE).exists():
        remedy = "For a whole model use --type model"
        raise ModelError(f"is no adapter: it lacks {ADAPTER_FILE}", where=source, remedy=remedy)
    base = ModelFolder(ModelFolder.open(config.base_model_path or adapter_base(adapter)).path, source)
    contract = _contract_of(config, adapter, base)
    before = _unmerged_scores(base, adapter, contract)
    merged = load_classifier(base, contract, dtype=base.facts.dtype, device="cpu", adapter=adapter)
    merged.config.num_labels = 1
    merged.config.problem_type = None
    if merged.config.pad_token_id is None:
        merged.config.pad_token_id = _pad(merged, contract, base.tokenizer)
    with quiet():
        merged.save_pretrained(out, safe_serialization=True)
    base.tokenizer.save_pretrained(out)
    kept: dict[str, Any] = contract.model_dump(include={"calibration", "base_model", "base_digest", "training"})
    final = make_contract(ModelFolder(out), contract.template, contract.max_length, **kept)
    write_contract(out, final)
    return _agreement(before, out, final, source)


def _contract_of(config: ConvertConfig, adapter: ModelFolder, base: ModelFolder) -> Contract:
    """What the adapter was trained with: its rmsearch.json (or that of the training's folder), else the base's."""
    known = adapter.contract or read_contract(adapter.path.parent)
    if known is not None:
        if config.template and template(config.template).name != known.template.name:
            remedy = "Leave --template away"
            raise ConfigError(f"it was trained with {known.template.name!r}", where="--template", remedy=remedy)
        return known
    if base.facts.classifier or base.contract is not None:
        return resolve_contract(base, template_name=config.template)
    spec = default_template(encoder=base.facts.encoder, chat=base.facts.chat)
    if config.template is None:
        say("warning", problem=f"no rmsearch.json says how the adapter was trained: taking the template {spec.name!r}")
    return infer_contract(base, template(config.template) if config.template else spec)


def _unmerged_scores(base: ModelFolder, adapter: ModelFolder, contract: Contract) -> np.ndarray:
    """Rewards of the sample by base and adapter side by side, as they were trained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(
            str(base.path), num_labels=1, dtype=torch.float32, use_safetensors=True
        )
    if plain.config.pad_token_id is None:
        plain.config.pad_token_id = _pad(plain, contract, base.tokenizer)
    return _rewards(PeftModel.from_pretrained(plain, str(adapter.path)).eval(), base.tokenizer, contract)


def _classifier(config: ConvertConfig, source: str, out: Path) -> float:
    """Writes a yes/no reranker or a folder with ``score.pt`` as a sequence classifier; returns the largest difference
    of the sample scores."""
    folder = ModelFolder.open(source)
    contract = resolve_contract(folder, template_name=config.template)
    before = _causal_scores(folder, contract)
    written = causal_to_classifier(folder, out).contract
    assert written is not None
    return _agreement(before, out, written, source)


def _causal_scores(folder: ModelFolder, contract: Contract) -> np.ndarray:
    """Rewards of the sample by the folder as it is: yes minus no, or the head on the last state."""
    import torch
    from transformers import AutoModelForCausalLM

    head, tokenizer, path = foreign_head(folder), folder.tokenizer, str(folder.path)
    if head is None:
        remedy = "Use it as it is"
        raise ModelError("has its head in the usual place and needs no conversion", where=path, remedy=remedy)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()
    renderer = Renderer(tokenizer, contract.template, contract.max_length)
    answers = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no")]
    rewards = []
    with torch.inference_mode():
        for query, key in SAMPLE:
            ids = torch.tensor([renderer.render(query, key).ids])
            if folder.score_file.exists() or contract.template.name != "qwen3_reranker":
                rewards.append(float(model.base_model(input_ids=ids).last_hidden_state[0, -1] @ head[0]))
            else:
                logits = model(input_ids=ids).logits[0, -1]
                rewards.append(float(logits[answers[0]] - logits[answers[1]]))
    return np.asarray(rewards, np.float32)


def _pad(loaded: Any, contract: Contract, tokenizer: Any) -> int:
    pads = (loaded.config.pad_token_id, contract.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((each for each in pads if each is not None), 0)


def _rewards(loaded: Any, tokenizer: Any, contract: Contract) -> np.ndarray:
    """Rewards of the sample, float32[n], by a classifier."""
    renderer = Renderer(tokenizer, contract.template, contract.max_length)
    rendered = [renderer.render(query, key) for query, key in SAMPLE]
    inputs = [np.asarray(each.ids, np.int32) for each in rendered]
    types = [each.token_types for each in rendered if each.token_types is not None]
    pad = _pad(loaded, contract, tokenizer)
    return score_inputs(loaded, inputs, pad=pad, limit=contract.max_length, token_types=types or None)


def _agreement(before: np.ndarray, out: Path, contract: Contract, source: str) -> float:
    """Loads the written folder in float32 and compares; ModelError when the scores changed."""
    folder = ModelFolder(out)
    loaded = load_classifier(folder, contract, dtype="float32", device="cpu")
    after = _rewards(loaded, folder.tokenizer, contract)
    return check_equal(before, after, contract.dtype, source)


def _delete(source: str, target_folder: str) -> None:
    if uri.is_s3(source) or not Path(source).is_dir():
        remedy = "Delete it yourself"
        raise ConfigError("only a local source folder is deleted", where="--no-keep-original", remedy=remedy)
    if Path(source).resolve() != Path(target_folder).resolve():
        uri.remove(source)


if __name__ == "__main__":
    main(convert)
