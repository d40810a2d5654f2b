"""A query for every row of a corpus, and keys that serve it less and less than the row does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rmsearch.cli import main
from rmsearch.datasets.chain import KeyLadder
from rmsearch.preferences.ladder_order import OrderFlags, verified
from rmsearch.preferences.ladders import (
    TEXT,
    Task,
    ask_ladders,
    key_ladder_pairs,
    key_ladder_row,
    list_schema,
    object_schema,
    require_distinct,
    require_language,
    some_ladders,
    string,
    strings,
)
from rmsearch.stage import Run, option, stage, target
from rmsearch.storage.records import read_models, write_records

CHARACTERS_PER_TOKEN = 3  # fewer than English text has, so that an answer ends before --max-tokens
LENGTH_ASKED = 0.1  # how far from the row's length the instruction lets a key go


class KeyLadderConfig(OrderFlags):
    """Config of `rmsearch train make_query_and_less_relevant_keys_recs`."""

    max_characters: int | None = option(
        None,
        "Longer rows are cut to whole sentences of so many characters, and the cut row is the best key; by default "
        f"what --max-tokens holds of keys that long, {CHARACTERS_PER_TOKEN} characters per token.",
        ge=20,
    )
    max_length_ratio: float = option(
        3.0, "Refuse a key that is so many times longer or shorter than its row; 0: never. Lengths are reported.", ge=0
    )
    pairs_output: str | None = target(None, "Preference pairs for `rmsearch train lora` to write besides.")

    @property
    def longest(self) -> int:
        """Characters of a row at most."""
        share = self.max_tokens * CHARACTERS_PER_TOKEN // (self.n_key_generation + 1)
        return self.max_characters or max(share, 20)


@stage("train.make_query_and_less_relevant_keys_recs")
def make_query_and_less_relevant_keys_recs(config: KeyLadderConfig, run: Run) -> None:
    """Make a query and keys of falling relevance for every row of a corpus.

    A language model writes, for every row, one query that the row serves and --n-key-generation keys that serve it less
    and less. 10 styles of queries and 10 strategies of falling off take turns, so that every 100 rows hold all their
    combinations. The order can be verified by a reward model or a judge (--verify). Answers of the wrong form are
    asked again, then rejected; nothing is filled in.
    """
    rows, count = config.check(), config.n_key_generation
    ladders: Iterable[KeyLadder] = ask_ladders(
        run,
        config,
        "less_relevant_keys",
        ("styles", "strategies"),
        config.longest,
        object_schema(query=TEXT, keys=list_schema(count)),
        lambda task, value, tag: _ladder(task, value, count, config.max_length_ratio, tag),
        rows,
        n=count,
    )
    if config.verify != "none":
        ladders = _verified(config, run, ladders)
    run.counts["rows"] = rows
    run.counts["ladders"] = write_records(config.output, _measured(run, ladders))
    if config.adpo_output:
        write_records(config.adpo_output, map(key_ladder_row, read_models(config.output, KeyLadder)))
    if config.pairs_output:
        ladders = read_models(config.output, KeyLadder)
        pairs = (pair for ladder in ladders for pair in key_ladder_pairs(ladder))
        write_records(config.pairs_output, (pair.model_dump(exclude_none=True) for pair in pairs))


def _verified(config: KeyLadderConfig, run: Run, ladders: Iterable[KeyLadder]) -> Iterator[KeyLadder]:
    """All ladders are made before the first is verified: two models at a time may not fit the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        made = str(Path(folder) / "ladders.jsonl")
        total = write_records(made, ladders)
        yield from verified(run, config, read_models(made, KeyLadder), total)
    run.check_rejects(int(run.counts["questions"]))


def _ladder(task: Task, value: Any, count: int, max_ratio: float, tag: str) -> KeyLadder:
    """The ladder of an answer; ValueError says why it is none."""
    if not isinstance(value, dict) or "query" not in value:
        raise ValueError("the answer has no field 'query'")
    query, keys = string(value["query"], "query"), strings(value, "keys", count)
    require_distinct([query], "query", [task.text], "the row itself")
    require_distinct(keys, "keys", [task.text], "the row itself")
    require_distinct(keys, "keys", [query], "the query itself")
    require_language([query, *keys], task.text)
    ratios = [len(key) / len(task.text) for key in keys]
    if max_ratio and not all(1 / max_ratio <= ratio <= max_ratio for ratio in ratios):
        raise ValueError("keys: one is longer or shorter than --max-length-ratio allows")
    return KeyLadder(
        query=query,
        correspond_key=task.text,
        less_relevant_keys=keys,
        df_id=task.row_id,
        query_type=task.parts[0]["type"],
        strategy=task.parts[1]["name"],
        prompt=tag,
    )


def _measured(run: Run, ladders: Iterable[KeyLadder]) -> Iterator[KeyLadder]:
    """The ladders as they come; how their keys' lengths compare with the rows' goes into the run: lengths that fall
    with the rank would teach a model to count characters. ConfigError when there is none."""
    total, off, sums = 0, 0, [0.0] * 0
    for ladder in some_ladders(ladders):
        ratios = [len(key) / len(ladder.correspond_key) for key in ladder.less_relevant_keys]
        sums = [a + b for a, b in zip(sums or [0.0] * len(ratios), ratios, strict=True)]
        off += sum(abs(ratio - 1) > LENGTH_ASKED for ratio in ratios)
        total += 1
        yield ladder
    run.counts["keys_off_length"] = off
    run.note(mean_length_ratios=[round(each / total, 3) for each in sums])


if __name__ == "__main__":
    main(make_query_and_less_relevant_keys_recs)
