"""Local files and folders: whole or not at all, and every fault in one line with the right exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rmsearch.errors import AccessError, ConfigError, InputMissingError, RetryableError, RMSearchError
from rmsearch.storage import local, uri


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(path: Path, data: bytes) -> None:
    with uri.writer(str(path)) as stream:
        stream.write(data)


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (uri.join("s3://b/x/", "y", "z.json"), "s3://b/x/y/z.json"),
        (uri.join("s3://b", "y"), "s3://b/y"),
        (uri.join("/a", "y", "z"), "/a/y/z"),
        (uri.parent("s3://b/x/y"), "s3://b/x"),
        (uri.parent("s3://b/x"), "s3://b"),
        (uri.parent("/a/b.json"), "/a"),
        (uri.parent("b.json"), "."),
        (uri.name("s3://b/x/y.json"), "y.json"),
        (uri.name("s3://b/x/"), "x"),
        (uri.name("/a/model/"), "model"),
    ],
)
def test_names(got: str, wanted: str) -> None:
    assert got == wanted


@pytest.mark.parametrize(
    "bad",
    [
        "gs://bucket/x",
        "http://host/x",
        "S3://bucket/x",
        "s3:/bucket/x",
        "s3:bucket/x",
        "",
        "a\0b",
        "s3://",
        "s3://b d/x",
    ],
)
def test_malformed_uri(bad: str) -> None:
    for call in (uri.exists, uri.digest, uri.list_files, uri.fetch, uri.remove):
        with pytest.raises(ConfigError):
            call(bad)
    with pytest.raises(ConfigError), uri.writer(bad):
        pass


@pytest.mark.parametrize("folder", ["s3://bucket", "s3://bucket/", "s3://bucket/x/"])
def test_a_folder_is_no_file(folder: str) -> None:
    with pytest.raises(ConfigError, match="names a folder"), uri.reader(folder):
        pass


def test_round_trip_and_facts(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "a.bin"
    put(file, b"12345")
    with uri.reader(str(file)) as stream:
        assert stream.read() == b"12345"
    assert uri.size(str(file)) == 5 and uri.exists(str(file)) and not uri.is_folder(str(file))
    assert uri.is_folder(str(tmp_path)) and uri.size(str(tmp_path)) == 5
    assert uri.list_files(str(tmp_path)) == [str(file)] and uri.fetch(str(file)) == file
    assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    uri.remove(str(tmp_path / "new"))
    uri.remove(str(tmp_path / "new"))
    assert not uri.exists(str(file))


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with uri.writer("~/x/a.json") as stream:
        stream.write(b"1")
    assert (tmp_path / "x" / "a.json").read_bytes() == b"1"


def test_digest_follows_contents_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "d" / "a"
    put(file, b"one")
    one, folder = uri.digest(str(file)), uri.digest(str(tmp_path / "d"))
    put(file, b"two")
    assert uri.digest(str(file)) != one and uri.digest(str(tmp_path / "d")) != folder
    put(file, b"one")
    assert (uri.digest(str(file)), uri.digest(str(tmp_path / "d"))) == (one, folder)
    file.rename(file.with_name("b"))
    assert uri.digest(str(tmp_path / "d")) != folder
    monkeypatch.setattr(uri, "_WHOLE_DIGEST_BYTES", 10)  # the short cut for large files
    put(file, bytes(3 << 20))
    large = uri.digest(str(file))
    assert uri.digest(str(file)) == large
    put(file, bytes((3 << 20) - 1) + b"x")
    assert uri.digest(str(file)) != large


def test_an_error_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    put(file, b"old")
    with pytest.raises(KeyError), uri.writer(str(file)) as stream:
        stream.write(b"new" * 1000)
        raise KeyError
    assert file.read_bytes() == b"old" and names_in(tmp_path) == ["a.bin"]


def test_closing_the_stream_completes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    with pytest.raises(KeyError), uri.writer(str(file)) as stream:
        stream.write(b"new")
        stream.close()
        raise KeyError
    assert names_in(tmp_path) == []
    with uri.writer(str(file)) as stream:
        stream.write(b"new")
        stream.close()
    assert file.read_bytes() == b"new"


KILLED = """
import sys, time
from rmsearch.storage import uri
with uri.writer(sys.argv[1]) as stream:
    stream.write(b"new" * 1_000_000)
    stream.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def test_sigkill_leaves_the_old_file_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    put(file, b"old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(file)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    assert len(names_in(tmp_path)) == 2
    with uri.writer(str(file)) as stream:  # a living writer's temp file is its own
        stream.write(b"old")
    assert len(names_in(tmp_path)) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert file.read_bytes() == b"old" and uri.list_files(str(tmp_path)) == [str(file)]
    put(file, b"again")
    assert names_in(tmp_path) == ["a.bin"] and file.read_bytes() == b"again"


def test_symlinks_and_devices_are_not_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    put(real, b"old")
    link.symlink_to(real)
    put(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new"
    device = Path("/dev/null").stat().st_rdev
    put(Path("/dev/null"), b"gone")
    assert Path("/dev/null").stat().st_rdev == device


def test_put_if_absent(tmp_path: Path) -> None:
    lock = tmp_path / "x" / "lock"
    assert uri.put_if_absent(str(lock), b"1") and not uri.put_if_absent(str(lock), b"2")
    assert lock.read_bytes() == b"1" and names_in(lock.parent) == ["lock"]


def test_put_if_absent_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    lock = tmp_path / "lock"
    assert uri.put_if_absent(str(lock), b"1") and not uri.put_if_absent(str(lock), b"2")
    assert lock.read_bytes() == b"1" and names_in(tmp_path) == ["lock"]


def test_faults_of_paths(tmp_path: Path) -> None:
    put(tmp_path / "file", b"")
    cases = [
        (tmp_path / "none", InputMissingError, uri.reader),
        (tmp_path, ConfigError, uri.reader),
        (tmp_path, ConfigError, uri.writer),
        (tmp_path / "file" / "below", InputMissingError, uri.reader),
        (tmp_path / "file" / "below", ConfigError, uri.writer),
        (tmp_path / ("x" * 300), ConfigError, uri.writer),
    ]
    for path, wanted, opened in cases:
        with pytest.raises(wanted) as caught, opened(str(path)):
            pass
        assert "\n" not in str(caught.value) and str(path) in str(caught.value) and caught.value.exit_code == 2
    for call in (uri.digest, uri.size, uri.list_files, uri.fetch, uri.fetch_folder):
        with pytest.raises(InputMissingError):
            call(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="root"):
        uri.remove("/")


@pytest.mark.parametrize(
    ("number", "wanted", "code"),
    [
        (errno.EACCES, AccessError, 2),
        (errno.EROFS, AccessError, 2),
        (errno.ENOSPC, RetryableError, 75),
        (errno.EDQUOT, RetryableError, 75),
        (errno.EIO, RetryableError, 75),
        (errno.ELOOP, ConfigError, 2),
    ],
)
def test_mapping(number: int, wanted: type[RMSearchError], code: int) -> None:
    mapped = local.local_error(OSError(number, os.strerror(number)), "/some/file")
    assert type(mapped) is wanted and mapped.exit_code == code and mapped.remedy


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for opened in (uri.reader, uri.writer):
        with pytest.raises(ConfigError, match="not a usable path"), opened(str(tmp_path / "a")):
            pass


def test_a_full_disk() -> None:
    with pytest.raises(RetryableError, match="disk is full"), uri.writer("/dev/full") as stream:
        stream.write(b"x" * 5_000_000)


def test_an_os_error_of_the_callers_own_code_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    put(tmp_path / "a", b"")
    with pytest.raises(FileNotFoundError), uri.reader(str(tmp_path / "a")):
        (tmp_path / "other").read_bytes()


def test_folders_are_swapped_in(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    put(source / "config.json", b"{}")
    put(source / "sub" / "w.bin", b"1")
    uri.upload_folder(source, str(target))
    assert sorted(local.walk(target)) == ["_manifest.json", "config.json", "sub/w.bin"]
    put(target / "checkpoint-1" / "state", b"of the user")
    (source / "sub" / "w.bin").rename(source / "w2.bin")
    uri.upload_folder(source, str(target))
    assert sorted(local.walk(target)) == ["_manifest.json", "checkpoint-1/state", "config.json", "w2.bin"]
    assert names_in(target.parent) == ["target"]
    uri.upload_folder(target, str(target))  # onto itself: nothing to do
    assert (target / "w2.bin").read_bytes() == b"1"


def test_folder_swap_without_the_systems_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(new: Path, old: Path) -> None:
        raise OSError(errno.EINVAL, "no exchange here")

    monkeypatch.setattr(local, "swap", refuse)
    put(tmp_path / "source" / "a", b"new")
    put(tmp_path / "target" / "b", b"kept")
    uri.upload_folder(tmp_path / "source", str(tmp_path / "target"))
    assert sorted(local.walk(tmp_path / "target")) == ["_manifest.json", "a", "b"]
    assert names_in(tmp_path) == ["source", "target"]


FOLDER = """
import sys, shutil, time
from rmsearch.storage import folders, uri
copy = shutil.copyfileobj
def slow(old, new, length):
    copy(old, new, length)
    print("copied", flush=True)
    time.sleep(60)
shutil.copyfileobj = slow
uri.upload_folder(sys.argv[1], sys.argv[2])
"""


def test_a_killed_folder_copy_leaves_the_old_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    put(source / "a", b"new")
    put(source / "b", b"new")
    put(target / "a", b"old")
    process = subprocess.Popen([sys.executable, "-c", FOLDER, str(source), str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"copied\n"
    process.kill()
    process.wait()
    assert local.walk(target) == ["a"] and (target / "a").read_bytes() == b"old"
    uri.upload_folder(source, str(target))
    assert (target / "a").read_bytes() == b"new" and names_in(tmp_path) == ["source", "target"]


def test_start_is_light() -> None:
    code = "import sys, rmsearch.storage.uri, rmsearch.storage.records, rmsearch.storage.journal; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"boto3", "pyarrow", "torch", "transformers", "pandas"} & set(loaded)


def test_names_of_temp_files_do_not_outgrow_the_limit(tmp_path: Path) -> None:
    put(tmp_path / ("é" * 120), b"x")
    assert names_in(tmp_path) == ["é" * 120]
