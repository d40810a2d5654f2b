"""Files and folders named by a URI: a local path or ``s3://bucket/key``. The same calls work on both.

Every function raises, besides what it names: ConfigError (a malformed URI, bucket or endpoint), AccessError (refused
or missing credentials or permissions) and RetryableError (network, 5xx, throttling, a full or failing disk).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from rmsearch.errors import ConfigError, InputMissingError
from rmsearch.storage import local, s3, s3_streams
from rmsearch.storage.folders import fetch_file, fetch_folder, upload_folder

__all__ = [
    "digest", "exists", "fetch", "fetch_folder", "is_folder", "is_s3", "join", "list_files", "name", "parent",
    "put_if_absent", "reader", "remove", "resolved", "size", "upload_folder", "writer",
]  # fmt: skip

_WHOLE_DIGEST_BYTES = 256 << 20


def is_s3(uri: str) -> bool:
    """True for ``s3://…``, False for a local path. Raises ConfigError for another scheme."""
    if uri.startswith("s3://"):
        return True
    if re.match(r"s3:/?[^/]", uri, re.IGNORECASE):
        raise ConfigError(
            "not a URI", where=uri, remedy="Write s3://bucket/key (two slashes; a Path object drops one)."
        )
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", uri):
        problem = f"the scheme {scheme[1]!r} is not supported"
        raise ConfigError(problem, where=uri, remedy="Give a local path or s3://bucket/key.")
    return False


def join(uri: str, *names: str) -> str:
    """``uri`` with names below it."""
    if is_s3(uri):
        return "/".join([uri.rstrip("/"), *(part.strip("/") for part in names)])
    return str(Path(uri, *names))


def parent(uri: str) -> str:
    """The folder that holds ``uri`` (a bucket's own is the bucket)."""
    if is_s3(uri):
        bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
        return f"s3://{bucket}/{key.rpartition('/')[0]}".rstrip("/")
    return str(local.as_path(uri).parent)


def name(uri: str) -> str:
    """The last part of ``uri``."""
    if is_s3(uri):
        return uri.rstrip("/").rpartition("/")[2]
    return local.as_path(uri).resolve().name


def resolved(uri: str) -> str | None:
    """The one spelling of a file's or folder's URI: links and dots followed, no double or last slash. None for a device
    or pipe, which any number of readers and writers may share."""
    if is_s3(uri):
        return "s3://" + "/".join(part for part in uri.removeprefix("s3://").split("/") if part)
    path = local.as_path(uri)
    with local.local_errors(uri):
        if path.exists() and not path.is_file() and not path.is_dir():
            return None
    return os.path.realpath(path)


def exists(uri: str) -> bool:
    """Whether a file or folder is there. A missing bucket counts as no."""
    if not is_s3(uri):
        with local.local_errors(uri):
            return local.as_path(uri).exists()
    return s3.head(uri) is not None or is_folder(uri)


def is_folder(uri: str) -> bool:
    """Whether ``uri`` is a folder; on S3: some object lies under ``uri/``."""
    if not is_s3(uri):
        with local.local_errors(uri):
            return local.as_path(uri).is_dir()
    try:
        return next(s3.list_objects(uri, page=2), None) is not None
    except InputMissingError:
        return False


def size(uri: str) -> int:
    """Bytes of a file, or of all files in a folder. Raises InputMissingError."""
    if is_s3(uri):
        single = s3.head(uri)
        return single.size if single else sum(item.size for item in _objects(uri))
    path = local.as_path(uri)
    with local.local_errors(uri):
        return sum((path / file).stat().st_size for file in local.walk(path)) if path.is_dir() else path.stat().st_size


def digest(uri: str) -> str:
    """A hex digest that changes when the contents do. Raises InputMissingError.

    Local files: sha256 of the contents; above 256 MiB of size, time and both ends. S3: of ETag and size, nothing is
    downloaded. Folders: of their files' names and digests. A local copy and its S3 original have different digests.
    """
    if is_s3(uri):
        single = s3.head(uri)
        return single.digest if single else _combined((item.relative, item.digest) for item in _objects(uri))
    path = local.as_path(uri)
    if is_folder(uri):
        return _combined((file, _file_digest(str(path / file))) for file in local.walk(path))
    return _file_digest(uri)


def reader(uri: str) -> AbstractContextManager[BinaryIO]:
    """Open a file for reading as bytes, streamed; a broken S3 connection resumes where it broke.

    Raises InputMissingError.
    """
    return s3_streams.s3_reader(uri) if is_s3(uri) else local.local_reader(uri)


def writer(uri: str) -> AbstractContextManager[BinaryIO]:
    """Open a file for writing as bytes: it appears whole when the block ends cleanly, else what was there stays.

    Makes parent folders. Memory is bounded for any size (S3: multipart upload, aborted on an error).
    """
    return s3_streams.s3_writer(uri) if is_s3(uri) else local.local_writer(uri)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Create a small file unless it exists; of several rivals exactly one gets True."""
    return s3.put_if_absent(uri, data) if is_s3(uri) else local.local_put_if_absent(uri, data)


def remove(uri: str) -> None:
    """Delete a file, or a folder with all in it; what is not there is no error. Refuses a bucket's or disk's root."""
    if is_s3(uri):
        if not s3.split(uri, key_needed=False)[1]:
            raise ConfigError("refuses to empty a whole bucket", where=uri, remedy="Name a folder in it.")
        s3.remove(uri)
        return
    path = local.as_path(uri)
    if path.resolve() == Path("/"):
        raise ConfigError("refuses to delete the file system's root", where=uri, remedy="Name a folder in it.")
    with local.local_errors(uri), contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def list_files(uri: str) -> list[str]:
    """URIs of all files below a folder, sorted. Raises InputMissingError when there is no such folder."""
    if is_s3(uri):
        return [join(uri, item.relative) for item in _objects(uri)]
    path = local.as_path(uri)
    return [str(path / file) for file in local.walk(path)]


def fetch(uri: str) -> Path:
    """The file as a local path: the path itself, or a download kept under its digest in the cache (RMSEARCH_CACHE).
    Raises InputMissingError."""
    if is_s3(uri):
        return fetch_file(uri, digest(uri))
    path = local.as_path(uri)
    if not exists(uri):
        raise local.local_error(FileNotFoundError(), uri)
    return path


def _objects(uri: str) -> list[s3.Object]:
    objects = sorted(s3.list_objects(uri), key=lambda item: item.relative)
    if not objects:
        remedy = "Correct the URI, or run the stage that writes it."
        raise InputMissingError("no such object or folder", where=uri, remedy=remedy)
    return objects


def _file_digest(path: str) -> str:
    with local.local_reader(path) as stream:
        status = os.fstat(stream.fileno())
        if status.st_size <= _WHOLE_DIGEST_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
        state = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns} ".encode())
        state.update(stream.read(1 << 20))
        stream.seek(-(1 << 20), os.SEEK_END)
        state.update(stream.read())
        return state.hexdigest()


def _combined(parts: Iterator[tuple[str, str]]) -> str:
    state = hashlib.sha256()
    for relative, of_file in parts:
        state.update(f"{relative}\0{of_file}\n".encode(errors="surrogateescape"))
    return state.hexdigest()
