"""Tokens with known activations: what a capture is to hold at every token, whichever position asks for it.

Unlike those of `store_worker`, an activation here belongs to a token: `prompt_end` and the ``token:<index>`` of the
same token have one value, as in a model. Values have few significant bits, so every storage dtype holds them exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from store_worker import D_MODEL, MODEL, truth

from store.activations import BlockRef, CaptureRequest, ModelStore
from store.generation import Generation
from store.layout import Compression, GenerationPlan, ragged_blocks
from store.rows import Row
from store.sites import ALL_TOKENS, Spans

SINGLE = ("prompt_end", "response_start", "token:0", "token:1", "token:-1", "token:-2")  # positions of one token


def text(i: int, prompt: int, response: int = 0) -> Row:
    """Return row number i of so many tokens."""
    return Row(MODEL, f"text-{i}", (i, *range(20, 19 + prompt + response)), Spans(prompt, prompt + response))


@cache
def cell(row: Row, component: str, layer: int, position: str) -> npt.NDArray[np.float32]:
    """Return the activation at a position, [d_model]."""
    start, stop = row.spans.token_range(position)
    tokens = [truth(row, component, layer, f"token:{token}", D_MODEL) for token in range(start, stop)]
    value = np.mean(tokens, axis=0).astype(ml_dtypes.bfloat16).astype(np.float32)
    value[np.abs(value) < 1e-3] = 0
    return value


def values_of(rows: Sequence[Row], component: str, layers: Iterable[int], position: str) -> npt.NDArray[np.float32]:
    """Return what a selection of rows must give, [row or token, layer, d_model]."""
    at = [
        (row, f"token:{token}" if position == ALL_TOKENS else position)
        for row in rows
        for token in (range(row.spans.response_end) if position == ALL_TOKENS else [0])
    ]
    layers = list(layers)
    return np.array([[cell(row, component, layer, where) for layer in layers] for row, where in at])


def block_values(rows: Sequence[Row], plan: GenerationPlan) -> dict[str, npt.NDArray[np.float32]]:
    """Return what a block of these rows holds, in the shape that `Generation.write_block` takes."""
    if plan.ragged:
        return {name: values_of(rows, name, plan.layers, ALL_TOKENS) for name in plan.components}
    return {
        name: np.stack([values_of(rows, name, plan.layers, position) for position in plan.positions], axis=2)
        for name in plan.components
    }


def write(model: ModelStore, block: BlockRef) -> bool:
    generation = Generation(model.location / block.generation)
    start, stop = generation.plan.block_range(block.block)
    return generation.write_block(block.block, block_values(generation.rows[start:stop], generation.plan))


def capture(
    model: ModelStore, *requests: CaptureRequest, block_rows: int | None = None, compression: Compression = "none"
) -> tuple[BlockRef, ...]:
    """Write what requests lack, as a worker does; return the blocks written."""
    _, blocks = model.assign(requests, block_rows, compression)
    for block in blocks:
        assert write(model, block)
    return blocks


def add_generation(model: ModelStore, rows: Sequence[Row], left_out: Iterable[int] = (), **fields: Any) -> Generation:
    """Add a capture of these rows in this order, whatever else the store holds, but for some blocks.

    Args:
        fields: of its `GenerationPlan`: components, layers, positions, dtype, block_rows, compression.
    """
    if fields["positions"] == (ALL_TOKENS,):
        lengths = [row.spans.response_end for row in rows]
        fields |= ragged_blocks(lengths, fields.get("block_rows"), D_MODEL, fields["dtype"])
    plan = GenerationPlan(model=MODEL, d_model=D_MODEL, n_rows=len(rows), **fields)
    generation = Generation.create(model.location, plan, rows)
    for block in set(range(plan.n_blocks)) - set(left_out):
        start, stop = plan.block_range(block)
        generation.write_block(block, block_values(rows[start:stop], plan))
    return generation
