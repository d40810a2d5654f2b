"""Stopping commands: SIGINT and SIGTERM at any moment end them with one line and 75, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pair_sets
import pytest
import tiny_models
from llm_server import serving

from rmsearch.errors import EXIT_RETRY
from rmsearch.interrupts import STOPPED
from rmsearch.llm.asking import JOURNAL
from rmsearch.storage.journal import Journal
from rmsearch.storage.records import write_records

SECONDS = 2.0  # from the signal to the end
VLLM_SECONDS = 5.0


class Command:
    """A running command, and the lines of its stderr so far."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        self.lines.extend(self.process.stderr)

    def wait_for(self, sign: Callable[[], object], limit: float = 200) -> None:
        """Wait until a sign is there; fails when the command ends before."""
        until = time.monotonic() + limit
        while not sign():
            assert self.process.poll() is None and time.monotonic() < until, "".join(self.lines)
            time.sleep(0.01)

    def has_loaded(self, module: str) -> bool:
        """Whether a shared library with that name is in the process: how far its imports are."""
        return module in Path(f"/proc/{self.process.pid}/maps").read_text()

    def children(self) -> set[int]:
        """Processes of its session but itself; a stopped one may leave none, whoever is their parent then."""
        found = set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.add(int(stat.parent.name))
        return found - {self.process.pid}

    def shared_memory(self) -> list[Path]:
        """Files of shared memory that its processes have mapped."""
        maps = [Path(f"/proc/{each}/maps").read_text() for each in [self.process.pid, *self.children()]]
        return [Path(line.split()[-1]) for line in "".join(maps).splitlines() if "/dev/shm/" in line]

    def must_stop(self, seconds: float, *signals: int, group: bool = False) -> None:
        """Send the signals, 50 ms apart, and check how the command ends."""
        before, mapped = len(self.lines), self.shared_memory()
        sent = time.monotonic()
        for i, each in enumerate(signals):
            time.sleep(0.05 if i else 0)
            if self.process.poll() is None:
                (os.killpg if group else os.kill)(self.process.pid, each)
        code = self.process.wait(60)
        took = time.monotonic() - sent
        self._reader.join(10)
        said = [line for line in self.lines[before:] if not line.startswith("progress ")]
        assert (code, said) == (EXIT_RETRY, [f"{STOPPED}\n"])
        assert took <= seconds
        assert not self.children()
        assert not [path for path in mapped if path.exists()]


@contextmanager
def command(*arguments: object, **environment: str) -> Iterator[Command]:
    """``python -m rmsearch.…`` in a session of its own, which is killed in the end."""
    running = Command([str(each) for each in arguments], environment)
    try:
        yield running
    finally:
        for process in running.children() | {running.process.pid}:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        running.process.wait()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 200 rows."""
    path = tmp_path_factory.mktemp("rows") / "corpus.jsonl"
    write_records(str(path), ({"_id": str(i), "text": f"protein and gene {i} " * 20} for i in range(200)))
    return path


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs many seconds for an answer."""
    folder = tiny_models.causal_model(tmp_path_factory.mktemp("models") / "lm")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    return folder


def queries(rows: Path, output: Path, *more: object) -> list[object]:
    """The arguments of make_query_recs."""
    return ["rmsearch.train.make_query_recs", "--input-csv", rows, "--output", output, *more]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_while_it_imports(tmp_path: Path, rows: Path, language_model: Path, signum: int) -> None:
    with command(*queries(rows, tmp_path / "q.jsonl", "--model-name", language_model)) as running:
        running.wait_for(lambda: running.has_loaded("pydantic_core"))
        running.must_stop(SECONDS, signum)


@pytest.mark.parametrize("library", ["libtorch_cpu", "tokenizers"])
def test_while_it_loads_a_model(tmp_path: Path, rows: Path, language_model: Path, library: str) -> None:
    arguments = queries(rows, tmp_path / "q.jsonl", "--model-name", language_model, "--engine", "transformers")
    with command(*arguments) as running:
        running.wait_for(lambda: running.has_loaded(library))
        running.must_stop(SECONDS, signal.SIGTERM)


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_language_model_in_the_middle_of_an_answer(
    tmp_path: Path, rows: Path, language_model: Path, signals: list[int]
) -> None:
    output = tmp_path / "q.jsonl"
    arguments = queries(rows, output, "--model-name", language_model, "--engine", "transformers")
    with command(*arguments) as running:
        running.wait_for(lambda: any("answers to no form" in line for line in running.lines))
        time.sleep(3)  # now it generates
        running.must_stop(SECONDS, *signals, group=True)
    assert not output.exists() and not list(tmp_path.glob("*.rmsearch-tmp"))


