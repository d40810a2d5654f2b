"""Weights & Biases and TensorBoard, both optional: a tracker that fails says so and training goes on."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from rmsearch.stage import Run
from rmsearch.trainer.config import TrainingConfig


def tracker_callbacks(config: TrainingConfig, run: Run, work: Path) -> list[Any]:
    """Callbacks of the trackers that the config asks for; none on processes other than the first."""
    if int(os.environ.get("RANK") or 0) > 0:
        return []
    writers = []
    if config.wandb_project:
        writers.append(_wandb(config, run))
    if config.tensorboard:
        writers.append(_tensorboard(run, work))
    return [_callback(write) for write in writers if write is not None]


def _wandb(config: TrainingConfig, run: Run) -> Any:
    if importlib.util.find_spec("wandb") is None:
        run.say("warning", problem="wandb is not installed, so nothing is sent to W&B", remedy="pip install wandb")
        return None
    wandb: Any = importlib.import_module("wandb")

    if not os.environ.get("WANDB_MODE") and not (os.environ.get("WANDB_API_KEY") or _has_login()):
        os.environ["WANDB_MODE"] = "offline"
        run.say("warning", problem="no W&B login: the run is kept in ./wandb", remedy="wandb login; wandb sync")
    options: dict[str, Any] = {"project": config.wandb_project, "name": config.wandb_run_name}
    options |= {"tags": config.wandb_tags, "config": config.model_dump(mode="json")}
    try:
        tracked = wandb.init(**options)
    except Exception as error:  # noqa: BLE001  a tracker may fail in any way, and must not end the training
        run.say("warning", problem=f"W&B cannot be reached ({error}): the run is kept in ./wandb", remedy="wandb sync")
        tracked = wandb.init(mode="offline", **options)
    return lambda logs, step: tracked.log(logs, step=step) if logs else tracked.finish()


def _has_login() -> bool:
    netrc = Path("~/.netrc").expanduser()
    return netrc.exists() and "wandb" in netrc.read_text(errors="ignore")


def _tensorboard(run: Run, work: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        run.say("warning", problem="tensorboard is not installed", remedy="pip install tensorboard")
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(work / "logs"))

    def write(logs: dict[str, float] | None, step: int) -> None:
        if logs is None:
            writer.close()
            return
        for name, value in logs.items():
            writer.add_scalar(name, value, step)

    return write


def _callback(write: Any) -> Any:
    from transformers import TrainerCallback

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            write(
                {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)},
                state.global_step,
            )

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write(None, state.global_step)

    return Tracker()
