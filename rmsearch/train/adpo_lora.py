"""Train a LoRA reward model on lists with explicit orders; ``python -m rmsearch.train.adpo_lora`` (documented as
``adpo_lora_example``)."""

from __future__ import annotations

from rmsearch.cli import main
from rmsearch.stage import Run, ignored, option, source, stage, tuning
from rmsearch.trainer.config import TrainingConfig
from rmsearch.trainer.export import export
from rmsearch.trainer.fit import encode_files, fit, prepare_training
from rmsearch.trainer.losses import OrderLoss
from rmsearch.trainer.model import prepare_base
from rmsearch.trainer.ordered_rows import encode_rows, peek_row_template, read_rows


class AdpoConfig(TrainingConfig):
    """Config of `rmsearch train adpo_lora`."""

    dataset_list_train: list[str] = source(
        ...,
        "Rows to train on: batch (candidates with query and key, or msg), dpo_pairs ([better, worse] positions) and "
        "margins if known (.json, .jsonl, .csv, .parquet, each also .gz); several files are mixed.",
    )
    dataset_list_test: str | None = source(None, "Held-out rows: pairwise accuracy before, during and after training.")
    max_length: int | None = option(
        1000, "Tokens per candidate at most; longer keys are cut (and counted). Capped by the model's positions.", ge=8
    )
    max_characters: int | None = ignored(2000, "texts are cut by tokens, see --max-length.")
    per_device_train_batch_size: int = option(
        1, "Rows per step and device; every candidate of a row is one forward pass, and rows may differ in size.", ge=1
    )
    num_train_epochs: float = option(10, "Passes over the rows.", gt=0)
    loss: OrderLoss = option(
        "bradley-terry",
        "Loss to minimise. bradley-terry: over the stated pairs, with their margins. plackett-luce: over the whole "
        "order that they imply (no margins). Both: mean per row, then over rows.",
    )
    load_in_8bit: bool = ignored(True, "the base is loaded in the precision that machine and --dtype give.")
    save_steps: int = tuning(40, "Write a checkpoint every so many steps.", ge=1)


@stage("train.adpo_lora", next_step="rmsearch evaluation rerank --model-name {output_dir} --embed-output …")
def adpo_lora(config: AdpoConfig, run: Run) -> None:
    """Train a LoRA reward model on rows of candidates whose order is stated ("advanced DPO").

    As train lora, but what is drawn into a batch is a row with all its candidates: each is forwarded once, however many
    pairs it is in, and rows may be of unequal size. Six candidates in a total order state 15 pairs at the cost of six
    forward passes. Saving, resuming, evaluation and export are train lora's.
    """
    base = prepare_base(config, peek_row_template(config.dataset_list_train))
    train, test = encode_files(config, run, base, read_rows, encode_rows)
    run.counts["rows"] = train.counts["rows"]
    training = prepare_training(config, run, base, train, test)
    trainer = fit(training)
    export(training, trainer)


if __name__ == "__main__":
    main(adpo_lora)
