"""Finding committed activations: which capture serves which row at which layer."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from store.errors import MismatchError, MissingDataError
from store.fingerprint import short
from store.generation import Generation
from store.selection import Part, Selection, ranges
from store.sites import ALL_TOKENS

CAPTURE = "resid capture --study <study>"
IMPORT = "resid store import <file> --model {model} --convention <convention>"


def holds(generation: Generation, component: str, position: str) -> bool:
    """Tell whether a generation has a component at a position: all tokens hold every position that is one of them."""
    plan = generation.plan
    there = position in plan.positions or (plan.ragged and position != "response_avg")
    return component in plan.components and there


def select(
    holders: Sequence[Generation],
    keys: tuple[str, ...],
    component: str,
    position: str,
    layers: Sequence[int] | None,
    remedy: str = CAPTURE,
) -> Selection:
    """Find committed rows in generations that hold the component and position; the first that has a cell serves it.

    See `store.activations.ModelStore.select`.

    Args:
        remedy: the command that would capture what is missing.
    """
    if not keys:
        raise MissingDataError("no rows were asked for")
    if len(set(keys)) < len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise MismatchError(f"row {short(twice)} was asked for twice")
    held = sorted({layer for generation in holders for layer in generation.plan.layers})
    wanted = held if layers is None else [operator.index(layer) for layer in layers]
    if len(set(wanted)) < len(wanted):
        raise MismatchError(f"a layer was asked for twice: {wanted}")
    server = np.full((len(keys), len(wanted)), -1, dtype=np.int16)  # [row, layer] -> holder; small: rows are many
    indices = np.full((len(holders), len(keys)), -1, dtype=np.int64)  # [holder, row] -> index in its array
    for g, generation in enumerate(holders):
        plan, index = generation.plan, generation.index
        indices[g] = at = np.fromiter((index.get(key, -1) for key in keys), dtype=np.int64, count=len(keys))
        done = np.zeros(plan.n_blocks, dtype=bool)
        done[[block for block in generation.committed() if block < plan.n_blocks]] = True
        there = (at >= 0) & done[plan.blocks_of(at)]
        if plan.ragged and position != ALL_TOKENS:
            there[there] = generation.row_table.first_tokens(position, at[there]) >= 0
        has_layer = np.isin(wanted, plan.layers)
        server[np.outer(there, has_layer) & (server < 0)] = g
    if layers is None:
        lacking = np.flatnonzero(np.all(server < 0, axis=1))
        everywhere = np.flatnonzero(np.all(server >= 0, axis=0))
        wanted, server = [wanted[i] for i in everywhere], server[:, everywhere]
    else:
        lacking = np.flatnonzero(np.any(server < 0, axis=1))
    if len(lacking):
        _refuse_short(holders, keys, indices, lacking, position)
        which = "" if layers is None else f" at all of the layers {wanted}"
        raise MissingDataError(
            f"{len(lacking)} of {len(keys)} rows have no {component} at {position}{which} "
            f"(first: row {short(keys[lacking[0]])})\n  remedy: {remedy}"
        )
    if not wanted:
        raise MissingDataError(f"no layer of {component} at {position} is captured of all rows\n  remedy: {remedy}")
    offsets = _offsets(holders, server, indices) if position == ALL_TOKENS else None
    parts = _parts(holders, server, indices, wanted, position, offsets)
    return Selection(keys, tuple(wanted), holders[0].plan.d_model, component, position, parts, offsets)


def _refuse_short(
    holders: Sequence[Generation],
    keys: tuple[str, ...],
    indices: npt.NDArray[np.int64],
    lacking: npt.NDArray[np.int64],
    position: str,
) -> None:
    """Say so if no capture could help: all tokens of rows are there, and the position is none of them."""
    short_rows: dict[int, tuple[int, int]] = {}  # row -> tokens of prompt, of prompt and response
    for g, generation in enumerate(holders):
        if position == ALL_TOKENS or not generation.plan.ragged:
            continue
        rows = lacking[indices[g, lacking] >= 0]
        at, table = indices[g, rows], generation.row_table
        none = table.first_tokens(position, at) < 0
        for row, i in zip(rows[none], at[none], strict=True):
            short_rows[int(row)] = (int(table.prompt_length[i]), int(table.response_end[i]))
    if short_rows:
        first = min(short_rows)
        prompt, end = short_rows[first]
        raise MissingDataError(
            f"{len(short_rows)} of {len(keys)} rows are too short to have {position} "
            f"(first: row {short(keys[first])}, tokens: {prompt} of prompt, {end - prompt} of response)\n"
            "  remedy: choose a position that every row has, or leave these rows out"
        )


def _offsets(
    holders: Sequence[Generation], server: npt.NDArray[np.int16], indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return where each row's tokens begin in a selection of all tokens, and where the last one ends, [row + 1]."""
    lengths = np.zeros(server.shape[0], dtype=np.int64)
    for g, generation in enumerate(holders):
        mine = (server == g).any(axis=1)
        lengths[mine] = generation.row_table.response_end[indices[g, mine]]
    return np.concatenate([[0], np.cumsum(lengths)])


def _parts(
    holders: Sequence[Generation],
    server: npt.NDArray[np.int16],
    indices: npt.NDArray[np.int64],
    layers: Sequence[int],
    position: str,
    offsets: npt.NDArray[np.int64] | None,
) -> list[Part]:
    """Cut a selection into parts, by holder and block: rows of a block served at the same layers are one part.

    Args:
        server: which holder serves, [row, layer].
        indices: where the holder has the row, [holder, row].
        offsets: of a selection of all tokens.
    """
    parts = []
    for g, generation in enumerate(holders):
        mine = server == g
        rows = np.flatnonzero(mine.any(axis=1))
        if not len(rows):
            continue
        plan = generation.plan
        patterns, pattern = _patterns(mine[rows])
        at = indices[g, rows]
        block = plan.blocks_of(at)
        order = np.lexsort((at, pattern, block))
        starts = np.flatnonzero(np.diff(block[order], prepend=-1) | np.diff(pattern[order], prepend=-1))
        for members in np.split(order, starts[1:]):
            layers_at = np.flatnonzero(patterns[pattern[members[0]]])
            within, into = _entries(generation, int(block[members[0]]), at[members], rows[members], position, offsets)
            parts.append(
                Part(
                    generation,
                    int(block[members[0]]),
                    within,
                    into,
                    tuple(layers[int(i)] for i in layers_at),
                    layers_at,
                    None if plan.ragged else plan.positions.index(position),
                )
            )
    return parts


def _patterns(mine: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return the distinct rows of a table, and which of them each row is."""
    if (mine == mine[0]).all():  # nearly always; sorting the table would take most of the time
        return mine[:1], np.zeros(len(mine), dtype=np.int64)
    patterns, pattern = np.unique(mine, axis=0, return_inverse=True)
    return patterns, pattern


def _entries(
    generation: Generation,
    block: int,
    at: npt.NDArray[np.int64],
    into: npt.NDArray[np.int64],
    position: str,
    offsets: npt.NDArray[np.int64] | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return indices within the block, and into the selection, of some of its rows (or their tokens)."""
    plan = generation.plan
    if not plan.ragged:
        return at % plan.block_rows, into
    first = generation.offsets[at, 0] - block * plan.block_tokens
    if offsets is None:
        return first + generation.row_table.first_tokens(position, at), into
    lengths = generation.row_table.response_end[at]
    return ranges(first, lengths), ranges(offsets[into], lengths)
