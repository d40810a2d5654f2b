"""Rerank a first stage's candidates with a reward model, and fuse the two on request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from rmsearch import engines
from rmsearch.cli import main
from rmsearch.datasets.records import Candidates
from rmsearch.engines import Scorer
from rmsearch.errors import ConfigError
from rmsearch.flags import DatasetFlags, EngineFlags, note_dataset
from rmsearch.retrieval.candidates import FirstStage, read_first_stage
from rmsearch.retrieval.fusion import Fit, fit_weight, fuse
from rmsearch.retrieval.runs import ordered, short, write_run
from rmsearch.scoring.journaled import BlockEntries, count_scores, score_journaled
from rmsearch.stage import Run, ignored, model, option, source, stage, target, tuning
from rmsearch.storage.journal import Journal
from rmsearch.storage.records import write_records


class RerankConfig(DatasetFlags, EngineFlags):
    """Flags of rerank."""

    embed_output: str = source(help="Candidates: the --output of embed or bm25, or any run file.")
    output: str | None = target(None, "Records with both stages' orders and scores.")
    output_eval: str = target(help="Run for ndcg: {query: {key: reward}}.")
    run_file: str | None = target(None, "The same run in TREC's six columns (.trec, .run or .txt).")
    output_fused: str | None = target(None, "Run of the fused scores; needs --fuse.")
    template: str | None = option(None, "Prompt template; by default the one that the model was trained with.")
    lora: str | None = model(None, "LoRA adapter on top of the model.")
    top_k: int | None = option(
        None, "Keep only the best k in the outputs; all are scored. (Upstream: 10, which hides recall beyond 10.)", ge=1
    )
    fuse: Literal["none", "zscore", "minmax"] = option("none", "Fuse with the first stage, scores normalised this way.")
    fuse_weight: float | None = option(None, "The reward's share in the fused score.", ge=0, le=1)
    fuse_fit: str | None = source(None, "Candidates of another split, to fit the share there.")
    fuse_fit_split: str = option("dev", "The split of --fuse-fit; never the one that is evaluated.")
    latency_queries: int = option(0, "Time so many queries one after the other, after the run.", ge=0)
    request_batch_size: int = tuning(128, "Scored pairs that are saved at a time.", ge=1)
    timeout: float = tuning(10000, "Seconds without any score after which to give up.", gt=0)
    device_groups: str | None = ignored(None, "which GPUs belong together; vLLM places its own workers.")

    @model_validator(mode="after")
    def _fusion_is_complete(self) -> RerankConfig:
        if self.fuse == "none":
            if extra := [n for n in ("output_fused", "fuse_weight", "fuse_fit") if getattr(self, n) is not None]:
                raise ValueError(f"--{extra[0].replace('_', '-')} needs --fuse zscore or minmax")
            return self
        if self.output_fused is None:
            raise ValueError("--fuse needs --output-fused")
        if (self.fuse_weight is None) == (self.fuse_fit is None):
            raise ValueError("--fuse needs either --fuse-weight or --fuse-fit (candidates of a dev split)")
        if self.fuse_fit is not None and self.fuse_fit_split == self.split:
            raise ValueError(f"--fuse-fit-split is the evaluated split {self.split!r}: fit the share on another one")
        return self


NEXT = (
    "rmsearch evaluation ndcg --dataset-path {dataset_path} --split {split} --run first={embed_output} "
    "--run rerank={output_eval} --baseline first"
)


@stage("evaluation.rerank", next_step=NEXT)
def rerank(config: RerankConfig, run: Run) -> None:
    """Rerank a first stage's candidates with a reward model.

    Scores every candidate, streams in bounded memory and saves scores as they come: killed and started again, it pays
    for no saved pair twice. Candidates that do not belong to the data set are refused. Rewards are raw logits.

    --fuse adds a run that mixes both stages, normalised per query; its share is given by --fuse-weight or fitted by
    nDCG@10 on another split (--fuse-fit, --fuse-fit-split).
    """
    first = read_first_stage(config.embed_output, config.load())
    note_dataset(run, first.beir)
    fit_stage = _fit_stage(config, first)
    if first.missing:
        run.say("warning", problem=f"{first.missing} queries of the split have no candidates; ndcg counts them as 0")
    scores, fit_scores = asyncio.run(_score(config, run, first, fit_stage))
    run.counts |= {"queries": len(first.candidates), "pairs": len(first.pairs)}
    for name, count in (("queries_of_other_splits", first.skipped), ("queries_without_candidates", first.missing)):
        if count:
            run.counts[name] = count
    if config.fuse != "none" and config.output_fused:
        weight = config.fuse_weight
        if fit_stage is not None and fit_scores is not None:
            fit = _fit(config, fit_stage, fit_scores)
            weight = fit.weight
            run.counts |= {"fuse_weight": fit.weight}
            run.note(fusion_fit={"split": config.fuse_fit_split, "ndcg@10": fit.ndcg, "curve": fit.curve})
        assert weight is not None
        run.note(fusion={"method": config.fuse, "weight": weight})
        write_run(config.output_fused, _fused(config, first, scores, weight), "rmsearch-fused")
    write_run(config.output_eval, _ranked(config, first, scores), "rmsearch-rerank")
    if config.run_file:
        write_run(config.run_file, _ranked(config, first, scores), "rmsearch-rerank")
    if config.output:
        write_records(config.output, _records(config, first, scores))


def _fit_stage(config: RerankConfig, first: FirstStage) -> FirstStage | None:
    """The candidates of the split on which the fusion is fitted; no query may be in both."""
    if config.fuse_fit is None:
        return None
    found = read_first_stage(config.fuse_fit, config.load(config.fuse_fit_split))
    if both := found.beir.queries.keys() & first.beir.queries.keys():
        problem = f"{len(both)} queries are in the evaluated split too, so the share would be fitted on the answers"
        raise ConfigError(problem, where=config.fuse_fit, remedy="Fit on a split of other queries")
    return found


async def _score(
    config: RerankConfig, run: Run, first: FirstStage, fit_stage: FirstStage | None
) -> tuple[np.ndarray, np.ndarray | None]:
    arguments = config.engine_arguments()
    scorer = engines.load_scorer(config.model_name, template=config.template, lora=config.lora, **arguments)
    try:
        with run.journal() as journal:
            scores = await _rewards(config, run, scorer, first, journal)
        count_scores(run, scorer)
        fit_scores = None
        if fit_stage is not None:
            with run.journal("fit") as journal:
                fit_scores = await _rewards(config, run, scorer, fit_stage, journal)
        if config.latency_queries:
            timed = await measure_latency(scorer, first, config.latency_queries)
            run.note(latency=timed)
            run.counts |= {"latency_p50_ms": timed["p50_ms"], "latency_p95_ms": timed["p95_ms"]}
    finally:
        await scorer.close()
    return scores, fit_scores


async def _rewards(config: RerankConfig, run: Run, scorer: Scorer, stage: FirstStage, journal: Journal) -> np.ndarray:
    """float32[pairs]: those of the journal, and the rest from the model, journaled as they come."""
    rewards = np.empty(len(stage.pairs), np.float32)
    entries = BlockEntries(journal, config.request_batch_size)
    limits: dict[str, Any] = {"timeout": config.timeout, "where": config.model_name}
    with run.progress(len(stage.pairs), "pairs") as shown:
        await score_journaled(lambda: scorer, stage.pairs, entries, rewards.__setitem__, shown=shown, **limits)
    return rewards


async def measure_latency(scorer: Scorer, stage: FirstStage, queries: int) -> dict[str, float]:
    """Score the candidates of the first ``queries`` queries, one query at a time, after one untimed query.

    Returns the number of queries, their mean number of pairs, and p50, p95 and the mean in milliseconds per query.
    """
    seconds, counts = [], []
    for q in [0, *range(min(queries, len(stage.candidates)))]:
        texts = list(stage.pairs.texts(np.arange(stage.offsets[q], stage.offsets[q + 1])))
        started = time.perf_counter()
        await scorer.score(texts)
        seconds.append(time.perf_counter() - started)
        counts.append(len(texts))
    taken = np.array(seconds[1:]) * 1000
    p50, p95 = np.percentile(taken, [50, 95])
    facts = {"p50_ms": p50, "p95_ms": p95, "mean_ms": taken.mean(), "pairs_per_query": np.mean(counts[1:])}
    return {"queries": len(taken), **{name: round(float(value), 2) for name, value in facts.items()}}


Scores = Iterator[tuple[str, dict[str, float]]]


def _ranked(config: RerankConfig, first: FirstStage, scores: np.ndarray) -> Scores:
    for q, each in enumerate(first.candidates):
        rewards = {key: short(reward) for key, reward in first.scores_of(q, scores).items()}
        yield each.query_id, _trimmed(ordered(rewards), config.top_k)


def _fused(config: RerankConfig, first: FirstStage, scores: np.ndarray, weight: float) -> Scores:
    for q, each in enumerate(first.candidates):
        assert config.fuse != "none"
        mixed = fuse(_first_scores(each), first.scores_of(q, scores), weight, config.fuse)
        yield each.query_id, _trimmed(mixed, config.top_k)


def _first_scores(candidates: Candidates) -> dict[str, float]:
    return dict(zip(candidates.key_ids, candidates.embed_relevances, strict=True))


def _fit(config: RerankConfig, stage: FirstStage, scores: np.ndarray) -> Fit:
    assert config.fuse != "none"
    first = {each.query_id: _first_scores(each) for each in stage.candidates}
    second = {each.query_id: stage.scores_of(q, scores) for q, each in enumerate(stage.candidates)}
    return fit_weight(stage.beir.qrels, first, second, config.fuse)


def _trimmed(scores: dict[str, float], top_k: int | None) -> dict[str, float]:
    return scores if top_k is None else dict(list(scores.items())[:top_k])


def _records(config: RerankConfig, first: FirstStage, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    for each, (query, rewards) in zip(first.candidates, _ranked(config, first, scores), strict=True):
        yield {
            "query_id": query,
            "pre_key_ids": each.key_ids,
            "key_ids": list(rewards),
            "embed_relevances": each.embed_relevances,
            "rerank_relevances": list(rewards.values()),
            "positive_key_ids": first.beir.relevant(query),
        }


if __name__ == "__main__":
    main(rerank)
