"""BEIR data sets: queries, corpus and qrels, from a folder, zip, S3 prefix, single files or by name.

Layouts: BEIR's own (``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``) and that of the HF hub (parquet
folders ``corpus/``, ``queries/`` and ``qrels/`` or ``default/``, or qrels as jsonl); every file may be .gz. Ids stay
the text that the data has. Malformed rows, duplicate ids and qrels of unknown queries are errors at ``file:row``. A key
of the qrels that the corpus lacks stays relevant and can never be found, as in trec_eval.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from rmsearch.datasets.download import ensure_downloaded
from rmsearch.datasets.sources import Files, SourceRow, ZipFiles, folder_files, lines, one_file, rows
from rmsearch.errors import ConfigError, InputMissingError, RecordError
from rmsearch.progress import say
from rmsearch.storage import uri as storage

PACKAGED = {"demo": Path(__file__).parent / "demo"}
QRELS_HEADER = ("query-id", "corpus-id", "score")
MISSING_SHARE = 0.02  # of the qrels' lines, whose keys the corpus may lack
_SUFFIXES = r"\.(jsonl|json|parquet|csv)(\.gz)?"


class Document(NamedTuple):
    """A key: what is ranked."""

    title: str
    text: str

    @property
    def key(self) -> str:
        """The text that models read: "title text", stripped."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True)
class Beir:
    """One split of a data set. ``queries`` holds the split's queries only, in the order of the queries file;
    ``unjudged`` are the ids of the others.

    ``qrels``: query id -> key id -> grade, grade 0 and below meaning judged and not relevant.
    """

    name: str
    split: str
    queries: Mapping[str, str]
    corpus: Mapping[str, Document] = field(repr=False)
    qrels: Mapping[str, Mapping[str, int]] = field(repr=False)
    unjudged: frozenset[str] = field(default=frozenset(), repr=False)

    def positives(self, query_id: str) -> list[str]:
        """Ids of a query's relevant keys (grade > 0) that are in the corpus, sorted."""
        return [key for key in self.relevant(query_id) if key in self.corpus]

    def relevant(self, query_id: str) -> list[str]:
        """Ids of all its relevant keys, sorted; the corpus may lack some (see `missing_keys`)."""
        return sorted(key for key, grade in self.qrels.get(query_id, {}).items() if grade > 0)

    @property
    def reachable(self) -> dict[str, dict[str, int]]:
        """The qrels without the keys that the corpus lacks."""
        return {query: {k: g for k, g in keys.items() if k in self.corpus} for query, keys in self.qrels.items()}

    @cached_property
    def missing_keys(self) -> int:
        """Number of judged (query, key) pairs whose key is not in the corpus."""
        return sum(key not in self.corpus for judged in self.qrels.values() for key in judged)

    def key_text(self, key_id: str) -> str:
        return self.corpus[key_id].key

    @cached_property
    def digests(self) -> dict[str, str]:
        """Content digests of queries, corpus and qrels; the same for a folder, its zip and its S3 copy."""
        judged = ((q, sorted(keys.items())) for q, keys in sorted(self.qrels.items()))
        return {
            "queries": _digest(sorted(self.queries.items())),
            "corpus": _digest((key, *document) for key, document in sorted(self.corpus.items())),
            "qrels": _digest(judged),
        }


def load_beir(
    dataset: str | None,
    split: str = "test",
    *,
    queries: str | None = None,
    corpus: str | None = None,
    qrels: str | None = None,
    all_queries: bool = False,
    max_missing_share: float = MISSING_SHARE,
) -> Beir:
    """Load one split.

    ``dataset``: a folder, .zip, ``s3://`` prefix or zip, "demo" (packaged), or the name of a published BEIR set, which
    is downloaded. ``queries``, ``corpus`` and ``qrels`` name single files and take precedence. Without any qrels (both
    other files given, no data set) all queries are taken. ``all_queries`` keeps queries the split does not judge.
    ``max_missing_share``: the share of the qrels' lines that may name keys that the corpus lacks; they are warned of.

    Raises InputMissingError, RecordError (``file:row``), ConfigError, RetryableError (the download).
    """
    if dataset is None and not (queries and corpus):
        raise ConfigError("no data set is given", remedy="Give --dataset-path, or --queries and --corpus (and --qrels)")
    files = open_dataset(dataset) if dataset else None
    texts = dict(_queries(_pick(files, queries, "queries")))
    documents = dict(_corpus(_pick(files, corpus, "corpus")))
    name = storage.name(dataset or queries or "").removesuffix(".zip")
    if not (qrels or files):
        return Beir(name, split, texts, documents, {})
    places = [one_file(qrels)] if qrels else _split_places(files, split)
    judged = _qrels(places, texts, documents, max_missing_share)
    unjudged = frozenset(texts.keys() - judged.keys())
    if not all_queries:
        texts = {query: text for query, text in texts.items() if query in judged}
    return Beir(name, split, texts, documents, judged, unjudged)


