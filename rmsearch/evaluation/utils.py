"""A documented name of `rmsearch.evaluation.convert`."""

from rmsearch.evaluation.convert import convert, main

if __name__ == "__main__":
    main(convert)
