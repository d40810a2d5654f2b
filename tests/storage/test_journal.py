"""Journals: what was put is there after any kill, settings are never mixed, and one process writes at a time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmsearch.errors import AccessError, ConfigError, RecordError, RetryableError
from rmsearch.storage import journal_stores, uri
from rmsearch.storage.journal import Journal, journal_key

ITEMS: list[tuple[str, Any]] = [(journal_key("pair", number), number / 3) for number in range(8)]
ITEMS += [("plain key é", {"text": "zwölf\n", "list": [1, None]}), ("k" * 32, "text"), ("AB" * 16, True), ("n", None)]


def filled(path: Path, fingerprint: str = "f") -> Path:
    with Journal(str(path), fingerprint) as journal:
        for key, value in ITEMS[:4]:
            journal.put(key, value)
        journal.put_many(ITEMS[4:])
    return path


def test_what_was_put_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path / "deep" / "out.json.journal")
    with Journal(str(path), "f") as journal:
        assert len(journal) == len(ITEMS)
        assert all(key in journal and journal.get(key) == value for key, value in ITEMS)
        assert "absent" not in journal and journal.get("absent") is None
        journal.put(ITEMS[0][0], 7)
        assert journal.get(ITEMS[0][0]) == 7 and len(journal) == len(ITEMS)
    with Journal(str(path), "f") as journal:
        assert journal.get(ITEMS[0][0]) == 7
        journal.discard()
        assert len(journal) == 0
    assert not path.exists()
    assert "journal resumed" in capsys.readouterr().err


def test_keys() -> None:
    assert journal_key("a", 1, {"x": 1, "y": [1.5]}) == journal_key("a", 1, {"y": [1.5], "x": 1})
    assert len({journal_key("a", "b"), journal_key("ab"), journal_key(["a", "b"]), journal_key("b", "a")}) == 4
    assert journal_key("é\ud800") and len(journal_key()) == 32
    with pytest.raises(ValueError, match="JSON compliant"):
        journal_key(math.nan)


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    with Journal(str(tmp_path / "j"), "f") as journal:
        journal.put_many([("a", np.float32(0.1)), ("b", 0.1), ("c", 2**70), ("d", (1, 2))])
        before = [journal.get(key) for key in "abcd"]
        for bad in (math.nan, [math.inf], object()):
            with pytest.raises(RecordError):
                journal.put("x", bad)
    with Journal(str(tmp_path / "j"), "f") as journal:
        assert [journal.get(key) for key in "abcd"] == before == [float(np.float32(0.1)), 0.1, 2**70, [1, 2]]
        assert "x" not in journal


@given(cut=st.integers(0, 900), junk=st.binary(max_size=6))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_torn_at_any_byte(tmp_path: Path, cut: int, junk: bytes) -> None:
    """Any prefix of a journal opens, holds a prefix of the items, and goes on."""
    path = tmp_path / "j"
    path.unlink(missing_ok=True)
    whole = filled(path).read_bytes()
    head = whole.index(b"\n") + 1
    path.write_bytes(whole[:cut] + (junk if cut > head else b""))
    with Journal(str(path), "f") as journal:
        assert all(journal.get(key) == value for key, value in ITEMS[: len(journal)])
        assert len(journal) >= whole[head:cut].count(b"\n")
        journal.put_many(ITEMS)
    with Journal(str(path), "f") as journal:
        assert len(journal) == len(ITEMS) and all(journal.get(key) == value for key, value in ITEMS)


def test_another_fingerprint_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path / "j")
    with Journal(str(path), "g\n") as journal:
        assert len(journal) == 0
        journal.put("a", 1)
    assert "journal started anew" in capsys.readouterr().err
    with Journal(str(path), "g\n") as journal:
        assert len(journal) == 1


@pytest.mark.parametrize("content", [b"a user's own notes", b'{"a": 1}\n', b"\0" * 100])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a journal"), Journal(str(path), "f"):
        pass
    assert path.read_bytes() == content


def test_a_second_process_is_told(tmp_path: Path) -> None:
    path = filled(tmp_path / "j")
    code = "import sys; from rmsearch.storage.journal import Journal; Journal(sys.argv[1], 'f').__enter__()"
    with Journal(str(path), "f") as journal:
        with pytest.raises(RetryableError, match="another run has this journal open"), Journal(str(path), "f"):
            pass
        second = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        assert "RetryableError" in second.stderr and "another run has this journal open" in second.stderr
        journal.put("still", "mine")
    with Journal(str(path), "f") as journal:
        assert journal.get("still") == "mine"


KILLED = """
import os, sys, time
from rmsearch.storage.journal import Journal
with Journal(sys.argv[1], "f") as journal:
    if os.fork() == 0:  # a worker that outlives its parent must not keep the lock
        time.sleep(4)
        os._exit(0)
    for number in range(len(journal), 10**9):
        journal.put(f"key {number}", number)
        if number == int(sys.argv[2]):
            print("there", flush=True)
