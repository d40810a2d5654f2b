"""Templates: what stands around a query and a key. The registry holds ours, released models' and upstream's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from rmsearch.errors import ConfigError

Order = Literal["query_first", "key_first"]


class TemplateMessage(BaseModel):
    """One chat message of a template; ``content`` may hold ``{query}``, ``{key}`` and ``{instruction}``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: str
    content: str


class Template(BaseModel):
    """What stands around a query and a key.

    kind: "encoder" (the tokenizer's own pair form), "text" (``text``) or "chat" (``messages`` through the tokenizer's
    chat template, no generation prompt). tokenization: "split" tokenises query, key and the parts around them apart
    (cached per text; special tokens in a user's text stay plain text), "joint" tokenises the whole text, as the authors
    of a released model did. token_types: "segment" (0 for the first text, 1 for the second) or "zero".
    special_tokens: text kind only, whether the tokenizer's own first and last tokens (BOS, EOS) are added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    kind: Literal["encoder", "text", "chat"]
    order: Order = "query_first"
    text: str = ""
    messages: tuple[TemplateMessage, ...] = ()
    instruction: str = ""
    tokenization: Literal["split", "joint"] = "split"
    token_types: Literal["zero", "segment"] = "zero"
    special_tokens: bool = True

    @model_validator(mode="after")
    def _check_placeholders(self) -> Template:
        if self.kind == "encoder":
            if self.tokenization == "joint" or self.text or self.messages:
                raise ValueError("an encoder template has no text and no messages, and its tokenization is 'split'")
            return self
        whole = self.text if self.kind == "text" else "".join(message.content for message in self.messages)
        if whole.count("{query}") != 1 or whole.count("{key}") != 1:
            raise ValueError("a template names {query} once and {key} once")
        if (whole.index("{query}") < whole.index("{key}")) != (self.order == "query_first"):
            raise ValueError(f"the placeholders do not stand in the order {self.order!r}")
        return self


def _chat(name: str, *contents: str, order: Order = "query_first", instruction: str = "") -> Template:
    """A chat template whose messages alternate between user and assistant, starting with the user."""
    roles = ("user", "assistant")
    messages = tuple(TemplateMessage(role=roles[i % 2], content=content) for i, content in enumerate(contents))
    return Template(name=name, kind="chat", order=order, messages=messages, instruction=instruction)


_INSTRUCTION = "Judge how well the key serves the query."
_QUERY_TAG, _KEY_TAG = "<query>\n{query}\n</query>", "<key>\n{key}\n</key>"
_QWEN3_RERANKER = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {key}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)

_ALL = (
    # Ours: what newly trained models use.
    Template(name="encoder", kind="encoder"),
    Template(name="encoder_key_first", kind="encoder", order="key_first"),
    _chat("chat", f"{{instruction}}\n\n{_QUERY_TAG}\n\n{_KEY_TAG}", instruction=_INSTRUCTION),
    _chat(
        "chat_key_first", f"{{instruction}}\n\n{_KEY_TAG}\n\n{_QUERY_TAG}", order="key_first", instruction=_INSTRUCTION
    ),
    Template(
        name="plain",
        kind="text",
        text="{instruction}\n\nQuery: {query}\n\nKey: {key}\n\nRelevance:",
        instruction=_INSTRUCTION,
    ),
    Template(
        name="plain_key_first",
        kind="text",
        order="key_first",
        text="{instruction}\n\nKey: {key}\n\nQuery: {query}\n\nRelevance:",
        instruction=_INSTRUCTION,
    ),
    # Released models.
    Template(name="encoder_segment", kind="encoder", token_types="segment"),
    Template(
        name="qwen3_reranker",
        kind="text",
        text=_QWEN3_RERANKER,
        instruction="Given a web search query, retrieve relevant passages that answer the query",
        tokenization="joint",
        special_tokens=False,
    ),
    # The prompts of kyotoai/RMSearch, under the place where each was used.
    _chat("upstream_search", "Give me a key that matches the query below;\n\nQuery:{query}", "{key}"),
    _chat("upstream_trainer", "Give me a key to the query below;\n\nQuery:{query}", "{key}"),
    _chat(
        "upstream_lora",
        "Give me relevant score between query and sentence;\n\nQuery:{query}\n\nSentence:```{key}```",
    ),
    _chat(
        "upstream_adpo",
        "Give me relevance score between query and key;\n\n<query>{query}</query>\n\n<key>{key}</key>",
    ),
    _chat("upstream_rerank", "Give me relevance score between\n\nQuery:{query}\n\nSentence:{key}"),
    _chat(
        "upstream_api",
        "Provide a relevance score between the query and the sentence.\n\nQuery: {query}\n\nSentence: {key}",
    ),
    _chat("upstream_tag", "Generate tag for the sentence\n\nSentence:'''{query}'''", "{key}"),
    _chat(
        "upstream_server",
        "<query>\n{query}\n</query>\n\n\n<key>\n{key}\n</key>\n\n\nQuery-Key Relevance Score:",
    ),
)
TEMPLATES: Mapping[str, Template] = {each.name: each for each in _ALL}


def template(name: str | Template, instruction: str | None = None) -> Template:
    """The registered template of that name (a Template is returned as it is), on request with another instruction."""
    if not isinstance(name, Template) and name not in TEMPLATES:
        raise ConfigError(f"there is no template {name!r}", remedy=f"Known templates: {', '.join(TEMPLATES)}")
    spec = name if isinstance(name, Template) else TEMPLATES[name]
    return spec if instruction is None else spec.model_copy(update={"instruction": instruction})


def template_hash(spec: Template) -> str:
    """16 hex digits over everything in the template that changes the model's input (so not over its name)."""
    facts = json.dumps(spec.model_dump(exclude={"name"}), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def default_template(*, encoder: bool, chat: bool, order: Order = "query_first") -> Template:
    """The template for a model that we train: encoder or decoder, with or without a chat template."""
    family = "encoder" if encoder else "chat" if chat else "plain"
    return TEMPLATES[family if order == "query_first" else f"{family}_key_first"]
