"""Training on rows of candidates with explicit orders: orders, losses, batches, bad input, whole runs."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pair_sets
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsearch.cli import run_command
from rmsearch.errors import ConfigError, RecordError, RejectedError
from rmsearch.preferences.orders import implied, levels
from rmsearch.prompts.renderer import Renderer
from rmsearch.prompts.templates import TEMPLATES
from rmsearch.stage import execute
from rmsearch.storage.records import write_records
from rmsearch.train.adpo_lora import adpo_lora
from rmsearch.train.lora import lora
from rmsearch.trainer.batches import PairCollator, PairSampler
from rmsearch.trainer.losses import preference_loss
from rmsearch.trainer.ordered_rows import encode_rows, peek_row_template, read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {
    "dtype": "fp32",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "evaluation_steps": 12,
    "save_steps": 12,
}
KEYS = ["relevant good serves", "relevant good", "good", "bad", "bad error", "bad error water"]  # best first


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    return str(tiny_models.bert_cross_encoder(tmp_path / "base", seed=3))


def adpo_row(query: str, keys: list[str], pairs: list[Any] | None = None, **extra: Any) -> dict[str, Any]:
    """A raw row; without ``pairs`` the keys are in a total order, best first."""
    stated = pairs if pairs is not None else list(combinations(range(len(keys)), 2))
    return {"batch": [{"query": query, "key": key} for key in keys], "dpo_pairs": stated, **extra}


def adpo_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of four to six of KEYS, all of their pairs stated, in no telling order of positions."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        query = f"{rng.choice(pair_sets.TOPICS)} which {seed} {i}"
        grades = rng.sample(range(len(KEYS)), rng.randint(4, 6))
        pairs = [(a, b) for a, x in enumerate(grades) for b, y in enumerate(grades) if x < y]
        rows.append(adpo_row(query, [KEYS[grade] for grade in grades], pairs))
    return rows


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same preferences as standard records."""
    return [
        {"query": r["batch"][a]["query"], "chosen_key": r["batch"][a]["key"], "rejected_key": r["batch"][b]["key"]}
        for r in rows
        for a, b in r["dpo_pairs"]
    ]


def as_chats(row: dict[str, Any]) -> dict[str, Any]:
    """The row as upstream's judge writes it."""
    both = {"chosen_key": "", "rejected_key": ""}
    chats = [pair_sets.upstream_form(both | {"query": c["query"], "chosen_key": c["key"]}) for c in row["batch"]]
    batch = [{"msg": c["chosen_msg"], "query_id": 0, "key_id": i, "key_role": "sampled"} for i, c in enumerate(chats)]
    return row | {"batch": batch}


def renderer(length: int = 64) -> Renderer:
    return Renderer(tiny_models.bert_tokenizer(), TEMPLATES["encoder"], length)


# Orders


