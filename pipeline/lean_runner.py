"""Replay of the Llama layout: packed prefill, decoding from slots, and nothing computed twice that rows share.

Rows of a prompt whose conditions have not parted yet are one segment (`pipeline.forks`): in prefill up to the first
block that one of them changes, and while decoding for as long as their tokens agree as well. What several
prompts begin with (the chat template's system part, a system prompt) is read once under each condition: rows that
enter later copy its keys and values from a row that is running (`pipeline.common_starts`).

A row may read drafts behind its token (`pipeline.drafts`). Each of them sees what the row's own tokens see, is changed
as those are, and leaves keys and values at its position. Those of rejected drafts lie behind the row's position, where
nothing is read before it is written again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.common_starts import StartKey, start_key
from pipeline.effects import Effects, SharedEffects
from pipeline.forks import Layout, layouts
from pipeline.interventions import Program, Segment, acts_on_prompts, is_identity
from pipeline.kv_slots import KVSlots, SlotAttention, SlotCausal
from pipeline.lean_llama import Attend, LeanLlama
from pipeline.runners import Entrant, Passed
from store.conditions import MonitorPlan
from store.selection import ranges
from store.sites import Site

Ints = npt.NDArray[np.int64]


class LeanRunner:
    """Runs rows on a `LeanLlama`."""

    def __init__(
        self,
        lean: LeanLlama,
        slots: KVSlots,
        monitor: MonitorPlan | None = None,
        *,
        share_prefill: bool = True,
        share_decoding: bool = True,
        sinks: Mapping[Site, float] | None = None,
        effects: Effects | None = None,
    ):
        self.lean, self.slots, self.monitor, self.sinks, self.effects = lean, slots, monitor, sinks, effects
        self._ids: list[int] = []  # of each row in the effects
        self._start_ids: dict[StartKey, int] = {}  # of starts that rows share, in the effects
        self._shared = None if effects is None else SharedEffects(effects)
        self.share_prefill, self.share_decoding = share_prefill, share_decoding
        self.rows: list[Entrant] = []
        self._positions: list[int] = []  # of each row's next token
        self._histories: list[Hashable] = []  # equal where rows of a prompt have had the same tokens so far
        self._n_histories = 0
        self._starts: list[StartKey | None] = []  # of each row: what its slot begins with that others may begin with
        self._drafts: Sequence[tuple[int, ...]] = ()  # of the last pass that verified some
        self._logits: Tensor | None = None
        # Of decoding, by the rows that lead the segments; made anew when rows enter or leave.
        self._programs: dict[tuple[int, ...], Program] = {}

    @property
    def open(self) -> bool:
        return True

    def enter(self, entrants: Sequence[Entrant]) -> Passed:
        self.settle()
        starts = [start_key(entrant) if self.share_prefill else None for entrant in entrants]
        begins = np.array([0 if key is None else entrant.common for entrant, key in zip(entrants, starts, strict=True)])
        self._fill_starts(entrants, starts)
        ends = np.array([len(entrant.prompt) for entrant in entrants])
        if self.effects is not None:
            shared = [None if key is None else self._start_ids[key] for key in starts]
            ids = [self.effects.begin(entrant.job, start) for entrant, start in zip(entrants, shared, strict=True)]
        else:
            ids = [0] * len(entrants)
        passed = self._prefill(entrants, len(self.rows) + np.arange(len(entrants)), begins, ends, ids)
        assert passed is not None
        self._ids += ids
        self.rows += entrants
        self._positions += ends.tolist()
        self._histories += self._numbered([entrant.prompt for entrant in entrants])
        self._starts += starts
        self._programs = {}
        return passed

    def _fill_starts(self, entrants: Sequence[Entrant], starts: Sequence[StartKey | None]) -> None:
        """Put the keys and values of what rows begin with into their slots: computed once, copied to the others."""
        first = len(self.rows)
        source = {key: row for row, key in enumerate(self._starts) if key is not None}
        computed: dict[StartKey, int] = {}  # entrant
        for i, key in enumerate(starts):
            if key is not None and key not in source:
                computed[key] = i
                source[key] = first + i
        if computed:
            chosen = list(computed.values())
            ends = np.array([entrants[i].common for i in chosen])
            alike = [(key.tokens, key.scopes) for key in computed]
            rows = first + np.array(chosen)
            ids = [0 if self.effects is None else self.effects.new() for _ in computed]
            self._start_ids |= dict(zip(computed, ids, strict=True))
            self._prefill([entrants[i] for i in chosen], rows, np.zeros_like(ends), ends, ids, histories=alike)
        copies = [
            (source[key], first + i, entrants[i].common)
            for i, key in enumerate(starts)
            if key is not None and source[key] != first + i
        ]
        if copies:
            sources, targets, lengths = map(np.array, zip(*copies, strict=True))
            self.slots.copy(*(self._places(rows, np.zeros_like(lengths), lengths) for rows in (sources, targets)))

    def _prefill(
        self,
        entrants: Sequence[Entrant],
        rows: Ints,
        begins: Ints,
        ends: Ints,
        ids: Sequence[int],
        histories: Sequence[Hashable] | None = None,
    ) -> Passed | None:
        """Run the tokens begins[i] to ends[i] of prompts, whose slots `rows` hold what comes before.

        With `histories`, the tokens are what several prompts begin with: nothing is read from the pass.
        """
        found = layouts(
            [entrant.prompt for entrant in entrants] if histories is None else histories,
            [[o for o in entrant.operations if acts_on_prompts(o)] for entrant in entrants],
            share=self.share_prefill,
        )
        monitor = self.monitor if histories is None else None
        passes = [_Prefill(self, entrants, layout, rows, begins, ends, monitor) for layout in found]
        passed = self._forward(passes, read=histories is None)
        for one in passes:
            self._record(one, ids, begins)
        return passed

    def _record(self, one: _Pass, ids: Sequence[int], bases: Ints, drafts: bool = False) -> None:
        if self._shared is not None:
            members = None if one.alone else one.layout.members
            self._shared.record(one.program.changes(), members, np.array(ids), bases, drafts=drafts)

    def settle(self) -> None:
        """Count what waits to be counted."""
        if self._shared is not None:
            self._shared.settle()

    def _places(self, rows: Ints, begins: Ints, lengths: Ints) -> Tensor:
        """Return where positions begins[i] to begins[i] + lengths[i] of slots lie."""
        return torch.from_numpy(ranges(rows * self.slots.length + begins, lengths)).to(self.lean.device)

    def step(self, tokens: Tensor) -> Passed:
        self._histories = self._numbered(list(zip(self._histories, tokens.tolist(), strict=True)))
        passed = self._read(tokens)
        self._positions = [position + 1 for position in self._positions]
        return passed

    def verify(self, tokens: Tensor, drafts: Sequence[tuple[int, ...]]) -> Passed:
        self._histories = self._numbered(list(zip(self._histories, tokens.tolist(), strict=True)))
        passed = self._read(tokens, drafts)
        if not bool(passed.logits.amax(dim=-1).isfinite().all()):
            # A draft that overflows where no chosen token does would reach its row's other tokens, for 0 x NaN is NaN.
            counts = np.array([len(row) for row in drafts])
            begins = np.array(self._positions) + 1
            self.slots.clear(self._places(np.arange(len(counts)), begins, counts))
            if self._shared is not None:
                self._shared.forget()
            passed = self._read(tokens)
        self._drafts = drafts
        self._positions = [position + 1 for position in self._positions]
        return passed

    def accept(self, n_accepted: Sequence[int]) -> None:
        if self._shared is not None:
            self._shared.settle(n_accepted)
        for i in range(max(n_accepted)):
            # One at a time, so that rows with the same tokens have the same history, however many they accept.
            grown = [
                (history, drafts[i]) if i < n else history
                for history, drafts, n in zip(self._histories, self._drafts, n_accepted, strict=True)
            ]
            self._histories = self._numbered(grown)
        self._positions = [position + n for position, n in zip(self._positions, n_accepted, strict=True)]

    def _read(self, tokens: Tensor, drafts: Sequence[tuple[int, ...]] | None = None) -> Passed:
        """Run a token of each row, and its drafts, from the rows' positions on."""
        self.settle()
        found = layouts(
            self._histories if drafts is None else list(zip(self._histories, drafts, strict=True)),
            [[o for o in row.operations if not is_identity(o)] for row in self.rows],
            share=self.share_decoding,
        )
        passes = [_Decode(self, tokens, self._positions, layout, self._programs, drafts) for layout in found]
        bounded = any(operation.region.bounded for row in self.rows for operation in row.operations)
        if drafts is None and not bounded:  # the next pass may well be alike
            self._programs = {one.leaders: one.program for one in passes}
        passed = self._forward(passes)
        assert passed is not None
        for one in passes:
            self._record(one, self._ids, np.array(self._positions), drafts=drafts is not None)
        if drafts is None:
            return passed
        return Passed(passed.logits, passed.monitored, tuple(1 + len(row) for row in drafts))

    def keep(self, order: Sequence[int]) -> None:
        self.settle()
        for new, old in enumerate(order):
            if new != old:
                self.slots.move(old, new, self._positions[old])
        self.rows = [self.rows[old] for old in order]
        self._ids = [self._ids[old] for old in order]
        self._positions = [self._positions[old] for old in order]
        self._histories = [self._histories[old] for old in order]
        self._starts = [self._starts[old] for old in order]
        self._programs = {}

    def _numbered(self, histories: Sequence[Hashable]) -> list[Hashable]:
        """Return a number for each history, equal for equal ones and never used before."""
        numbers: dict[Hashable, int] = {}
        for history in histories:
            numbers.setdefault(history, self._n_histories + len(numbers))
        self._n_histories += len(numbers)
        return [numbers[history] for history in histories]

    def _place(self, n: int) -> Tensor:
        """Return memory for the logits of n rows, overwritten by the next pass.

        They are so large that the allocator gives theirs back each time; touching it anew takes a sixth of the pass
        through the head.
        """
        if self._logits is None or len(self._logits) < n:
            self._logits = None
            self._logits = torch.empty((n, self.lean.vocabulary), device=self.lean.device)
        return self._logits[:n]

    def _forward(self, passes: Sequence[_Pass], *, read: bool = True) -> Passed | None:
        """Run the model through layouts that follow each other; return what it finds of the tokens that are read."""
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
        if not read:
            return None
        seen.update(current.seen())
        logits = current.logits(h, self._place)
        monitored = None if self.monitor is None else torch.stack([seen[site] for site in self.monitor.units], dim=1)
        return Passed(logits, monitored)


