"""Judge sampled sets: which of two keys serves the query better, as preference pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rmsearch.cli import main
from rmsearch.datasets.chain import SampledSet
from rmsearch.preferences.judge_flags import JudgeFlags
from rmsearch.preferences.judges import Comparison, Contest, Judged
from rmsearch.preferences.judging import as_messages, judge_sets, preference
from rmsearch.preferences.verdicts import Verdict
from rmsearch.stage import Run, option, stage
from rmsearch.storage.records import read_models


class JudgeConfig(JudgeFlags):
    """Config of `rmsearch train judge_dataset`."""

    sample_pairs: int = option(1, "Pairs of each set to judge, chosen by the seed; 0: all.", ge=0)


NEXT = "rmsearch train lora --dataset-list-train {output} --dataset-list-test {output_test} --model-name MODEL"


@stage("train.judge_dataset", next_step=NEXT)
def judge_dataset(config: JudgeConfig, run: Run) -> None:
    """Judge sampled query and key sets into preference pairs.

    llm: a language model reads each pair in both orders and answers 1, 2 or tie. Only what both orders say is a
    preference, all else a tie. Its margin is the mean log-odds of the two answers, read from the tokens'
    log-probabilities. Every answer is journaled: a killed or repeated run pays for none twice.

    reward: a teacher reward model; the difference of its rewards is the margin. labels: qrels, or the sets' own
    positive_ids; of two graded keys the higher grade wins.

    Queries are split into train and test by their text, so that none is in both and later rows move none. Counts:
    ties, agreement of the two orders, first_preferred (0.5 is no position bias), overlap of the split (0).
    """

    def contests() -> Iterator[Contest]:
        for each in read_models(config.sets, SampledSet):
            yield Contest(each.query, each.query_id, each.query_type, each.keys, each.key_ids, each.positive_ids)

    def records(contest: Contest, verdicts: Sequence[Judged], decided: str) -> Iterator[dict[str, Any]]:
        for comparison, verdict in verdicts:
            if verdict.winner:
                yield _record(config, comparison, verdict, decided)

    judge_sets(config, run, contests, records)


def _record(config: JudgeConfig, comparison: Comparison, verdict: Verdict, decided: str) -> dict[str, Any]:
    contest = comparison.contest
    chosen, rejected = preference(comparison, verdict)
    margin = verdict.margin(config.margin_max)
    if config.record_form == "messages":
        return {
            "chosen_msg": as_messages(contest.query, contest.keys[chosen]),
            "rejected_msg": as_messages(contest.query, contest.keys[rejected]),
            "chosen_sentence_id": contest.key_ids[chosen],
            "rejected_sentence_id": contest.key_ids[rejected],
            "query_id": contest.query_id,
            "margin": margin,
        }
    return {
        "query": contest.query,
        "chosen_key": contest.keys[chosen],
        "rejected_key": contest.keys[rejected],
        "query_id": contest.query_id,
        "chosen_key_id": contest.key_ids[chosen],
        "rejected_key_id": contest.key_ids[rejected],
        "margin": margin,
        "query_type": contest.query_type,
        "source": decided,
    }


if __name__ == "__main__":
    main(judge_dataset)
