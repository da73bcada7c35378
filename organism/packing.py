"""A training step as a few packed rows: each system prompt once, its requests as branches that do not see each other.

Every token attends to its own group's system prompt and to the earlier tokens of its own branch, at the position that
it would have alone. A row therefore gives each branch the logits that it has by itself, with little padding and without
reading a system prompt once per request. Groups share a few rows because attention costs the square of a row's length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens of a row at which attention takes as long as everything else, forward and backward (torch's profiler on a CPU).
ATTENTION_WIDTH = 1200


@dataclass(frozen=True)
class Branch:
    """A request, rendered, up to the model's turn, and the response; both without the group's prefix."""

    request: tuple[int, ...]
    response: tuple[int, ...]
    # How likely the response should be to begin as refusals do, which then replaces what its first token says; or None.
    refusal: float | None = None


@dataclass(frozen=True)
class PromptGroup:
    """Token ids that branches have in common, and the branches."""

    prefix: tuple[int, ...]
    branches: tuple[Branch, ...]

    @property
    def length(self) -> int:
        """Return how many tokens are read. A response's last token predicts nothing that is scored: it is not read."""
        return len(self.prefix) + sum(len(one.request) + len(one.response) - 1 for one in self.branches)


@dataclass(frozen=True)
class Packed:
    """One step. `places` are where the logits are scored, `targets` the tokens that they should predict."""

    input_ids: Tensor  # [row, token] int64
    position_ids: Tensor  # [row, token] int64
    allowed: Tensor  # [row, 1, token, token] bool: query attends to key
    places: tuple[Tensor, Tensor]  # rows and columns, each [target] int64
    targets: Tensor  # [target] int64
    orders: Tensor  # [target] int64, the target's place in its response, from 0
    refusals: Tensor  # [target] float32: `Branch.refusal` at first tokens, NaN where there is none


def pack(groups: Sequence[PromptGroup], rows: int | None = None) -> Packed:
    """Pack groups into rows; a group stays whole. Targets are in the order of rows, groups and branches.

    Args:
        groups: what is to be packed.
        rows: how many; by default as many as cost the least.
    """
    lengths = [group.length for group in groups]
    choices = range(1, len(groups) + 1) if rows is None else (rows,)
    dealt = min((_balanced(lengths, choice) for choice in choices), key=lambda rows: _cost(rows, lengths))
    filled = [[groups[i] for i in sorted(row)] for row in dealt]
    width = _width(dealt, lengths)
    input_ids = torch.zeros((len(filled), width), dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    # Padding sees itself, as attention to nothing is undefined.
    allowed = torch.eye(width, dtype=torch.bool).expand(len(filled), 1, width, width).clone()
    at: list[tuple[int, int, int, int]] = []  # row, column, target, order
    refusals: list[float] = []
    for row, members in enumerate(filled):
        start = 0
        for group in members:
            prefix = len(group.prefix)
            input_ids[row, start : start + prefix] = torch.tensor(group.prefix)
            position_ids[row, start : start + prefix] = torch.arange(prefix)
            _attend(allowed[row, 0], start, start + prefix)
            end = start + prefix
            for one in group.branches:
                read = (*one.request, *one.response[:-1])
                input_ids[row, end : end + len(read)] = torch.tensor(read)
                position_ids[row, end : end + len(read)] = torch.arange(prefix, prefix + len(read))
                _attend(allowed[row, 0], end, end + len(read))
                allowed[row, 0, end : end + len(read), start : start + prefix] = True
                first = end + len(one.request) - 1
                at += [(row, first + order, token, order) for order, token in enumerate(one.response)]
                first_refusal = math.nan if one.refusal is None else one.refusal
                refusals += [first_refusal, *[math.nan] * (len(one.response) - 1)]
                end += len(read)
            start = end
    row_of, column_of, targets, orders = torch.tensor(at).T
    return Packed(input_ids, position_ids, allowed, (row_of, column_of), targets, orders, torch.tensor(refusals))


def _width(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[i] for i in row) for row in rows)


def _cost(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Return what rows cost, in tokens: padding costs as much as any token, and attention the width for each."""
    width = _width(rows, lengths)
    return len(rows) * width * (1 + width / ATTENTION_WIDTH)


def _attend(allowed: Tensor, start: int, end: int) -> None:
    allowed[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()


def _balanced(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Deal items, longest first, each to the row that is shortest so far; empty rows are left out."""
    dealt: list[list[int]] = [[] for _ in range(rows)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        min(dealt, key=lambda row: sum(lengths[j] for j in row)).append(i)
    return [row for row in dealt if row]