@st.composite
def partial_orders(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """Candidates and some pairs that agree with a hidden ranking of them."""
    ranking = draw(st.permutations(range(draw(st.integers(2, 8)))))
    return len(ranking), draw(st.lists(st.sampled_from(list(combinations(ranking, 2))), max_size=20))


def reachable(count: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    found = np.zeros((count, count), bool)
    for chosen, rejected in pairs:
        found[chosen, rejected] = True
    for _ in range(count):
        found |= (found.astype(int) @ found.astype(int)) > 0
    return found


@given(partial_orders())
def test_levels_respect_every_pair_of_a_partial_order(order: tuple[int, list[tuple[int, int]]]) -> None:
    count, pairs = order
    level = levels(count, pairs)
    assert all(level[chosen] < level[rejected] for chosen, rejected in pairs)
    closure = implied(count, pairs)
    assert closure == [tuple(each) for each in np.argwhere(reachable(count, pairs)).tolist()]
    assert all(level[chosen] < level[rejected] for chosen, rejected in closure)
    assert (len(set(level)) == count) == (len(closure) == math.comb(count, 2))  # a total order


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_a_circle_is_found_and_named(pairs: list[tuple[int, int]]) -> None:
    if not reachable(6, pairs).diagonal().any():
        levels(6, pairs)
        return
    with pytest.raises(ValueError, match="in a circle") as error:
        levels(6, pairs)
    path = [int(each) for each in str(error.value).rpartition(": ")[2].split(" > ")]
    assert path[0] == path[-1] and set(pairwise(path)) <= set(pairs)


# Losses


def loss_of(name: Any, rewards: torch.Tensor, pairs: list[tuple[int, int]], row: list[int], margin: Any = 0.0) -> Any:
    chosen, rejected = torch.tensor(pairs).T
    margins = torch.full((len(pairs),), margin) if isinstance(margin, float) else torch.tensor(margin)
    return preference_loss(name, rewards, chosen, rejected, margins, torch.tensor(row))


def test_bradley_terry_is_the_mean_of_each_row_then_over_rows() -> None:
    rewards = torch.tensor([1.0, 0.5, -0.2, 2.0, 3.0])
    pairs, margins = [(0, 1), (0, 2), (1, 2), (3, 4)], [0.5, 0.0, 1.0, 0.0]

    def cost(difference: float) -> float:
        return math.log1p(math.exp(-difference))

    first = (cost(0.5 - 0.5) + cost(1.2) + cost(0.7 - 1.0)) / 3
    found = loss_of("bradley-terry", rewards, pairs, [0, 0, 0, 1], margins)
    assert float(found) == pytest.approx((first + cost(-1.0)) / 2, abs=1e-6)
    each_alone = loss_of("bradley-terry", rewards, pairs, [0, 1, 2, 3], margins)
    assert float(each_alone) == pytest.approx((3 * first + cost(-1.0)) / 4, abs=1e-6)


def test_plackett_luce_is_the_likelihood_of_a_total_order() -> None:
    scores = [0.3, -1.0, 2.0, 0.5]
    weight = [math.exp(score) for score in scores]
    likelihood = 1.0
    for place in range(3):  # the last choice has no alternative
        likelihood *= weight[place] / sum(weight[place:])
    pairs = implied(4, [(0, 1), (1, 2), (2, 3)])
    found = loss_of("plackett-luce", torch.tensor(scores), pairs, [0] * len(pairs))
    assert float(found) == pytest.approx(-math.log(likelihood) / 3, abs=1e-6)


def test_plackett_luce_of_a_partial_order_compares_only_what_is_stated() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.0, 0.0])
    weight = scores.exp()
    pairs = [(0, 2), (0, 3), (1, 2), (1, 3), (4, 5)]  # two positives, two negatives; another row of two
    found = loss_of("plackett-luce", scores, pairs, [0, 0, 0, 0, 1])
    low = weight[2] + weight[3]
    first = -(torch.log(weight[0] / (weight[0] + low)) + torch.log(weight[1] / (weight[1] + low))) / 2
    second = -torch.log(weight[4] / (weight[4] + weight[5]))
    assert float(found) == pytest.approx(float(first + second) / 2, abs=1e-6)
    shared = loss_of("plackett-luce", scores, [(0, 2), (0, 3)], [0, 1])  # one input in two rows stays two choices
    apart = [loss_of("plackett-luce", scores, [pair], [0]) for pair in [(0, 2), (0, 3)]]
    assert float(shared) == pytest.approx(float(sum(apart)) / 2, abs=1e-6)


@pytest.mark.parametrize("name", ["bradley-terry", "plackett-luce", "listwise"])
def test_gradients_are_right_and_extreme_rewards_stay_finite(name: Any) -> None:
    pairs, row = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 2)], [0, 0, 0, 1, 1]
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: loss_of(name, each, pairs, row), rewards)
    loss_of(name, rewards, pairs, row).backward()
    assert rewards.grad is not None and rewards.grad[0] < 0 < rewards.grad[2]
    extreme = torch.tensor([-1e4, 0.0, 1e4, 5.0, -1e4], requires_grad=True)
    loss_of(name, extreme, pairs, row).backward()
    assert extreme.grad is not None and bool(extreme.grad.isfinite().all())


# Batches


