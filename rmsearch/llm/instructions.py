"""What language models are told: one readable file per instruction in ``prompts/``, with a version.

An instruction's tag (``make_query_recs@1``) goes into every record that came of it. Change the text, raise the version.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from rmsearch.errors import ConfigError

_FIELD = re.compile(r"\{\{(\w+)\}\}")


class Instruction(BaseModel):
    """A system and a user message with ``{{fields}}``, and lists of ``parts`` that stages cycle through."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int = Field(ge=1)
    system: str = ""
    user: str
    parts: dict[str, list[dict[str, str]]] = {}

    @property
    def tag(self) -> str:
        """Name and version, for records."""
        return f"{self.name}@{self.version}"

    def messages(self, **fields: Any) -> list[dict[str, str]]:
        """The chat with its fields filled in, all in one pass, so that a field's text may hold braces. ConfigError
        for a field that is not given."""

        def fill(match: re.Match[str]) -> str:
            if match[1] not in fields:
                raise ConfigError(f"needs the field {match[1]!r}", where=f"instruction {self.tag}")
            return str(fields[match[1]])

        chat = [("system", self.system.strip()), ("user", self.user.strip())]
        return [{"role": role, "content": _FIELD.sub(fill, text)} for role, text in chat if text]


@cache
def instruction(name: str) -> Instruction:
    """The instruction of ``prompts/NAME.yaml``. ConfigError when there is none of that name."""
    folder = files("rmsearch.llm") / "prompts"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(each.name.removesuffix(".yaml") for each in folder.iterdir() if each.name.endswith(".yaml"))
        raise ConfigError(f"there is no instruction {name!r}", remedy=f"There are: {', '.join(known)}")
    return Instruction(name=name, **yaml.safe_load(path.read_text(encoding="utf-8")))
