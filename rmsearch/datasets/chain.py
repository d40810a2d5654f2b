"""The records that the stages between a corpus and its preference pairs hand to each other (upstream.md's schemas).

``query-type`` and ``query_type`` are the same field: both are read, ``query-type`` is written where upstream writes it.
``df_id`` is the corpus row's own id, as text.
"""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, ConfigDict, Field, model_serializer, model_validator

from rmsearch.datasets.records import ChatMessage, Finite, Id, Record

QUERY_TYPES: tuple[str, ...] = ("titles", "keywords", "questions", "irr_questions")
IRRELEVANT = "irr_questions"  # asked about a row that does not answer them
TYPE_NAMES = AliasChoices("query-type", "query_type")


class ChainRecord(Record):
    """Base: fields that are None are left out of the file, ``query_type`` is written as ``query-type``."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in type(self).model_fields}
        spelt = {"query_type": "query-type", "query_types": "query-types"}
        return {spelt.get(name, name): value for name, value in found.items() if value is not None}


class QueryRecord(ChainRecord):
    """A query that was made from the corpus row ``df_id``. ``prompt``: name and version of the instruction."""

    query: str = Field(min_length=1)
    df_id: Id
    query_type: str | None = Field(None, validation_alias=TYPE_NAMES)
    query_id: Id | None = None
    prompt: str | None = None


class RetrievedKey(ChainRecord):
    """One retrieved key: ``similarity`` of an embedding stage, ``relevance`` of a reward model."""

    key_id: Id
    key: str
    similarity: Finite | None = None
    relevance: Finite | None = None

    @property
    def score(self) -> float | None:
        """The reward where there is one, else the similarity."""
        return self.similarity if self.relevance is None else self.relevance


class RelevanceRecord(ChainRecord):
    """What retrieval found for a query, best first. ``correct_id``: the key that is known to serve it."""

    query: str
    query_id: Id
    df_id: Id | None = None
    query_type: str | None = Field(None, validation_alias=TYPE_NAMES)
    correct_id: Id | None = None
    keys: list[RetrievedKey]


class SampledSet(ChainRecord):
    """Keys of one query to be judged against each other; upstream's order is [sampled key, the df_id row's key].
    ``positive_ids``: those of ``key_ids`` that are known to serve the query."""

    query: str
    query_id: Id
    keys: list[str] = Field(min_length=2)
    key_ids: list[Id]
    query_type: str | None = Field(None, validation_alias=TYPE_NAMES)
    positive_ids: list[Id] | None = None

    @model_validator(mode="after")
    def _check(self) -> SampledSet:
        return _distinct(self, self.keys, self.key_ids)


class AdvancedSet(ChainRecord):
    """One query with the keys that correspond to it, best first, and sampled negatives."""

    query: str
    query_id: Id
    correspond_keys: list[str] = Field(min_length=1)
    correspond_key_ids: list[Id]
    sampled_keys: list[str] = Field(min_length=1)
    sampled_key_ids: list[Id]
    query_type: str | None = Field(None, validation_alias=TYPE_NAMES)

    @model_validator(mode="after")
    def _check(self) -> AdvancedSet:
        keys = self.correspond_keys + self.sampled_keys
        return _distinct(self, keys, self.correspond_key_ids + self.sampled_key_ids)


def _distinct(record: Any, keys: list[str], ids: list[str]) -> Any:
    if len(keys) != len(ids):
        raise ValueError(f"{len(keys)} keys, but {len(ids)} key ids")
    if len(set(keys)) < len(keys):
        raise ValueError("the same text is there twice: chosen and rejected must differ")
    return record


class KeyLadder(ChainRecord):
    """A query made from a row, the row's text, and keys that serve the query less and less."""

    query: str = Field(min_length=1)
    correspond_key: str = Field(min_length=1)
    less_relevant_keys: list[str] = Field(min_length=1)
    df_id: Id
    query_type: str | None = Field(None, validation_alias=TYPE_NAMES)
    strategy: str | None = None
    prompt: str | None = None
    violations: int | None = None


class QueryLadder(ChainRecord):
    """Queries for one key, from the one it serves best to the one it serves least (variants 1 and 2)."""

    queries: list[str] = Field(min_length=2)
    key: str = Field(min_length=1)
    df_id: Id
    query_types: list[str] | None = Field(None, validation_alias=AliasChoices("query-types", "query_types"))
    prompt: str | None = None


class QueryChoices(ChainRecord):
    """Queries that a key serves and queries that share its words but that it does not serve (variant 3)."""

    chosen_queries: list[str] = Field(min_length=1)
    rejected_queries: list[str] = Field(min_length=1)
    key: str = Field(min_length=1)
    df_id: Id
    query_types: list[str] | None = Field(None, validation_alias=AliasChoices("query-types", "query_types"))
    prompt: str | None = None


class Candidate(ChainRecord):
    """One member of an advanced batch: raw texts, or upstream's rendered chat in ``msg``."""

    query: str | None = None
    key: str | None = None
    msg: list[ChatMessage] | None = None
    query_id: Id | None = None
    key_id: Id | None = None
    query_type: str | None = Field(None, validation_alias=TYPE_NAMES)
    key_role: str | None = None
    ds_id: Id | None = None

    @model_validator(mode="after")
    def _check(self) -> Candidate:
        if (self.query is None or self.key is None) and self.msg is None:
            raise ValueError("neither query and key nor msg is there")
        return self


class AdvancedRow(ChainRecord):
    """A batch of candidates and the known preferences in it: ``dpo_pairs`` = [chosen position, rejected position], and
    a margin in rewards for each, if known."""

    batch: list[Candidate] = Field(min_length=2)
    dpo_pairs: list[tuple[int, int]] = Field(min_length=1)
    margins: list[Finite] | None = None

    @model_validator(mode="after")
    def _check(self) -> AdvancedRow:
        for chosen, rejected in self.dpo_pairs:
            if not (0 <= chosen < len(self.batch) and 0 <= rejected < len(self.batch)) or chosen == rejected:
                raise ValueError(f"the pair {[chosen, rejected]} does not fit a batch of {len(self.batch)}")
        if self.margins is not None and len(self.margins) != len(self.dpo_pairs):
            raise ValueError(f"{len(self.margins)} margins, but {len(self.dpo_pairs)} dpo_pairs")
        return self
