"""Preference pairs as token ids: read in either form, rendered once per distinct (query, key), kept compact.

A set of pairs is a table of distinct model inputs and, per pair, two positions in it; a batch then forwards each
distinct input once however many pairs it is in (a positive with three negatives costs four rows, not six).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from rmsearch.datasets.records import Message, MessagePair, read_preferences
from rmsearch.errors import RecordError
from rmsearch.prompts.templates import TEMPLATES

if TYPE_CHECKING:
    from rmsearch.prompts.renderer import Renderer

T = TypeVar("T")
Reject = Callable[[Any, str], None]
_BATCH = 2048


class Pair(NamedTuple):
    """One preference as texts. ``template`` names upstream's prompt when the file held rendered chats."""

    query: str
    chosen: str
    rejected: str
    margin: float | None = None
    template: str | None = None


@dataclass
class Encoded:
    """Pairs over a table of model inputs.

    inputs: int32[length] each, distinct; chosen, rejected: int64[n], positions in ``inputs``; margin: float32[n], 0
    when unknown; group: int64[n], equal for pairs of one query and one chosen key; counts: what was read, cut and
    refused; queries: digests of the distinct queries; start: int64[rows + 1], when pairs come in rows that go into a
    batch whole: those of row i are start[i] to start[i + 1].
    """

    inputs: list[np.ndarray] = field(repr=False)
    chosen: np.ndarray = field(repr=False)
    rejected: np.ndarray = field(repr=False)
    margin: np.ndarray = field(repr=False)
    group: np.ndarray = field(repr=False)
    counts: dict[str, int]
    queries: set[bytes] = field(repr=False, default_factory=set)
    start: np.ndarray | None = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def starts(self) -> np.ndarray:
        """Where the pairs of each row start, and their end; without rows each pair is its own."""
        return np.arange(len(self) + 1) if self.start is None else self.start

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each input, int64[len(inputs)]."""
        return np.fromiter(map(len, self.inputs), np.int64, len(self.inputs))

    def sample(self, size: int, seed: int) -> Encoded:
        """At most ``size`` of the pairs (0: all), the same ones for the same seed."""
        if not size or len(self) <= size:
            return self
        keep = np.sort(np.random.default_rng(seed).choice(len(self), size, replace=False))
        return replace(
            self,
            chosen=self.chosen[keep],
            rejected=self.rejected[keep],
            margin=self.margin[keep],
            group=self.group[keep],
            counts=self.counts | {"pairs": size},
            start=None,
        )


class Table:
    """Model inputs of (query, key) texts, each distinct pair of texts rendered once."""

    def __init__(self, renderer: Renderer) -> None:
        self.inputs: list[np.ndarray] = []
        self.truncated = 0
        self._renderer = renderer
        self._known: dict[bytes, int] = {}  # digests, so that the texts need not stay in memory

    def add(self, texts: Sequence[tuple[str, str]]) -> list[int]:
        """Positions of the inputs of (query, key) texts."""
        digests = [text_digest(*each) for each in texts]
        fresh = {d: each for d, each in zip(digests, texts, strict=True) if d not in self._known}
        queries = {query: i for i, query in enumerate(dict.fromkeys(query for query, _ in fresh.values()))}
        keys = {key: i for i, key in enumerate(dict.fromkeys(key for _, key in fresh.values()))}
        places = [(queries[query], keys[key]) for query, key in fresh.values()]
        for digest, rendered in zip(fresh, self._renderer.render_many(list(queries), list(keys), places), strict=True):
            self._known[digest] = len(self.inputs)
            self.inputs.append(np.asarray(rendered.ids, np.int32))
            self.truncated += rendered.truncated
        return [self._known[digest] for digest in digests]


def text_digest(query: str, key: str) -> bytes:
    """What a (query, key) pair of texts is remembered by."""
    state = blake2b(query.encode("utf-8", "surrogatepass"), digest_size=16)
    state.update(b"\0\xff\0" + key.encode("utf-8", "surrogatepass"))
    return state.digest()


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def read_pairs(uri: str) -> Iterator[Pair]:
    """The pairs of a file, raw (``query``, ``chosen_key``, ``rejected_key``) or upstream's ``chosen_msg`` form.

    Upstream's rendered prompts are taken apart again into query and key, so that one template serves training and
    search. Raises InputMissingError, ConfigError and RecordError ``file:row`` (malformed, chosen equal to rejected).
    """
    row = -1
    for row, record in enumerate(read_preferences(uri)):
        if isinstance(record, MessagePair):
            yield _from_messages(record, f"{uri}:{row}")
        else:
            yield Pair(record.query, record.chosen_key, record.rejected_key, record.margin)
    if row < 0:
        raise RecordError("holds no pairs", where=uri, remedy="Make some with `rmsearch train mine`")


def _from_messages(record: MessagePair, where: str) -> Pair:
    chosen, rejected = take_apart(record.chosen_msg), take_apart(record.rejected_msg)
    if chosen is None or rejected is None:
        raise RecordError(
            "the chat is in no known prompt, so query and key cannot be told apart",
            where=where,
            remedy="Give raw records: query, chosen_key, rejected_key",
        )
    if chosen[0] != rejected[0] or chosen[1] != rejected[1]:
        raise RecordError("chosen_msg and rejected_msg do not share one query and one prompt", where=where)
    return Pair(chosen[1], chosen[2], rejected[2], record.margin, chosen[0])


def take_apart(messages: Sequence[Message]) -> tuple[str | None, str, str] | None:
    """(upstream template's name, query, key) of a rendered chat; a last answer of another chat counts as the key."""
    roles = tuple(each.role for each in messages)
    for name, expected, patterns in _upstream_patterns():
        if roles != expected:
            continue
        found: dict[str, str] = {}
        matches = [pattern.fullmatch(message.content) for pattern, message in zip(patterns, messages, strict=True)]
        if all(matches):
            for match in matches:
                found |= match.groupdict() if match else {}
            return name, found["query"], found["key"]
    if len(messages) > 1 and roles[-1] == "assistant":
        *before, answer = messages
        text = before[0].content if len(before) == 1 else "\n".join(f"{m.role}: {m.content}" for m in before)
        return None, text, answer.content
    return None


@cache
def _upstream_patterns() -> tuple[tuple[str, tuple[str, ...], tuple[re.Pattern[str], ...]], ...]:
    found = []
    for name, spec in TEMPLATES.items():
        if name.startswith("upstream_"):
            patterns = []
            for message in spec.messages:
                text = re.escape(message.content)
                for field_name in ("query", "key"):
                    text = text.replace(re.escape(f"{{{field_name}}}"), f"(?P<{field_name}>.*?)")
                patterns.append(re.compile(text, re.DOTALL))
            found.append((name, tuple(m.role for m in spec.messages), tuple(patterns)))
    return tuple(found)


def peek_template(uris: Sequence[str], rows: int = 100) -> str | None:
    """The upstream prompt that the first ``rows`` records were rendered with; None for raw or mixed files."""
    names = {pair.template for uri in uris for pair in islice(read_pairs(uri), rows)}
    return names.pop() if len(names) == 1 else None


def encode_pairs(pairs: Iterable[Pair], renderer: Renderer, reject: Reject | None = None) -> Encoded:
    """Renders pairs. Pairs whose two inputs are the same tokens (the texts differ only past the cut) are given to
    ``reject`` and left out: they teach nothing."""
    table, groups, queries = Table(renderer), dict[int, int](), set[bytes]()
    chosen, rejected, margins, group = [], [], [], []
    read = same = with_margin = 0
    for batch in batches(pairs, _BATCH):
        read += len(batch)
        left = table.add([(pair.query, pair.chosen) for pair in batch])
        right = table.add([(pair.query, pair.rejected) for pair in batch])
        for pair, a, b in zip(batch, left, right, strict=True):
            if np.array_equal(table.inputs[a], table.inputs[b]):
                same += 1
                if reject is not None:
                    reject(pair._asdict(), "chosen and rejected are the same tokens")
                continue
            chosen.append(a)
            rejected.append(b)
            margins.append(pair.margin or 0.0)
            with_margin += pair.margin is not None
            group.append(groups.setdefault(a, len(groups)))
            queries.add(text_digest(pair.query, ""))
    counts = {"pairs": len(chosen), "queries": len(queries), "inputs": len(table.inputs)}
    counts |= {"truncated": table.truncated, "same_tokens": same, "with_margin": with_margin, "read": read}
    return Encoded(
        table.inputs,
        np.asarray(chosen, np.int64),
        np.asarray(rejected, np.int64),
        np.asarray(margins, np.float32),
        np.asarray(group, np.int64),
        counts,
        queries,
    )
