"""What result tables hold that nothing shows: files without a record, and committed blocks that no study asks for.

Files that no record names (replaced parts, files of killed writers) can go once they are old enough: a writer names its
file within moments, and a reader that began before a part was replaced may still need the old one. What no study asks
for any more (*superseded*) is whole and correct, and reverting an edit of the study would show it again: it goes only
on request, and by whole blocks. A block that holds one row in use stays.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from store.collect import LOCAL_AGE, REMOTE_AGE
from store.location import Found, Location, is_abandoned, remove_abandoned
from store.results import COMMITS, CURRENT, Commit, ResultStore
from store.schemas import TABLES

Kind = Literal["partial", "leftover", "superseded"]
ASKED = ("model", "row_key", "condition_key", "decoding_key", "seed")  # what a study asks a text by
_PARTIAL = re.compile(r"(?:.*/)?[^/]+\.[0-9a-f]{12}\.partial")
_FILE = re.compile(r"(?P<name>.+)-[0-9a-f]{16}\.parquet")


@dataclass(frozen=True)
class Unused:
    """One file of the results that nothing shows."""

    place: Location
    size: int  # bytes
    kind: Kind
    why: str
    commit: Commit | None = None  # of superseded blocks
    table: str = ""


def find_unused(results: ResultStore, min_age: float | None = None) -> list[Unused]:
    """List what nothing shows, without touching anything.

    Args:
        min_age: files (of replaced parts also what replaced them) have to be older, seconds; None: an hour locally, a
            day on object storage. Superseded blocks have any age.

    Raises:
        DamageError: if a record or a table that says what studies ask for cannot be read.
    """
    root = results.location
    age = min_age if min_age is not None else LOCAL_AGE if root.is_local else REMOTE_AGE
    limit = time.time() - age
    # All files first: a file that is seen here and has no record afterwards had none when it was seen.
    files = {found.name: found for found in root.walk()}
    unused = [*_unnamed(results, files, limit)]
    for table, commits in _superseded(results):
        for commit in commits:
            why = f"{commit.rows:,} rows of {table} that no study here asks for"
            unused.append(Unused(root / table / commit.file, commit.size, "superseded", why, commit, table))
    return unused


def _unnamed(results: ResultStore, files: Mapping[str, Found], limit: float) -> Iterator[Unused]:
    """Yield partial files of dead writers, and Parquet files that no record names."""
    root = results.location
    named = {table: {commit.file for commit in results.commits(table)} for table in TABLES}
    for name, found in files.items():
        table, _, file = name.partition("/")
        if found.modified > limit:
            continue
        if _PARTIAL.fullmatch(name):
            if not root.is_local or is_abandoned((root / name).path):
                yield Unused(root / name, found.size, "partial", "partial file of a dead writer")
        elif (match := _FILE.fullmatch(file)) and table in TABLES and "/" not in file and file not in named[table]:
            pointer = files.get(f"{table}/{CURRENT}/{match['name']}.json")
            if pointer is None:
                yield Unused(root / name, found.size, "leftover", "it was not committed", table=table)
            elif pointer.modified <= limit:
                yield Unused(root / name, found.size, "leftover", "it was replaced", table=table)


def _superseded(results: ResultStore) -> Iterator[tuple[str, list[Commit]]]:
    """Yield the committed blocks of each table of which no row is asked for by any study that has results here."""
    texts = _asked_texts(results)
    directions = set(results.read("directions", columns=["direction_key"]).column(0).to_pylist())
    analyses = set(results.read("analyses", columns=["block_key"]).column(0).to_pylist())
    for table, schema in TABLES.items():
        # Blocks name what they are of by one of these; tables by study are replaced whole.
        if "study" in schema.names and table != "generations":
            continue
        for column, asked in (("generation_key", texts), ("block_key", analyses), ("direction_key", directions)):
            if column in schema.names:
                yield table, list(_without(results, table, column, asked))
                break


def _asked_texts(results: ResultStore) -> set[str]:
    """Return the keys of the texts that studies ask for, or have captured."""
    wanted = set(_tuples(results.read("replay_rows", columns=list(ASKED))))
    texts = results.read("generations", columns=["generation_key", *ASKED])
    keys = texts.column("generation_key").to_pylist()
    asked = {key for key, by in zip(keys, _tuples(texts.select(list(ASKED))), strict=True) if by in wanted}
    captured = results.read("rows", columns=["generation_key"]).column(0).to_pylist()
    return asked | {key for key in captured if key is not None}


def _tuples(table: pa.Table) -> Iterable[tuple[object, ...]]:
    return zip(*(table.column(name).to_pylist() for name in ASKED), strict=True)


def _without(results: ResultStore, table: str, column: str, asked: set[str]) -> Iterator[Commit]:
    """Yield the blocks that have rows, and none with one of these values in a column."""
    wanted = pa.array(sorted(asked), pa.string())
    for commit, rows in results.read_blocks(table, [column]):
        if commit.rows and not pc.any(pc.is_in(rows.column(0), value_set=wanted)).as_py():
            yield commit


def _record(results: ResultStore, table: str, name: str) -> Commit | None:
    """Return a block's commit as it is now; None if it is gone.

    Raises:
        DamageError: if it cannot be read.
    """
    record = results.location / table / COMMITS / f"{name}.json"
    try:
        return Commit.from_json(record.read_bytes(), str(record))
    except FileNotFoundError:
        return None


def remove_unused(results: ResultStore, unused: Iterable[Unused]) -> tuple[list[Unused], list[Unused]]:
    """Remove what `find_unused` listed, looking once more at each; return what was removed and what was left.

    Raises:
        ResourceError: if a file cannot be removed.
    """
    removed: list[Unused] = []
    left: list[Unused] = []
    for item in unused:
        (removed if _remove(results, item) else left).append(item)
    return removed, left


def _remove(results: ResultStore, item: Unused) -> bool:
    if item.kind == "partial":
        if item.place.is_local:
            return remove_abandoned(item.place.path)
        item.place.remove()
        return True
    if item.commit is not None:
        if _record(results, item.table, item.commit.name) != item.commit:
            return False
        # The record first: no reader is ever promised a file that is gone.
        (results.location / item.table / COMMITS / f"{item.commit.name}.json").remove()
        item.place.remove()
        return True
    try:
        content = item.place.read_bytes()
    except FileNotFoundError:
        return True
    if _is_named(results, item):
        return False
    item.place.remove()
    if _is_named(results, item):  # a writer that made the same file committed it in this moment
        item.place.create(content)
        return False
    return True


def _is_named(results: ResultStore, item: Unused) -> bool:
    return item.place.name in {commit.file for commit in results.commits(item.table)}
