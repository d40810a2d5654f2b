"""The check that no output is written over an input or over another output."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence

from rmsearch.errors import ConfigError
from rmsearch.storage import uri


def check_overwriting(
    outputs: Mapping[str, str], inputs: Sequence[tuple[str, str]], own: Container[str] = frozenset()
) -> None:
    """Raise ConfigError when an output is, contains or lies in another output or an input that is there.

    outputs: flag -> URI. inputs: (flag, URI or name). In an input folder an output may be new, or one of ``own``, what
    the same stage wrote there before.
    """
    places = {flag: place for flag, output in outputs.items() if (place := uri.resolved(output))}
    for (flag, place), (other, another) in itertools.combinations(places.items(), 2):
        if _within(place, another) or _within(another, place):
            raise _overwriting(flag, outputs[flag], other, outputs[other])
    for source, given in inputs:
        read = uri.resolved(given)
        for flag, place in places.items():
            if read is None or not (_within(place, read) or _within(read, place)) or not uri.exists(given):
                continue
            if _within(read, place) or (uri.exists(outputs[flag]) and outputs[flag] not in own):
                raise _overwriting(flag, outputs[flag], source, given)


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def _overwriting(flag: str, path: str, other: str, its_path: str) -> ConfigError:
    problem = f"{flag} would be written over {other} {its_path}"
    return ConfigError(problem, where=path, remedy=f"Give {flag} another path")
