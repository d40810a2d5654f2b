"""Find the keys that an embedding model holds nearest to each query."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Literal

from rmsearch.cli import main
from rmsearch.datasets.corpus import CorpusIndex
from rmsearch.errors import ConfigError
from rmsearch.retrieval.corpus_search import (
    KeyTexts,
    Question,
    RetrievalFlags,
    check_correct_ids,
    open_keys,
    read_questions,
    relevance_records,
)
from rmsearch.retrieval.vectors import (
    ExactSearch,
    VectorCache,
    count_vectors,
    embedded,
    gathered,
    product,
    vector_identity,
)
from rmsearch.stage import Run, option, stage, target, tuning
from rmsearch.storage import uri as storage
from rmsearch.storage.records import write_records

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.engines import Embedder


class EmbedKeysConfig(RetrievalFlags):
    """Flags of get_top_relevant_keys_embed."""

    output: str = target("relevance_records_embed.json", "Relevance records: each query with its keys, best first.")
    k_key: int = option(50, "Keys per query.", ge=1)
    query_instruction: str | None = option(None, "Text before queries; by default the model's own (E5, Qwen3, …).")
    key_instruction: str | None = option(None, "Text before keys; by default the model's own.")
    similarity_device: Literal["cpu", "cuda", "auto"] = tuning("cpu", "Where similarities are computed.")
    query_batch_size: int = tuning(512, "Queries handed to the model at once.", ge=1)
    key_batch_size: int = tuning(128, "Keys handed to the model at once; each batch is saved as it comes.", ge=1)
    query_checkpoint: str | None = tuning(
        None, "Folder that keeps the queries' vectors for other runs; by default they go when this run is complete."
    )
    key_checkpoint: str | None = tuning(None, "The same for the keys' vectors.")


NEXT = (
    "rmsearch train sample_dpo_batch --relevance-json {output} --source-csv df.csv --output sampled_query_key_set.json"
)
SEARCHED = 1024  # keys compared at once: enough for a fast matrix product, little enough for memory


@stage("train.get_top_relevant_keys_embed", next_step=NEXT)
def get_top_relevant_keys_embed(config: EmbedKeysConfig, run: Run) -> None:
    """Find each query's nearest keys with an embedding model.

    Embeds queries and keys once each, saves vectors as they come under a hash of text and model (killed and started
    again, it embeds only what was not saved), and takes the exact top k by cosine; ties go to the earlier key. Memory
    grows with the queries, not with the keys: their vectors pass in blocks, their texts are read from disk for the
    records. df_id, query type and correct_id are carried over.
    """
    product(config.similarity_device)  # refuse before the work
    for place in (config.query_checkpoint, config.key_checkpoint):
        if place and storage.exists(place) and not storage.is_folder(place):
            problem = "is a file, and vectors are kept in a folder"
            raise ConfigError(problem, where=place, remedy="Name another place")
    questions = read_questions(config)
    with open_keys(config) as keys:
        check_correct_ids(questions, keys, config.correct_ids_json or config.queries)
        positions, scores = asyncio.run(_search(config, run, questions, keys))
        write_records(config.output, relevance_records(questions, keys, positions, scores, "similarity"))
        run.counts |= {"queries": len(questions), "keys": len(keys)}
    for place in (None if config.query_checkpoint else "queries", None if config.key_checkpoint else "keys"):
        if place:
            storage.remove(f"{config.output}.{place}.vectors")


async def _search(
    config: EmbedKeysConfig, run: Run, questions: list[Question], keys: CorpusIndex
) -> tuple[np.ndarray, np.ndarray]:
    """(positions int64[n, k], scores float32[n, k]) of each query's best keys."""
    from rmsearch.engines import load_embedder

    embedder = load_embedder(
        config.model_name,
        query_instruction=config.query_instruction,
        key_instruction=config.key_instruction,
        **config.engine_arguments(),
    )
    try:
        identity = vector_identity(embedder, config.model_name, config.base_url, config.dtype)
        caches = (
            VectorCache(config.query_checkpoint or f"{config.output}.queries.vectors", identity),
            VectorCache(config.key_checkpoint or f"{config.output}.keys.vectors", identity),
        )
        return await _compare(config, run, embedder, caches, questions, keys)
    finally:
        await embedder.close()


async def _compare(
    config: EmbedKeysConfig,
    run: Run,
    embedder: Embedder,
    caches: tuple[VectorCache, VectorCache],
    questions: list[Question],
    keys: CorpusIndex,
) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    texts = [question.query for question in questions]
    with run.progress(len(questions) + len(keys), "texts") as shown:

        async def counted(
            blocks: AsyncIterator[tuple[int, np.ndarray]],
        ) -> AsyncIterator[tuple[int, np.ndarray]]:
            async for first, vectors in blocks:
                shown.advance(len(vectors))
                yield first, vectors

        asked = embedded(embedder, texts, "query", config.query_batch_size, caches[0])
        vectors = np.concatenate([block async for _, block in counted(asked)])
        search = ExactSearch(vectors, min(config.k_key, len(keys)), [-1] * len(texts), config.similarity_device)
        blocks = embedded(embedder, KeyTexts(keys), "key", config.key_batch_size, caches[1])
        async for first, block in gathered(counted(blocks), SEARCHED):
            await asyncio.to_thread(search.add, first, block)
    count_vectors(run, embedder, sum(cache.found for cache in caches))
    return search.result()


if __name__ == "__main__":
    main(get_top_relevant_keys_embed)
