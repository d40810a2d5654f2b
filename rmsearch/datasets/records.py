"""The records that stages hand to each other, as pydantic models; `rmsearch.storage.records.read_models` checks a file.

Records carry raw text and the data's own ids (text; whole numbers in a file become text), never rendered prompts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _id(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Id = Annotated[str, BeforeValidator(_id)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """Base of all records: frozen, unknown fields are left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class PreferencePair(Record):
    """For ``query``, ``chosen_key`` served better than ``rejected_key``, by ``margin`` (in rewards) if known."""

    query: str
    chosen_key: str
    rejected_key: str
    query_id: Id | None = None
    chosen_key_id: Id | None = None
    rejected_key_id: Id | None = None
    margin: Annotated[Finite, Field(ge=0)] | None = None
    query_type: str | None = None
    source: str | None = None  # what decided: judge, model or labels

    @model_validator(mode="after")
    def _differ(self) -> PreferencePair:
        if self.chosen_key == self.rejected_key:
            raise ValueError("chosen_key and rejected_key are the same text")
        return self


class ChatMessage(Record):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class MessagePair(Record):
    """Upstream's form of a preference: two chats, each with query and key already in it."""

    chosen_msg: list[ChatMessage] = Field(min_length=1)
    rejected_msg: list[ChatMessage] = Field(min_length=1)
    query_id: Id | None = None
    chosen_sentence_id: Id | None = None
    rejected_sentence_id: Id | None = None
    margin: Annotated[Finite, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _differ(self) -> MessagePair:
        if self.chosen_msg == self.rejected_msg:
            raise ValueError("chosen_msg and rejected_msg are the same")
        return self


class Candidates(Record):
    """What a first stage found for a query, best first; the line of ``embed --output`` and ``bm25 --output``."""

    query_id: Id
    key_ids: list[Id]
    embed_relevances: list[Finite]
    positive_key_ids: list[Id] = []

    @model_validator(mode="after")
    def _aligned(self) -> Candidates:
        if len(self.key_ids) != len(self.embed_relevances):
            raise ValueError(f"{len(self.key_ids)} key_ids, but {len(self.embed_relevances)} embed_relevances")
        if len(set(self.key_ids)) != len(self.key_ids):
            raise ValueError("a key id comes twice in key_ids")
        return self


class Reranked(Record):
    """The line of ``rerank --output``: ``key_ids`` and ``rerank_relevances`` belong together, best first, and so do
    ``pre_key_ids`` and ``embed_relevances``, in the first stage's order."""

    query_id: Id
    pre_key_ids: list[Id]
    key_ids: list[Id]
    embed_relevances: list[Finite]
    rerank_relevances: list[Finite]
    positive_key_ids: list[Id] = []

    @model_validator(mode="after")
    def _aligned(self) -> Reranked:
        if len(self.key_ids) != len(self.rerank_relevances):
            raise ValueError(f"{len(self.key_ids)} key_ids, but {len(self.rerank_relevances)} rerank_relevances")
        return self
