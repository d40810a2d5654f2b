"""The answer that make_query_recs asks for: its schema, and how queries are read out of what a model writes.

A schema holds a model to the form, not to sense: lists come with repetitions, empty strings, numbering and apologies
in them, and servers that take no schema send any form at all. What can be read for certain is read, the rest refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rmsearch.datasets.chain import IRRELEVANT, QUERY_TYPES
from rmsearch.engines.generation import Generation
from rmsearch.llm.asking import json_value

LONGEST = {"titles": 160, "keywords": 80, "questions": 300, "irr_questions": 300}
_Title = Annotated[str, Field(min_length=1, max_length=LONGEST["titles"])]
_Keyword = Annotated[str, Field(min_length=1, max_length=LONGEST["keywords"])]
_Question = Annotated[str, Field(min_length=1, max_length=LONGEST["questions"])]

_NUMBER = re.compile(r"\s*(\d{1,2})[.):]\s+")
_CANNOT = r"i (can(no|['’])t|am (unable|not able))"
_REFUSAL = re.compile(
    r"(i['’]?m|i am|we are) (very )?sorry,? but\b"
    rf"|(sorry|unfortunately),? (but )?{_CANNOT}\b"
    rf"|{_CANNOT} (to )?(assist|comply|(help|provide|create|generate|write) (with|you|any|that|this|queries|questions))"
    r"|as an ai( language)? model,"
    r"|申し訳(あり|ござい)ませんが|很?抱歉，我",
    re.IGNORECASE,
)


class QueryAnswer(BaseModel):
    """The form of an answer; how many of each, and how long they may be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    titles: list[_Title] = Field(min_length=2, max_length=3)
    keywords: list[_Keyword] = Field(min_length=3, max_length=5)
    questions: list[_Question] = Field(min_length=3, max_length=6)
    irr_questions: list[_Question] = Field(min_length=2, max_length=3)


class _Lists(BaseModel):
    """What is taken from a server that takes no schema: the lists, whatever is in them."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    titles: list[str]
    keywords: list[str]
    questions: list[str]
    irr_questions: list[str]


@dataclass(frozen=True)
class Queries:
    """Queries by type, in the model's order, and what was left out and why."""

    by_type: dict[str, list[str]]
    dropped: Counter[str]


@cache
def answer_schema() -> dict[str, Any]:
    """The JSON schema of an answer."""
    return QueryAnswer.model_json_schema()


def counts() -> dict[str, str]:
    """How many queries of each type to ask for, in words for the prompt."""
    limits = {name: answer_schema()["properties"][name] for name in QUERY_TYPES}
    return {name: f"{limit['minItems']} to {limit['maxItems']}" for name, limit in limits.items()}


def read_queries(generation: Generation) -> Queries:
    """The queries of an answer. Empty ones, repetitions, apologies, and what is too long or too much are dropped.

    Raises ValueError, one line, for an answer of another form, and for one without any query that the row serves.
    """
    value = json_value(generation)
    if not isinstance(value, dict):
        raise ValueError(f"the answer is a JSON {_kind(value)}, not an object")
    try:
        lists = _Lists.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    by_type: dict[str, list[str]] = {}
    for name in QUERY_TYPES:  # a question that is both answered and not stays where it comes first
        kept = by_type[name] = []
        most = answer_schema()["properties"][name]["maxItems"]
        for text in unnumbered(getattr(lists, name)):
            reason = _fault(text, LONGEST[name], seen) or ("surplus" if len(kept) == most else None)
            if reason:
                dropped[reason] += 1
                continue
            seen.add(folded(text))
            kept.append(text)
    if not any(by_type[name] for name in QUERY_TYPES if name != IRRELEVANT):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise ValueError("the answer has no usable query" + (f" ({reasons})" if reasons else ""))
    return Queries(by_type, dropped)


def unnumbered(texts: list[str]) -> list[str]:
    """The texts on one line each, without the numbers of a list where they count from 1."""
    plain = [" ".join(text.split()) for text in texts]
    numbers = [_NUMBER.match(text) for text in plain]
    if plain and all(match and int(match[1]) == i for i, match in enumerate(numbers, 1)):
        return [text[match.end() :] for text, match in zip(plain, numbers, strict=True) if match]
    return plain


def folded(text: str) -> str:
    """What makes two queries the same: case, width, spaces and marks at the end do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip("?!.…。:;,、 ")


def _fault(text: str, longest: int, seen: set[str]) -> str | None:
    if not any(character.isalnum() for character in text) or folded(text) == "n/a":
        return "empty"
    if _REFUSAL.match(text):
        return "refusal"
    if len(text) > longest:
        return "too_long"
    return "duplicate" if folded(text) in seen else None


def _kind(value: Any) -> str:
    kinds = {list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return kinds.get(type(value), "null")
