"""From encoded pairs to an exported model: what every trainer of reward models shares."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rmsearch.errors import ConfigError, MissingExtraError
from rmsearch.stage import Run
from rmsearch.trainer.config import TrainingConfig
from rmsearch.trainer.results import base_name, export_outcome, settings_of

if TYPE_CHECKING:
    from rmsearch.prompts.renderer import Renderer
    from rmsearch.trainer.checkpoints import Checkpoints
    from rmsearch.trainer.data import Encoded, Reject
    from rmsearch.trainer.loop import Evaluation, Stop
    from rmsearch.trainer.model import Base

T = TypeVar("T")


@dataclass(frozen=True)
class Training:
    """One training: what was asked for, what it learns from, what measures it, and what is kept of it."""

    config: TrainingConfig
    run: Run
    base: Base
    train: Encoded
    evaluation: Evaluation
    checkpoints: Checkpoints
    stop: Stop


def require_train() -> None:
    """MissingExtraError when a package for training is not installed; keeps libraries from calling home."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for package in ("torch", "transformers", "datasets", "accelerate", "peft", "trl"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise MissingExtraError(package, "train") from None


def prepare_base(config: TrainingConfig, data_template: str | None) -> Base:
    """The base model with its head, tokenizer and template, in the precision that fits machine and config."""
    require_train()
    from rmsearch.models.contract import model_facts
    from rmsearch.models.folder import open_model
    from rmsearch.trainer.model import choose_length, choose_template, load_base

    folder = open_model(config.model_name)
    facts = model_facts(folder)
    spec = choose_template(folder, facts, config.template, config.order, data_template)
    _, attention, dtype = precision(config, facts.dtype)
    length = choose_length(folder, facts, config.max_length)
    return load_base(folder, spec, length, dtype=dtype, attention=attention, seed=config.seed)


def precision(config: TrainingConfig, stored: str) -> tuple[bool, str | None, str]:
    """(bf16 autocast, attention implementation, dtype of the weights) for this machine.

    Measured on two Xeon cores with AMX, MiniLM, 64 × 48 tokens, forward and backward: fp32 0.65 s, bf16 with sdpa
    0.62 s, bf16 with eager attention 0.34 s: on a CPU sdpa's backward pass is slow in bf16.
    """
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        able = torch.cuda.is_bf16_supported()
    else:
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        able = bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    if config.dtype == "bf16" and cuda and not able:
        raise ConfigError("this GPU has no bfloat16", where="--dtype", remedy="Use --dtype fp32")
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and able)
    frozen = config.lora_r and stored == "bfloat16" and (cuda or config.dtype == "bf16")
    weights = "bfloat16" if bf16 and frozen else "float32"
    return bf16, "eager" if bf16 and not cuda else None, weights


def encoded_sides(
    config: TrainingConfig,
    run: Run,
    base: Base,
    read: Callable[[str], Iterable[T]],
    encode: Callable[[Iterable[T], Renderer, Reject], Encoded],
) -> tuple[Encoded, Encoded | None]:
    """The training files as one, and the test file if there is one. RecordError when too much of both is rejected."""
    train = encode(chain.from_iterable(map(read, config.dataset_list_train)), base.renderer, run.reject)
    test = encode(read(config.dataset_list_test), base.renderer, run.reject) if config.dataset_list_test else None
    run.check_rejects(train.counts["read"] + (test.counts["read"] if test else 0))
    return train, test


def fit(config: TrainingConfig, run: Run, base: Base, train: Encoded, test: Encoded | None) -> None:
    """Trains on encoded pairs and exports; what all trainers share."""
    from rmsearch.trainer import loop
    from rmsearch.trainer.checkpoints import Checkpoints
    from rmsearch.trainer.evaluation import used_inputs

    if not len(train):
        raise ConfigError("no pair is left to train on", where=", ".join(config.dataset_list_train))
    evaluation = loop.Evaluation(used_inputs(test.sample(config.max_eval_pairs, config.seed)) if test else None)
    evaluation.dev = dev_set(config, base)
    _count(run, train, test)
    checkpoints = Checkpoints(config.output_dir, run.fingerprint, settings_of(config))
    checkpoints.contract = checkpoint_contract(config, base)
    stop = loop.Stop(config.time_limit_minutes)
    training = Training(config, run, base, train, evaluation, checkpoints, stop)
    trained, trainer = train_model(training)
    if trainer.stated:
        run.counts["forwards_per_pair"] = round(trainer.forwarded / trainer.stated, 4)
    if stop.signalled:
        raise KeyboardInterrupt("the state is saved")
    if trainer.is_world_process_zero():
        export_outcome(training, trained, trainer)
        if stop.timed_out:
            run.say("time_limit", minutes=config.time_limit_minutes, steps=trainer.state.global_step)
    trainer.accelerator.wait_for_everyone()


