"""``rmsearch GROUP STAGE …``, the same as ``python -m rmsearch.GROUP.STAGE …``: flags, environment, YAML, exit codes.

cyclopts makes the flags of a stage's config. Here stand the stages' names, the look of the help and errors as one line.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, env_var_split
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict, Env
from pydantic import ValidationError

from rmsearch import __version__
from rmsearch.errors import EXIT_BUG, EXIT_DONE, ConfigError, RMSearchError
from rmsearch.interrupts import run_stoppably
from rmsearch.stage import Stage, StageConfig, execute, explain_validation
from rmsearch.storage import uri

# group -> stage -> one line of help; the modules load only when they are run
STAGES: dict[str, dict[str, str]] = {
    "train": {
        "process_data": "Make a corpus of a hub data set, files or a folder of texts.",
        "make_query_recs": "Have a language model write queries for every row of a corpus.",
        "filter_query_recs": "Keep queries by type, language, length, novelty and answerability.",
        "get_top_relevant_keys_embed": "Find each query's nearest keys with an embedding model.",
        "get_top_relevant_keys_rm": "Find or re-score each query's keys with a reward model.",
        "sample_dpo_batch": "Sample the keys of each query that are to be judged against each other.",
        "judge_dataset": "Judge sampled sets into preference pairs: language model, reward model or labels.",
        "make_query_and_less_relevant_keys_recs": "Have a language model write keys that serve a query less and less.",
        "make_query_dpo_pairs": "Have a language model write queries that a key serves less and less.",
        "sample_advanced_dpo_batch": "Sample negatives beside the keys that correspond to each query.",
        "judge_adpo_dataset": "Judge structured sets into batches with explicit preferences.",
        "make_test_set": "Make query records and test pairs of a labelled data set.",
        "mine": "Mine hard negatives of a labelled data set and write preference pairs.",
        "inspect": "Write an HTML page about preference sets, with checks.",
        "lora": "Train a LoRA reward model on preference pairs.",
        "adpo_lora": "Train a LoRA reward model on explicit orders (advanced DPO).",
    },
    "evaluation": {
        "bm25": "Rank the corpus with BM25.",
        "embed": "Rank the corpus with an embedding model.",
        "rerank": "Rerank candidates with a reward model.",
        "ndcg": "Score runs with nDCG, MAP, MRR, recall and precision, with significance tests.",
        "report": "Write one HTML page that compares runs.",
        "convert": "Merge adapters, convert rerankers and upstream's folders; verify the scores.",
    },
}


QUIET: dict[str, Any] = {
    "result_action": "return_value",
    "exit_on_error": False,
    "print_error": False,
    "suppress_keyboard_interrupt": False,
}


def main(stage: Stage[Any] | None = None) -> None:
    """Entry point of ``rmsearch``, and with a stage of ``python -m rmsearch.GROUP.STAGE``."""
    here = str(Path(__file__).parent)
    if here in sys.path:  # a file of this folder was run: do not let rmsearch's modules shadow others
        sys.path.remove(here)
    raise SystemExit(run_command(stage, sys.argv[1:]) if stage else run_rmsearch(sys.argv[1:]))


def load_stage(group: str, name: str) -> Stage[Any]:
    """The stage object of ``rmsearch.GROUP.NAME``."""
    return _load(f"rmsearch.{group}.{name}")


def _load(module: str) -> Stage[Any]:
    loaded: Stage[Any] = getattr(import_module(module), module.rpartition(".")[2])
    return loaded


def run_rmsearch(arguments: Sequence[str]) -> int:
    """Run ``rmsearch`` with these arguments; returns the exit code."""

    def run() -> None:
        if called := _parsed(rmsearch_app(), arguments or ["--help"], "rmsearch"):  # None after --help
            module, flags = called
            _run(_load(module), flags)

    return exit_code_of(run)


def run_command(stage: Stage[Any], arguments: Sequence[str]) -> int:
    """Parse the arguments, run the stage, print an error as one line; returns the exit code."""
    return exit_code_of(lambda: _run(stage, arguments))


def _run(stage: Stage[Any], arguments: Sequence[str]) -> None:
    config = _parsed(stage_app(stage), arguments, stage.name)
    if isinstance(config, StageConfig):  # None after --help
        execute(stage, config)


def rmsearch_app() -> App:
    """The command line of ``rmsearch``; calling it returns the module of the stage that is to run, and its flags."""

    def usage() -> None:
        print(_usage())

    def stage_of(module: str) -> Callable[..., tuple[str, tuple[str, ...]]]:
        def call(*flags: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> Any:
            return module, flags

        return call

    app = App(name="rmsearch", help_flags=(), version=__version__, **QUIET)
    app.command(usage, name=("--help", "-h", "help"))
    app.command(stage_of("rmsearch.doctor"), name="doctor", help_flags=(), version_flags=())
    for group, stages in STAGES.items():
        app.command(part := App(name=group, version_flags=(), **QUIET))
        for position, (name, text) in enumerate(stages.items()):
            call = stage_of(f"rmsearch.{group}.{name}")
            flags = {"help_flags": (), "version_flags": ()}
            part.command(call, name=name, help=text, sort_key=position, **flags)
            if "_" in name:
                part.command(call, name=name.replace("_", "-"), show=False, **flags)
    return app


def _usage() -> str:
    lines = [
        f"rmsearch {__version__}: search ranked by a reward model",
        "",
        "Usage: rmsearch GROUP STAGE [FLAGS]",
        "       rmsearch GROUP STAGE --help",
        "",
    ]
    for group, stages in STAGES.items():
        width = max(map(len, stages))
        lines += [f"{group}:", *(f"  {name:<{width}} {text}" for name, text in stages.items())]
    lines += [
        "",
        "doctor         Say what this machine can do: GPUs, vLLM, torch, S3, model folders.",
        "--version      Print the version.",
        "",
        "Exit codes: 0 done, 2 you must change something, 75 try again, 1 a bug.",
    ]
    return "\n".join(lines)


def stage_app(stage: Stage[Any]) -> App:
    """The command line of a stage; calling it returns the config. Flags win over environment, then YAML."""

    def command(*, config: StageConfig | None, config_file: str | None = None) -> StageConfig:
        return stage.config() if config is None else config

    flags = Parameter(name="*", negative_none=(), negative_iterable=(), env_var_split=_split_list)
    yaml_help = f"YAML file of flags; {stage.env_prefix}<FLAG> in the environment comes before it."
    command.__annotations__ = {
        "config": Annotated[stage.config, flags],
        "config_file": Annotated[str | None, Parameter(name="--config", help=yaml_help)],
    }
    if not any(info.is_required() for info in stage.config.model_fields.values()):
        command.__kwdefaults__ = {"config": None, "config_file": None}
    name = f"rmsearch {stage.name.replace('.', ' ')}"
    app = App(
        name=name,
        usage=f"Usage: {name} [FLAGS]",
        help=inspect.cleandoc(stage.help),
        version_flags=(),
        help_formatter=_print_panel,
        config=(Env(stage.env_prefix, command=False, show=False), _read_yaml),
        **QUIET,
    )
    app.default(command)
    return app


def _split_list(kind: Any, value: str, **_: Any) -> list[str]:
    """Values of an environment variable: those of a list are separated by commas."""
    return env_var_split(kind, value, delimiter=",")


def _read_yaml(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take the flags that are in no other place from the file of ``--config``."""
    import yaml

    given = arguments["--config"].tokens
    if not given:
        return
    path = given[0].value
    with uri.reader(path) as file:
        try:
            settings = yaml.safe_load(file.read()) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"is not YAML ({error})", where=path) from None
    Dict(settings, source=path, use_commands_as_keys=False)(app, commands, arguments)


