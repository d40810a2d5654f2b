"""Download of published BEIR sets: status, size and checksum verified, and no half file stays behind."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from rmsearch.errors import AccessError, ConfigError, InputMissingError, RetryableError
from rmsearch.progress import progress, say
from rmsearch.storage.folders import cache_folder

BASE_URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"
BASE_URL_VARIABLE = "RMSEARCH_BEIR_URL"
TRIES = 3
FIRST_WAIT_SECONDS = 0.5

# md5 of the archives, from the table of data sets in BEIR's README
MD5 = {
    "arguana": "8ad3e3c2a5867cdced806d6503f29b99",
    "climate-fever": "8b66f0a9126c521bae2bde127b4dc99d",
    "cqadupstack": "4e41456d7df8ee7760a7f866133bda78",
    "dbpedia-entity": "c2a39eb420a3164af735795df012ac2c",
    "fever": "5a818580227bfb4b35bb6fa46d9b6c03",
    "fiqa": "17918ed23cd04fb15047f73e6c3bd9d9",
    "hotpotqa": "f412724f78b0d91183a0e86805e16114",
    "msmarco": "444067daf65d982533ea17ebd59501e4",
    "nfcorpus": "a89dba18a62ef92f7d323ec890a0d38d",
    "nq": "d4d3d2e48787a744b6f6e691ff534307",
    "quora": "18fb154900ba42a600f84b839c173167",
    "scidocs": "38121350fc3a4d2f48850f6aff52e4a9",
    "scifact": "5f7d1de60b170fc8027bb7898e2efca1",
    "trec-covid": "ce62140cb23feb9becf6270d0d1fe6d1",
    "webis-touche2020": "46f650ba5a527fc69e0a6521c5a23563",
}


class _TransientFailure(Exception):
    """What another try may mend: network faults, 429, 5xx, a short body, a wrong checksum."""


def ensure_downloaded(dataset: str) -> Path:
    """The local folder of a BEIR set that is not there yet.

    A path (``/data/scifact``) is filled at that path; a bare name goes to the cache and is downloaded once. The set is
    the one named by the last part. Raises InputMissingError (no set of that name), RetryableError (host unreachable).
    """
    is_path = "/" in dataset
    name = PurePosixPath(dataset).name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InputMissingError("no such folder, archive or data set", where=dataset)
    target = Path(dataset).expanduser() if is_path else cache_folder() / "beir" / name
    if not target.exists():
        _download(name, target, dataset)
    return target


def _download(name: str, target: Path, given: str) -> None:
    """Fetch, verify and unpack beside the target, then rename: the target is whole or not there."""
    url = f"{os.environ.get(BASE_URL_VARIABLE, BASE_URL).rstrip('/')}/{name}.zip"
    say("download", dataset=name, url=url, to=target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{name}.download-", dir=target.parent))
    except OSError as error:
        raise AccessError(f"cannot make the folder: {error.strerror}", where=str(target.parent)) from None
    try:
        archive = temp / f"{name}.zip"
        _fetch(url, archive, MD5.get(name), given)
        folder = _unpack(archive, temp / "unpacked", name, url)
        try:
            folder.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, and its copy is verified too
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _fetch(url: str, archive: Path, md5: str | None, given: str) -> None:
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

    wait = wait_exponential_jitter(initial=FIRST_WAIT_SECONDS, max=8, jitter=FIRST_WAIT_SECONDS)
    try:
        for attempt in Retrying(
            stop=stop_after_attempt(TRIES), wait=wait, retry=retry_if_exception_type(_TransientFailure), reraise=True
        ):
            with attempt:
                _fetch_once(url, archive, md5, given)
    except _TransientFailure as error:
        remedy = (
            f"Try again later, set {BASE_URL_VARIABLE} to a mirror, or download it by hand and give the folder or .zip"
        )
        raise RetryableError(f"cannot download the data set ({error})", where=url, remedy=remedy) from None


def _fetch_once(url: str, archive: Path, md5: str | None, given: str) -> None:
    """One try. Raises `_TransientFailure`."""
    import httpx

    state, received = hashlib.md5(usedforsecurity=False), 0
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=httpx.Timeout(30)) as response:
            if response.status_code in (429, *range(500, 600)):
                raise _TransientFailure(f"HTTP {response.status_code}")
            if response.status_code != 200:
                problem = (
                    f"no such file or folder, and no BEIR set of that name (HTTP {response.status_code} from {url})"
                )
                raise InputMissingError(problem, where=given, remedy=f"Sets known: {', '.join(sorted(MD5))}, demo")
            length = response.headers.get("content-length")
            with archive.open("wb") as file, progress("download", int(length) if length else None, "bytes") as shown:
                for block in response.iter_raw(1 << 20):
                    file.write(block)
                    state.update(block)
                    received += len(block)
                    shown.advance(len(block))
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ConfigError(f"is not a usable URL ({error})", where=url, remedy=f"Correct {BASE_URL_VARIABLE}") from None
    except httpx.HTTPError as error:
        raise _TransientFailure(str(error) or type(error).__name__) from None
    if length is not None and received != int(length):
        raise _TransientFailure(f"{received} of {length} bytes came")
    if md5 is not None and state.hexdigest() != md5:
        raise _TransientFailure(f"md5 {state.hexdigest()}, published {md5}")


def _unpack(archive: Path, folder: Path, name: str, url: str) -> Path:
    """Unpack after checks: intact, no member outside the folder, a corpus in it. Returns the folder of the set."""
    problem = None
    try:
        with zipfile.ZipFile(archive) as packed:
            members = packed.namelist()
            if any(m.startswith("/") or ".." in PurePosixPath(m).parts for m in members):
                problem = "a member would leave the folder"
            elif not any(PurePosixPath(m).name == "corpus.jsonl" for m in members):
                problem = "no corpus.jsonl in it"
            else:
                packed.extractall(folder)  # verifies each member's CRC
    except (zipfile.BadZipFile, EOFError) as error:
        problem = str(error)
    if problem:
        raise RetryableError(f"the download is not a BEIR archive ({problem})", where=url, remedy="Try again later")
    inner = folder / name
    return inner if inner.is_dir() else folder
