"""A documented name of `rmsearch.train.make_query_and_less_relevant_keys_recs`, for ``python -m``."""

from __future__ import annotations

from rmsearch.cli import main
from rmsearch.train.make_query_and_less_relevant_keys_recs import make_query_and_less_relevant_keys_recs

if __name__ == "__main__":
    main(make_query_and_less_relevant_keys_recs)
