"""No stage writes over what it reads: refused by the path behind every spelling, before anything is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rmsearch.cli import load_stage, run_command
from rmsearch.errors import EXIT_DONE, EXIT_USER, ConfigError
from rmsearch.stage import Run, StageConfig, execute, model, option, source, stage, target
from rmsearch.storage import uri

Refused = Callable[..., None]


class JoinConfig(StageConfig):
    inputs: list[str] = source([], "What to join: PATH or NAME=PATH.")
    model_name: str | None = model(None, "Another input.")
    output: str = target(help="Where to.")
    output_copy: str | None = target(None, "And there.")
    missing: str | None = option(None, "An input that prepare() makes.")

    def prepare(self) -> None:
        if self.missing:
            (folder := Path(self.inputs[0])).mkdir()
            (folder / self.missing).write_text("downloaded")


@stage("evaluation.join")
def join(config: JoinConfig, run: Run) -> None:
    """Write something to every output."""
    for place in filter(None, (config.output, config.output_copy)):
        with uri.writer(place) as file:
            file.write(b"joined")


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a data set, a model, some files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DS" / "qrels").mkdir(parents=True)
    (tmp_path / "DS" / "corpus.jsonl").write_text('{"_id": "d", "title": "", "text": "insulin"}\n')
    (tmp_path / "DS" / "queries.jsonl").write_text('{"_id": "q", "text": "insulin"}\n')
    (tmp_path / "DS" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    (tmp_path / "M").mkdir()
    (tmp_path / "M" / "config.json").write_text("{}")
    (tmp_path / "q.json").write_text('[{"query": "insulin", "df_id": "1"}]')
    (tmp_path / "sets.json").write_text("[]")
    (tmp_path / "link.json").symlink_to("q.json")
    (tmp_path / "elsewhere").symlink_to("DS")
    return tmp_path


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Checks that a command ends with 2 and one line with these words, and changes no file."""

    def check(command: str, *words: str) -> None:
        before = contents(place)
        group, name, *flags = command.split()
        code = run_command(join if name == "join" else load_stage(group, name), flags)
        error = capsys.readouterr().err.strip()
        assert code == EXIT_USER, error
        assert "\n" not in error and all(word in error for word in words), error
        assert contents(place) == before

    return check


@pytest.mark.parametrize(
    "command, words",
    [
        ("evaluation bm25 --dataset-path DS --output DS/corpus.jsonl", "--output --dataset-path DS/corpus.jsonl"),
        ("evaluation bm25 --dataset-path DS --output-eval DS/qrels/test.tsv", "--output-eval --dataset-path"),
        ("train filter_query_recs --input q.json --output q.json", "--output --input q.json"),
        ("train judge_dataset --query-key-set sets.json --model-name M --output sets.json", "--output --query-key-set"),
        (
            "train judge_dataset --query-key-set sets.json --model-name M --output o.json --output-ties sets.json",
            "--output-ties --query-key-set sets.json",
        ),
        ("train lora --dataset-list-train q.json --model-name M --output-dir M", "--output-dir --model-name"),
        (
            "train lora --dataset-list-train M/config.json --model-name m --output-dir ./M/",
            "--output-dir M/config.json",
        ),
        (
            "train judge_dataset --query-key-set sets.json --model-name M --output same.json --output-test ./same.json",
            "--output --output-test same.json",
        ),
        ("evaluation bm25 --dataset-path DS --output new.json --output-eval new.json", "--output --output-eval"),
    ],
)
def test_what_is_read_is_not_written_over(refused: Refused, command: str, words: str) -> None:
    refused(command, *words.split())


@pytest.mark.parametrize(
    "given, written",
    [
        ("q.json", "./DS/../q.json"),
        ("q.json", "{here}/q.json"),
        ("q.json", "link.json"),
        ("link.json", "q.json"),
        ("name=q.json", "q.json"),
        ("DS", "elsewhere/corpus.jsonl"),
        ("elsewhere/", "DS//corpus.jsonl"),
        ("DS", "DS/"),
        ("DS/qrels", "DS"),
    ],
)
def test_every_spelling_of_a_path_is_seen(refused: Refused, place: Path, given: str, written: str) -> None:
    written = written.format(here=place)
    refused(f"evaluation join --inputs {given} --output {written}", "--inputs", "--output", written)
    refused(
        f"evaluation join --inputs sets.json --inputs {given} --output new --output-copy {written}", "--output-copy"
    )


def test_python_calls_and_force_are_refused_too(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output .*--inputs"):
        execute(join, inputs=["q.json"], output="q.json", force=True)


def test_what_is_about_to_be_downloaded_is_safe(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output .*--inputs"):
        execute(join, inputs=["fresh"], missing="corpus.jsonl", output="fresh/corpus.jsonl")
    assert Path("fresh/corpus.jsonl").read_text() == "downloaded"


@pytest.mark.parametrize(
    "given, written",
    [
        ("q.json", "new.json"),
        ("q.json", "DS/new.json"),
        ("DS", "DS/new.json"),  # a file of its own in the data set's folder
        (".", "new.json"),
        ("DS", "DS2"),
        ("DS/corpus.jsonl", "DS/corpus.json"),
        ("new.json", "new.json"),  # a name, such as a hub's, and no file
        ("q.json", "/dev/null"),
    ],
)
def test_what_is_not_read_may_be_written_again_and_again(place: Path, given: str, written: str) -> None:
    for _ in range(2 if given != written else 1):
        assert run_command(join, ["--inputs", given, "--output", written]) == EXIT_DONE


def test_a_device_may_be_two_outputs(place: Path) -> None:
    assert run_command(join, ["--output", os.devnull, "--output-copy", os.devnull]) == EXIT_DONE


def test_another_stages_file_in_an_input_folder_is_kept(place: Path) -> None:
    execute(join, output="DS/corpus.jsonl", force=True)
    record = json.loads(Path("DS/corpus.jsonl.run.json").read_text())
    Path("DS/corpus.jsonl.run.json").write_text(json.dumps(record | {"stage": "train.process_data"}))
    with pytest.raises(ConfigError, match=r"--output .*--inputs"):
        execute(join, inputs=["DS"], output="DS/corpus.jsonl")


@pytest.mark.s3
def test_objects_are_kept_too(place: Path, s3_bucket: str) -> None:
    for name in ("q.json", "DS/corpus.jsonl"):
        with uri.writer(f"{s3_bucket}/{name}") as file:
            file.write(b"kept")
    for given, written in [
        ("q.json", "q.json"),
        ("q.json", "/q.json"),
        ("DS", "DS/corpus.jsonl"),
        ("DS/", "DS"),
        ("DS/corpus.jsonl", "DS"),
    ]:
        with pytest.raises(ConfigError, match=r"--output .*--inputs"):
            execute(join, inputs=[f"{s3_bucket}/{given}"], output=f"{s3_bucket}/{written}")
    with pytest.raises(ConfigError, match=r"--output .*--output-copy"):
        execute(join, output=f"{s3_bucket}/new", output_copy=f"{s3_bucket}//new")
    execute(join, inputs=[f"{s3_bucket}/DS"], output=f"{s3_bucket}/DS2", output_copy=f"{s3_bucket}/DS/new")
    for name in ("q.json", "DS/corpus.jsonl"):
        with uri.reader(f"{s3_bucket}/{name}") as file:
            assert file.read() == b"kept"
