"""Rerank a first stage's candidates with a reward model, and fuse the two on request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from rmsearch.errors import ConfigError
from rmsearch.flags import DatasetFlags, EngineFlags, note_dataset
from rmsearch.retrieval.candidates import Pairs, load_pairs
from rmsearch.retrieval.fusion import Fit, fit_weight, fuse
from rmsearch.retrieval.runs import ordered, short, write_run
from rmsearch.scoring.latency import measure_latency
from rmsearch.scoring.timed import count_scores, scores_in_time
from rmsearch.stage import Run, ignored, main, model, option, source, stage, target, tuning
from rmsearch.storage.records import write_records

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines import Scorer
    from rmsearch.storage.journal import Journal


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
    pairs = load_pairs(config.embed_output, config.load())
    note_dataset(run, pairs.beir)
    fit_pairs = _fit_pairs(config, pairs)
    if pairs.missing:
        run.say("warning", problem=f"{pairs.missing} queries of the split have no candidates; ndcg counts them as 0")
    scores, fit_scores = asyncio.run(_score(config, run, pairs, fit_pairs))
    run.counts |= {"queries": len(pairs.candidates), "pairs": len(pairs)}
    for name, count in (("queries_of_other_splits", pairs.skipped), ("queries_without_candidates", pairs.missing)):
        if count:
            run.counts[name] = count
    if config.fuse != "none" and config.output_fused:
        weight = config.fuse_weight
        if fit_pairs is not None and fit_scores is not None:
            fit = _fit(config, fit_pairs, fit_scores)
            weight = fit.weight
            run.counts |= {"fuse_weight": fit.weight}
            run.note(fusion_fit={"split": config.fuse_fit_split, "ndcg@10": fit.ndcg, "curve": fit.curve})
        assert weight is not None
        run.note(fusion={"method": config.fuse, "weight": weight})
        write_run(config.output_fused, _fused(config, pairs, scores, weight), "rmsearch-fused")
    write_run(config.output_eval, _ranked(config, pairs, scores), "rmsearch-rerank")
    if config.run_file:
        write_run(config.run_file, _ranked(config, pairs, scores), "rmsearch-rerank")
    if config.output:
        write_records(config.output, _records(config, pairs, scores))


def _fit_pairs(config: RerankConfig, pairs: Pairs) -> Pairs | None:
    """The candidates of the split on which the fusion is fitted; no query may be in both."""
    if config.fuse_fit is None:
        return None
    found = load_pairs(config.fuse_fit, config.load(config.fuse_fit_split))
    if both := found.beir.queries.keys() & pairs.beir.queries.keys():
        problem = f"{len(both)} queries are in the evaluated split too, so the share would be fitted on the answers"
        raise ConfigError(problem, where=config.fuse_fit, remedy="Fit on a split of other queries")
    return found


async def _score(
    config: RerankConfig, run: Run, pairs: Pairs, fit_pairs: Pairs | None
) -> tuple[np.ndarray, np.ndarray | None]:
    from rmsearch.engines import load_scorer

    scorer = load_scorer(config.model_name, template=config.template, lora=config.lora, **config.engine_arguments())
    try:
        with run.journal() as journal:
            scores = await _score_pairs(config, run, scorer, pairs, journal)
        count_scores(run, scorer)
        fit_scores = None
        if fit_pairs is not None:
            with run.journal("fit") as journal:
                fit_scores = await _score_pairs(config, run, scorer, fit_pairs, journal)
        if config.latency_queries:
            timed = await measure_latency(scorer, pairs, config.latency_queries)
            run.note(latency=timed)
            run.counts |= {"latency_p50_ms": timed["p50_ms"], "latency_p95_ms": timed["p95_ms"]}
    finally:
        await scorer.close()
    return scores, fit_scores


async def _score_pairs(config: RerankConfig, run: Run, scorer: Scorer, pairs: Pairs, journal: Journal) -> np.ndarray:
    """float32[pairs] rewards: those of the journal, and the rest from the model, journaled as they come."""
    import numpy as np

    scores, saved = _resumed(pairs, journal)
    left = np.flatnonzero(np.isnan(scores))
    if scorer.contract is not None and scorer.contract.order == "key_first":
        left = pairs.by_key(left)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    with run.progress(len(left), "pairs") as shown:
        stream = scores_in_time(scorer, pairs.texts(left), config.timeout, config.model_name)
        async with aclosing(stream) as results:
            async for positions, rewards in results:
                scores[left[positions]] = rewards
                waiting.append((left[positions], rewards))
                if sum(len(part) for part, _ in waiting) >= config.request_batch_size:
                    saved = _save(journal, saved, waiting)
                shown.advance(len(positions))
        _save(journal, saved, waiting)
    return scores


def _resumed(pairs: Pairs, journal: Journal) -> tuple[np.ndarray, int]:
    """Scores from the journal (NaN where there are none), and how many entries it has."""
    import numpy as np

    scores, saved = np.full(len(pairs), np.nan, dtype=np.float32), 0
    while (entry := journal.get(str(saved))) is not None:
        scores[np.asarray(entry[0], dtype=np.int64)] = entry[1]
        saved += 1
    return scores, saved


def _save(journal: Journal, saved: int, waiting: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """Journal the waiting scores as one numbered entry; returns the next number."""
    if not waiting:
        return saved
    positions = [position for part, _ in waiting for position in part.tolist()]
    rewards = [short(reward) for _, part in waiting for reward in part.tolist()]
    journal.put(str(saved), [positions, rewards])
    waiting.clear()
    return saved + 1


def _ranked(config: RerankConfig, pairs: Pairs, scores: np.ndarray) -> Iterator[tuple[str, dict[str, float]]]:
    for q, found in enumerate(pairs.candidates):
        rewards = {key: short(reward) for key, reward in pairs.scores_of(q, scores).items()}
        yield found.query_id, _trimmed(ordered(rewards), config.top_k)


def _fused(
    config: RerankConfig, pairs: Pairs, scores: np.ndarray, weight: float
) -> Iterator[tuple[str, dict[str, float]]]:
    for q, found in enumerate(pairs.candidates):
        assert config.fuse != "none"
        mixed = fuse(_first(pairs, q), pairs.scores_of(q, scores), weight, config.fuse)
        yield found.query_id, _trimmed(mixed, config.top_k)


def _first(pairs: Pairs, q: int) -> dict[str, float]:
    found = pairs.candidates[q]
    return dict(zip(found.key_ids, found.embed_relevances, strict=True))


def _fit(config: RerankConfig, pairs: Pairs, scores: np.ndarray) -> Fit:
    assert config.fuse != "none"
    first = {found.query_id: _first(pairs, q) for q, found in enumerate(pairs.candidates)}
    second = {found.query_id: pairs.scores_of(q, scores) for q, found in enumerate(pairs.candidates)}
    return fit_weight(pairs.beir.qrels, first, second, config.fuse)


def _trimmed(scores: dict[str, float], top_k: int | None) -> dict[str, float]:
    return scores if top_k is None else dict(list(scores.items())[:top_k])


def _records(config: RerankConfig, pairs: Pairs, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    ranked = _ranked(config, pairs, scores)
    for found, (query, rewards) in zip(pairs.candidates, ranked, strict=True):
        yield {
            "query_id": query,
            "pre_key_ids": found.key_ids,
            "key_ids": list(rewards),
            "embed_relevances": found.embed_relevances,
            "rerank_relevances": list(rewards.values()),
            "positive_key_ids": pairs.beir.relevant(query),
        }


if __name__ == "__main__":
    main(rerank)
