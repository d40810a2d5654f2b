"""Find the keys that an embedding model holds nearest to each query."""

from __future__ import annotations

from typing import Literal

from rmsearch.cli import main
from rmsearch.errors import ConfigError
from rmsearch.retrieval.corpus_search import (
    KeyTexts,
    RetrievalFlags,
    check_correct_ids,
    open_keys,
    read_questions,
    relevance_records,
)
from rmsearch.retrieval.vectors import TextsToEmbed, nearest, product
from rmsearch.stage import Run, option, stage, target, tuning
from rmsearch.storage import uri as storage
from rmsearch.storage.records import write_records


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
COMPARED = 1024  # keys at once: enough for a fast matrix product, little enough for memory


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
    query_folder = config.query_checkpoint or f"{config.output}.queries.vectors"
    key_folder = config.key_checkpoint or f"{config.output}.keys.vectors"
    instructions = {"query_instruction": config.query_instruction, "key_instruction": config.key_instruction}
    with open_keys(config) as keys:
        check_correct_ids(questions, keys, config.correct_ids_json or config.queries)
        positions, scores = nearest(
            run,
            {"model_name": config.model_name, **instructions, **config.engine_arguments()},
            TextsToEmbed([question.query for question in questions], "query", config.query_batch_size, query_folder),
            TextsToEmbed(KeyTexts(keys), "key", config.key_batch_size, key_folder),
            config.k_key,
            compared=COMPARED,
            device=config.similarity_device,
        )
        write_records(config.output, relevance_records(questions, keys, positions, scores, "similarity"))
        run.counts |= {"queries": len(questions), "keys": len(keys)}
    for folder, kept in ((query_folder, config.query_checkpoint), (key_folder, config.key_checkpoint)):
        if not kept:
            storage.remove(folder)


if __name__ == "__main__":
    main(get_top_relevant_keys_embed)
