"""Which language a text is in, well enough to see that an answer is in another one than the text it is about."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# Frequent words that few of the other languages share.
_WORDS = {
    "Dutch": "de het een en van is dat op voor met zijn niet te wordt door ook",
    "English": "the of and to is in that for with are was this by from which it be or",
    "French": "le la les des du et est une dans que pour qui sur au aux avec sont par",
    "German": "der die das und ist von mit den dem für ein eine nicht auf zu im sich werden",
    "Italian": "il lo gli della dei di che per una con è sono nel delle alla più non si",
    "Portuguese": "o os as da do e que em para com uma não no na dos são por mais",
    "Spanish": "el los las del y que en por para con una es se como un su más la",
}
_LANGUAGES: dict[str, list[str]] = {}
for _language, _words in _WORDS.items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_language)
_FEWEST = 3  # frequent words that make a language sure
_LEAD = 1.5  # and how many times more of them than of any other


def language(text: str) -> str | None:
    """The text's language, or its script when that is not Latin (``"CYRILLIC"``, ``"CJK"``); None when unsure, as for
    most titles."""
    letters = [letter for letter in text if letter.isalpha()]
    scripts = Counter(unicodedata.name(letter, "?").partition(" ")[0] for letter in letters)
    script, most = scripts.most_common(1)[0] if scripts else ("", 0)
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * len(letters):
        return "HIRAGANA"  # Japanese, however many of its letters are Chinese
    if script != "LATIN":
        return script if most > 0.5 * len(letters) else None
    hits = Counter(found for word in re.findall(r"\w+", text.casefold()) for found in _LANGUAGES.get(word, ()))
    (best, count), (_, second) = [*hits.most_common(2), ("", 0), ("", 0)][:2]
    return best if count >= _FEWEST and count >= _LEAD * second else None
