"""Judge advanced sets: a batch of candidates per query, and the preferences that hold between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rmsearch.cli import main
from rmsearch.datasets.chain import AdvancedSet
from rmsearch.preferences.judges import Comparison, Contest, Judged, decided_by, judged
from rmsearch.preferences.judging import JudgeFlags, as_messages, collecting, comparisons, count_comparisons, tie_record
from rmsearch.preferences.verdicts import Verdict, without_circles
from rmsearch.stage import Run, option, stage
from rmsearch.storage.records import read_models


class JudgeAdvancedConfig(JudgeFlags):
    """Config of `rmsearch train judge_adpo_dataset`."""

    sample_pairs: int = option(0, "Pairs of each batch to judge, chosen by the seed; 0: all.", ge=0)


NEXT = "rmsearch train adpo_lora --dataset-list-train {output} --dataset-list-test {output_test} --model-name MODEL"


@stage("train.judge_adpo_dataset", next_step=NEXT)
def judge_adpo_dataset(config: JudgeAdvancedConfig, run: Run) -> None:
    """Judge advanced sets into batches with preferences (ADPO).

    Each correspond key is compared with every sampled key and every other correspond key. The judges, the split and
    the counts are those of judge_dataset. Ties are no preferences; where verdicts go in a circle, the least sure one of
    it is dropped (counts: circles). A batch without any preference is left out (batches_without_pairs).
    """
    total = count_comparisons(_contests(config.sets), config.sample_pairs, config.sets)
    asked = comparisons(_contests(config.sets), config.sample_pairs, config.seed)
    decided, pairs, circles, rows = decided_by(config), 0, 0, 0
    with collecting(config) as records:
        for contest, verdicts in _batches(judged(config, run, asked, total)):
            for comparison, verdict in verdicts:
                if not verdict.winner:
                    records.put(contest.query, tie_record(comparison, verdict, decided), tie=True)
            record, dropped = _row(config, contest, verdicts, decided)
            circles += dropped
            if record is not None:
                rows += 1
                pairs += len(record["dpo_pairs"])
                records.put(contest.query, record)
        records.write(run)
    sets = sum(1 for _ in read_models(config.sets, AdvancedSet))
    run.counts |= {"pairs": pairs, "circles": circles, "batches_without_pairs": sets - rows}


def _contests(uri: str) -> Iterator[Contest]:
    for each in read_models(uri, AdvancedSet):
        ids = each.correspond_key_ids
        roles = ["correspond"] * len(ids) + ["sampled"] * len(each.sampled_key_ids)
        yield Contest(
            each.query,
            each.query_id,
            each.query_type,
            each.correspond_keys + each.sampled_keys,
            ids + each.sampled_key_ids,
            ids,
            roles,
        )


def _batches(verdicts: Iterable[Judged]) -> Iterator[tuple[Contest, list[Judged]]]:
    for _, group in groupby(verdicts, key=lambda each: each[0].place):
        batch = list(group)
        yield batch[0][0].contest, batch


def _row(
    config: JudgeAdvancedConfig, contest: Contest, verdicts: list[Judged], decided: str
) -> tuple[dict[str, Any] | None, int]:
    """The row, None without a preference, and how many preferences were dropped to break circles."""
    found = [(_preference(*each), each[1]) for each in verdicts if each[1].winner]
    kept, dropped = without_circles([(pair, verdict.score) for pair, verdict in found])
    if not kept:
        return None, len(dropped)
    margins = [found[i][1].margin(config.margin_max) for i in kept]
    row = {
        "batch": [_candidate(config, contest, i) for i in range(len(contest.keys))],
        "dpo_pairs": [list(found[i][0]) for i in kept],
        "margins": None if None in margins else margins,
        "source": decided,
    }
    return row, len(dropped)


def _preference(comparison: Comparison, verdict: Verdict) -> tuple[int, int]:
    """(chosen, rejected) positions."""
    first, second = comparison.first, comparison.second
    return (first, second) if verdict.winner > 0 else (second, first)


def _candidate(config: JudgeAdvancedConfig, contest: Contest, i: int) -> dict[str, Any]:
    assert contest.roles is not None
    if config.record_form == "messages":
        texts: dict[str, Any] = {"msg": as_messages(contest.query, contest.keys[i])}
    else:
        texts = {"query": contest.query, "key": contest.keys[i]}
    facts = {"query_id": contest.query_id, "key_id": contest.key_ids[i], "key_role": contest.roles[i]}
    return texts | facts | ({} if contest.query_type is None else {"query_type": contest.query_type})


if __name__ == "__main__":
    main(judge_adpo_dataset)
