"""Rendering of (query, key) pairs as token ids, in this one place for training and for every engine.

A :class:`Template` says what stands around the query and the key. A :class:`Renderer` binds it to a tokenizer and a
length. Truncation cuts the key's tail and, above half of the room, the query's tail; instruction, separators and the
suffix at which a decoder is scored always stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from rmsearch.errors import ConfigError
from rmsearch.prompts.templates import Template
from rmsearch.prompts.tokens import CHARACTERS_PER_TOKEN, TextTokens, encode, own_tokenizer, special_ends

Query = str | Mapping[str, Any] | Sequence[Mapping[str, str]]

# Some chat templates print the date of the day; a score may not depend on it.
PINNED_DATE = datetime(2024, 7, 26)
_QUERY_MARK, _KEY_MARK = "QUERYxMARKx8d1f", "KEYxMARKx8d1f"


def query_text(query: Query, where: str = "query") -> str:
    """The query as text; chat messages become ``role: content`` lines; anything else is a ConfigError at ``where``."""
    if isinstance(query, str):
        return query
    messages: Any = query
    if isinstance(query, Mapping):
        messages = query.get("message", query.get("messages"))
    try:
        return "\n".join(f"{message['role']}: {_content(message['content'])}" for message in messages)
    except (TypeError, KeyError):
        raise ConfigError(
            f"a query is a string or a list of chat messages, not {_brief(query)}",
            where=where,
            remedy='Give text, or {"message": [{"role": "user", "content": "…"}]}',
        ) from None


def _content(content: object) -> str:
    if not isinstance(content, str):
        raise TypeError
    return content


def key_text(key: object, where: str = "key") -> str:
    """The key itself; ConfigError names ``where`` when it is no string."""
    if isinstance(key, str):
        return key
    raise ConfigError(f"a key is a string, not {_brief(key)}", where=where, remedy="Drop the row or give it text")


def _brief(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


@dataclass(frozen=True, slots=True)
class Rendered:
    """One model input. ids: int[n]; token_types: int[n], None for all zero; truncated: whether a text was cut."""

    ids: list[int]
    token_types: list[int] | None = None
    truncated: bool = False


@dataclass(frozen=True)
class Frame:
    """Token ids (and token types) of what stands before, between and after the two texts."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: tuple[int, int, int, int, int] | None = None  # before, first text, between, second text, after

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


