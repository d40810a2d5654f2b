"""The arguments of a search: checked, and brought into one form."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rmsearch.errors import ConfigError
from rmsearch.prompts.renderer import key_text, query_text


class InputError(ConfigError, ValueError):
    """An argument of a search that cannot be used; also a ValueError, which callers of older versions catch."""


def whole_number(value: Any, name: str) -> int:
    """``value`` as an int >= 1; InputError names the argument otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}", remedy="Give a whole number from 1") from None
    if number < 1:
        raise InputError(f"{name} is {number}", remedy="Give a whole number from 1")
    return number


def items_of(values: Any, name: str) -> list[Any]:
    """The argument as a list. A single string or a mapping would be taken apart letter by letter, so it is refused."""
    if not isinstance(values, str | bytes | Mapping):
        try:
            return list(values)
        except TypeError:
            pass
    kind = "missing" if values is None else f"one {type(values).__name__}, not a list"
    raise InputError(f"{name} is {kind}", remedy=f"Give a list: {name}=[…]")


def query_texts(queries: Any, name: str = "queries") -> list[str]:
    """Each query as text; chat messages (lists of dicts, ``{"message": […]}``, objects with ``.message``) flattened.

    InputError names the position of one that is neither.
    """
    texts = items_of(queries, name)
    for i, query in enumerate(texts):
        if not isinstance(query, str):
            with input_errors():
                texts[i] = query_text(_plain_query(query), f"{name}[{i}]")
    return texts


@contextmanager
def input_errors() -> Iterator[None]:
    """Turn a ConfigError about an argument into an InputError."""
    try:
        yield
    except ConfigError as error:
        raise InputError(error.problem, where=error.where, remedy=error.remedy) from None


def _plain_query(query: Any) -> Any:
    """Pydantic objects and the like as plain dicts."""
    if not isinstance(query, Mapping | list | tuple):
        query = {"message": getattr(query, "message", None)}
    messages = query.get("message", query.get("messages")) if isinstance(query, Mapping) else query
    if not isinstance(messages, list | tuple):
        return query
    names = ("role", "content")
    return [m if isinstance(m, Mapping) else {name: getattr(m, name, None) for name in names} for m in messages]


def key_texts(keys: Any, name: str = "keys") -> list[str]:
    """The keys as a list; InputError when there is none, or names the position of one that is no string."""
    texts = items_of(keys, name)
    for i, key in enumerate(texts):
        if not isinstance(key, str):
            with input_errors():
                key_text(key, f"{name}[{i}]")
    if not texts:
        raise InputError(f"{name} is empty", remedy="Give at least one key to rank")
    return texts


def prompt_text(prompt: Callable[..., Any], *arguments: Any) -> str:
    """What the user's ``llm_template`` makes of its arguments; InputError when that is no string."""
    text = prompt(*arguments)
    if not isinstance(text, str):
        raise InputError(
            f"llm_template returned {type(text).__name__}, not a string",
            remedy="Return the text that the model reads, without its first special token",
        )
    return text


def optional_number(value: Any, name: str) -> int | None:
    return None if value is None else whole_number(value, name)


def template_choice(
    template: str | None, llm_template: str | Callable[..., str] | None
) -> tuple[str | None, Callable[..., str] | None]:
    """(template name, prompt function), at most one of them."""
    if llm_template is None:
        return template, None
    if template is not None and template != llm_template:
        raise InputError("template and llm_template differ", remedy="Give one of them")
    if isinstance(llm_template, str):
        return llm_template, None
    if not callable(llm_template):
        raise InputError(
            f"llm_template is a {type(llm_template).__name__}", remedy="Give a template's name or a function"
        )
    return None, llm_template


def takes_row(prompt: Callable[..., str]) -> bool:
    """True for ``(row) -> str``, False for ``(query, key) -> str``."""
    try:
        signature = inspect.signature(prompt)
    except ValueError:  # some functions written in C do not tell
        return False
    for arguments, by_row in (((None, None), False), ((None,), True)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return by_row
    raise InputError("llm_template takes neither (query, key) nor (row)", remedy="Give it one or two parameters")


def candidate_pairs(candidates: Sequence[Sequence[int]], queries: int, keys: int) -> np.ndarray:
    """int64[n, 2] (query_id, key_id), each once; InputError for ids that are not there."""
    rows = items_of(candidates, "candidates")
    if len(rows) != queries:
        raise InputError(f"candidates has {len(rows)} lists for {queries} queries", remedy="Give one list per query")
    parts = []
    for i, row in enumerate(rows):
        ids = np.asarray(items_of(row, f"candidates[{i}]"))
        if ids.size and (ids.dtype.kind not in "iu" or ids.ndim != 1 or ids.min() < 0 or ids.max() >= keys):
            raise InputError(
                "holds something that is no key_id",
                where=f"candidates[{i}]",
                remedy=f"Give numbers from 0 to {keys - 1}",
            )
        unique = np.unique(ids.astype(np.int64))
        parts.append(np.stack([np.full(len(unique), i, np.int64), unique], axis=1))
    return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)


def frame_rows(df: Any, texts: tuple[str, ...], more: tuple[str, ...]) -> list[dict[str, Any]]:
    """The frame's rows as dicts; InputError for a missing, double or taken column."""
    if not hasattr(df, "columns") or not hasattr(df, "iterrows"):
        raise InputError(f"df is a {type(df).__name__}", remedy="Give a pandas DataFrame")
    columns = list(df.columns)
    if missing := [name for name in (*texts, *more) if name not in columns]:
        raise InputError(
            f"df has no column {', '.join(missing)}", remedy=f"Its columns are {', '.join(map(str, columns))}"
        )
    if "relevance" in columns:
        raise InputError("df already has a column relevance", remedy="Drop it: df.drop(columns='relevance')")
    if len(set(columns)) < len(columns):
        raise InputError("df has two columns of the same name", remedy="Rename one of them")
    return df.to_dict("records")


def group_limits(rows: list[dict[str, Any]]) -> dict[Any, int]:
    """{group: k}, in order of appearance; k is that of the group's first row."""
    limits: dict[Any, int] = {}
    for i, row in enumerate(rows):
        group, k = row["group"], row["k"]
        if group is None or group != group:  # NaN
            raise InputError("the group is missing", where=f"df['group'][{i}]", remedy="Drop the row or name its group")
        if group not in limits:
            whole = int(k) if isinstance(k, float) and k.is_integer() else k  # a column with a gap holds floats
            limits[group] = whole_number(whole, f"df['k'][{i}]")
    return limits
