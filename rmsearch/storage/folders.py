"""Whole files and folders between S3 and this machine: downloads kept in a cache, uploads that are whole or not there.

An uploaded folder carries ``_manifest.json``: written first with ``"complete": false``, and last with ``true``, so a
reader can tell a folder whose upload broke off. Folders that others uploaded have none and are taken as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from rmsearch.errors import ConfigError, InputMissingError
from rmsearch.storage import local, s3, s3_streams
from rmsearch.storage.s3_errors import s3_errors

MANIFEST = "_manifest.json"
LAST_FILE = "rmsearch.json"  # for readers that know no manifest: with the contract there, the weights are there
_SHA = "rmsearch-sha256"
_FILES_AT_ONCE = 4
_STALE_SECONDS = 86400


def cache_folder() -> Path:
    """Where downloads are kept: ``RMSEARCH_CACHE``, else the user's cache folder, else (no writable home, as in many
    pods) the temp folder."""
    if chosen := os.environ.get("RMSEARCH_CACHE"):
        return Path(chosen)
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rmsearch"
    with contextlib.suppress(OSError, RuntimeError):
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    return Path(tempfile.gettempdir()) / f"rmsearch-{os.getuid()}"


def fetch_file(uri: str, digest: str) -> Path:
    """Download an object unless this version of it is in the cache already."""
    bucket, key = s3.split(uri)
    target = cache_folder() / digest[:32] / PurePosixPath(key).name
    if not target.exists():
        _download(bucket, key, target)
    return target


def fetch_folder(uri: str, keep: Callable[[str], bool] = lambda relative: True) -> Path:
    """A folder as a local path: the path itself, or a download kept in the cache (RMSEARCH_CACHE). A download that was
    broken off goes on with the files that are missing. ``keep`` picks files by their relative name.

    Raises InputMissingError when there is no such folder or its upload was broken off.
    """
    if not uri.startswith("s3://"):
        return _local_folder(uri)
    listed = {item.relative: item for item in s3.list_objects(uri)}
    remedy = "Correct the URI, or run the stage that writes it."
    if not listed:
        raise InputMissingError("no such object or folder", where=uri, remedy=remedy)
    if MANIFEST in listed:
        _check_manifest(uri, listed)
    chosen = [item for name, item in sorted(listed.items()) if keep(name) and name != MANIFEST]
    for item in chosen:
        if item.relative.startswith("/") or ".." in PurePosixPath(item.relative).parts:
            problem = f"the key {item.key!r} would be a file outside of the folder"
            raise ConfigError(problem, where=uri, remedy="Rename that object.")
    state = hashlib.sha256("\n".join(f"{item.relative} {item.digest}" for item in chosen).encode()).hexdigest()
    bucket, key = s3.split(uri, key_needed=False)
    base = cache_folder() / state[:32]
    folder = base / (PurePosixPath(key).name or bucket)
    if (base / ".complete").exists():
        return folder

    def get(item: s3.Object) -> None:
        target = folder / item.relative
        if not (target.exists() and target.stat().st_size == item.size):
            _download(bucket, item.key, target)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for _ in pool.map(get, chosen):
            pass
    with local.local_errors(str(base)):
        folder.mkdir(parents=True, exist_ok=True)
        (base / ".complete").touch()
    return folder


def upload_folder(path: str | Path, uri: str, keep: Callable[[str], bool] = lambda relative: True) -> None:
    """Copy a local folder to a folder ``uri``, whole or not at all. ``keep`` picks files by their relative name.

    On S3 an upload that was broken off goes on with the missing files when it is called again, and readers see the
    folder as incomplete until then. Locally the finished folder is swapped in. Files of the previous upload that are no
    longer in ``path`` are removed; files that others put there stay. Raises InputMissingError for a missing ``path``.
    """
    source = _local_folder(str(path))
    files = {}
    for name in local.walk(source):
        if keep(name) and name != MANIFEST:
            with local.local_reader(str(source / name)) as stream:
                sha = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            files[name] = {"size": (source / name).stat().st_size, "sha256": sha}
    if uri.startswith("s3://"):
        _upload(source, uri, files)
    elif local.as_path(uri).resolve() != source.resolve():
        _swap_in(source, local.as_path(uri), files)


def _local_folder(uri: str) -> Path:
    path = local.as_path(uri)
    with local.local_errors(uri):
        if not path.exists():
            raise FileNotFoundError
        if not path.is_dir():
            raise ConfigError("is a file, and a folder is needed", where=uri, remedy="Name a folder.")
    return path


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(max_concurrency=4, max_io_queue=64, preferred_transfer_client="classic")


def _download(bucket: str, key: str, target: Path) -> None:
    partial = cache_folder() / "partial"  # not in the folder itself, where a killed download would leave half a file
    with local.local_errors(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        for old in partial.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                    old.unlink()
        temp = partial / secrets.token_hex(8)
        with s3_errors(f"s3://{bucket}/{key}"):
            s3.client().download_file(bucket, key, str(temp), Config=_transfer())
        temp.replace(target)


def _check_manifest(uri: str, listed: Mapping[str, s3.Object]) -> None:
    manifest = _read_manifest(uri)
    remedy = "Run the stage that writes it again."
    if not manifest["complete"]:
        raise InputMissingError("its upload is not finished or was broken off", where=uri, remedy=remedy)
    for name, facts in manifest["files"].items():
        if name not in listed or listed[name].size != facts["size"]:
            raise InputMissingError(f"lacks {name!r} as it was uploaded", where=uri, remedy=remedy)


def _read_manifest(uri: str) -> dict[str, Any]:
    where = f"{uri.rstrip('/')}/{MANIFEST}"
    with s3_streams.s3_reader(where) if where.startswith("s3://") else local.local_reader(where) as stream:
        try:
            manifest = json.load(stream)
            return {"complete": bool(manifest["complete"]), "files": dict(manifest["files"])}
        except (ValueError, KeyError, TypeError) as error:
            remedy = "Delete that file if it belongs to another program, or upload the folder again."
            raise ConfigError("is not a manifest of rmsearch", where=where, remedy=remedy) from error


def _manifest(complete: bool, files: Mapping[str, Any]) -> bytes:
    return json.dumps({"complete": complete, "files": files}, indent=1).encode()


def _upload(source: Path, uri: str, files: Mapping[str, Any]) -> None:
    bucket, _ = s3.split(uri, key_needed=False)
    base = uri.rstrip("/")
    present = {item.relative: item for item in s3.list_objects(uri)}
    former = _read_manifest(uri)["files"] if MANIFEST in present else {}

    def put_manifest(complete: bool, named: Mapping[str, Any]) -> None:
        with s3_streams.s3_writer(f"{base}/{MANIFEST}") as stream:
            stream.write(_manifest(complete, named))

    def put(name: str) -> None:
        one = f"{base}/{name}"
        there = s3.head(one) if name in present and present[name].size == files[name]["size"] else None
        if there is not None and there.metadata.get(_SHA) == files[name]["sha256"]:
            return
        extra = {"Metadata": {_SHA: files[name]["sha256"]}}
        with s3_errors(one), local.local_errors(str(source / name)):
            s3.client().upload_file(str(source / name), bucket, s3.split(one)[1], ExtraArgs=extra, Config=_transfer())

    # The unfinished manifest names old files too: if this run is killed, the next one still knows what to remove.
    put_manifest(False, {**former, **files})
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for _ in pool.map(put, [name for name in files if name != LAST_FILE]):
            pass
    if LAST_FILE in files:
        put(LAST_FILE)
    for name in former.keys() - files.keys():
        s3.remove(f"{base}/{name}")
    put_manifest(True, files)


def _swap_in(source: Path, target: Path, files: Mapping[str, Any]) -> None:
    """Build the new folder beside the old one, then rename: what is killed before leaves the old folder as it was."""
    target = target.resolve()
    local.make_folder(target.parent, str(target))
    former = _read_manifest(str(target))["files"] if (target / MANIFEST).exists() else {}
    names = [*sorted(files.keys() - {LAST_FILE}), *({LAST_FILE} & files.keys())]
    if target.exists() and not target.is_dir():
        raise ConfigError("is a file, and a folder is needed", where=str(target), remedy="Choose another path.")
    with local.local_errors(str(target)):
        if target.is_mount() or not os.access(target.parent, os.W_OK):
            _copy(source, target, names, files)  # a volume's own root cannot be renamed: the contract comes last there
            return
        with local.temp_folder(target) as temp:
            _copy(source, temp, names, files)
            if not target.exists():
                temp.rename(target)
            else:
                for name in set(local.walk(target)) - files.keys() - former.keys() - {MANIFEST}:
                    (temp / name).parent.mkdir(parents=True, exist_ok=True)
                    os.link(target / name, temp / name, follow_symlinks=False)
                try:
                    local.swap(temp, target)  # now temp is the old folder, which goes
                except OSError:  # a mount without the exchange: two renames
                    target.rename(old := local.temp_beside(target))
                    temp.rename(target)
                    shutil.rmtree(old)
        local.fsync_path(target.parent)


def _copy(source: Path, target: Path, names: list[str], files: Mapping[str, Any]) -> None:
    for name in names:
        with local.local_reader(str(source / name)) as old, local.local_writer(str(target / name)) as new:
            shutil.copyfileobj(old, new, 1 << 20)
    with local.local_writer(str(target / MANIFEST)) as stream:
        stream.write(_manifest(True, files))
