"""The documented name of `rmsearch.train.adpo_lora`: ``python -m rmsearch.train.adpo_lora_example …``."""

from __future__ import annotations

from rmsearch.cli import main
from rmsearch.train.adpo_lora import AdpoConfig, adpo_lora

__all__ = ["AdpoConfig", "adpo_lora"]

if __name__ == "__main__":
    main(adpo_lora)
