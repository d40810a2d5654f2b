"""`rmsearch` as a user types it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rmsearch.cli import STAGES, load_stage, run_command
from rmsearch.stage import fields_with_role


def rmsearch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rmsearch.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_help_lists_groups_and_stages() -> None:
    shown = rmsearch("--help").stdout
    assert all(group in shown and all(name in shown for name in stages) for group, stages in STAGES.items())
    assert rmsearch().stdout == shown


def test_an_unknown_command_is_exit_2_and_lists_the_choices() -> None:
    answer = rmsearch("evaluation", "embedd")
    assert answer.returncode == 2 and "embed" in answer.stderr and "Traceback" not in answer.stderr
    assert rmsearch("nothing").returncode == 2


def test_a_group_lists_its_stages_and_names_may_have_dashes() -> None:
    listed = rmsearch("evaluation")
    assert listed.returncode == 0 and all(name in listed.stdout for name in STAGES["evaluation"])
    dashes, underscores = (rmsearch("train", name, "--help").stdout for name in ("make-test-set", "make_test_set"))
    assert dashes == underscores and "--output-queries" in dashes


@pytest.mark.parametrize("group, name", [(group, name) for group, stages in STAGES.items() for name in stages])
def test_every_stage_loads_and_documents_its_flags(group: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stage = load_stage(group, name)
    assert run_command(stage, ["--help"]) == 0
    assert stage.help.split()[0] in (shown := capsys.readouterr().out) and "(default: )" not in shown
    assert fields_with_role(stage.config, "target"), "a stage writes something"
    undocumented = [field for field, info in stage.config.model_fields.items() if not info.description]
    assert not undocumented