class _Pass:
    """A forward pass from one block on: the tokens of each segment, and what happens to them.

    Logits and projections are read of each segment's last token, or of `every` token.
    """

    def __init__(
        self, lean: LeanLlama, layout: Layout, lengths: Ints, first: Ints, n_rows: int, *, every: bool = False
    ):
        self.lean, self.layout, self.lengths = lean, layout, lengths
        self.starts: Ints = np.cumsum(lengths) - lengths
        self.segment_of = np.array(layout.segment_of(n_rows))
        self.alone = len(lengths) == n_rows and bool((self.segment_of == np.arange(n_rows)).all())
        self.last = self.tensor(np.arange(lengths.sum()) if every else self.starts + lengths - 1)
        # Of each row in turn: which of the tokens that are read are its own.
        self.read_of = self.tokens_of_rows() if every else self.segment_of
        self._rotary = lean.rotary(self.tensor(ranges(first, lengths)))
        self.ids: Tensor  # [token]
        self.program: Program
        self.attend: Attend

    def tensor(self, numbers: Ints) -> Tensor:
        return torch.from_numpy(numbers).to(self.lean.device)

    def tokens_of_rows(self) -> Ints:
        """Return of each row in turn which tokens of the pass are its own."""
        return ranges(self.starts[self.segment_of], self.lengths[self.segment_of])

    def by_row(self, values: Tensor) -> Tensor:
        """Return values of the tokens that are read by segment as those by row."""
        return values if self.alone else values.index_select(0, self.tensor(self.read_of))

    def logits(self, h: Tensor, place: Callable[[int], Tensor]) -> Tensor:
        """Return logits [token read, vocabulary] by row; `place` returns where so many tokens' may lie."""
        if len(self.last) == len(self.read_of):  # to reorder hidden states costs nothing beside logits
            last = self.by_row(self.last)
            return self.lean.logits(h.index_select(0, last), place(len(last)))
        return self.by_row(self.lean.logits(h.index_select(0, self.last), place(len(self.last))))

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
        """Return what was monitored while this layout ran, [token read by row, direction] at each site."""
        return {site: self.by_row(values) for site, values in self.program.seen.items()}


