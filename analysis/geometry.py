"""Geometry of directions: cosines of pairs, and projections of cached rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
import pyarrow as pa

from store.directions import Direction
from store.errors import MismatchError
from store.fingerprint import fingerprint
from store.schemas import TABLES
from store.selection import Part, Selection


def cosines_table(study: str, directions: Sequence[Direction]) -> pa.Table:
    """Return signed cosines of all ordered pairs of directions read at the same component, at every common layer.

    Raises:
        MismatchError: if directions are of different models.
    """
    if len({direction.model for direction in directions}) > 1:
        raise MismatchError("directions of different models have no cosine")
    records: list[dict[str, object]] = []
    for a, b in permutations(directions, 2):
        common = sorted(set(a.layers) & set(b.layers)) if a.component == b.component else []
        records.extend(
            {
                "study": study,
                "model": a.model,
                "component": a.component,
                "layer": layer,
                "direction_a": a.name,
                "direction_b": b.name,
                "direction_key_a": a.key,
                "direction_key_b": b.key,
                "position_a": a.position,
                "position_b": b.position,
                "cosine": float(np.clip(a.unit(layer) @ b.unit(layer), -1.0, 1.0)),
            }
            for layer in common
        )
    return pa.Table.from_pylist(records, schema=TABLES["cosines"])


def alignments_table(study: str, pairs: Sequence[tuple[Direction, Direction]]) -> pa.Table:
    """Return the signed cosine of the first of each pair at every layer with the second at every layer.

    The two may be read at different components or positions, and may be the same direction.

    Raises:
        MismatchError: if directions are of different models.
    """
    tables = [TABLES["alignments"].empty_table()]
    for a, b in pairs:
        if a.model != b.model:
            raise MismatchError("directions of different models have no cosine")
        first, second = (np.stack([item.unit(layer) for layer in item.layers]) for item in (a, b))
        cosines = np.clip(first @ second.T, -1.0, 1.0)
        n = cosines.size
        constant = {
            "study": study,
            "model": a.model,
            "direction_a": a.name,
            "direction_b": b.name,
            "direction_key_a": a.key,
            "direction_key_b": b.key,
            "component_a": a.component,
            "component_b": b.component,
        }
        columns = {key: pa.repeat(value, n) for key, value in constant.items()}
        columns["layer_a"] = pa.array(np.repeat(np.array(a.layers, dtype=np.int32), len(b.layers)))
        columns["layer_b"] = pa.array(np.tile(np.array(b.layers, dtype=np.int32), len(a.layers)))
        columns["cosine"] = pa.array(cosines.reshape(-1))
        tables.append(pa.table(columns).cast(TABLES["alignments"]))
    return pa.concat_tables(tables)


@dataclass(frozen=True)
class ProjectionBlock:
    """Projections of the rows of one store block on one direction."""

    selection: Selection
    part: Part
    direction: Direction

    @cached_property
    def id(self) -> str:
        """Identify the block by all that its table says: equal ids mean equal tables."""
        return fingerprint(
            {
                "direction": [self.direction.name, self.direction.key],
                "vectors": [self.direction.digest, self.direction.layers],
                "model": self.direction.model,
                "component": self.selection.component,
                "position": self.selection.position,
                "rows": sorted(self.selection.row_keys[i] for i in self.part.into),
                "layers": self.layers,
            }
        )[:32]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the part and the direction share."""
        return tuple(layer for layer in self.part.layers if layer in self.direction.layers)


def projection_blocks(selection: Selection, directions: Iterable[Direction]) -> list[ProjectionBlock]:
    """Return the blocks that make up the projections of a selection on directions, part by part.

    Raises:
        MismatchError: if a direction is of another component or size.
    """
    directions = list(directions)
    for direction in directions:
        read = (direction.component, direction.vectors.shape[1])
        if read != (selection.component, selection.d_model):
            raise MismatchError(
                f"direction {direction.name!r} is of {read[0]} with d_model {read[1]}, and the rows of "
                f"{selection.component} with {selection.d_model}"
            )
    blocks = [ProjectionBlock(selection, part, direction) for part in selection.parts for direction in directions]
    return [block for block in blocks if block.layers]


def projections(blocks: Sequence[ProjectionBlock]) -> Mapping[str, pa.Table]:
    """Project the rows of one part, read once, on several directions; return a table per block id.

    ``projection`` is h . v_hat, ``norm`` is ||h||, both in float64 from the stored values, at each layer that the part
    and the direction share.
    """
    first = blocks[0]
    selection, part = first.selection, first.part
    norms = np.empty((len(part.into), len(part.layers)))
    projected = {block.id: np.empty((len(part.into), len(block.layers))) for block in blocks}
    for (_, index), found in selection.chunks([part]):
        values, layer = found.astype(np.float64), part.layers[index]
        norms[:, index] = np.linalg.norm(values, axis=1)
        for block in blocks:
            if layer in block.layers:
                projected[block.id][:, block.layers.index(layer)] = values @ block.direction.unit(layer)
    keys = [selection.row_keys[i] for i in part.into]
    tables = {}
    for block in blocks:
        direction = block.direction
        layers = block.layers
        at = [part.layers.index(layer) for layer in layers]
        n_rows, n_layers = projected[block.id].shape
        total = n_rows * n_layers
        tables[block.id] = pa.table(
            {
                "model": pa.repeat(direction.model, total),
                "row_key": pa.array(np.repeat(np.array(keys, dtype=object), n_layers), pa.string()),
                "direction": pa.repeat(direction.name, total),
                "direction_key": pa.repeat(direction.key, total),
                "component": pa.repeat(direction.component, total),
                "layer": pa.array(np.tile(np.array(layers, dtype=np.int32), n_rows)),
                "position": pa.repeat(selection.position, total),
                "projection": pa.array(projected[block.id].reshape(-1)),
                "norm": pa.array(norms[:, at].reshape(-1)),
            }
        ).cast(TABLES["projections"])
    return tables
