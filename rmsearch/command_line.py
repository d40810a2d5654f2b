"""A stage's config as a command line: flags, YAML, environment, and errors as one line with an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import ValidationError

from rmsearch.errors import EXIT_BUG, EXIT_DONE, EXIT_RETRY, ConfigError, RMSearchError
from rmsearch.interrupts import STOPPED, run_stoppably
from rmsearch.stage import Stage, StageConfig, execute, explain_validation

if TYPE_CHECKING:
    from cyclopts import App


def _yaml_settings(path: str, config: type[StageConfig]) -> dict[str, Any]:
    import yaml

    from rmsearch.storage import uri

    with uri.reader(path) as file:
        try:
            settings = yaml.safe_load(file.read()) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"is not YAML ({error})", where=path) from None
    if not isinstance(settings, dict):
        raise ConfigError("must hold one mapping of flags to values", where=path)
    known = {k.replace("-", "_"): v for k, v in settings.items()}
    if unknown := sorted(set(known) - set(config.model_fields)):
        raise ConfigError(
            f"unknown entries: {', '.join(unknown)}",
            where=path,
            remedy="The flags of --help are the entries, with _ or -",
        )
    return known


def _env_settings(stage: Stage[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, info in stage.config.model_fields.items():
        value = os.environ.get(stage.env_prefix + name.upper())
        if value is not None:
            is_list = "list" in str(info.annotation)
            found[name] = value.split(",") if is_list else value
    return found


def _fields_in_help_order(config: type[StageConfig]) -> list[tuple[str, Any]]:
    return sorted(config.model_fields.items(), key=lambda item: item[0] in StageConfig.model_fields)


def _flag_type(annotation: Any) -> Any:
    """Any flag may be missing on the command line: YAML, environment and defaults follow; pydantic judges the whole."""
    return annotation if type(None) in get_args(annotation) else annotation | None


def app_of(stage: Stage[Any]) -> App:
    """The command line of a stage (cyclopts); calling it returns the config. Flags win over environment, then YAML."""
    import inspect

    from cyclopts import App, Parameter

    parameters = []
    for name, info in _fields_in_help_order(stage.config):
        shown = info.description or ""
        if info.is_required():
            shown += " (required)"
        elif info.default not in (None, "", [], ()):
            shown += f" (default: {info.default})"
        flag = Parameter(help=shown, show_default=False, negative_none=(), negative_iterable=())
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_flag_type(info.annotation), flag],
            )
        )
    yaml_flag = Parameter(
        name="--config",
        help=f"YAML file of flags; {stage.env_prefix}<FLAG> in the environment comes before it.",
        show_default=False,
    )
    parameters.append(
        inspect.Parameter(
            "config_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, yaml_flag]
        )
    )

    def command(**given: Any) -> StageConfig:
        yaml_path = given.pop("config_file", None)
        settings = {**(_yaml_settings(yaml_path, stage.config) if yaml_path else {}), **_env_settings(stage)}
        settings |= {name: value for name, value in given.items() if value is not None}
        try:
            return stage.config(**settings)
        except ValidationError as error:
            raise ConfigError(explain_validation(error), where=stage.name, remedy="See --help") from None

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app = App(
        name=f"rmsearch {stage.name.replace('.', ' ')}",
        help=inspect.cleandoc(stage.help),
        version_flags=[],
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )
    app.default(command)
    return app


def run_command(stage: Stage[Any], arguments: Sequence[str]) -> int:
    """Parse the arguments, run the stage, print an error as one line; returns the exit code."""
    from cyclopts import CycloptsError

    def parse_and_execute() -> None:
        try:
            config = app_of(stage)(list(arguments))
        except CycloptsError as error:
            raise ConfigError(str(error), where=stage.name, remedy="See --help") from None
        if isinstance(config, StageConfig):  # None after --help
            execute(stage, config)

    return exit_code_of(parse_and_execute)


def exit_code_of(action: Callable[[], None]) -> int:
    """Run an action as a command: errors of ours become one line on stderr and their exit code."""
    try:
        run_stoppably(action)
    except RMSearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # of a training that saved its state
        print(STOPPED, file=sys.stderr)
        return EXIT_RETRY
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:  # noqa: BLE001  the one place where a bug becomes an exit code
        import traceback

        traceback.print_exc()
        print(
            f"error: this is a bug in rmsearch ({type(error).__name__}); please report it with the lines above",
            file=sys.stderr,
        )
        return EXIT_BUG
    return EXIT_DONE
