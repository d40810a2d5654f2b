"""A trained model as a folder that transformers, vLLM and ours load as it is; proved to score as it did in training."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmsearch.errors import ModelError
from rmsearch.models.contract import Contract, make_contract, write_contract
from rmsearch.models.folder import save_model_folder
from rmsearch.trainer.evaluation import score_inputs

if TYPE_CHECKING:
    from rmsearch.trainer.model import Base

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-3}


def export_model(
    base: Base,
    trained: Any,
    output: str,
    sample: list[np.ndarray],
    facts: dict[str, Any],
    extra: dict[str, str],
) -> Contract:
    """Writes adapter/, the merged model, tokenizer, contract and ``extra`` files (name -> text) to ``output``.

    trained: the PeftModel or plain model; it is merged in place, so it is of no use afterwards. sample: token ids of
    inputs. facts: fields of the contract (base_model, base_digest, training). The exported folder's scores of the
    sample are compared with the trained model's: a difference above TOLERANCE is a ModelError and nothing is written.
    """
    import torch

    dtype = _dtype(trained)
    before = _scores(trained, sample, base)
    trained = trained.cpu()
    with tempfile.TemporaryDirectory(prefix="rmsearch-export-") as temp:
        folder = Path(temp)
        merged = trained
        if hasattr(trained, "peft_config"):
            _save_adapter(trained, folder / "adapter", facts.get("base_model"))
            merged = trained.merge_and_unload().to(getattr(torch, dtype))  # what was trained in full was in float32
        _save_plain(merged, folder, base.tokenizer)
        spec, length = base.renderer.template, base.renderer.max_length
        contract = make_contract(folder, spec, length, dtype=dtype, **facts)
        if (folder / "adapter").exists():
            write_contract(folder / "adapter", contract)
            base.tokenizer.save_pretrained(folder / "adapter")
        for name, text in extra.items():
            (folder / name).write_text(text, encoding="utf-8")
        verify_scores(folder, contract, base, sample, before)
        write_contract(folder, contract)
        save_model_folder(folder, output)
    return contract


def _save_plain(model: Any, folder: Path, tokenizer: Any) -> None:
    from rmsearch.engines.transformers import quiet

    config = model.config
    config.num_labels = 1
    config.use_cache = True
    config.problem_type = None
    with quiet():
        model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def _save_adapter(model: Any, folder: Path, base_name: str | None) -> None:
    for each in model.peft_config.values():
        if base_name:
            each.base_model_name_or_path = base_name
        each.inference_mode = True
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)  # "auto" asks the hub
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in


def _dtype(model: Any) -> str:
    """The dtype of the base's weights (the embeddings come first); LoRA and the head are float32 over any base."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _scores(model: Any, sample: list[np.ndarray], base: Base) -> np.ndarray:
    """Rewards of the sample, float32[n]; over a bfloat16 base in autocast, as in training."""
    import torch

    weight = next(model.parameters())
    mixed = partial(torch.autocast, weight.device.type, weight.dtype) if weight.dtype == torch.bfloat16 else None
    pad, limit = base.tokenizer.pad_token_id, base.facts.max_positions
    return score_inputs(model, sample, pad=pad, limit=limit, autocast=mixed)


def verify_scores(
    folder: Path, contract: Contract, base: Base, sample: list[np.ndarray], expected: np.ndarray
) -> float:
    """Loads a folder afresh and compares its rewards with ``expected``; returns the largest difference."""
    from rmsearch.engines.transformers import load_classifier, load_tokenizer

    tokenizer = load_tokenizer(folder)
    loaded = load_classifier(folder, tokenizer, contract, dtype=contract.dtype)
    found = _scores(loaded, sample, base)
    return check_equal(expected, found, contract.dtype, str(folder))


def check_equal(expected: np.ndarray, found: np.ndarray, dtype: str, where: str) -> float:
    """The largest difference of two sets of rewards; ModelError above the tolerance of the dtype."""
    largest = float(np.abs(expected - found).max())
    allowed = TOLERANCE[dtype] * max(1.0, float(np.abs(expected).max()))
    if not largest <= allowed:
        remedy = "Nothing was written. This is a fault in the export; please report it with the model's name"
        raise ModelError(f"scores change by {largest:.2g} (allowed: {allowed:.2g})", where=where, remedy=remedy)
    return largest


CARD = """# {name}

A reward model for search: it scores (query, key) pairs. Base: `{base}`, {steps} steps.
{warning}
## Data

{data}

{measures}## Settings

{settings}

## Use

```python
from rmsearch import Search

search = Search("{name}")
results = await search(["your query"], ["first key", "second key"], k=1)
```

Scores are raw rewards (no sigmoid). `rmsearch.json` holds the prompt template that the model must be used with.
`adapter/` is the LoRA adapter alone, the folder itself the merged model.
"""


def model_card(
    name: str, facts: dict[str, Any], history: list[tuple[int, dict[str, float]]], kept: int, warning: str | None
) -> str:
    """README.md of a trained model: data, measures before and after, settings, how to use it."""
    training = facts["training"]
    settings = {key: value for key, value in training["settings"].items() if value is not None}
    return CARD.format(
        name=name,
        base=facts.get("base_model"),
        steps=kept,
        warning=f"\n**{warning}**\n" if warning else "",
        data="\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in training["data"].items()),
        measures=_measures_table(history, kept),
        settings=_markdown_table(["flag", "value"], [[f"`{key}`", value] for key, value in settings.items()]),
    )


def _measures_table(history: list[tuple[int, dict[str, float]]], kept: int) -> str:
    if not history:
        return ""
    names = sorted({key for _, measured in history for key in measured})
    shown = {history[0][0], kept, history[-1][0]}
    rows = [
        [step, *(f"{measured[each]:.4f}" if each in measured else "" for each in names)]
        for step, measured in history
        if step in shown
    ]
    table = _markdown_table(["step", *(each.removeprefix("eval_") for each in names)], rows)
    return f"## Measures\n\nBefore training, at the kept step {kept} and at the end:\n\n{table}\n\n"


def _markdown_table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in lines)


def json_text(value: Any) -> str:
    """Indented JSON for the side files."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
