"""A store with known content: which activation every cell is to hold, and what a capture worker does with it."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from store.activations import ActivationStore, BlockRef, CaptureRequest, ModelStore
from store.dtypes import NUMPY_DTYPES
from store.generation import Generation
from store.layout import Compression, GenerationPlan
from store.location import PARTIAL
from store.rows import Row
from store.sites import ALL_TOKENS, COMPONENTS, Component, Spans

MODEL = "5e" * 32
LAYERS = 6
D_MODEL = 16


def make_row(i: int, model: str = MODEL) -> Row:
    """Return row number i: three prompt tokens and two response tokens."""
    return Row(model, f"prompt-{i}", (7, i, 8, 9, 10), Spans(3, 5))


def make_rows(n: int) -> tuple[Row, ...]:
    return tuple(make_row(i) for i in range(n))


def make_text(i: int) -> Row:
    """Return row number i of the ragged ones: two to eight tokens, of which at least one is prompt."""
    length = 2 + (5 * i) % 7
    return Row(MODEL, f"text-{i}", (*range(20, 19 + length), i), Spans(1 + i % length, length))


def make_texts(n: int) -> tuple[Row, ...]:
    return tuple(make_text(i) for i in range(n))


def truth(row: Row, component: str, layer: int, position: str, d_model: int = D_MODEL) -> npt.NDArray[np.float32]:
    """Return the activation that a cell is to hold, [d_model]; every cell has its own."""
    seed = (int(row.key[:12], 16), COMPONENTS.index(component), layer, zlib.crc32(position.encode()))
    return np.random.default_rng(seed).standard_normal(d_model).astype(np.float32)


def activations(rows: Sequence[Row], plan: GenerationPlan, noise: float = 0.0) -> dict[str, npt.NDArray[np.float32]]:
    """Return what a block of these rows holds, in the shape that `Generation.write_block` takes.

    Args:
        noise: how far another machine's sums are off, relative to each value.
    """
    if plan.ragged:
        entries = [(row, (f"token:{token}",)) for row in rows for token in range(row.spans.response_end)]
    else:
        entries = [(row, plan.positions) for row in rows]

    def values(component: str) -> npt.NDArray[np.float32]:
        cells = [
            [[truth(row, component, layer, position, plan.d_model) for position in at] for layer in plan.layers]
            for row, at in entries
        ]
        return np.array(cells).reshape(len(entries), len(plan.layers), *plan.inner) * np.float32(1 + noise)

    return {component: values(component) for component in plan.components}


def new_store(url: str, dtype: str = "float32", d_model: int = D_MODEL) -> ModelStore:
    """Open or make a store with the one model of these tests."""
    manifest = {"fingerprint": MODEL, "dtype": dtype, "n_layers": LAYERS, "d_model": d_model}
    return ActivationStore.open(url).add_model(manifest)


def request(
    rows: Iterable[Row],
    components: Sequence[Component] = ("resid_post",),
    layers: Iterable[int] = range(LAYERS),
    positions: Sequence[str] = ("prompt_end",),
    dtype: Any = "float32",
) -> CaptureRequest:
    return CaptureRequest(tuple(rows), tuple(components), tuple(layers), tuple(positions), dtype)


def write(model: ModelStore, block: BlockRef, noise: float = 0.0, **provenance: str) -> bool:
    """Do what a capture worker does, without a model."""
    generation = Generation(model.location / block.generation)
    start, stop = generation.plan.block_range(block.block)
    values = activations(generation.rows[start:stop], generation.plan, noise)
    return generation.write_block(block.block, values, provenance)


def capture(
    model: ModelStore,
    *requests: CaptureRequest,
    block_rows: int | None = None,
    compression: Compression = "none",
) -> tuple[BlockRef, ...]:
    """Write what requests lack; return the blocks written."""
    blocks = model.create(model.work(requests, block_rows, compression))
    for block in blocks:
        assert write(model, block)
    return blocks


def expected(
    rows: Sequence[Row], component: str, layers: Iterable[int], position: str, dtype: str, d_model: int = D_MODEL
) -> npt.NDArray[np.float32]:
    """Return what a selection of rows must give, [row or token, layer, d_model]."""
    if position == ALL_TOKENS:
        entries = [(row, f"token:{token}") for row in rows for token in range(row.spans.response_end)]
    else:
        entries = [(row, position) for row in rows]
    cells = [[truth(row, component, layer, at, d_model) for layer in layers] for row, at in entries]
    return np.array(cells).astype(NUMPY_DTYPES[dtype]).astype(np.float32)


def files(store: Path, without: Collection[str] = ()) -> dict[str, bytes]:
    """Return what a store holds, without lock files and what a killed writer left behind."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and "locks" not in path.parts and not path.name.endswith(PARTIAL) and str(path) not in without
    }


def committed_files(model: ModelStore) -> dict[str, tuple[int, int]]:
    """Return inode and time of every file of a committed block."""
    found = {}
    for generation in model.generations():
        for block in generation.committed():
            places = [generation.shard(component, block).path for component in generation.plan.components]
            for path in (*places, generation.records.path / "commits" / f"{block}.json"):
                status = path.stat()
                found[str(path)] = (status.st_ino, status.st_mtime_ns)
    return found
