"""Result tables as committed Parquet files: what readers see is whole, and every byte of it can be checked.

Two ways in. *Blocks* are written once, by any number of workers: the file first, then a commit record that only one
writer can create. *Named tables* are small and replaced whole: the file first, then a pointer that moves atomically.
File names carry the hash of their bytes, so no writer ever changes a file that a record names::

    <table>/<block>-<sha16>.parquet      <table>/_commits/<block>.json      first writer wins
    <table>/<name>-<sha16>.parquet       <table>/_current/<name>.json       last writer wins
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from store.code_version import code_version
from store.errors import DamageError
from store.fingerprint import canonical, short
from store.location import Location
from store.schemas import TABLES, check_schema, schema_of

COMMITS, CURRENT = "_commits", "_current"
ROW_GROUP = 128 * 1024  # rows; about what DuckDB gives one thread
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@=+,-]{0,180}")

Filters = Any  # a pyarrow.compute.Expression, or the list form that pyarrow.parquet.read_table takes


@dataclass(frozen=True)
class Commit:
    """What a commit record or a pointer says about its file."""

    table: str
    name: str
    file: str
    rows: int
    size: int  # bytes
    sha256: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Commit:
        """Read a record.

        Raises:
            DamageError: if it is not one.
        """
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise DamageError(
                f"{where}: this commit record cannot be read ({error}); remove it and run the stage again"
            ) from error


@dataclass(frozen=True)
class Damage:
    """Something that `ResultStore.verify` found. A *leftover* is a file that no record names: harmless."""

    table: str
    file: str
    kind: Literal["missing", "changed", "record", "leftover"]
    detail: str

    @property
    def is_damage(self) -> bool:
        return self.kind != "leftover"


@dataclass(frozen=True)
class ResultStore:
    """The result tables under one location, on local disk or behind an fsspec URL."""

    location: Location

    def write_block(
        self, table: str, block_id: str, data: pa.Table, *, provenance: Mapping[str, object] | None = None
    ) -> bool:
        """Write and commit one block of a table; return whether this call's rows are the committed ones.

        A block that is committed already is left as it is and nothing is written.

        Raises:
            MismatchError: if ``data`` has not exactly the table's schema.
            ValueError: if the table is unknown or ``block_id`` cannot be a file name.
        """
        self._check(table, block_id, data)
        record = self.location / table / COMMITS / f"{block_id}.json"
        if record.exists():
            return False
        commit = self._write_file(table, block_id, data, provenance)
        record_bytes = commit.to_json()
        if record.create(record_bytes):
            return True
        winner = Commit.from_json(record.read_bytes(), str(record))
        if winner.file != commit.file:
            (self.location / table / commit.file).remove()
        return False

    def replace(self, table: str, name: str, data: pa.Table, *, provenance: Mapping[str, object] | None = None) -> None:
        """Make ``data`` the whole content of the table's part ``name`` (a study's name, say).

        A reader sees the old rows or the new ones, never both. The old file stays for readers that are using it,
        until `resid results gc` removes it.

        Raises:
            MismatchError: if ``data`` has not exactly the table's schema.
            ValueError: if the table is unknown or ``name`` cannot be a file name.
        """
        self._check(table, name, data)
        commit = self._write_file(table, name, data, provenance)
        (self.location / table / CURRENT / f"{name}.json").write(commit.to_json())

    def committed(self, table: str) -> set[str]:
        """Return the ids of the table's committed blocks (without parts written by `replace`)."""
        schema_of(table)
        names = (self.location / table / COMMITS).list()
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def commits(self, table: str) -> list[Commit]:
        """Return every commit record and pointer of a table, ordered by kind and name.

        Raises:
            DamageError: if one cannot be read.
        """
        return [Commit.from_json(data, where) for where, data in self._records(table)]

    def current(self, table: str, name: str) -> Commit | None:
        """Return what the pointer of a part written by `replace` says; None where nothing was written.

        Raises:
            DamageError: if it cannot be read.
        """
        schema_of(table)
        pointer = self.location / table / CURRENT / f"{name}.json"
        try:
            return Commit.from_json(pointer.read_bytes(), str(pointer))
        except FileNotFoundError:
            return None

    def read_block(self, table: str, block_id: str) -> pa.Table | None:
        """Return the rows of one block that `write_block` committed; None where there is no such block.

        Raises:
            DamageError: if its record or file is missing or damaged.
        """
        record = self.location / table / COMMITS / f"{block_id}.json"
        try:
            commit = Commit.from_json(record.read_bytes(), str(record))
        except FileNotFoundError:
            return None
        return self._read_file(table, self.location / table / commit.file, schema_of(table).names, None)

    def files(self, table: str) -> list[Location]:
        """Return the table's committed files."""
        return [self.location / table / commit.file for commit in self.commits(table)]

    def read(
        self, table: str, columns: Sequence[str] | None = None, filters: Filters = None, *, part: str | None = None
    ) -> pa.Table:
        """Read a table's committed rows, page checksums verified; no rows (with the schema) where nothing is committed.

        With `part`, only what `replace` (or a block) of that name holds. Duplicates are not collapsed here; the SQL
        views do that.

        Raises:
            DamageError: if a committed file is missing or damaged.
            MismatchError: if a file was written with another schema.
        """
        schema = schema_of(table)
        for name in columns or ():
            if name not in schema.names:
                raise ValueError(f"table {table} has no column {name!r}; it has {', '.join(schema.names)}")
        wanted = list(columns) if columns is not None else schema.names
        files = [self.location / table / commit.file for commit in self.commits(table) if part in (None, commit.name)]
        parts = [self._read_file(table, file, wanted, filters) for file in files]
        empty = pa.schema([schema.field(name) for name in wanted]).empty_table()
        return pa.concat_tables([empty, *parts])

    def read_blocks(self, table: str, columns: Sequence[str]) -> Iterator[tuple[Commit, pa.Table]]:
        """Yield each committed block of a table with some of its columns; parts written by `replace` are no blocks.

        Raises:
            DamageError: if a committed file is missing or damaged.
        """
        names = self.committed(table)
        for commit in self.commits(table):
            if commit.name in names:
                yield commit, self._read_file(table, self.location / table / commit.file, list(columns), None)

    def verify(self, deep: bool = True) -> list[Damage]:
        """Compare every committed file with its record: presence and size, and with ``deep`` its SHA-256."""
        return [finding for table in TABLES for finding in self._verify_table(table, deep)]

    def _check(self, table: str, name: str, data: pa.Table) -> None:
        schema_of(table)
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a block: letters, digits and _.@=+,- only, 181 at most")
        check_schema(table, data, f"{self.location}/{table}/{name}")

    def _write_file(self, table: str, name: str, data: pa.Table, provenance: Mapping[str, object] | None) -> Commit:
        sink = io.BytesIO()
        # DuckDB reads a flipped bit as a value; with page checksums pyarrow finds it.
        pq.write_table(
            data.cast(TABLES[table]), sink, compression="zstd", write_page_checksum=True, row_group_size=ROW_GROUP
        )
        content = sink.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        noted = canonical(provenance or {"versions": {"resid": code_version()}})
        assert isinstance(noted, dict)
        commit = Commit(table, name, f"{name}-{short(digest)}.parquet", data.num_rows, len(content), digest, noted)
        (self.location / table / commit.file).write(content)
        return commit

    def _records(self, table: str) -> list[tuple[str, bytes]]:
        schema_of(table)
        found = []
        for folder in (self.location / table / COMMITS, self.location / table / CURRENT):
            names = [name for name in folder.list() if name.endswith(".json")]
            found += [(str(folder / name), data) for name, data in folder.read_many(names).items()]
        return found

    def _read_file(self, table: str, file: Location, columns: list[str], filters: Filters) -> pa.Table:
        try:
            source = str(file.path) if file.is_local else io.BytesIO(file.read_bytes())
            with pq.ParquetFile(source) as opened:
                stored = opened.schema_arrow
            check_schema(table, stored.empty_table(), str(file), older=True)
            if not isinstance(source, str):
                source.seek(0)
            there = [name for name in columns if name in stored.names]
            data = pq.read_table(
                source, columns=there, filters=filters, partitioning=None, page_checksum_verification=True
            )
        except (OSError, pa.ArrowInvalid) as error:
            raise DamageError(
                f"{file}: this committed file cannot be read ({error}); `resid verify` lists all damage"
            ) from error
        for name in columns:  # a column that an earlier version did not write
            if name not in stored.names:
                field = schema_of(table).field(name)
                data = data.append_column(field, pa.nulls(len(data), field.type))
        return data.select(columns)

    def _verify_table(self, table: str, deep: bool) -> list[Damage]:
        folder = self.location / table
        found: list[Damage] = []
        known: set[str] = set()
        for where, content in self._records(table):
            try:
                commit = Commit.from_json(content, where)
            except DamageError as error:
                found.append(Damage(table, where.removeprefix(f"{folder}/"), "record", str(error)))
                continue
            known.add(commit.file)
            problem = _compare(folder / commit.file, commit, deep)
            if problem is not None:
                found.append(Damage(table, commit.file, *problem))
        unknown = [name for name in folder.list() if name.endswith(".parquet") and name not in known]
        return found + [Damage(table, name, "leftover", "no commit record names this file") for name in unknown]


def _compare(file: Location, commit: Commit, deep: bool) -> tuple[Literal["missing", "changed"], str] | None:
    try:
        size = file.size()
    except FileNotFoundError:
        return "missing", f"the record of {commit.name} names this file, which does not exist"
    if size != commit.size:
        return "changed", f"it has {size} bytes and its record says {commit.size}"
    if deep and hashlib.sha256(file.read_bytes()).hexdigest() != commit.sha256:
        return "changed", "its SHA-256 is not the recorded one"
    return None
