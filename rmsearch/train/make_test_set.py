"""Make a test set of a labelled data set: query records, judged pairs, and the table of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rmsearch.cli import main
from rmsearch.datasets.beir import Beir
from rmsearch.datasets.chain import QueryRecord, RelevanceRecord
from rmsearch.datasets.records import PreferencePair
from rmsearch.errors import ConfigError, RecordError
from rmsearch.flags import DatasetFlags, note_dataset
from rmsearch.preferences.negatives import Negatives, Positives, at_random, same_text, shuffled
from rmsearch.stage import Run, option, source, stage, target
from rmsearch.storage.records import read_models, write_records


class TestSetConfig(DatasetFlags):
    """Flags of make_test_set."""

    __test__ = False  # no test case, whatever its name

    relevance_json: str | None = source(
        None, "Retrieved keys (relevance records) to take rejected keys from; by default any key of the corpus."
    )
    output: str = target("dataset_list_test.json", "Judged pairs: the labelled key is chosen.")
    output_csv: str = target("df2.csv", "Table: query-id, corpus-id, score, query, corpus.")
    output_queries: str = target("query_recs.json", "Query records.")
    query_type: str = option("arguana-normal", "The records' query-type.", min_length=1)
    n_sample: int | None = option(None, "Take so many queries at random; by default all.", ge=1)
    random_seed: int = option(42, "Seed of the random draws; the same seed gives the same files.", ge=0)


NEXT = (
    "rmsearch train lora --dataset-list-train dataset_list_train.json --dataset-list-test {output} --model-name MODEL"
)


@stage("train.make_test_set", next_step=NEXT)
def make_test_set(config: TestSetConfig, run: Run) -> None:
    """Make a test set of a labelled data set (BEIR layout).

    For every query of the split and every key that its qrels call relevant: a row of --output-csv and a pair in which
    that key is chosen. Rejected is a random one of the keys retrieved for the query (--relevance-json), else of the
    corpus: never a relevant one, never one with the text of the query or of a relevant
    key (case and white space apart). No judge is asked.
    """
    beir = config.load()
    note_dataset(run, beir)
    retrieved = _retrieved(config.relevance_json, beir) if config.relevance_json else {}
    rng = np.random.default_rng(config.random_seed)
    queries = _sampled([query for query in beir.queries if beir.positives(query)], config.n_sample, rng)
    if not queries:
        raise ConfigError(f"the split {beir.split!r} has no relevant pair", where=config.dataset_path)
    counts, keys = Counter[str](), sorted(beir.corpus)
    pairs = [
        pair
        for query in queries
        for pair in _pairs(beir, query, config.query_type, retrieved.get(query, ()), keys, rng, counts)
    ]
    if not pairs:
        problem = "no relevant key differs from its query, or no other key is left to reject"
        raise ConfigError(problem, where=config.dataset_path, remedy="Give a larger corpus")
    write_records(config.output_csv, _table(beir, queries))
    write_records(config.output_queries, _query_records(beir, queries, config.query_type))
    write_records(config.output, (pair.model_dump(mode="json", exclude_none=True) for pair in pairs))
    run.counts |= {"queries": len(queries), "pairs": len(pairs)}
    run.counts |= {name: count for name in ("self_matches", "without_rejected") if (count := counts[name])}
    if retrieved and counts["from_random"]:
        run.counts["rejected_at_random"] = counts["from_random"]


def _retrieved(uri: str, beir: Beir) -> dict[str, list[str]]:
    """Query id -> ids of the retrieved keys. Raises RecordError ``file:row`` when they are of other data."""
    found: dict[str, list[str]] = {}
    remedy = "Use the file that was made from this data set"
    for number, record in enumerate(read_models(uri, RelevanceRecord), 1):
        where = f"{uri}:{number}"
        if record.query_id in beir.unjudged:
            continue
        if beir.queries.get(record.query_id) != record.query:
            problem = f"the query {record.query_id!r} is not in the data set" + (
                " with this text" if record.query_id in beir.queries else ""
            )
            raise RecordError(problem, where=where, remedy=remedy)
        for key in record.keys:
            if key.key_id not in beir.corpus:
                raise RecordError(f"the key id {key.key_id!r} is not in the corpus", where=where, remedy=remedy)
            if beir.key_text(key.key_id) != key.key.strip():
                problem = f"was made from another corpus: the key {key.key_id!r} has another text here"
                raise RecordError(problem, where=where, remedy=remedy)
        found[record.query_id] = [key.key_id for key in record.keys]
    if not found:
        raise RecordError(f"holds no query of the split {beir.split!r}", where=uri, remedy=remedy)
    return found


def _sampled(queries: list[str], size: int | None, rng: np.random.Generator) -> list[str]:
    """So many of the queries, in their order."""
    if size is None or size >= len(queries):
        return queries
    return [queries[at] for at in sorted(rng.choice(len(queries), size, replace=False).tolist())]


def _pairs(
    beir: Beir,
    query: str,
    query_type: str,
    retrieved: Sequence[str],
    keys: Sequence[str],
    rng: np.random.Generator,
    counts: Counter[str],
) -> Iterator[PreferencePair]:
    """One pair for each relevant key of the query that is not the query itself. Rejected is a retrieved key; where none
    may be, a random one."""
    text, relevant = beir.queries[query], beir.positives(query)
    positives = Positives(relevant)
    for chosen in relevant:
        if chosen == query or same_text(beir.key_text(chosen)) == same_text(text):
            counts["self_matches"] += 1
            continue
        negatives = Negatives(positives, beir.key_text, counts)
        negatives.exclude(query, text)
        anywhere = (at_random(keys, rng), shuffled(keys, rng))  # the second for when nearly all are relevant
        rejected = negatives.draw(
            ("retrieved", shuffled(retrieved, rng)), *(("random", candidates) for candidates in anywhere)
        )
        if rejected is None:
            counts["without_rejected"] += 1
            continue
        yield PreferencePair(
            query=text,
            chosen_key=beir.key_text(chosen),
            rejected_key=rejected[1],
            query_id=query,
            chosen_key_id=chosen,
            rejected_key_id=rejected[0],
            query_type=query_type,
            source="labels",
        )


def _table(beir: Beir, queries: Sequence[str]) -> Iterator[dict[str, Any]]:
    for query in queries:
        for key in beir.positives(query):
            score, texts = beir.qrels[query][key], {"query": beir.queries[query], "corpus": beir.key_text(key)}
            yield {"query-id": query, "corpus-id": key, "score": score, **texts}


def _query_records(beir: Beir, queries: Sequence[str], query_type: str) -> Iterator[QueryRecord]:
    """One record per query; its row is the relevant key of the highest grade."""
    for query in queries:
        best = min(beir.positives(query), key=lambda key: (-beir.qrels[query][key], key))
        yield QueryRecord(query=beir.queries[query], df_id=best, query_type=query_type, query_id=query)


if __name__ == "__main__":
    main(make_test_set)
