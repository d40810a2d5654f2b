"""Token ids of single texts: a private copy of a model's fast tokenizer, and a bounded cache in front of it."""

from __future__ import annotations

import copy
import threading
from array import array
from collections.abc import Sequence
from typing import Any

from rmsearch.errors import ConfigError, ModelError

# Far above any real tokenizer's characters per token: a 100 MB key costs no more than the part that can be used.
CHARACTERS_PER_TOKEN = 64
CACHED_TOKENS = 8_000_000  # 4 bytes each
_TEXTS_AT_ONCE = 256  # an encoding takes far more memory than its ids
_ENTRY_COST = 64  # an entry costs about as much memory as 64 ids even when its text is short


class TextTokens:
    """Token ids of single texts without special tokens, cached. Safe to call from several threads.

    limit: ids kept of one text; a text with more is kept with ``limit + 1`` ids, so that its length still tells.
    """

    def __init__(self, tokenizer: Any, limit: int, *, plain: bool, cached_tokens: int = CACHED_TOKENS) -> None:
        self._tokens = own_tokenizer(tokenizer)
        self._tokens.encode_special_tokens = plain
        self._limit, self._room = limit, cached_tokens
        self._cache: dict[str, array[int]] = {}
        self._cached = 0
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> list[array[int]]:
        """ids of each text, in order."""
        with self._lock:
            cache = self._cache
            fresh = list(dict.fromkeys(text for text in texts if text not in cache))
            if not fresh:
                return [cache[text] for text in texts]
            encoded = dict(zip(fresh, self._encode(fresh), strict=True))
            ids = [encoded[text] if text in encoded else cache[text] for text in texts]
            self._remember(encoded)
            return ids

    def _encode(self, texts: list[str]) -> list[array[int]]:
        most = self._limit + 1
        encoded: list[array[int]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            cut = [text[: most * CHARACTERS_PER_TOKEN] for text in texts[start : start + _TEXTS_AT_ONCE]]
            encoded += [array("i", encoding.ids[:most]) for encoding in encode(self._tokens, cut, special=False)]
        return encoded

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text that makes up its first ``tokens`` tokens."""
        if tokens == 0:
            return ""
        with self._lock:
            (encoding,) = encode(
                self._tokens, [text[: (tokens + 1) * CHARACTERS_PER_TOKEN]], special=False, offsets=True
            )
        offsets = encoding.offsets
        return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]

    def _remember(self, encoded: dict[str, array[int]]) -> None:
        for text, ids in encoded.items():
            self._cache[text] = ids
            self._cached += len(ids) + _ENTRY_COST
        while self._cached > self._room and self._cache:
            oldest = next(iter(self._cache))
            self._cached -= len(self._cache.pop(oldest)) + _ENTRY_COST


def own_tokenizer(tokenizer: Any) -> Any:
    """A copy of the fast tokenizer behind ``tokenizer``, without padding and truncation, that nobody else changes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast tokenizer",
            remedy="Save the model with a tokenizer.json: AutoTokenizer.from_pretrained(…).save_pretrained(folder)",
        )
    mine = copy.deepcopy(backend)
    mine.no_padding()
    mine.no_truncation()
    return mine


def encode(tokens: Any, texts: list[str], *, special: bool, offsets: bool = False) -> Any:
    """Encodings of texts by the tokenizers library; a lone surrogate (no valid Unicode text) is a ConfigError."""
    call = tokens.encode_batch if offsets else tokens.encode_batch_fast
    try:
        return call(texts, add_special_tokens=special)
    except (UnicodeEncodeError, TypeError):
        for text in texts:
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ConfigError(
                    f"the text {text[:40]!r} is not valid Unicode", remedy="Decode it with errors='replace'"
                ) from None
        raise


def special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokenizer's own special tokens before and after a single text (BOS, EOS; often none)."""
    encoding = tokenizer("a")
    inside = [i for i, sequence in enumerate(encoding.sequence_ids(0)) if sequence is not None]
    ids = encoding["input_ids"]
    return ids[: inside[0]], ids[inside[-1] + 1 :]
