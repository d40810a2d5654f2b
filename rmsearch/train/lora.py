"""Train a LoRA reward model on preference pairs; ``python -m rmsearch.train.lora`` (documented as ``lora_example``)."""

from __future__ import annotations

from rmsearch.stage import Run, main, option, stage
from rmsearch.train.config import TrainingConfig
from rmsearch.train.losses import PairLoss


class LoraConfig(TrainingConfig):
    """Config of `rmsearch train lora`."""

    loss: PairLoss = option("bradley-terry", "bradley-terry, listwise, margin-mse or soft.")


@stage("train.lora", next_step="rmsearch evaluation rerank --model-name {output_dir} --embed-output …")
def lora(config: LoraConfig, run: Run) -> None:
    """Train a LoRA reward model on preference pairs.

    Starts from a reward model, a causal model or an encoder (which get a new head), trains with TRL's RewardTrainer and
    PEFT, evaluates before the first step and while training, keeps the best step, and writes a model folder that
    search, transformers and vLLM load as it is: merged weights, adapter/, rmsearch.json, README.md. A killed run goes
    on from its newest complete checkpoint when the same command is given again. Several GPUs:
    accelerate launch -m rmsearch.train.lora …
    """
    from itertools import chain

    from rmsearch.train.data import encode_pairs, peek_template, read_pairs
    from rmsearch.train.fit import fit, prepare_base

    base = prepare_base(config, peek_template(config.dataset_list_train))
    pairs = chain.from_iterable(read_pairs(uri) for uri in config.dataset_list_train)
    train = encode_pairs(pairs, base.renderer, run.reject)
    test = None
    if config.dataset_list_test:
        test = encode_pairs(read_pairs(config.dataset_list_test), base.renderer, run.reject)
    run.check_rejects(train.counts["read"] + (test.counts["read"] if test else 0))
    fit(config, run, base, train, test)


if __name__ == "__main__":
    main(lora)
