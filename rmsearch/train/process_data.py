"""Make a corpus: a hub data set, files or a folder of texts become df.csv, df_small.csv and a data set folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from rmsearch.cli import main
from rmsearch.datasets.corpus import IdentifiedRow, distinct, find_id_column, located_records, numbered
from rmsearch.datasets.hub import hub_rows
from rmsearch.datasets.reservoir import reservoir
from rmsearch.datasets.tables import TableRow, TableWriter, plain_values, whole_folder
from rmsearch.errors import ConfigError, InputMissingError, RecordError, RMSearchError
from rmsearch.stage import Run, StageConfig, option, source, stage, target
from rmsearch.storage import uri as storage
from rmsearch.storage.records import read_json


class ProcessDataConfig(StageConfig):
    """Flags of process_data."""

    dataset_name: str = source(
        help="A data set of the Hugging Face hub, or a local or s3:// file (.csv, .jsonl, .json, .parquet, each also "
        ".gz), or a folder of such files or of texts (.txt, .md)."
    )
    output_dir: str = target(help="Folder for the results; other files in it stay.")
    dataset_config: str | None = option(None, "Configuration (subset) of the hub data set.")
    split: str = option("train", "Split of the hub data set; the name of the split that is written.")
    n_sample: int | None = option(
        None,
        "Take so many rows at random, in random order; by default all, in their order. Exact for files and for hub "
        "data without --stream; of a stream it is datasets' own shuffle buffer of 10,000 rows, cut after so many.",
        ge=1,
    )
    random_seed: int = option(42, "Seed of the random draws; the same seed gives the same files.", ge=0)
    stream: bool = option(False, "Read the hub data set as it downloads. (Files are always streamed.)")
    text_column: str = option("text", "Column that becomes `text`.")
    id_column: str | None = option(
        None,
        "Column that becomes `index`, the stable id; by default index, _id, id, df_id or corpus-id if there, else the "
        "row's position.",
    )
    n_small: int = option(10_000, "Random rows of df_small.csv, at most.", ge=1)


NEXT = (
    "rmsearch train make_query_recs --input-csv {output_dir}/df.csv --output {output_dir}/query_recs.json "
    "--model-name MODEL"
)


@stage("train.process_data", next_step=NEXT)
def process_data(config: ProcessDataConfig, run: Run) -> None:
    """Make a corpus of a hub data set, files or a folder of texts.

    Writes --output-dir as `datasets.load_from_disk` reads it (dataset_dict.json and the split's folder), df.csv and
    df_small.csv: the columns index (a stable id, the same in all three), text, split, then the others. Memory is
    bounded for any size. Rows without text are set aside and counted. A hub that cannot be reached ends with exit code
    75 and writes nothing. The folder appears whole or not at all; other files in it stay.
    """
    if (former := _former(config)) and _unchanged(config, run, former):
        run.counts |= former["counts"]
        run.note(**former["notes"])
        run.say("up_to_date", output=config.output_dir, remedy="--force runs it again")
        return
    rows = _rows(config)
    notes = (former or {}).get("notes", {})
    with whole_folder(config.output_dir, notes.get("files", ())) as folder:
        with (
            TableWriter(folder, _split_name(config), config.n_small, config.random_seed) as tables,
            ExitStack() as stack,
        ):
            sampled = _sampled(config, rows, stack) if _local(config) and config.n_sample else distinct(rows)
            total = _write(config, run, sampled, tables)
            run.check_rejects(total)
            if not tables.rows:
                raise RecordError("is empty: a corpus has rows with text", where=config.dataset_name)
            tables.finish(run.fingerprint[:16])
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    run.note(files={name: storage.digest(storage.join(config.output_dir, name)) for name in names})
    run.counts |= {"rows": tables.rows, "small_rows": min(tables.rows, config.n_small)}


def _former(config: ProcessDataConfig) -> dict[str, Any] | None:
    """The run record of the last time."""
    place = f"{config.output_dir.rstrip('/')}.run.json"
    if not storage.exists(place):
        return None
    try:
        return dict(read_json(place))
    except RMSearchError:
        return None


def _unchanged(config: ProcessDataConfig, run: Run, former: dict[str, Any]) -> bool:
    """Whether the files are still those of that run: the folder's digest changes with other stages' files in it."""
    files = former.get("notes", {}).get("files", {})
    if config.force or not files or former.get("fingerprint") != run.fingerprint:
        return False
    places = {storage.join(config.output_dir, name): digest for name, digest in files.items()}
    return all(storage.exists(place) and storage.digest(place) == digest for place, digest in places.items())


def _split_name(config: ProcessDataConfig) -> str:
    """The split's folder: ``train[:10%]`` is part of ``train``."""
    name = re.sub(r"\[[^\]]*\]", "", config.split)
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise ConfigError("is not the name of one split", where="--split", remedy="Use letters, digits, _ and .")
    return name


def _local(config: ProcessDataConfig) -> bool:
    """Whether the name is a file or folder; InputMissingError when it can only be one and is not there."""
    name = config.dataset_name
    if storage.is_s3(name) or storage.exists(name):
        found = storage.exists(name)
    elif name.startswith(("/", ".", "~")) or re.search(r"\.(csv|jsonl|json|parquet)(\.gz)?$", name):
        found = False
    else:
        return False
    if not found:
        raise InputMissingError("no such file or folder", where=name, remedy="Correct --dataset-name")
    if config.dataset_config:
        raise ConfigError("is for hub data sets, and this is a file or folder", where="--dataset-config")
    return True


def _rows(config: ProcessDataConfig) -> Callable[[], Iterator[IdentifiedRow]]:
    """A function that gives all rows with their ids, from the start at each call."""
    if _local(config):
        return lambda: numbered(located_records(config.dataset_name), config.id_column)
    rows = hub_rows(
        config.dataset_name,
        config.dataset_config,
        config.split,
        stream=config.stream,
        n_sample=config.n_sample,
        seed=config.random_seed,
        id_column=config.id_column,
    )
    return lambda: numbered(rows(), config.id_column)


def _sampled(
    config: ProcessDataConfig, rows: Callable[[], Iterator[IdentifiedRow]], stack: ExitStack
) -> Iterator[IdentifiedRow]:
    """--n-sample rows of files: one pass, then the sample in random order."""
    assert config.n_sample is not None
    sample = stack.enter_context(reservoir(config.n_sample, config.random_seed))
    for where, identity, values in distinct(rows):
        if (slot := sample.slot()) is not None:
            sample.put(slot, json.dumps([where, identity, plain_values(values, where)]).encode())
    return (IdentifiedRow(*json.loads(item)) for item in sample.items(shuffled=True))


def _write(config: ProcessDataConfig, run: Run, rows: Iterator[IdentifiedRow], tables: TableWriter) -> int:
    """Write the rows that have a text; returns how many there were with the others."""
    total, layout = 0, None
    with run.progress(unit="rows") as shown:
        for total, record in enumerate(rows, 1):
            layout = layout or _layout(config, record)
            text = record.values.get(config.text_column)
            if isinstance(text, str) and text.strip():
                tables.add(layout.entry(record, text))
            else:
                problem = "is empty" if text is None or isinstance(text, str) else f"is a {type(text).__name__}"
                run.reject({"place": record.where, "id": record.id}, f"{config.text_column} {problem}")
            if not total % 1024:
                shown.advance(1024)
    return total


class Layout(NamedTuple):
    """How a source's columns are written. ``spare``: those that are there under another name already."""

    split: str
    spare: frozenset[str | None]

    def entry(self, record: IdentifiedRow, text: str) -> TableRow:
        """The row's columns: index, text, split, the others; one that would take one of the first two names moves."""
        values = {"index": record.id, "text": text, "split": self.split}
        for name, value in plain_values(record.values, record.where).items():
            if name not in self.spare:
                values[f"source_{name}" if name in ("index", "text") else name] = value
        return TableRow(record.where, values)


def _layout(config: ProcessDataConfig, first: IdentifiedRow) -> Layout:
    if config.text_column not in first.values:
        remedy = f"Name one with --text-column: {', '.join(first.values) or 'there are none'}"
        raise RecordError(f"has no column {config.text_column!r}", where=first.where, remedy=remedy)
    identity = config.id_column or find_id_column(first.values)
    return Layout(_split_name(config), frozenset([config.text_column, *({identity} & {"index", ""})]))


if __name__ == "__main__":
    main(process_data)
