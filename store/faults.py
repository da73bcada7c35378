"""Failures of disks and object stores as errors of resid: what failed, where, why, and what to do about it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from store.errors import ResidError, ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Whose errors are failures of the other side: not all of them are OSErrors.
_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "adlfs", "azure", "s3fs", "urllib3"}
_DENIED_CLASSES = {
    "CredentialRetrievalError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "TokenRetrievalError",
}


@contextlib.contextmanager
def faults(where: str, doing: str) -> Iterator[None]:
    """Turn what a disk, or a library that talks to an object store, raises inside into a ResourceError.

    FileNotFoundError and FileExistsError stay what they are, unless it is the bucket that is missing. Errors of
    Python itself are faults of the code and stay as well.

    Args:
        where: the path or URL.
        doing: what was tried, as in "writing it".
    """
    try:
        yield
    except Exception as error:
        remote = "://" in where
        if not _is_fault(error, remote):
            raise
        reason, remedy = " ".join(str(error).split()) or _unsaid(error), _remedy(error, remote)
        code = error_code(error)
        if code is not None and code not in reason:
            reason = f"{reason} ({code})"
        raise ResourceError(f"{where}: {doing} failed: {reason}\n  remedy: {remedy}") from error


def _unsaid(error: Exception) -> str:
    return "it took too long" if isinstance(error, TimeoutError) else type(error).__name__


def _is_fault(error: Exception, remote: bool) -> bool:
    if isinstance(error, ResidError):
        return False
    if isinstance(error, FileNotFoundError | FileExistsError):
        return error_code(error) in ("NoSuchBucket", "NoSuchUpload")
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or (remote and library in _LIBRARIES)


def _answer(error: BaseException) -> dict[str, Any]:
    """Return what the server answered, as botocore keeps it in an error or the error's cause; {} if nothing."""
    for found in (error, error.__cause__):
        answer = getattr(found, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            return answer
    return {}


def error_code(error: BaseException) -> str | None:
    """Return the error code that an object store answered ("NoSuchBucket", "412"); None if it did not answer."""
    code = _answer(error).get("Error", {}).get("Code")
    return None if code is None else str(code)


def status(error: BaseException) -> int | None:
    """Return the HTTP status that an object store answered; None if it did not answer."""
    found = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None if found is None else int(found)


def _remedy(error: Exception, remote: bool) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if error_code(error) == "NoSuchBucket":
        return "create the bucket, or correct the URL"
    if number in _FULL:
        return "free some space, or name a place with more; then run the same command"
    if number == errno.EROFS:
        return "mount it for writing, or name another place"
    denied = (
        isinstance(error, PermissionError) or status(error) in (401, 403) or type(error).__name__ in _DENIED_CLASSES
    )
    if denied and remote:
        return (
            "check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), and that they may "
            "list the bucket, and read and write in it"
        )
    if denied:
        return "get permission (its owner is `ls -ld`), or name another place"
    if remote:
        return (
            "check that the endpoint (AWS_ENDPOINT_URL, else that of the region) is right, up and reachable; then run "
            "the same command"
        )
    return "check the path and the disk; then run the same command"
