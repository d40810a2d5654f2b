"""Where the lines of a `rmsearch.storage.journal` are kept: a locked local file, or part objects on S3."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from rmsearch.errors import ConfigError, RetryableError, RMSearchError
from rmsearch.progress import say
from rmsearch.storage import local
from rmsearch.storage import uri as uris

FLUSH_SECONDS = 5.0  # S3: a kill loses at most what was put since
COMPACT_PARTS = 100  # S3: a start that finds more parts joins them into one
HEAD = b'{"rmsearch_journal": 1, "fingerprint": '


def _whole_items(lines: Iterable[bytes]) -> Iterator[tuple[int, str, Any]]:
    """(length, key, value) of each whole line, up to the first that is torn."""
    for line in lines:
        try:
            key, value = json.loads(line)
        except (ValueError, TypeError):
            return
        if not line.endswith(b"\n") or not isinstance(key, str):
            return
        yield len(line), key, value


class Store(Protocol):
    def load(self) -> Iterator[tuple[str, Any]]: ...
    def append(self, lines: bytes) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def discard(self) -> None: ...


_open_files: weakref.WeakSet[LocalStore] = weakref.WeakSet()


def _close_in_child() -> None:  # a forked worker that outlives a killed parent must not keep its lock
    for store in list(_open_files):
        store.close()


os.register_at_fork(after_in_child=_close_in_child)


class LocalStore:
    def __init__(self, uri: str, head: bytes) -> None:
        self._uri, self._head, self._path = uri, head, local.as_path(uri)
        local.make_folder(self._path.parent, uri)
        self._descriptor = self._open(self._path)
        self._length = 0
        _open_files.add(self)

    def _open(self, path: Path) -> int:
        while True:
            with local.local_errors(self._uri):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                remedy = "Wait for the other run to end, or end it, then run again."
                raise RetryableError("another run has this journal open", where=self._uri, remedy=remedy) from error
            except OSError as error:  # a mount without locks: nothing guards against a second run there
                say("journal not locked", journal=self._uri, why=error.strerror)
                return descriptor
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            os.close(descriptor)  # the run before us deleted it between our open and our lock

    def load(self) -> Iterator[tuple[str, Any]]:
        with local.local_errors(self._uri), os.fdopen(os.dup(self._descriptor), "rb", buffering=1 << 20) as stream:
            size = os.fstat(self._descriptor).st_size
            head = stream.readline()
            if head == self._head:
                self._length = len(head)
                for length, key, value in _whole_items(stream):
                    self._length += length
                    yield key, value
                if self._length < size:
                    say("journal torn", journal=self._uri, dropped_bytes=size - self._length)
            elif head.startswith(HEAD) and head.endswith(b"\n"):
                say("journal started anew", journal=self._uri, why="settings or inputs changed", dropped_bytes=size)
            elif head.endswith(b"\n") or not (
                HEAD.startswith(head) or head.startswith(HEAD)
            ):  # else: a torn first line
                remedy = "Delete or move that file, or choose another output."
                raise ConfigError("is not a journal of rmsearch", where=self._uri, remedy=remedy)
            os.ftruncate(self._descriptor, self._length)
            os.lseek(self._descriptor, self._length, os.SEEK_SET)
        if not self._length:
            self.append(self._head)

    def append(self, lines: bytes) -> None:
        left = memoryview(lines)
        try:
            with local.local_errors(self._uri):
                while left:
                    left = left[os.write(self._descriptor, left) :]
        except (
            RMSearchError
        ):  # a disk that filled up in the middle of a line: the next put must start on a line of its own
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._length)
                os.lseek(self._descriptor, self._length, os.SEEK_SET)
            raise
        self._length += len(lines)

    def flush(self) -> None:
        with local.local_errors(self._uri):
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        _open_files.discard(self)

    def discard(self) -> None:
        uris.remove(self._uri)  # while the lock is held, so that no other run's file is deleted
        self.close()


class S3Store:
    def __init__(self, uri: str, head: bytes) -> None:
        self._uri, self._head, self._run = uri.rstrip("/"), head, secrets.token_hex(4)
        self._number = 0
        self._buffer = bytearray()
        self._problem: RMSearchError | None = None
        self._lock, self._writing, self._closed = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._flush_now_and_then, name="journal", daemon=True)

    def load(self) -> Iterator[tuple[str, Any]]:
        parts = uris.list_files(self._uri) if uris.is_folder(self._uri) else []
        parts = [part for part in parts if uris.name(part).startswith("part-")]
        joined, foreign = bytearray(), []
        with ThreadPoolExecutor(8) as pool:
            for part, data in zip(parts, pool.map(_read, parts), strict=True):
                self._number = max(self._number, int(uris.name(part)[5:11]))
                if not data.startswith(self._head):
                    foreign.append(part)
                    continue
                rows = data[len(self._head) :]
                if len(parts) > COMPACT_PARTS:
                    joined += rows
                for _, key, value in _whole_items(rows.splitlines(keepends=True)):
                    yield key, value
        if foreign:
            say("journal started anew", journal=self._uri, why="settings or inputs changed", dropped_parts=len(foreign))
        if joined:
            self.append(bytes(joined))
            self.flush()  # first the new part, then the old ones: a kill in between leaves items twice, never none
            foreign = parts
        for part in foreign:
            uris.remove(part)
        self._thread.start()

    def append(self, lines: bytes) -> None:
        with self._lock:
            if self._problem is not None:
                raise self._problem
            self._buffer += lines

    def flush(self) -> None:
        with self._writing:
            with self._lock:
                lines = bytes(self._buffer)
            if not lines:
                return
            name = f"part-{self._number + 1:06d}-{self._run}.jsonl"
            with uris.writer(uris.join(self._uri, name)) as stream:
                stream.write(self._head)
                stream.write(lines)
            self._number += 1
            with self._lock:
                del self._buffer[: len(lines)]

    def _flush_now_and_then(self) -> None:
        while not self._closed.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except RetryableError as error:  # the lines stay in the buffer; the next turn tries again
                say("journal not written", journal=self._uri, why=error.problem)
            except RMSearchError as error:  # no retry helps: the next put raises it
                self._problem = error

    def close(self) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def discard(self) -> None:
        self.close()
        self._buffer.clear()
        uris.remove(self._uri)


def _read(uri: str) -> bytes:
    with uris.reader(uri) as stream:
        return stream.read()
