"""Files on local disk that appear under their name whole and durably, or not at all.

A file is written under a temporary name, synced, then renamed (the last writer wins) or hard-linked (the first wins).
Its writer holds an exclusive flock on it all the while, which ends with the process: whoever sweeps the folder can tell
what a dead writer left from what a live one is at.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from store.errors import ResourceError
from store.faults import faults

PARTIAL = ".partial"  # suffix of files that are being written

# Some network file systems have no flock. Writing works there, but nobody can tell that a writer is dead.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def sync_folder(folder: Path) -> None:
    """Make the entries of a local folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a local folder and its parents, durably: each new one is synced into the one that holds it."""
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "a file is in the way", str(folder)) from None
    for made in reversed(new):
        sync_folder(made.parent)


class Draft(io.BufferedWriter):
    """A binary stream into a file that does not have its name yet."""

    won: bool | None = None  # whether it got the name; None until then


@contextlib.contextmanager
def writing(target: Path, *, first_wins: bool) -> Iterator[Draft]:
    """Write a file piece by piece; at the end of the `with` block it gets its name, after an exception nothing is left.

    Args:
        first_wins: do not replace a file of that name; `Draft.won` then says False.

    Raises:
        ResourceError: if it cannot be written.
    """
    with faults(str(target), "writing it"):
        make_folder(target.parent)
        temporary, draft = _open_draft(target)
        try:
            with draft:
                yield draft
                draft.flush()
                os.fsync(draft.fileno())
                draft.won = _link(temporary, target) if first_wins else _replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if draft.won:
            sync_folder(target.parent)


def _open_draft(target: Path) -> tuple[Path, Draft]:
    while True:
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
        draft = Draft(io.FileIO(temporary, "xb"))
        _lock(draft.fileno(), fcntl.LOCK_EX)
        if os.fstat(draft.fileno()).st_nlink > 0:
            return temporary, draft
        draft.close()  # swept in the moment between creation and lock


def _replace(temporary: Path, target: Path) -> bool:
    os.replace(temporary, target)
    return True


def _link(temporary: Path, target: Path) -> bool:
    try:
        os.link(temporary, target)
    except FileExistsError:
        # On NFS the link may have been made and its answer lost: then the file has two names.
        return temporary.stat().st_nlink > 1
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise ResourceError(
            f"{target}: this file system makes no hard links ({error.strerror}), and commits need them\n"
            "  remedy: name a folder on another file system, or object storage"
        ) from error
    finally:
        temporary.unlink()
    return True


def _lock(descriptor: int, operation: int) -> bool:
    """Lock an open file; return False if another holds it, or if there are no locks here."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def is_abandoned(path: Path) -> bool:
    """Tell whether no live writer holds a partial file. False if it is gone, or may not be opened."""
    with _claimed(path) as claimed:
        return claimed


def remove_abandoned(path: Path) -> bool:
    """Remove a partial file if no live writer holds it; return whether.

    In one step: a writer that has just created it, and not locked it yet, notices and begins anew.

    Raises:
        ValueError: if the name is not that of a partial file.
    """
    if not path.name.endswith(PARTIAL):
        raise ValueError(f"{path} is not a partial file")
    with _claimed(path) as claimed:
        if claimed:
            path.unlink(missing_ok=True)
        return claimed


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
