"""Starting vLLM from any program: environment, broken optional packages, spawned processes.

This module is also what vLLM's spawned processes import in the place of the user's main script.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator

from rmsearch.cores import free_cores, spare_cores
from rmsearch.errors import MissingExtraError

OPTIONAL_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # torch and the tokenizers have threads, which a fork would break
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def hide_broken_packages() -> None:
    """Makes packages that are installed but fail to load look absent, which transformers and vLLM can do without.

    CUDA builds of torchvision and its like, beside a CPU build of torch, raise RuntimeError or OSError on import.
    """
    for name in OPTIONAL_PACKAGES:
        if name in sys.modules or importlib.util.find_spec(name) is None:
            continue
        try:
            __import__(name)
        except (RuntimeError, OSError, ImportError, AttributeError):
            sys.modules[name] = None  # type: ignore[assignment]


def prepare() -> bool:
    """Readies this process for vLLM; returns whether vLLM runs on the CPU. MissingExtraError without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
    spare_cores()
    hide_broken_packages()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


@contextlib.contextmanager
def spawning(on_cpu: bool) -> Iterator[None]:
    """While it lasts, spawned processes import this module as their main one, and get all cores of a CPU.

    A spawned process imports its parent's main script, so a script without a main guard would start itself over and
    over; and optional packages must be hidden there before anything else is imported.
    """
    main = sys.modules["__main__"]
    before = main.__spec__
    wanted = {} if not on_cpu else CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(free_cores().number)}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    main.__spec__ = importlib.machinery.ModuleSpec("rmsearch.engines.vllm_start", None)
    try:
        yield
    finally:
        main.__spec__ = before
        for name in added:
            os.environ.pop(name, None)


def end_with_parent() -> None:
    """Asks Linux to end this process when the one that started it is gone, even by SIGKILL.

    vLLM's processes would live on otherwise, and hold their memory and their GPUs.
    """
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__mp_main__":
    hide_broken_packages()
    end_with_parent()
