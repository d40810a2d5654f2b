"""A uniform sample of a stream whose length nobody knows, kept on disk."""

from __future__ import annotations

import math
import os
import random
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from rmsearch.storage.local import local_errors


@contextmanager
def reservoir(size: int, seed: int) -> Iterator[Reservoir]:
    """A `Reservoir` with a temporary file that lives as long as the block."""
    with tempfile.TemporaryFile() as file:
        yield Reservoir(size, seed, cast(BinaryIO, file))


class Reservoir:
    """``size`` items of a stream, every set of them equally likely; the same seed takes the same positions.

    Algorithm L (Li 1994, doi:10.1145/198429.198435): it draws how many items to skip, not a number for each. Memory is
    16 bytes per item of the sample; the file holds every item that was ever taken, about size * (1 + ln(n / size)).
    """

    def __init__(self, size: int, seed: int, file: BinaryIO) -> None:
        self.size, self.seen = size, 0
        self._random, self._file = random.Random(seed), file
        self._starts, self._lengths = array("Q"), array("Q")
        self._end = 0
        self._weight = 1.0
        self._next = size - 1  # the position after which a slot is first replaced
        self._skip()

    def slot(self) -> int | None:
        """Count one item of the stream; returns the slot to `put` it into, or None when the sample goes without it."""
        position, self.seen = self.seen, self.seen + 1
        if position < self.size:
            return position
        if position != self._next:
            return None
        self._skip()
        return self._random.randrange(self.size)

    def put(self, slot: int, item: bytes) -> None:
        """Keep an item in the slot that `slot` gave."""
        with local_errors(tempfile.gettempdir()):  # it may be full
            self._file.write(item)
        if slot == len(self._starts):
            self._starts.append(self._end)
            self._lengths.append(len(item))
        else:
            self._starts[slot], self._lengths[slot] = self._end, len(item)
        self._end += len(item)

    def items(self, *, shuffled: bool = False) -> Iterator[bytes]:
        """The sample in the order of the stream, or in a random one."""
        self._file.flush()
        order = sorted(range(len(self._starts)), key=self._starts.__getitem__)
        if shuffled:
            self._random.shuffle(order)
        for slot in order:
            yield os.pread(self._file.fileno(), self._lengths[slot], self._starts[slot])

    def _skip(self) -> None:
        self._weight *= math.exp(math.log(1 - self._random.random()) / self.size)
        if self._weight >= 1:  # rounded up: nothing is skipped
            self._next += 1
            return
        self._next += 1 + math.floor(math.log(1 - self._random.random()) / math.log1p(-self._weight))
