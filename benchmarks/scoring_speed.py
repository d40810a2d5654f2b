"""Scoring 512 pairs of about 128 tokens: each engine against the plain library call, interleaved, in the same dtype.

    python benchmarks/scoring_speed.py [--engine transformers|vllm] [--dtype float32] [--rounds 5] [--json FILE]

transformers: our scorer and sentence-transformers' CrossEncoder.predict, both from strings.
vllm: our scorer from strings, and LLM.classify on token ids made beforehand, each with an engine of the same settings.
The target is a ratio of at least 1.0 for transformers and 0.9 for vllm.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common

Sides = dict[str, Callable[[], Any]]


def transformers_sides(folder: Path, pairs: list[tuple[str, str]], dtype: str, done: ExitStack) -> Sides:
    """Our transformers engine and sentence-transformers. done: closes them at the end."""
    import torch
    from sentence_transformers import CrossEncoder

    from rmsearch.engines import load_scorer

    ours = load_scorer(str(folder), engine="transformers", dtype=dtype)
    done.callback(ours.close_sync)
    theirs = CrossEncoder(
        str(folder),
        max_length=256,
        device="cpu",
        activation_fn=torch.nn.Identity(),
        model_kwargs={"dtype": getattr(torch, dtype)},
    )
    return {
        "rmsearch": lambda: asyncio.run(ours.score(pairs)),
        "CrossEncoder.predict": lambda: theirs.predict(pairs, show_progress_bar=False),
    }


def vllm_sides(folder: Path, pairs: list[tuple[str, str]], dtype: str, done: ExitStack) -> Sides:
    """Our vLLM engine and vLLM's own offline call. done: closes them at the end."""
    from rmsearch.engines import load_scorer
    from rmsearch.engines.vllm_start import prepare, spawning

    ours = load_scorer(str(folder), engine="vllm", dtype=dtype)
    done.callback(ours.close_sync)
    ids = [ours.renderer.render(*pair).ids for pair in pairs]  # type: ignore[attr-defined]
    from vllm import LLM, PoolingParams, TokensPrompt

    settings = {"runner": "pooling", "dtype": dtype, "max_model_len": 256, "enforce_eager": True, "seed": 0}
    with spawning(prepare()):
        theirs = LLM(model=str(folder), enable_prefix_caching=False, use_tqdm_on_load=False, **settings)
    done.callback(theirs.llm_engine.engine_core.shutdown)
    raw = PoolingParams(use_activation=False)
    prompts = [TokensPrompt(prompt_token_ids=each) for each in ids]
    return {
        "rmsearch": lambda: asyncio.run(ours.score(pairs)),
        "LLM.classify": lambda: theirs.classify(prompts, pooling_params=raw, use_tqdm=False),
    }


def main() -> None:
    """Measure and print."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=512)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    pairs = common.pairs_of_about(128, options.pairs)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as done:
        folder = common.minilm_cross_encoder(Path(scratch) / "model")
        make = transformers_sides if options.engine == "transformers" else vllm_sides
        sides = make(folder, pairs, options.dtype, done)
        seconds = common.interleaved(sides, options.rounds)
    ours, theirs = sides
    rates = {name: len(pairs) / min(each) for name, each in seconds.items()}
    ratios = common.ratio(seconds, ours, theirs)
    rows = [
        {
            "side": name,
            "dtype": options.dtype,
            "pairs/s (best)": rates[name],
            "ratio (best)": ratios["best"] if name == ours else 1.0,
            "ratio (median of rounds)": ratios["median"] if name == ours else 1.0,
        }
        for name in sides
    ]
    common.report(rows, options.json)


if __name__ == "__main__":
    main()
