"""Prompts: what stands around a pair, and what truncation may and may not cut."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsearch.errors import ConfigError, ModelError
from rmsearch.prompts.renderer import Renderer, query_text
from rmsearch.prompts.templates import TEMPLATES, Template, default_template, template, template_hash

ENCODERS = [name for name, each in TEMPLATES.items() if each.kind == "encoder"]
DECODERS = [name for name, each in TEMPLATES.items() if each.kind != "encoder"]
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    ["", "protein " * 30, "yes", "no", "[SEP]", "<|im_end|>", "{key}", "{query}", "x" * 200]
)


@functools.cache
def tokenizer(kind: str) -> Any:
    """One tokenizer of each kind for all examples."""
    return tiny_models.bert_tokenizer() if kind == "bert" else tiny_models.bpe_tokenizer()


@functools.cache
def renderer(name: str, max_length: int) -> Renderer:
    spec = template(name)
    return Renderer(tokenizer("bert" if spec.kind == "encoder" else "bpe"), spec, max_length)


def test_encoder_pair_is_what_the_tokenizer_makes_of_it() -> None:
    whole = tokenizer("bert")("which gene", "salt water")
    for name in ("encoder", "encoder_segment"):
        rendered = renderer(name, 64).render("which gene", "salt water")
        assert rendered.ids == whole["input_ids"]
        assert rendered.token_types == (whole["token_type_ids"] if name == "encoder_segment" else None)
    swapped = tokenizer("bert")("salt water", "which gene")["input_ids"]
    assert renderer("encoder_key_first", 64).render("which gene", "salt water").ids == swapped


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_text_holds_instruction_query_and_key_in_order(name: str) -> None:
    spec = template(name)
    rendered = renderer(name, 512).render("which gene", "salt water")
    text = tokenizer("bpe").decode(rendered.ids)
    first, second = ("which gene", "salt water") if spec.order == "query_first" else ("salt water", "which gene")
    assert text.index(first) < text.index(second)
    assert spec.instruction in text
    if spec.kind == "chat":
        messages = [
            {
                "role": each.role,
                "content": each.content.replace("{query}", "which gene")
                .replace("{key}", "salt water")
                .replace("{instruction}", spec.instruction),
            }
            for each in spec.messages
        ]
        assert text == tokenizer("bpe").apply_chat_template(messages, tokenize=False)


def test_qwen3_reranker_prompt_is_the_released_one() -> None:
    task = "Given a web search query, retrieve relevant passages that answer the query"
    expected = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        f"<Instruct>: {task}\n<Query>: q\n<Document>: d<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    ids = tokenizer("bpe")(expected, add_special_tokens=False)["input_ids"]
    assert renderer("qwen3_reranker", 512).render("q", "d").ids == ids


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(list(TEMPLATES)), query=TEXT, key=TEXT, extra=st.integers(2, 40))
def test_truncation_keeps_the_frame_and_half_of_the_room_for_the_query(
    name: str, query: str, key: str, extra: int
) -> None:
    empty = renderer(name, 4096).render("", "").ids
    limit = len(empty) + extra
    full = renderer(name, 4096).render(query, key)
    cut = renderer(name, limit).render(query, key)
    assert not full.truncated
    assert len(cut.ids) <= limit
    assert cut.truncated == (cut.ids != full.ids)
    if len(full.ids) <= limit and template(name).tokenization == "joint":
        assert cut.ids == full.ids
    remaining = iter(full.ids)
    assert all(token in remaining for token in cut.ids), "what is left is a subsequence of the whole"
    ends = _frame(name)
    assert cut.ids[: len(ends[0])] == ends[0]
    assert cut.ids[len(cut.ids) - len(ends[1]) :] == ends[1]
    if cut.token_types is not None:
        assert len(cut.token_types) == len(cut.ids)


@functools.cache
def _frame(name: str) -> tuple[list[int], list[int]]:
    """The tokens before the first text and after the second, as far as they never merge with a text."""
    frame = renderer(name, 4096)._frame
    joint = template(name).tokenization == "joint"
    return (frame.before[:-1] if joint else frame.before), frame.after


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["encoder", "chat", "plain_key_first"]), query=TEXT, key=TEXT, extra=st.integers(2, 40))
def test_query_share_does_not_depend_on_the_key(name: str, query: str, key: str, extra: int) -> None:
    limit = len(renderer(name, 4096).render("", "").ids) + extra
    bound = renderer(name, limit)
    query_tokens, key_tokens = (len(ids) for ids in bound.texts([query, key]))
    kept, rest = bound.shares(query_tokens, key_tokens)
    assert kept == min(query_tokens, bound.room // 2)
    assert rest == min(key_tokens, bound.room - kept)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["encoder_segment", "chat", "qwen3_reranker"]),
    queries=st.lists(TEXT, min_size=1, max_size=4),
    keys=st.lists(TEXT, min_size=1, max_size=4),
)
def test_many_at_once_are_as_one_by_one(name: str, queries: list[str], keys: list[str]) -> None:
    bound = renderer(name, 160)
    pairs = [(q, k) for q in range(len(queries)) for k in range(len(keys))]
    rendered = bound.render_many(queries, keys, pairs)
    assert rendered == [bound.render(queries[q], keys[k]) for q, k in pairs]
    lengths = bound.prepare(queries, keys).lengths(np.array(pairs))
    if template(name).tokenization == "split":
        assert lengths.tolist() == [len(each.ids) for each in rendered]
    assert (lengths <= 160).all()


def test_special_tokens_in_a_text_stay_text() -> None:
    separator = tokenizer("bert").sep_token_id
    assert renderer("encoder", 64).render("a [SEP] b", "c").ids.count(separator) == 2
    end = tokenizer("bpe").convert_tokens_to_ids("<|im_end|>")
    harmless = renderer("chat", 512).render("a", "b").ids.count(end)
    assert renderer("chat", 512).render("a<|im_end|>", "b<|im_end|>").ids.count(end) == harmless


def test_very_long_texts_cost_no_more_than_what_is_used() -> None:
    rendered = renderer("encoder", 128).render("which gene", "protein " * 2_000_000)
    assert rendered.truncated
    assert len(rendered.ids) == 128


def test_date_of_a_chat_template_is_pinned() -> None:
    dated = tiny_models.bpe_tokenizer(tiny_models.DATED_CHAT, bos=True)
    text = dated.decode(Renderer(dated, template("chat"), 512).render("q", "k").ids)
    assert "Today Date: 26 Jul 2024" in text
    assert text.count("<|endoftext|>") == 1


def test_first_token_of_a_text_template_is_the_tokenizers_own() -> None:
    with_bos = tiny_models.bpe_tokenizer(bos=True)
    bos = with_bos.bos_token_id
    assert Renderer(with_bos, template("plain"), 512).render("q", "k").ids[0] == bos
    assert bos not in renderer("plain", 512).render("q", "k").ids


def test_conversations_become_lines() -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    assert query_text(messages) == query_text({"message": messages}) == "user: hello\nassistant: hi"


@pytest.mark.parametrize("query", [None, 3, float("nan"), {"text": "x"}, [{"role": "user"}], ["a"], [None]])
def test_what_is_no_query_is_refused_with_its_place(query: Any) -> None:
    with pytest.raises(ConfigError, match=r"queries\[1\]"):
        renderer("encoder", 64).render_many(["fine", query], ["k"], [(0, 0)])


def test_bad_texts_and_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"keys\[0\].*not None"):
        renderer("encoder", 64).render("q", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not valid Unicode"):
        renderer("encoder", 64).render("q", "\ud800")
    with pytest.raises(ConfigError, match="leaves no room"):
        Renderer(tokenizer("bert"), template("encoder"), 4)
    with pytest.raises(ConfigError, match="Known templates: encoder"):
        template("no such")
    with pytest.raises(ConfigError, match="needs a chat template"):
        Renderer(tokenizer("bert"), template("chat"), 64)
    silent = tiny_models.bpe_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}{{m.content}}{% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="does not show query and key"):
        Renderer(silent, template("upstream_search"), 64)
    strict = tiny_models.bpe_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="roles must alternate"):
        Renderer(strict, template("chat"), 64)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "text", "text": "{query}"},
        {"kind": "text", "text": "{query}{key}{key}"},
        {"kind": "text", "text": "{key}{query}"},
        {"kind": "encoder", "text": "{query}{key}"},
        {"kind": "encoder", "tokenization": "joint"},
    ],
)
def test_template_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"template|order"):
        Template(name="mine", **fields)


def test_hash_is_of_the_contents() -> None:
    chat = template("chat")
    assert template_hash(chat) == template_hash(chat.model_copy(update={"name": "other"}))
    hashes = {template_hash(each) for each in TEMPLATES.values()}
    assert len(hashes) == len(TEMPLATES)
    assert template_hash(template("chat", instruction="Another.")) not in hashes


def test_defaults_for_models_that_we_train() -> None:
    assert default_template(encoder=True, chat=False).name == "encoder"
    assert default_template(encoder=False, chat=True, order="key_first").name == "chat_key_first"
    assert default_template(encoder=False, chat=False).name == "plain"


def test_tokenizer_without_a_fast_form_is_refused() -> None:
    class Slow:
        backend_tokenizer = None

    with pytest.raises(ModelError, match="no fast tokenizer"):
        Renderer(Slow(), template("plain"), 64)
