"""The documented name of `rmsearch.evaluation.convert`: ``python -m rmsearch.evaluation.utils --type …``."""

from __future__ import annotations

from rmsearch.evaluation.convert import ConvertConfig, convert
from rmsearch.stage import main

__all__ = ["ConvertConfig", "convert"]

if __name__ == "__main__":
    main(convert)
