"""The documented name of `rmsearch.train.lora`: ``python -m rmsearch.train.lora_example …``."""

from __future__ import annotations

from rmsearch.cli import main
from rmsearch.train.lora import LoraConfig, lora

__all__ = ["LoraConfig", "lora"]

if __name__ == "__main__":
    main(lora)
