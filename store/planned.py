"""A model's store as it will be once a planned capture is done, for asking where rows will lie. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from store.fingerprint import short
from store.generation import Generation, GenerationPlan, identity_of
from store.model_store import CaptureWork, ModelStore
from store.rows import Row, RowTable, row_table_from_bytes, rows_to_bytes


class PlannedStore(ModelStore):
    """A model's store after `work`: what is pending is committed, and what is new is there.

    Selections say which rows lie in which block; their values cannot be read.
    """

    def __init__(self, store: ModelStore, work: CaptureWork):
        super().__init__(store.location, store.manifest)
        pending: dict[str, set[int]] = {}
        for ref in work.pending:
            pending.setdefault(ref.generation, set()).add(ref.block)
        existing: list[Generation] = [_Finished(one, pending.get(one.id, set())) for one in store.generations()]
        planned: list[Generation] = [_Planned(store, plan, rows) for plan, rows in work.new]
        names = {one.id for one in planned}
        every = [*planned, *(one for one in existing if one.id not in names)]
        self._generations = sorted(every, key=lambda one: one.id)

    def generations(self) -> list[Generation]:
        return list(self._generations)


class _Finished(Generation):
    """A capture with the blocks committed that are pending now."""

    def __init__(self, generation: Generation, pending: set[int]):
        super().__init__(generation.location)
        self._pending = pending

    def committed(self) -> set[int]:
        return super().committed() | self._pending


class _Planned(Generation):
    """A capture that does not exist yet, all blocks committed."""

    def __init__(self, store: ModelStore, plan: GenerationPlan, rows: Sequence[Row]):
        super().__init__(store.location / short(identity_of(plan, [row.key for row in rows])))
        self._plan, self._rows = plan, rows

    @property
    def plan(self) -> GenerationPlan:
        return self._plan

    @cached_property
    def row_table(self) -> RowTable:
        return row_table_from_bytes(rows_to_bytes(self._rows))

    def committed(self) -> set[int]:
        return set(range(self._plan.n_blocks))
