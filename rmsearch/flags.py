"""Flags that several evaluation stages share: the data set, and the engine that runs a model."""

from __future__ import annotations

from typing import Any, Literal

from rmsearch.datasets.beir import MISSING_SHARE, Beir, load_beir
from rmsearch.datasets.download import ensure_downloaded
from rmsearch.stage import Run, StageConfig, added, model, option, source, tuning
from rmsearch.storage import uri as storage


class QrelsFlags(StageConfig):
    """Which data set and split, for stages that need its qrels only."""

    dataset_path: str | None = source(
        None, 'BEIR folder, .zip or s3:// URI, "demo", or a BEIR name; what is not there is downloaded by its name.'
    )
    qrels: str | None = source(None, "Qrels file (query-id, corpus-id, score, or TREC's columns) in place of its own.")
    split: str = option("test", "Split of the data set: its qrels/SPLIT.tsv.")

    def prepare(self) -> None:
        """A data set that is to be downloaded to a path must be there before it is digested."""
        path = self.dataset_path
        if path and "/" in path and not storage.is_s3(path) and not storage.exists(path):
            ensure_downloaded(path)


class DatasetFlags(QrelsFlags):
    """Which data set and split, with its texts."""

    queries: str | None = source(None, "Queries file (jsonl, csv, parquet; _id, text) in place of the data set's.")
    corpus: str | None = source(None, "Corpus file (_id, title, text) in place of the data set's.")

    max_missing_share: float = added(
        MISSING_SHARE,
        "Fail when more than this share of the qrels' lines names keys that the corpus lacks. Up to it they stay "
        "relevant and are never found, as in trec_eval.",
        ge=0,
        le=1,
    )

    def load(self, split: str | None = None) -> Beir:
        """The split (by default the one of the flag)."""
        return load_beir(
            self.dataset_path,
            split or self.split,
            queries=self.queries,
            corpus=self.corpus,
            qrels=self.qrels,
            max_missing_share=self.max_missing_share,
        )


def note_dataset(run: Run, beir: Beir) -> None:
    """Put the data set's name, split, sizes and content digests into the run record."""
    count_missing_keys(run, beir)
    sizes = {"queries": len(beir.queries), "keys": len(beir.corpus)}
    run.note(dataset={"name": beir.name, "split": beir.split, **sizes, "digests": beir.digests})


def count_missing_keys(run: Run, beir: Beir) -> None:
    """Count the judged pairs whose key the corpus lacks."""
    if beir.missing_keys:
        run.counts["missing_keys"] = beir.missing_keys


class EngineFlags(StageConfig):
    """Which model, and how it runs."""

    model_name: str = model(help="Model: folder, s3:// URI, packaged or hub name.")
    engine: Literal["auto", "transformers", "vllm", "http"] = option("auto", "What runs the model.")
    dtype: str = option("auto", "Precision: auto, float32, bfloat16, float16.")
    base_url: str | None = option(None, "Address of a server, for the engine http.")
    max_model_len: int | None = option(
        None, "Longest input in tokens; by default what the model was made for (upstream: a fixed number).", ge=8
    )
    max_batch_tokens: int | None = tuning(None, "Tokens of a batch; by default by engine.", ge=1)
    tensor_parallel_size: int = tuning(1, "GPUs that share one copy of the model (vllm).", ge=1)
    num_instances: int = tuning(1, "Copies of the model: data parallel size (vllm).", ge=1)
    max_num_seqs: int = tuning(64, "Inputs at a time (vllm).", ge=1)
    gpu_memory_utilization: float = tuning(0.9, "Share of the GPU's memory to use (vllm).", gt=0, le=1)

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments for load_scorer and load_embedder; options of vLLM only when vLLM runs the model."""
        from rmsearch.engines.options import pick_engine

        engine = pick_engine(self.engine, self.base_url)
        arguments: dict[str, Any] = {
            "engine": engine,
            "dtype": self.dtype,
            "max_length": self.max_model_len,
            "base_url": self.base_url,
            "max_batch_tokens": self.max_batch_tokens,
            "tensor_parallel_size": self.tensor_parallel_size,
            "data_parallel_size": self.num_instances,
        }
        if engine == "vllm":
            arguments["max_num_seqs"] = self.max_num_seqs
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization
        return arguments
