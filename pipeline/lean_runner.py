"""Replay of the Llama layout: packed prefill, decoding from slots, and nothing computed twice that rows share.

Rows of a prompt whose conditions have not parted yet are one segment (`pipeline.forks`): in prefill up to the first
block that one of them changes, and on request while decoding for as long as their tokens agree as well.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.forks import Layout, layouts
from pipeline.interventions import Program, Segment, acts_on_prompts, is_identity
from pipeline.kv_slots import KVSlots, SlotAttention
from pipeline.lean_llama import Attend, LeanLlama, PackedCausal
from pipeline.runners import Entrant, Passed
from store.conditions import MonitorPlan
from store.sites import Site

Ints = npt.NDArray[np.int64]


class LeanRunner:
    """Runs rows on a `LeanLlama`."""

    def __init__(
        self,
        lean: LeanLlama,
        slots: int,
        length: int,
        monitor: MonitorPlan | None = None,
        *,
        share_prefill: bool = True,
        share_decoding: bool = False,
    ):
        self.lean, self.monitor = lean, monitor
        self.share_prefill, self.share_decoding = share_prefill, share_decoding
        self.slots = KVSlots(lean, slots, length)
        self.rows: list[Entrant] = []
        self._positions: list[int] = []  # of each row's next token
        self._histories: list[Hashable] = []  # equal where rows of a prompt have had the same tokens so far
        self._n_histories = 0
        # Of decoding, by the rows that lead the segments; made anew when rows enter or leave.
        self._programs: dict[tuple[int, ...], Program] = {}

    @property
    def open(self) -> bool:
        return True

    def enter(self, entrants: Sequence[Entrant]) -> Passed:
        found = layouts(
            [entrant.prompt for entrant in entrants],
            [[o for o in entrant.operations if acts_on_prompts(o)] for entrant in entrants],
            share=self.share_prefill,
        )
        passed = self._forward([_Prefill(self, entrants, layout) for layout in found])
        self.rows += entrants
        self._positions += [len(entrant.prompt) for entrant in entrants]
        self._histories += self._numbered([entrant.prompt for entrant in entrants])
        self._programs = {}
        return passed

    def step(self, tokens: Tensor) -> Passed:
        self._histories = self._numbered(list(zip(self._histories, tokens.tolist(), strict=True)))
        found = layouts(
            self._histories,
            [[o for o in row.operations if not is_identity(o)] for row in self.rows],
            share=self.share_decoding,
        )
        passes = [_Decode(self, tokens, self._positions, layout, self._programs) for layout in found]
        self._programs = {one.leaders: one.program for one in passes}
        passed = self._forward(passes)
        self._positions = [position + 1 for position in self._positions]
        return passed

    def keep(self, order: Sequence[int]) -> None:
        for new, old in enumerate(order):
            if new != old:
                self.slots.move(old, new, self._positions[old])
        self.rows = [self.rows[old] for old in order]
        self._positions = [self._positions[old] for old in order]
        self._histories = [self._histories[old] for old in order]
        self._programs = {}

    def _numbered(self, histories: Sequence[Hashable]) -> list[Hashable]:
        """Return a number for each history, equal for equal ones and never used before."""
        numbers: dict[Hashable, int] = {}
        for history in histories:
            numbers.setdefault(history, self._n_histories + len(numbers))
        self._n_histories += len(numbers)
        return [numbers[history] for history in histories]

    def _forward(self, passes: Sequence[_Pass]) -> Passed:
        """Run the model through layouts that follow each other; return what it finds of each row's last token."""
        pending = list(passes)
        current = pending.pop(0)
        h = self.lean.embed(current.ids)
        seen: dict[Site, Tensor] = {}
        for layer in range(self.lean.n_layers + 1):
            if pending and pending[0].layout.first == layer:
                seen.update(current.seen())
                before, current = current, pending.pop(0)
                h = h.index_select(0, current.continues(before))
            if layer:
                h = current.visit(Site("resid_post", layer - 1), h)
            if layer < self.lean.n_layers:
                h = current.block(layer, h)
        seen.update(current.seen())
        logits = current.by_row(self.lean.logits(h.index_select(0, current.last)))
        monitored = None if self.monitor is None else torch.stack([seen[site] for site in self.monitor.units], dim=1)
        return Passed(logits, monitored)


