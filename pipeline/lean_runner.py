"""Replay of the Llama layout: packed prefill shared between conditions, decoding from slots, no padding of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.forks import Layout, layouts
from pipeline.interventions import Program, Segment, acts_on_prompts
from pipeline.kv_slots import KVSlots, SlotAttention
from pipeline.lean_llama import LeanLlama, PackedCausal
from pipeline.runners import Entrant, Passed
from store.conditions import MonitorPlan
from store.sites import Site

Ints = npt.NDArray[np.int64]


class LeanRunner:
    """Runs rows on a `LeanLlama`. Each prompt is prefilled once for all conditions that do not change it yet."""

    def __init__(
        self,
        lean: LeanLlama,
        slots: int,
        length: int,
        monitor: MonitorPlan | None = None,
        *,
        share_prefill: bool = True,
    ):
        self.lean, self.monitor, self.share_prefill = lean, monitor, share_prefill
        self._slots = KVSlots(lean, slots, length)
        self._rows: list[Entrant] = []
        self._positions: list[int] = []  # of each row's next token
        self._program: Program | None = None  # of decoding; made anew when rows enter or leave

    @property
    def open(self) -> bool:
        return True

    def enter(self, entrants: Sequence[Entrant]) -> Passed:
        pending = layouts(
            [entrant.prompt for entrant in entrants],
            [[o for o in entrant.operations if acts_on_prompts(o)] for entrant in entrants],
            share=self.share_prefill,
        )
        current = _Prefill(self, entrants, pending.pop(0))
        h = self.lean.embed(current.ids)
        seen: dict[Site, Tensor] = {}
        for layer in range(self.lean.n_layers + 1):
            if pending and pending[0].first == layer:
                seen.update(current.seen())
                following = _Prefill(self, entrants, pending.pop(0))
                h = h.index_select(0, following.continues(current))
                current = following
            if layer:
                h = current.visit(Site("resid_post", layer - 1), h)
            if layer < self.lean.n_layers:
                h = current.block(layer, h)
        seen.update(current.seen())
        rows = torch.tensor(current.segment_of, device=h.device)
        logits = self.lean.logits(h.index_select(0, current.last)).index_select(0, rows)
        self._rows += entrants
        self._positions += [len(entrant.prompt) for entrant in entrants]
        self._program = None
        monitored = None if self.monitor is None else torch.stack([seen[site] for site in self.monitor.units], dim=1)
        return Passed(logits, monitored)

    def step(self, tokens: Tensor) -> Passed:
        lean = self.lean
        if self._program is None:
            segments = [
                Segment(row.operations, len(row.prompt), start=i, length=1, first=len(row.prompt))
                for i, row in enumerate(self._rows)
            ]
            self._program = Program(segments, lean.device, self.monitor)
        program = self._program
        attend = SlotAttention(lean, self._slots, self._positions)
        rotary = lean.rotary(torch.tensor(self._positions, device=lean.device))
        h = lean.embed(tokens)
        for layer in range(lean.n_layers):
            h = lean.block(layer, h, rotary, attend, program, program.sites)
        self._positions = [position + 1 for position in self._positions]
        return Passed(lean.logits(h), program.monitored())

    def keep(self, order: Sequence[int]) -> None:
        for new, old in enumerate(order):
            if new != old:
                self._slots.move(old, new, self._positions[old])
        self._rows = [self._rows[old] for old in order]
        self._positions = [self._positions[old] for old in order]
        self._program = None


class _Prefill:
    """Prompts that enter, from one block on: which tokens lie where, and the slots that keys and values go to."""

    def __init__(self, runner: LeanRunner, entrants: Sequence[Entrant], layout: Layout):
        self._lean, self._slots = runner.lean, runner._slots
        device, n = runner.lean.device, len(entrants)
        leaders = [entrants[rows[0]] for rows in layout.members]
        self.layout, self.segment_of = layout, layout.segment_of(n)
        self.lengths = np.array([len(leader.prompt) for leader in leaders])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.ids = torch.tensor([token for leader in leaders for token in leader.prompt], device=device)
        self.last = torch.from_numpy(self.starts + self.lengths - 1).to(device)
        segments = [
            Segment(leader.operations, len(leader.prompt), start=int(start), length=len(leader.prompt))
            for leader, start in zip(leaders, self.starts, strict=True)
        ]
        self._program = Program(segments, device, runner.monitor)
        positions = ranges(np.zeros_like(self.starts), self.lengths)
        self._rotary = runner.lean.rotary(torch.from_numpy(positions).to(device))
        self._causal = PackedCausal(runner.lean, self.lengths.tolist())
        # Every row's slot gets the keys of its segment.
        first = len(runner._rows)
        of_row = np.array(self.segment_of)
        lengths = self.lengths[of_row]
        places = ranges((first + np.arange(n)) * self._slots.length, lengths)
        self._places = torch.from_numpy(places).to(device)
        alone = len(leaders) == n and self.segment_of == list(range(n))
        self._sources = None if alone else torch.from_numpy(ranges(self.starts[of_row], lengths)).to(device)

    def continues(self, before: _Prefill) -> Tensor:
        """Return for each token the one of the layout before that it goes on from."""
        parents = np.array(self.layout.parents)
        return torch.from_numpy(ranges(before.starts[parents], self.lengths)).to(self._lean.device)

    def visit(self, site: Site, h: Tensor) -> Tensor:
        return self._program(site, h) if site in self._program.sites else h

    def block(self, layer: int, h: Tensor) -> Tensor:
        """Run a block without what happens at its resid_post, which may come after a fork."""
        sites = self._program.sites - {Site("resid_post", layer)}
        return self._lean.block(layer, h, self._rotary, self._attend, self._program, sites)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._sources is None:
            self._slots.write(layer, self._places, k, v)
        else:
            self._slots.write(layer, self._places, k.index_select(0, self._sources), v.index_select(0, self._sources))
        return self._causal(layer, q, k, v)

    def seen(self) -> dict[Site, Tensor]:
        """Return what was monitored while this layout ran, by row."""
        rows = torch.tensor(self.segment_of, device=self._lean.device)
        return {site: values.index_select(0, rows) for site, values in self._program.seen.items()}


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """Return the numbers starts[i] to starts[i] + lengths[i] for each i, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
