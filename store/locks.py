"""One holder at a time of a name in a folder, among all processes that share the folder.

Locally it is a flock, which ends with its holder. On object storage it is a lease: numbered objects
``locks/<name>/<n>.json``, made by conditional put, of which the one with the highest number counts. Who finds it
released or expired makes number n + 1, and of several that try, one succeeds. The highest is never removed (older ones
are), so a number is never used for two leases at the same time.

A lease that expires while its holder is still at work lets a second one in, so what is done under it must be right with
two at it: commits are, because the first one wins. The lock saves the work of doing it twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from store.errors import ResourceError
from store.faults import faults
from store.files import make_folder
from store.location import Location

STALE_AFTER = 600.0  # seconds
POLL = 1.0  # seconds, on average
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*")
_NUMBER = re.compile(r"([0-9]+)\.json")


@contextlib.contextmanager
def exclusive(
    folder: Location, name: str, wait: bool = True, *, stale_after: float = STALE_AFTER, poll: float = POLL
) -> Iterator[bool]:
    """Hold a lock during a `with` block; yield whether it is held.

    Two holders in one process exclude each other too: a thread that asks for what it holds waits for itself.

    Args:
        folder: the lock is kept in its subfolder ``locks``, and files of it may stay there.
        wait: until it is free; without, yield False if it is not.
        stale_after: seconds until a lease on object storage counts as free. Clocks must agree to much less.
        poll: seconds between two looks at a lease on object storage.

    Raises:
        ResourceError: if the folder cannot be written.
        ValueError: if the name is not made of letters, digits and ``_.=-``.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of a lock")
    held = _flock(folder, name, wait) if folder.is_local else _lease(folder, name, wait, stale_after, poll)
    with held as is_held:
        yield is_held


@contextlib.contextmanager
def _flock(folder: Location, name: str, wait: bool) -> Iterator[bool]:
    path = folder.path / "locks" / name
    with faults(str(path), "locking it"):
        make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with faults(str(path), "locking it"):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                is_held = True
            except BlockingIOError:
                is_held = False
        yield is_held
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Lease:
    holder: str  # for people
    expires: float  # seconds since 1970; 0 when released

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> _Lease:
        """Inverse of `to_json`; what somebody damaged by hand counts as released."""
        try:
            record = json.loads(data)
            return cls(str(record["holder"]), float(record["expires"]))
        except (ValueError, TypeError, KeyError):
            return cls("", 0.0)


@contextlib.contextmanager
def _lease(folder: Location, name: str, wait: bool, stale_after: float, poll: float) -> Iterator[bool]:
    place = folder / "locks" / name
    holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    while (number := _acquire(place, holder, stale_after)) is None:
        if not wait:
            yield False
            return
        time.sleep(poll * random.uniform(0.5, 1.5))
    try:
        yield True
    finally:
        # If it expired meanwhile this is not the highest any more, and changes nothing. What was done under it is done:
        # if it cannot be released now, the next one waits until it expires.
        with contextlib.suppress(ResourceError):
            _at(place, number).write(_Lease(holder, 0.0).to_json())


def _at(place: Location, number: int) -> Location:
    return place / f"{number}.json"


def _numbers(place: Location) -> list[int]:
    return sorted(int(match[1]) for name in place.list() if (match := _NUMBER.fullmatch(name)))


def _acquire(place: Location, holder: str, stale_after: float) -> int | None:
    """Make the next lease if the highest is over; return its number, None if another's is in force."""
    numbers = _numbers(place)
    if numbers:
        try:
            if _Lease.from_json(_at(place, numbers[-1]).read_bytes()).expires > time.time():
                return None
        except FileNotFoundError:
            return None  # removed as an old one, so there is a higher one now
    number = numbers[-1] + 1 if numbers else 0
    if not _at(place, number).create(_Lease(holder, time.time() + stale_after).to_json()):
        return None
    # Whoever looked long ago may have made anew a number that had been used and removed: a higher one is in force.
    if _numbers(place)[-1:] != [number]:
        return None
    for old in numbers:
        _at(place, old).remove()
    return number
