"""Garbage of a store: what killed writers left behind. Nothing that is committed, or that anybody may be writing.

Who is alive shows in locks: a writer holds one on the file that it writes, on the block that it makes, and on a
model's planning while it begins a capture. Listing looks at these locks; removing takes them, and looks at the commits
once more while it holds them. Object storage has no such locks: there, age decides, and what is committed while it is
removed is put back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from store import locks
from store.activations import ActivationStore, ModelStore
from store.generation import RECORDS, Generation
from store.location import Found, Location, is_abandoned, remove_abandoned
from store.shards import ShardError, describe
from store.sites import COMPONENTS

LOCAL_AGE, REMOTE_AGE = 3600.0, 86400.0  # seconds: the youngest that is taken, unless asked otherwise
PROBE_AGE = 60.0  # seconds: nothing locks a probe, and its writer removes it at once

Kind = Literal["partial", "probe", "shard", "unbegun", "lock", "lease"]

# Names that resid gives; whatever is called otherwise is somebody else's.
_PARTIAL = re.compile(r"(?:.*/)?[^/]+\.[0-9a-f]{12}\.partial")
_PROBE = re.compile(r"(?:.*/)?\.probe-[0-9a-f]{32}\.partial")
_FOLDER = r"(?P<owner>[0-9a-f]{16})"
_COORDINATE = r"(?:row|layer|position|offsets)"
_GROUP_FILE = re.compile(
    rf"{_FOLDER}/(?:zarr\.json|(?:{_COORDINATE}|{'|'.join(COMPONENTS)})/zarr\.json"
    rf"|{_COORDINATE}/c(?:/0)+|(?:{'|'.join(COMPONENTS)})/c/[0-9]+(?:/0)+)"
)
_RECORD_FILE = re.compile(rf"{RECORDS}/{_FOLDER}/(?:rows\.parquet|locks/[0-9]+)")
_LOCK = re.compile(rf"{RECORDS}/{_FOLDER}/locks/(?P<block>0|[1-9][0-9]*)")
_LEASE = re.compile(rf"(?P<folder>{RECORDS}/locks/[^/]+)/(?P<number>[0-9]+)\.json")


@dataclass(frozen=True)
class Garbage:
    """One file that nothing refers to."""

    place: Location
    size: int  # bytes
    kind: Kind
    why: str
    generation: Generation | None = None  # of shards, locks, and captures that never began
    block: int = 0  # of shards and locks


def find_garbage(store: ActivationStore, min_age: float | None = None) -> list[Garbage]:
    """List what can go, without touching anything.

    - partial files whose writer is dead, and probes (`Location.require_writable`) that nobody removed;
    - shards without a commit whose block nobody has claimed;
    - files of a capture that was killed while it was created, before its first block;
    - lock files of blocks that are committed, and leases that are over and not the last one of their name.

    Never: what is committed, also by a capture whose metadata was taken out for repair; files with names that resid
    does not give.

    Args:
        min_age: everything has to be older, seconds; None: an hour locally, a day on object storage, where nothing else
            tells a live writer from a dead one.

    Raises:
        DamageError: if a capture's metadata cannot be read.
    """
    root = store.location
    age = min_age if min_age is not None else LOCAL_AGE if root.is_local else REMOTE_AGE
    now = time.time()
    # All files first: a shard that is seen here and has no commit afterwards had none when it was seen.
    files = {found.name: found for found in root.walk()}
    old = {name: found for name, found in files.items() if found.modified <= now - age}
    garbage: list[Garbage] = []
    for name, found in old.items():
        place = root / name
        if _PROBE.fullmatch(name):
            if found.modified <= now - PROBE_AGE or not root.is_local:
                garbage.append(Garbage(place, found.size, "probe", "a writer that died while it tried the place"))
        elif _PARTIAL.fullmatch(name) and (not root.is_local or is_abandoned(place.path)):
            garbage.append(Garbage(place, found.size, "partial", "partial file of a dead writer"))
    for model in store.models():
        prefix = f"{model.location.name}/"
        mine = {name.removeprefix(prefix): found for name, found in files.items() if name.startswith(prefix)}
        garbage += _of_model(model, mine, now - age)
    return garbage


def _of_model(model: ModelStore, files: Mapping[str, Found], limit: float) -> Iterator[Garbage]:
    """Yield a model's garbage that is not partial files; `files` by name below the model."""
    complete = {generation.id: generation for generation in model.generations()}
    done = {generation.id: generation.committed() for generation in complete.values()}
    old = {name: found for name, found in files.items() if found.modified <= limit}
    for generation in complete.values():
        yield from _uncommitted(model, generation, done[generation.id], old)
    yield from _never_begun(model, set(complete), files, limit)
    highest: dict[str, int] = {}
    for name in files:
        if match := _LEASE.fullmatch(name):
            highest[match["folder"]] = max(int(match["number"]), highest.get(match["folder"], 0))
    for name, found in old.items():
        place = model.location / name
        if (match := _LOCK.fullmatch(name)) and int(match["block"]) in done.get(match["owner"], ()):
            if _is_free(place):
                owner, block = complete[match["owner"]], int(match["block"])
                yield Garbage(place, found.size, "lock", "lock of a committed block", owner, block)
        elif (match := _LEASE.fullmatch(name)) and int(match["number"]) < highest[match["folder"]]:
            yield Garbage(place, found.size, "lease", "a lease that is over")


