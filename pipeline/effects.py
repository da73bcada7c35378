"""How much each intervention changed each row, and in which token: kept while a replay runs.

The forward pass leaves two numbers for each changed token on the device; they are read in one copy for many passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from store.conditions import Operation

Ints = npt.NDArray[np.int64]
# Numbers that wait on the device before they are read, where reading them makes the host wait.
QUEUE = 1 << 20


@dataclass(frozen=True)
class Change:
    """What one operation did to tokens of one forward pass."""

    segments: Ints  # [n] of the pass
    labels: Ints  # [n]
    offsets: Ints  # [n] of each token in its segment
    squares: Tensor  # [n] float32: squared norm of the change; -1 for a token that the scope left out
    before: Tensor  # [n] float32: squared norm of the stream before the change


@dataclass(frozen=True)
class Effect:
    """What one operation of a condition did to one text, over all tokens that were read under it."""

    operation: int  # in the condition's order
    n_tokens: int
    change: float  # sum over tokens of ||dh||^2
    largest: float  # ||dh||^2 of the token that changed most
    token: int  # position of that token in its row; -1 where nothing changed
    max_relative: float  # largest ||dh|| / ||h||
    mean_relative: float  # mean over tokens of ||dh|| / ||h||


@dataclass
class _Entry:
    ids: Ints
    labels: Ints
    positions: Ints
    squares: Tensor
    before: Tensor


class Effects:
    """Effects by row and operation. Rows that share a computation are each given what it did."""

    def __init__(self) -> None:
        self._label_of: dict[tuple[bytes, int], int] = {}
        self._queue: list[_Entry] = []
        self._waiting = 0
        self._sums: npt.NDArray[np.float64] = np.zeros((0, 0, 5))  # n, change, largest, max relative, sum of relatives
        self._token: Ints = np.zeros((0, 0), dtype=np.int64)
        self._n_ids = 0
        self._rows: dict[int, tuple[int, int | None]] = {}  # job -> its id, and that of the start that it shares

    def labels(self, operations: Sequence[Operation]) -> list[int]:
        """Return a number for each operation of a condition: equal in two conditions where they do the same."""
        seen: dict[bytes, int] = {}
        found = []
        for operation in operations:
            nth = seen[operation.digest] = seen.get(operation.digest, -1) + 1
            found.append(self._label_of.setdefault((operation.digest, nth), len(self._label_of)))
        return found

    def new(self) -> int:
        """Return an id for a row, or for what several rows begin with."""
        self._n_ids += 1
        return self._n_ids - 1

    def begin(self, job: int, start: int | None = None) -> int:
        """Return an id for a job's row, whose first tokens are those of the id `start`; what it had counts no more."""
        row = self.new()
        self._rows[job] = (row, start)
        return row

    def add(self, ids: Ints, labels: Ints, positions: Ints, squares: Tensor, before: Tensor) -> None:
        """Take what an operation did to tokens [n], each of the row `ids` at `positions`."""
        self._queue.append(_Entry(ids, labels, positions, squares, before))
        self._waiting += len(ids)
        if self._waiting > QUEUE:
            self._read()

    def _read(self) -> None:
        if not self._queue:
            return
        numbers = torch.stack([torch.cat([getattr(e, name) for e in self._queue]) for name in ("squares", "before")])
        squares, before = numbers.double().cpu().numpy()
        ids, labels, positions = (
            np.concatenate([getattr(e, name) for e in self._queue]) for name in ("ids", "labels", "positions")
        )
        self._queue, self._waiting = [], 0
        inside = squares >= 0  # below 0: a token that the operation left out
        ids, labels, positions = ids[inside], labels[inside], positions[inside]
        squares, before = squares[inside], before[inside]
        self._grow()
        at = (ids, labels)
        relative = np.sqrt(np.divide(squares, before, out=np.zeros_like(squares), where=before > 0))
        np.add.at(self._sums[..., 0], at, 1)
        np.add.at(self._sums[..., 1], at, squares)
        np.maximum.at(self._sums[..., 3], at, relative)
        np.add.at(self._sums[..., 4], at, relative)
        # Ascending, so that of several tokens of a row the largest is written last; of equal ones the first.
        order = np.lexsort((-positions, squares))
        order = order[squares[order] > self._sums[ids[order], labels[order], 2]]
        self._sums[ids[order], labels[order], 2] = squares[order]
        self._token[ids[order], labels[order]] = positions[order]

    def _grow(self) -> None:
        shape = (max(self._n_ids, len(self._sums)), max(len(self._label_of), self._sums.shape[1]))
        if shape != self._token.shape:
            more = [(0, new - old) for new, old in zip(shape, self._token.shape, strict=True)]
            self._sums = np.pad(self._sums, [*more, (0, 0)])
            self._token = np.pad(self._token, more, constant_values=-1)

    def of(self, job: int, operations: Sequence[Operation]) -> tuple[Effect, ...]:
        """Return what each operation of a job's condition did to its text."""
        self._read()
        self._grow()
        if job not in self._rows:
            return ()
        row, start = self._rows[job]
        found = []
        for index, label in enumerate(self.labels(operations)):
            if label >= self._token.shape[1]:
                self._grow()
            n, change, largest, most, relatives = self._sums[row, label].tolist()
            token = int(self._token[row, label])
            if start is not None:
                more = self._sums[start, label].tolist()
                if more[2] >= largest and more[2] > 0:
                    token = int(self._token[start, label])
                n, change, largest = n + more[0], change + more[1], max(largest, more[2])
                most, relatives = max(most, more[3]), relatives + more[4]
            found.append(Effect(index, int(n), change, largest, token, most, relatives / n if n else 0.0))
        return tuple(found)


