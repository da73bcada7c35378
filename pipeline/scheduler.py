"""Continuous batching: rows of all conditions run together, leave as soon as they end, and the next ones enter."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from pipeline.runners import Entrant, Passed, Runner, Verifier

# Rows wait to enter until this share of the batch is free: a pass over a single prompt uses the machine badly.
ENTER_SHARE = 1 / 16
# Prompt tokens that enter in one pass, sharing left out of account; a longer group of rows enters alone.
ENTER_TOKENS = 4096


class Choose(Protocol):
    """What the scheduler asks for after each pass."""

    def __call__(self, passed: Passed, rows: Sequence[int]) -> tuple[Tensor, list[bool]]:
        """Take what a pass found for rows; return the next token [row] of each and which of them have ended."""
        ...


class Drafter(Protocol):
    """What proposes tokens (`pipeline.drafts.Drafts`)."""

    def begin(self, row: int, prompt: Sequence[int]) -> None:
        """Take in a row that enters."""
        ...

    def propose(self, rows: Sequence[int], *, more: bool) -> list[tuple[int, ...]]:
        """Return drafts for each of the running rows; `more` tells whether others wait."""
        ...

    def said(self, row: int, tokens: Sequence[int]) -> None:
        """Take what a row chose in a pass: one token more than drafts that were right, if it goes on."""
        ...

    def end(self, row: int) -> None:
        """Let a row go."""
        ...


@dataclass(frozen=True)
class Waiting:
    """A row that has not begun. Rows of the same group follow each other and enter together if they can."""

    row: int
    entrant: Entrant
    group: Hashable


class Scheduler:
    """Drives rows through a runner."""

    def __init__(self, rows: Sequence[Waiting], batch_rows: int, drafts: Drafter | None = None):
        """With `drafts`, rows may go on by several tokens in a pass, if the runner takes them (`Verifier`)."""
        self.batch_rows, self.drafts = batch_rows, drafts
        self.passes = 0
        self._waiting = _grouped(rows, batch_rows)
        self._live: list[Waiting] = []
        self._tokens: Tensor | None = None  # [row] the next token of each live row
        self._entering: list[Waiting] = []

    @property
    def done(self) -> bool:
        return not (self._waiting or self._live)

    @property
    def in_flight(self) -> list[Waiting]:
        """Rows that run, or were about to when a pass failed."""
        return [*self._live, *self._entering]

    def run(self, runner: Runner, choose: Choose) -> None:
        """Run all rows to their ends.

        Raises:
            torch.OutOfMemoryError: with the rows of the failed pass still in flight; go on after `restart`.
        """
        while not self.done:
            self._entering = self._next(runner)
            self.passes += 1
            if self._entering:
                passed = runner.enter([row.entrant for row in self._entering])
                entered, self._entering = self._entering, []
                rows = [row.row for row in entered]
                tokens, ended = choose(passed, rows)
                if self.drafts is not None:
                    for one, token in zip(entered, tokens.tolist(), strict=True):
                        self.drafts.begin(one.row, one.entrant.prompt)
                        self.drafts.said(one.row, [token])
                ended = [False] * len(self._live) + ended
                self._live += entered
                self._tokens = tokens if self._tokens is None else torch.cat([self._tokens, tokens])
            else:
                assert self._tokens is not None
                rows = [row.row for row in self._live]
                if self.drafts is not None and isinstance(runner, Verifier):
                    self._tokens, ended = self._drafted(self._tokens, rows, self.drafts, runner, choose)
                else:
                    self._tokens, ended = choose(runner.step(self._tokens), rows)
            if any(ended):
                self._leave(runner, ended)

    def _drafted(
        self, tokens: Tensor, rows: Sequence[int], drafts: Drafter, runner: Verifier, choose: Choose
    ) -> tuple[Tensor, list[bool]]:
        """Take a step in which some rows may go on by several tokens."""
        proposed = drafts.propose(rows, more=bool(self._waiting))
        passed = runner.verify(tokens, proposed) if any(proposed) else runner.step(tokens)
        if passed.counts is None:
            tokens, ended = choose(passed, rows)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                drafts.said(row, [token])
            return tokens, ended
        # Row by row token by token, as if each had been a pass: a draft counts if its row has just chosen it.
        first = list(accumulate(passed.counts, initial=0))
        said: list[list[int]] = [[] for _ in rows]
        ended, going = [False] * len(rows), list(range(len(rows)))
        tokens = tokens.clone()
        while going:
            found = passed.at([first[i] + len(said[i]) for i in going])
            chosen, over = choose(found, [rows[i] for i in going])
            tokens[torch.tensor(going, device=tokens.device)] = chosen
            for i, token, done in zip(going, chosen.tolist(), over, strict=True):
                said[i].append(token)
                ended[i] = done
            going = [
                i for i in going if not ended[i] and proposed[i][len(said[i]) - 1 : len(said[i])] == (said[i][-1],)
            ]
        accepted = [len(one) - 1 for one in said]
        if any(accepted):
            runner.accept(accepted)
        for row, one in zip(rows, said, strict=True):
            drafts.said(row, one)
        return tokens, ended

    def restart(self, batch_rows: int) -> list[int]:
        """Put the rows in flight back, to begin again in smaller batches; return them."""
        again = self.in_flight
        rows = [*again, *(row for group in self._waiting for row in group)]
        self.batch_rows, self._waiting = batch_rows, _grouped(rows, batch_rows)
        self._live, self._entering, self._tokens = [], [], None
        return [row.row for row in again]

    def _next(self, runner: Runner) -> list[Waiting]:
        """Take the rows that enter now from those that wait."""
        room = self.batch_rows - len(self._live)
        if not self._waiting or (self._live and (not runner.open or room < self.batch_rows * ENTER_SHARE)):
            return []
        chosen: list[Waiting] = []
        tokens = 0
        while self._waiting:
            group = self._waiting[0]
            tokens += sum(len(row.entrant.prompt) for row in group)
            if len(chosen) + len(group) > room or (chosen and tokens > ENTER_TOKENS):
                break
            chosen += self._waiting.popleft()
        return chosen

    def _leave(self, runner: Runner, ended: Sequence[bool]) -> None:
        if self.drafts is not None:
            for row, gone in zip(self._live, ended, strict=True):
                if gone:
                    self.drafts.end(row.row)
        order = without(ended)
        runner.keep(order)
        self._live = [self._live[row] for row in order]
        if order:
            assert self._tokens is not None
            self._tokens = self._tokens[torch.tensor(order, device=self._tokens.device)]
        else:
            self._tokens = None


def without(gone: Sequence[bool]) -> list[int]:
    """Return which rows stay, each at its old number where that is still in range; the last ones fill the holes."""
    n = len(gone) - sum(gone)
    tail = [row for row in range(n, len(gone)) if not gone[row]]
    return [tail.pop() if gone[row] else row for row in range(n)]


def _grouped(rows: Sequence[Waiting], batch_rows: int) -> deque[list[Waiting]]:
    """Cut rows into groups that enter together, small enough for two of them to run at once."""
    most = max(1, batch_rows // 2)
    groups: deque[list[Waiting]] = deque()
    for row in rows:
        if groups and groups[-1][0].group == row.group and len(groups[-1]) < most:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
