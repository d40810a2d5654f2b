"""What the judging stages share: which keys are compared, the split by query, the files that they write."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import combinations, groupby
from tempfile import TemporaryFile
from typing import IO, Any, Literal

from rmsearch.errors import ConfigError
from rmsearch.preferences.judge_flags import JudgeFlags
from rmsearch.preferences.judges import Comparison, Contest, Judged, decided_by, judged
from rmsearch.preferences.negatives import folded, same_text
from rmsearch.preferences.verdicts import Verdict
from rmsearch.prompts.templates import TEMPLATES
from rmsearch.stage import Run
from rmsearch.storage.records import write_records

MESSAGES = TEMPLATES["upstream_lora"]
Side = Literal["train", "test", "ties"]


def side_of(query: str, seed: int, test_share: float) -> Literal["train", "test"]:
    """Where a query belongs: decided by its own text (case and white space apart), so that other queries, whether
    added or gone, never move it."""
    digest = blake2b(f"{seed}\n{folded(query)}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return "test" if int.from_bytes(digest, "big") / 2**128 < test_share else "train"


def judge_sets(
    config: JudgeFlags,
    run: Run,
    contests: Callable[[], Iterable[Contest]],
    records_of: Callable[[Contest, Sequence[Judged], str], Iterable[dict[str, Any]]],
) -> None:
    """Judge pairs of each contest's keys and write what ``records_of(contest, verdicts, who decided)`` makes of them,
    and the ties."""
    total = _count_comparisons(contests(), config.sample_pairs, config.sets)
    verdicts = judged(config, run, comparisons(contests(), config.sample_pairs, config.seed), total)
    decided = decided_by(config)
    with _collecting(config) as records:
        for _, group in groupby(verdicts, key=lambda each: each[0].place):
            of_contest = list(group)
            contest = of_contest[0][0].contest
            for comparison, verdict in of_contest:
                if not verdict.winner:
                    records.put(contest.query, _tie_record(comparison, verdict, decided), tie=True)
            for record in records_of(contest, of_contest, decided):
                records.put(contest.query, record)
        records.write(run)


def comparisons(contests: Iterable[Contest], sample: int, seed: int) -> Iterator[Comparison]:
    """``sample`` of the pairs of each contest's keys, the same for the same seed; 0: all.

    Where keys are known to serve the query, pairs have at least one of them: two others teach little.
    """
    number = 0
    for place, contest in enumerate(contests):
        pairs = list(combinations(range(len(contest.keys)), 2))
        positive = {i for i, key in enumerate(contest.key_ids) if key in (contest.positive_ids or ())}
        if positive:
            pairs = [pair for pair in pairs if positive & set(pair)]
        if sample and sample < len(pairs):
            chance = random.Random(f"{seed}\n{contest.query_id}\n{contest.query}".encode("utf-8", "surrogatepass"))
            pairs = sorted(chance.sample(pairs, sample))
        for first, second in pairs:
            yield Comparison(number, place, contest, first, second)
            number += 1


def _count_comparisons(contests: Iterable[Contest], sample: int, where: str) -> int:
    """How many there will be. Reads the whole file, so that it is known to be sound before any answer is paid."""
    total = sum(1 for _ in comparisons(contests, sample, 0))
    if not total:
        remedy = "Make some with sample_dpo_batch or sample_advanced_dpo_batch"
        raise ConfigError("holds no sets to judge", where=where, remedy=remedy)
    return total


def preference(comparison: Comparison, verdict: Verdict) -> tuple[int, int]:
    """(chosen, rejected): positions of the contest's keys."""
    places = (comparison.first, comparison.second)
    return places if verdict.winner > 0 else places[::-1]


def as_messages(query: str, key: str) -> list[dict[str, str]]:
    """Upstream's prompt of its training data, filled in."""
    texts = {"{query}": query, "{key}": key}
    return [
        {"role": each.role, "content": re.sub(r"\{query\}|\{key\}", lambda match: texts[match[0]], each.content)}
        for each in MESSAGES.messages
    ]


def _tie_record(comparison: Comparison, verdict: Verdict, decided: str) -> dict[str, Any]:
    """A pair without a preference, with the reason and the judge's lean (above 0: to the first key)."""
    contest, at = comparison.contest, (comparison.first, comparison.second)
    return {
        "query": contest.query,
        "first_key": contest.keys[at[0]],
        "second_key": contest.keys[at[1]],
        "query_id": contest.query_id,
        "first_key_id": contest.key_ids[at[0]],
        "second_key_id": contest.key_ids[at[1]],
        "lean": None if verdict.score is None else round(verdict.score, 6),
        "reason": verdict.reason,
        "query_type": contest.query_type,
        "source": decided,
    }


@contextmanager
def _collecting(config: JudgeFlags) -> Iterator[Records]:
    """Records that wait in temporary files until all are there."""
    with TemporaryFile() as train, TemporaryFile() as test, TemporaryFile() as ties:
        yield Records(config, {"train": train, "test": test, "ties": ties})


class Records:
    """Records on their way into train, test and ties."""

    def __init__(self, config: JudgeFlags, files: Mapping[Side, IO[bytes]]) -> None:
        self._config, self._files = config, files
        self._queries: dict[Side, set[bytes]] = {"train": set(), "test": set(), "ties": set()}
        self.counts: Counter[Side] = Counter()

    def put(self, query: str, record: dict[str, Any], *, tie: bool = False) -> None:
        """A record of a query: to its side, or to the ties."""
        side: Side = "ties" if tie else side_of(query, self._config.seed, self._config.test_share)
        self._files[side].write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._queries[side].add(same_text(query))
        self.counts[side] += 1

    def write(self, run: Run) -> None:
        """Write the three files and count. Raises ConfigError when there is no preference at all."""
        config = self._config
        if not self.counts["train"] + self.counts["test"]:
            remedy = "See the tie rate; --judge labels needs sets with a key that is labelled"
            raise ConfigError(f"no preference is left: {self.counts['ties']} ties", where=config.sets, remedy=remedy)
        places: dict[Side, str | None] = {
            "ties": config.output_ties,
            "test": config.output_test,
            "train": config.output,
        }
        for side, place in places.items():
            assert place is not None
            write_records(place, self._read(side))
        for side in ("train", "test"):
            run.counts |= {side: self.counts[side], f"{side}_queries": len(self._queries[side])}
        run.counts["overlap"] = len(self._queries["train"] & self._queries["test"])

    def _read(self, side: Side) -> Iterator[dict[str, Any]]:
        self._files[side].seek(0)
        return (json.loads(line) for line in self._files[side])
