"""The state of each direction of a study: done, ready or waiting, and why. Nothing else decides which are current.

A direction is *done* if vectors are stored under the key that the study gives it now, under whatever name and by
whichever version of the study they were computed. Else it is *ready*, if it can be computed from what is there, or it
*waits*, for the stage that is named. It has *failed* if it was tried and exists at no layer, or if what it is computed
from has. Vectors that are stored under its name and another key belong to an older version
of the study: nothing uses them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from analysis.directions import derive, derived_key
from analysis.energy import EnergyRows, energy_matched, energy_matched_key
from jobs.direction_tasks import Task, compute_task, make_task, only, task_groups, task_rows
from jobs.failures import failed_keys
from store.directions import Direction, directions_from_table
from store.errors import MissingDataError, ResidError, UndefinedError
from store.fingerprint import canonical_json, fingerprint
from store.study_directions import RandomMatched, Reading, component_in, reads, references
from store.study_layers import direction_layers

if TYPE_CHECKING:
    from jobs.context import Context


@dataclass(frozen=True)
class DirectionState:
    """What is known of one direction now."""

    name: str
    status: Literal["done", "ready", "waits", "failed"]
    key: str | None = None  # None where what it is computed from is not there yet
    direction: Direction | None = None  # if it is done
    older: Direction | None = None  # stored under its name, and computed from something else
    stage: str | None = None  # the stage that has to run next for it; None if no stage can help
    why: str = ""  # why it is not done
    task: Task | None = None  # what computes it from rows

    @property
    def stale(self) -> bool:
        """Whether only an older self of it is stored."""
        return self.older is not None and self.status != "done"


class DirectionStates:
    """The states of a study's directions, each looked up when it is asked for and then remembered."""

    def __init__(self, context: Context):
        self.context = context
        self._states: dict[str, DirectionState] = {}
        self._asking: list[str] = []
        self._groups = {name: names for names in task_groups(context.study.directions) for name in names}
        self._tasks: dict[str, Task | MissingDataError] = {}
        self._predicted: dict[str, Direction | None] = {}
        self._exact: set[str] = set()  # those predicted that are no stand-ins

    @cached_property
    def stored(self) -> dict[str, Direction]:
        """Name -> what the table `directions` holds of this study and model, current or not."""
        context = self.context
        try:
            model = context.recalled_model().fingerprint
        except MissingDataError:
            return {}
        table = context.results.read("directions", filters=[("study", "=", context.study.name)])
        every = directions_from_table(table)
        return {name: direction for name, direction in every.items() if direction.model == model}

    @cached_property
    def _by_key(self) -> dict[str, Direction | None]:
        return {direction.key: direction for direction in self.stored.values()}

    def by_key(self, key: str) -> Direction | None:
        """Return the vectors that were ever computed under a key."""
        if key not in self._by_key:
            table = self.context.results.read_block("computed_directions", block_of(key))
            every = {} if table is None else directions_from_table(table)
            self._by_key[key] = next((one for one in every.values() if one.key == key), None)
        return self._by_key[key]

    def of(self, name: str) -> DirectionState:
        """Return the state of one direction of the study."""
        if name not in self._states:
            if name in self._asking:
                return DirectionState(name, "waits", why=f"it depends on itself: {' -> '.join([*self._asking, name])}")
            self._asking.append(name)
            try:
                state = self._look_up(name)
            finally:
                self._asking.pop()
            before = self.stored.get(name)
            if before is not None and (state.direction is None or before.key != state.direction.key):
                state = replace(state, older=before)
            if state.stale:
                state = replace(state, why="; ".join(filter(None, [state.why, self._changes(name, state)])))
            self._states[name] = state
        return self._states[name]

    def all(self) -> dict[str, DirectionState]:
        """Return the states of all directions of the study, by name, in its order."""
        return {name: self.of(name) for name in self.context.study.directions}

    def current(self, names: Iterable[str] | None = None) -> dict[str, Direction]:
        """Return the directions (of those named) that are done, by name, in the study's order."""
        chosen = None if names is None else set(names)
        specs = self.context.study.directions
        states = [self.of(name) for name in specs if chosen is None or name in chosen]
        return {state.name: state.direction for state in states if state.direction is not None}

    @cached_property
    def _failed_keys(self) -> dict[str, str]:
        return failed_keys(self.context)

    def failed(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Return why directions (of those named) have failed, by name."""
        chosen = self.context.study.directions if names is None else names
        return {name: state.why for name in chosen if (state := self.of(name)).status == "failed"}

    def parents(self, name: str) -> set[str]:
        """Return the names of the directions that one is computed from."""
        return {other for _, other in references(self.context.study.directions[name])}

    def _look_up(self, name: str) -> DirectionState:
        spec = self.context.study.directions[name]
        if isinstance(spec, Reading):
            return self._reading(name)
        states = {other: self.of(other) for other in self.parents(name)}
        for other, state in states.items():
            if state.status == "failed":
                return DirectionState(name, "failed", why=failed_parent(name, other))
            if state.status != "done":
                return DirectionState(name, "waits", stage=state.stage, why=f"it is computed from {other!r}")
        parents = self.current(states)
        if not isinstance(spec, RandomMatched):
            return self._keyed(name, derived_key(spec, parents))
        try:
            rows = self.energy_rows(name)
        except MissingDataError as error:
            return self._waiting(name, error)
        assert spec.seed is not None
        parent = parents[spec.match_energy]
        return self._keyed(name, energy_matched_key(spec.seed, parent, rows))

    def energy_rows(self, name: str) -> EnergyRows:
        """Return the rows over which a matched random direction is drawn.

        Raises:
            MissingDataError: if one is not known yet.
        """
        spec = self.context.study.directions[name]
        assert isinstance(spec, RandomMatched)
        keys = tuple(self.context.row_texts(spec.prompts, spec.responses, spec.keep))
        return EnergyRows(str(self.context.store.location), keys, spec.position)

    def _keyed(self, name: str, key: str, task: Task | None = None) -> DirectionState:
        direction = self.by_key(key)
        if direction is not None:
            return DirectionState(name, "done", key, replace(direction, name=name), task=task)
        if key in self._failed_keys:
            return DirectionState(name, "failed", key, why=self._failed_keys[key], task=task)
        return DirectionState(name, "ready", key, stage="directions", why="it is not computed yet", task=task)

    def _waiting(self, name: str, error: MissingDataError) -> DirectionState:
        return DirectionState(name, "waits", stage=error.stage or "capture", why=str(error).splitlines()[0])

    def _reading(self, name: str) -> DirectionState:
        first = self._groups[name][0]
        if first not in self._tasks:
            try:
                self._tasks[first] = make_task(self.context, self._groups[name])
            except MissingDataError as error:
                self._tasks[first] = error
        task = self._tasks[first]
        if isinstance(task, MissingDataError):
            return self._waiting(name, task)
        state = self._keyed(name, task.keys[name], task)
        if state.status == "ready":
            try:
                model = self.context.store.model(task.model)
                model.select(task_rows(task), task.component, task.position, task.layers)
            except MissingDataError as error:
                return replace(self._waiting(name, error), key=state.key, task=task, stage="capture")
        return state

    # -- what changed ----------------------------------------------------------------------------------------------

    def made_from(self, name: str, directions: Mapping[str, Direction]) -> dict[str, str]:
        """Return what a direction is computed from, part by part, each as a fingerprint or a short text.

        It is kept with the direction, so that a later version of the study can say what changed.

        Args:
            name: the direction.
            directions: those that are current; its parents are looked up there.
        """
        context, spec = self.context, self.context.study.directions[name]
        plain = spec.model_dump(exclude_none=True)
        sets = dict(reads(spec))
        parents = [key for key, _ in references(spec)]
        parts = {key: canonical_json(value) for key, value in plain.items() if key not in (*sets, *parents)}
        for side, names in sets.items():
            try:
                ids = [prompt.id for one in names for prompt in context.prompt_set(one).prompts]
                parts[f"prompts of {side}"] = fingerprint(sorted(set(ids)))
            except MissingDataError:
                continue
        try:
            n_layers = context.recalled_model().n_layers
            parts["layers"] = canonical_json(sorted(direction_layers(context.study, name, n_layers)))
        except MissingDataError:
            pass
        for key, other in references(spec):
            if other in directions:
                parts[f"{key} {other}"] = directions[other].digest
        return parts

    def _changes(self, name: str, state: DirectionState) -> str:
        """Say which part of what a direction is computed from is not what it was."""
        assert state.older is not None
        before = (state.older.provenance or {}).get("made_from")
        if not isinstance(before, Mapping):
            return "what it is computed from has changed"
        now = self.made_from(name, self.current(self.parents(name)))
        changed = [key for key in now if key in before and before[key] != now[key]]
        changed += [key for key in [*now, *before] if (key in now) != (key in before) and " " not in key]
        what = ", ".join(dict.fromkeys(changed))
        return f"changed: {what}" if changed else "the rows that it is computed from changed"

    # -- for planning ----------------------------------------------------------------------------------------------

    def predicted(self, names: Iterable[str] | None = None) -> dict[str, Direction]:
        """Return directions as `current`, and those as well that are not done: computed, or else a stand-in.

        What can be computed from captured rows is, in memory: only its vectors tell which texts are there already. The
        vectors of a stand-in are drawn from the key that it will have: equal keys give equal vectors, and no stored
        direction has them. What is counted with them is therefore what there will be to do; nothing of it may be kept.
        Those that cannot be computed are left out.
        """
        specs = self.context.study.directions
        chosen = list(specs) if names is None else [name for name in specs if name in set(names)]
        for name in chosen:
            if name not in self._predicted:
                self._predicted[name] = self._stand_in(name)
        every = {name: self._predicted[name] for name in chosen}
        return {name: direction for name, direction in every.items() if direction is not None}

    def uncertain(self, name: str) -> bool:
        """Whether a direction that waits may turn out to be one that is stored already: its key is not known yet."""
        state, spec = self.of(name), self.context.study.directions[name]
        if state.status in ("done", "failed"):
            return False
        parents = [self.of(other) for other in self.parents(name)]
        if any(self.uncertain(parent.name) for parent in parents):
            return True
        if any(parent.status != "done" for parent in parents):  # new parents make a new direction
            return False
        return isinstance(spec, Reading | RandomMatched) and state.key is None and self._any_stored

    @cached_property
    def _any_stored(self) -> bool:
        return bool(self.stored) or bool(self.context.results.committed("computed_directions"))

    def matched(self, name: str, spec: RandomMatched, parent: Direction) -> Direction:
        """Return a matched random direction, from what was ever computed or computed now; see `energy_matched`."""
        assert spec.seed is not None
        rows = self.energy_rows(name)
        stored = self.by_key(energy_matched_key(spec.seed, parent, rows))
        return replace(stored or energy_matched(name, spec.seed, parent, rows), name=name)

    def _stand_in(self, name: str) -> Direction | None:
        context, spec, state = self.context, self.context.study.directions[name], self.of(name)
        if state.direction is not None:
            self._exact.add(name)
            return state.direction
        parents = self.predicted(self.parents(name))
        if state.status == "failed" or not self.parents(name) <= set(parents):
            return None
        exact = set(parents) <= self._exact
        if not isinstance(spec, Reading | RandomMatched):
            self._exact |= {name} if exact else set()
            try:
                return derive(name, spec, parents)
            except UndefinedError:
                return None
        try:
            if isinstance(spec, RandomMatched) and exact:
                self._exact.add(name)
                return self.matched(name, spec, parents[spec.match_energy])
            if state.status == "ready" and state.task is not None:
                self._exact.add(name)
                return compute_task(only(state.task, [name]))[name]
        except UndefinedError:
            return None
        except ResidError:  # its rows are not captured yet; or it cannot be computed, which the stage will say
            self._exact.discard(name)
        identity = context.recalled_model()
        layers = tuple(sorted(direction_layers(context.study, name, identity.n_layers)))
        plain = spec.model_dump(exclude={key for key, _ in references(spec)})
        digests = [parents[other].digest for _, other in references(spec)]
        key = state.key or fingerprint({"pending": plain, "parents": digests, "layers": layers})
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
        vectors = np.random.default_rng(seed).standard_normal((len(layers), identity.d_model)).astype(np.float32)
        return Direction(
            name=name,
            key=key,
            model=identity.fingerprint,
            method=spec.method,
            component=component_in(context.study.directions, name),
            position=spec.position,
            layers=layers,
            vectors=vectors,
        )


def failed_parent(name: str, parent: str) -> str:
    """Say why a direction fails whose parent has failed."""
    return f"direction {name!r} is computed from {parent!r}, which cannot be computed"


def block_of(key: str) -> str:
    """Name the block of `computed_directions` that holds the vectors with a key."""
    return key[:32]
