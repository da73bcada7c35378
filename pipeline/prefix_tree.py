"""What rows have in common at their start: a tree of segments, each of which goes through the model once.

A row is the path from a root to one of its segments. Where several rows begin with the same tokens (the chat template's
system part, the prompt of many responses), those tokens are a segment of their own, and the rest of every row is run
behind its keys and values. Whether a common start is worth a segment is decided for the tree as a whole: the tokens
computed, plus a price per segment, are the least that cutting or not cutting at the branches can give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

# Branches above one another that are looked at: what lies deeper is not shared. Rows that are prefixes of each other by
# the hundred would nest as deep.
MAX_BRANCHES = 48


@dataclass(eq=False)
class Segment:
    """Tokens that are run once, behind those of the segments above."""

    tokens: tuple[int, ...]
    start: int  # token index of the first one in every row that holds it
    rows: list[int]  # whose path goes through it, here or further down
    children: list[Segment] = field(default_factory=list)
    parent: Segment | None = None

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


def unshared(sequences: Sequence[tuple[int, ...]]) -> list[Segment]:
    """Return every row as a segment of its own."""
    return [Segment(tokens, 0, [row]) for row, tokens in enumerate(sequences)]


def prefix_tree(sequences: Sequence[tuple[int, ...]], shareable: Sequence[int], price: int) -> list[Segment]:
    """Return the roots of the tree of token sequences.

    Args:
        sequences: token ids of each row; none is empty.
        shareable: by row, how many of its first tokens may lie in a segment with others.
        price: of a segment that others stand behind, in tokens.
    """
    keys = [sequence[:limit] for sequence, limit in zip(sequences, shareable, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    top = _branch(order, keys, 0, 0) if order else None
    if top is None:
        return []
    planner = _Planner(sequences, price)
    roots: list[Segment] = []
    planner.place(top, 0, None, roots)
    return roots


@dataclass(eq=False)
class _Branch:
    """Where the keys of a group of rows part."""

    depth: int  # tokens that they all begin with
    rows: list[int]  # all of the group
    single: list[int]  # those that go on alone, or end here
    branches: list[_Branch]


def _branch(rows: list[int], keys: Sequence[tuple[int, ...]], depth: int, level: int) -> _Branch:
    first, last = keys[rows[0]], keys[rows[-1]]  # sorted: what these two share, all share
    shortest = min(len(first), len(last))
    while depth < shortest and first[depth] == last[depth]:
        depth += 1
    found = _Branch(depth, rows, [], [])
    if level == MAX_BRANCHES:
        found.single = rows
        return found
    for token, members in groupby(rows, key=lambda row: keys[row][depth] if len(keys[row]) > depth else None):
        group = list(members)
        if token is None or len(group) == 1:
            found.single += group
        else:
            found.branches.append(_branch(group, keys, depth, level + 1))
    return found


class _Planner:
    def __init__(self, sequences: Sequence[tuple[int, ...]], price: int):
        self.sequences, self.price = sequences, price
        self._costs: dict[tuple[int, int], tuple[int, bool]] = {}

    def cost(self, branch: _Branch, above: int) -> tuple[int, bool]:
        """Return tokens and prices of a group behind a segment that ends at `above`, and whether it gets a segment."""
        key = (id(branch), above)
        if key not in self._costs:
            whole = self._below(branch, above)
            cut = branch.depth - above + self.price + self._below(branch, branch.depth)
            self._costs[key] = min((whole, False), (cut, True)) if branch.depth > above else (whole, False)
        return self._costs[key]

    def _below(self, branch: _Branch, above: int) -> int:
        alone = sum(len(self.sequences[row]) - above for row in branch.single)
        return alone + sum(self.cost(child, above)[0] for child in branch.branches)

    def place(self, branch: _Branch, above: int, parent: Segment | None, siblings: list[Segment]) -> None:
        """Append the segments of a group to `siblings`, which stand behind `parent`."""
        if self.cost(branch, above)[1]:
            tokens = self.sequences[branch.rows[0]][above : branch.depth]
            segment = Segment(tokens, above, list(branch.rows), parent=parent)
            siblings.append(segment)
            above, parent, siblings = branch.depth, segment, segment.children
        for row in branch.single:
            if rest := self.sequences[row][above:]:
                siblings.append(Segment(rest, above, [row], parent=parent))
        for child in branch.branches:
            self.place(child, above, parent, siblings)
