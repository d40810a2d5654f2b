"""The transformers engine: rewards, heads in all their forms, adapters, vectors, text, and what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from rmsearch.engines import load_embedder, load_generator, load_scorer
from rmsearch.engines.embedding import prefixes, resolve_embedding
from rmsearch.engines.generation import Generation, Sampling
from rmsearch.engines.options import pick_engine
from rmsearch.engines.transformers import load_classifier
from rmsearch.errors import ConfigError, ContractError, InputMissingError, ModelError
from rmsearch.models.contract import load_json, read_contract, write_contract
from rmsearch.models.folder import ModelFolder
from rmsearch.models.heads import causal_to_classifier
from rmsearch.models.resolve import make_contract, resolve_contract
from rmsearch.prompts.templates import template

QUERIES = ["which gene is in cancer", "weather", "", "price of the train " * 9]
KEYS = ["protein and gene " * n for n in (1, 3, 9, 27)] + ["python code error", "", "recipe of salt water"]
PAIRS = [(query, key) for query in QUERIES for key in KEYS]


def score(folder: Path | str, pairs: list[tuple[str, str]] = PAIRS, **options: Any) -> np.ndarray:
    scorer = load_scorer(str(folder), engine="transformers", **options)
    try:
        return asyncio.run(scorer.score(pairs))
    finally:
        scorer.close_sync()


def rendered(folder: Path, **options: Any) -> list[list[int]]:
    scorer = load_scorer(str(folder), engine="transformers", **options)
    return [scorer.renderer.render(*pair).ids for pair in PAIRS]  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral"])
def test_decoder_rewards_are_the_models_own_logits(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tiny_models.decoder_reward_model(tmp_path / family, family)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits.item() for ids in rendered(folder)]
    assert np.abs(score(folder) - expected).max() <= 1e-5
    assert np.abs(score(folder, max_batch_tokens=64) - expected).max() <= 1e-5


def test_padding_token_inside_a_text_moves_nothing(tmp_path: Path) -> None:
    """A head that looks for the first padding token reads the wrong position when pad is also BOS or in a text."""
    folder = tiny_models.decoder_reward_model(tmp_path / "llama", "llama")
    edited = load_json(folder / "config.json") | {"pad_token_id": None}
    pairs = [("protein <|endoftext|>", "a" * n) for n in (1, 30)]
    before = score(folder, pairs, template="plain")
    (folder / "config.json").write_text(json.dumps(edited))
    assert np.abs(score(folder, pairs, template="plain") - before).max() <= 1e-6
    assert np.abs(score(folder, pairs[:1], template="plain") - before[:1]).max() <= 1e-5


def test_encoder_rewards_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    reference = CrossEncoder(str(folder), activation_fn=torch.nn.Identity(), device="cpu")
    assert np.abs(score(folder) - reference.predict(PAIRS)).max() <= 1e-5


def test_token_types_follow_the_contract(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    segment = score(folder)
    write_contract(folder, make_contract(ModelFolder(folder), template("encoder"), 512))
    zero = score(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits.item() for ids in rendered(folder)]
    assert np.abs(zero - expected).max() <= 1e-5
    assert np.abs(zero - segment).max() > 1e-2


def test_half_precision_is_near(tmp_path: Path) -> None:
    folder = tiny_models.decoder_reward_model(tmp_path / "qwen3")
    exact = score(folder)
    half = score(folder, dtype="bfloat16")
    assert 0 < np.abs(half - exact).max() < 0.2
    with pytest.raises(ConfigError, match="unknown dtype 'int4'"):
        score(folder, dtype="int4")


def test_positions_stay_exact_in_half_precision(tmp_path: Path) -> None:
    """Rotary frequencies rounded to bfloat16 turn later tokens by the wrong angle."""
    folder = ModelFolder(tiny_models.decoder_reward_model(tmp_path / "llama", "llama"))
    contract = resolve_contract(folder)
    exact, half = (load_classifier(folder, contract, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    frequencies = dict(exact.named_buffers())
    assert frequencies and all(torch.equal(value, frequencies[name]) for name, value in half.named_buffers())


def test_event_loop_stays_alive_and_loops_may_change(tmp_path: Path) -> None:
    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    scorer = load_scorer(str(folder), engine="transformers", max_batch_tokens=20_000)
    pairs = [(f"query {i}", "protein " * 150) for i in range(400)]

    async def use() -> tuple[int, float]:
        ticks, start = 0, time.monotonic()
        work = asyncio.create_task(scorer.score(pairs))
        while not work.done():
            await asyncio.sleep(0.005)
            ticks += 1
        return ticks, time.monotonic() - start

    for _ in range(2):
        ticks, seconds = asyncio.run(use())
        assert ticks > seconds / 0.2
    asyncio.run(scorer.close())


def test_closing_during_work_is_an_error_for_that_work(tmp_path: Path) -> None:
    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    scorer = load_scorer(str(folder), engine="transformers")

    async def use() -> None:
        work = asyncio.create_task(scorer.score([(f"query {i}", "protein " * 200) for i in range(500)]))
        await asyncio.sleep(0.1)
        scorer.close_sync()
        with pytest.raises(ConfigError, match="closed"):
            await asyncio.wait_for(work, 30)

    asyncio.run(use())


def test_model_without_trained_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="would be random: classifier"):
        score(folder)
    torn = {name: tensor for name, tensor in tensors.items() if "layer.1.output.dense.weight" not in name}
    save_file(torn, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        score(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer does not load"):
        score(folder)


def yes_no_logits(folder: Path) -> np.ndarray:
    """What Qwen3-Reranker's own code computes, before its softmax."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    yes, no = (tokenizer(word)["input_ids"][0] for word in ("yes", "no"))
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in rendered(folder, template="qwen3_reranker")]
    return np.array([(row[yes] - row[no]).item() for row in logits])