def test_rows_of_unequal_size_are_forwarded_once_per_candidate(tmp_path: Path) -> None:
    rows = [
        adpo_row("gene", KEYS[:5]),
        adpo_row("protein", KEYS[:2], margins=[2.0]),
        adpo_row("gene", KEYS[3:], [(0, 1), (1, 2)]),
    ]
    data = encode_rows(read_rows(pair_sets.write(tmp_path / "rows.json", rows)), renderer())
    assert len(data) == 13 and data.starts.tolist() == [0, 10, 11, 13]
    expected = {"rows": 3, "candidates": 10, "inputs": 8, "total_orders": 3, "with_margin": 1, "queries": 2}
    assert {name: data.counts[name] for name in expected} == expected
    batch = PairCollator(data, 0, 64, 0.5)([{"row": i} for i in (2, 0, 1)])
    assert len(batch["input_ids"]) == 8 and batch["stated"] == 13  # "gene" has two keys in common
    assert batch["row"].tolist() == [0] * 2 + [1] * 10 + [2]
    assert batch["margin"].tolist() == [0.0] * 12 + [1.0]
    whole = PairCollator(data, 0, 64, 0.5, whole_order=True)([{"row": i} for i in (2, 0, 1)])
    assert whole["row"].tolist() == [0] * 3 + [1] * 10 + [2] and whole["stated"] == 13
    top = whole["chosen"][whole["row"] == 0]
    assert top.unique(return_counts=True)[1].tolist() == [2, 1] and not whole["margin"].any()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=30), st.integers(1, 7), st.integers(0, 3))
def test_every_row_is_drawn_once_an_epoch(sizes: list[int], batch: int, epoch: int) -> None:
    rows = [adpo_row(f"gene {i}", KEYS[:size]) for i, size in enumerate(sizes)]
    data = encode_rows(_as_rows(rows), renderer())
    sampler = PairSampler(data, batch, seed=1)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(sizes))) and list(sampler) == list(sampler)
    batches = [PairCollator(data, 0, 64, 1.0)([{"row": i} for i in part]) for part in _parts(list(sampler), batch)]
    assert sum(each["stated"] for each in batches) == sum(math.comb(size, 2) for size in sizes) == len(data)
    assert sum(len(each["input_ids"]) for each in batches) == sum(sizes)


def _as_rows(rows: list[dict[str, Any]]) -> Any:
    from rmsearch.trainer.ordered_rows import RawRow

    return [RawRow.model_validate(row).row for row in rows]


def _parts(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def test_what_is_equal_after_the_cut_is_set_aside(tmp_path: Path) -> None:
    long = "word " * 100
    rows = [
        adpo_row("gene", [long + "good", long + "bad", "market"]),
        adpo_row("gene", [long + "good", "price", long + "bad"]),  # now price is above and below the same tokens
    ]
    refused: list[str] = []
    path = pair_sets.write(tmp_path / "rows.json", rows)
    data = encode_rows(read_rows(path), renderer(24), lambda _, reason: refused.append(reason))
    assert data.counts["same_tokens"] == 2 and data.counts["circles"] == 1 and len(refused) == 3
    assert len(data) == 2 and data.counts["candidates"] == 2 and data.counts["read"] == 6
    assert len(set(data.chosen.tolist())) == 1


# Records


def test_upstream_rows_are_the_same_as_raw_ones(tmp_path: Path) -> None:
    rows = adpo_rows(5)
    raw = pair_sets.write(tmp_path / "raw.json", rows)
    chats = pair_sets.write(tmp_path / "chats.json", [as_chats(row) for row in rows])
    assert [row[:3] for row in read_rows(raw)] == [row[:3] for row in read_rows(chats)]
    for suffix in ("csv", "parquet"):
        for file, same in ((raw, rows), (chats, [as_chats(row) for row in rows])):
            write_records(str(tmp_path / f"rows.{suffix}"), same)
            assert list(read_rows(str(tmp_path / f"rows.{suffix}"))) == list(read_rows(file))
    assert peek_row_template([chats]) == "upstream_lora"
    assert peek_row_template([raw]) is None and peek_row_template([raw, chats]) is None


GOOD_ROW = adpo_row("q", ["a", "b", "c"])
UNKNOWN = [{"role": "user", "content": "whatever"}]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (adpo_row("q", ["a", "b"], [(0, 1), (1, 0)]), "in a circle: 0 > 1 > 0"),
        (adpo_row("q", ["a", "b", "a"], [(0, 1), (1, 2)]), "in a circle"),
        (adpo_row("q", ["a", "b"], [(0, 2)]), "does not fit a batch of 2"),
        (adpo_row("q", ["a", "b"], [(0, -1)]), "does not fit a batch of 2"),
        (adpo_row("q", ["a", "b"], [(0, 0)]), "does not fit a batch of 2"),
        (adpo_row("q", ["a", "b", "a"], [(0, 2)]), "are the same text"),
        (adpo_row("q", ["a", "b"], margins=[1.0, 2.0]), "2 margins, but 1 dpo_pairs"),
        (adpo_row("q", ["a", "b"], []), "dpo_pairs"),
        (adpo_row("q", ["a"], [(0, 0)]), "batch"),
        ({"query": "q", "chosen_key": "a", "rejected_key": "b"}, "batch: Field required"),
        (as_chats(GOOD_ROW), "in one form"),
        (GOOD_ROW | {"batch": [{"query": "q"}, {"query": "q", "key": "b"}]}, "neither query and key nor msg"),
    ],
)
@pytest.mark.parametrize(("suffix", "number"), [("json", 2), ("jsonl", 3)])
def test_bad_rows_are_refused_with_file_and_row(
    tmp_path: Path, row: dict[str, Any], problem: str, suffix: str, number: int
) -> None:
    rows, path = [GOOD_ROW, GOOD_ROW, row], tmp_path / f"bad.{suffix}"
    path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(RecordError, match=problem) as error:
        list(read_rows(str(path)))
    assert f"bad.{suffix}:{number}" in str(error.value) and "\n" not in str(error.value)


