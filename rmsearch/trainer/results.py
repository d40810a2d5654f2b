"""What a training came to: the best weights put back, the verdict, the exported folder and its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmsearch.stage import Run
from rmsearch.trainer.config import TrainingConfig

if TYPE_CHECKING:
    from rmsearch.trainer.fit import Training
    from rmsearch.trainer.loop import Evaluation

MINIMUM_GAIN = 1e-9
SAMPLE = 32  # inputs whose scores are compared before and after the export


def settings_of(config: TrainingConfig) -> dict[str, Any]:
    """The settings that decide the result."""
    from rmsearch.stage import fields_with_role

    skip = {*fields_with_role(type(config), "tuning"), *fields_with_role(type(config), "target")}
    return config.model_dump(mode="json", exclude=skip)


def export_outcome(training: Training, trained: Any, trainer: Any) -> None:
    """Puts the best weights back, judges the result, writes the model folder."""
    import numpy as np

    from rmsearch.trainer.export import export_model, json_text, model_card

    config, base, train, evaluation = training.config, training.base, training.train, training.evaluation
    state, best = trainer.state, evaluation.best()
    kept = state.global_step if best is None else best[0]
    if best is not None and kept != state.global_step:
        weights = training.checkpoints.best_weights(kept)
        assert weights is not None, f"best weights of step {kept} are gone"
        trained.load_state_dict(weights, strict=False)
    warning = verdict(training.run, evaluation)
    measures = _summary(training.run, evaluation, kept, state)
    rows = np.random.default_rng(0).choice(len(train.inputs), min(SAMPLE, len(train.inputs)), replace=False)
    facts = {
        "base_model": base_name(config.model_name),
        "base_digest": _base_digest(base.folder),
        "training": {"data": train.counts, "steps": kept, "measures": measures, "settings": settings_of(config)},
    }
    name = Path(config.output_dir).name or config.output_dir
    card = model_card(name, facts, evaluation.history, kept, warning)
    settings = {"config": config.model_dump(mode="json"), "arguments": trainer.args.to_dict()}
    extra = {
        "README.md": card,
        "trainer_config.json": json_text(settings),
        "trainer_state.json": json_text(vars(state) | {"stateful_callbacks": {}}),
    }
    export_model(base, trained, config.output_dir, [train.inputs[i] for i in rows], facts, extra)
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


def base_name(name: str) -> str:
    """A local folder by its full path, any other name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _base_digest(folder: Path) -> str:
    from rmsearch.storage import uri

    weights = sorted(str(path) for path in folder.glob("*.safetensors"))
    return uri.digest(weights[0]) if len(weights) == 1 else uri.digest(str(folder))
