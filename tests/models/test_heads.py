"""Adapters merged into bfloat16 weights."""

from __future__ import annotations

import torch

from rmsearch.models.heads import rounded_at_random


def test_small_updates_of_bfloat16_weights_are_kept_in_the_mean() -> None:
    draws = torch.Generator().manual_seed(1)
    base = torch.randn(200_000, generator=draws).bfloat16().float()
    step = (base.bfloat16().view(torch.int16) + 1).view(torch.bfloat16).float() - base  # to the next value, away from 0
    update = 0.1 * step
    assert torch.equal((base + update).bfloat16().float(), base)  # to the nearest: all of it is lost
    rounded = rounded_at_random(base + update, draws)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert bool(((rounded == base) | (rounded == base + step)).all())
    assert abs(float(((rounded - base) / step).mean()) - 0.1) < 0.005  # seven standard errors


def test_bfloat16_values_stay_as_they_are() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), -float("inf"), 1e-38]).bfloat16().float()
    assert torch.equal(rounded_at_random(torch.cat([values, torch.tensor([0.1])]), torch.Generator())[:-1], values)
