"""What a store holds, without reading any activation: models, captures, and how complete each prompt set is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from store.activations import ActivationStore, ModelStore
from store.generation import Generation


@dataclass(frozen=True)
class Capture:
    """One generation."""

    id: str
    components: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    dtype: str
    compression: str
    rows: int
    committed_rows: int
    blocks: int
    committed_blocks: int
    nbytes: int  # of committed shards


@dataclass(frozen=True)
class HeldSet:
    """A prompt set of a study, and of how many of its rows there is what."""

    study: str
    prompt_set: str
    responses: str | None  # the condition that generated them
    rows: int
    held: dict[str, int]  # "resid_post at prompt_end" -> rows


@dataclass(frozen=True)
class Model:
    """All that a store holds of one model."""

    source: str
    fingerprint: str
    dtype: str
    n_layers: int | None
    d_model: int
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


def _held_sets(store: ModelStore, generations: list[Generation]) -> Iterator[HeldSet]:
    studies = store.memberships.studies()
    if not studies:
        return
    held: dict[str, set[str]] = {}
    for generation in generations:
        plan = generation.plan
        done = [block for block in generation.committed() if block < plan.n_blocks]
        keys = {key for start, stop in map(plan.block_range, done) for key in generation.keys[start:stop]}
        for component in plan.components:
            for position in plan.positions:
                held.setdefault(f"{component} at {position}", set()).update(keys)
    for study in studies:
        sets: dict[tuple[str, str | None], set[str]] = {}
        for record in store.memberships.table(study).select(["prompt_set", "responses", "row_key"]).to_pylist():
            rows = sets.setdefault((record["prompt_set"], record["responses"]), set())
            if record["row_key"]:
                rows.add(record["row_key"])
        for (name, responses), rows in sets.items():
            counts = {what: len(rows & keys) for what, keys in held.items() if rows & keys}
            yield HeldSet(study, name, responses, len(rows), counts)
