"""Convert reward models: adapter + base to one folder, yes/no rerankers and upstream's folders to classifiers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from rmsearch.cli import main
from rmsearch.errors import ConfigError, ModelError
from rmsearch.progress import say
from rmsearch.stage import Run, StageConfig, model, option, stage, target

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.models.contract import Contract

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
        wanted = "check_point_path" if self.type == "checkpoint" else "model_path"
        given: str | None = getattr(self, wanted)
        if not given:
            flag = "--" + wanted.replace("_", "-")
            raise ConfigError(f"--type {self.type} needs {flag}", where="convert", remedy=f"Give {flag} FOLDER")
        return given.rstrip("/")


@stage("evaluation.convert", next_step="rmsearch evaluation rerank --model-name {output} --embed-output …")
def convert(config: ConvertConfig, run: Run) -> None:
    """Merge adapters, convert rerankers and upstream's folders; verify the scores.

    Writes a sequence-classification folder (safetensors, rmsearch.json) that search, transformers and vLLM load as it
    is. Scores of sample pairs before and after must agree, else nothing is written.
    """
    from rmsearch.models.folder import save_model_folder

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
    """Adapter + base, as one folder; returns the largest difference of the sample scores."""
    from rmsearch.engines.transformers import load_classifier, load_tokenizer, quiet
    from rmsearch.models.contract import make_contract, model_facts, write_contract
    from rmsearch.models.folder import open_model
    from rmsearch.models.heads import ADAPTER_FILE, adapter_base

    adapter = open_model(source)
    if not (adapter / ADAPTER_FILE).exists():
        remedy = "For a whole model use --type model"
        raise ModelError(f"is no adapter: it lacks {ADAPTER_FILE}", where=source, remedy=remedy)
    base = open_model(config.base_model_path or adapter_base(adapter))
    contract = _contract_of(config, adapter, base)
    tokenizer = load_tokenizer(base)
    before = _unmerged_scores(base, adapter, tokenizer, contract)
    stored = model_facts(base).dtype
    merged = load_classifier(base, tokenizer, contract, dtype=stored, device="cpu", lora=adapter)
    merged.config.num_labels = 1
    merged.config.problem_type = None
    if merged.config.pad_token_id is None:
        merged.config.pad_token_id = _pad(merged, contract, tokenizer)
    with quiet():
        merged.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    kept: dict[str, Any] = contract.model_dump(include={"calibration", "base_model", "base_digest", "training"})
    final = make_contract(out, contract.template, contract.max_length, **kept)
    write_contract(out, final)
    return _agreement(before, out, final, source)


def _contract_of(config: ConvertConfig, adapter: Path, base: Path) -> Contract:
    """What the adapter was trained with: its rmsearch.json (or that of the training's folder), else the base's."""
    from rmsearch.models.contract import infer_contract, model_facts, read_contract, resolve_contract
    from rmsearch.prompts.templates import default_template, template

    known = read_contract(adapter) or read_contract(adapter.parent)
    if known is not None:
        if config.template and template(config.template).name != known.template.name:
            remedy = "Leave --template away"
            raise ConfigError(f"it was trained with {known.template.name!r}", where="--template", remedy=remedy)
        return known
    facts = model_facts(base)
    if facts.classifier or read_contract(base) is not None:
        return resolve_contract(base, name=config.source, template_name=config.template)
    spec = default_template(encoder=facts.encoder, chat=facts.chat)
    if config.template is None:
        say("warning", problem=f"no rmsearch.json says how the adapter was trained: taking the template {spec.name!r}")
    return infer_contract(base, config.source, template(config.template) if config.template else spec)


def _unmerged_scores(base: Path, adapter: Path, tokenizer: Any, contract: Contract) -> np.ndarray:
    """Rewards of the sample by base and adapter side by side, as they were trained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from rmsearch.engines.transformers import quiet

    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(
            str(base), num_labels=1, dtype=torch.float32, use_safetensors=True
        )
    if plain.config.pad_token_id is None:
        plain.config.pad_token_id = _pad(plain, contract, tokenizer)
    return _rewards(PeftModel.from_pretrained(plain, str(adapter)).eval(), tokenizer, contract)


def _classifier(config: ConvertConfig, source: str, out: Path) -> float:
    """A yes/no reranker or a folder with ``score.pt`` as a sequence classifier; returns the largest difference."""
    from rmsearch.engines.transformers import load_tokenizer
    from rmsearch.models.contract import read_contract, resolve_contract
    from rmsearch.models.folder import open_model
    from rmsearch.models.heads import causal_to_classifier

    folder = open_model(source)
    contract = resolve_contract(folder, name=source, template_name=config.template)
    tokenizer = load_tokenizer(folder)
    before = _causal_scores(folder, tokenizer, contract)
    causal_to_classifier(folder, out, name=source)
    written = read_contract(out)
    assert written is not None
    return _agreement(before, out, written, source)


def _causal_scores(folder: Path, tokenizer: Any, contract: Contract) -> np.ndarray:
    """Rewards of the sample by the folder as it is: yes minus no, or the head on the last state."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from rmsearch.engines.transformers import quiet
    from rmsearch.models.heads import SCORE_FILE, foreign_head
    from rmsearch.prompts.renderer import Renderer

    head = foreign_head(folder, tokenizer)
    if head is None:
        remedy = "Use it as it is"
        raise ModelError("has its head in the usual place and needs no conversion", where=str(folder), remedy=remedy)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True).eval()
    renderer = Renderer(tokenizer, contract.template, contract.max_length)
    answers = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no")]
    rewards = []
    with torch.inference_mode():
        for query, key in SAMPLE:
            ids = torch.tensor([renderer.render(query, key).ids])
            if (folder / SCORE_FILE).exists() or contract.template.name != "qwen3_reranker":
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
    import numpy as np

    from rmsearch.prompts.renderer import Renderer
    from rmsearch.trainer.evaluation import score_inputs

    renderer = Renderer(tokenizer, contract.template, contract.max_length)
    rendered = [renderer.render(query, key) for query, key in SAMPLE]
    inputs = [np.asarray(each.ids, np.int32) for each in rendered]
    types = [each.token_types for each in rendered if each.token_types is not None]
    pad = _pad(loaded, contract, tokenizer)
    return score_inputs(loaded, inputs, pad=pad, limit=contract.max_length, token_types=types or None)


def _agreement(before: np.ndarray, out: Path, contract: Contract, source: str) -> float:
    """Loads the written folder in float32 and compares; ModelError when the scores changed."""
    from rmsearch.engines.transformers import load_classifier, load_tokenizer
    from rmsearch.trainer.export import check_equal

    tokenizer = load_tokenizer(out)
    after = _rewards(load_classifier(out, tokenizer, contract, dtype="float32", device="cpu"), tokenizer, contract)
    return check_equal(before, after, contract.dtype, source)


def _delete(source: str, target_folder: str) -> None:
    from rmsearch.storage import uri

    if uri.is_s3(source) or not Path(source).is_dir():
        remedy = "Delete it yourself"
        raise ConfigError("only a local source folder is deleted", where="--no-keep-original", remedy=remedy)
    if Path(source).resolve() != Path(target_folder).resolve():
        uri.remove(source)


if __name__ == "__main__":
    main(convert)
