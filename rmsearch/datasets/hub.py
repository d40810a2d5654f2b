"""Data sets of the Hugging Face hub, row by row. What the hub does not give is an error, never a made-up row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np

from rmsearch.datasets.corpus import find_id_column
from rmsearch.errors import ConfigError, MissingExtraError, RetryableError, RMSearchError, first_line
from rmsearch.progress import say

SHUFFLE_BUFFER = 10_000

Rows = Callable[[], Iterator[tuple[str, dict[str, Any]]]]


def hub_rows(
    name: str, config: str | None, split: str, *, stream: bool, n_sample: int | None, seed: int, id_column: str | None
) -> Rows:
    """A function that gives (place, columns) of the split's rows, the same ones at every call.

    A row without an id column gets ``index``: its position in the split, or, of a shuffled stream, in that stream.
    ``n_sample``: so many random rows in random order. A stream is shuffled in the library's buffer of `SHUFFLE_BUFFER`
    rows and then cut, so its sample comes from the start of (shuffled) files; without streaming it is exact.

    Raises RetryableError (a hub that cannot be reached, offline mode with nothing cached), ConfigError (no such data
    set, configuration or split), MissingExtraError.
    """
    with hub_errors(name):
        dataset = _load(name, config, split, stream)
        positions = range(0) if stream else range(len(dataset))
        if n_sample is not None and stream:
            dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(n_sample)
        elif n_sample is not None:
            positions = np.random.default_rng(seed).permutation(len(dataset))[:n_sample].tolist()
            dataset = dataset.select(positions)

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        with hub_errors(name):
            numbers: Any = iter(positions)
            for count, values in enumerate(dataset):
                number = count if stream else next(numbers)
                if id_column is None and find_id_column(values) is None:
                    values = {"index": str(number), **values}
                yield f"{name}:{number}", values

    return rows


def _load(name: str, config: str | None, split: str, stream: bool) -> Any:
    import datasets

    # It tells of each attempt twice, through its own handler and the root's; in the end one error says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    say("hub", dataset=name, split=split, streaming=stream)
    return datasets.load_dataset(name, config, split=split, streaming=stream)


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Map what the libraries raise to errors that a user or a scheduler can act on."""
    try:
        from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    except ImportError:
        raise MissingExtraError("datasets", "train") from None

    unknown = (DatasetNotFoundError, DataFilesNotFoundError, RepositoryNotFoundError, GatedRepoError)
    try:
        yield
    except RMSearchError:
        raise
    except unknown as error:
        remedy = "Correct the name or path, or log in (HF_TOKEN) if the data set is gated"
        raise ConfigError(_first_line(error), where=name, remedy=remedy) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise _unreachable(name, error) from error
    except DatasetsError as error:  # wraps what happened while it downloaded or parsed
        if isinstance(error.__cause__, HfHubHTTPError | httpx.HTTPError | OSError):
            raise _unreachable(name, error.__cause__) from error
        raise ConfigError(f"cannot be read: {_first_line(error)}", where=name) from error
    except (ValueError, RuntimeError) as error:  # a wrong configuration or split; a data set that is a script
        raise ConfigError(_first_line(error), where=name, remedy="See --dataset-config and --split") from error


def _unreachable(name: str, error: BaseException) -> RetryableError:
    problem = f"the hub did not give the data set: {_first_line(error)}"
    remedy = "Run again when it can be reached, leave offline mode (HF_HUB_OFFLINE), or name a local file or folder"
    return RetryableError(problem, where=name, remedy=remedy)


def _first_line(error: BaseException) -> str:
    return first_line(error)[:300]
