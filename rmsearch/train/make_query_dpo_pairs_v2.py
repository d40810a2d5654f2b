"""The documented name of `rmsearch.train.make_query_dpo_pairs` with ``--variant 2``: large steps."""

from __future__ import annotations

from dataclasses import replace

from rmsearch.cli import main
from rmsearch.stage import option
from rmsearch.train.make_query_dpo_pairs import QueryPairsConfig, make_query_dpo_pairs


class QueryPairsV2Config(QueryPairsConfig):
    """QueryPairsV2Config of `python -m rmsearch.train.make_query_dpo_pairs_v2`."""

    variant: int = option(2, "See make_query_dpo_pairs.", ge=1, le=3)


make_query_dpo_pairs_v2 = replace(make_query_dpo_pairs, name="train.make_query_dpo_pairs_v2", config=QueryPairsV2Config)

if __name__ == "__main__":
    main(make_query_dpo_pairs_v2)
