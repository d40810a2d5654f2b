"""Rank the corpus with an embedding model: the first stage, whose candidates rerank takes."""

from __future__ import annotations

from typing import Literal

from rmsearch.cli import main
from rmsearch.flags import DatasetFlags, EngineFlags, note_dataset
from rmsearch.retrieval.first_stage import rankings, self_positions, write_outputs
from rmsearch.retrieval.vectors import TextsToEmbed, nearest, product
from rmsearch.stage import Run, option, stage, target, tuning
from rmsearch.storage import uri as storage


class EmbedConfig(DatasetFlags, EngineFlags):
    """Flags of embed."""

    output: str = target("relevance_dict_embed.json", "Candidates for rerank.")
    output_eval: str = target("relevance_dict_embed_eval.json", "Run for ndcg: {query: {key: score}}.")
    run_file: str | None = target(None, "The same run in TREC's six columns (.trec, .run or .txt).")
    top_k: int = option(100, "Candidates per query.", ge=1)
    query_instruction: str | None = option(None, "Text before queries; by default the model's own (E5, Qwen3, …).")
    key_instruction: str | None = option(None, "Text before keys; by default the model's own.")
    no_normalize: bool = option(False, "Keep the vectors' lengths: inner product in place of cosine.")
    similarity_device: Literal["cpu", "cuda", "auto"] = tuning("cpu", "Where similarities are computed.")
    query_batch_size: int = tuning(256, "Queries handed to the model at once.", ge=1)
    key_batch_size: int = tuning(128, "Keys handed to the model at once; each batch is saved as it comes.", ge=1)
    cache_dir: str | None = tuning(
        None, "Folder that keeps the vectors for other runs; by default they go when the run is complete."
    )


NEXT = (
    "rmsearch evaluation rerank --dataset-path {dataset_path} --split {split} --embed-output {output} "
    "--output-eval relevance_dict_rerank_eval.json --model-name REWARD_MODEL"
)


@stage("evaluation.embed", next_step=NEXT)
def embed(config: EmbedConfig, run: Run) -> None:
    """Rank the corpus with an embedding model.

    Embeds the split's queries and the whole corpus, takes the exact top k by cosine and writes candidates for rerank
    and a run for ndcg. A key with the query's own id is left out. Ties are ordered by key id. Killed and started
    again, it embeds only what was not saved.
    """
    product(config.similarity_device)  # refuse before the work
    beir = config.load()
    note_dataset(run, beir)
    query_ids, key_ids = list(beir.queries), sorted(beir.corpus)
    folder = config.cache_dir or f"{config.output}.vectors"
    instructions = {"query_instruction": config.query_instruction, "key_instruction": config.key_instruction}
    positions, scores = nearest(
        run,
        {"model_name": config.model_name, **instructions, **config.engine_arguments()},
        TextsToEmbed(list(beir.queries.values()), "query", config.query_batch_size, folder),
        TextsToEmbed([beir.key_text(key) for key in key_ids], "key", config.key_batch_size, folder),
        config.top_k,
        own=self_positions(query_ids, key_ids),
        device=config.similarity_device,
        normalize=not config.no_normalize,
    )
    ranking = rankings(query_ids, key_ids, positions, scores)
    write_outputs(beir, ranking, config.output, config.output_eval, config.run_file, "rmsearch-embed")
    run.counts |= {"queries": len(ranking), "keys": len(beir.corpus)}
    if config.cache_dir is None:
        storage.remove(folder)


if __name__ == "__main__":
    main(embed)
