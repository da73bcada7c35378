"""Whole objects on object storage through fsspec, with the failures of networks in mind.

What S3 needs is done for S3 (``s3://``, ``s3a://``): bounded timeouts, and conditional puts whose answer may be lost.
Other fsspec file systems get the same operations as they offer them.

How long a failure lasts: botocore tries a request five times, with pauses of 7.5 s in all on average; s3fs would repeat
that 5 or 25 times, which is half an hour on an endpoint that accepts connections and never answers. So s3fs does not
repeat here, and `_patiently` goes on only if little time has passed: 30 s with the timeouts below. An endpoint that
refuses connections, cannot be reached or never answers is an error after about a minute at most.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from store.errors import ResourceError
from store.faults import error_code, faults, status

T = TypeVar("T")

CONNECT_TIMEOUT = 5  # seconds
READ_TIMEOUT = 12  # seconds without a byte of an answer
CONNECTIONS = 32  # at the same time
TOKEN = "resid-put"  # metadata of an object: which call put it

_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
# By name, because the libraries of object stores are not installed everywhere.
_TRANSIENT_CLASSES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "ResponseParserError",
    "TimeoutError",
}


def storage_options(url: str) -> dict[str, Any]:
    """Return what fsspec gets beside a URL: no cached listings, and on S3 bounded waits. The user's settings win.

    Raises:
        ResourceError: if no installed package knows the URL's scheme.
    """
    scheme = url.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = "pip install 'resid[s3]'" if scheme.startswith("s3") else "install the package that it names"
        raise ResourceError(f"{url}: {error}\n  remedy: {extra}") from error
    except ValueError as error:
        raise ResourceError(f"{url}: {error}\n  remedy: correct the URL, or give a path") from error
    # Listings must see what other processes committed since.
    options: dict[str, Any] = {"use_listings_cache": False}
    if _is_s3(kind):
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": READ_TIMEOUT,
            "max_pool_connections": CONNECTIONS,
        }
        for protocol in kind.protocol:
            options["config_kwargs"].update(fsspec.config.conf.get(protocol, {}).get("config_kwargs", {}))
    return options


def _is_s3(filesystem: Any) -> bool:
    return "s3" in filesystem.protocol


def connect(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it. fsspec keeps the connections, one set a process."""
    filesystem, path = fsspec.core.url_to_fs(url, **storage_options(url))
    bound(filesystem)
    return filesystem, path


def bound(filesystem: Any) -> None:
    """Keep a file system from repeating on its own what botocore has tried."""
    if _is_s3(filesystem):
        filesystem.retries = 1


def _read_timeout(filesystem: Any) -> float:
    return float(getattr(filesystem, "config_kwargs", {}).get("read_timeout") or READ_TIMEOUT)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    answered = status(error)
    if answered is not None:
        return answered in _TRANSIENT_STATUS
    return any(base.__name__ in _TRANSIENT_CLASSES for base in type(error).__mro__)


class _Patience:
    """How long failures that may pass are answered by another try: two and a half read timeouts."""

    def __init__(self, filesystem: Any):
        self._timeout = _read_timeout(filesystem)
        self._end = time.monotonic() + 2.5 * self._timeout

    def pause(self, error: Exception) -> float | None:
        """Return how many seconds to wait before another try; None if it is for good, or there was time enough."""
        if not _is_transient(error) or time.monotonic() > self._end:
            return None
        return random.uniform(0, min(1, self._timeout / READ_TIMEOUT))


def _patiently(filesystem: Any, call: Callable[[], T]) -> T:
    """Call until it works, fails for good, or patience ends.

    Only for what may be done twice: botocore does not repeat a GET whose body was cut.
    """
    patience = _Patience(filesystem)
    while True:
        try:
            return call()
        except Exception as error:
            if (pause := patience.pause(error)) is None:
                raise
            time.sleep(pause)


async def patiently(filesystem: Any, call: Callable[[], Awaitable[T]]) -> T:
    """Do what the operations of this module do, for a library that uses an fsspec file system itself (`bound`)."""
    patience = _Patience(filesystem)
    while True:
        try:
            return await call()
        except Exception as error:
            if (pause := patience.pause(error)) is None:
                raise
            await asyncio.sleep(pause)