@pytest.mark.parametrize("tied", [False, True])
def test_yes_no_reranker_as_released_and_converted(tmp_path: Path, tied: bool) -> None:
    folder = tiny_models.causal_model(tmp_path / "Tiny-Reranker", tied=tied)
    expected = yes_no_logits(folder)
    assert np.abs(score(folder) - expected).max() <= 1e-5
    out = causal_to_classifier(ModelFolder(folder), tmp_path / "converted").path
    assert "lm_head.weight" not in ModelFolder(out).tensors
    contract = read_contract(out)
    assert contract is not None
    assert (contract.template.name, contract.architecture) == ("qwen3_reranker", "Qwen3ForSequenceClassification")
    assert np.abs(score(out) - expected).max() <= 1e-5
    with pytest.raises(ModelError, match="needs no conversion"):
        causal_to_classifier(ModelFolder(out), tmp_path / "again")


def test_conversion_works_shard_by_shard(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_models.causal_model(tmp_path / "Tiny-Reranker")
    expected = score(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert np.abs(score(causal_to_classifier(ModelFolder(folder), tmp_path / "out").path) - expected).max() <= 1e-5


def test_heads_under_other_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_models.decoder_reward_model(tmp_path / "grm", "llama")
    expected = score(folder)
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("score.weight")
    save_file(tensors | {"v_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    assert np.abs(score(folder) - expected).max() <= 1e-6
    wide = tensors | {"v_head.weight": torch.zeros(2, head.shape[1])}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"shape \[2, 64\]"):
        score(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="would be random"):
        score(folder)


def test_upstreams_converted_folder_with_score_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    original = tiny_models.decoder_reward_model(tmp_path / "rm", "llama")
    folder = tiny_models.causal_model(tmp_path / "rm-converted-model", family="Llama")
    body = load_file(original / "model.safetensors")
    torch.save(body["score.weight"], folder / "score.pt")
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(folder)
    missing = causal.load_state_dict({k: v for k, v in body.items() if k != "score.weight"}, strict=False).missing_keys
    assert missing == ["lm_head.weight"]
    causal.save_pretrained(folder)
    options = {"template": "upstream_search"}
    assert np.abs(score(folder, **options) - score(original, **options)).max() <= 1e-5
    (folder / "score.pt").write_bytes(b"no tensor")
    with pytest.raises(ModelError, match=r"score\.pt: is no tensor"):
        score(folder)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_adapter_folder_brings_its_base(tmp_path: Path, family: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    if family == "bert":
        base = tiny_models.bert_cross_encoder(tmp_path / "base")
    else:
        base = tiny_models.decoder_reward_model(tmp_path / "base")
    adapter = tiny_models.lora_adapter(tmp_path / "adapter", base)
    name = "encoder" if family == "bert" else "chat"
    write_contract(adapter, make_contract(ModelFolder(base), template(name), 128))
    scores = score(adapter)
    assert np.array_equal(scores, score(base, lora=str(adapter)))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, adapter).eval()
    ids = rendered(adapter)
    with torch.no_grad():
        expected = [model(torch.tensor([each])).logits.item() for each in ids]
    assert np.abs(scores - expected).max() <= 1e-5
    assert np.abs(scores - score(base, template=name, max_length=128)).max() > 1e-3
    with pytest.raises(ContractError, match="trained with the template"):
        score(adapter, template="plain")


def test_adapter_on_a_model_without_head(tmp_path: Path) -> None:
    base = tiny_models.sentence_encoder(tmp_path / "base")
    trained = tiny_models.bert_cross_encoder(tmp_path / "start")
    adapter = tiny_models.lora_adapter(tmp_path / "adapter", trained)
    config = load_json(adapter / "adapter_config.json") | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ContractError, match=r"Name template="):
        score(adapter)
    assert np.isfinite(score(adapter, template="encoder")).all()
    other = tiny_models.decoder_reward_model(tmp_path / "other")
    with pytest.raises(ModelError, match="does not fit the base"):
        score(other, lora=str(adapter), template="plain")


def test_vectors_are_those_of_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    embedder = load_embedder("all-MiniLM-L6-v2", engine="transformers")
    from rmsearch.models.folder import open_model

    texts = ["", "a", "Rewards rank keys.", "long text " * 400, "a", "tokens such as [SEP] in a text"]
    reference = SentenceTransformer(str(open_model("all-MiniLM-L6-v2")), device="cpu")
    vectors = asyncio.run(embedder.embed(texts))
    assert np.abs(vectors - reference.encode(texts, normalize_embeddings=True)).max() <= 1e-6
    assert embedder.stats.scored == 5
    assert embedder.stats.truncated == 1
    assert asyncio.run(embedder.embed([])).shape[0] == 0
    with pytest.raises(ConfigError, match="query 1: a text to embed is a string, not None"):
        asyncio.run(embedder.embed(["a", None], kind="query"))  # type: ignore[list-item]
    embedder.close_sync()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_is_what_the_files_or_the_user_say(tmp_path: Path, pooling: Any) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tiny_models.sentence_encoder(tmp_path / "encoder", pooling=pooling)
    texts = ["protein", "gene " * 20, "salt water"]
    vectors = asyncio.run(load_embedder(str(folder), engine="transformers").embed(texts))
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
    assert np.abs(vectors - expected).max() <= 1e-5
    other = "cls" if pooling == "mean" else "mean"
    different = asyncio.run(load_embedder(str(folder), engine="transformers", pooling=other).embed(texts))
    assert np.abs(different - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("intfloat/e5-base-v2", (None, None), ("query: ", "passage: ")),
        ("intfloat/multilingual-e5-large", (None, None), ("query: ", "passage: ")),
        ("all-MiniLM-L6-v2", (None, None), ("", "")),
        ("intfloat/e5-base-v2", ("", ""), ("", "")),
        ("intfloat/e5-base-v2", ("find: ", None), ("find: ", "passage: ")),
        (
            "intfloat/e5-mistral-7b-instruct",
            (None, None),
            (
                "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ",
                "",
            ),
        ),
        ("Qwen/Qwen3-Embedding-0.6B", ("Pick the agent", None), ("Instruct: Pick the agent\nQuery:", "")),
        ("Qwen/Qwen3-Embedding-0.6B", ("Instruct: x\nQuery: ", "k: "), ("Instruct: x\nQuery: ", "k: ")),
    ],
)
def test_prefixes_by_family_and_by_flag(name: str, flags: Any, expected: tuple[str, str]) -> None:
    assert prefixes(name, *flags) == expected


def test_models_own_prompts_and_limits(tmp_path: Path) -> None:
    folder = tiny_models.sentence_encoder(tmp_path / "encoder")
    own = {"prompts": {"query": "ask: ", "document": "doc: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(own))
    spec = resolve_embedding(ModelFolder(folder, "x"))
    assert (spec.query_prefix, spec.key_prefix, spec.max_length, spec.pooling) == ("ask: ", "doc: ", 64, "mean")
    assert resolve_embedding(ModelFolder(folder, "x"), query_instruction="", max_length=32).query_prefix == ""
    with pytest.raises(ConfigError, match="512 positions"):
        resolve_embedding(ModelFolder(folder, "x"), max_length=600)
    weighted = {"pooling_mode_weightedmean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(weighted))
    with pytest.raises(ModelError, match="pooling other than"):
        resolve_embedding(ModelFolder(folder, "x"))


def test_text_and_its_limits(tmp_path: Path) -> None:
    generator = load_generator(str(tiny_models.causal_model(tmp_path / "generator")), engine="transformers")

    async def use() -> None:
        first, again = await generator.generate(["hello", "hello"], sampling=Sampling(max_tokens=6, logprobs=2))
        assert first == again
        assert (first.tokens, first.finish, len(first.logprobs or ())) == (6, "length", 6)
        warm = Sampling(max_tokens=6, temperature=1.0, seed=3)
        (one,), (two,) = [await generator.generate(["hello"], sampling=warm) for _ in range(2)]
        assert one == two
        with pytest.raises(ConfigError, match="cannot hold answers to a schema"):
            await generator.generate(["hello"], schema={"type": "object"})
        with pytest.raises(ConfigError, match="exclude each other"):
            await generator.generate(["hello"], schema={}, choices=["a"])
        with pytest.raises(ConfigError, match=r"messages\[1\]"):
            await generator.generate(["hello", [{"role": "user"}]])
        assert await generator.generate([]) == []

    asyncio.run(use())
    generator.close_sync()
    with pytest.raises(ConfigError, match="closed"):
        asyncio.run(generator.generate(["hello"]))
    with pytest.raises(ModelError, match=r"no JSON .cut at max_tokens"):
        Generation('{"a": ', 3, "length").parsed()


def test_engine_is_picked_and_the_reason_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert pick_engine("auto", "http://somewhere") == "http"
        local = pick_engine("auto", None)
    assert local == ("vllm" if torch.cuda.is_available() else "transformers")
    assert "because a base_url is given" in caplog.text
    with pytest.raises(ConfigError, match="unknown engine 'tgi'"):
        pick_engine("tgi", None)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError):
        load_scorer(str(tmp_path / "nothing"), engine="transformers")
    with pytest.raises(ModelError, match="no reward head"):
        load_scorer("all-MiniLM-L6-v2", engine="transformers")
    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    with pytest.raises(ConfigError, match="does not know gpu_memory_utilization"):
        load_scorer(str(folder), engine="transformers", gpu_memory_utilization=0.9)


def test_importing_engines_loads_nothing_heavy() -> None:
    code = "import sys, rmsearch.engines, rmsearch.engines.loading, rmsearch.engines.scheduler as s\n" + (
        "print([m for m in ('torch', 'transformers', 'vllm', 'peft', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
