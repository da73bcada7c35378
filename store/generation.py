"""One capture generation: a Zarr group of fixed rows, written block by block and committed block by block.

Arrays have the dimensions row, layer, position, d_model, or token, layer, d_model (`store.layout`). A shard is one
block of rows with all layers, an inner chunk one block of one layer; every chunk and the shard index carry a crc32c. A
block is there when its commit record is: readers look at nothing else. See `store.activations` for the store that
generations make up.

The group holds nothing but Zarr, so that any Zarr library opens it; what resid knows of it lies beside it::

    <model>/<generation>/                 zarr.json, row/, layer/, position/, resid_post/c/<block>/0/0/0, ...
    <model>/_records/<generation>/        generation.json, rows.parquet, commits/<block>.json, locks/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from store.dtypes import to_storage
from store.errors import DamageError, MismatchError
from store.faults import faults
from store.files import make_folder
from store.fingerprint import fingerprint, short
from store.layout import GenerationPlan as GenerationPlan  # the plan is part of this module's interface
from store.layout import metadata_files, token_offsets
from store.location import Location
from store.readers import Guarded, OpenShard, Reader, check_tail, reader_for, shard_location
from store.records import Commit, Record, sha256
from store.rows import Row, RowTable, row_table_from_bytes, rows_from_bytes, rows_to_bytes
from store.shards import Shard, ShardError, describe
from store.writing import put_block, require_finite

FORMAT_VERSION = 2  # 2: commits keep the checksum of every chunk
RECORDS = "_records"
ROWS = "rows.parquet"
_COMMIT_NAME = re.compile(r"(0|[1-9][0-9]*)\.json")


class Generation:
    """A generation on disk. Cheap to make; metadata is read, and checked, when needed."""

    def __init__(self, location: Location):
        self.location = location  # the Zarr group
        self.records = Location(location.url.rpartition("/")[0]) / RECORDS / location.name
        self._commits: dict[int, Commit] = {}
        self._claimed: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Open files and row tables stay here: whoever receives a generation reads them again.
        return {"location": self.location}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["location"])  # type: ignore[misc]

    @property
    def id(self) -> str:
        return self.location.name

    # -- creation ----------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, parent: Location, plan: GenerationPlan, rows: Sequence[Row]) -> Generation:
        """Write a generation's metadata and rows. The same plan and rows give the same one, so a repeat does nothing.

        Raises:
            MismatchError: if a row belongs to another model, or occurs twice.
            ValueError: if a row lacks one of the plan's positions, or their number differs from the plan's.
        """
        if len(rows) != plan.n_rows:
            raise ValueError(f"the plan is for {plan.n_rows} rows, got {len(rows)}")
        for row in rows:
            if row.model != plan.model:
                raise MismatchError(f"row {short(row.key)} is of model {short(row.model)}, not {short(plan.model)}")
            for position in plan.positions:
                row.spans.token_range(position)
        keys = [row.key for row in rows]
        if len(set(keys)) < len(keys):
            raise MismatchError("a row occurs twice in one generation")
        identity = identity_of(plan, keys)
        generation = cls(parent / short(identity))
        marker = generation.records / "generation.json"
        if marker.exists():
            return generation
        # The same bytes from everybody, each file whole: others may be at it too, or may have been killed half-way.
        lengths = np.array([row.spans.response_end for row in rows])
        files = {**metadata_files(plan, keys, lengths, identity), ROWS: rows_to_bytes(rows)}
        for name, data in files.items():
            generation._file(name).write(data)
        checksums = {name: sha256(data) for name, data in files.items()}
        record = Record(format_version=FORMAT_VERSION, identity=identity, plan=plan, files=checksums)
        # Written last: a generation exists from here on.
        marker.create(record.model_dump_json(indent=1).encode())
        return generation

    def retire(self) -> None:
        """Forget a generation whose metadata is damaged. Creating it again writes that anew and finds its commits."""
        (self.records / "generation.json").remove()

    # -- metadata ----------------------------------------------------------------------------------------------

    def _damage(self, where: Location, what: str) -> DamageError:
        store = self.location.url.rsplit("/", 2)[0]
        return DamageError(f"{where}: {what}\n  remedy: resid verify --store {store} --repair, then capture again")

    @cached_property
    def _record(self) -> Record:
        where = self.records / "generation.json"
        try:
            data = json.loads(where.read_bytes())
            version = data["format_version"]
            if version != FORMAT_VERSION:
                raise format_mismatch(where, version)
            return Record.model_validate(data)
        except FileNotFoundError:
            raise self._damage(where, "this file is missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise self._damage(where, f"this file cannot be read ({error})") from None

    @property
    def plan(self) -> GenerationPlan:
        """The plan, from generation.json.

        Raises:
            MismatchError: if the format is newer than this code.
            DamageError: if the file is missing or cannot be read.
        """
        return self._record.plan

    def _file(self, name: str) -> Location:
        return (self.records if name == ROWS else self.location) / name

    def _checked(self, name: str) -> bytes:
        """Return the bytes of a metadata file, compared with the record."""
        where = self._file(name)
        try:
            data = where.read_bytes()
        except FileNotFoundError:
            raise self._damage(where, "this file is missing") from None
        if sha256(data) != self._record.files.get(name):
            raise self._damage(where, "this file is not as it was written")
        return data

    @cached_property
    def keys(self) -> list[str]:
        """The keys of all rows, in array order; committed or not.

        Raises:
            DamageError: if they, or the plan, are not those that this generation is named after.
        """
        return self.row_table.keys

    @cached_property
    def row_table(self) -> RowTable:
        """Keys and spans of all rows, in array order; errors as for `keys`."""
        table = row_table_from_bytes(self._checked(ROWS))
        if identity_of(self.plan, table.keys) != self._record.identity or short(self._record.identity) != self.id:
            raise self._damage(self.records / "generation.json", "its plan and rows are not those of its name")
        return table

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Which tokens of the array are each row's, [row, 2], half-open; all tokens only."""
        return token_offsets(self.plan, self.row_table.response_end)

    @cached_property
    def rows(self) -> list[Row]:
        """All rows, in array order; committed or not."""
        return rows_from_bytes(self._checked(ROWS))

    @cached_property
    def index(self) -> dict[str, int]:
        """Row key to array index."""
        return {key: i for i, key in enumerate(self.keys)}

    # -- commits -----------------------------------------------------------------------------------------------

    def _commit(self, block: int) -> Location:
        return self.records / "commits" / f"{block}.json"

    def committed(self) -> set[int]:
        """Return the committed blocks, as of now."""
        names = (self.records / "commits").list()
        return {int(match[1]) for name in names if (match := _COMMIT_NAME.fullmatch(name))}

    def commit_record(self, block: int) -> Commit:
        """Read a block's commit.

        Raises:
            FileNotFoundError: if the block is not committed.
            DamageError: if the record cannot be read, or is not of this block.
        """
        where = self._commit(block)
        data = where.read_bytes()
        try:
            commit = Commit.from_json(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damage(where, f"this commit record cannot be read ({error})") from None
        plan = self.plan
        found = (commit.generation, commit.model, commit.block, commit.start, commit.stop)
        chunks = {component: len(shard.chunks) for component, shard in commit.shards.items()}
        if (
            not 0 <= block < plan.n_blocks
            or found != (self.id, plan.model, block, *plan.block_range(block))
            or chunks != dict.fromkeys(plan.components, len(plan.layers))
        ):
            raise self._damage(where, "this commit record is of another block")
        return commit

    def uncommit(self, block: int) -> None:
        """Forget a block and remove its shards, so that the next capture makes it again."""
        self._commit(block).remove()
        self._commits.pop(block, None)
        for component in self.plan.components:
            self.shard(component, block).remove()

    def shard(self, component: str, block: int) -> Location:
        return shard_location(self.location, component, block, self.plan)

    # -- writing -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, block: int, patience: float = 60.0) -> Iterator[bool]:
        """Hold a block while it is made; yield whether it still has to be.

        Two captures that need the same block wait for each other here instead of computing it twice. It saves work
        and nothing depends on it: after `patience` seconds, and on object storage at once, both compute, and the first
        commit stays. The lock of a dead process is free. Garbage collection leaves alone what is claimed.
        """
        if block in self._claimed:
            yield not self._commit(block).exists()
            return
        self._claimed.add(block)
        with contextlib.ExitStack() as stack:
            stack.callback(self._claimed.discard, block)
            if self.location.is_local and not self._commit(block).exists():
                lock = self.records.path / "locks" / str(block)
                with faults(str(lock), "locking it"):
                    make_folder(lock.parent)
                    stream = stack.enter_context(lock.open("w"))
                deadline = time.monotonic() + patience
                while not _locked(stream) and time.monotonic() < deadline:
                    if self._commit(block).exists():
                        break
                    time.sleep(0.1)
            yield not self._commit(block).exists()

    def write_block(
        self, block: int, values: Mapping[str, npt.NDArray[Any]], provenance: Mapping[str, Any] | None = None
    ) -> bool:
        """Write and commit one block; return False if another writer had committed it before.

        Args:
            values: for every component of the plan, an array [row, layer, position, d_model] of the block's rows in
                order, in any float dtype that the storage dtype can hold; for all tokens [token, layer, d_model], the
                tokens of the rows one after the other.
            provenance: versions and receipts to keep in the commit record.

        Raises:
            NonFiniteError: if a row holds NaN or infinity, before anything is written.
            OverflowError: if a value does not fit the storage dtype.
            ValueError: if a component is missing or an array has another shape.
            ResourceError: if the disk is full, or the place cannot be written.
        """
        plan = self.plan
        start, stop = plan.block_range(block)
        entries = int(self.row_table.response_end[start:stop].sum()) if plan.ragged else stop - start
        shape = (entries, len(plan.layers), *plan.inner)
        if set(values) != set(plan.components):
            raise ValueError(f"block {block} needs {', '.join(plan.components)}, got {', '.join(values) or 'nothing'}")
        stored: dict[str, npt.NDArray[Any]] = {}
        for component, array in values.items():
            if array.shape != shape:
                raise ValueError(f"block {block} of {component} has the shape {shape}, got {array.shape}")
            require_finite(component, array, plan, lambda entry: self._described(block, entry))
            stored[component] = to_storage(array, plan.dtype)
        with self.claim(block) as wanted:
            if not wanted:
                return False
            places = {component: self.shard(component, block) for component in stored}

            def record(shards: Mapping[str, Shard]) -> bytes:
                return Commit(self.id, plan.model, block, start, stop, shards, dict(provenance or {})).to_json()

            return put_block(places, stored, plan, self._commit(block), record)

    def _described(self, block: int, entry: int) -> str:
        """Name the row of an entry (row or token) of a block."""
        start, stop = self.plan.block_range(block)
        if self.plan.ragged:
            entry = int(np.searchsorted(np.cumsum(self.row_table.response_end[start:stop]), entry, side="right"))
        row = self.rows[start + entry]
        return f"row {short(row.key)} (prompt {short(row.prompt_id)})"

    # -- reading -----------------------------------------------------------------------------------------------

    @cached_property
    def reader(self) -> Reader:
        """What reads this generation's shards; see `store.readers`."""
        for component in self.plan.components:
            self._checked(f"{component}/zarr.json")
        return reader_for(self.location, self.plan)

    @contextlib.contextmanager
    def open_block(self, component: str, block: int) -> Iterator[OpenShard]:
        """Open a committed shard; layers are positions in it.

        Raises:
            DamageError: if it is missing or, here or while it is read, not what was committed.
            FileNotFoundError: if the block is not committed.
        """
        if block not in self._commits:
            self._commits[block] = self.commit_record(block)
        expected = self._commits[block].shards[component]
        with contextlib.ExitStack() as stack:
            with self.damage_of(component, block):
                opened = stack.enter_context(self.reader.open(component, block, expected))
            yield Guarded(opened, lambda: self.damage_of(component, block))

    @contextlib.contextmanager
    def damage_of(self, component: str, block: int) -> Iterator[None]:
        """Turn what a reader says of a committed shard into an error that names it and the remedy."""
        try:
            yield
        except FileNotFoundError:
            problem = "this committed shard is missing"
        except ShardError as error:
            problem = str(error)
        except Exception:
            with faults(self.shard(component, block).url, "reading it"):  # a disk that fails is no damage
                raise
        else:
            return
        known = self._commits.pop(block, None)
        # Repaired and captured again since we read its commit?
        if known is not None and self._commit(block).exists() and self.commit_record(block) != known:
            problem = "this block was made again while it was read: read it once more"
        raise self._damage(self.shard(component, block), problem)

    # -- verification ------------------------------------------------------------------------------------------

    def verify_metadata(self) -> None:
        """Compare everything but shards with its checksums.

        Raises:
            DamageError: for the first file that differs.
        """
        for name in self._record.files:
            self._checked(name)
        assert self.keys

    def verify_block(self, block: int, deep: bool = True) -> None:
        """Compare a block with its commit: every byte, or without `deep` the size and end of its shards.

        Raises:
            DamageError: if a shard is missing or differs.
        """
        shape = self.plan.shard_shape
        for component, expected in self.commit_record(block).shards.items():
            shard = self.shard(component, block)
            with self.damage_of(component, block):
                if (size := shard.size()) != expected.size:
                    raise ShardError(f"its size is {size} bytes, and the commit says {expected.size}")
                check_tail(shard.tail(shape.index_bytes + 4), shape, expected)
                if deep and describe(shard.read_bytes(), shape) != expected:
                    raise ShardError("its bytes differ from the commit")


def format_mismatch(where: Location, version: object) -> MismatchError:
    """Return the error for a store of another format."""
    older = isinstance(version, int) and version < FORMAT_VERSION
    remedy = "capture into another --store" if older else "update resid"
    return MismatchError(
        f"{where} has store format {version}, and this resid reads {FORMAT_VERSION}\n  remedy: {remedy}"
    )


def _locked(stream: Any) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def identity_of(plan: GenerationPlan, row_keys: Sequence[str]) -> str:
    rows = sha256("\n".join(row_keys).encode())
    return fingerprint({"format": FORMAT_VERSION, "plan": plan.model_dump(), "rows": rows})
