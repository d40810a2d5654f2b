"""The training loop: TRL's RewardTrainer with shared forward passes, our evaluation, and checkpoints that resume."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rmsearch.progress import say
from rmsearch.trainer.batches import PairCollator, PairSampler
from rmsearch.trainer.checkpoints import Checkpoints
from rmsearch.trainer.config import TrainingConfig
from rmsearch.trainer.data import Encoded
from rmsearch.trainer.evaluation import Evaluation, score_inputs
from rmsearch.trainer.losses import preference_loss


def training_arguments(config: TrainingConfig, work: Path, *, encoder: bool, bf16: bool) -> Any:
    """TRL's RewardConfig for a config."""
    import torch
    from trl import RewardConfig

    cuda = torch.cuda.is_available()
    return RewardConfig(
        output_dir=str(work),
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps if config.max_steps > 0 else -1,
        learning_rate=config.rate(encoder),
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=bf16,
        use_cpu=not cuda,
        gradient_checkpointing=config.gradient_checkpointing,
        disable_dropout=False,  # set on the base by ours; TRL would switch LoRA's own dropout off too
        max_length=None,  # TRL would drop long rows; ours are cut by the template
        center_rewards_coefficient=config.center_rewards,
        logging_steps=config.logging_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
    )


@cache
def trainer_type() -> Any:
    """The trainer's class (made on first use: TRL is slow to import)."""
    import torch
    from transformers import Trainer
    from trl import RewardTrainer

    class PreferenceTrainer(RewardTrainer):
        """RewardTrainer over `Encoded` pairs. Each distinct input of a batch is forwarded once.

        forwarded, stated: inputs forwarded in training, and pairs that the data states about them, in this process
        since it started.
        """

        def __init__(
            self,
            *,
            pairs: Encoded,
            config: TrainingConfig,
            evaluation: Evaluation,
            checkpoints: Checkpoints,
            limit: int,
            **options: Any,
        ) -> None:
            from datasets import Dataset

            self.pairs, self.config, self.evaluation, self.checkpoints = pairs, config, evaluation, checkpoints
            self.limit = limit
            self._sums = [0.0, 0.0, 0.0]
            self.forwarded = self.stated = 0
            self._logged = (0, 0)
            pad = options["processing_class"].pad_token_id
            super().__init__(
                data_collator=PairCollator(
                    pairs, pad, limit, config.margin_scale, whole_order=config.loss == "plackett-luce"
                ),
                train_dataset=Dataset.from_dict({"row": np.arange(len(pairs.starts) - 1)}),
                **options,
            )
            from transformers.trainer_callback import PrinterCallback

            self.remove_callback(PrinterCallback)

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return PairSampler(self.pairs, self.args.train_batch_size, self.args.seed)

        def floating_point_ops(self, inputs: Any) -> int:
            return 0  # only for a log field, and slow on small models

        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            if self.config.head_learning_rate is not None:
                _own_rate(optimizer, self.model if model is None else model, self.config.head_learning_rate)
            return optimizer

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            rewards = outputs.logits[:, 0].float()
            chosen, rejected = inputs["chosen"], inputs["rejected"]
            loss = preference_loss(self.config.loss, rewards, chosen, rejected, inputs["margin"], inputs["row"])
            self.forwarded += len(rewards)
            self.stated += inputs["stated"]
            if self.args.center_rewards_coefficient:
                loss = (
                    loss + self.args.center_rewards_coefficient * (rewards[chosen] + rewards[rejected]).square().mean()
                )
            with torch.no_grad():  # summed on the device; read only when a line is logged
                difference = rewards[chosen] - rewards[rejected]
                self._sums[0] = self._sums[0] + (difference > 0).sum()
                self._sums[1] = self._sums[1] + difference.sum()
                self._sums[2] += len(difference)
            return (loss, outputs) if return_outputs else loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and self._sums[2]:
                logs["accuracy"] = float(self._sums[0]) / self._sums[2]
                logs["margin"] = float(self._sums[1]) / self._sums[2]
                logs["forwards_per_pair"] = (self.forwarded - self._logged[0]) / (self.stated - self._logged[1])
                self._logged = (self.forwarded, self.stated)
                self._sums = [0.0, 0.0, 0.0]
            Trainer.log(self, logs, start_time)

        def score(self, inputs: list[np.ndarray]) -> np.ndarray:
            """Rewards of inputs, float32[n], by the model as it is, in the precision of training."""
            tokens = self.config.per_device_eval_batch_size * 1000 or None
            return score_inputs(
                self.model,
                inputs,
                pad=self.processing_class.pad_token_id,
                limit=self.limit,
                autocast=self.accelerator.autocast,
                batch_tokens=tokens,
                shared=True,
            )

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            measured = self.evaluation.measure(self.score, self.config.margin_scale)
            step = self.state.global_step
            say("evaluated", stage="train", step=step, **{n.removeprefix("eval_"): v for n, v in measured.items()})
            self.evaluation.history[:] = [each for each in self.evaluation.history if each[0] != step]
            self.evaluation.history.append((step, measured))
            best = self.evaluation.best()
            if best is not None and best[0] == step and self.is_world_process_zero():
                self.checkpoints.save_best(step, trained_weights(self.model))
            Trainer.log(self, dict(measured))
            self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)
            return measured

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            Trainer._save_checkpoint(self, model, trial)  # TRL's own would also write a model card
            self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
            if self.is_world_process_zero():
                self.checkpoints.complete(self.state.global_step)

    return PreferenceTrainer


