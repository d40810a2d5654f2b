"""Queries, each with a key that serves it: from qrels, from question and answer pairs, or from the corpus itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rmsearch.datasets.beir import Beir, Document
from rmsearch.errors import ConfigError, RecordError
from rmsearch.storage.records import read_records

PseudoKind = Literal["none", "titles", "sentences", "both"]
QUERY_FIELDS = ("query", "question")
KEY_FIELDS = ("key", "positive", "answer", "text", "chosen_key")
WORDS = (6, 45)  # of a sentence that can stand as a query
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")

# How an English abstract leads up to what it says. Other languages do not match and keep their sentences whole.
OPENINGS = (
    "in conclusion|in summary|taken together|together|thus|therefore|moreover|furthermore|finally|here|overall|"
    "interestingly|importantly|notably|in addition|collectively|however|consequently|in contrast|additionally|"
    "conclusions?|interpretation|results?|findings|background|objectives?|methods?|significance"
)
REPORTERS = (
    "these|this|our|the|we|it|also|present|here|study|studies|results?|data|findings?|observations?|analys[ie]s|"
    "evidence|experiments?|work|report|now|was|were|been|has|have|further|strongly|clearly|could|can|thereby|authors?|"
    "using|and"
)
REPORTING = (
    "suggests?|shows?|showed|shown|demonstrates?|demonstrated|indicates?|indicated|reveals?|revealed|finds?|found|"
    "concludes?|concluded|reports?|reported|supports?|provides?|identif(?:y|ied)|propose|establish(?:es)?|"
    "hypothesi[sz]ed?|observed|seen|implies|imply"
)
_OPENING = re.compile(rf"^(?:(?:{OPENINGS})\b[\s,:]*)+", re.IGNORECASE)
_REPORT = re.compile(rf"^(?:(?:{REPORTERS})\s+){{1,6}}(?:{REPORTING})\s+that\s+", re.IGNORECASE)


@dataclass(frozen=True)
class PositivePair:
    """A query and one key that serves it. ``text`` is the key's text as it is to be trained on; ``bare`` says that
    the negatives' titles are left away too (the query is a title)."""

    query_id: str
    key_id: str
    text: str = field(repr=False)
    bare: bool = False


def labelled_pairs(beir: Beir) -> list[PositivePair]:
    """One pair per relevant (query, key) of the split."""
    return [PositivePair(query, key, beir.key_text(key)) for query in beir.queries for key in beir.positives(query)]


def read_pairs(uri: str, query_field: str | None, key_field: str | None) -> Beir:
    """A data set made of (query, key) records: keys with the same text are one key, queries with the same text one
    query. Records may carry ``query_id`` and ``key_id``. Raises RecordError ``file:row``."""
    queries: dict[str, str] = {}
    corpus: dict[str, Document] = {}
    ids: tuple[dict[str, str], dict[str, str]] = ({}, {})
    qrels: dict[str, dict[str, int]] = {}
    names = (query_field, key_field)
    for row, record in enumerate(read_records(uri)):
        if row == 0:
            names = (_field(record, query_field, QUERY_FIELDS, uri), _field(record, key_field, KEY_FIELDS, uri))
        texts = [record.get(str(name)) for name in names]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            missing = next(str(n) for n, t in zip(names, texts, strict=True) if not (isinstance(t, str) and t.strip()))
            raise RecordError(f"{missing} is empty or no text", where=f"{uri}:{row}", remedy="Drop or mend the record")
        query, key = (str(text).strip() for text in texts)
        query_id = ids[0].setdefault(query, str(record.get("query_id") or f"q{len(ids[0])}"))
        key_id = ids[1].setdefault(key, str(record.get("key_id") or f"k{len(ids[1])}"))
        queries[query_id], corpus[key_id] = query, Document("", key)
        qrels.setdefault(query_id, {})[key_id] = 1
    if not queries:
        raise RecordError("holds no records", where=uri)
    return Beir(uri, "pairs", queries, corpus, qrels)


def _field(record: Mapping[str, object], given: str | None, usual: tuple[str, ...], uri: str) -> str:
    if given is not None and given not in record:
        raise RecordError(f"no field {given!r}", where=f"{uri}:0", remedy=f"It has: {', '.join(record)}")
    found = given or next((name for name in usual if name in record), None)
    if found is None:
        remedy = f"Name it with --query-field or --key-field; the record has: {', '.join(record)}"
        raise RecordError(f"none of the fields {', '.join(usual)} is there", where=f"{uri}:0", remedy=remedy)
    return found


def pseudo_queries(beir: Beir, kind: PseudoKind, per_key: int, seed: int) -> tuple[Beir, list[PositivePair]]:
    """Queries taken from the corpus itself (no labels needed): a key's title, and up to ``per_key`` of its sentences
    (last ones first: they often state the finding), each with that key without the sentence as its positive, as in the
    inverse cloze task (Lee et al. 2019, arXiv:1906.00300), and as `as_claim` leaves it.

    Returns a data set with these queries, and their pairs.
    """
    queries: dict[str, str] = {}
    pairs: list[PositivePair] = []
    rng = np.random.default_rng(seed)
    for key_id, document in beir.corpus.items():
        for i, (query, text, bare) in enumerate(_queries_of(document, kind, per_key, rng)):
            query_id = f"{key_id}#{i}"
            queries[query_id] = query
            pairs.append(PositivePair(query_id, key_id, text, bare))
    if not pairs:
        raise ConfigError("no key gave a query", where="--pseudo-queries", remedy="The keys need titles or sentences")
    qrels = {pair.query_id: {pair.key_id: 1} for pair in pairs}
    return Beir(beir.name, "pseudo", queries, beir.corpus, qrels), pairs


def _queries_of(
    document: Document, kind: PseudoKind, per_key: int, rng: np.random.Generator
) -> Iterator[tuple[str, str, bool]]:
    if kind in ("titles", "both") and len(document.title.split()) >= 5 and document.text:
        yield document.title, document.text, True
    if kind == "titles":
        return
    sentences = _SENTENCE.split(document.text)
    usable = [i for i, s in enumerate(sentences) if WORDS[0] <= len(s.split()) <= WORDS[1]]
    if len(sentences) < 3:
        return
    last = [i for i in usable if i >= len(sentences) - 2]
    others = rng.permutation([i for i in usable if i < len(sentences) - 2]).tolist()
    for i in [*last, *others][:per_key]:
        query = as_claim(sentences[i])
        if WORDS[0] - 1 <= len(query.split()) <= WORDS[1] - 5:
            rest = " ".join(sentences[:i] + sentences[i + 1 :])
            yield query, f"{document.title} {rest}".strip(), False


def as_claim(sentence: str) -> str:
    """A sentence without brackets and the openings of English abstracts: "In conclusion, our data show that X (n=3) is
    Y." gives "X is Y." All of `OPENINGS` go first, then up to six of `REPORTERS` with one of `REPORTING` and "that"."""
    bare = _REPORT.sub("", _OPENING.sub("", sentence.strip()))
    bare = re.sub(r"\s*\([^)]*\)", "", bare)
    return bare[:1].upper() + bare[1:]
