"""Directions: a vector per layer with everything that says where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from store.errors import MissingDataError, ResidError, UndefinedError
from store.layers import spell_ranges
from store.schemas import TABLES
from store.sites import Component


@dataclass(frozen=True)
class Direction:
    """A named direction of one model at every layer where it was computed.

    A layer at which it does not exist is not among `layers`; provenance names it under "undefined", with the cause.

    Its sign is that of "positive minus negative". Vectors keep their raw norm; unit vectors are derived on demand.
    """

    name: str
    key: str  # fingerprint of what it was computed from: method, inputs, seeds, model
    model: str
    method: str
    component: Component
    position: str
    layers: tuple[int, ...]
    vectors: npt.NDArray[np.float32]  # [layer, d_model]
    n_positive: int = 0
    n_negative: int = 0
    split_half_cosine: tuple[float, ...] | None = None  # per layer: cosine of the directions of two random halves
    provenance: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.layers):
            raise ValueError(
                f"{self.name}: vectors [layer, d_model] for {len(self.layers)} layers, got {self.vectors.shape}"
            )
        finite: npt.NDArray[np.bool_] = np.all(np.isfinite(self.vectors), axis=1)
        for i, layer in enumerate(self.layers):
            if not finite[i]:
                raise ResidError(f"direction {self.name!r} is not finite at {self.component}.{layer}")
            if not self.vectors[i].any():
                raise ResidError(
                    f"direction {self.name!r} is zero at {self.component}.{layer}\n"
                    "  remedy: its two sides are the same there; check the prompt sets, or what it is orthogonal to"
                )

    @cached_property
    def norms(self) -> npt.NDArray[np.float64]:
        """Euclidean norm per layer, [layer]."""
        norms: npt.NDArray[np.float64] = np.linalg.norm(self.vectors.astype(np.float64), axis=1)
        return norms

    @property
    def undefined(self) -> dict[int, str]:
        """Layer -> why the direction does not exist there, and a remedy, as a message."""
        return {int(layer): str(why) for layer, why in (self.provenance or {}).get("undefined", {}).items()}

    def at(self, layer: int) -> npt.NDArray[np.float64]:
        """Return the vector of one layer, [d_model], raw norm.

        Raises:
            MissingDataError: if the direction was not computed there.
            UndefinedError: if it does not exist there.
        """
        if layer in self.undefined:
            raise UndefinedError(self.undefined[layer])
        if layer not in self.layers:
            raise MissingDataError(
                f"direction {self.name!r} has no layer {layer}, only {spell_ranges(self.layers)}\n"
                "  remedy: capture that layer, or choose one of these"
            )
        vector: npt.NDArray[np.float64] = self.vectors[self.layers.index(layer)].astype(np.float64)
        return vector

    def unit(self, layer: int) -> npt.NDArray[np.float64]:
        """Return the unit vector of one layer, [d_model]."""
        vector = self.at(layer)
        unit: npt.NDArray[np.float64] = vector / np.linalg.norm(vector)
        return unit

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the layers and the vectors' bytes."""
        head = json.dumps(self.layers).encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.vectors, dtype="<f4").tobytes()).hexdigest()

    def to_table(self, study: str) -> pa.Table:
        """Return one row per layer, in the schema of the `directions` table."""
        provenance = json.dumps({**(self.provenance or {}), "digest": self.digest}, sort_keys=True)
        records = [
            {
                "study": study,
                "direction": self.name,
                "direction_key": self.key,
                "model": self.model,
                "method": self.method,
                "component": self.component,
                "layer": layer,
                "position": self.position,
                "vector": self.vectors[i].tolist(),
                "norm": float(self.norms[i]),
                "n_positive": self.n_positive,
                "n_negative": self.n_negative,
                "split_half_cosine": None if self.split_half_cosine is None else self.split_half_cosine[i],
                "provenance": provenance,
            }
            for i, layer in enumerate(self.layers)
        ]
        return pa.Table.from_pylist(records, schema=TABLES["directions"])


def undefined_record(undefined: Mapping[int, str]) -> dict[str, Any]:
    """Return what provenance says of layers at which a direction does not exist; nothing where there are none."""
    return {"undefined": {str(layer): why for layer, why in sorted(undefined.items())}} if undefined else {}


def require_layers(layers: Sequence[int], undefined: Mapping[int, str]) -> None:
    """Check that a direction exists at one layer at least.

    Raises:
        UndefinedError: otherwise, with the first layer's cause.
    """
    if not layers and undefined:
        raise UndefinedError(undefined[min(undefined)])


def directions_from_table(table: pa.Table) -> dict[str, Direction]:
    """Return the directions in a `directions` table (of one study), by name."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for record in table.to_pylist():
        grouped.setdefault(record["direction"], []).append(record)
    return {name: _direction(sorted(records, key=lambda r: int(r["layer"]))) for name, records in grouped.items()}


def _direction(records: list[dict[str, Any]]) -> Direction:
    first = records[0]
    cosines = tuple(record["split_half_cosine"] for record in records)
    direction = Direction(
        name=first["direction"],
        key=first["direction_key"],
        model=first["model"],
        method=first["method"],
        component=first["component"],
        position=first["position"],
        layers=tuple(record["layer"] for record in records),
        vectors=np.array([record["vector"] for record in records], dtype=np.float32),
        n_positive=first["n_positive"],
        n_negative=first["n_negative"],
        split_half_cosine=None if None in cosines else cosines,
        provenance=json.loads(first["provenance"]),
    )
    expected = (direction.provenance or {}).get("digest")
    if expected != direction.digest:
        raise ResidError(
            f"direction {direction.name!r}: its vectors do not match their digest; run resid directions again"
        )
    return direction
