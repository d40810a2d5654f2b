"""Which pairs go into a batch, and the batch as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rmsearch.train.data import Encoded

_CHUNK = 32  # batches that are sorted by length together
PAD_MULTIPLE = 8


def pair_order(groups: np.ndarray, lengths: np.ndarray, batch: int, seed: int, epoch: int) -> np.ndarray:
    """An order of the pairs, int64[n], to be cut into batches of ``batch``; the same for the same seed and epoch.

    Pairs of a group stay together (one forward pass serves their shared inputs). Groups are shuffled, then sorted by
    length inside chunks of 32 batches, and the batches are shuffled, so that little is padding.
    groups: int64[n]; lengths: int64[n], tokens of the longer input of each pair.
    """
    rng = np.random.default_rng((seed, epoch))
    _, group = np.unique(groups, return_inverse=True)
    place = rng.permutation(group.max() + 1)[group]
    order = np.argsort(place, kind="stable")
    longest = np.zeros(group.max() + 1, np.int64)
    np.maximum.at(longest, group, lengths)
    chunks = []
    for start in range(0, len(order), batch * _CHUNK):
        chunk = order[start : start + batch * _CHUNK]
        chunks.append(chunk[np.lexsort((place[chunk], longest[group[chunk]]))])
    order = np.concatenate(chunks)
    whole = len(order) // batch * batch
    shuffled = rng.permutation(order[:whole].reshape(-1, batch)).reshape(-1)
    return np.concatenate([shuffled, order[whole:]])


class PairSampler:
    """Positions of pairs, epoch by epoch; what `torch.utils.data.DataLoader` takes as a sampler."""

    def __init__(self, data: Encoded, batch: int, seed: int) -> None:
        self._groups, self._batch, self._seed, self.epoch = data.group, batch, seed, 0
        lengths = data.lengths
        self._lengths = np.maximum(lengths[data.chosen], lengths[data.rejected])

    def __len__(self) -> int:
        return len(self._groups)

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch, also after resuming in the middle of one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(pair_order(self._groups, self._lengths, self._batch, self._seed, self.epoch).tolist())


class PairCollator:
    """Rows ``{"row": position}`` to tensors: input_ids and attention_mask int64[m, length] of the m distinct inputs,
    chosen and rejected int64[n] (positions among the m), margin float32[n]."""

    def __init__(self, data: Encoded, pad_token_id: int, limit: int, margin_scale: float) -> None:
        self._data, self._pad, self._limit, self._scale = data, pad_token_id, limit, margin_scale

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        import torch

        data, picked = self._data, np.fromiter((row["row"] for row in rows), np.int64, len(rows))
        both = np.concatenate([data.chosen[picked], data.rejected[picked]])
        distinct, place = np.unique(both, return_inverse=True)
        batch = padded([data.inputs[i] for i in distinct], self._pad, self._limit)
        pair_tensors = {
            "chosen": torch.from_numpy(place[: len(rows)]),
            "rejected": torch.from_numpy(place[len(rows) :]),
            "margin": torch.from_numpy(data.margin[picked] * np.float32(self._scale)),
        }
        return batch | pair_tensors


def padded(inputs: Sequence[np.ndarray], pad: int, limit: int) -> dict[str, Any]:
    """input_ids and attention_mask, torch int64[m, length], filled up on the right to a multiple of 8 tokens (which
    matrix units like) within ``limit``, the model's positions."""
    import torch

    longest = max(map(len, inputs))
    longest = max(longest, min(longest + -longest % PAD_MULTIPLE, limit))
    ids = np.full((len(inputs), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(inputs):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
