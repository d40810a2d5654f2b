"""S3: one client per process and setting, and the calls on whole objects and listings."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rmsearch.errors import ConfigError, InputMissingError
from rmsearch.storage.s3_errors import s3_errors

READ_ATTEMPTS = 6

_clients: dict[tuple[int, int], Any] = {}
_clients_lock = threading.Lock()


def _new_lock_in_child() -> None:  # another thread may have held the lock at the moment of the fork
    global _clients_lock
    _clients_lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock_in_child)


def client() -> Any:
    """The boto3 client for this process and the current ``AWS_*`` environment (endpoint, region, keys, profile).

    ``AWS_MAX_ATTEMPTS`` shortens or lengthens the adaptive retries (8 by default). Call it inside `s3_errors`.
    """
    aws = frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = (os.getpid(), hash(aws))
    with _clients_lock:
        if key not in _clients:
            _clients[key] = _make_client()
        return _clients[key]


def _make_client() -> Any:
    import boto3
    from botocore.config import Config

    compatible = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", "8")
    if not attempts.isdigit() or attempts == "0":
        raise ConfigError(f"AWS_MAX_ATTEMPTS is {attempts!r}", remedy="Set it to a whole number from 1, or unset it.")
    config = Config(
        # Stores other than AWS reject the newer default checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "adaptive", "max_attempts": int(attempts)},
        s3={"addressing_style": "path"} if compatible else {},
        max_pool_connections=32,
        connect_timeout=10,
        tcp_keepalive=True,
    )
    # Its own session: boto3's default session is not safe to share between threads.
    return boto3.session.Session().client("s3", region_name=os.environ.get("AWS_REGION"), config=config)


def split(uri: str, *, key_needed: bool = True) -> tuple[str, str]:
    """``s3://bucket/key`` as (bucket, key). Raises ConfigError for a malformed one."""
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
        problem = f"{bucket!r} is not a bucket name" if bucket else "the bucket is missing"
        raise ConfigError(problem, where=uri, remedy="Write s3://bucket/key.")
    if key_needed and (not key or key.endswith("/")):
        raise ConfigError("names a folder, and a file is needed", where=uri, remedy="Write s3://bucket/key.")
    if len(key.encode(errors="surrogatepass")) > 1024:
        raise ConfigError("the key is longer than 1024 bytes", where=uri[:80] + "…", remedy="Choose a shorter name.")
    return bucket, key.rstrip("/") if not key_needed else key


@dataclass(frozen=True)
class Object:
    """One object of a listing; ``relative`` is its key below the listed folder."""

    relative: str
    key: str
    size: int
    etag: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Stands for the contents, without a download."""
        return hashlib.sha256(f"{self.etag} {self.size}".encode()).hexdigest()


def list_objects(uri: str, page: int = 1000) -> Iterator[Object]:
    """Objects below the folder ``uri``, in key order; the empty "folder" objects that consoles make are left out.
    Raises InputMissingError for a missing bucket."""
    bucket, key = split(uri, key_needed=False)
    prefix = f"{key}/" if key else ""
    with s3_errors(uri):
        pages = client().get_paginator("list_objects_v2")
        for listing in pages.paginate(Bucket=bucket, Prefix=prefix, PaginationConfig={"PageSize": page}):
            for item in listing.get("Contents", ()):
                if not item["Key"].endswith("/"):
                    yield Object(item["Key"][len(prefix) :], item["Key"], item["Size"], item["ETag"])


def remove(uri: str) -> None:
    """Delete the object and all objects below it. One request each: stores disagree on the bulk call."""
    bucket, key = split(uri, key_needed=False)

    def delete(one: str) -> None:
        with s3_errors(f"s3://{bucket}/{one}"):
            client().delete_object(Bucket=bucket, Key=one)

    if not uri.endswith("/"):
        delete(key)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(delete, [item.key for item in list_objects(uri)]):
            pass


def put_if_absent(uri: str, data: bytes) -> bool:
    """Create an object unless it exists (``If-None-Match: *``), decided by the store."""
    import botocore.exceptions
    import tenacity

    bucket, key = split(uri)

    def put() -> bool:
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in ("PreconditionFailed", "412"):
                return False
            raise
        return True

    def rivals(error: BaseException) -> bool:  # 409: another writer is at it right now, so ask again
        code = error.response["Error"]["Code"] if isinstance(error, botocore.exceptions.ClientError) else ""
        return code == "ConditionalRequestConflict"

    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception(rivals),
        stop=tenacity.stop_after_attempt(READ_ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=2),
        reraise=True,
    )
    with s3_errors(uri):
        return again(put)


def head(uri: str) -> Object | None:
    """Facts of one object, or None when ``uri`` is not an object."""
    bucket, key = split(uri, key_needed=False)
    if not key or uri.endswith("/"):
        return None
    try:
        with s3_errors(uri):
            answer = client().head_object(Bucket=bucket, Key=key)
    except InputMissingError:
        return None
    return Object(key.rpartition("/")[2], key, answer["ContentLength"], answer["ETag"], answer.get("Metadata", {}))
