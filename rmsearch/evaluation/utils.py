"""The documented name of `rmsearch.evaluation.convert`: ``python -m rmsearch.evaluation.utils --type …``."""

from __future__ import annotations

from rmsearch.cli import main
from rmsearch.evaluation.convert import ConvertConfig, convert

__all__ = ["ConvertConfig", "convert"]

if __name__ == "__main__":
    main(convert)