def checkpoint_contract(config: TrainingConfig, base: Base) -> Any:
    """The contract of a checkpoint of this training."""
    from rmsearch.models.contract import Head, make_contract

    head = getattr(base.model, "classifier", None) or getattr(base.model, "score", None)
    bias = any(name.endswith("bias") for name, _ in head.named_parameters()) if head is not None else False
    return make_contract(
        base.folder,
        base.renderer.template,
        base.renderer.max_length,
        architecture=type(base.model).__name__,
        head=Head(bias=bias),
        pad_token_id=base.tokenizer.pad_token_id,
        base_model=base_name(config.model_name),
    )


def dev_set(config: TrainingConfig, base: Base) -> Any:
    """The dev set for nDCG@10, if one is given."""
    from rmsearch.trainer.evaluation import load_dev

    if config.dev_dataset_path is None and config.dev_embed_output is None:
        return None
    if config.dev_dataset_path is None or config.dev_embed_output is None:
        raise ConfigError("nDCG needs both", where="--dev-dataset-path and --dev-embed-output")
    return load_dev(
        config.dev_dataset_path,
        config.dev_split,
        config.dev_embed_output,
        base.renderer,
        top_k=config.dev_top_k,
        most_queries=config.dev_queries,
        seed=config.seed,
    )


def _count(run: Run, train: Encoded, test: Encoded | None) -> None:
    run.counts |= {"pairs": len(train), "truncated": train.counts["truncated"]}
    run.note(train=train.counts)
    if train.counts["truncated"]:
        run.say("truncated", inputs=train.counts["truncated"], of=train.counts["inputs"])
    if test is not None:
        overlap = len(train.queries & test.queries)
        run.counts["test_pairs"] = len(test)
        run.note(test=test.counts, test_queries_in_train=overlap)
        if overlap:
            run.say("warning", problem=f"{overlap} of {len(test.queries)} test queries are also in the training pairs")


def wrap(config: TrainingConfig, base: Base) -> Any:
    """The base as it is trained: with LoRA, or with its own weights (all or some layers) learning."""
    from rmsearch.trainer.model import freeze_outside, lora_config, set_dropout, start_pooler

    set_dropout(base.model, config.dropout)
    start_pooler(base.model, config.pooler)
    if not config.lora_r:
        freeze_outside(base.model, config.lora_layers, embeddings=config.train_embeddings)
        return base.model
    from peft import get_peft_model

    wanted = lora_config(
        base,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_targets,
        layers=config.lora_layers,
    )
    model = get_peft_model(base.model, wanted)
    for parameter in model.parameters():
        if parameter.requires_grad:  # small updates vanish in bfloat16
            parameter.data = parameter.data.float()
    return model


def train_model(training: Training) -> tuple[Any, Any]:
    """Trains, resuming from this run's newest complete checkpoint; returns (model, trainer)."""
    from accelerate import PartialState
    from transformers import set_seed

    from rmsearch.trainer import loop
    from rmsearch.trainer.trackers import tracker_callbacks

    config, run, base, checkpoints = training.config, training.run, training.base, training.checkpoints
    bf16, _, _ = precision(config, base.facts.dtype)
    arguments = loop.training_arguments(config, checkpoints.work, encoder=base.facts.encoder, bf16=bf16)
    PartialState().wait_for_everyone()  # all have looked at the output before anything there changes
    resume = checkpoints.open(anew=config.force) if PartialState().is_main_process else None
    resume = _same_everywhere(resume)
    set_seed(config.seed)
    model = wrap(config, base)
    with run.progress(None, "steps") as bar:
        flow = loop.flow_callback(config, training.evaluation, training.stop, bar.advance)
        trainer = loop.trainer_type()(
            pairs=training.train,
            config=config,
            evaluation=training.evaluation,
            checkpoints=checkpoints,
            limit=base.facts.max_positions,
            model=model,
            args=arguments,
            processing_class=base.tokenizer,
            callbacks=[flow, *tracker_callbacks(config, run, checkpoints.work)],
        )
        flow.trainer, flow.bar = trainer, bar
        if resume is not None:
            _restore(training, trainer, resume)
        if config.max_steps != 0 and not _is_over(trainer, resume):
            with training.stop.watching():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), trainer


def _same_everywhere(resume: Path | None) -> Path | None:
    from accelerate.utils import broadcast_object_list

    shared = [str(resume) if resume else None]
    broadcast_object_list(shared)
    return Path(shared[0]) if shared[0] else None


def _restore(training: Training, trainer: Any, resume: Path) -> None:
    """Takes up the measurements of the interrupted run."""
    state = json.loads((resume / "trainer_state.json").read_text())
    step = state["global_step"]
    training.run.say("resumed", step=step, checkpoint=str(resume))
    training.run.note(resumed_at_step=step)
    for entry in state["log_history"]:
        measured = {key: value for key, value in entry.items() if key.startswith("eval_")}
        if measured:
            training.evaluation.history.append((entry["step"], measured))
    if trainer.is_world_process_zero():
        training.checkpoints.drop_best(after=step)


def _is_over(trainer: Any, resume: Path | None) -> bool:
    """Whether the checkpoint is of the last step (the run was killed while exporting); its weights are loaded then."""
    if resume is None:
        return False
    state = json.loads((resume / "trainer_state.json").read_text())
    if state["global_step"] < state["max_steps"]:
        return False
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
    trainer._load_from_checkpoint(str(resume))
    return True
