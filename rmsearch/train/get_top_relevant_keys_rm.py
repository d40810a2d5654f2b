"""Find each query's best keys with a reward model: among candidates, or among all keys."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from rmsearch import engines
from rmsearch.cli import main
from rmsearch.datasets.corpus import CorpusIndex
from rmsearch.errors import ConfigError
from rmsearch.retrieval.candidates import KeyChoices, recorded_candidates
from rmsearch.retrieval.corpus_search import (
    RetrievalFlags,
    check_correct_ids,
    open_keys,
    read_questions,
    relevance_records,
)
from rmsearch.scoring.journaled import BlockEntries, count_scores, score_journaled
from rmsearch.scoring.topk import TopK
from rmsearch.stage import Run, model, option, source, stage, target, tuning
from rmsearch.storage.journal import Journal
from rmsearch.storage.records import write_records


class RewardKeysConfig(RetrievalFlags):
    """Flags of get_top_relevant_keys_rm."""

    candidates: str | None = source(
        None,
        "Output of get_top_relevant_keys_embed to score anew; its queries and keys are used where none are named. "
        "By default every key is scored for every query.",
    )
    output: str = target("relevance_records_rm.json", "Relevance records: each query with its keys, best first.")
    k_key: int = option(10, "Keys per query.", ge=1)
    template: str | None = option(None, "Prompt template; by default the one that the model was trained with.")
    lora: str | None = model(None, "LoRA adapter on top of the model.")
    request_batch_size: int = tuning(128, "Scored pairs that are saved at a time.", ge=1)
    timeout: float = tuning(10000, "Seconds without any score after which to give up.", gt=0)
    checkpoint: str | None = tuning(None, "Where scores are saved as they come; by default beside the output.")


NEXT = (
    "rmsearch train sample_dpo_batch --relevance-json {output} --source-csv df.csv --output sampled_query_key_set.json"
)


@stage("train.get_top_relevant_keys_rm", next_step=NEXT)
def get_top_relevant_keys_rm(config: RewardKeysConfig, run: Run) -> None:
    """Find each query's best keys with a reward model.

    Scores --candidates (or all keys, which is dear) and keeps the best k by raw reward; ties go to the earlier key.
    Scores are saved as they come: killed and started again, it pays for no saved pair twice. Candidates that do not fit
    the queries and keys named beside them are refused. df_id, query type and correct_id are carried over.
    """
    with _choices(config) as choices:
        positions, rewards = asyncio.run(_score(config, run, choices))
        records = relevance_records(choices.questions, choices.keys, positions, rewards, "relevance")
        write_records(config.output, records)
        run.counts["queries"] = len(choices.questions)


@contextmanager
def _choices(config: RewardKeysConfig) -> Iterator[KeyChoices]:
    if config.candidates is None:
        questions = read_questions(config)
        with open_keys(config) as keys:
            check_correct_ids(questions, keys, config.correct_ids_json or config.queries)
            yield KeyChoices(questions, keys)
        return
    if config.correct_ids_json and not config.queries:
        raise ConfigError("needs the queries", where="--correct-ids-json", remedy="Name them with --queries-json")
    asked = read_questions(config) if config.queries else None
    with _keys_if_named(config) as keys:
        if asked is not None and keys is not None:
            check_correct_ids(asked, keys, config.correct_ids_json or config.queries)
        with recorded_candidates(config.candidates, keys, asked) as choices:
            yield choices


@contextmanager
def _keys_if_named(config: RewardKeysConfig) -> Iterator[CorpusIndex | None]:
    if config.keys is None:
        yield None
        return
    with open_keys(config) as keys:
        yield keys


async def _score(config: RewardKeysConfig, run: Run, choices: KeyChoices) -> tuple[np.ndarray, np.ndarray]:
    """(positions int64[n, k], rewards float32[n, k]): each query's best keys."""
    arguments = config.engine_arguments()
    scorer = engines.load_scorer(config.model_name, template=config.template, lora=config.lora, **arguments)
    try:
        pairs = choices.pairs(getattr(scorer.contract, "order", None) == "key_first")
        best = TopK(len(choices.questions), min(config.k_key, len(choices.keys)))
        journal = Journal(config.checkpoint, run.fingerprint) if config.checkpoint else run.journal()
        with journal, run.progress(len(pairs), "pairs") as shown:
            saved = await score_journaled(
                lambda: scorer,
                pairs,
                BlockEntries(journal, config.request_batch_size, sliced=True),
                lambda positions, rewards: best.add(*pairs.locate(positions), rewards),
                timeout=config.timeout,
                where=config.model_name,
                shown=shown,
            )
        run.counts["pairs"] = len(pairs)
        count_scores(run, scorer, from_journal=saved)
    finally:
        await scorer.close()
    return best.snapshot()


if __name__ == "__main__":
    main(get_top_relevant_keys_rm)
