"""Make a test set of a labelled data set: query records, judged pairs, and the table of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rmsearch.cli import main
from rmsearch.datasets.chain import QueryRecord, RelevanceRecord
from rmsearch.datasets.records import PreferencePair
from rmsearch.errors import ConfigError, RecordError
from rmsearch.flags import DatasetFlags, note_dataset
from rmsearch.stage import Run, option, source, stage, target
from rmsearch.storage.records import read_models, write_records

if TYPE_CHECKING:
    import numpy as np

    from rmsearch.datasets.beir import Beir

TRIES = 100


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
    random_seed: int = option(42, "Of all choices; the same seed gives the same files.", ge=0)


NEXT = (
    "rmsearch train lora --dataset-list-train dataset_list_train.json --dataset-list-test {output} --model-name MODEL"
)


@stage("train.make_test_set", next_step=NEXT)
def make_test_set(config: TestSetConfig, run: Run) -> None:
    """Make a test set of a labelled data set (BEIR layout).

    For every query of the split and every key that its qrels call relevant: a row of --output-csv and a pair in which
    that key is chosen. Rejected is a random one of the keys retrieved for the query (--relevance-json), else of the
    corpus: never a relevant one, never one with the text of the query or of a relevant key. No judge is asked.
    """
    import numpy as np

    beir = config.load()
    note_dataset(run, beir)
    retrieved = _retrieved(config.relevance_json, beir) if config.relevance_json else {}
    rng = np.random.default_rng(config.random_seed)
    queries = _sampled([query for query in beir.queries if beir.positives(query)], config.n_sample, rng)
    if not queries:
        raise ConfigError(f"the split {beir.split!r} has no relevant pair", where=config.dataset_path)
    drawer = _Drawer(beir, sorted(beir.corpus), retrieved, rng)
    judged = {query: list(drawer.pairs(query, config.query_type)) for query in queries}
    pairs = [pair for found in judged.values() for pair in found]
    if not pairs:
        problem = "no relevant key differs from its query, or no other key is left to reject"
        raise ConfigError(problem, where=config.dataset_path, remedy="Give a larger corpus")
    write_records(config.output_csv, _table(beir, queries))
    write_records(config.output_queries, _query_records(beir, queries, config.query_type))
    write_records(config.output, (pair.model_dump(mode="json", exclude_none=True) for pair in pairs))
    run.counts |= {"queries": len(queries), "pairs": len(pairs)}
    run.counts |= {name: count for name, count in drawer.counts.items() if count}


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


@dataclass
class _Drawer:
    """Draws a rejected key for each relevant one."""

    beir: Beir
    keys: Sequence[str]
    retrieved: Mapping[str, Sequence[str]]
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.counts = {"self_matches": 0, "rejected_at_random": 0, "without_rejected": 0}

    def pairs(self, query: str, query_type: str) -> Iterator[PreferencePair]:
        """One pair for each relevant key of the query that is not the query itself."""
        text = self.beir.queries[query]
        taken = {query, *self.beir.positives(query)}
        texts = {text.strip(), *(self.beir.key_text(key) for key in self.beir.positives(query))}
        for chosen in self.beir.positives(query):
            if chosen == query or self.beir.key_text(chosen) == text.strip():
                self.counts["self_matches"] += 1
                continue
            rejected = self._rejected(query, taken, texts)
            if rejected is None:
                self.counts["without_rejected"] += 1
                continue
            yield PreferencePair(
                query=text,
                chosen_key=self.beir.key_text(chosen),
                rejected_key=self.beir.key_text(rejected),
                query_id=query,
                chosen_key_id=chosen,
                rejected_key_id=rejected,
                query_type=query_type,
                source="labels",
            )

    def _rejected(self, query: str, taken: set[str], texts: set[str]) -> str | None:
        """A retrieved key that may be rejected; where there is none a random one; None when the corpus has none."""
        found = [key for key in self.retrieved.get(query, ()) if self._usable(key, taken, texts)]
        if found:
            return found[int(self.rng.integers(len(found)))]
        if self.retrieved:
            self.counts["rejected_at_random"] += 1
        for at in self.rng.integers(len(self.keys), size=TRIES).tolist():
            if self._usable(self.keys[at], taken, texts):
                return self.keys[at]
        left = [key for key in self.keys if self._usable(key, taken, texts)]  # nearly all are relevant
        return left[int(self.rng.integers(len(left)))] if left else None

    def _usable(self, key: str, taken: set[str], texts: set[str]) -> bool:
        return key not in taken and self.beir.key_text(key) not in texts


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
