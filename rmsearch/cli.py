"""``rmsearch GROUP STAGE …``: the same as ``python -m rmsearch.GROUP.STAGE …``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from rmsearch import __version__
from rmsearch.command_line import exit_code_of, run_command
from rmsearch.errors import ConfigError
from rmsearch.stage import Stage

# group -> stage -> one line of help; the modules load only when they are run
STAGES: dict[str, dict[str, str]] = {
    "train": {
        "process_data": "Make a corpus of a hub data set, files or a folder of texts.",
        "make_query_recs": "Have a language model write queries for every row of a corpus.",
        "filter_query_recs": "Keep queries by type, language, length, novelty and answerability.",
        "get_top_relevant_keys_embed": "Find each query's nearest keys with an embedding model.",
        "get_top_relevant_keys_rm": "Find or re-score each query's keys with a reward model.",
        "sample_dpo_batch": "Sample the keys of each query that are to be judged against each other.",
        "judge_dataset": "Judge sampled sets into preference pairs: language model, reward model or labels.",
        "make_query_and_less_relevant_keys_recs": "Have a language model write keys that serve a query less and less.",
        "make_query_dpo_pairs": "Have a language model write queries that a key serves less and less.",
        "sample_advanced_dpo_batch": "Sample negatives beside the keys that correspond to each query.",
        "judge_adpo_dataset": "Judge structured sets into batches with explicit preferences.",
        "make_test_set": "Make query records and test pairs of a labelled data set.",
        "mine": "Mine hard negatives of a labelled data set and write preference pairs.",
        "inspect": "Write an HTML page about preference sets, with checks.",
        "lora": "Train a LoRA reward model on preference pairs.",
        "adpo_lora": "Train a LoRA reward model on explicit orders (advanced DPO).",
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
        lines += _listed(stages)
    lines += [
        "",
        "doctor         Say what this machine can do: GPUs, vLLM, torch, S3, model folders.",
        "--version      Print the version.",
    ]
    lines += ["", "Exit codes: 0 done, 2 you must change something, 75 try again, 1 a bug."]
    return "\n".join(lines)


def _listed(stages: dict[str, str]) -> list[str]:
    width = max(map(len, stages))
    return [f"  {name:<{width}} {text}" for name, text in stages.items()]


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
            print("\n".join(_listed(STAGES[group])))
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
