"""``rmsearch doctor``: what this machine can do, one line per fact, each with a remedy where something is amiss."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from rmsearch.cli import main
from rmsearch.errors import ConfigError, InputMissingError, RetryableError, RMSearchError
from rmsearch.machine import Line, machine_lines, package_lines, torch_lines
from rmsearch.models.folder import ADAPTER_FILE, PACKAGED, PACKAGED_NAMES, ModelFolder, is_model_file, open_model
from rmsearch.models.resolve import resolve_contract
from rmsearch.stage import Run, StageConfig, option, stage
from rmsearch.storage import s3
from rmsearch.storage import uri as uris


class DoctorConfig(StageConfig):
    """What to look at beside the machine."""

    model: list[str] = option([], "A model folder, s3:// URI or name to check; may be repeated.")
    s3: str | None = option(None, "s3://bucket to list, or s3://bucket/prefix to list, write, read and clean up.")
    deep: bool = option(False, "Really import transformers, TRL and vLLM (in a subprocess; 20 seconds and more).")
    json_: bool = option(False, "Print one JSON document instead of lines.")


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
        for lines in pool.map(lambda check: check(), checks):
            yield from lines


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


def minilm_lines() -> list[Line]:
    """The embedding model that comes as a package."""
    try:
        return [Line("ok", "minilm", f"{open_model(PACKAGED)}, weights verified")]
    except RMSearchError as error:
        return [Line("warn", "minilm", error.problem, error.remedy)]


# ---- S3


def s3_lines(uri: str | None) -> list[Line]:
    """Credentials, and, for a URI, whether its endpoint answers, the bucket lists and a prefix can be written."""
    if uri is None:
        settings = ", ".join(sorted(name for name in os.environ if name.startswith("AWS_")))
        found = f"{settings} set, not tried" if settings else "no AWS_* settings; only s3:// paths need them"
        return [Line("ok", "s3", found)]
    try:
        if not uris.is_s3(uri):
            raise ConfigError("is no S3 URI", where=uri, remedy="Write s3://bucket or s3://bucket/prefix")
        with _few_attempts():
            return list(_s3_checks(uri.rstrip("/")))
    except RMSearchError as error:
        return [failure("s3", error)]


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
    _, prefix = s3.split(uri, key_needed=False)
    yield _credentials_line()
    try:
        count = sum(1 for _ in islice(s3.list_objects(uri, page=10), 10))
    except RMSearchError as error:
        yield failure("s3 list", error)
        return
    yield Line(
        "ok", "s3 list", f"{uri}: the store answers, {count if count < 10 else '10 or more'} objects", asked=True
    )
    if prefix:
        yield _write_line(uri)


def _credentials_line() -> Line:
    """Where credentials come from; never what they are."""
    import boto3
    from botocore.exceptions import BotoCoreError

    endpoint = re.sub(
        r"//[^/@]*@", "//", os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    )
    remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or a service account"
    try:
        credentials = boto3.session.Session().get_credentials()
    except BotoCoreError as error:
        return Line("fail", "s3 credentials", type(error).__name__, remedy, asked=True)
    if credentials is None:
        return Line("fail", "s3 credentials", f"none found for {endpoint}", remedy, asked=True)
    return Line("ok", "s3 credentials", f"from {credentials.method}, for {endpoint}", asked=True)


def _write_line(uri: str) -> Line:
    """Writes, reads and removes one small object below the prefix."""
    probe_uri = uris.join(uri, f".rmsearch-doctor-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with contextlib.ExitStack() as after:
            after.callback(uris.remove, probe_uri)
            uris.put_if_absent(probe_uri, b"rmsearch doctor")
            same = after.enter_context(uris.reader(probe_uri)).read() == b"rmsearch doctor"
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
            remedy = "Download it where the network is, and give the folder"
            return [Line("warn", what, "not a folder here; a hub's name, looked up at first use", remedy, asked=True)]
        with _small_copy(name) as folder:
            return [_model_line(what, ModelFolder(folder, name))]
    except RMSearchError as error:
        return [failure(what, error)]


def _hub_name(name: str) -> bool:
    """Whether only a model hub could know this name: it is no S3 URI, folder, path or packaged model."""
    path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    return not (uris.is_s3(name) or uris.exists(name) or path or name in PACKAGED_NAMES)


@contextlib.contextmanager
def _small_copy(name: str) -> Iterator[Path]:
    """The model's folder; of one on S3 a copy without the weights themselves (headers only)."""
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
    with uris.reader(uri) as stream:
        if not uri.endswith(".safetensors"):
            target.write_bytes(stream.read())
            return
        size = stream.read(8)
        target.write_bytes(size + stream.read(min(int.from_bytes(size, "little"), 100 << 20)))


def _model_line(what: str, folder: ModelFolder) -> Line:
    """What the model is good for; raises the errors that using it would raise."""
    if (folder.path / ADAPTER_FILE).exists():
        base = folder.json_file(ADAPTER_FILE).get("base_model_name_or_path")
        return Line("ok", what, f"LoRA adapter of {base}", asked=True)
    if not (folder.path / "tokenizer.json").exists():
        remedy = "Save the tokenizer into the folder"
        raise InputMissingError("there is no tokenizer.json", where=folder.where, remedy=remedy)
    facts = folder.facts
    if not facts.classifier:
        return _other_model_line(what, folder)
    if not folder.has_head:
        remedy = "Train it (`rmsearch train lora`), or export it with its head"
        return Line("fail", what, f"{facts.architecture} without the weights of its head", remedy, asked=True)
    contract = resolve_contract(folder)
    found = f"reward model, {contract.architecture}, template {contract.template.name}, {contract.max_length} tokens"
    if contract.inferred and not facts.encoder:  # encoders have one pair form of their own
        remedy = "If it was trained with another template, name that when you use it; else scores are useless"
        return Line("warn", what, f"{found}; no rmsearch.json, so the template is a guess", remedy, asked=True)
    return Line("ok", what, found, asked=True)


def _other_model_line(what: str, folder: ModelFolder) -> Line:
    architecture = folder.facts.architecture
    if (folder.path / "modules.json").exists() or folder.facts.encoder:
        return Line("ok", what, f"embedding model, {architecture}", asked=True)
    if folder.score_file.exists():
        return Line("ok", what, f"{architecture} with upstream's score.pt", asked=True)
    remedy = "To score with it, name its template if it is a yes/no reranker, or train a head"
    return Line("warn", what, f"{architecture}: a generator, without a reward head", remedy, asked=True)


if __name__ == "__main__":
    main(doctor)
