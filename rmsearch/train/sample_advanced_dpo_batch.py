"""Sample advanced sets: the keys that correspond to a query, and keys that do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rmsearch.cli import main
from rmsearch.datasets.chain import AdvancedSet
from rmsearch.preferences.queries import LabelledQuery, SampleFlags
from rmsearch.preferences.sampling import Sampler, write_samples
from rmsearch.stage import Run, option, stage, target


class SampleAdvancedConfig(SampleFlags):
    """Config of `rmsearch train sample_advanced_dpo_batch`."""

    output: str = target("./data/smollm-corpus/adpo_sampled_query_key_set.json", "Advanced sets to write.")
    n_sampled_keys: int = option(2, "Sampled keys of a set.", ge=1)


NEXT = "rmsearch train judge_adpo_dataset --query-key-set {output} --model-name MODEL --output dataset_list_train.json"


@stage("train.sample_advanced_dpo_batch", next_step=NEXT)
def sample_advanced_dpo_batch(config: SampleAdvancedConfig, run: Run) -> None:
    """Sample, for each query, the keys that correspond to it and others to judge them against.

    The corresponding key is the corpus row that the query was made from (df_id) or, given labels, all keys that are
    labelled to serve it, best first. Sampled keys are drawn as in sample_dpo_batch. Irrelevant questions correspond to
    no key; they, and queries with too few other keys, are left out and counted.
    """

    def sets(sampler: Sampler, queries: Iterable[LabelledQuery]) -> Iterator[AdvancedSet]:
        for each in queries:
            corresponding: dict[str, str] = {}
            for key in each.own_keys:
                if key in each.positives.keys:
                    corresponding.setdefault(sampler.text(key), key)
            if not corresponding:
                sampler.counts["queries_without_correspond_key"] += 1
                continue
            ids = list(corresponding.values())
            drawn = sampler.negatives(each, ids, config.n_sampled_keys)
            if len(drawn) < config.n_sampled_keys:
                sampler.counts["queries_without_negatives"] += 1
                continue
            yield AdvancedSet(
                query=each.query,
                query_id=each.query_id,
                correspond_keys=list(corresponding),
                correspond_key_ids=ids,
                sampled_keys=[text for _, text in drawn],
                sampled_key_ids=[key for key, _ in drawn],
                query_type=each.query_type,
            )

    write_samples(config, run, config.output, sets)


if __name__ == "__main__":
    main(sample_advanced_dpo_batch)