def open_dataset(dataset: str) -> Files:
    """The files of a data set by path, URI or name (a bare name or a missing path is downloaded)."""
    if dataset in PACKAGED:
        return folder_files(str(PACKAGED[dataset]))
    if not storage.exists(dataset):
        if storage.is_s3(dataset):
            raise InputMissingError("no such folder or object", where=dataset)
        dataset = str(ensure_downloaded(dataset))
    if storage.is_folder(dataset):
        return folder_files(dataset)
    if dataset.endswith(".zip"):
        return ZipFiles(dataset)
    raise ConfigError("is neither a folder nor a .zip", where=dataset, remedy="Give a folder, a .zip, or a BEIR name")


def read_qrels(place: str) -> dict[str, dict[str, int]]:
    """A qrels file of its own: BEIR's three columns, TREC's four (``query 0 key grade``), jsonl, csv or parquet."""
    return _qrels([one_file(place)])


def split_qrels(dataset: str, split: str) -> dict[str, dict[str, int]]:
    """Only the qrels of a split; the ids are not checked against queries and corpus."""
    return _qrels(_split_places(open_dataset(dataset), split))


def in_corpus(
    qrels: Mapping[str, Mapping[str, int]], corpus: Callable[[str], bool], max_missing_share: float, where: str | None
) -> dict[str, dict[str, int]]:
    """The qrels without the keys for which ``corpus(key)`` is false: for qrels that were read without a corpus.

    Warns of them. Raises RecordError when they are more than the allowed share.
    """
    kept = {query: {key: grade for key, grade in keys.items() if corpus(key)} for query, keys in qrels.items()}
    missing = [key for query, keys in qrels.items() for key in keys if key not in kept[query]]
    if missing:
        _allow_missing(missing[0], len(missing), sum(map(len, qrels.values())), max_missing_share, where, where)
    return kept


def _allow_missing(key: str, count: int, total: int, most: float, place: str | None, first: str | None) -> None:
    """Warn of keys that the corpus lacks. RecordError, at the first one's row, when they are too many."""
    share = f"{count} of {total} qrels lines ({count / total:.2%})"
    if count > most * total:
        problem = f"the key id {key!r} is not in the corpus, and so it is with {share}"
        remedy = f"Give the corpus of these qrels, or allow more with --max-missing-share (now {most:g})"
        raise RecordError(problem, where=first, remedy=remedy)
    effect = "relevant and never found, as in trec_eval"
    say("warning", qrels=place, missing=f"{share} name keys that the corpus lacks", counted_as=effect)


def _pick(files: Files | None, given: str | None, kind: str) -> list[tuple[Files, str]]:
    """The files that hold the queries or the corpus: the one given, else those of the data set."""
    if given:
        return [one_file(given)]
    assert files is not None
    pattern = re.compile(rf"{kind}{_SUFFIXES}|{kind}/[^/]+{_SUFFIXES}")
    if not (matching := [name for name in files.names if pattern.fullmatch(name)]):
        parts = sorted({n.rpartition("/")[0] for n in files.names if n.endswith("/corpus.jsonl")})
        remedy = (
            f"Name one of its parts: {', '.join(parts)}"
            if parts
            else f"A data set has {kind}.jsonl or {kind}/*.parquet"
        )
        raise InputMissingError(f"has no {kind}.jsonl", where=files.place, remedy=remedy)
    flat = [name for name in matching if "/" not in name]
    return [(files, name) for name in (flat[:1] or matching)]


