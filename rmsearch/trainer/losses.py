"""Losses over the pairs of a batch: torch functions of rewards, means over pairs, or over rows of candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

PairLoss = Literal["bradley-terry", "listwise", "margin-mse", "soft"]
OrderLoss = Literal["bradley-terry", "plackett-luce"]
Loss = PairLoss | OrderLoss


def preference_loss(
    loss: Loss, rewards: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor, row: Tensor | None = None
) -> Tensor:
    """The scalar loss of a batch.

    rewards: float32[m], one per distinct input; chosen, rejected: int64[n], positions in rewards; margin: float32[n];
    row: int64[n], the row that each pair is from, 0 … r - 1: then the mean over pairs is one per row and then over
    rows, so that a long list of candidates weighs no more than a short one. None: every pair is its own row.

    bradley-terry: -log sigmoid(chosen - rejected - margin), as TRL's RewardTrainer (Llama 2, 2023, eq. 2).
    margin-mse: (chosen - rejected - margin)² / 2, the margin being a teacher's difference (Hofstätter et al. 2020).
    soft: cross-entropy against the teacher's probability sigmoid(margin).
    listwise: -log softmax of the chosen one among itself and its rejected ones, each raised by its margin; the mean is
    over chosen inputs (Plackett-Luce's first choice; the cross-entropy over groups of rerankers).
    plackett-luce: each candidate c with rewards s is chosen before all those B(c) that its row ranks below it, which
    costs log(exp s_c + Σ_{d in B(c)} exp s_d) - s_c, unless B(c) is empty; the mean of these choices per row, then over
    rows. ``chosen`` and ``rejected`` must hold all pairs that follow from the row's
    (`rmsearch.preferences.orders.implied`).
    For a total order the sum of the choices is -log P(ranking) of Luce (1959) and Plackett (1975), ListMLE's loss (Xia
    et al. 2008). A partial order makes no choice between candidates that it does not compare: on every level each one
    is chosen against its own rejected ones. Margins are not used.
    """
    import torch
    import torch.nn.functional as F

    if loss == "plackett-luce":
        row = row if row is not None else torch.arange(len(chosen), device=chosen.device)
        best, list_of = (row * len(rewards) + chosen).unique(return_inverse=True)
        return _row_mean(_choices(rewards[best % len(rewards)], rewards[rejected], list_of), best // len(rewards))
    if loss == "listwise":
        best, list_of = chosen.unique(return_inverse=True)
        return _choices(rewards[best], rewards[rejected] + margin, list_of).mean()
    difference = rewards[chosen] - rewards[rejected]
    if loss == "bradley-terry":
        each = -F.logsigmoid(difference - margin)
    elif loss == "margin-mse":
        each = (difference - margin).square() / 2
    else:
        each = F.binary_cross_entropy_with_logits(difference, margin.sigmoid(), reduction="none")
    return each.mean() if row is None else _row_mean(each, row)


def _row_mean(values: Tensor, row: Tensor) -> Tensor:
    """The mean over rows of the mean of each row's values. row: int64[len(values)], 0 … r - 1, all of them there."""
    count = row.bincount()
    return (values.new_zeros(len(count)).index_add(0, row, values) / count).mean()


def _choices(best: Tensor, rivals: Tensor, list_of: Tensor) -> Tensor:
    """-log softmax of each list's best among itself and its rivals. best: float32[k]; rivals: float32[n]; list_of:
    int64[n], the list of each rival. Memory grows with n, not with k x n."""
    top = best.detach().scatter_reduce(0, list_of, rivals.detach(), "amax")
    total = (best - top).exp().index_add(0, list_of, (rivals - top[list_of]).exp())
    return top + total.log() - best
