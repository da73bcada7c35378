"""How the shards of a block get to their place: whole or not at all, and the first complete one stays.

Two writers of one block compute the same rows, perhaps on machines whose sums differ in the last bits. Each shard and
each commit is created only where none is, so what is committed is always what is there; a shard that somebody else
put there first (a rival, or a writer that was killed before its commit) is adopted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from store.errors import NonFiniteError
from store.layout import GenerationPlan, decode_shard, encode_shard
from store.location import Location
from store.shards import Shard, ShardError, describe, shard_bytes, write_shard

# A vector of the shard that is there may differ from ours by this much of its largest value: far beyond what another
# machine's sums differ by, far below what another row differs by.
RIVAL_BOUND = 0.05

_EXPONENT = {np.dtype(np.uint16): {"float16": 0x7C00, "bfloat16": 0x7F80}, np.dtype(np.uint32): {"float32": 0x7F800000}}


def put_block(
    places: Mapping[str, Location],
    values: Mapping[str, npt.NDArray[Any]],
    plan: GenerationPlan,
    commit: Location,
    record: Callable[[Mapping[str, Shard]], bytes],
) -> bool:
    """Put a block's shards, then its commit; return False if another writer's commit was first.

    What a garbage collection took for left over, which it may where a claim cannot be seen, is put once more: whoever
    removes a shard looks at the commits afterwards (`store.collect`), whoever commits looks at the shards.

    Args:
        places: where each component's shard goes.
        values: of each component, [row or token, layer, *inner] in the plan's storage dtype.
        record: returns the content of the commit for what lies at the places.

    Raises:
        ResourceError: if a place cannot be written.
    """
    shards = {name: put_shard(place, values[name], plan) for name, place in places.items()}
    while commit.create(record(shards)):
        lost = [name for name, place in places.items() if not place.exists()]
        again = {name: put_shard(places[name], values[name], plan) for name in lost}
        if all(shards[name] == shard for name, shard in again.items()):
            return True
        # The one that was lost was a rival's, whose sums differ from ours in the last bits.
        commit.remove()
        shards |= again
    return False


def put_shard(target: Location, values: npt.NDArray[Any], plan: GenerationPlan) -> Shard:
    """Put a block's values at their place; return what lies there afterwards.

    Args:
        values: [row or token, layer, *inner] in the plan's storage dtype.

    Raises:
        ResourceError: if the place cannot be written.
    """
    shape = plan.shard_shape
    while True:
        if target.is_local and plan.compression == "none":
            with target.writing(first_wins=True) as stream:
                ours = write_shard(stream, values, shape)
            if stream.won:
                return ours
        else:
            data = _encoded(values, plan)
            if _create(target, data):
                return describe(data, shape)
        try:
            adopted = _adopted(target.read_bytes(), values, plan)
        except FileNotFoundError:
            continue  # a garbage collection has removed it in the moment between
        if adopted is not None:
            return adopted
        # Torn or foreign, and no commit speaks for it.
        data = _encoded(values, plan)
        target.write(bytes(data))
        return describe(data, shape)


def _create(target: Location, data: bytes | memoryview) -> bool:
    if not target.is_local:
        return target.create(bytes(data))
    with target.writing(first_wins=True) as stream:
        stream.write(data)
    return bool(stream.won)


def _encoded(values: npt.NDArray[Any], plan: GenerationPlan) -> bytes | memoryview:
    return shard_bytes(values, plan.shard_shape)[0] if plan.compression == "none" else encode_shard(values, plan)


def _adopted(data: bytes, values: npt.NDArray[Any], plan: GenerationPlan) -> Shard | None:
    """Return the description of a shard that somebody else wrote, if it holds what ours does."""
    if data == _encoded(values, plan):
        return describe(data, plan.shard_shape)
    try:
        there = describe(data, plan.shard_shape)
        for layer, theirs in enumerate(_chunks(data, plan)):
            if not _alike(theirs[: len(values)], values[:, layer]):
                return None
    except ShardError:
        return None
    return there


def _chunks(data: bytes, plan: GenerationPlan) -> list[npt.NDArray[Any]]:
    """Return the layers of a whole shard, each [row or token, *inner]."""
    shape = plan.shard_shape
    if plan.compression != "none":
        return list(np.moveaxis(decode_shard(data, plan), 1, 0))
    index = np.frombuffer(data, "<u8", offset=len(data) - shape.index_bytes, count=2 * shape.n_layers).reshape(-1, 2)
    if (index[:, 1] != shape.chunk_bytes + 4).any():
        raise ShardError("its chunks are of another size")
    count = shape.chunk_bytes // shape.dtype.itemsize
    return [np.frombuffer(data, shape.dtype, count, int(offset)).reshape(shape.chunk_shape) for offset, _ in index]


def _alike(theirs: npt.NDArray[Any], ours: npt.NDArray[Any]) -> bool:
    a, b = theirs.astype(np.float32), ours.astype(np.float32)
    largest = np.abs(b).max(axis=-1, initial=0.0)
    return bool((np.abs(a - b).max(axis=-1, initial=0.0) <= RIVAL_BOUND * largest).all())


def require_finite(component: str, values: npt.NDArray[Any], plan: GenerationPlan, describe_row: Any) -> None:
    """Refuse NaN and infinity, layer by layer, without a copy of the block.

    Args:
        values: [row or token, layer, *inner] of any float dtype.
        describe_row: names the row of an entry, for the message.

    Raises:
        NonFiniteError: with the first bad row and layer.
    """
    bad_entries: set[int] = set()
    first: tuple[int, int] | None = None
    for layer in range(values.shape[1]):
        finite = _finite_entries(values[:, layer])
        if not finite.all():
            found = np.flatnonzero(~finite)
            bad_entries.update(int(entry) for entry in found)
            first = min(first, (int(found[0]), layer)) if first is not None else (int(found[0]), layer)
    if first is None:
        return
    entry, layer = first
    rows = {describe_row(entry) for entry in bad_entries}
    raise NonFiniteError(
        f"{len(rows)} row(s) hold NaN or infinity, first {describe_row(entry)} at "
        f"{component}.{plan.layers[layer]}; its block is not committed\n"
        "  remedy: run the model in float32 or bfloat16, or drop the prompt"
    )


def _finite_entries(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which entries (first axis) are finite throughout."""
    axes = tuple(range(1, values.ndim))
    mask = _EXPONENT.get(np.dtype(f"u{values.dtype.itemsize}"), {}).get(values.dtype.name)
    if mask is None:
        finite: npt.NDArray[np.bool_] = np.isfinite(values).all(axis=axes)
        return finite
    # All exponent bits set: several times faster than isfinite on the 16-bit types. The largest exponent decides.
    exponents = values.view(f"u{values.dtype.itemsize}") & np.array(mask, dtype=f"u{values.dtype.itemsize}")
    found: npt.NDArray[np.bool_] = exponents.max(axis=axes, initial=0) != mask
    return found
