"""Cutting a text so that the instruction, the text and the answer fit into a model together.

One text that is too long would end the whole run: engines and servers refuse such a request.
"""

from __future__ import annotations

import re

from rmsearch.engines.generation import prompt_ids
from rmsearch.engines.loading import is_local
from rmsearch.errors import ConfigError
from rmsearch.llm.asking import GeneratorFlags
from rmsearch.models.folder import ModelFolder
from rmsearch.prompts.tokens import TextTokens

SPARE = 16  # tokens that may arise where the parts of a prompt meet
LEAST = 16  # tokens of a text with which there is something to write about
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s)|[。！？]|\n")


class Fitting:
    """Cuts texts to ``max_characters`` and to the tokens that are left beside ``messages`` and the answer, shared by
    the ``texts`` of a prompt.

    Tokens are counted with the model's tokenizer where the model lies on this machine or in storage. For a model
    behind a server they are known only with --max-model-len, and a token then counts as one byte of UTF-8, which it
    never falls below. Raises ConfigError when nothing is left for the text.
    """

    def __init__(
        self, flags: GeneratorFlags, messages: list[dict[str, str]], max_characters: int, texts: int = 1
    ) -> None:
        self._characters, self._texts = max_characters, texts
        self._tokens: int | None = None
        self._tokenizer: TextTokens | None = None
        if flags.generator_arguments()["engine"] != "http" or is_local(flags.model_name):
            self._count_with_tokenizer(flags, messages)
        elif flags.max_model_len is not None:
            read = sum(len(message["content"]) for message in messages) // 3 + 64  # our own English
            self._leave(flags.max_model_len, read, flags)

    def _count_with_tokenizer(self, flags: GeneratorFlags, messages: list[dict[str, str]]) -> None:
        folder = ModelFolder.open(flags.model_name)
        tokenizer = folder.tokenizer
        longest = flags.max_model_len or folder.facts.max_positions
        left = self._leave(longest, len(prompt_ids(tokenizer, messages)), flags)
        self._tokenizer = TextTokens(tokenizer, left, plain=True)

    def _leave(self, longest: int, read: int, flags: GeneratorFlags) -> int:
        self._tokens = (longest - flags.max_tokens - read - SPARE) // self._texts
        if self._tokens < LEAST:
            problem = f"the instruction ({read} tokens) and the answer leave no room for a text in {longest} tokens"
            raise ConfigError(
                problem, where=f"--max-tokens {flags.max_tokens}", remedy="Lower it, or take a model that reads more"
            )
        return self._tokens

    def __call__(self, text: str) -> str:
        """The text, or its beginning when it is too long: whole sentences or words."""
        start = text[: self._characters]
        if self._tokens is not None and len(coded := start.encode("utf-8", "replace")) > self._tokens:
            if self._tokenizer is not None:
                start = self._tokenizer.cut(start, self._tokens)
            else:
                start = coded[: self._tokens].decode("utf-8", "ignore")
        return cut(text, len(start))


def cut(text: str, limit: int) -> str:
    """The text's start of at most ``limit`` characters: whole sentences if they fill half of that, else whole words."""
    if len(text) <= limit:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text, 0, limit + 1) if match.end() <= limit]
    if ends and ends[-1] >= limit / 2:
        return text[: ends[-1]].strip()
    words = text[: limit + 1].rsplit(None, 1)
    return words[0].strip() if len(words) == 2 else text[:limit]