def test_answers_of_a_server_are_kept_and_the_journal_is_free(tmp_path: Path, rows: Path, s3_bucket: str) -> None:
    answered = threading.Event()
    answer = json.dumps({"titles": ["a", "b"], "keywords": ["c"], "questions": ["d"], "irr_questions": ["e"]})

    def reply(body: dict[str, object]) -> str:
        if len(server.requests) > 20:
            answered.set()
            time.sleep(20)  # the request under way does not keep the command
        return answer

    with serving(reply) as server:
        more = ["--model-name", "m", "--base-url", server.url, "--in-flight", 8, "--max-attempts", 1]
        arguments = queries(rows, tmp_path / "q.jsonl", *more, "--progress-dir", s3_bucket)
        with command(*arguments) as running:
            running.wait_for(answered.is_set)
            time.sleep(0.3)
            running.must_stop(SECONDS, signal.SIGTERM)
    with Journal(f"{s3_bucket}/answers.journal", JOURNAL) as journal:
        assert len(journal) >= 20


def test_embed_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    data, model = beir(tmp_path, 3000), tiny_models.sentence_encoder(tmp_path / "model")
    arguments = ["rmsearch.evaluation.embed", "--dataset-path", data, "--split", "test", "--model-name", model]
    output = tmp_path / "run.json"
    arguments += ["--output", output, "--output-eval", tmp_path / "eval.json", "--key-batch-size", 3000]
    with command(*arguments, "--engine", "transformers") as running:
        running.wait_for(lambda: Path(f"{output}.vectors").exists())
        running.must_stop(SECONDS, signal.SIGINT)


def beir(folder: Path, keys: int) -> Path:
    """A data set of one query and some long keys."""
    data = folder / "data"
    write_records(str(data / "queries.jsonl"), [{"_id": "q", "text": "gene"}])
    write_records(
        str(data / "corpus.jsonl"), ({"_id": f"k{i}", "title": "", "text": f"{i} " * 99} for i in range(keys))
    )
    (data / "qrels").mkdir()
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tk1\t1\n")
    return data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "seconds", "kept"), [([signal.SIGTERM], 20.0, {1}), ([signal.SIGINT] * 2, SECONDS, {0, 1})]
)
def test_training_saves_its_state_first_unless_told_twice(
    tmp_path: Path, signals: list[int], seconds: float, kept: set[int]
) -> None:
    rows = pair_sets.write(tmp_path / "train.json", pair_sets.pairs(2000))
    base, output = tiny_models.bert_cross_encoder(tmp_path / "base"), tmp_path / "model"
    arguments = ["rmsearch.train.lora", "--dataset-list-train", rows, "--model-name", base, "--output-dir", output]
    arguments += ["--dtype", "fp32", "--num-train-epochs", 1000, "--per-device-train-batch-size", 64]
    with command(*arguments, "--save-steps", 100_000) as running:
        running.wait_for(lambda: any("progress " in line and "done=0" not in line for line in running.lines))
        running.must_stop(seconds, *signals)
    assert len(list(output.glob("checkpoint-*/rmsearch_checkpoint.json"))) in kept  # a small one is saved within 50 ms


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["spawned", "ready"])
def test_vllm(tmp_path: Path, rows: Path, language_model: Path, moment: str) -> None:
    output = tmp_path / "q.jsonl"
    arguments = queries(rows, output, "--model-name", language_model, "--engine", "vllm", "--max-attempts", 1)
    signs = {
        "spawned": lambda: len(running.children()) >= 2,  # the engine's process, and the resource tracker
        "ready": lambda: Path(f"{output}.answers").stat().st_size > 200,
    }
    with command(*arguments) as running:
        running.wait_for(lambda: Path(f"{output}.answers").exists())
        running.wait_for(signs[moment])
        running.must_stop(VLLM_SECONDS, signal.SIGINT, group=True)