class SharedEffects:
    """Hands on what passes changed, to each row of segments that rows share; of drafts, to the right ones."""

    def __init__(self, effects: Effects):
        self.effects = effects
        self._pending: list[tuple[Ints, Ints, Change, Ints]] = []  # of drafts: rows, ids, change, positions

    def record(
        self,
        changes: Sequence[Change],
        members: Sequence[Sequence[int]] | None,
        ids: Ints,
        bases: Ints,
        *,
        drafts: bool = False,
    ) -> None:
        """Take the changes of one pass.

        Args:
            changes: by segment.
            members: the rows of each segment; None where segment i is row i.
            ids: [row] in the effects.
            bases: [row] the position of a row's first token in the pass.
            drafts: wait until `settle` tells how many of each row's tokens behind its first count.
        """
        for change in changes:
            rows = change.segments
            if members is not None:  # each token once for each row of its segment
                of = [np.array(rows) for rows in members]
                counts = np.array([len(rows) for rows in of])[change.segments]
                which = np.repeat(np.arange(len(change.segments)), counts)
                rows = np.concatenate([of[segment] for segment in change.segments])
                change = _chosen(change, which)
            positions = bases[rows] + change.offsets
            if drafts:
                self._pending.append((rows, ids[rows], change, positions))
            else:
                self.effects.add(ids[rows], change.labels, positions, change.squares, change.before)

    def settle(self, n_accepted: Sequence[int] | None = None) -> None:
        """Count what happened to drafts that were right, [row] of them, and to the tokens in front of them."""
        pending, self._pending = self._pending, []
        for rows, ids, change, positions in pending:
            right = 0 if n_accepted is None else np.array(n_accepted)[rows]
            inside = np.flatnonzero(change.offsets <= right)
            one = _chosen(change, inside)
            self.effects.add(ids[inside], one.labels, positions[inside], one.squares, one.before)

    def forget(self) -> None:
        """Drop what waits: the pass is run again."""
        self._pending = []


def _chosen(change: Change, which: Ints) -> Change:
    if len(which) == len(change.segments) and bool((which == np.arange(len(which))).all()):
        return change
    places = torch.from_numpy(which).to(change.squares.device)
    squares, before = (x.index_select(0, places) for x in (change.squares, change.before))
    return Change(change.segments[which], change.labels[which], change.offsets[which], squares, before)
