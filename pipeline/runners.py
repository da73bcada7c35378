"""What the scheduler drives: rows enter, take a step together, and leave. One runner for each way to run a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from store.conditions import Operation


@dataclass(frozen=True)
class Entrant:
    """A row that begins: its prompt's token ids and the operations that it is under."""

    prompt: tuple[int, ...]
    operations: tuple[Operation, ...]
    common: int = 0  # first tokens that are worth sharing with other prompts (`pipeline.common_starts`)
    job: int = 0  # whose effects are recorded (`pipeline.effects`)


@dataclass(frozen=True)
class Passed:
    """What a forward pass found out about some rows."""

    logits: Tensor  # [row, vocabulary] float32, of each row's last token; holds until the next pass
    monitored: Tensor | None  # [row, site, direction] float32, of each row's last token
    # With drafts: how many tokens of each row were read. Both of the above are then of all of them, row by row.
    counts: tuple[int, ...] | None = None

    def at(self, places: Sequence[int]) -> Passed:
        """Return what was found at some of the tokens."""
        chosen = torch.tensor(places, device=self.logits.device)
        monitored = None if self.monitored is None else self.monitored.index_select(0, chosen)
        return Passed(self.logits.index_select(0, chosen), monitored)


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


@runtime_checkable
class Verifier(Runner, Protocol):
    """A runner that takes drafts (`pipeline.drafts`)."""

    def verify(self, tokens: Tensor, drafts: Sequence[tuple[int, ...]]) -> Passed:
        """Run one more token [row] of every row, and behind it the row's drafts; or `step` where those bring NaN.

        Rows go on behind their token, as after `step`, unless `accept` follows.
        """
        ...

    def accept(self, n_accepted: Sequence[int]) -> None:
        """Go on behind the first so many drafts of each row that the last `verify` read."""
        ...
