"""The model card (README.md) of a trained model."""

from __future__ import annotations

from typing import Any

from rmsearch.trainer.evaluation import MeasuredAt

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


def model_card(name: str, facts: dict[str, Any], history: list[MeasuredAt], kept: int, warning: str | None) -> str:
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


def _measures_table(history: list[MeasuredAt], kept: int) -> str:
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
