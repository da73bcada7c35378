"""Padded batches: which side, which mask, which positions; and batches of like length under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# What a forward pass costs beyond its tokens, in tokens: on a core the weights that it reads and some Python, on a GPU
# the launch of its kernels.
PASS_TOKENS, DEVICE_PASS_TOKENS = 32, 256


@dataclass(frozen=True)
class Batch:
    """Padded rows. Row r's tokens are columns starts[r] to starts[r] + lengths[r]."""

    input_ids: Tensor  # [row, token] int64
    attention_mask: Tensor  # [row, token] int64, 1 at real tokens
    position_ids: Tensor  # [row, token] int64, counted from each row's first real token
    starts: tuple[int, ...]
    lengths: tuple[int, ...]


def pad(sequences: Sequence[Sequence[int]], *, side: str, pad_id: int, device: torch.device | str) -> Batch:
    """Pad token id sequences on one side, with explicit positions, so that padding never shifts a rotary angle."""
    lengths = tuple(len(sequence) for sequence in sequences)
    width = max(lengths)
    starts = tuple(width - length if side == "left" else 0 for length in lengths)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.int64)
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        input_ids[row, start : start + len(sequence)] = torch.tensor(list(sequence), dtype=torch.int64)
        mask[row, start : start + len(sequence)] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(input_ids.to(device), mask.to(device), positions.to(device), starts, lengths)


def by_token_budget(lengths: Sequence[int], budget: int, pass_tokens: int = PASS_TOKENS) -> list[list[int]]:
    """Group row indices, sorted by length, into batches of at most `budget` padded tokens; a longer row goes alone.

    Of all ways to cut the sorted rows, the one with the least padding, where a pass counts as `pass_tokens` of it.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    ascending = np.array([lengths[index] for index in order], dtype=np.int64)
    least = np.zeros(len(order) + 1, dtype=np.int64)  # by number of first rows: tokens and passes of the best cut
    cut = np.zeros(len(order) + 1, dtype=np.int64)  # where the last batch of that cut begins
    for end in range(1, len(order) + 1):
        longest = int(ascending[end - 1])
        first = end - max(1, min(end, budget // longest))
        costs = least[first:end] + longest * np.arange(end - first, 0, -1)
        best = int(costs.argmin())
        least[end], cut[end] = costs[best] + pass_tokens, first + best
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[cut[end] : end])
        end = int(cut[end])
    return batches[::-1]


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocation that failed: of a device as torch.OutOfMemoryError, of the CPU as a
    RuntimeError of its allocator, which torch gives no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error) and "memory" in str(error)
    )


def release_memory(device: torch.device) -> None:
    """Give cached blocks back after a pass that ran out of memory, so that a smaller one finds them whole."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