def _split_places(files: Files | None, split: str) -> list[tuple[Files, str]]:
    """The files that hold the qrels of a split."""
    assert files is not None
    of_a_split = re.compile(rf"(qrels|default|data)/(?P<split>[^/]+?)(-\d+-of-\d+)?({_SUFFIXES}|\.tsv(\.gz)?)")
    candidates = [(m["split"], name) for name in files.names if (m := of_a_split.fullmatch(name))]
    if not (names := [name for of_file, name in candidates if of_file == split]):
        splits = ", ".join(sorted({of_file for of_file, _ in candidates})) or "none"
        raise InputMissingError(
            f"has no qrels for the split {split!r}", where=files.place, remedy=f"Splits there: {splits}"
        )
    tsv = [name for name in names if ".tsv" in name]
    return [(files, name) for name in (tsv[:1] or names)]


def _queries(places: list[tuple[Files, str]]) -> Iterator[tuple[str, str]]:
    for row, identity in _identified(places):
        yield identity, row.text("text", "query")


def _corpus(places: list[tuple[Files, str]]) -> Iterator[tuple[str, Document]]:
    for row, identity in _identified(places):
        yield identity, Document(row.text("title", default=""), row.text("text"))


def _identified(places: list[tuple[Files, str]]) -> Iterator[tuple[SourceRow, str]]:
    """Rows with their ids; an id that is empty or comes twice is an error, and so is a file without rows."""
    seen: set[str] = set()
    for files, name in places:
        for row in rows(files, name):
            identity = row.text("_id", "id")
            if not identity:
                raise row.error("the id is empty")
            if identity in seen:
                raise row.error(f"the id {identity!r} comes twice", "Ids must be unique")
            seen.add(identity)
            yield row, identity
    if not seen:
        raise RecordError("holds no records", where=places[0][0].shown(places[0][1]))


def _qrels(
    places: list[tuple[Files, str]],
    queries: Container[str] | None = None,
    corpus: Container[str] | None = None,
    max_missing_share: float = MISSING_SHARE,
) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    total, missing, first = 0, 0, ("", "")
    for files, name in places:
        for row in _qrel_rows(files, name):
            query, key, grade = row.text("query-id"), row.text("corpus-id"), _grade(row)
            total += 1
            if queries is not None and query not in queries:
                raise row.error(f"the query id {query!r} is not in the queries")
            if corpus is not None and key not in corpus:
                missing, first = missing + 1, first if missing else (key, row.where)
            if judged.setdefault(query, {}).setdefault(key, grade) != grade:
                raise row.error(f"query {query!r} and key {key!r} come twice with different scores")
    shown = places[0][0].shown(places[0][1])
    if not judged:
        raise RecordError("the split is empty: no judged pairs", where=shown)
    if missing:
        _allow_missing(first[0], missing, total, max_missing_share, shown, first[1])
    return judged


def _qrel_rows(files: Files, name: str) -> Iterator[SourceRow]:
    """Rows with the fields of `QRELS_HEADER`; tsv and text files may lack the header or have TREC's four columns."""
    if not re.search(r"\.(tsv|txt|qrels|trec|qrel)(\.gz)?$", name):
        yield from rows(files, name)
        return
    with files.open(name) as stream:
        for number, line in lines(stream, files.shown(name)):
            fields = line.split("\t") if "\t" in line else line.split()
            if number == 1 and fields[:2] == list(QRELS_HEADER[:2]):
                continue
            if len(fields) == 4:  # TREC: query, iteration, key, grade
                del fields[1]
            where = f"{files.shown(name)}:{number}"
            if len(fields) != 3:
                problem = f"has {len(fields)} columns, not 3 (query-id, corpus-id, score) or 4 (TREC)"
                raise RecordError(problem, where=where, remedy="Separate the columns by tabs")
            yield SourceRow(where, dict(zip(QRELS_HEADER, fields, strict=True)))


def _grade(row: SourceRow) -> int:
    value = row.values.get("score")
    try:
        grade = float(value)  # type: ignore[arg-type]
        if grade == int(grade):
            return int(grade)
    except (TypeError, ValueError, OverflowError):
        pass
    raise row.error(f"the score must be a whole number, got {value!r}")


def _digest(items: Iterable[object]) -> str:
    state = hashlib.sha256()
    for item in items:
        state.update(json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        state.update(b"\n")
    return state.hexdigest()[:32]
