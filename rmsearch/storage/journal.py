"""Journals: what was computed item by item, so that killed work goes on where it stopped and pays for nothing twice.

Locally a journal is one JSON-lines file; every put is with the system before it returns, so SIGKILL loses nothing, and
the line it may tear is dropped at the next start. One process at a time: the file is locked. On S3 it is a folder of
part objects, written every few seconds and at the end, so a kill loses at most those seconds. S3 has no lock; two
writers at once each write parts of their own, and neither loses anything but the time of doing the same work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rmsearch.errors import RMSearchError
from rmsearch.progress import say
from rmsearch.storage import uri as uris
from rmsearch.storage.formats import malformed, plain
from rmsearch.storage.journal_stores import HEAD, LocalStore, S3Store, Store

IN_MEMORY = 64  # bytes of a value that stays in memory

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=plain).encode


def journal_key(*parts: Any) -> str:
    """A key for everything that affects an answer: 32 hex digits, blake2b of the parts' canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Journal:
    """The answers so far, by key. Use as a context manager; safe to share between threads.

    ``fingerprint`` stands for settings and inputs: a journal of another fingerprint is started anew, and that is said.
    Raises RetryableError when another process has the journal open, ConfigError when ``uri`` is not a journal.
    """

    def __init__(self, uri: str, fingerprint: str) -> None:
        self.uri, self.fingerprint = uri, fingerprint
        self._index: dict[bytes | str, Any] = {}
        self._lock = threading.RLock()
        self._spill: Any = None
        self._store: Store | None = None

    def __enter__(self) -> Journal:
        head = HEAD + json.dumps(self.fingerprint).encode() + b"}\n"
        self._store = S3Store(self.uri, head) if uris.is_s3(self.uri) else LocalStore(self.uri, head)
        try:
            for key, value in self._store.load():
                self._index[_short(key)] = self._packed(value)
        except BaseException:
            self._store.close()
            raise
        if self._index:
            say("journal resumed", journal=self.uri, items=len(self._index))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._store is None:
            return
        try:
            self._store.flush()
        except RMSearchError:
            if error is None:  # else the block's own error is the one to show
                raise
        finally:
            self._store.close()
            self._store = None

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return _short(key) in self._index

    def get(self, key: str) -> Any:
        """The value put under ``key`` (as JSON gives it back: tuples are lists), or None."""
        kept = self._index.get(_short(key))
        if type(kept) is _Place:
            kept = os.pread(self._spill.fileno(), kept & _LENGTH, kept >> 32)
        return json.loads(kept) if isinstance(kept, bytes) else kept

    def put(self, key: str, value: Any) -> None:
        """Keep one answer. Raises RecordError for a value that JSON cannot hold (NaN too)."""
        self.put_many([(key, value)])

    def put_many(self, items: Iterable[tuple[str, Any]]) -> None:
        """Keep several answers with one write."""
        lines, packed = [], []
        for key, value in items:
            try:
                lines.append(f"[{json.dumps(key)},{_encode(value)}]\n".encode())
            except (TypeError, ValueError, RecursionError) as error:
                raise malformed(self.uri, None, error) from error
            packed.append((_short(key), value))
        with self._lock:
            if self._store is None:
                raise RuntimeError("the journal is not open; use it in a with block")
            self._store.append(b"".join(lines))
            self._index.update((key, self._packed(value)) for key, value in packed)

    def flush(self) -> None:
        """Push everything to the disk or the bucket."""
        if self._store is not None:
            self._store.flush()

    def _packed(self, value: Any) -> Any:
        """Numbers stay numbers; all else becomes JSON bytes, and long ones (a language model's answers) go to an
        unnamed temporary file, so that memory holds about a hundred bytes an item whatever its size."""
        if type(value) in (int, float, bool, type(None)):
            return value
        data = _encode(value).encode()
        if len(data) <= IN_MEMORY:
            return data
        if self._spill is None:
            self._spill = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the journal
        offset = self._spill.seek(0, os.SEEK_END)
        self._spill.write(data)
        return _Place(offset << 32 | len(data))

    def discard(self) -> None:
        """Delete the journal: call it when the output is complete."""
        with self._lock:
            self._index.clear()
            if self._store is not None:
                self._store.discard()
                self._store = None
            else:
                uris.remove(self.uri)


def _short(key: str) -> bytes | str:
    """Half the memory for keys of `journal_key`."""
    if len(key) == 32:
        with contextlib.suppress(ValueError):
            short = bytes.fromhex(key)
            if short.hex() == key:
                return short
    return key


class _Place(int):
    """Where a value lies in the spill file: offset << 32 | length."""


_LENGTH = (1 << 32) - 1
