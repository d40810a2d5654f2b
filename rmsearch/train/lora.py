"""Train a LoRA reward model on preference pairs; ``python -m rmsearch.train.lora`` (documented as ``lora_example``)."""

from __future__ import annotations

from rmsearch.cli import main
from rmsearch.stage import Run, option, stage
from rmsearch.trainer.config import TrainingConfig
from rmsearch.trainer.data import encode_pairs, peek_template, read_pairs
from rmsearch.trainer.export import export
from rmsearch.trainer.fit import encode_files, fit, prepare_training
from rmsearch.trainer.losses import PairLoss
from rmsearch.trainer.model import prepare_base


class LoraConfig(TrainingConfig):
    """Config of `rmsearch train lora`."""

    loss: PairLoss = option("bradley-terry", "Loss to minimise: bradley-terry, listwise, margin-mse or soft.")


@stage("train.lora", next_step="rmsearch evaluation rerank --model-name {output_dir} --embed-output …")
def lora(config: LoraConfig, run: Run) -> None:
    """Train a LoRA reward model on preference pairs.

    Starts from a reward model, a causal model or an encoder (which get a new head), trains with TRL's RewardTrainer and
    PEFT, evaluates before the first step and while training, keeps the best step, and writes a model folder that
    search, transformers and vLLM load as it is: merged weights, adapter/, rmsearch.json, README.md. A killed run goes
    on from its newest complete checkpoint when the same command is given again. Several GPUs:
    accelerate launch -m rmsearch.train.lora …
    """
    base = prepare_base(config, peek_template(config.dataset_list_train))
    train, test = encode_files(config, run, base, read_pairs, encode_pairs)
    training = prepare_training(config, run, base, train, test)
    trainer = fit(training)
    export(training, trainer)


if __name__ == "__main__":
    main(lora)
