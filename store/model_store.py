"""What the store holds of one model, and what captures of it still have to do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from store import locks
from store.errors import DamageError
from store.finding import CAPTURE, IMPORT, holds, select
from store.fingerprint import short
from store.generation import RECORDS, Generation
from store.layout import Compression, GenerationPlan, default_block_rows, ragged_blocks
from store.location import Location
from store.memberships import Memberships
from store.needs import Box, CaptureRequest, merge_requests
from store.rows import Row
from store.selection import Selection
from store.sites import ALL_TOKENS


@dataclass(frozen=True)
class BlockRef:
    """One block of one generation: the unit of work of a capture."""

    generation: str
    block: int
    n_rows: int

    @property
    def id(self) -> str:
        return f"{self.generation}/{self.block}"


@dataclass(frozen=True)
class CaptureWork:
    """What a set of requests still needs: new generations to create, and blocks that wait in existing ones."""

    new: tuple[tuple[GenerationPlan, tuple[Row, ...]], ...]
    pending: tuple[BlockRef, ...]
    pending_bytes: int
    cached_rows: int
    requested_rows: int

    @property
    def rows_to_capture(self) -> int:
        return sum(len(rows) for _, rows in self.new) + sum(block.n_rows for block in self.pending)

    @property
    def bytes_to_write(self) -> int:
        return sum(plan.entry_bytes * _entries(plan, rows) for plan, rows in self.new) + self.pending_bytes


def _entries(plan: GenerationPlan, rows: Sequence[Row]) -> int:
    return sum(row.spans.response_end for row in rows) if plan.ragged else len(rows)


class ModelStore:
    """The part of the store that belongs to one model fingerprint."""

    def __init__(self, location: Location, manifest: dict[str, Any] | None = None):
        self.location = location
        if manifest is not None:
            self.manifest = manifest

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Model reference, sizes, dtype, versions: what the first capture of this model wrote.

        Raises:
            DamageError: if model.json cannot be read.
        """
        return read_json(self.location / "model.json", ("fingerprint", "dtype", "d_model"))

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    def generations(self) -> list[Generation]:
        """Return the complete generations, oldest name first (a fixed order)."""
        records = self.location / RECORDS
        names = [name for name in records.list() if (records / name / "generation.json").exists()]
        return [Generation(self.location / name) for name in names]

    @property
    def memberships(self) -> Memberships:
        """Which rows the prompt sets of the studies over this model are."""
        try:
            imported = self.imported
        except (DamageError, FileNotFoundError):  # who reads the manifest is told
            imported = False
        return Memberships(self.location, imported)

    @property
    def imported(self) -> bool:
        """Whether its activations come from files that others published, and none can be captured."""
        return bool(self.manifest.get("imported", False))

    def remedy(self, asks: str, study_file: str | None = None) -> str:
        """Return the command that would bring what is missing.

        Args:
            asks: what is missing, as in "resid_post.14 at prompt_end".
            study_file: the study to capture; None if it is not known.
        """
        if self.imported:
            name = shlex.quote(str(self.manifest.get("ref", {}).get("source", "<name>")))
            return f"{IMPORT.format(model=name)} (its file has to hold {asks})"
        command = CAPTURE if study_file is None else CAPTURE.replace("<study>", shlex.quote(study_file))
        return f"{command} (its `capture` has to ask for {asks})"

    def _exact(self, dtype: str) -> bool:
        """Tell whether a storage dtype holds what this model computes without loss."""
        return dtype in ("float32", self.manifest["dtype"])

    def assign(
        self,
        requests: Sequence[CaptureRequest],
        block_rows: int | None = None,
        compression: Compression = "none",
    ) -> tuple[CaptureWork, tuple[BlockRef, ...]]:
        """Return what is lacking and the blocks to capture, new captures created: `work` and `create` in one step.

        Captures that start at the same time do this one after the other, so that no row is given to two of them.

        Raises:
            ResourceError: if the store cannot be written.
        """
        with locks.exclusive(self.location / RECORDS, "planning"):
            work = self.work(requests, block_rows, compression)
            return work, self.create(work)

    def work(
        self,
        requests: Sequence[CaptureRequest],
        block_rows: int | None = None,
        compression: Compression = "none",
    ) -> CaptureWork:
        """Compare requests with what the store holds; nothing is written.

        Rows already assigned to a generation stay with it, so a killed capture finishes its own blocks. A row that
        lacks some components, layers or positions gets just these in a new generation. What is stored without loss
        serves every request; what is stored with loss serves requests for that dtype.
        """
        needs = merge_requests(requests, self._exact)
        generations = [(generation, generation.committed()) for generation in self.generations()]
        pending: dict[str, BlockRef] = {}
        pending_bytes = 0
        new: dict[Box, dict[str, Row]] = {}
        waiting: set[str] = set()
        for need in needs:
            held = []
            for generation, done in generations:
                at = generation.index.get(need.row.key)
                if at is not None and (generation.plan.dtype == need.dtype or self._exact(generation.plan.dtype)):
                    block = int(generation.plan.blocks_of(np.array([at]))[0])
                    held.append((block not in done, generation, block))
            # What is committed counts first: a block that waits is needed only for the rest.
            for waits, generation, block in sorted(held, key=lambda item: item[0]):
                plan = generation.plan
                if not need.take(plan.components, plan.layers, plan.positions) or not waits:
                    continue
                waiting.add(need.row.key)
                start, stop = plan.block_range(block)
                ref = BlockRef(generation.id, block, stop - start)
                if ref.id not in pending:
                    pending[ref.id] = ref
                    pending_bytes += plan.entry_bytes * _entries(plan, generation.rows[start:stop])
            for box in need.boxes():
                waiting.add(need.row.key)
                new.setdefault(box, {})[need.row.key] = need.row
        plans = tuple(self._plan(box, rows.values(), block_rows, compression) for box, rows in new.items())
        requested = {need.row.key for need in needs}
        return CaptureWork(plans, tuple(pending.values()), pending_bytes, len(requested) - len(waiting), len(requested))

    def _plan(
        self, box: Box, rows: Iterable[Row], block_rows: int | None, compression: Compression
    ) -> tuple[GenerationPlan, tuple[Row, ...]]:
        components, layers, positions, dtype = box
        d_model = int(self.manifest["d_model"])
        # Rows of like length share a block, hence a batch with little padding; the key makes the order total.
        ordered = tuple(sorted(rows, key=lambda row: (len(row.token_ids), row.key)))
        blocks: dict[str, Any] = {
            "block_rows": block_rows or default_block_rows(len(ordered), len(positions), d_model, dtype)
        }
        if positions == (ALL_TOKENS,):
            blocks = ragged_blocks([row.spans.response_end for row in ordered], block_rows, d_model, dtype)
        plan = GenerationPlan(
            model=self.fingerprint,
            d_model=d_model,
            components=components,
            layers=layers,
            positions=positions,
            dtype=dtype,
            n_rows=len(ordered),
            compression=compression,
            **blocks,
        )
        return plan, ordered

    def create(self, work: CaptureWork) -> tuple[BlockRef, ...]:
        """Create the new captures of `work`; return every block that is to be captured, ours first.

        Blocks that wait in older captures come last: whoever began them may be making them now.
        """
        blocks = []
        for plan, rows in work.new:
            generation = Generation.create(self.location, plan, rows)
            done = generation.committed()
            for block in range(plan.n_blocks):
                if block not in done:
                    start, stop = plan.block_range(block)
                    blocks.append(BlockRef(generation.id, block, stop - start))
        return (*blocks, *work.pending)

    def select(
        self,
        row_keys: Iterable[str],
        component: str,
        position: str,
        layers: Sequence[int] | None = None,
        remedy: str | None = None,
    ) -> Selection:
        """Find committed activations by row key.

        Args:
            layers: absolute layers wanted; None: those that every one of the rows has.
            remedy: the command that would bring what is missing, for the message; None for one made of the others.

        Raises:
            MissingDataError: if a row is not captured at that component, position and layers.
            MismatchError: if a row or layer is asked for twice.
            DamageError: if a generation's metadata is damaged.
        """
        if remedy is None:
            at = "" if layers is None else f", layers: {list(layers)}"
            remedy = self.remedy(f"components: [{component}], positions: [{position}]{at}")
        return select(self.holders(component, position), tuple(row_keys), component, position, layers, remedy)

    def holders(self, component: str, position: str) -> list[Generation]:
        """Return the captures that hold a component at a position, those first that serve where captures overlap."""
        found = [generation for generation in self.generations() if holds(generation, component, position)]
        # One without loss, then a layout without unwanted tokens, then the first in the fixed order of names.
        found.sort(key=lambda each: (not self._exact(each.plan.dtype), each.plan.ragged, each.id))
        return found

    def committed_rows(self, component: str, position: str, layers: Sequence[int] | None = None) -> tuple[str, ...]:
        """Return every row that has a component at a position, each once, in stored order.

        Args:
            layers: only rows that have all of these; None: rows that have any.
        """
        wanted = frozenset(() if layers is None else layers)
        held: dict[str, frozenset[int]] = {}  # row key -> which of the layers wanted
        for generation in self.holders(component, position):
            plan = generation.plan
            here = wanted.intersection(plan.layers)
            if wanted and not here:
                continue
            for block in sorted(generation.committed()):
                if block >= plan.n_blocks:
                    continue
                at = np.arange(*plan.block_range(block))
                if plan.ragged and position != ALL_TOKENS:
                    at = at[generation.row_table.first_tokens(position, at) >= 0]
                for i in at:
                    key = generation.keys[i]
                    held[key] = held[key] | here if key in held else here
        return tuple(key for key, its in held.items() if its == wanted)

    def verify(self, *, repair: bool = False, deep: bool = True) -> list[str]:
        """Compare every committed byte with its checksum; return a line per damaged block or generation.

        Without `deep`, shards are compared with their commits by size, index and last checksum only.

        With `repair`, damaged blocks are un-committed, so that the next capture makes just these again. A generation
        with damaged metadata is taken out of the store; the next capture makes that anew and keeps the blocks.
        """
        damaged = []
        try:
            if not self.fingerprint.startswith(self.location.name):
                raise DamageError(f"{self.location}/model.json: it is of model {short(self.fingerprint)}")
        except DamageError as error:
            damaged.append(str(error))
            if repair:
                (self.location / "model.json").remove()
        for study in self.memberships.studies():
            try:
                self.memberships.table(study)
            except DamageError as error:
                damaged.append(str(error))
                if repair:
                    self.memberships.forget(study)
        for generation in self.generations():
            try:
                generation.verify_metadata()
            except DamageError as error:
                damaged.append(f"{generation.id}: {error}")
                if repair:
                    generation.retire()
                continue
            for block in sorted(generation.committed()):
                try:
                    generation.verify_block(block, deep)
                except DamageError as error:
                    damaged.append(f"{generation.id} block {block}: {error}")
                    if repair:
                        generation.uncommit(block)
        return damaged


def read_json(where: Location, keys: Sequence[str]) -> dict[str, Any]:
    """Read a JSON object that has to have some keys.

    Raises:
        DamageError: if it is none.
    """
    try:
        record = json.loads(where.read_bytes())
        if not isinstance(record, dict) or not set(keys) <= set(record):
            raise ValueError(f"it lacks {', '.join(keys)}")
    except ValueError as error:
        raise DamageError(
            f"{where}: this file is damaged, or not of a resid store ({error})\n"
            "  remedy: choose another folder; or if it is a store, remove this file: the next capture writes it again"
        ) from None
    return record