class _Pass:
    """A forward pass from one block on: the tokens of each segment, and what happens to them."""

    def __init__(self, lean: LeanLlama, layout: Layout, lengths: Ints, first: Ints, n_rows: int):
        self.lean, self.layout, self.lengths = lean, layout, lengths
        self.starts: Ints = np.cumsum(lengths) - lengths
        self.segment_of = np.array(layout.segment_of(n_rows))
        self.alone = len(lengths) == n_rows and bool((self.segment_of == np.arange(n_rows)).all())
        self.last = self.tensor(self.starts + lengths - 1)
        self._rotary = lean.rotary(self.tensor(ranges(first, lengths)))
        self.ids: Tensor  # [token]
        self.program: Program
        self.attend: Attend

    def tensor(self, numbers: Ints) -> Tensor:
        return torch.from_numpy(numbers).to(self.lean.device)

    def by_row(self, values: Tensor) -> Tensor:
        """Return values [segment, ...] as [row, ...]."""
        return values if self.alone else values.index_select(0, self.tensor(self.segment_of))

    def continues(self, before: _Pass) -> Tensor:
        """Return for each token the one of the layout before that it goes on from."""
        return self.tensor(ranges(before.starts[np.array(self.layout.parents)], self.lengths))

    def visit(self, site: Site, h: Tensor) -> Tensor:
        return self.program(site, h) if site in self.program.sites else h

    def block(self, layer: int, h: Tensor) -> Tensor:
        """Run a block without what happens at its resid_post, which may come after a fork."""
        sites = self.program.sites - {Site("resid_post", layer)}
        return self.lean.block(layer, h, self._rotary, self.attend, self.program, sites)

    def seen(self) -> dict[Site, Tensor]:
        """Return what was monitored while this layout ran, [row, direction] at each site."""
        return {site: self.by_row(values) for site, values in self.program.seen.items()}


class _Prefill(_Pass):
    """Prompts that enter."""

    def __init__(self, runner: LeanRunner, entrants: Sequence[Entrant], layout: Layout):
        leaders = [entrants[rows[0]] for rows in layout.members]
        lengths = np.array([len(leader.prompt) for leader in leaders])
        super().__init__(runner.lean, layout, lengths, np.zeros_like(lengths), len(entrants))
        self.ids = torch.tensor([token for leader in leaders for token in leader.prompt], device=self.lean.device)
        segments = [
            Segment(leader.operations, len(leader.prompt), start=int(start), length=len(leader.prompt))
            for leader, start in zip(leaders, self.starts, strict=True)
        ]
        self.program = Program(segments, self.lean.device, runner.monitor)
        # Every row's slot gets the keys of its segment.
        slots, causal = runner.slots, PackedCausal(self.lean, lengths.tolist())
        of_row = lengths[self.segment_of]
        first = len(runner.rows)
        places = self.tensor(ranges((first + np.arange(len(entrants))) * slots.length, of_row))
        sources = None if self.alone else self.tensor(ranges(self.starts[self.segment_of], of_row))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            held = (k, v) if sources is None else (k.index_select(0, sources), v.index_select(0, sources))
            slots.write(layer, places, *held)
            return causal(layer, q, k, v)

        self.attend = attend


class _Decode(_Pass):
    """One more token of every row."""

    def __init__(
        self,
        runner: LeanRunner,
        tokens: Tensor,
        positions: Sequence[int],
        layout: Layout,
        programs: dict[tuple[int, ...], Program],
    ):
        self.leaders = tuple(rows[0] for rows in layout.members)
        at = np.array(positions)[list(self.leaders)]
        super().__init__(runner.lean, layout, np.ones(len(at), np.int64), at, len(positions))
        leaders = None if self.alone else self.tensor(np.array(self.leaders))
        self.ids = tokens if leaders is None else tokens.index_select(0, leaders)
        program = programs.get(self.leaders)
        if program is None:
            rows = [runner.rows[row] for row in self.leaders]
            segments = [
                Segment(row.operations, len(row.prompt), start=i, length=1, first=len(row.prompt))
                for i, row in enumerate(rows)
            ]
            program = Program(segments, self.lean.device, runner.monitor)
        self.program = program
        program.seen.clear()
        shared = None if leaders is None else (leaders, self.tensor(self.segment_of))
        self.attend = SlotAttention(self.lean, runner.slots, positions, shared)


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """Return the numbers starts[i] to starts[i] + lengths[i] for each i, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
