"""``rmsearch GROUP STAGE …``: the same as ``python -m rmsearch.GROUP.STAGE …``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from rmsearch import __version__
from rmsearch.errors import ConfigError
from rmsearch.flags import exit_code_of, run_command
from rmsearch.stage import Stage

# group -> stage -> one line of help; the modules load only when they are run
STAGES: dict[str, dict[str, str]] = {
    "train": {
        "mine": "Mine hard negatives and write preference pairs.",
        "lora": "Train a LoRA reward model on preference pairs.",
    },
    "evaluation": {
        "bm25": "Rank the corpus with BM25.",
        "embed": "Rank the corpus with an embedding model.",
        "rerank": "Rerank candidates with a reward model.",
        "ndcg": "Score runs with nDCG, MAP, MRR, recall and precision, with significance tests.",
        "report": "Write one HTML page that compares runs.",
        "convert": "Merge adapters, convert rerankers and upstream's folders; verify the scores.",
    },
}


def load_stage(group: str, name: str) -> Stage[Any]:
    """The stage object of ``rmsearch.GROUP.NAME``: the module's one `Stage`."""
    module = import_module(f"rmsearch.{group}.{name}")
    found = [value for value in vars(module).values() if isinstance(value, Stage) and value.name == f"{group}.{name}"]
    return found[0]


def _usage() -> str:
    lines = [
        f"rmsearch {__version__}: search ranked by a reward model",
        "",
        "Usage: rmsearch GROUP STAGE [FLAGS]",
        "       rmsearch GROUP STAGE --help",
        "",
    ]
    for group, stages in STAGES.items():
        lines.append(f"{group}:")
        lines += [f"  {name:<10} {text}" for name, text in stages.items()]
    lines += [
        "",
        "doctor       Say what this machine can do: GPUs, vLLM, torch, S3, model folders.",
        "--version    Print the version.",
    ]
    lines += ["", "Exit codes: 0 done, 2 you must change something, 75 try again, 1 a bug."]
    return "\n".join(lines)


def _command(arguments: list[str]) -> int:
    match arguments:
        case [] | ["--help"] | ["-h"] | ["help"]:
            print(_usage())
            return 0
        case ["--version"]:
            print(__version__)
            return 0
        case ["doctor", *rest]:
            from rmsearch.doctor import doctor

            return run_command(doctor, rest)
        case [group] | [group, "--help"] | [group, "-h"] if group in STAGES:
            print(f"Usage: rmsearch {group} STAGE [FLAGS]\n")
            print("\n".join(f"  {name:<10} {text}" for name, text in STAGES[group].items()))
            return 0
        case [group, name, *rest] if name.replace("-", "_") in STAGES.get(group, {}):
            return run_command(load_stage(group, name.replace("-", "_")), rest)
    group = arguments[0]
    choices = (
        f"Stages of {group}: {', '.join(STAGES[group])}" if group in STAGES else f"Groups: {', '.join(STAGES)}, doctor"
    )

    def refuse() -> None:
        raise ConfigError(f"there is no command {' '.join(arguments[:2])!r}", remedy=choices)

    return exit_code_of(refuse)


def main() -> None:
    """Entry point of the ``rmsearch`` command."""
    raise SystemExit(_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
