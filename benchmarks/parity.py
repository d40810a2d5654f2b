"""The same float32 model through transformers, vLLM in process and vLLM over HTTP: the largest difference of rewards.

    python benchmarks/parity.py [--pairs 200] [--json FILE]

BERT: the packaged MiniLM with a seeded random head, once with all token types zero and once with segments.
Qwen3: a tiny seeded random decoder, query first and key first (shared prefixes from the cache).
Two orders of texts, short and over-long ones among them. The target is 1e-4.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import tiny_models
from vllm_server import vllm_server

LENGTH = 256
TEMPLATES = {"bert": ("encoder", "encoder_segment"), "qwen3": ("chat", "chat_key_first")}


def build(folder: Path, family: str, name: str) -> Path:
    """A model folder with a contract for the template."""
    from rmsearch.models.contract import write_contract
    from rmsearch.models.folder import ModelFolder
    from rmsearch.models.resolve import make_contract
    from rmsearch.prompts.templates import template

    if family == "bert":
        common.minilm_cross_encoder(folder)
    else:
        tiny_models.decoder_reward_model(folder)
    write_contract(folder, make_contract(ModelFolder(folder), template(name), LENGTH))
    return folder


def pairs_to_score(count: int) -> list[tuple[str, str]]:
    """Short, usual and over-long pairs, with shared queries and keys."""
    queries = [*common.sentences(8, 12, 1), common.sentences(1, 400, 2)[0], ""]
    keys = [*common.sentences(count // 10 - 3, 80, 3), common.sentences(1, 600, 4)[0], "", "a"]
    return [(query, key) for query in queries for key in keys]


def rewards(folder: Path, pairs: list[tuple[str, str]], **options: Any) -> np.ndarray:
    """Rewards through one engine, which is closed again."""
    from rmsearch.engines import load_scorer

    scorer = load_scorer(str(folder), **options)
    try:
        return asyncio.run(scorer.score(pairs))
    finally:
        scorer.close_sync()


def main() -> None:
    """Measure and print."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--pairs", type=int, default=200)
    options = parser.parse_args()
    pairs = pairs_to_score(options.pairs)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for family, names in TEMPLATES.items():
            for name in names:
                folder = build(Path(scratch) / name, family, name)
                base = rewards(folder, pairs, engine="transformers")
                inside = rewards(folder, pairs, engine="vllm", dtype="float32")
                with vllm_server(folder, LENGTH) as url:
                    remote = rewards(folder, pairs, base_url=url)
                rows.append(
                    {
                        "model": family,
                        "template": name,
                        "pairs": len(pairs),
                        "rewards' spread (std)": float(base.std()),
                        "vLLM - transformers": float(np.abs(inside - base).max()),
                        "HTTP - transformers": float(np.abs(remote - base).max()),
                    }
                )
    common.report(rows, options.json)


if __name__ == "__main__":
    main()
