"""The check that no output is written over an input or over another output."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from rmsearch.errors import ConfigError
from rmsearch.storage import uri


def check_overwriting(
    outputs: Mapping[str, str], inputs: Sequence[tuple[str, str]], is_own: Callable[[str], bool]
) -> None:
    """Raise ConfigError when an output is, contains or lies in another output or an input that is there.

    outputs: flag -> URI. inputs: (flag, URI or name). In an input folder an output may be new, or a file of which
    ``is_own`` says that the same stage wrote it there before.
    """
    places = {flag: place for flag, output in outputs.items() if (place := uri.resolved(output))}
    for (flag, place), (other, another) in itertools.combinations(places.items(), 2):
        if _within(place, another) or _within(another, place):
            problem = f"is named for two outputs, {flag} and {other}"
            raise ConfigError(problem, where=outputs[other], remedy="Give each its own path")
    for source, given in inputs:
        read = uri.resolved(given)
        for flag, place in places.items():
            output = outputs[flag]
            if read is None or not (_within(place, read) or _within(read, place)) or not uri.exists(given):
                continue
            if _within(read, place) or (uri.exists(output) and not is_own(output)):
                problem = f"{flag} would be written over {source} {given}"
                raise ConfigError(problem, where=output, remedy=f"Give {flag} another path")


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
