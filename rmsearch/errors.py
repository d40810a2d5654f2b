"""Every error that a user can meet: one line that names the thing, the place and the remedy, and an exit code.

Exit codes (schedulers read them): 0 done; 2 the user must change something, a retry is useless; 75 try again
(EX_TEMPFAIL of BSD's sysexits: storage, network, preemption); 1 a bug of ours.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_RETRY = 75


class RMSearchError(Exception):
    """Base of the errors below: ``problem`` says what is wrong, ``where`` file, row or flag, ``remedy`` the cure"""

    exit_code = EXIT_USER

    def __init__(self, problem: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.problem, self.where, self.remedy = problem, where, remedy
        text = problem if where is None else f"{where}: {problem}"
        if remedy is not None:
            text = f"{text.rstrip().rstrip('.')}{'' if text.rstrip().endswith('?') else '.'} {remedy}"
        super().__init__(" ".join(text.split()))


class ConfigError(RMSearchError):
    """A flag, environment variable or YAML entry that cannot be used."""


class InputMissingError(RMSearchError):
    """An input file, folder, bucket or object that is not there."""


class AccessError(RMSearchError):
    """Storage refused the credentials or the operation."""


class RecordError(RMSearchError):
    """A file or record that does not parse or lacks a field; ``where`` is ``file:row``."""


class ModelError(RMSearchError):
    """A model folder that cannot be loaded as what it is asked to be."""


class AnswerError(ModelError):
    """An answer without the form that was asked for; ``answer`` is the `Generation`, for whoever counts it."""

    def __init__(self, problem: str, *, answer: object, remedy: str | None = None) -> None:
        self.answer = answer
        super().__init__(problem, remedy=remedy)


class ContractError(ModelError):
    """A model used with another template, head, pooling or activation than it was trained with."""


class MissingExtraError(RMSearchError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"the package {package!r} is not installed", remedy=f"Run: pip install 'rmsearch[{extra}]'")


class RejectedError(RMSearchError):
    """More records were rejected than ``--max-reject-rate`` allows."""


class RetryableError(RMSearchError):
    """Storage, network or a server that may answer later."""

    exit_code = EXIT_RETRY


def first_line(error: BaseException) -> str:
    """What a library's error says in its first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