class _Prefill(_Pass):
    """Prompts that enter, or what several of them begin with: positions begins[i] to ends[i] of each."""

    def __init__(
        self,
        runner: LeanRunner,
        entrants: Sequence[Entrant],
        layout: Layout,
        rows: Ints,
        begins: Ints,
        ends: Ints,
        monitor: MonitorPlan | None,
    ):
        leading = np.array([members[0] for members in layout.members])
        first, stop = begins[leading], ends[leading]
        super().__init__(runner.lean, layout, stop - first, first, len(entrants))
        leaders = [(entrants[i], int(begins[i]), int(ends[i])) for i in leading]
        tokens = [token for leader, begin, end in leaders for token in leader.prompt[begin:end]]
        self.ids = torch.tensor(tokens, device=self.lean.device)
        segments = [
            Segment(
                leader.operations,
                len(leader.prompt),
                start=int(start),
                length=end - begin,
                first=begin,
                labels=None if runner.effects is None else runner.effects.labels(leader.operations),
            )
            for (leader, begin, end), start in zip(leaders, self.starts, strict=True)
        ]
        self.program = Program(segments, self.lean.device, monitor, sinks=runner.sinks)
        # Every row's slot gets the keys of its segment.
        slots = runner.slots
        causal = SlotCausal(self.lean, slots, rows[leading].tolist(), first.tolist(), self.lengths.tolist())
        of_row = self.lengths[self.segment_of]
        places = runner._places(rows, begins, of_row)
        sources = None if self.alone else self.tensor(self.tokens_of_rows())

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            held = (k, v) if sources is None else (k.index_select(0, sources), v.index_select(0, sources))
            slots.write(layer, places, *held)
            return causal(layer, q, k, v)

        self.attend = attend


