"""Preference pairs as token ids, batches, losses, and where LoRA goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pair_sets
import pytest
import tiny_models
import torch

from rmsearch.errors import ConfigError, ModelError, RecordError
from rmsearch.models.folder import ModelFolder
from rmsearch.prompts.renderer import Renderer
from rmsearch.prompts.templates import TEMPLATES
from rmsearch.trainer.adapters import choose_layers, lora_config, start_pooler
from rmsearch.trainer.batches import PairCollator, PairSampler, pair_order
from rmsearch.trainer.data import encode_pairs, peek_template, read_pairs
from rmsearch.trainer.losses import preference_loss
from rmsearch.trainer.model import load_base


def renderer(length: int = 64) -> Renderer:
    return Renderer(tiny_models.bert_tokenizer(), TEMPLATES["encoder"], length)


def test_raw_and_upstream_records_give_the_same_pairs(tmp_path: Path) -> None:
    rows = pair_sets.pairs(5)
    raw = pair_sets.write(tmp_path / "raw.json", rows)
    chats = pair_sets.write(tmp_path / "chats.json", [pair_sets.upstream_form(row) for row in rows])
    assert [pair[:4] for pair in read_pairs(raw)] == [pair[:4] for pair in read_pairs(chats)]
    assert peek_template([chats]) == "upstream_lora"
    assert peek_template([raw]) is None
    assert peek_template([raw, chats]) is None


def test_a_question_and_answer_chat_is_query_and_key(tmp_path: Path) -> None:
    def chat(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "which gene?"}, {"role": "assistant", "content": answer}]

    path = pair_sets.write(tmp_path / "qa.json", [{"chosen_msg": chat("this"), "rejected_msg": chat("that")}])
    assert next(read_pairs(path))[:3] == ("which gene?", "this", "that")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"query": "q", "chosen_key": "same", "rejected_key": "same"}, "same text"),
        ({"query": "q", "chosen_key": "a"}, "rejected_key"),
        ({"query": "q", "chosen_key": "a", "rejected_key": 3}, "rejected_key"),
        (
            {"chosen_msg": [{"role": "user", "content": "a"}], "rejected_msg": [{"role": "user", "content": "b"}]},
            "no known prompt",
        ),
    ],
)
def test_bad_rows_are_refused_with_file_and_row(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = pair_sets.write(tmp_path / "bad.json", [*pair_sets.pairs(2), row])
    with pytest.raises(RecordError, match=problem) as error:
        list(read_pairs(path))
    assert "bad.json:2" in str(error.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no pairs"):
        list(read_pairs(pair_sets.write(tmp_path / "none.json", [])))


def test_long_keys_are_cut_and_counted_and_equal_tokens_set_aside(tmp_path: Path) -> None:
    same = "word " * 40
    rows = [
        {"query": "gene", "chosen_key": "tool " * 60, "rejected_key": "market"},
        {"query": "gene", "chosen_key": same + "good", "rejected_key": same + "bad"},
    ]
    rejected: list[str] = []
    path = pair_sets.write(tmp_path / "long.json", rows)
    data = encode_pairs(read_pairs(path), renderer(24), lambda _, reason: rejected.append(reason))
    assert data.counts["pairs"] == 1 and data.counts["read"] == 2 and data.counts["same_tokens"] == 1
    assert data.counts["truncated"] == 3 and len(rejected) == 1
    assert max(map(len, data.inputs)) == 24


def test_shared_texts_are_rendered_and_forwarded_once() -> None:
    from rmsearch.trainer.data import Pair

    keys = ["one", "two", "three", "four"]
    data = encode_pairs([Pair("gene", "best", key) for key in keys], renderer())
    assert len(data.inputs) == 5 and len(set(data.group.tolist())) == 1
    batch = PairCollator(data, pad_token_id=0, limit=64, margin_scale=1.0)([{"row": i} for i in range(4)])
    assert batch["input_ids"].shape[0] == 5 and batch["input_ids"].shape[1] % 8 == 0
    assert batch["chosen"].unique().numel() == 1 and batch["rejected"].unique().numel() == 4


def test_the_order_keeps_groups_together_and_repeats_itself() -> None:
    groups = np.repeat(np.arange(40), 3)
    lengths = np.repeat(np.random.default_rng(0).integers(5, 50, 40), 3)
    order = pair_order(groups, lengths, 6, seed=1, epoch=0)
    assert sorted(order) == list(range(120))
    assert all(len(set(groups[batch])) == 2 for batch in order.reshape(-1, 6))
    assert np.array_equal(order, pair_order(groups, lengths, 6, seed=1, epoch=0))
    assert not np.array_equal(order, pair_order(groups, lengths, 6, seed=1, epoch=1))
    spread = np.ptp(lengths[order].reshape(-1, 6), axis=1).mean()
    assert spread < np.ptp(lengths.reshape(-1, 6), axis=1).mean()


def test_the_sampler_follows_the_epoch() -> None:
    data = encode_pairs((pair for pair in []), renderer())  # no pairs: nothing to order, but the counts are there
    assert len(data) == 0 and data.counts["pairs"] == 0
    from rmsearch.trainer.data import Pair

    data = encode_pairs([Pair(f"gene {i}", "best", "worst") for i in range(20)], renderer())
    sampler = PairSampler(data, 4, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) and first != list(sampler)


def test_margins_change_the_loss_as_in_trl() -> None:
    rewards = torch.tensor([1.0, 0.5, -0.2])
    chosen, rejected = torch.tensor([0, 0]), torch.tensor([1, 2])
    none, some = torch.zeros(2), torch.tensor([0.5, 2.0])
    plain = preference_loss("bradley-terry", rewards, chosen, rejected, none)
    with_margin = preference_loss("bradley-terry", rewards, chosen, rejected, some)
    expected = -torch.nn.functional.logsigmoid(torch.tensor([0.5 - 0.5, 1.2 - 2.0])).mean()
    assert with_margin > plain and torch.allclose(with_margin, expected)


def test_listwise_is_cross_entropy_over_each_list() -> None:
    rewards = torch.tensor([1.0, 0.5, -0.2, 0.3, 0.9])
    chosen, rejected = torch.tensor([0, 3, 0]), torch.tensor([1, 4, 2])
    found = preference_loss("listwise", rewards, chosen, rejected, torch.zeros(3))
    lists = [rewards[[0, 1, 2]], rewards[[3, 4]]]
    expected = torch.stack([each.logsumexp(0) - each[0] for each in lists]).mean()
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("loss", ["margin-mse", "soft"])
def test_teacher_losses_are_smallest_at_the_teacher(loss: Any) -> None:
    chosen, rejected, margin = torch.tensor([0]), torch.tensor([1]), torch.tensor([1.5])
    found = [
        float(preference_loss(loss, torch.tensor([d, 0.0]), chosen, rejected, margin))
        for d in (0.5, 1.0, 1.5, 2.0, 3.0)
    ]
    assert min(found) == found[2]


def test_the_bradley_terry_loss_is_that_of_trls_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    path = pair_sets.write(tmp_path / "pairs.json", pair_sets.pairs(6, margin=0.7))
    data = encode_pairs(read_pairs(path), renderer())
    columns = {
        "chosen_ids": [data.inputs[i].tolist() for i in data.chosen],
        "rejected_ids": [data.inputs[i].tolist() for i in data.rejected],
        "margin": data.margin.tolist(),
    }
    arguments = RewardConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[])
    dataset, tokenizer = Dataset.from_dict(columns), tiny_models.bert_tokenizer()
    theirs = RewardTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    theirs.model.eval()
    expected = theirs.compute_loss(theirs.model, theirs.data_collator([dataset[i] for i in range(6)]))
    batch = PairCollator(data, tokenizer.pad_token_id, 512, 1.0)([{"row": i} for i in range(6)])
    rewards = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    ours = preference_loss("bradley-terry", rewards, batch["chosen"], batch["rejected"], batch["margin"])
    assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wish", "layers"),
    [("all", [0, 1, 2, 3]), ("last-2", [2, 3]), ("1,3", [1, 3]), ("1-2", [1, 2]), ("0, last-1", [0, 3])],
)
def test_layers_are_resolved(wish: str, layers: list[int]) -> None:
    assert choose_layers(wish, 4) == layers


@pytest.mark.parametrize("wish", ["25,26,27", "last-5", "last-0", "middle", ""])
def test_layers_that_the_model_lacks_are_refused(wish: str) -> None:
    with pytest.raises(ConfigError, match="--lora-layers"):
        choose_layers(wish, 4)


def test_lora_goes_into_attention_and_mlp_only(tmp_path: Path) -> None:
    from peft import get_peft_model

    encoder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    decoder = tiny_models.decoder_reward_model(tmp_path / "qwen3")
    for folder, name, last, heads in (
        (encoder, "encoder", "layer.1.", {"classifier", "pooler"}),
        (decoder, "chat", "layers.1.", {"score"}),
    ):
        base = load_base(ModelFolder(folder), TEMPLATES[name], 64, dtype="float32", attention=None, seed=0)
        wanted = lora_config(base, rank=4, alpha=8, dropout=0, targets="auto", layers="last-1")
        model = get_peft_model(base.model, wanted)
        adapted = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
        assert adapted and all(last in each for each in adapted)
        assert len(adapted) == (6 if name == "encoder" else 7) * 2
        assert heads <= set(wanted.modules_to_save)
        with pytest.raises(ConfigError, match="no linear"):
            lora_config(base, rank=4, alpha=8, dropout=0, targets="nonsense", layers="all")


def test_heads_with_several_labels_and_adapters_are_refused(tmp_path: Path) -> None:
    several = tiny_models.bert_cross_encoder(tmp_path / "three", num_labels=3)
    with pytest.raises(ModelError, match="3 labels"):
        load_base(ModelFolder(several), TEMPLATES["encoder"], 64, dtype="float32", attention=None, seed=0)
    base = tiny_models.bert_cross_encoder(tmp_path / "bert")
    adapter = tiny_models.lora_adapter(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match="adapter"):
        load_base(ModelFolder(adapter), TEMPLATES["encoder"], 64, dtype="float32", attention=None, seed=0)


def test_the_pad_token_is_never_the_last_token(tmp_path: Path) -> None:
    folder = tiny_models.decoder_reward_model(tmp_path / "qwen3", chat_template="{{ messages[0].content }}<|im_end|>")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    base = load_base(ModelFolder(folder), TEMPLATES["chat"], 128, dtype="float32", attention=None, seed=0)
    rendered = base.renderer.render("which gene", "this one").ids
    assert rendered[-1] == base.tokenizer.eos_token_id != base.tokenizer.pad_token_id
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id
    short, long = np.asarray(rendered, np.int32), np.asarray(rendered + rendered, np.int32)
    from rmsearch.trainer.evaluation import score_inputs

    pad = base.tokenizer.pad_token_id
    alone = score_inputs(base.model, [short], pad=pad, limit=1024)
    together = score_inputs(base.model, [short, long], pad=pad, limit=1024)
    hidden = base.model.base_model(input_ids=torch.from_numpy(short[None].astype(np.int64))).last_hidden_state[0, -1]
    assert np.allclose(alone[0], float(base.model.score(hidden).detach()), atol=1e-5)
    assert np.allclose(alone[0], together[0], atol=1e-5)


def test_the_pooler_starts_as_asked(tmp_path: Path) -> None:
    folder = tiny_models.bert_cross_encoder(tmp_path / "bert")
    for how in ("identity", "new", "keep"):
        base = load_base(ModelFolder(folder), TEMPLATES["encoder"], 64, dtype="float32", attention=None, seed=0)
        dense = base.model.bert.pooler.dense
        before = dense.weight.clone()
        start_pooler(base.model, how)
        assert torch.equal(dense.weight, torch.eye(64)) == (how == "identity")
        assert torch.equal(dense.weight, before) == (how == "keep")
    decoder = load_base(
        ModelFolder(tiny_models.decoder_reward_model(tmp_path / "qwen3")),
        TEMPLATES["chat"],
        64,
        dtype="float32",
        attention=None,
        seed=0,
    )
    with pytest.raises(ConfigError, match="no pooler"):
        start_pooler(decoder.model, "identity")
