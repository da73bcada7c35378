"""Sums and means over the activation store, block by block in parallel threads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dask
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from store.errors import ResidError
from store.reduce import group_sums
from store.selection import Selection

RUN = 8  # blocks of a task


@dataclass(frozen=True)
class GroupMeans:
    """Means of groups of rows: means [group, layer, d_model] float64, counts [group]."""

    means: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


def group_means(selection: Selection, groups: npt.NDArray[np.int64], n_groups: int, threads: int = 2) -> GroupMeans:
    """Return the mean activation of each group of rows at every layer.

    Blocks are read and summed in parallel by Dask's threaded scheduler (`store.reduce`); partial sums are added in the
    selection's fixed order, so the result does not depend on timing. A few chunks are in memory at once.

    Args:
        groups: group of each selected row, [row], in [0, n_groups).

    Raises:
        ResidError: if a group is empty.
        DamageError: if bytes are not those that were committed.
    """
    counts = np.bincount(groups, minlength=n_groups)
    if (counts == 0).any():
        raise ResidError(f"a mean over no rows: group {int(np.argmin(counts))} of {n_groups} is empty")
    total = np.zeros((n_groups, len(selection.layers), selection.d_model))
    # Runs of parts: each task reads ahead within its own.
    runs = [selection.parts[start : start + RUN] for start in range(0, len(selection.parts), RUN)]
    for start in range(0, len(runs), 4 * threads):
        tasks = [delayed(group_sums)(selection, groups, n_groups, run) for run in runs[start : start + 4 * threads]]
        for sums in dask.compute(*tasks, scheduler="threads", num_workers=threads):
            total += sums
    return GroupMeans(total / counts[:, None, None], counts)


def random_halves(row_keys: Sequence[str], seed: int) -> npt.NDArray[np.int64]:
    """Deal rows to two halves by a seeded hash of their keys, [row] of 0 and 1; sizes differ by at most one."""
    order = sorted(range(len(row_keys)), key=lambda i: hashlib.sha256(f"{seed}:{row_keys[i]}".encode()).digest())
    halves = np.zeros(len(row_keys), dtype=np.int64)
    halves[order[len(order) // 2 :]] = 1
    return halves


def matched_halves(
    row_keys: Sequence[str], n_positive: int, matched: Mapping[str, str], seed: int
) -> npt.NDArray[np.int64]:
    """Deal the rows of two sides to two halves, [row] of 0 and 1: rows matched across the sides stay together.

    Args:
        row_keys: the positive rows, then the negative ones.
        n_positive: how many of them are positive.
        matched: row key -> what the row shares with rows of the other side, such as a question.
        seed: of the hash that decides; the same rows are dealt alike in any order.
    """
    names = [matched.get(key) for key in row_keys]
    shared = sorted((set(names[:n_positive]) & set(names[n_positive:])) - {None}, key=str)
    half_of = dict(zip(shared, random_halves([str(name) for name in shared], seed), strict=True))
    halves = np.zeros(len(row_keys), dtype=np.int64)
    for side in (range(n_positive), range(n_positive, len(row_keys))):
        alone = [i for i in side if names[i] not in half_of]
        halves[alone] = random_halves([row_keys[i] for i in alone], seed)
        for i in side:
            if names[i] in half_of:
                halves[i] = half_of[names[i]]
    return halves
