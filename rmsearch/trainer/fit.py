"""One training: its data and its measures put together, run, and taken up again where it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from rmsearch.errors import ConfigError
from rmsearch.prompts.renderer import Renderer
from rmsearch.stage import Run
from rmsearch.trainer import loop
from rmsearch.trainer.adapters import wrap
from rmsearch.trainer.checkpoints import Checkpoints
from rmsearch.trainer.config import TrainingConfig
from rmsearch.trainer.data import Encoded, Reject
from rmsearch.trainer.evaluation import Evaluation, load_dev, used_inputs
from rmsearch.trainer.model import Base
from rmsearch.trainer.trackers import tracker_callbacks

T = TypeVar("T")


@dataclass(frozen=True)
class Training:
    """One training: its settings, what it learns from, what measures it, and what is kept of it."""

    config: TrainingConfig
    run: Run
    base: Base
    train: Encoded
    evaluation: Evaluation
    checkpoints: Checkpoints


def encode_files(
    config: TrainingConfig,
    run: Run,
    base: Base,
    read: Callable[[str], Iterable[T]],
    encode: Callable[[Iterable[T], Renderer, Reject], Encoded],
) -> tuple[Encoded, Encoded | None]:
    """The training files as one, and the test file if there is one.

    Raises RecordError when too much of both is rejected, and ConfigError when nothing is left to train on.
    """
    train = encode(chain.from_iterable(map(read, config.dataset_list_train)), base.renderer, run.reject)
    test = encode(read(config.dataset_list_test), base.renderer, run.reject) if config.dataset_list_test else None
    run.check_rejects(train.counts["read"] + (test.counts["read"] if test else 0))
    if not len(train):
        raise ConfigError("no pair is left to train on", where=", ".join(config.dataset_list_train))
    return train, test


def prepare_training(config: TrainingConfig, run: Run, base: Base, train: Encoded, test: Encoded | None) -> Training:
    """Puts together what is trained, what measures it and where its state is kept, and counts the pairs."""
    pairs = used_inputs(test.sample(config.max_eval_pairs, config.seed)) if test else None
    evaluation = Evaluation(pairs, load_dev(config, base.renderer))
    _count(run, train, test)
    checkpoints = Checkpoints(config.output_dir, run.fingerprint, config.settings(), base.checkpoint_contract())
    return Training(config, run, base, train, evaluation, checkpoints)


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


def fit(training: Training) -> Any:
    """Trains, going on from this run's newest complete checkpoint; returns the trainer, whose model is trained.

    Raises KeyboardInterrupt after SIGTERM or Ctrl-C, when the state is saved.
    """
    from accelerate import PartialState
    from transformers import set_seed

    config, run, base, checkpoints = training.config, training.run, training.base, training.checkpoints
    arguments = loop.training_arguments(config, checkpoints.work, encoder=base.facts.encoder, bf16=base.bf16)
    PartialState().wait_for_everyone()  # all have looked at the output before anything there changes
    resume = checkpoints.open(anew=config.force) if PartialState().is_main_process else None
    resume = _same_everywhere(resume)
    set_seed(config.seed)
    model = wrap(config, base)
    stop = loop.Stop(config.time_limit_minutes)
    with run.progress(None, "steps") as bar:
        flow = loop.flow_callback(config, training.evaluation, stop, bar.advance)
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
            with stop.watching():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.stated:
        run.counts["forwards_per_pair"] = round(trainer.forwarded / trainer.stated, 4)
    if stop.signalled:
        raise KeyboardInterrupt("the state is saved")
    if stop.timed_out and trainer.is_world_process_zero():
        run.say("time_limit", minutes=config.time_limit_minutes, steps=trainer.state.global_step)
    return trainer


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
    from transformers import TrainerState

    if resume is None:
        return False
    state = json.loads((resume / "trainer_state.json").read_text())
    if state["global_step"] < state["max_steps"]:
        return False
    trainer.state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
    trainer._load_from_checkpoint(str(resume))
    return True
