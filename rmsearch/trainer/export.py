"""A trained model as a folder that transformers, vLLM and ours load as it is; proved to score as it did in training."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rmsearch.engines.transformers import load_classifier, quiet
from rmsearch.errors import ModelError
from rmsearch.models.contract import Contract, write_contract
from rmsearch.models.folder import ModelFolder, save_model_folder
from rmsearch.models.heads import merged
from rmsearch.models.resolve import make_contract
from rmsearch.stage import Run
from rmsearch.trainer.card import model_card
from rmsearch.trainer.evaluation import Evaluation, score_inputs
from rmsearch.trainer.fit import Training
from rmsearch.trainer.model import Base

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-3}
MINIMUM_GAIN = 1e-9
SAMPLE = 32  # inputs whose scores are compared before and after the export


def export(training: Training, trainer: Any) -> None:
    """Puts the best weights back, judges the result and writes the model folder; one process does, the others wait."""
    if trainer.is_world_process_zero():
        _export(training, trainer)
    trainer.accelerator.wait_for_everyone()


def _export(training: Training, trainer: Any) -> None:
    config, base, train, evaluation = training.config, training.base, training.train, training.evaluation
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    state, best = trainer.state, evaluation.best()
    kept = state.global_step if best is None else best[0]
    if kept != state.global_step:
        trained.load_state_dict(training.checkpoints.best_weights(kept), strict=False)
    warning = verdict(training.run, evaluation)
    measures = _summary(training.run, evaluation, kept, state)
    rows = np.random.default_rng(0).choice(len(train.inputs), min(SAMPLE, len(train.inputs)), replace=False)
    facts = {
        "base_model": base.name,
        "base_digest": base.digest(),
        "training": {"data": train.counts, "steps": kept, "measures": measures, "settings": config.settings()},
    }
    name = Path(config.output_dir).name or config.output_dir
    settings = {"config": config.model_dump(mode="json"), "arguments": trainer.args.to_dict()}
    texts = {
        "README.md": model_card(name, facts, evaluation.history, kept, warning),
        "trainer_config.json": _json_text(settings),
        "trainer_state.json": _json_text(vars(state) | {"stateful_callbacks": {}}),
    }
    export_model(base, trained, config.output_dir, [train.inputs[i] for i in rows], facts, texts)
    training.checkpoints.finish()


def verdict(run: Run, evaluation: Evaluation) -> str | None:
    """The loud line when the training did not help: no better than the base, or than the first stage."""
    best, base = evaluation.best(), evaluation.base()
    name = evaluation.metric
    if name is None or best is None or base is None:
        return None
    after, before, problems = best[1][name], base[name], []
    shown = name.removeprefix("eval_")
    if after <= before + MINIMUM_GAIN:
        problems.append(f"{shown} {after:.4f} is no better than before training ({before:.4f})")
    if evaluation.dev is not None and after <= evaluation.dev.first_stage:
        problems.append(f"{shown} {after:.4f} is no better than the first stage ({evaluation.dev.first_stage:.4f})")
    if not problems:
        return None
    text = "WARNING: the trained model's " + "; and its ".join(problems)
    run.say("warning", problem=text)
    run.note(warning=text)
    return text


def _summary(run: Run, evaluation: Evaluation, kept: int, state: Any) -> dict[str, Any]:
    best, base = evaluation.best(), evaluation.base()
    measures: dict[str, Any] = {"before": base, "after": best[1] if best else None}
    if evaluation.dev is not None:
        measures["first_stage_ndcg@10"] = evaluation.dev.first_stage
    run.counts |= {"steps": state.global_step, "kept_step": kept}
    for when, measured in (("before", base), ("after", best[1] if best else None)):
        for key in ("eval_accuracy", "eval_ndcg@10"):
            if measured and key in measured:
                run.counts[f"{key.removeprefix('eval_')}_{when}"] = measured[key]
    run.note(measures=measures, history=evaluation.history)
    return measures


def export_model(
    base: Base,
    trained: Any,
    output: str,
    sample: list[np.ndarray],
    facts: dict[str, Any],
    texts: dict[str, str],
) -> Contract:
    """Writes adapter/, the merged model, tokenizer, contract and the files of ``texts`` (name -> text) to ``output``.

    trained: the PeftModel or plain model; it is merged in place, so it is of no use afterwards. sample: token ids of
    inputs. facts: fields of the contract (base_model, base_digest, training). The exported folder's scores of the
    sample are compared with the trained model's: a difference above TOLERANCE is a ModelError and nothing is written.
    Both are computed in float32, so that only the weights differ: passes in bfloat16 differ by more than weights do.
    """
    import torch

    dtype = _dtype(trained)
    try:
        before = _scores(trained.float(), sample, base)
    except torch.OutOfMemoryError:  # a bfloat16 base that fills the GPU
        before = _scores(trained.cpu().float(), sample, base)
    device = next(trained.parameters()).device
    trained = trained.cpu()
    with tempfile.TemporaryDirectory(prefix="rmsearch-export-") as temp:
        folder = Path(temp)
        plain = trained
        if hasattr(trained, "peft_config"):
            _save_adapter(trained, folder / "adapter", base.name)
            plain = merged(trained, getattr(torch, dtype))
        _save_plain(plain, folder, base.tokenizer)
        spec, length = base.renderer.template, base.renderer.max_length
        contract = make_contract(ModelFolder(folder), spec, length, dtype=dtype, **facts)
        if (folder / "adapter").exists():
            write_contract(folder / "adapter", contract)
            base.tokenizer.save_pretrained(folder / "adapter")
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        loaded = load_classifier(ModelFolder(folder), contract, dtype="float32", device=str(device))
        check_equal(before, _scores(loaded, sample, base), contract.dtype, str(folder))
        write_contract(folder, contract)
        save_model_folder(folder, output)
    return contract


def _save_plain(model: Any, folder: Path, tokenizer: Any) -> None:
    config = model.config
    config.num_labels = 1
    config.use_cache = True
    config.problem_type = None
    with quiet():
        model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def _save_adapter(model: Any, folder: Path, base_name: str) -> None:
    for each in model.peft_config.values():
        each.base_model_name_or_path = base_name
        each.inference_mode = True
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)  # "auto" asks the hub
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in


def _dtype(model: Any) -> str:
    """The dtype of the base's weights (the embeddings come first); LoRA and the head are float32 over any base."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _scores(model: Any, sample: list[np.ndarray], base: Base) -> np.ndarray:
    """Rewards of the sample, float32[n]."""
    return score_inputs(model, sample, pad=base.tokenizer.pad_token_id, limit=base.facts.max_positions)


def check_equal(expected: np.ndarray, actual: np.ndarray, dtype: str, where: str) -> float:
    """The largest difference of two sets of rewards; ModelError above the tolerance of the dtype."""
    largest = float(np.abs(expected - actual).max())
    allowed = TOLERANCE[dtype] * max(1.0, float(np.abs(expected).max()))
    if not largest <= allowed:
        remedy = "Nothing was written. This is a fault in the export; please report it with the model's name"
        raise ModelError(f"scores change by {largest:.2g} (allowed: {allowed:.2g})", where=where, remedy=remedy)
    return largest


def _json_text(value: Any) -> str:
    """Indented JSON for the side files."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