def _own_rate(optimizer: Any, model: Any, rate: float) -> None:
    """Moves head and pooler into parameter groups with their own learning rate."""
    parts = ("score", "classifier", "pooler", "pre_classifier")
    heads = {id(p) for name, p in model.named_parameters() if any(part in name.split(".") for part in parts)}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in heads]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in heads]
            optimizer.add_param_group({**group, "params": own, "lr": rate, "initial_lr": rate})


def trained_weights(model: Any) -> dict[str, Any]:
    """Copies of the weights that learn: name -> CPU tensor."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


@dataclass
class Stop:
    """When to stop early: a time limit, or a signal (then the state is saved and the command can go on later)."""

    minutes: float | None
    started: float = field(default_factory=time.monotonic)
    signalled: bool = False
    timed_out: bool = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take the first SIGTERM or Ctrl-C while training; a second one is the command's and ends at once."""
        former = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for each, handler in former.items():
                signal.signal(each, handler)

        def note(signum: int, _: Any) -> None:
            self.signalled = True
            restore()

        try:
            for each in former:
                signal.signal(each, note)
        except ValueError:  # not the main thread: signals stay with it
            yield
            return
        try:
            yield
        finally:
            restore()

    def due(self) -> bool:
        """Whether to stop now; the same answer on every process."""
        import torch

        late = self.minutes is not None and time.monotonic() - self.started > 60 * self.minutes
        flags = [self.signalled, late]
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            shared = torch.tensor(flags, dtype=torch.int32, device=device)
            torch.distributed.all_reduce(shared)
            flags = [bool(each) for each in shared.tolist()]
        self.signalled, self.timed_out = self.signalled or flags[0], self.timed_out or flags[1]
        return any(flags)


def flow_callback(config: TrainingConfig, evaluation: Evaluation, stop: Stop, advance: Callable[[int], None]) -> Any:
    """Evaluates on time (also before the first step and after the last), stops early, moves the progress bar."""
    from transformers import TrainerCallback

    class Flow(TrainerCallback):
        trainer: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if evaluation.metric and state.global_step == 0:
                self.trainer.evaluate()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance(1)
            ended = state.global_step >= state.max_steps
            if stop.due():
                control.should_training_stop = control.should_save = True
                ended = not stop.signalled
            if evaluation.metric and (ended or state.global_step % config.evaluation_steps == 0):
                control.should_evaluate = True
            if ended:
                control.should_save = True

    return Flow()
