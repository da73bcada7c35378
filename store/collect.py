"""Garbage of a store: what killed writers left behind. Nothing that is committed, or that anybody may be writing."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from store import locks
from store.activations import ActivationStore
from store.generation import RECORDS, Generation
from store.location import PARTIAL, Location, is_abandoned, remove_abandoned

_FOLDER = re.compile(r"[0-9a-f]{16}")
LOCAL_AGE, REMOTE_AGE = 3600.0, 86400.0  # seconds: the youngest that is taken, unless asked otherwise


@dataclass(frozen=True)
class Garbage:
    """One file that nothing refers to."""

    place: Location
    size: int  # bytes
    why: str
    generation: Generation | None = None  # of an uncommitted shard, with its block
    block: int = 0


def find_garbage(store: ActivationStore, min_age: float | None = None) -> list[Garbage]:
    """List what can go, without touching anything.

    - partial files whose writer is dead (on object storage there are none);
    - shards without a commit that nobody has claimed;
    - files of a capture that was killed while it was created, before its first block.

    Everything has to be older than `min_age` seconds (None: an hour locally, a day on object storage, where a live
    writer cannot be told from a dead one otherwise). Files that are none of resid's are never listed.
    """
    age = min_age if min_age is not None else LOCAL_AGE if store.location.is_local else REMOTE_AGE
    limit = time.time() - age
    files = {found.name: found for found in store.location.walk() if found.modified <= limit}
    found: list[Garbage] = []
    if store.location.is_local:
        for name, file in files.items():
            place = store.location / name
            if name.endswith(PARTIAL) and is_abandoned(place.path):
                found.append(Garbage(place, file.size, "partial file of a dead writer"))
    for model in store.models():
        prefix = f"{model.location.name}/"
        complete = {generation.id: generation for generation in model.generations()}
        for generation in complete.values():
            done = generation.committed()
            for component in generation.plan.components:
                pattern = re.compile(rf"{prefix}{generation.id}/{component}/c/(0|[1-9][0-9]*)(/0)+")
                for name, file in files.items():
                    match = pattern.fullmatch(name)
                    if match is not None and int(match[1]) not in done:
                        why = f"block {match[1]} of capture {generation.id} was not committed"
                        found.append(Garbage(store.location / name, file.size, why, generation, int(match[1])))
        found += _never_begun(store.location, prefix, set(complete), limit)
    return found


def _never_begun(root: Location, prefix: str, complete: set[str], limit: float) -> Iterator[Garbage]:
    """Yield the files of captures without generation.json, unless they hold commits, or are being created."""
    folders: dict[str, list[str]] = {}
    everything = {found.name: found for found in (root / prefix.rstrip("/")).walk()}
    for name in everything:
        head, _, rest = name.partition("/")
        owner = rest.partition("/")[0] if head == RECORDS else head
        if _FOLDER.fullmatch(owner) and owner not in complete and rest:
            folders.setdefault(owner, []).append(name)
    for owner, names in folders.items():
        committed = any(name.startswith(f"{RECORDS}/{owner}/commits/") for name in names)
        if committed or any(everything[name].modified > limit for name in names):
            continue
        for name in names:
            why = f"capture {owner} was killed before it began"
            yield Garbage(root / prefix.rstrip("/") / name, everything[name].size, why)


def remove_garbage(garbage: list[Garbage]) -> tuple[list[Garbage], list[Garbage]]:
    """Remove what `find_garbage` listed, looking once more at each; return what was removed and what was left."""
    removed: list[Garbage] = []
    left: list[Garbage] = []
    for item in garbage:
        (removed if _remove(item) else left).append(item)
    return removed, left


def _remove(item: Garbage) -> bool:
    if item.place.is_local and item.place.name.endswith(PARTIAL):
        return remove_abandoned(item.place.path)
    if item.generation is None:
        item.place.remove()
        return True
    if not item.place.is_local:
        if item.block in item.generation.committed():
            return False
        item.place.remove()
        return True
    # The lock that a writer holds from before it looks for the shard until after its commit.
    with locks.exclusive(item.generation.records, str(item.block), wait=False) as free:
        if not free or item.block in item.generation.committed():
            return False
        item.place.remove()
        return True
