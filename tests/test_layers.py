"""The rule at the top of docs/architecture.md: commands apart from the library, imports downwards only."""

from __future__ import annotations

import ast
import re
import shutil
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("train", "evaluation", "tree")
ALIASES = {  # documented module names of another command
    "rmsearch.evaluation.utils",
    "rmsearch.train.adpo_lora_example",
    "rmsearch.train.lora_example",
    "rmsearch.train.make_query_and_less_relevant_keys_recs-gptoss",
    "rmsearch.train.make_query_and_less_relevant_keys_recs_gptoss",
    "rmsearch.train.make_query_dpo_pairs_v2",
    "rmsearch.train.make_query_dpo_pairs_v3",
}


def levels() -> dict[str, int]:
    """Room -> its height, as the page prints it: the lowest line of the block is the lowest level."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"<!-- levels -->\n```text\n(.*?)```", page, re.DOTALL)
    assert block is not None
    lines = block[1].strip().splitlines()
    return {room: len(lines) - row for row, line in enumerate(lines) for room in line.split("  ")[0].split()}


def imports(package: Path) -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, wherever in the file."""
    modules = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    arrows: dict[str, set[str]] = {}
    for name, tree in modules.items():
        found = arrows.setdefault(name, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {each if each in modules else node.module for each in whole}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        found &= modules.keys() - {"rmsearch", name}  # of the package itself only its version is taken
    return arrows


def room(module: str) -> str:
    """``storage`` of ``rmsearch.storage.uri``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violations(package: Path) -> list[str]:
    """Every arrow that the rule forbids, in words."""
    height, arrows = levels(), imports(package)
    wrong = [f"{each} is in no level" for each in arrows if room(each) not in height]
    for name, targets in arrows.items():
        for target in targets:
            ours, theirs = room(name), room(target)
            if ours == theirs and ours in COMMANDS and name not in ALIASES:
                wrong.append(f"{name} is a command and imports the command {target}")
            elif ours != theirs and height.get(theirs, 0) >= height.get(ours, 0):
                wrong.append(f"{name} imports {target}, which is not below it")
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        wrong.append("a circle: " + " -> ".join(error.args[1]))
    return wrong


def functions_imports(path: Path) -> set[str]:
    """Modules of ours, and numpy, that functions of the file import."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    inside = [
        part for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions) for part in node.body
    ]
    found = [node for part in inside for node in ast.walk(part)]
    names = {node.module or "" for node in found if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in found if isinstance(node, ast.Import) for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("rmsearch", "numpy")}


def test_imports_run_downwards_only() -> None:
    assert violations(ROOT / "rmsearch") == []


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("storage/uri.py", "from rmsearch.engines.scheduler import PairScorer", "not below"),
        ("trainer/loop.py", "    from rmsearch.train.lora import lora", "not below"),
        ("metrics/measures.py", "from rmsearch import llm, datasets", "not below"),
        ("train/mine.py", "from rmsearch.train.lora import lora", "is a command"),
        ("storage/s3_errors.py", "import rmsearch.storage.uri", "a circle"),
        ("new_room/thing.py", "", "in no level"),
    ],
)
def test_a_planted_arrow_is_found(tmp_path: Path, module: str, line: str, said: str) -> None:
    copy = shutil.copytree(ROOT / "rmsearch", tmp_path / "rmsearch", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / module).parent.mkdir(exist_ok=True)
    with (copy / module).open("a") as file:
        file.write(f"\n\ndef planted() -> None:\n    {line.strip() or 'pass'}\n")
    assert any(said in each for each in violations(copy))


def test_our_own_modules_are_imported_at_the_top() -> None:
    lazy = {str(path.relative_to(ROOT)): functions_imports(path) for path in (ROOT / "rmsearch").rglob("*.py")}
    assert {name: modules for name, modules in lazy.items() if modules} == {
        "rmsearch/engines/__init__.py": {"rmsearch.engines.loading"}
    }


def test_no_class_name_stands_twice() -> None:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "rmsearch").rglob("*.py")]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_file_is_longer_than_350_lines() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "rmsearch").rglob("*.py")}
    assert [name for name, length in lengths.items() if length > 350] == []
