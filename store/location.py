"""A folder on local disk or object storage, with the few operations that commits are made of.

Local writes go to a temporary file, are synced, then renamed or hard-linked (`store.files`), so that a name appears
only with all its bytes behind it. Object stores put whole objects; a first-wins write uses their conditional put
(`store.remote`).
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from store import remote
from store.errors import ResourceError
from store.faults import faults
from store.files import PARTIAL as PARTIAL  # part of this module's interface
from store.files import Draft, make_folder, writing
from store.files import is_abandoned as is_abandoned
from store.files import remove_abandoned as remove_abandoned


def is_url(text: str) -> bool:
    """Tell whether a location is an fsspec URL (``s3://...``) and not a path."""
    return "://" in text


class Found(NamedTuple):
    """One file that `Location.walk` found."""

    name: str  # below the folder, with slashes
    size: int  # bytes
    modified: float  # seconds since 1970


@dataclass(frozen=True)
class Location:
    """A folder or file given as an absolute path or an fsspec URL. Equal text means equal place.

    What a URL needs beside itself is configured outside, so that workers and other programs inherit it. For S3 and
    what speaks its protocol (MinIO, Ceph, R2) that is AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE;
    AWS_DEFAULT_REGION; and AWS_ENDPOINT_URL for a server of one's own. Whatever else fsspec's file system takes is set
    in ~/.config/fsspec/*.json or in the environment, for example more patience with a slow server:
    ``FSSPEC_S3='{"config_kwargs": {"read_timeout": 60}}'``, or ``FSSPEC_S3='{"fixed_upload_size": true}'`` for R2.
    The store must honour ``If-None-Match: *`` on puts, as these do; whoever writes finds out before it works
    (`require_first_wins`).

    All operations raise ResourceError for what the disk, the network or the server refuses, and FileNotFoundError if
    the file is not there.
    """

    url: str

    @classmethod
    def of(cls, text: str | Path) -> Location:
        """Make a location of a path (made absolute) or a URL; ``file://`` URLs become paths."""
        text = str(text)
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        if is_url(text):
            scheme, _, path = text.partition("://")
            return cls(f"{scheme}://{path.rstrip('/')}")
        return cls(str(Path(text).expanduser().absolute()))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.url}{'' if self.url.endswith('/') else '/'}{name}")

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        return not is_url(self.url)

    @property
    def path(self) -> Path:
        """The local path.

        Raises:
            ValueError: on object storage.
        """
        if not self.is_local:
            raise ValueError(f"{self.url} is not on local disk")
        return Path(self.url)

    @property
    def filesystem(self) -> Any:
        """The fsspec filesystem behind a URL."""
        return remote.connect(self.url)[0]

    @property
    def storage_options(self) -> dict[str, Any]:
        """What to give to a library that opens a URL with fsspec itself, to get the same behaviour; {} locally."""
        return {} if self.is_local else remote.storage_options(self.url)

    # -- looking -----------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        if self.is_local:
            with faults(self.url, "looking it up"):
                return self.path.exists()
        try:
            remote.info(self.url)
        except FileNotFoundError:
            return False
        return True

    def size(self) -> int:
        """Return a file's size in bytes.

        Raises:
            FileNotFoundError: if there is none.
        """
        if self.is_local:
            with faults(self.url, "looking it up"):
                return self.path.stat().st_size
        info = remote.info(self.url)
        if info["type"] == "directory":
            raise FileNotFoundError(self.url)
        return int(info["size"])

    def list(self) -> list[str]:
        """Return the sorted names in this folder (none if it does not exist), without files still being written."""
        if self.is_local:
            with faults(self.url, "listing it"):
                names = os.listdir(self.path) if self.path.is_dir() else []
        else:
            names = remote.names(self.url)
        return sorted(name for name in names if not name.endswith(PARTIAL))

    def walk(self) -> Iterator[Found]:
        """Yield all files below this folder, in no particular order, also those still being written.

        Symbolic links are neither followed nor yielded. A file that vanishes meanwhile is left out.
        """
        if not self.is_local:
            for name, info in remote.find(self.url).items():
                yield Found(name, int(info["size"]), _modified(info))
            return
        with faults(self.url, "listing it"):
            for folder, _, names in os.walk(self.path, onerror=_raise_unless_gone):
                for name in names:
                    path = Path(folder, name)
                    try:
                        status = path.lstat()
                    except FileNotFoundError:
                        continue
                    if stat.S_ISREG(status.st_mode):
                        yield Found(path.relative_to(self.path).as_posix(), status.st_size, status.st_mtime)

    # -- reading -----------------------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: if there is none.
        """
        if not self.is_local:
            return remote.read(self.url)
        with faults(self.url, "reading it"):
            return self.path.read_bytes()

    def read_range(self, start: int, length: int) -> bytes:
        """Return `length` bytes from byte `start` on; fewer, or none, where the file ends before.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a number is negative.
        """
        if start < 0 or length < 0:
            raise ValueError(f"{self.url}: bytes {start} to {start + length} are no range")
        if not self.is_local:
            # An empty range cannot be asked for; one byte tells whether the file is there.
            return remote.read(self.url, start, start + max(length, 1))[:length]
        with faults(self.url, "reading it"), self.path.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    def tail(self, length: int) -> bytes:
        """Return a file's last bytes; all of it if it is shorter.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the number is not positive.
        """
        if length < 1:
            raise ValueError(f"{self.url}: the last {length} bytes are none")
        if not self.is_local:
            return remote.read(self.url, -length)
        with faults(self.url, "reading it"), self.path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - length))
            return stream.read(length)

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes of files in this folder by name; on object storage many at a time.

        Raises:
            FileNotFoundError: if there is none of a name.
        """
        unique = sorted(set(names))
        if self.is_local:
            return {name: (self / name).read_bytes() for name in unique}
        return dict(zip(unique, remote.read_many([(self / name).url for name in unique]), strict=True))

    # -- writing -----------------------------------------------------------------------------------------------

    def make_folder(self) -> None:
        if self.is_local:
            with faults(self.url, "making the folder"):
                make_folder(self.path)

    def remove(self) -> None:
        """Remove a file; one that does not exist is fine."""
        if not self.is_local:
            remote.remove(self.url)
            return
        with faults(self.url, "removing it"):
            self.path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Write a file whole and durably, replacing one of the same name."""
        if not self.is_local:
            remote.write(self.url, data)
            return
        with self.writing(first_wins=False) as draft:
            draft.write(data)

    def create(self, data: bytes) -> bool:
        """Write a file only if none of that name exists; return whether this call's bytes are the ones there.

        Of any number of callers at the same time exactly one wins (a hard link locally, a conditional put on object
        storage), also if an answer of the server is lost and the put repeated.
        """
        if not self.is_local:
            return remote.create(self.url, data)
        with self.writing(first_wins=True) as draft:
            draft.write(data)
        return bool(draft.won)

    def writing(self, first_wins: bool) -> contextlib.AbstractContextManager[Draft]:
        """Open a local file to write piece by piece; it gets its name, whole and durably, at the end of the block.

        After the block `won` of the stream says whether it got the name. An exception inside leaves nothing behind.

        Args:
            first_wins: as `create`, else as `write`.

        Raises:
            ValueError: on object storage.
        """
        return writing(self.path, first_wins=first_wins)

    def require_writable(self) -> None:
        """Find out, by doing it, whether files can be written here, and on object storage whether the first wins.

        Raises:
            ResourceError: if not.
        """
        probe = f".probe-{uuid.uuid4().hex}{PARTIAL}"
        if self.is_local:
            with faults(self.url, "writing there"):
                existing = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
                (existing / probe).touch(exist_ok=False)
                (existing / probe).unlink()
            return
        try:
            first, second = (self / probe).create(b"first"), (self / probe).create(b"second")
        finally:
            with contextlib.suppress(ResourceError):
                (self / probe).remove()
        if not first or second:
            raise ResourceError(
                f"{self.url}: this object store replaces objects although asked not to (If-None-Match: *), so two "
                "writers could both believe that a block is theirs\n  remedy: update the server, or name another place"
            )

    def require_first_wins(self) -> None:
        """Call `require_writable` on object storage, once per process and place; local folders need no such proof.

        Every writer that relies on `create` calls this before it begins work.

        Raises:
            ResourceError: if nothing can be written here, or the server replaces objects although asked not to.
        """
        if not self.is_local and self.url not in _PROVED:
            self.require_writable()
            _PROVED.add(self.url)


_PROVED: set[str] = set()  # places of which this process knows that the first put wins


def _modified(info: dict[str, Any]) -> float:
    for key in ("LastModified", "last_modified", "updated", "mtime", "created"):
        match info.get(key):
            case datetime() as moment:
                return moment.timestamp()
            case str() as text:
                return datetime.fromisoformat(text).timestamp()
            case int() | float() as seconds:
                return float(seconds)
    raise ResourceError(
        f"{info.get('name')}: this object store does not tell when it was written\n  remedy: name another place"
    )


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
