"""Sample the keys of each query that are to be judged against each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rmsearch.cli import main
from rmsearch.datasets.chain import SampledSet
from rmsearch.preferences.queries import LabelledQuery, SampleFlags
from rmsearch.preferences.sampling import Sampler, write_samples
from rmsearch.stage import Run, option, stage, target


class SampleConfig(SampleFlags):
    """Config of `rmsearch train sample_dpo_batch`."""

    output: str = target("./data/smollm-corpus/sampled_query_key_set.json", "Sampled sets to write.")
    negatives_per_query: int = option(1, "Sampled keys of a set.", ge=1)


NEXT = "rmsearch train judge_dataset --query-key-set {output} --model-name MODEL --output dataset_list_train.json"


@stage("train.sample_dpo_batch", next_step=NEXT)
def sample_dpo_batch(config: SampleConfig, run: Run) -> None:
    """Sample, for each query, keys to judge against the key that it belongs to.

    A set is the sampled keys, then the corpus row that the query was made from (df_id) or, given labels (--qrels or
    --dataset-path), a key that is labelled to serve it: one set per labelled key. Sampled keys come from a window of
    retrieved ranks and at random. Left out are keys that are known to serve the query, keys with the text of one, and,
    on request, keys that retrieval scores close to it, as likely positives that nobody labelled. The same seed gives
    the same file.
    """

    def sets(sampler: Sampler, queries: Iterable[LabelledQuery]) -> Iterator[SampledSet]:
        for each in queries:
            for own in each.own_keys:
                drawn = sampler.negatives(each, [own], config.negatives_per_query)
                if not drawn:
                    sampler.counts["sets_without_negatives"] += 1
                    continue
                ids, texts = zip(*drawn, strict=True)
                yield SampledSet(
                    query=each.query,
                    query_id=each.query_id,
                    keys=[*texts, sampler.text(own)],
                    key_ids=[*ids, own],
                    query_type=each.query_type,
                    positive_ids=[own] if own in each.positives.keys else [],
                )

    write_samples(config, run, config.output, sets)


if __name__ == "__main__":
    main(sample_dpo_batch)
