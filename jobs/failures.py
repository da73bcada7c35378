"""What a study asks for and cannot have: single layers, directions, analyses, conditions. Each costs itself only.

A stage goes on without it, writes it to the table `failures`, names it, and ends with exit code 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from store.directions import Direction
from store.errors import DamageError, ResidError, ResourceError, StudyError
from store.schemas import TABLES

if TYPE_CHECKING:
    from jobs.context import Context

INCOMPLETE = 3  # exit code: everything was done but for what is listed
# These are about the study, the disk or the store as a whole, and stop the stage.
STOPPING = (StudyError, DamageError, ResourceError)


@dataclass(frozen=True)
class Failure:
    """One thing that cannot be computed. `layer` is None where it is the whole thing, at all layers."""

    kind: str  # direction, geometry, condition, monitor
    name: str
    layer: int | None
    cause: str
    remedy: str | None = None
    key: str | None = None  # of a direction: it is not tried again under the same key

    @classmethod
    def of(cls, kind: str, name: str, layer: int | None, message: object, key: str | None = None) -> Failure:
        """Split an error's message into cause and remedy."""
        cause, _, remedy = str(message).partition("\n  remedy: ")
        return cls(kind, name, layer, " ".join(cause.split()), " ".join(remedy.split()) or None, key)

    def __str__(self) -> str:
        at = "" if self.layer is None else f" at layer {self.layer}"
        remedy = f" (remedy: {self.remedy})" if self.remedy else ""
        return f"{self.kind} {self.name!r}{at}: {self.cause}{remedy}"


def undefined_of(directions: Mapping[str, Direction]) -> list[Failure]:
    """Return a failure for each layer at which a direction does not exist."""
    return [
        Failure.of("direction", name, layer, why)
        for name, direction in directions.items()
        for layer, why in direction.undefined.items()
    ]


def set_aside(error: ResidError) -> str:
    """Return the message of an error that costs one thing only.

    Raises:
        ResidError: the error itself, if it is about more than that.
    """
    if isinstance(error, STOPPING):
        raise error
    return str(error)


def write_failures(context: Context, stage: str, failures: list[Failure]) -> None:
    """Replace what a stage of this study could not compute."""
    if not failures and not _read(context, stage).num_rows:
        return
    records = [
        {
            "study": context.study.name,
            "model": context.recalled_model().fingerprint,
            "stage": stage,
            "kind": failure.kind,
            "name": failure.name,
            "layer": failure.layer,
            "cause": failure.cause,
            "remedy": failure.remedy,
            "key": failure.key,
        }
        for failure in failures
    ]
    table = pa.Table.from_pylist(records, schema=TABLES["failures"])
    context.results.replace("failures", f"{context.study.name}@{stage}", table)


def _read(context: Context, stage: str) -> pa.Table:
    return context.results.read("failures", filters=[("study", "=", context.study.name), ("stage", "=", stage)])


def failed_keys(context: Context) -> dict[str, str]:
    """Return why directions of the study could not be computed at any layer, by their keys."""
    return {
        row["key"]: row["cause"] + (f"\n  remedy: {row['remedy']}" if row["remedy"] else "")
        for row in _read(context, "directions").to_pylist()
        if row["key"] is not None
    }
