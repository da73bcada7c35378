"""What the scheduler drives: rows enter, take a step together, and leave. One runner for each way to run a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from store.conditions import Operation


@dataclass(frozen=True)
class Entrant:
    """A row that begins: its prompt's token ids and the operations that it is under."""

    prompt: tuple[int, ...]
    operations: tuple[Operation, ...]
    common: int = 0  # first tokens that are worth sharing with other prompts (`pipeline.common_starts`)


@dataclass(frozen=True)
class Passed:
    """What a forward pass found out about some rows."""

    logits: Tensor  # [row, vocabulary] float32, of each row's last token; holds until the next pass
    monitored: Tensor | None  # [row, site, direction] float32, of each row's last token


class Runner(Protocol):
    """Running rows, numbered 0, 1, 2, ..."""

    @property
    def open(self) -> bool:
        """Whether rows may enter while others run."""
        ...

    def enter(self, entrants: Sequence[Entrant]) -> Passed:
        """Run prompts; their rows get the next numbers."""
        ...

    def step(self, tokens: Tensor) -> Passed:
        """Run one more token [row] of every row."""
        ...

    def keep(self, order: Sequence[int]) -> None:
        """Go on with these rows only: row i is from now on what row order[i] was. Those that stay in range stay."""
        ...
