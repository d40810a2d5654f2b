"""Builders of tiny models with random weights, the same on every run, saved as safetensors folders.

Each takes the folder to write and returns it. Widths are the smallest that vLLM's CPU build takes (head size 32).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

TEXT = (
    "search engine ranks keys by reward agent tool document query relevant answer yes no the of and to a "
    "in is for which protein gene cancer market price weather train plane recipe salt water code python "
    "error test model data Judge how well key serves Instruct Query Document Relevance user assistant "
    "system Given web passage"
)
WORDS = TEXT.split()
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Prints the date of the day as Llama's template does, so that a test can show that it is pinned.
DATED_CHAT = "{{ bos_token }}Today Date: {{ strftime_now('%d %b %Y') }}\n" + CHAT


@functools.cache
def _trained_bpe() -> str:
    """A byte-level BPE tokenizer as JSON, trained on a few lines, with " yes"-like single tokens for yes and no."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] + ["yes", "no"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str()


def bpe_tokenizer(chat_template: str | None = CHAT, *, bos: bool = False) -> Any:
    """A fast byte-level BPE tokenizer; with ``bos`` every text starts with <|endoftext|>."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(_trained_bpe())
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|endoftext|>" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@functools.cache
def _vocabulary() -> tuple[str, ...]:
    letters = [chr(c) for c in range(33, 127)]
    pieces = [f"##{letter}" for letter in letters if letter.islower() or letter.isdigit()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return tuple(dict.fromkeys(special + letters + pieces + [word.lower() for word in WORDS]))


def bert_tokenizer() -> Any:
    """A WordPiece tokenizer with the usual BERT pair form."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab={token: i for i, token in enumerate(_vocabulary())}, do_lower_case=True)


def bert_cross_encoder(folder: Path, *, seed: int = 0, num_labels: int = 1, dtype: str = "float32") -> Path:
    """BertForSequenceClassification, 2 layers, width 64, 512 positions."""
    import torch
    from transformers import BertForSequenceClassification

    model = _seeded(BertForSequenceClassification, _bert_config(num_labels=num_labels), seed).to(getattr(torch, dtype))
    return _save(folder, model, bert_tokenizer())


def sentence_encoder(folder: Path, *, seed: int = 0, pooling: str = "mean") -> Path:
    """A BertModel with sentence-transformers files: pooling, normalise, 64 tokens at most."""
    from transformers import BertModel

    _save(folder, _seeded(BertModel, _bert_config(), seed), bert_tokenizer())
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    modes = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
    flags = {f"pooling_mode_{flag}": mode == pooling for mode, flag in modes.items()}
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 64, **flags})
    (folder / "2_Normalize").mkdir(exist_ok=True)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    return folder


def decoder_reward_model(
    folder: Path,
    family: str = "qwen3",
    *,
    seed: int = 0,
    num_labels: int = 1,
    chat_template: str | None = CHAT,
    dtype: str = "float32",
) -> Path:
    """Qwen3-, Llama- or MistralForSequenceClassification ("qwen3", "llama", "mistral"), 2 layers, width 64."""
    import torch
    import transformers

    name = {"qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}[family]
    tokenizer = bpe_tokenizer(chat_template, bos=family != "qwen3")
    config = _decoder_config(name, tokenizer, num_labels=num_labels)
    model = _seeded(getattr(transformers, f"{name}ForSequenceClassification"), config, seed).to(getattr(torch, dtype))
    return _save(folder, model, tokenizer)


def causal_model(folder: Path, *, seed: int = 0, tied: bool = False, family: str = "Qwen3") -> Path:
    """A Qwen3ForCausalLM: a generator, and, its tokenizer having yes and no, a reranker like Qwen3-Reranker."""
    import transformers

    tokenizer = bpe_tokenizer()
    config = _decoder_config(family, tokenizer, tie_word_embeddings=tied)
    return _save(folder, _seeded(getattr(transformers, f"{family}ForCausalLM"), config, seed), tokenizer)


def lora_adapter(folder: Path, base: Path, *, seed: int = 0, targets: str | None = None) -> Path:
    """A LoRA adapter of rank 4 with random (not zero) weights and a trained head, for a classifier folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    bert = model.config.model_type == "bert"
    modules = targets or (r".*encoder\.layer.*\.(query|key|value|dense)" if bert else ["q_proj", "v_proj", "up_proj"])
    head = "classifier" if bert else "score"
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=modules, modules_to_save=[head])
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def _bert_config(**extra: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        initializer_range=0.2,
        **extra,
    )


def _decoder_config(name: str, tokenizer: Any, **extra: Any) -> Any:
    import transformers

    return getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        max_position_embeddings=1024,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **({"sliding_window": None} if name == "Mistral" else {}),
        **extra,
    )


def _seeded(kind: Any, config: Any, seed: int) -> Any:
    import torch

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = kind(config).eval()
    torch.random.set_rng_state(state)
    return model


def _save(folder: Path, model: Any, tokenizer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