"""


def test_sigkill_loses_nothing_that_was_put(tmp_path: Path) -> None:
    path, reached = tmp_path / "j", 0
    for goal in (1000, 20000):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(goal)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        process.kill()
        process.wait()
        with Journal(str(path), "f") as journal:
            assert len(journal) > goal > reached and all(
                journal.get(f"key {number}") == number for number in range(len(journal))
            )
            reached = len(journal)


def test_a_disk_that_fills_up_leaves_no_torn_line_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    path = tmp_path / "j"
    with Journal(str(path), "f") as journal:
        journal.put("a", 1)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limit[1]))
            with pytest.raises(RetryableError):
                journal.put("b", "x" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        journal.put("c", 3)
    with Journal(str(path), "f") as journal:
        assert (len(journal), journal.get("a"), journal.get("c")) == (2, 1, 3)


MEMORY = """
import resource, sys
from rmsearch.storage.journal import Journal, journal_key
keys = [f"{number:032x}" for number in range(1000)]
with Journal(sys.argv[1], "f") as journal:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start in range(0, 300_000, 1000):
        journal.put_many((f"{start + number:032x}", (start + number) / 7) for number in range(1000))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 // len(journal))
"""


def test_memory_per_item(tmp_path: Path) -> None:
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "j")]
    each = int(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    assert each < 250, each


@pytest.mark.s3
def test_on_s3(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"{s3_bucket}/out/scores.jsonl.journal"
    for key, value in ITEMS:
        with Journal(where, "f") as journal:
            journal.put(key, value)
    parts = uri.list_files(where)
    assert len(parts) == len(ITEMS) and uri.name(parts[0]).startswith("part-000001")
    monkeypatch.setattr(journal_stores, "COMPACT_PARTS", 5)
    with Journal(where, "f") as journal:
        assert all(journal.get(key) == value for key, value in ITEMS)
        assert len(uri.list_files(where)) == 1
    with Journal(where, "f") as one, Journal(where, "f") as two:  # no lock there: neither loses what it put
        one.put("one", 1)
        two.put("two", 2)
    with Journal(where, "f") as journal:
        assert (journal.get("one"), journal.get("two"), len(journal)) == (1, 2, len(ITEMS) + 2)
    with Journal(where, "other") as journal:
        assert len(journal) == 0 and "journal started anew" in capsys.readouterr().err
        journal.put("a", 1)
        journal.discard()
    assert not uri.exists(where)


S3_KILLED = """
import sys, time
from rmsearch.storage import journal_stores, uri
from rmsearch.storage.journal import Journal
journal_stores.FLUSH_SECONDS = 0.1
with Journal(sys.argv[1], "f") as journal:
    journal.put("a", 1)
    while not uri.is_folder(sys.argv[1]):
        time.sleep(0.05)
    print("there", flush=True)
    time.sleep(60)
"""


@pytest.mark.s3
def test_sigkill_on_s3_keeps_what_was_flushed(s3_bucket: str) -> None:
    where = f"{s3_bucket}/j"
    process = subprocess.Popen([sys.executable, "-c", S3_KILLED, where], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"there\n"
    process.kill()
    process.wait()
    with Journal(where, "f") as journal:
        assert journal.get("a") == 1


@pytest.mark.s3
def test_refused_writes_on_s3_reach_the_caller(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no retry can mend is raised by the next put, not kept until the end of a day's work."""
    monkeypatch.setattr(journal_stores, "FLUSH_SECONDS", 0.05)

    def refuse(where: str) -> Any:
        raise AccessError("refused", where=where)

    with pytest.raises(AccessError), Journal(f"{s3_bucket}/j", "f") as journal:
        monkeypatch.setattr(uri, "writer", refuse)
        for number in range(1000):
            journal.put(str(number), number)
            journal_stores.threading.Event().wait(0.01)
        os.abort()