def _print_panel(console: Any, options: Any, panel: Any) -> None:
    """Print a panel of a stage's help: its own flags first, and (required) or the default after the text."""
    from cyclopts.help import DefaultFormatter
    from rich.text import Text

    common = {f"--{name.replace('_', '-')}" for name in StageConfig.model_fields} | {"--config"}
    entries = []
    for entry in sorted(panel.entries, key=lambda each: bool(common.intersection(each.names))):
        if entry.required:
            entry.description.append(Text("(required)"))
        elif entry.default not in (None, "", "[]"):
            entry.description.append(Text(f"(default: {entry.default})"))
        entries.append(entry.copy(required=False, default=None))
    DefaultFormatter()(console, options, panel.copy(entries=entries))


def _parsed(app: App, arguments: Sequence[str], where: str) -> Any:
    """What the command line returns; its errors as ours."""
    try:
        return app(list(arguments))
    except (CycloptsError, ValidationError) as error:
        cause = error.__cause__ if isinstance(error, CycloptsError) else error
        problem = explain_validation(cause) if isinstance(cause, ValidationError) else str(error).replace("...", "…")
        if isinstance(error, MissingArgumentError) and error.unused_tokens:  # what is missing may be misspelt there
            problem += f"; not understood: {' '.join(error.unused_tokens)}"
        raise ConfigError(problem, where=where, remedy="See --help") from None


def exit_code_of(action: Callable[[], None]) -> int:
    """Run an action as a command: errors of ours become one line on stderr and their exit code."""
    try:
        run_stoppably(action)
    except RMSearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:  # noqa: BLE001  the one place where a bug becomes an exit code
        traceback.print_exc()
        print(
            f"error: this is a bug in rmsearch ({type(error).__name__}); please report it with the lines above",
            file=sys.stderr,
        )
        return EXIT_BUG
    return EXIT_DONE


if __name__ == "__main__":
    main()
