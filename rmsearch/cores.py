"""How many cores are free to this process: its affinity, its cgroup's quota, OMP_NUM_THREADS."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


class Cores(NamedTuple):
    """A number of cores, and what sets it."""

    number: int
    source: str


def free_cores() -> Cores:
    """Cores that the process may use at a time: OMP_NUM_THREADS as the user set it, else the least of what affinity and
    the CPU quotas of its cgroups allow, at least one."""
    with contextlib.suppress(ValueError):
        if (asked := int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])) > 0:
            return Cores(asked, "OMP_NUM_THREADS")
    found = [Cores(len(os.sched_getaffinity(0)), "affinity")]
    found += [Cores(max(1, math.floor(quota)), f"CPU quota of {file}") for quota, file in _quotas()]
    return min(found, key=lambda each: each.number)


def spare_cores() -> None:
    """Have the threads of torch sleep where they would spin until the slowest is done: on a busy machine spinning took
    two thirds of the time (two cores, MiniLM). Call before torch is imported; a value of the user's stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_free_cores() -> None:
    """Let torch and the tokenizers have no more threads than cores are free to this process: more would only wait for
    each other. Fewer, where the program chose so, stay."""
    import torch

    cores = free_cores().number
    os.environ.setdefault("RAYON_NUM_THREADS", str(cores))
    if cores < torch.get_num_threads():
        torch.set_num_threads(cores)


def _quotas() -> Iterator[tuple[float, Path]]:
    """(cores, file) of each quota that holds for the process: its cgroups' and those above them, versions 1 and 2."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, files = CGROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            top = next((CGROUPS / name for name in (controllers, "cpu") if (CGROUPS / name).is_dir()), CGROUPS)
            files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        folder = top / path.strip("/")
        for each in [folder, *folder.parents]:
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quota, period, *_ = " ".join((each / file).read_text() for file in files).split()
                if float(quota) > 0:  # "max" and -1 are none
                    yield float(quota) / float(period), each / files[0]
            if each == top:
                break