def info(url: str) -> dict[str, Any]:
    """Return what fsspec knows of an object or folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    with faults(url, "looking it up"):
        filesystem, path = connect(url)
        return dict(_patiently(filesystem, lambda: filesystem.info(path)))


def names(url: str) -> list[str]:
    """Return the names in a folder, unsorted; none if there is no such folder."""
    with faults(url, "listing it"):
        filesystem, path = connect(url)
        try:
            found = _patiently(filesystem, lambda: filesystem.ls(path, detail=False))
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return []
    entries = [str(entry).rstrip("/") for entry in found]
    # An object of the folder's own name: some tools make one to stand for an empty folder.
    return [entry.rsplit("/", 1)[-1] for entry in entries if entry.strip("/") != path.strip("/")]


def find(url: str) -> dict[str, dict[str, Any]]:
    """Return what fsspec knows of all objects below a folder, by their names in it."""
    with faults(url, "listing it"):
        filesystem, path = connect(url)
        found = _patiently(filesystem, lambda: filesystem.find(path, detail=True))
    prefix = path.rstrip("/") + "/"
    return {
        name.removeprefix(prefix): entry
        for name, entry in found.items()
        if name.startswith(prefix) and not name.endswith("/")
    }


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return an object's bytes, or those from `start` (negative: counted from the end) to `end`, as in a slice.

    Raises:
        FileNotFoundError: if there is none.
    """
    return _read(url, *connect(url), start, end)


def read_many(urls: Sequence[str]) -> list[bytes]:
    """Return the bytes of objects of one store, read many at a time.

    Raises:
        FileNotFoundError: if one is missing.
    """
    if not urls:
        return []
    filesystem = connect(urls[0])[0]
    with ThreadPoolExecutor(min(len(urls), CONNECTIONS)) as pool:
        try:
            return list(pool.map(lambda url: _read(url, filesystem, filesystem._strip_protocol(url)), urls))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those not begun would take as long to fail
            raise


def _read(url: str, filesystem: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
    # One stream: s3fs asks for the size first if it may use several.
    options = {"max_concurrency": 1} if _is_s3(filesystem) else {}
    with faults(url, "reading it"):
        try:
            return bytes(_patiently(filesystem, lambda: filesystem.cat_file(path, start=start, end=end, **options)))
        except OSError as error:
            if status(error) == 416:  # nothing there: an empty object, or a range behind the end
                return b""
            raise


def remove(url: str) -> None:
    """Remove an object; one that does not exist is fine."""
    with faults(url, "removing it"):
        filesystem, path = connect(url)
        try:
            _patiently(filesystem, lambda: filesystem.rm_file(path))
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise


def write(url: str, data: bytes) -> None:
    """Write an object whole, replacing one of the same name."""
    _put(url, data, first_wins=False)


def create(url: str, data: bytes) -> bool:
    """Write an object only if there is none of that name; return whether this call's object is the one there.

    S3 does it with ``If-None-Match: *``, on the put itself or, from 100 MiB on, on completing the multipart upload.
    """
    return _put(url, data, first_wins=True)


def _put(url: str, data: bytes, first_wins: bool) -> bool:
    with faults(url, "writing it"):
        filesystem, path = connect(url)
        token = uuid.uuid4().hex
        options: dict[str, Any] = {"mode": "create"} if first_wins else {}
        if _is_s3(filesystem):
            given = filesystem.s3_additional_kwargs.get("Metadata", {})
            options["Metadata"] = {**given, TOKEN: token}
        if filesystem.async_impl:
            # A read timeout counts from the end of an upload, and an upload waits without limit for the server to say
            # that it may begin. So it has a limit of its own: 24 s, and 3 s a MiB.
            options["timeout"] = _read_timeout(filesystem) * (2 + len(data) / 2**22)

        def put() -> bool:
            try:
                filesystem.pipe_file(path, data, **options)
            except Exception as error:
                # Refused although it is there by this very call: it was put, the answer was lost, and a repetition
                # below this code (by botocore, or aiohttp, at once) met its own object or no upload any more.
                doubtful = _is_refusal(error) or error_code(error) == "NoSuchUpload"
                if doubtful and _is_ours(filesystem, path, data, token):
                    return True
                if first_wins and _is_refusal(error):
                    return False
                if status(error) == 409:  # another conditional put of this name is under way: S3 asks to try again
                    raise TimeoutError(str(error)) from error
                raise
            return True

        return _patiently(filesystem, put)


def _is_refusal(error: Exception) -> bool:
    # s3fs knows it by a detail of the answer that not every S3-compatible store gives.
    return isinstance(error, FileExistsError) or status(error) == 412


def _is_ours(filesystem: Any, path: str, data: bytes, token: str) -> bool:
    if not filesystem.async_impl:
        return False  # in memory: no answer gets lost
    try:
        if _is_s3(filesystem):
            return bool(_patiently(filesystem, lambda: filesystem.metadata(path)).get(TOKEN) == token)
        return bool(filesystem.cat_file(path) == data)
    except FileNotFoundError:
        return False