class _Decode(_Pass):
    """One more token of every row, and its drafts."""

    def __init__(
        self,
        runner: LeanRunner,
        tokens: Tensor,
        positions: Sequence[int],
        layout: Layout,
        programs: dict[tuple[int, ...], Program],
        drafts: Sequence[tuple[int, ...]] | None = None,
    ):
        self.leaders = tuple(rows[0] for rows in layout.members)
        leading = list(self.leaders)
        counts = np.array([1] * len(positions) if drafts is None else [1 + len(row) for row in drafts])
        at = np.array(positions)[leading]
        super().__init__(runner.lean, layout, counts[leading], at, len(positions), every=drafts is not None)
        leaders = None if self.alone else self.tensor(np.array(leading))
        self.ids = tokens if leaders is None else tokens.index_select(0, leaders)
        if drafts is not None:
            chosen = self.ids.tolist()
            ids = [token for row, first in zip(leading, chosen, strict=True) for token in (first, *drafts[row])]
            self.ids = torch.tensor(ids, device=self.lean.device)
        program = None if drafts is not None else programs.get(self.leaders)
        if program is None:
            rows = [runner.rows[row] for row in self.leaders]
            labels = None if runner.effects is None else [runner.effects.labels(row.operations) for row in rows]
            places = zip(self.starts.tolist(), self.lengths.tolist(), at.tolist(), strict=True)
            segments = [
                Segment(row.operations, len(row.prompt), start, length, first, None if labels is None else labels[i])
                for i, (row, (start, length, first)) in enumerate(zip(rows, places, strict=True))
            ]
            program = Program(segments, self.lean.device, runner.monitor, every=drafts is not None, sinks=runner.sinks)
        self.program = program
        program.seen.clear()
        shared = None if leaders is None else (leaders, self.tensor(self.tokens_of_rows()))
        self.attend = SlotAttention(self.lean, runner.slots, positions, shared, counts.tolist())
