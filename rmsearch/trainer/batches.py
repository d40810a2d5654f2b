"""Which pairs go into a batch, and the batch as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rmsearch.preferences.orders import implied
from rmsearch.trainer.data import Encoded

_CHUNK = 32  # batches that are sorted by length together
PAD_MULTIPLE = 8


def pair_order(groups: np.ndarray, lengths: np.ndarray, batch: int, seed: int, epoch: int) -> np.ndarray:
    """An order of the rows, int64[n], to be cut into batches of ``batch``; the same for the same seed and epoch.

    Rows (pairs, mostly) of a group stay together: one forward pass serves their shared inputs. Groups are shuffled,
    then sorted by length inside chunks of 32 batches, and the batches are shuffled, so that little is padding.
    groups: int64[n]; lengths: int64[n], tokens of the longest input of each row.
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
    """Positions of rows, epoch by epoch; what `torch.utils.data.DataLoader` takes as a sampler. A row is what goes into
    a batch whole: one pair, or a list of candidates with all of its pairs."""

    def __init__(self, data: Encoded, batch: int, seed: int) -> None:
        self._batch, self._seed, self.epoch = batch, seed, 0
        first, lengths = data.starts[:-1], data.lengths
        self._groups = data.group[first]
        self._lengths = np.maximum.reduceat(np.maximum(lengths[data.chosen], lengths[data.rejected]), first)

    def __len__(self) -> int:
        return len(self._groups)

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch, also after resuming in the middle of one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(pair_order(self._groups, self._lengths, self._batch, self._seed, self.epoch).tolist())


class PairCollator:
    """Rows ``{"row": position}`` to tensors: input_ids and attention_mask int64[m, length] of the m distinct inputs,
    chosen and rejected int64[n] (positions among the m), margin float32[n], row int64[n] (each pair's row, counted from
    0 in the batch), and ``stated``, how many pairs the data states.

    ``whole_order`` adds the pairs that follow from those of a row, without margins; else n is ``stated``.
    """

    def __init__(
        self, data: Encoded, pad_token_id: int, limit: int, margin_scale: float, *, whole_order: bool = False
    ) -> None:
        self._data, self._pad, self._limit, self._scale = data, pad_token_id, limit, margin_scale
        self._starts, self._whole_order = data.starts, whole_order

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        import torch

        data, starts = self._data, self._starts
        spans = [np.arange(starts[row["row"]], starts[row["row"] + 1]) for row in rows]
        picked, row = np.concatenate(spans), np.repeat(np.arange(len(rows)), [len(span) for span in spans])
        chosen, rejected = data.chosen[picked], data.rejected[picked]
        margin = data.margin[picked] * np.float32(self._scale)
        if self._whole_order:
            chosen, rejected, row = _whole_order(chosen, rejected, row)
            margin = np.zeros(len(chosen), np.float32)
        distinct, place = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)
        batch = padded([data.inputs[i] for i in distinct], self._pad, self._limit)
        pair_tensors = {
            "chosen": torch.from_numpy(place[: len(chosen)]),
            "rejected": torch.from_numpy(place[len(chosen) :]),
            "margin": torch.from_numpy(margin),
            "row": torch.from_numpy(row),
        }
        return {**batch, **pair_tensors, "stated": len(picked)}


def _whole_order(chosen: np.ndarray, rejected: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, ...]:
    """Chosen, rejected and row of all pairs that the pairs of each row imply."""
    parts = []
    for number in range(row[-1] + 1):
        own = row == number
        members, place = np.unique(np.concatenate([chosen[own], rejected[own]]), return_inverse=True)
        pairs = np.asarray(implied(len(members), list(zip(*place.reshape(2, -1).tolist(), strict=True))))
        parts.append((members[pairs[:, 0]], members[pairs[:, 1]], np.full(len(pairs), number)))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


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
