"""Losses over the pairs of a batch: torch functions of rewards, all means over pairs (or over lists)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Loss = Literal["bradley-terry", "listwise", "margin-mse", "soft"]


def preference_loss(loss: Loss, rewards: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """The scalar loss of a batch.

    rewards: float32[m], one per distinct input; chosen, rejected: int64[n], positions in rewards; margin: float32[n].

    bradley-terry: -log sigmoid(chosen - rejected - margin), as TRL's RewardTrainer (Llama 2, 2023, eq. 2).
    listwise: -log softmax of the chosen one among itself and its rejected ones, each raised by its margin; the mean is
    over chosen inputs (Plackett-Luce's first choice; the cross-entropy over groups of rerankers).
    margin-mse: (chosen - rejected - margin)² / 2, the margin being a teacher's difference (Hofstätter et al. 2020).
    soft: cross-entropy against the teacher's probability sigmoid(margin).
    """
    import torch.nn.functional as F

    difference = rewards[chosen] - rewards[rejected]
    if loss == "bradley-terry":
        return -F.logsigmoid(difference - margin).mean()
    if loss == "margin-mse":
        return (difference - margin).square().mean() / 2
    if loss == "soft":
        return F.binary_cross_entropy_with_logits(difference, margin.sigmoid())
    return _listwise(rewards, chosen, rejected, margin)


def _listwise(rewards: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    import torch

    best, list_of = chosen.unique(return_inverse=True)
    rival = torch.full((len(best), len(chosen)), float("-inf"), dtype=rewards.dtype, device=rewards.device)
    columns = torch.arange(len(chosen), device=rewards.device)
    rival = rival.index_put((list_of, columns), rewards[rejected] + margin)
    everyone = torch.cat([rewards[best][:, None], rival], dim=1)
    return (everyone.logsumexp(dim=1) - rewards[best]).mean()
