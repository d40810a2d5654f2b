"""Judge advanced sets: a batch of candidates per query, and the preferences that hold between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rmsearch.cli import main
from rmsearch.datasets.chain import AdvancedSet
from rmsearch.preferences.judge_flags import JudgeFlags
from rmsearch.preferences.judges import Contest, Judged
from rmsearch.preferences.judging import as_messages, judge_sets, preference
from rmsearch.preferences.verdicts import without_circles
from rmsearch.stage import Run, stage
from rmsearch.storage.records import read_models


class JudgeAdvancedConfig(JudgeFlags):
    """Config of `rmsearch train judge_adpo_dataset`."""


NEXT = "rmsearch train adpo_lora --dataset-list-train {output} --dataset-list-test {output_test} --model-name MODEL"


@stage("train.judge_adpo_dataset", next_step=NEXT)
def judge_adpo_dataset(config: JudgeAdvancedConfig, run: Run) -> None:
    """Judge advanced sets into batches with preferences (ADPO).

    Each correspond key is compared with every sampled key and every other correspond key. The judges, the split and
    the counts are those of judge_dataset. Ties are no preferences; where verdicts go in a circle, the least sure one of
    it is dropped (counts: circles). A batch without any preference is left out (batches_without_pairs).
    """
    pairs, circles, written = 0, 0, 0

    def contests() -> Iterator[Contest]:
        return map(_contest, read_models(config.sets, AdvancedSet))

    def rows(contest: Contest, verdicts: Sequence[Judged], decided: str) -> Iterator[dict[str, Any]]:
        nonlocal pairs, circles, written
        found = [(preference(*each), each[1]) for each in verdicts if each[1].winner]
        kept, dropped = without_circles([(pair, verdict.score) for pair, verdict in found])
        circles += len(dropped)
        if not kept:
            return
        pairs += len(kept)
        written += 1
        margins = [found[i][1].margin(config.margin_max) for i in kept]
        yield {
            "batch": [_candidate(config, contest, i) for i in range(len(contest.keys))],
            "dpo_pairs": [list(found[i][0]) for i in kept],
            "margins": None if None in margins else margins,
            "source": decided,
        }

    judge_sets(config, run, contests, rows)
    without_pairs = sum(1 for _ in contests()) - written
    run.counts |= {"pairs": pairs, "circles": circles, "batches_without_pairs": without_pairs}


def _contest(advanced: AdvancedSet) -> Contest:
    own, sampled = advanced.correspond_key_ids, advanced.sampled_key_ids
    keys, ids = advanced.correspond_keys + advanced.sampled_keys, own + sampled
    roles = ["correspond"] * len(own) + ["sampled"] * len(sampled)
    return Contest(advanced.query, advanced.query_id, advanced.query_type, keys, ids, own, roles)


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
