"""The stage contract through its doors: flags, YAML, environment, run record, up-to-date check, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Literal

import pytest

from rmsearch.cli import run_command
from rmsearch.errors import EXIT_BUG, EXIT_DONE, EXIT_RETRY, EXIT_USER, ConfigError, RejectedError, RetryableError
from rmsearch.stage import Run, StageConfig, model, option, source, stage, target, tuning
from rmsearch.storage import uri


class CopyConfig(StageConfig):
    input: str = source(help="What to copy.")
    model_name: str | None = model(None, "Not used.")
    output: str = target("copy.txt", "Where to.")
    times: int = option(1, "How often.", ge=1)
    mode: Literal["plain", "upper"] = option("plain", "How.")
    loud: bool = option(True, "A switch.")
    names: list[str] = option([], "A list.")
    batch_size: int = tuning(8, "Speed only.")
    fail: str | None = option(None, "Raise this.")


@stage("evaluation.copy", next_step="look at {output}")
def copy(config: CopyConfig, run: Run) -> None:
    """Copy a file.

    The long text.
    """
    if config.fail == "bug":
        raise ZeroDivisionError
    if config.fail == "later":
        raise RetryableError("the server is busy", remedy="Try again")
    with uri.reader(config.input) as file:
        data = file.read() * config.times
    if config.fail == "rejects":
        for i in range(5):
            run.reject({"i": i}, "odd" if i % 2 else "even")
        run.check_rejects(total=10)
    with uri.writer(config.output) as out:
        out.write(data.upper() if config.mode == "upper" else data)
    run.counts["bytes"] = len(data)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("abc")
    return path


def command(text: Path, *flags: str) -> tuple[int, Path]:
    out = text.parent / "out.txt"
    return run_command(copy, ["--input", str(text), "--output", str(out), *flags]), out


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--mode", "upper"], "ABC"),
        (["--mode=upper", "--times=2"], "ABCABC"),
        (["--loud=false", "--names", "a", "--names", "b"], "abc"),
        (["--no-loud"], "abc"),
        (["--loud=true"], "abc"),
    ],
)
def test_flags(text: Path, flags: list[str], expected: str) -> None:
    code, out = command(text, *flags)
    assert code == EXIT_DONE
    assert out.read_text() == expected


def test_booleans_and_lists_reach_the_record(text: Path) -> None:
    _, out = command(text, "--loud=false", "--names", "a", "--names", "b")
    record = json.loads(Path(f"{out}.run.json").read_text())
    assert record["config"]["loud"] is False
    assert record["config"]["names"] == ["a", "b"]
    assert record["counts"] == {"bytes": 3}
    assert record["versions"]["rmsearch"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--times", "0"], ["--times", "greater than or equal to 1", "'0'"]),
        (["--times", "many"], ["--times", "many"]),
        (["--mode", "loud"], ["--mode", "loud"]),
        (["--tims", "1"], ["--tims", "--times"]),
        (["--input", "twice"], ["--input", "multiple times"]),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2(
    text: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    code, out = command(text, *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == EXIT_USER
    assert len(error) == 1 and all(word in error[0] for word in words), error
    assert not out.exists()


def test_a_missing_input_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(copy, ["--input", "/nowhere/x", "--output", str(tmp_path / "o")]) == EXIT_USER
    error = capsys.readouterr().err.strip()
    assert "/nowhere/x" in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(copy, []) == EXIT_USER
    assert "--input" in capsys.readouterr().err


def test_yaml_environment_and_flags_in_that_order(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("times: 2\nmode: upper\nnames: [x]\n")
    code, out = command(text, "--config", str(settings))
    assert (code, out.read_text()) == (EXIT_DONE, "ABCABC")
    monkeypatch.setenv("RMSEARCH_EVALUATION_COPY_TIMES", "3")
    assert command(text, "--config", str(settings))[1].read_text() == "ABC" * 3
    assert command(text, "--config", str(settings), "--times", "1")[1].read_text() == "ABC"
    settings.write_text("tims: 2\n")
    assert command(text, "--config", str(settings))[0] == EXIT_USER
    assert "tims" in capsys.readouterr().err
    settings.write_text("a: [")
    assert command(text, "--config", str(settings))[0] == EXIT_USER


def test_lists_come_from_the_environment_and_settings_from_s3(
    text: Path, monkeypatch: pytest.MonkeyPatch, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with uri.writer(f"{s3_bucket}/settings.yaml") as file:
        file.write(b"batch-size: 3\nmax_reject_rate: 0.5\nnames: [x]\n")
    monkeypatch.setenv("RMSEARCH_EVALUATION_COPY_NAMES", "a b,c")
    monkeypatch.setenv("RMSEARCH_EVALUATION_COPY_NO_SUCH_FLAG", "1")
    code, out = command(text, "--config", f"{s3_bucket}/settings.yaml")
    config = json.loads(Path(f"{out}.run.json").read_text())["config"]
    assert code == EXIT_DONE and config["names"] == ["a b", "c"]
    assert (config["batch_size"], config["max_reject_rate"]) == (3, 0.5)
    assert command(text, "--config", f"{s3_bucket}/none.yaml")[0] == EXIT_USER
    assert "none.yaml" in capsys.readouterr().err


def test_a_misspelt_required_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(copy, ["--inptu", "a", "--times", "1"]) == EXIT_USER
    assert "--input" in (error := capsys.readouterr().err) and "--inptu" in error


def test_help_is_complete_and_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(copy, ["--help"]) == EXIT_DONE
    shown = capsys.readouterr().out
    for name, info in CopyConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert (info.description or "")[:20] in shown
    assert "(required)" in shown and "(default: 1)" in shown and "The long text." in shown
    assert shown.index("--input") < shown.index("--force")


def test_the_same_run_again_does_nothing_and_says_so(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out = command(text)
    stamp = out.stat().st_mtime_ns
    assert command(text)[0] == EXIT_DONE
    assert "up_to_date" in capsys.readouterr().err
    assert command(text, "--batch-size", "9")[0] == EXIT_DONE
    assert out.stat().st_mtime_ns == stamp
    command(text, "--force")
    assert out.stat().st_mtime_ns > stamp


@pytest.mark.parametrize("change", ["input", "flag", "output"])
def test_a_change_runs_it_again(text: Path, change: str) -> None:
    _, out = command(text)
    if change == "input":
        text.write_text("abcd")
        command(text)
        assert out.read_text() == "abcd"
    elif change == "flag":
        command(text, "--times", "2")
        assert out.read_text() == "abcabc"
    else:
        out.write_text("damaged")
        command(text)
        assert out.read_text() == "abc"


def test_exit_codes(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(text, "--fail", "bug")[0] == EXIT_BUG
    assert "please report" in capsys.readouterr().err
    assert command(text, "--fail", "later")[0] == EXIT_RETRY
    assert capsys.readouterr().err.strip() == "error: the server is busy. Try again"


def test_rejects_above_the_limit_fail_and_are_kept(text: Path) -> None:
    out = text.parent / "out.txt"
    with pytest.raises(RejectedError, match=r"5 of 10 .*3 × even.*2 × odd"):
        copy(input=str(text), output=str(out), fail="rejects")
    rejects = [json.loads(line) for line in Path(f"{out}.rejects.jsonl").read_text().splitlines()]
    assert [r["record"]["i"] for r in rejects] == [0, 1, 2, 3, 4]
    assert not out.exists()
    copy(input=str(text), output=str(out), fail="rejects", max_reject_rate=0.5)
    assert out.read_text() == "abc"


def test_python_call_raises(text: Path) -> None:
    with pytest.raises(ConfigError, match="--times"):
        copy(input=str(text), times=0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_is_exit_75_without_a_traceback(tmp_path: Path, signum: int) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(
        textwrap.dedent("""
        from __future__ import annotations
        import time
        from rmsearch.cli import main
        from rmsearch.stage import Run, StageConfig, stage
        @stage("evaluation.sleep")
        def sleep(config: StageConfig, run: Run) -> None:
            "Sleep."
            print("ready", flush=True)
            time.sleep(30)
        main(sleep)
        """)
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signum)
    _, error = process.communicate(timeout=20)
    assert process.returncode == EXIT_RETRY
    assert "Traceback" not in error and "run the same command again" in error
