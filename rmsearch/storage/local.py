"""Local files with the same promises as S3 objects: whole-or-nothing writes, and every OSError in the user's words."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from rmsearch.errors import AccessError, ConfigError, InputMissingError, RetryableError, RMSearchError

TEMP_SUFFIX = ".rmsearch-tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_MALFORMED = {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENXIO}


def local_error(error: OSError, uri: str) -> RMSearchError:
    """The user's error for an OSError at ``uri``. A full disk is retryable: like S3's 507 and SMTP's 452 it may have
    room on the next node, and what is journaled is not paid for again."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return InputMissingError("no such file or folder", where=uri, remedy="Correct the path or make the file first.")
    if isinstance(error, IsADirectoryError):
        return ConfigError("is a folder, and a file is needed", where=uri, remedy="Name a file in it.")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        remedy = "Give this user access or choose another path."
        return AccessError(f"the file system refused: {error.strerror}", where=uri, remedy=remedy)
    if error.errno in _FULL:
        remedy = "Free space there or choose another path, then run again."
        return RetryableError(f"the disk is full: {error.strerror}", where=uri, remedy=remedy)
    if error.errno in _MALFORMED:
        return ConfigError(f"not a usable path: {error.strerror}", where=uri, remedy="Correct the path.")
    problem = f"the file system failed: {error.strerror or type(error).__name__}"
    return RetryableError(problem, where=uri, remedy="Run again; check the disk or mount if it stays.")


@contextmanager
def local_errors(uri: str) -> Iterator[None]:
    """Map OSErrors of the block to errors a user can act on (see `local_error`)."""
    try:
        yield
    except OSError as error:
        raise local_error(error, uri) from error


class _File(io.FileIO):
    """A file whose errors are mapped where they happen, so that an OSError of the caller's own code in a ``with
    reader(…)`` block is never blamed on this file."""

    def __init__(self, file: Path | int, mode: str, uri: str) -> None:
        self._uri = uri
        with local_errors(uri):
            super().__init__(file, mode)

    def readinto(self, buffer: Any) -> int:
        with local_errors(self._uri):
            return cast(int, super().readinto(buffer))

    def readall(self) -> bytes:
        with local_errors(self._uri):
            return cast(bytes, super().readall())

    def write(self, data: Any) -> int:
        with local_errors(self._uri):
            return super().write(data)


@contextmanager
def local_reader(uri: str) -> Iterator[BinaryIO]:
    """Open a local file for reading. Raises InputMissingError."""
    with io.BufferedReader(_File(as_path(uri), "rb", uri), buffer_size=1 << 20) as stream:
        yield cast(BinaryIO, stream)


def _behind_links(uri: str) -> Path:
    """The path with symlinks followed: the file behind a link is replaced, not the link."""
    path = as_path(uri)
    with local_errors(uri):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # says so for a loop of links, where resolve() differs between Python versions
        return path.resolve()


def make_folder(path: Path, uri: str) -> None:
    """Make a folder and its parents. Raises ConfigError when a file is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        problem = "a part of this path is a file, so no folder can be made there"
        raise ConfigError(problem, where=uri, remedy="Choose another path.") from error
    except OSError as error:
        raise local_error(error, uri) from error


def fsync_path(path: Path) -> None:
    """Push a file's or folder's contents to the disk, so that a rename that follows never shows an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network and FUSE mounts know no fsync on folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def temp_beside(path: Path) -> Path:
    """A fresh hidden name in the same folder (a rename within one file system is atomic)."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}{TEMP_SUFFIX}")


def remove_stale(path: Path) -> None:
    """Delete the temp files and folders that killed runs left beside ``path`` (a living writer has its own locked)."""
    for stale in path.parent.glob(f".{glob.escape(path.name[:40])}.????????{TEMP_SUFFIX}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(stale, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stale.is_dir():
                    shutil.rmtree(stale)
                else:
                    stale.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def temp_folder(path: Path) -> Iterator[Path]:
    """A fresh locked folder beside ``path``, deleted at the end if it is still there."""
    remove_stale(path)
    temp = temp_beside(path)
    temp.mkdir()
    descriptor = os.open(temp, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temp
    finally:
        os.close(descriptor)
        shutil.rmtree(temp, ignore_errors=True)


def swap(new: Path, old: Path) -> None:
    """Exchange two folders in one step (Linux's renameat2, which Python does not offer), so that no kill can fall
    between two renames. Raises OSError where the system or mount cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _open_temp(path: Path, uri: str) -> tuple[Path, int]:
    temp = temp_beside(path)
    with local_errors(uri):
        descriptor = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with contextlib.suppress(OSError):  # no locks on this mount: then nobody takes stale files away either
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return temp, descriptor


@contextmanager
def local_writer(uri: str) -> Iterator[BinaryIO]:
    """Write a file that appears whole, on a clean exit of the block, or not at all.

    A device or pipe (``/dev/stdout``) is written straight: renaming over it would replace it.
    """
    real = _behind_links(uri)
    make_folder(real.parent, uri)
    with local_errors(uri):
        if real.is_dir():
            raise IsADirectoryError
        device = real.exists() and not real.is_file()
    if device:
        with io.BufferedWriter(_File(real, "wb", uri)) as stream:
            yield cast(BinaryIO, stream)
        return
    remove_stale(real)
    temp, descriptor = _open_temp(real, uri)
    stream = io.BufferedWriter(_File(os.dup(descriptor), "wb", uri), buffer_size=1 << 20)
    try:
        yield cast(BinaryIO, stream)
        if not stream.closed:  # a wrapper (gzip, text, parquet) may have closed it; that alone completes nothing
            stream.close()
        with local_errors(uri):
            os.fsync(descriptor)
            temp.replace(real)
            fsync_path(real.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink()
        with contextlib.suppress(OSError, RMSearchError):  # a full disk fails the last flush again
            stream.close()
        raise
    finally:
        os.close(descriptor)


def local_put_if_absent(uri: str, data: bytes) -> bool:
    """Create the file with ``data`` unless it exists; one of several rivals wins, and readers never see half of it."""
    real = _behind_links(uri)
    make_folder(real.parent, uri)
    temp, descriptor = _open_temp(real, uri)
    with local_errors(uri):
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(temp, real)  # unlike a rename, a link fails when the name is taken
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return _create(real, data)
        finally:
            temp.unlink(missing_ok=True)
    return True


def _create(path: Path, data: bytes) -> bool:
    """For mounts without hard links: one rival still wins, but a reader may see the file before its contents."""
    try:
        with path.open("xb") as stream:
            stream.write(data)
    except FileExistsError:
        return False
    return True


def walk(folder: Path) -> list[str]:
    """Relative names of all files below ``folder``, sorted; our own temp files are left out."""
    files = []

    def fail(error: OSError) -> None:
        raise local_error(error, str(folder))

    for base, _, names in os.walk(folder, onerror=fail):
        below = Path(base).relative_to(folder)
        files += [
            str(below / name) for name in names if TEMP_SUFFIX not in str(below) and not name.endswith(TEMP_SUFFIX)
        ]
    return sorted(files)


def as_path(uri: str) -> Path:
    """The local path that a URI means (``~/`` expanded). Raises ConfigError for what cannot be one."""
    if not uri or "\0" in uri:
        raise ConfigError("an empty path" if not uri else "a path with a NUL byte", remedy="Name a file or folder.")
    return Path(uri).expanduser() if uri.startswith("~/") else Path(uri)
