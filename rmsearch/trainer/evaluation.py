"""What is measured of the model that is being trained: pairwise accuracy and nDCG@10, on every process together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmsearch.datasets.beir import load_beir
from rmsearch.errors import ConfigError
from rmsearch.metrics.measures import ndcg
from rmsearch.prompts.renderer import Renderer
from rmsearch.retrieval.runs import read_run
from rmsearch.trainer.batches import padded
from rmsearch.trainer.config import TrainingConfig
from rmsearch.trainer.data import Encoded, Table

PAIRS, DEV = "eval_accuracy", "eval_ndcg@10"
MeasuredAt = tuple[int, dict[str, float]]
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class DevSet:
    """Candidates of held-out queries as model inputs.

    candidates: query id -> {key id: position in inputs}; first_stage: the first stage's own nDCG@10 on these queries.
    """

    inputs: list[np.ndarray]
    candidates: Mapping[str, Mapping[str, int]]
    qrels: Mapping[str, Mapping[str, int]]
    first_stage: float

    def ndcg(self, rewards: np.ndarray, k: int = 10) -> float:
        """Mean nDCG@k of the candidates ranked by ``rewards`` (float32[len(inputs)])."""
        run = {q: {key: float(rewards[i]) for key, i in keys.items()} for q, keys in self.candidates.items()}
        return ndcg(self.qrels, run, k)


def load_dev(config: TrainingConfig, renderer: Renderer) -> DevSet | None:
    """Reads the BEIR split and the first-stage run over it that the config names, if any, and renders the candidates.

    Raises the loaders' errors, and ConfigError when one of the two is not given, or the run holds none of the split's
    queries.
    """
    dataset, split, run_uri = config.dev_dataset_path, config.dev_split, config.dev_embed_output
    if dataset is None and run_uri is None:
        return None
    if dataset is None or run_uri is None:
        raise ConfigError("nDCG needs both", where="--dev-dataset-path and --dev-embed-output")
    data, run = load_beir(dataset, split), read_run(run_uri)
    queries = sorted(query for query in data.queries if query in run)
    if not queries:
        remedy = f"Run embed with --split {split}"
        raise ConfigError(f"holds no query of the split {split!r}", where=run_uri, remedy=remedy)
    if 0 < config.dev_queries < len(queries):
        picked = np.random.default_rng(config.seed).choice(len(queries), config.dev_queries, replace=False)
        queries = [queries[i] for i in sorted(picked)]
    table, candidates = Table(renderer), {}
    for query in queries:
        keys = list(run[query])[: config.dev_top_k]
        if unknown := next((key for key in keys if key not in data.corpus), None):
            remedy = "Give the run of this data set"
            raise ConfigError(f"the key id {unknown!r} is not in {dataset}", where=run_uri, remedy=remedy)
        places = table.add([(data.queries[query], data.key_text(key)) for key in keys])
        candidates[query] = dict(zip(keys, places, strict=True))
    qrels = {query: data.qrels[query] for query in queries}
    first = ndcg(qrels, {query: {key: run[query][key] for key in candidates[query]} for query in queries})
    return DevSet(table.inputs, candidates, qrels, first)


@dataclass
class Evaluation:
    """What is measured while training: pairs, a dev set, both or nothing."""

    pairs: Encoded | None = None
    dev: DevSet | None = None
    history: list[MeasuredAt] = field(default_factory=list)

    @property
    def metric(self) -> str | None:
        """The measure that the best checkpoint is chosen by."""
        return DEV if self.dev else PAIRS if self.pairs else None

    def measure(self, score: Callable[[list[np.ndarray]], np.ndarray], margin_scale: float) -> dict[str, float]:
        """All measures of the model as it is."""
        measures: dict[str, float] = {}
        if self.pairs is not None:
            of_pairs = pair_metrics(self.pairs, score(self.pairs.inputs), margin_scale)
            measures |= {f"eval_{name}": value for name, value in of_pairs.items()}
        if self.dev is not None:
            measures[DEV] = self.dev.ndcg(score(self.dev.inputs))
        return measures

    def rank(self, measured: dict[str, float]) -> tuple[float, float]:
        """Sorts measurements: the metric, then the lower loss."""
        return measured[self.metric or PAIRS], -measured.get("eval_loss", 0.0)

    def base(self) -> dict[str, float] | None:
        """The measures before the first step."""
        return next((measured for step, measured in self.history if step == 0), None)

    def best(self) -> MeasuredAt | None:
        """The best measured step after the start; of equals the earliest."""
        trained = [each for each in self.history if each[0] > 0]
        return max(trained, key=lambda each: (self.rank(each[1]), -each[0])) if trained else None


def score_inputs(
    model: Any,
    inputs: Sequence[np.ndarray],
    *,
    pad: int,
    limit: int,
    autocast: Any = None,
    batch_tokens: int | None = None,
    token_types: Sequence[list[int]] | None = None,
    shared: bool = False,
) -> np.ndarray:
    """Rewards, float32[n], of token-id inputs, sorted by length and batched by padded tokens.

    token_types: per input, for models that were trained with them. shared: all processes of a distributed run call
    this together; each scores a part and all get the whole."""
    import torch

    device = next(model.parameters()).device
    budget = batch_tokens or BATCH_TOKENS.get(device.type, 65536)
    rank, world = _process() if shared else (0, 1)
    rewards = torch.zeros(len(inputs), dtype=torch.float32, device=device)
    batches = _by_length(inputs, budget)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast() if autocast else contextlib.nullcontext():
            for rows in batches[rank::world]:
                batch = padded([inputs[i] for i in rows], pad, limit)
                if token_types is not None:
                    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
                    for place, i in enumerate(rows):
                        batch["token_type_ids"][place, : len(inputs[i])] = torch.tensor(token_types[i])
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                rewards[torch.from_numpy(rows).to(device)] = model(**batch).logits[:, 0].float()
    finally:
        model.train(training)
    if world > 1:
        rewards = rewards.clone()
        torch.distributed.all_reduce(rewards)
    return rewards.cpu().numpy()


def _process() -> tuple[int, int]:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _by_length(inputs: Sequence[np.ndarray], budget: int) -> list[np.ndarray]:
    lengths = np.fromiter(map(len, inputs), np.int64, len(inputs))
    batches, rows = [], list[int]()
    for i in np.argsort(-lengths, kind="stable"):
        if rows and (len(rows) + 1) * lengths[rows[0]] > budget:
            batches.append(np.asarray(rows))
            rows = []
        rows.append(int(i))
    if rows:
        batches.append(np.asarray(rows))
    return batches


def pair_metrics(data: Encoded, rewards: np.ndarray, margin_scale: float) -> dict[str, float]:
    """accuracy (ties count half), loss (Bradley-Terry with the pairs' margins) and mean difference over all pairs."""
    difference = (rewards[data.chosen] - rewards[data.rejected]).astype(np.float64)
    accuracy = np.mean((difference > 0) + 0.5 * (difference == 0))
    loss = np.mean(np.logaddexp(0, -(difference - margin_scale * data.margin)))
    return {"accuracy": float(accuracy), "loss": float(loss), "margin": float(difference.mean())}


def used_inputs(data: Encoded) -> Encoded:
    """The same pairs over only the inputs that they use (after sampling pairs)."""
    used = np.unique(np.concatenate([data.chosen, data.rejected]))
    place = np.zeros(len(data.inputs), np.int64)
    place[used] = np.arange(len(used))
    inputs = [data.inputs[i] for i in used]
    pairs = (place[data.chosen], place[data.rejected], data.margin, data.group)
    return Encoded(inputs, *pairs, data.counts, data.queries)