def test_chats_that_cannot_be_taken_apart_are_refused(tmp_path: Path) -> None:
    chats = as_chats(GOOD_ROW)
    unknown = chats | {"batch": [{"msg": UNKNOWN}, *chats["batch"][1:]]}
    with pytest.raises(RecordError, match=r"chats.json:1: .*no known prompt"):
        list(read_rows(pair_sets.write(tmp_path / "chats.json", [chats, unknown])))
    answers = [[*UNKNOWN, {"role": "assistant", "content": text}] for text in ("b", "c")]
    mixed = chats | {"batch": [chats["batch"][0], *({"msg": answer} for answer in answers)]}
    with pytest.raises(RecordError, match="different prompts"):
        list(read_rows(pair_sets.write(tmp_path / "mixed.json", [mixed])))


def test_files_that_hold_no_rows_are_refused(encoder: str, tmp_path: Path) -> None:
    cases = {"holds no rows": [], "Train with `rmsearch train lora`": pair_sets.pairs(2)}
    for problem, rows in cases.items():
        train = pair_sets.write(tmp_path / "train.json", rows)
        with pytest.raises(RecordError, match=problem):
            execute(adpo_lora, dataset_list_train=train, model_name=encoder, output_dir=str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


# Whole runs


@pytest.mark.parametrize("loss", ["bradley-terry", "plackett-luce"])
def test_it_learns_from_rows_with_few_forward_passes(encoder: str, tmp_path: Path, loss: str) -> None:
    rows, held_out = adpo_rows(36), [as_chats(row) for row in adpo_rows(12, seed=1)]
    train = pair_sets.write(tmp_path / "train.json", rows)
    test = pair_sets.write(tmp_path / "test.json", held_out)
    files = {"dataset_list_train": train, "dataset_list_test": test}
    out = tmp_path / "model"
    run = execute(adpo_lora, model_name=encoder, output_dir=str(out), loss=loss, **files, **FAST)
    assert run.counts["accuracy_after"] >= 0.9 > run.counts["accuracy_before"]
    candidates = sum(len(row["batch"]) for row in rows)
    stated = sum(len(row["dpo_pairs"]) for row in rows)
    assert run.counts["rows"] == 36 and run.counts["pairs"] == stated and run.counts["steps"] == 36
    assert run.counts["forwards_per_pair"] == round(candidates / stated, 4)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert all(0.3 < each["forwards_per_pair"] <= 0.7 for each in history if "loss" in each)
    assert {"model.safetensors", "adapter", "rmsearch.json", "checkpoint-36"} <= {p.name for p in out.iterdir()}
    if loss == "bradley-terry":
        standard = pair_sets.write(tmp_path / "pairs.json", as_pairs(rows))
        options = FAST | {"max_steps": 10, "per_device_train_batch_size": 16}
        base = execute(
            lora, dataset_list_train=standard, model_name=encoder, output_dir=str(tmp_path / "pairs"), **options
        )
        assert run.counts["forwards_per_pair"] <= 0.5 * float(base.counts["forwards_per_pair"])


def test_margins_raise_the_loss_and_losses_of_pairs_are_refused(encoder: str, tmp_path: Path) -> None:
    rows = [row | {"margins": [3.0] * len(row["dpo_pairs"])} for row in adpo_rows(4)]
    train = pair_sets.write(tmp_path / "train.json", rows)
    losses = []
    for scale in (0.0, 1.0):
        out = tmp_path / f"margin{scale}"
        options = FAST | {"max_steps": 1, "margin_scale": scale}
        run = execute(adpo_lora, dataset_list_train=train, model_name=encoder, output_dir=str(out), **options)
        assert run.notes["train"]["with_margin"] == run.counts["pairs"]
        losses.append(json.loads((out / "trainer_state.json").read_text())["log_history"][0]["loss"])
    assert losses[1] > losses[0] + 0.5
    for stage, other in ((adpo_lora, "listwise"), (lora, "plackett-luce")):
        with pytest.raises(ConfigError, match="loss"):
            execute(stage, dataset_list_train=train, model_name=encoder, loss=other)


def test_too_many_useless_pairs_fail(encoder: str, tmp_path: Path) -> None:
    long = "word " * 100
    train = pair_sets.write(tmp_path / "train.json", [adpo_row("q", [long + "a", long + "b"]), *adpo_rows(3)])
    out = tmp_path / "model"
    with pytest.raises(RejectedError, match="same tokens"):
        execute(adpo_lora, dataset_list_train=train, model_name=encoder, output_dir=str(out), max_length=32, **FAST)
    assert not out.exists()


def test_the_documented_command_goes_on_after_a_kill(encoder: str, tmp_path: Path) -> None:
    train = pair_sets.write(tmp_path / "train.json", [as_chats(row) for row in adpo_rows(16)])
    test = pair_sets.write(tmp_path / "test.json", [as_chats(row) for row in adpo_rows(6, seed=1)])
    options = f"""
      --dataset-list-train {train}
      --dataset-list-test {test}
      --model-name {encoder}
      --wandb-run-name exp2-adpo-lora
      --max-length 1000 --max-characters 2000 --per-device-train-batch-size 2 --per-device-eval-batch-size 2
      --evaluation-steps 4 --save-steps 4 --logging-steps 1 --num-train-epochs 8 --load-in-8bit
      --loss plackett-luce --lora-dropout 0.1 --learning-rate 5e-3 --dtype fp32
    """.split()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_command(adpo_lora, [*options, "--output-dir", str(whole)]) == 0
    command = [sys.executable, "-m", "rmsearch.train.adpo_lora_example", *options, "--output-dir", str(broken)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    marker, limit = broken / "checkpoint-8" / "rmsearch_checkpoint.json", time.monotonic() + 240
    while not marker.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert marker.exists() and not (broken / "rmsearch.json").exists()
    assert run_command(adpo_lora, [*options, "--output-dir", str(broken)]) == 0
    assert json.loads(Path(f"{broken}.run.json").read_text())["notes"]["resumed_at_step"] >= 8
    assert _weights(whole) == _weights(broken)
    assert _history(whole) == _history(broken)


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def _history(folder: Path) -> list[dict[str, Any]]:
    """What was logged at each step, without times."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("step", "loss", "accuracy", "forwards_per_pair", "eval_accuracy", "eval_loss")
    return [{name: each.get(name) for name in names} for each in entries if "runtime" not in str(each)]
