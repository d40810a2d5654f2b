"""The language of short texts, by py3langid: offline, a model of 4.6 MB, naive Bayes over sequences of bytes.

Queries are short, so the answer is often open; a language counts only when it is likelier than all others together.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from functools import cache
from typing import Any

from rmsearch.errors import ConfigError, MissingExtraError

SURE = 0.5
LOOKED_AT = 500  # characters of a text
HAN_ONLY = 6  # a text with so few Han characters and no kana may be Japanese as well as Chinese
_HAN, _KANA = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"), re.compile(r"[\u3040-\u30ff]")
_NO_LANGUAGE = "zxx"  # numbers, markup, identifiers


@cache
def _identifier() -> Any:
    """py3langid's model, read once."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtraError("py3langid", "train") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Languages:
    """Guesses among the languages that have a code of two letters (ISO 639-1) and those of ``more`` with a longer one.

    Raises MissingExtraError without py3langid, ConfigError for a code that it does not know.
    """

    def __init__(self, more: Collection[str] = ()) -> None:
        self._identifier = copy.copy(_identifier())
        known = set(self._identifier.labels)
        if unknown := sorted(set(more) - known | set(more) & {_NO_LANGUAGE}):
            remedy = f"Known: {', '.join(sorted(known - {_NO_LANGUAGE}))}"
            raise ConfigError(f"the language {unknown[0]!r} is not known", remedy=remedy)
        # Dialects have codes of three letters and take short texts from their large neighbours: only when asked for.
        self._identifier.set_languages({code for code in known if len(code) == 2} | {_NO_LANGUAGE, *more})

    def possible(self, text: str) -> frozenset[str]:
        """Codes of the languages that the text may be in; empty when that is open."""
        text = text[:LOOKED_AT]
        code, probability = self._identifier.classify(text)
        if probability < SURE or code == _NO_LANGUAGE:
            return frozenset()
        if code in ("ja", "zh") and not _KANA.search(text) and len(_HAN.findall(text)) <= HAN_ONLY:
            return frozenset(("ja", "zh"))
        return frozenset((str(code),))

    def of(self, text: str) -> str | None:
        """The code of the text's language; None when that is open."""
        codes = self.possible(text)
        return next(iter(codes)) if len(codes) == 1 else None

    def may_be(self, text: str, languages: Collection[str]) -> bool:
        """False when the text is surely in a language that is none of these."""
        codes = self.possible(text)
        return not codes or not codes.isdisjoint(languages)


@cache
def two_letter_languages() -> Languages:
    """The languages of ISO 639-1, loaded once."""
    return Languages()


def language(text: str) -> str | None:
    """The ISO 639-1 code of the text's language; None when that is open. Raises MissingExtraError without py3langid."""
    return two_letter_languages().of(text)
