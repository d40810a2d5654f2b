"""S3 objects as byte streams: a reader that resumes where a connection broke, a writer that uploads in parts."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from rmsearch.errors import RetryableError, RMSearchError
from rmsearch.storage.s3 import READ_ATTEMPTS, client, split
from rmsearch.storage.s3_errors import CHECK_NETWORK, s3_errors

PART_BYTES = 16 << 20  # equal parts (some stores insist); 10,000 of them make the largest streamed object 156 GiB
PART_THREADS = 3  # so a writer holds at most (3 + 1) parts in memory


class _S3Raw(io.RawIOBase):
    """An object as a forward stream; a broken connection is opened again at the byte where it broke."""

    def __init__(self, uri: str) -> None:
        self._uri, self._position, self._etag, self._size, self._body = uri, 0, "", 0, cast(Any, None)
        with s3_errors(uri):
            self._open()

    def _open(self) -> None:
        bucket, key = split(self._uri)
        span = {"Range": f"bytes={self._position}-"} if self._position else {}
        answer = client().get_object(Bucket=bucket, Key=key, **span)
        if self._etag and answer["ETag"] != self._etag:
            raise RetryableError("the object was replaced while it was read", where=self._uri, remedy="Run again.")
        if not self._etag:
            self._etag, self._size = answer["ETag"], answer["ContentLength"]
        self._body = answer["Body"]

    def readable(self) -> bool:
        return True

    def _read_some(self, buffer: Any) -> int:
        import botocore.exceptions

        if self._body is None:
            self._open()
        try:
            data = self._body.read(len(buffer))
            if not data and len(buffer) and self._position < self._size:
                raise botocore.exceptions.IncompleteReadError(actual_bytes=self._position, expected_bytes=self._size)
        except BaseException:
            self._drop()
            raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        import botocore.exceptions as boto
        import tenacity
        import urllib3.exceptions

        broken = (
            boto.HTTPClientError,
            boto.ConnectionError,
            boto.IncompleteReadError,
            urllib3.exceptions.HTTPError,
            OSError,
        )
        if self._position >= self._size:
            return 0
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(broken),
            stop=tenacity.stop_after_attempt(READ_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
            reraise=True,
        )
        with s3_errors(self._uri):
            try:
                return cast(int, again(self._read_some, buffer))
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise RetryableError("the download broke off", where=self._uri, remedy=CHECK_NETWORK) from error

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None

    def close(self) -> None:
        self._drop()
        super().close()


@contextmanager
def s3_reader(uri: str) -> Iterator[BinaryIO]:
    """Stream an object; never more than a buffer of it in memory."""
    with io.BufferedReader(_S3Raw(uri), buffer_size=1 << 20) as stream:
        yield cast(BinaryIO, stream)


class _S3Upload(io.BufferedIOBase):
    """Collects parts and uploads them in a small thread pool. ``close`` completes nothing: `complete` does."""

    def __init__(self, uri: str) -> None:
        self._uri, self._where = uri, dict(zip(("Bucket", "Key"), split(uri), strict=True))
        self._buffer, self._written, self._upload_id = bytearray(), 0, ""
        self._parts: list[Future[dict[str, Any]]] = []
        self._pool = ThreadPoolExecutor(PART_THREADS, thread_name_prefix="s3-part")
        self._slots = threading.Semaphore(PART_THREADS)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PART_BYTES):  # a huge write must not double itself in the buffer
            self._buffer += view[start : start + PART_BYTES]
            while len(self._buffer) > PART_BYTES:
                self._send(bytes(self._buffer[:PART_BYTES]))
                del self._buffer[:PART_BYTES]
        self._written += len(view)
        return len(view)

    def _send(self, data: bytes) -> None:
        if not self._upload_id:
            with s3_errors(self._uri):
                self._upload_id = client().create_multipart_upload(**self._where)["UploadId"]
        self._slots.acquire()
        for part in self._parts:
            if part.done():
                part.result()  # a part that failed ends the write now, not after the last row
        self._parts.append(self._pool.submit(self._upload, len(self._parts) + 1, data))

    def _upload(self, number: int, data: bytes) -> dict[str, Any]:
        try:
            with s3_errors(self._uri):
                sent = client().upload_part(**self._where, UploadId=self._upload_id, PartNumber=number, Body=data)
            return {"PartNumber": number, "ETag": sent["ETag"]}
        finally:
            self._slots.release()

    def complete(self) -> None:
        """Send what is left and make the object visible."""
        if not self._upload_id:
            with s3_errors(self._uri):
                client().put_object(**self._where, Body=bytes(self._buffer))
        else:
            self._send(bytes(self._buffer))
            done = {"Parts": [part.result() for part in self._parts]}
            with s3_errors(self._uri):
                client().complete_multipart_upload(**self._where, UploadId=self._upload_id, MultipartUpload=done)
        self._pool.shutdown()

    def abort(self) -> None:
        """Throw the parts away. Parts of a killed process stay unseen in the bucket until its lifecycle rule for
        incomplete uploads removes them."""
        self._pool.shutdown(cancel_futures=True)
        if self._upload_id:
            with s3_errors(self._uri):
                client().abort_multipart_upload(**self._where, UploadId=self._upload_id)


@contextmanager
def s3_writer(uri: str) -> Iterator[BinaryIO]:
    """Write an object that appears on a clean exit of the block, or not at all."""
    upload = _S3Upload(uri)
    try:
        yield cast(BinaryIO, upload)
        upload.complete()
    except BaseException:
        try:
            upload.abort()
        except RMSearchError:
            pass  # the first error is the one to show; the store's lifecycle rule removes the parts
        raise
