"""A documented name of `rmsearch.train.make_query_and_less_relevant_keys_recs`."""

from rmsearch.train.make_query_and_less_relevant_keys_recs import main, make_query_and_less_relevant_keys_recs

if __name__ == "__main__":
    main(make_query_and_less_relevant_keys_recs)