def _uncommitted(
    model: ModelStore, generation: Generation, done: set[int], old: Mapping[str, Found]
) -> Iterator[Garbage]:
    prefix = f"{model.location}/"
    for block in range(generation.plan.n_blocks):
        if block in done:
            continue
        for component in generation.plan.components:
            place = generation.shard(component, block)
            found = old.get(place.url.removeprefix(prefix))
            if found is not None and _is_free(_lock(generation, block)):
                why = f"block {block} of capture {generation.id} was not committed"
                yield Garbage(place, found.size, "shard", why, generation, block)


def _never_begun(model: ModelStore, complete: set[str], files: Mapping[str, Found], limit: float) -> Iterator[Garbage]:
    """Yield the files of captures without generation.json, unless they hold commits, or are being created."""
    folders: dict[str, list[str]] = {}
    for name in files:
        match = _GROUP_FILE.fullmatch(name) or _RECORD_FILE.fullmatch(name)
        if match is not None and match["owner"] not in complete:
            folders.setdefault(match["owner"], []).append(name)
    for owner, names in folders.items():
        generation = Generation(model.location / owner)
        if any(files[name].modified > limit for name in names) or not _is_unbegun(generation):
            continue
        if not _is_free(model.location / RECORDS / "locks" / "planning"):
            continue
        for name in names:
            why = f"capture {owner} was killed before it began"
            yield Garbage(model.location / name, files[name].size, "unbegun", why, generation)


def _is_unbegun(generation: Generation) -> bool:
    """Tell whether a capture does not exist yet, has no commits from before, and nobody is at one of its blocks."""
    if generation.committed() or (generation.records / "generation.json").exists():
        return False
    folder = generation.records / "locks"
    return all(_is_free(folder / name) for name in folder.list())


def _lock(generation: Generation, block: int) -> Location:
    """Return where the lock of `Generation.claim` lies."""
    return generation.records / "locks" / str(block)


# -- removing --------------------------------------------------------------------------------------------------------


def remove_garbage(garbage: list[Garbage]) -> tuple[list[Garbage], list[Garbage]]:
    """Remove what `find_garbage` listed, looking once more at each; return what was removed and what was left.

    Raises:
        ResourceError: if a file cannot be removed.
    """
    removed: list[Garbage] = []
    left: list[Garbage] = []
    for item in garbage:
        (removed if _remove(item) else left).append(item)
    return removed, left


def _remove(item: Garbage) -> bool:
    place, generation = item.place, item.generation
    match item.kind:
        case "partial" | "probe" if place.is_local:
            return remove_abandoned(place.path)
        case "partial" | "probe" | "lease":
            place.remove()
            return True
        case "lock":
            assert generation is not None
            return _remove_lock(place.path, generation, item.block)
        case "shard":
            assert generation is not None
            with _held(generation, item.block) as held:
                return held and _remove_shard(place, generation, item.block)
        case "unbegun":
            assert generation is not None
            # What `ModelStore.assign` holds while it creates captures.
            model = Location(generation.location.url.rpartition("/")[0])
            with locks.exclusive(model / RECORDS, "planning", wait=False) as held:
                if not held or not _is_unbegun(generation):
                    return False
                place.remove()
                if place.is_local:
                    _remove_empty(place.path.parent, model.path)
                return True


def _remove_shard(place: Location, generation: Generation, block: int) -> bool:
    """Remove a shard without a commit. If it was committed in the same moment, by somebody who holds no lock that can
    be seen, it is put back: the writer may have looked at its shards (`Generation.write_block`) before it was gone.

    Of a torn shard that the writer replaced between our look and its removal we have no copy: the block is then
    un-committed, so that the next capture makes it again.
    """
    if block in generation.committed():
        return False
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        return False
    place.remove()
    if block not in generation.committed():
        return True
    try:
        whole = _is_committed(data, place, generation, block)
    except FileNotFoundError:
        return True  # the writer has missed its shard, taken its commit back and begins again
    if whole:
        place.create(data)
    elif not place.exists():
        generation.uncommit(block)
    return False


def _is_committed(data: bytes, place: Location, generation: Generation, block: int) -> bool:
    """Tell whether these bytes of a shard are those that its block's commit describes."""
    shards = generation.commit_record(block).shards
    wanted = next(shard for name, shard in shards.items() if generation.shard(name, block).url == place.url)
    try:
        return describe(data, generation.plan.shard_shape) == wanted
    except ShardError:
        return False


@contextlib.contextmanager
def _held(generation: Generation, block: int) -> Iterator[bool]:
    """Hold the lock that a writer holds from before it looks for a shard until after its commit."""
    if not generation.location.is_local:
        yield True
        return
    with locks.exclusive(generation.records, str(block), wait=False) as held:
        yield held


def _remove_lock(path: Path, generation: Generation, block: int) -> bool:
    """Remove the lock file of a committed block. Others stay: who waits for one that was removed holds nothing."""
    with _flocked(path) as held:
        if not held or block not in generation.committed():
            return False
        path.unlink(missing_ok=True)
        return True


def _is_free(lock: Location) -> bool:
    """Tell whether nobody holds a lock file; True where there is none, and on object storage, where age decides."""
    if not lock.is_local or not lock.exists():
        return True
    with _flocked(lock.path) as held:
        return held


@contextlib.contextmanager
def _flocked(path: Path) -> Iterator[bool]:
    """Hold an existing lock file, if nobody else does; yield whether. It is not made: looking leaves no traces."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # also: no locks on this file system, so that nobody can tell
            held = False
        yield held
    finally:
        os.close(descriptor)


def _remove_empty(folder: Path, above: Path) -> None:
    """Remove a folder, and those that hold it, as long as they are empty and below `above`."""
    with contextlib.suppress(OSError):
        while folder != above and above in folder.parents:
            folder.rmdir()
            folder = folder.parent