class Renderer:
    """Turns pairs into token ids with one template, for one tokenizer, within ``max_length`` tokens."""

    def __init__(self, tokenizer: Any, spec: Template, max_length: int) -> None:
        self.template, self.max_length, self.tokenizer = spec, max_length, tokenizer
        self._strings = ("", "", "") if spec.kind == "encoder" else _surroundings(tokenizer, spec)
        self._frame = _encoder_frame(tokenizer, spec) if spec.kind == "encoder" else self._text_frame()
        self.room = max_length - self._frame.size
        if self.room < 2:
            raise ConfigError(
                f"max_length {max_length} leaves no room: the template {spec.name!r} takes {self._frame.size} tokens",
                remedy="Raise max_length or take a shorter template",
            )
        self.texts = TextTokens(tokenizer, self.room, plain=spec.tokenization == "split")
        self._whole = own_tokenizer(tokenizer) if spec.tokenization == "joint" else None

    def _text_frame(self) -> Frame:
        tokens = own_tokenizer(self.tokenizer)
        first, last = special_ends(self.tokenizer) if self._adds_special else ([], [])
        before, between, after = (each.ids for each in encode(tokens, list(self._strings), special=False))
        return Frame(first + before, between, after + last)

    @property
    def _adds_special(self) -> bool:
        return self.template.kind == "text" and self.template.special_tokens

    def render(self, query: Query, key: str) -> Rendered:
        """The model input of one pair."""
        return self.render_many([query], [key], [(0, 0)])[0]

    def render_many(
        self, queries: Sequence[Query], keys: Sequence[str], pairs: Iterable[tuple[int, int]]
    ) -> list[Rendered]:
        """Model inputs of ``pairs``, each (position in queries, position in keys)."""
        texts = [query_text(query, f"queries[{i}]") for i, query in enumerate(queries)]
        return self.prepare(texts, [key_text(key, f"keys[{i}]") for i, key in enumerate(keys)]).render(list(pairs))

    def prepare(self, queries: Sequence[str], keys: Sequence[str]) -> Prepared:
        """Tokenises the texts of a set of pairs once."""
        return Prepared(self, queries, keys, self.texts(queries), self.texts(keys))

    def shares(self, query: int, key: int) -> tuple[int, int]:
        """Tokens kept of a query and a key that have ``query`` and ``key`` tokens."""
        query_kept = min(query, self.room // 2)
        return query_kept, min(key, self.room - query_kept)

    def join(self, query: Sequence[int], key: Sequence[int]) -> Rendered:
        """The model input from the token ids of a query and a key (split tokenization)."""
        query_kept, key_kept = self.shares(len(query), len(key))
        truncated = query_kept < len(query) or key_kept < len(key)
        if truncated:
            query, key = query[:query_kept], key[:key_kept]
        first, second = (query, key) if self.template.order == "query_first" else (key, query)
        frame = self._frame
        ids = [*frame.before, *first, *frame.between, *second, *frame.after]
        if frame.types is None:
            return Rendered(ids, None, truncated)
        sizes = (len(frame.before), len(first), len(frame.between), len(second), len(frame.after))
        types = [kind for kind, size in zip(frame.types, sizes, strict=True) for _ in range(size)]
        return Rendered(ids, types, truncated)

    def render_joint(self, pairs: list[tuple[str, str]]) -> list[Rendered]:
        """Model inputs of (query, key) texts, each tokenised as one text (joint tokenization)."""
        most = self.max_length * CHARACTERS_PER_TOKEN
        cut = [(query[:most], key[:most]) for query, key in pairs]
        before, between, after = self._strings
        flip = self.template.order == "key_first"
        ordered = [(key, query) if flip else (query, key) for query, key in cut]
        texts = [f"{before}{first}{between}{second}{after}" for first, second in ordered]
        encodings = encode(self._whole, texts, special=self._adds_special, offsets=True)
        rendered = []
        for encoding, (first, second) in zip(encodings, ordered, strict=True):
            start = len(before) + len(first) + len(between)
            spans = ((len(before), len(before) + len(first)), (start, start + len(second)))
            rendered.append(self._fit(encoding, *(spans[::-1] if flip else spans)))
        return rendered

    def _fit(self, encoding: Any, query: tuple[int, int], key: tuple[int, int]) -> Rendered:
        """Cuts whole tokens from the tails of the key and the query (character spans) until the rest fits."""
        ids: list[int] = encoding.ids
        if len(ids) <= self.max_length:
            return Rendered(ids)
        inside = [_tokens_within(encoding.offsets, span) for span in (query, key)]
        room = self.max_length - (len(ids) - len(inside[0]) - len(inside[1]))
        query_kept = min(len(inside[0]), max(room // 2, 0))
        key_kept = max(min(len(inside[1]), room - query_kept), 0)
        dropped = {*inside[0][query_kept:], *inside[1][key_kept:]}
        return Rendered([each for i, each in enumerate(ids) if i not in dropped], None, True)


class Prepared:
    """A set of queries and keys with their tokens; renders any pairs of them."""

    def __init__(
        self,
        renderer: Renderer,
        queries: Sequence[str],
        keys: Sequence[str],
        query_ids: Sequence[Sequence[int]],
        key_ids: Sequence[Sequence[int]],
    ) -> None:
        self._renderer, self._queries, self._keys = renderer, queries, keys
        self._query_ids, self._key_ids = query_ids, key_ids

    def lengths(self, pairs: np.ndarray) -> np.ndarray:
        """Tokens of each pair (int64[n]) for pairs int[n, 2]; exact when split, within a few tokens when joint."""
        room = self._renderer.room
        query = np.fromiter(map(len, self._query_ids), np.int64, len(self._query_ids))[pairs[:, 0]]
        key = np.fromiter(map(len, self._key_ids), np.int64, len(self._key_ids))[pairs[:, 1]]
        query = np.minimum(query, room // 2)
        return self._renderer.max_length - room + query + np.minimum(key, room - query)

    def render(self, pairs: Sequence[tuple[int, int]]) -> list[Rendered]:
        """Model inputs of ``pairs``, each (position in queries, position in keys)."""
        if self._renderer.template.tokenization == "joint":
            return self._renderer.render_joint([(self._queries[q], self._keys[k]) for q, k in pairs])
        return [self._renderer.join(self._query_ids[q], self._key_ids[k]) for q, k in pairs]

    def cut(self, query: int, key: int) -> tuple[str, str, bool]:
        """The texts of a pair as far as their tokens fit, and whether that is less than all of them."""
        sizes = len(self._query_ids[query]), len(self._key_ids[key])
        kept = self._renderer.shares(*sizes)
        texts = self._queries[query], self._keys[key]
        shown = [
            text if room == size else self._renderer.texts.cut(text, room)
            for text, size, room in zip(texts, sizes, kept, strict=True)
        ]
        return shown[0], shown[1], kept != sizes


def _tokens_within(offsets: list[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Positions of the tokens that lie wholly inside a span of characters."""
    return [i for i, (start, end) in enumerate(offsets) if span[0] <= start < end <= span[1]]


def _encoder_frame(tokenizer: Any, spec: Template) -> Frame:
    """The special tokens that the tokenizer puts around a pair, such as [CLS] a [SEP] b [SEP]; token types."""
    encoding = tokenizer("a", "a")
    sequence = encoding.sequence_ids(0)
    first = [i for i, each in enumerate(sequence) if each == 0]
    second = [i for i, each in enumerate(sequence) if each == 1]
    ids = encoding["input_ids"]
    frame = Frame(ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :])
    types = encoding.get("token_type_ids")
    if spec.token_types == "zero" or types is None:
        return frame
    after = types[-1] if frame.after else 0
    before = types[0] if frame.before else 0
    between = types[first[-1] + 1]
    return Frame(frame.before, frame.between, frame.after, (before, types[first[0]], between, types[second[0]], after))


def _surroundings(tokenizer: Any, spec: Template) -> tuple[str, str, str]:
    """The text before, between and after the two texts of a text or chat template."""
    text = spec.text if spec.kind == "text" else _chat_text(tokenizer, spec)
    if spec.kind == "text":
        text = _fill(text, spec)
    marks = (_QUERY_MARK, _KEY_MARK) if spec.order == "query_first" else (_KEY_MARK, _QUERY_MARK)
    if any(text.count(mark) != 1 for mark in marks) or text.index(marks[0]) > text.index(marks[1]):
        raise ConfigError(
            f"this model's chat template does not show query and key of the template {spec.name!r} once, in order",
            remedy="Take a template of kind text, such as 'plain'",
        )
    before, rest = text.split(marks[0])
    between, after = rest.split(marks[1])
    return before, between, after


def _fill(text: str, spec: Template) -> str:
    return text.replace("{query}", _QUERY_MARK).replace("{key}", _KEY_MARK).replace("{instruction}", spec.instruction)


def _chat_text(tokenizer: Any, spec: Template) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the template {spec.name!r} needs a chat template, which this tokenizer lacks",
            remedy="Take a template of kind text, such as 'plain'",
        )
    messages = [{"role": each.role, "content": _fill(each.content, spec)} for each in spec.messages]
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=False,
            date_string=PINNED_DATE.strftime("%d %b %Y"),
            strftime_now=PINNED_DATE.strftime,
        )
    except Exception as error:  # chat templates are programs of the model's author and raise anything
        raise ConfigError(
            f"this model's chat template refuses the template {spec.name!r}: {error}",
            remedy="Take a template of kind text, such as 'plain'",
        ) from error
