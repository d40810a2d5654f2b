"""The one place where what boto3 raises becomes an error that a user can act on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rmsearch.errors import AccessError, ConfigError, InputMissingError, RetryableError, RMSearchError

CHECK_NETWORK = "Check AWS_ENDPOINT_URL and the network, then run again."
_ACCESS = {
    "AccessDenied", "AccountProblem", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken",
    "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired", "UnauthorizedAccess",
}  # fmt: skip
_RETRY = {
    "ConditionalRequestConflict", "NoSuchUpload", "OperationAborted", "PreconditionFailed", "RequestLimitExceeded",
    "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests",
}  # fmt: skip
_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}


def s3_error(error: BaseException, uri: str) -> RMSearchError | None:
    """The user's error for what boto3 raised at ``uri``, or None when it is none of boto3's. Texts never quote request
    headers or exception texts that may carry a key."""
    import boto3.exceptions
    import botocore.exceptions as boto

    if isinstance(error, boto3.exceptions.S3UploadFailedError) and error.__context__ is not None:
        return s3_error(error.__context__, uri)
    if isinstance(error, boto3.exceptions.RetriesExceededError):
        return RetryableError("the transfer broke off again and again", where=uri, remedy=CHECK_NETWORK)
    if isinstance(error, boto.ClientError):
        return _client_error(error, uri)
    if isinstance(error, _no_credentials(boto)):
        remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or the pod's service account)."
        return AccessError(f"no usable S3 credentials ({type(error).__name__})", where=uri, remedy=remedy)
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        remedy = "Point AWS_CA_BUNDLE at the store's CA file."
        return ConfigError("the store's TLS certificate is not trusted", where=uri, remedy=remedy)
    if isinstance(error, boto.HTTPClientError) and "Invalid header" in str(error):
        remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY without it (a secret made with echo ends in one)."
        return AccessError("the S3 credentials hold a line break", where=uri, remedy=remedy)
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError | boto.IncompleteReadError):
        problem = f"cannot reach the store at {_endpoint()} ({type(error).__name__})"
        return RetryableError(problem, where=uri, remedy=CHECK_NETWORK)
    if isinstance(error, boto.BotoCoreError):
        return ConfigError(
            f"boto3 refuses the setting: {error}", where=uri, remedy="Correct the URI or the AWS_* setting."
        )
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        remedy = "Write AWS_ENDPOINT_URL as http(s)://host:port."
        return ConfigError(f"{_endpoint()!r} is not an endpoint", where=uri, remedy=remedy)
    return None


def _no_credentials(boto: Any) -> tuple[type[BaseException], ...]:
    names = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError",
             "TokenRetrievalError", "SSOError", "LoginError", "ProfileNotFound", "MetadataRetrievalError")  # fmt: skip
    return tuple(getattr(boto, name) for name in names if hasattr(boto, name))


def _endpoint() -> str:
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS S3"
    return re.sub(r"//[^/@]*@", "//", url)  # user:password@ must not reach a log


def _client_error(error: Any, uri: str) -> RMSearchError:
    answer = error.response.get("Error", {})
    code, status = str(answer.get("Code", "")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    bucket = uri[len("s3://") :].partition("/")[0]
    if code == "NoSuchBucket":
        remedy = "Create the bucket, or correct the URI or AWS_ENDPOINT_URL."
        return InputMissingError(f"the bucket {bucket!r} does not exist at {_endpoint()}", where=uri, remedy=remedy)
    if code in _RETRY or (status >= 500 and status != 501) or status == 429:
        return RetryableError(f"the store answered {code or status}", where=uri, remedy="Run again in a while.")
    if code in _ACCESS or status in (401, 403):
        remedy = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, the machine's clock and the bucket's policy."
        return AccessError(f"the store refused access ({code or status})", where=uri, remedy=remedy)
    if code in ("NoSuchKey", "NotFound") or status == 404:
        remedy = "Correct the URI, or run the stage that writes it."
        return InputMissingError("no such object (or bucket)", where=uri, remedy=remedy)
    if code in _REGION or status in (301, 307):
        return ConfigError(
            f"wrong region ({code or status})", where=uri, remedy="Set AWS_REGION to the bucket's region."
        )
    said = " ".join(str(answer.get("Message", "")).split())[:200]
    return ConfigError(
        f"the store refused the request: {code or status} {said}".rstrip(), where=uri, remedy="Correct the URI."
    )


@contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Map everything that boto3 raises in the block: a missing bucket or key to InputMissingError, refused or missing
    credentials to AccessError, malformed names and settings to ConfigError, the network and 5xx to RetryableError."""
    try:
        yield
    except RMSearchError:
        raise
    except Exception as error:
        mapped = s3_error(error, uri)
        if mapped is None:
            raise
        raise mapped from error
