"""Which rows of a forward pass are the same computation, up to which block, and where they part.

Rows with the same tokens so far and the same operations at all sites up to a block hold the same values there. They are
computed once, as one segment, and fork in front of the first block that an operation of some of them reaches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from store.conditions import Operation
from store.sites import Site


@dataclass(frozen=True)
class Layout:
    """The segments of a pass from one block on."""

    first: int  # block; the number of blocks for what happens behind the last one
    parents: tuple[int, ...]  # by segment: the segment of the layout before that it continues
    members: tuple[tuple[int, ...], ...]  # by segment: its rows

    def segment_of(self, n_rows: int) -> list[int]:
        """Return each row's segment."""
        found = [0] * n_rows
        for segment, rows in enumerate(self.members):
            for row in rows:
                found[row] = segment
        return found


def block_of(site: Site) -> int:
    """Return the first block whose input or inner values depend on what is written at a site."""
    return site.layer + 1 if site.component == "resid_post" else site.layer


def layouts(
    histories: Sequence[Hashable], operations: Sequence[Sequence[Operation]], *, share: bool = True
) -> list[Layout]:
    """Return the layouts of a pass, by rising first block; the first is that of block 0.

    Args:
        histories: of each row; rows of equal history have had the same tokens under the same operations at all sites
            that are computed together.
        operations: of each row, those that act in this pass or have acted in earlier ones.
        share: without it every row is its own segment all the way.
    """
    n = len(histories)
    if not share:
        return [Layout(0, (0,) * n, tuple((row,) for row in range(n)))]
    at: list[dict[int, list[bytes]]] = []  # row -> block -> what is done there, in order
    for row in operations:
        blocks: dict[int, list[bytes]] = {}
        for operation in row:
            blocks.setdefault(block_of(operation.site), []).append(operation.digest)
        at.append(blocks)
    groups: dict[Hashable, list[int]] = {}
    for row_index, history in enumerate(histories):
        groups.setdefault(history, []).append(row_index)
    members = [tuple(rows) for rows in groups.values()]
    found = [Layout(0, (0,) * len(members), tuple(members))]
    for block in sorted({block for blocks in at for block in blocks}):
        parents: list[int] = []
        parts: list[tuple[int, ...]] = []
        for segment, rows in enumerate(members):
            split: dict[tuple[bytes, ...], list[int]] = {}
            for row_index in rows:
                split.setdefault(tuple(at[row_index].get(block, ())), []).append(row_index)
            parents += [segment] * len(split)
            parts += [tuple(part) for part in split.values()]
        if len(parts) > len(members):
            if block == 0:
                found = [Layout(0, (0,) * len(parts), tuple(parts))]
            else:
                found.append(Layout(block, tuple(parents), tuple(parts)))
            members = parts
    return found
