"""What a store holds, without reading any activation: models, captures, and how complete each prompt set is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from store.activations import ActivationStore, ModelStore
from store.generation import Generation
from store.layers import spell_ranges


@dataclass(frozen=True)
class Capture:
    """One generation."""

    id: str
    components: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    dtype: str
    compression: str
    rows: int  # planned
    committed_rows: int
    blocks: int  # planned; those that are not committed wait for the next capture
    committed_blocks: int
    nbytes: int  # of committed shards


@dataclass(frozen=True)
class HeldSet:
    """A prompt set of a study, and of how many of its rows there is what."""

    study: str
    prompt_set: str
    responses: str | None  # the condition that generated them
    rows: int
    # "resid_post at prompt_end" -> rows that have it at all layers of the model; of rows that have it at some only:
    # "resid_post at prompt_end, layers 0-14"
    held: dict[str, int]


@dataclass(frozen=True)
class Model:
    """All that a store holds of one model."""

    source: str
    fingerprint: str
    dtype: str
    n_layers: int | None
    d_model: int
    imported: bool  # from a file, instead of captured
    captures: tuple[Capture, ...]
    prompt_sets: tuple[HeldSet, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return asdict(self)


def inventory(store: ActivationStore) -> list[Model]:
    """List a store.

    Raises:
        DamageError: if metadata cannot be read.
    """
    return [_model(model) for model in store.models()]


def _model(store: ModelStore) -> Model:
    manifest = store.manifest
    generations = store.generations()
    return Model(
        source=str(manifest.get("ref", {}).get("source", "unknown")),
        fingerprint=store.fingerprint,
        dtype=str(manifest["dtype"]),
        n_layers=manifest.get("n_layers"),
        d_model=int(manifest["d_model"]),
        imported=bool(manifest.get("imported", False)),
        captures=tuple(_capture(generation) for generation in generations),
        prompt_sets=tuple(_held_sets(store, generations)),
    )


def _capture(generation: Generation) -> Capture:
    plan = generation.plan
    done = sorted(block for block in generation.committed() if block < plan.n_blocks)
    rows = sum(stop - start for start, stop in map(plan.block_range, done))
    if plan.compression == "none":
        nbytes = len(done) * len(plan.components) * plan.shard_shape.shard_bytes
    else:
        nbytes = sum(shard.size for block in done for shard in generation.commit_record(block).shards.values())
    return Capture(
        id=generation.id,
        components=plan.components,
        layers=plan.layers,
        positions=plan.positions,
        dtype=plan.dtype,
        compression=plan.compression,
        rows=plan.n_rows,
        committed_rows=rows,
        blocks=plan.n_blocks,
        committed_blocks=len(done),
        nbytes=nbytes,
    )


class _Holdings:
    """Which layers the committed rows of a model have, by component and position: numbers instead of keys and sets."""

    def __init__(self, generations: list[Generation]):
        self._number: dict[str, int] = {}  # row key -> index
        self._layers: list[frozenset[int]] = [frozenset()]  # what rows have; 0: nothing
        self._held: dict[tuple[str, str], npt.NDArray[np.int64]] = {}  # -> index into `_layers`, [row]
        for generation in generations:
            for key in generation.keys:
                self._number.setdefault(key, len(self._number))
        for generation in generations:
            plan = generation.plan
            done = sorted(block for block in generation.committed() if block < plan.n_blocks)
            keys = [key for block in done for key in generation.keys[slice(*plan.block_range(block))]]
            for component in plan.components:
                for position in plan.positions:
                    self._add((component, position), self.numbers(keys), frozenset(plan.layers))

    def numbers(self, keys: Iterable[str]) -> npt.NDArray[np.int64]:
        """Return the indices of rows; those that no capture has are left out."""
        return np.array([self._number[key] for key in keys if key in self._number], dtype=np.int64)

    def _add(self, what: tuple[str, str], rows: npt.NDArray[np.int64], layers: frozenset[int]) -> None:
        held = self._held.setdefault(what, np.zeros(len(self._number), dtype=np.int64))
        before = held[rows]
        for index in np.unique(before):
            both = self._layers[index] | layers
            if both not in self._layers:
                self._layers.append(both)
            held[rows[before == index]] = self._layers.index(both)

    def count(self, rows: npt.NDArray[np.int64], n_layers: int | None) -> dict[str, int]:
        """Return how many of the rows have what, as `HeldSet.held`."""
        counts: dict[str, int] = {}
        for (component, position), held in self._held.items():
            indices, numbers = np.unique(held[rows], return_counts=True)
            for index, number in sorted(zip(indices.tolist(), numbers.tolist(), strict=True), key=lambda x: -x[1]):
                layers = self._layers[index]
                if layers:
                    every = n_layers is not None and layers >= set(range(n_layers))
                    which = "" if every else f", layers {spell_ranges(layers)}"
                    counts[f"{component} at {position}{which}"] = number
        return counts


def _held_sets(store: ModelStore, generations: list[Generation]) -> Iterator[HeldSet]:
    studies = store.memberships.studies()
    if not studies:
        return
    holdings = _Holdings(generations)
    for study in studies:
        sets: dict[tuple[str, str | None], dict[str, None]] = {}
        table = store.memberships.table(study)
        columns = [table[name].to_pylist() for name in ("prompt_set", "responses", "row_key")]
        for name, responses, key in zip(*columns, strict=True):
            rows = sets.setdefault((name, responses), {})
            if key:  # an empty one stands for a response without tokens
                rows[key] = None
        for (name, responses), rows in sets.items():
            counts = holdings.count(holdings.numbers(rows), store.manifest.get("n_layers"))
            yield HeldSet(study, name, responses, len(rows), counts)
