"""``RMTrainer``: training from Python, as upstream's class of that name; thin over the command `train lora`."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmsearch.errors import ConfigError, RecordError
from rmsearch.prompts.renderer import query_text
from rmsearch.stage import execute
from rmsearch.storage import uri
from rmsearch.storage.records import write_json, write_records
from rmsearch.train.lora import lora

SAME_NAME = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate",
    "weight_decay", "max_grad_norm", "seed", "save_steps", "save_total_limit", "gradient_checkpointing", "output_dir",
)  # fmt: skip


@dataclass(frozen=True)
class PreparedDataset:
    """Files of preference pairs, split by query: train and (unless test_size is 0) test."""

    train: str
    test: str | None
    train_ids: list[int]
    test_ids: list[int]
    max_length: int


class RMTrainer:
    """Trains a reward model: ``prepare_dataset(rows)``, then ``train(dataset)``.

    model_name: a folder, URI or name as for ``rmsearch train lora``. num_gpus: checked against what is visible; several
    GPUs need ``accelerate launch`` of the script that uses this class.
    """

    def __init__(self, model_name: str = "llama3b-rm", num_gpus: int | None = None, **settings: Any) -> None:
        self.model_name, self.num_gpus, self.settings = model_name, num_gpus, settings
        self._base_dir = "./RMSearch_exp"
        if num_gpus:
            import torch

            if torch.cuda.device_count() < num_gpus:
                remedy = "Leave num_gpus away; `rmsearch doctor` lists the GPUs"
                problem = f"{num_gpus} GPUs are asked for, {torch.cuda.device_count()} are there"
                raise ConfigError(problem, where="RMTrainer", remedy=remedy)

    def prepare_dataset(
        self,
        dataset_list: Sequence[Mapping[str, Any]],
        base_dir: str = "./RMSearch_exp",
        test_size: float | int | None = None,
        max_length: int = 10000,
        seed: int = 42,
    ) -> PreparedDataset:
        """Writes rows ``{"query", "chosen_key", "rejected_key", "margin"?}`` (all text, or all chat lists) as train and
        test files into ``base_dir``, split by query. test_size: a share, or a number of rows; default a tenth; 0: none.

        Raises RecordError for a row that lacks a field or whose two keys are the same.
        """
        rows = [_row(row, i) for i, row in enumerate(dataset_list)]
        if not rows:
            raise RecordError("holds no rows", where="dataset_list")
        share = 0.1 if test_size is None else test_size if test_size < 1 else test_size / len(rows)
        queries = sorted({row["query"] for row in rows})
        random.Random(seed).shuffle(queries)
        test_queries = set(queries[: min(round(share * len(queries)) or bool(share), len(queries) - 1)])
        parts = {False: [i for i, r in enumerate(rows) if r["query"] not in test_queries]}
        parts[True] = [i for i, r in enumerate(rows) if r["query"] in test_queries]
        self._base_dir = base_dir
        names = {False: "train", True: "test"}
        paths = {part: uri.join(base_dir, "dataset", f"{names[part]}.jsonl") for part in parts}
        for part, ids in parts.items():
            write_json(uri.join(base_dir, f"{names[part]}_ids.json"), ids)
            if ids:
                write_records(paths[part], (rows[i] for i in ids))
        return PreparedDataset(
            paths[False], paths[True] if parts[True] else None, parts[False], parts[True], max_length
        )

    def train(self, formatted_dataset: PreparedDataset, training_args: Any = None, peft_config: Any = None) -> Any:
        """Trains and exports; returns the finished `rmsearch.stage.Run` (its ``counts`` hold the measures).

        training_args: TRL's RewardConfig, TrainingArguments, or a dict of ``rmsearch train lora``'s settings.
        peft_config: PEFT's LoraConfig. Raises the errors of `rmsearch.errors`.
        """
        settings: dict[str, Any] = {"output_dir": os.path.join(self._base_dir, "model")}  # noqa: PTH118  may be a URI
        settings |= {"max_length": formatted_dataset.max_length, **self.settings}
        settings |= _from_arguments(training_args) | _from_peft(peft_config)
        return execute(
            lora,
            dataset_list_train=formatted_dataset.train,
            dataset_list_test=formatted_dataset.test,
            model_name=self.model_name,
            **settings,
        )


def _row(row: Mapping[str, Any], i: int) -> dict[str, Any]:
    where = f"dataset_list:{i}"
    texts: dict[str, Any] = {}
    for name in ("query", "chosen_key", "rejected_key"):
        if name not in row:
            raise RecordError(f"lacks {name!r}", where=where, remedy="Give query, chosen_key and rejected_key")
        value = row[name]
        single = isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping)
        texts[name] = value[0]["content"] if single else query_text(value, where)
    if texts["chosen_key"] == texts["rejected_key"]:
        raise RecordError("chosen_key and rejected_key are the same text", where=where)
    return texts | ({"margin": float(row["margin"])} if row.get("margin") is not None else {})


def _from_arguments(arguments: Any) -> dict[str, Any]:
    """Our settings from a dict or the library's training arguments."""
    if arguments is None:
        return {}
    if isinstance(arguments, Mapping):
        return dict(arguments)
    settings = {name: getattr(arguments, name) for name in SAME_NAME}
    scheduler = arguments.lr_scheduler_type
    settings["lr_scheduler_type"] = getattr(scheduler, "value", str(scheduler))
    settings["logging_steps"] = max(1, int(arguments.logging_steps))
    settings["evaluation_steps"] = max(1, int(arguments.eval_steps or 40))
    settings["save_steps"] = max(1, int(arguments.save_steps))
    settings["save_total_limit"] = max(2, arguments.save_total_limit or 3)
    settings["dtype"] = "bf16" if arguments.bf16 else "fp32"
    warm = arguments.warmup_steps
    settings["warmup_ratio"] = (
        float(warm) if warm < 1 else min(0.99, warm / arguments.max_steps if arguments.max_steps > 0 else 0.05)
    )
    if getattr(arguments, "center_rewards_coefficient", None):
        settings["center_rewards"] = arguments.center_rewards_coefficient
    if "://" not in arguments.output_dir:
        settings["output_dir"] = str(Path(arguments.output_dir))
    return settings


def _from_peft(config: Any) -> dict[str, Any]:
    """Our settings from PEFT's LoraConfig."""
    if config is None:
        return {}
    settings: dict[str, Any] = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
    }
    targets = config.target_modules
    if isinstance(targets, set | list | tuple):
        settings["lora_targets"] = ",".join(sorted(targets))
    elif targets not in (None, "all-linear"):
        raise ConfigError("a pattern of target modules is not supported", where="peft_config", remedy="Give names")
    layers = config.layers_to_transform
    if layers is not None:
        settings["lora_layers"] = ",".join(map(str, [layers] if isinstance(layers, int) else layers))
    return settings
