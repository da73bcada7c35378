"""Per-row interventions in one forward pass: which tokens change at which site, without a loop over rows or tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.effects import Change, Effects, Ints
from store.conditions import MonitorPlan, Operation
from store.sites import Site
from store.study_interventions import Sink

_Bucket = tuple[int, str, int, Sink]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one row in a forward pass whose tokens lie in one dimension."""

    operations: Sequence[Operation]  # in the condition's order
    prompt_length: int  # of the row
    start: int  # index of the segment's first token in the pass
    length: int
    first: int = 0  # position of that token in its row
    labels: Sequence[int] | None = None  # of the operations, where what they change is recorded (`pipeline.effects`)


@dataclass(frozen=True)
class _Step:
    """The same kind of operation at one site for several tokens of a pass."""

    kind: str
    tokens: Tensor  # [n] int64, indices in the pass, each once
    table: Tensor  # [operation, rank, d_model] float32
    which: Tensor  # [n] int64, the operation of each token
    values: Tensor  # [operation, rank] float32: what the projections become
    parameters: (
        Tensor  # [operation, 1] float32: the fraction of a project_out; -1, 0, 1 for a clamp at_most, both, at_least
    )
    affine: bool  # whether any operation needs more than a plain projection or clamp
    sink: Sink
    owners: Ints  # [n] the segment of each token
    offsets: Ints  # [n] of each token in its segment
    labels: Ints | None  # [n]

    def changed(self, x: Tensor, norms: Tensor | None, bound: float) -> Tensor:
        """Return x [n, d_model] after the operation, in its dtype; `norms` [token] tells which tokens are sinks."""
        if norms is None or self.sink == "with":
            return self._acted(x)
        sinks = norms.index_select(0, self.tokens) > bound
        acted = sinks if self.sink == "only" else ~sinks
        return torch.where(acted[:, None], self._acted(x), x)

    def _acted(self, x: Tensor) -> Tensor:
        y = x.float()
        # Sums over d_model for each token on its own, so that they do not depend on the other tokens.
        v = self.table[0] if len(self.table) == 1 else self.table.index_select(0, self.which)
        if self.kind == "add":
            return (y + v.reshape(-1, v.shape[-1])).to(x.dtype)
        if self.table.shape[1] > 1:
            v = v.expand(len(y), -1, -1)
            along = torch.bmm(v, y[..., None])  # [n, rank, 1]
            if self.affine:
                along = (along - self.values.index_select(0, self.which)[..., None]) * self._fractions()[..., None]
            return (y - torch.bmm(along.mT, v)[:, 0]).to(x.dtype)
        v = v.reshape(-1, v.shape[-1])
        along = (y * v).sum(-1, keepdim=True)
        if self.kind == "clamp":
            missing = self.values.index_select(0, self.which) - along
            if self.affine:
                sides = self.parameters.index_select(0, self.which)
                touched = missing * sides >= 0  # a side of 0: both
                return torch.where(touched, (y + missing * v).to(x.dtype), x)
            return (y + missing * v).to(x.dtype)
        if self.affine:
            along = (along - self.values.index_select(0, self.which)) * self._fractions()
        return (y - along * v).to(x.dtype)

    def _fractions(self) -> Tensor:
        return self.parameters.index_select(0, self.which)  # [n, 1]


class Program:
    """Interventions and monitors of one layout of tokens, for any number of forward passes in that layout.

    Arithmetic is float32, rounded to the stream's dtype after each operation. Tokens without an operation at a site
    keep their bits; so do those to which only a zero vector is added.

    At its first visit to a site the program asserts that each operation changed exactly the tokens that it names.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        device: torch.device,
        monitor: MonitorPlan | None = None,
        *,
        every: bool = False,
        sinks: Mapping[Site, float] | None = None,
    ):
        """With `every`, all tokens of the segments are monitored instead of their last ones.

        `sinks` are the norms beyond which a token is a sink (`pipeline.sink_bounds`). Where all segments have
        labels, `changes` says after a pass how much each token changed.

        Raises:
            ValueError: if an operation asks for sink tokens, and nothing says what they are.
        """
        self._steps = _steps(segments, device)
        self._sinks = sinks
        if sinks is None and any(step.sink != "with" for steps in self._steps.values() for step in steps):
            raise ValueError("an operation asks for tokens by sinks, and the norms that make a sink are not given")
        self._changes: list[Change] = []
        units = monitor.units if monitor is not None else {}
        self._units = {site: torch.from_numpy(vectors).to(device) for site, vectors in units.items()}
        read = [
            token
            for segment in segments
            for token in range(segment.start, segment.start + segment.length)[0 if every else -1 :]
        ]
        self._read = torch.tensor(read, device=device)
        # [segment, direction] float32, with `every` [token, direction]: projections read in the last pass
        self.seen: dict[Site, Tensor] = {}
        self._checked: set[Site] = set()
        self.sites = frozenset({*self._steps, *self._units})

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """Change h [token, d_model] in place as the operations at a site say, and read what is monitored there."""
        steps = self._steps.get(site, ())
        bound = 0.0 if self._sinks is None else self._sinks.get(site, float("inf"))
        # As tokens arrive: an operation in front at the same site does not make a sink.
        norms = torch.linalg.vector_norm(h.float(), dim=-1) if any(step.sink != "with" for step in steps) else None
        for step in steps:
            before = None if site in self._checked else h.clone()
            x = h.index_select(0, step.tokens)
            y = step.changed(x, norms, bound)
            h.index_copy_(0, step.tokens, y)
            if before is not None:
                _assert_exactly(site, step, before, y, h)
            if step.labels is not None:
                self._record(step, x, y, norms, bound)
        self._checked.add(site)
        units = self._units.get(site)
        if units is not None:
            self.seen[site] = h.index_select(0, self._read).float() @ units.to(h.device).T
        return h

    def _record(self, step: _Step, x: Tensor, y: Tensor, norms: Tensor | None, bound: float) -> None:
        assert step.labels is not None
        wide = x.float()
        squares, before = (y.float() - wide).square().sum(-1), wide.square().sum(-1)
        if norms is not None and step.sink != "with":
            # Tokens that the scope leaves out are not tokens of the operation.
            out = norms.index_select(0, step.tokens) > bound
            squares = squares.masked_fill(out if step.sink == "without" else ~out, -1.0)
        self._changes.append(Change(step.owners, step.labels, step.offsets, squares, before))

    def changes(self) -> list[Change]:
        """Return what happened in the last pass, and forget it."""
        found, self._changes = self._changes, []
        return found

    def writes(self, site: Site) -> bool:
        """Tell whether the program changes anything at a site."""
        return site in self._steps

    def tokens(self, site: Site) -> Tensor:
        """Indices in the pass of the tokens that change at a site, ascending, each once."""
        found: Tensor = torch.unique(torch.cat([step.tokens for step in self._steps[site]]))
        return found

    def monitored(self) -> Tensor | None:
        """Projections of each segment's last token in the last forward pass, [segment, site, direction] float32;
        None if nothing is monitored."""
        if not self._units:
            return None
        return torch.stack([self.seen[site] for site in self._units], dim=1)


class BatchProgram:
    """A `Program` for padded batches of [row, token, d_model], to be run by `pipeline.hooks.on_sites`."""

    def __init__(
        self,
        rows: Sequence[Sequence[Operation]],
        device: torch.device,
        monitor: MonitorPlan | None = None,
        *,
        sinks: Mapping[Site, float] | None = None,
        labels: Sequence[Sequence[int]] | None = None,
    ):
        """`sinks` are those of a `Program`; `labels` of each row's operations have what they change recorded."""
        self.device, self.n_rows = device, len(rows)
        self._rows, self._monitor, self._sinks, self._labels = tuple(rows), monitor, sinks, labels
        self._alone: dict[int, Operation] = {}  # operations as they act on responses
        self._bounded = any(operation.region.bounded for row in rows for operation in row)
        self._program: Program | None = None
        self._decoding = False

    def begin(self, mask: Tensor, *, decoding: bool, read: Sequence[int] | None = None) -> None:
        """Tell what the next forward pass holds: its real tokens [row, token], and prompts or responses.

        A pass that is not decoding holds whole prompts. `read` is how many response tokens of each row came before
        one that is; it may be left out where no operation counts them.

        Raises:
            ValueError: if the mask has another number of rows than the batch.
        """
        if len(mask) != self.n_rows:
            raise ValueError(f"the program is for {self.n_rows} rows, the forward pass has {len(mask)}")
        if decoding and self._decoding and not self._bounded:
            return  # one token for each row, as before
        if decoding and self._bounded and read is None:
            raise ValueError("an operation counts response tokens, and the pass does not tell where rows stand")
        self._decoding = decoding
        real, width = mask.bool().cpu(), mask.shape[1]
        starts, lengths = real.int().argmax(dim=1).tolist(), real.sum(dim=1).tolist()
        segments = []
        for index, (row, start, length) in enumerate(zip(self._rows, starts, lengths, strict=True)):
            labels = None if self._labels is None else self._labels[index]
            prompt, first = (0, 0 if read is None else read[index]) if decoding else (length, 0)
            if decoding:
                acting = [i for i, operation in enumerate(row) if acts_on_responses(operation)]
                row = [self._alone.setdefault(id(row[i]), _response_only(row[i])) for i in acting]
                labels = None if labels is None else [labels[i] for i in acting]
            segments.append(Segment(row, prompt, index * width + start, length, first, labels))
        self._program = Program(segments, self.device, self._monitor, sinks=self._sinks)

    def record(self, effects: Effects, ids: Ints, bases: Ints) -> None:
        """Hand on what the last pass changed in rows [row] of these ids, whose first tokens have these positions."""
        if self._program is None:
            return
        for change in self._program.changes():
            rows = change.segments
            effects.add(ids[rows], change.labels, bases[rows] + change.offsets, change.squares, change.before)

    def monitored(self) -> Tensor | None:
        """Projections of each row's last token in the last forward pass, [row, site, direction] float32."""
        return None if self._program is None else self._program.monitored()

    def hooks(self) -> Mapping[Site, Callable[[Tensor], Tensor | None]]:
        """Return what `pipeline.hooks.on_sites` is to run at each site in the pass that has begun."""
        assert self._program is not None, "begin() comes before every forward pass"
        return {site: self._at(site, self._program) for site in self._program.sites}

    def _at(self, site: Site, program: Program) -> Callable[[Tensor], Tensor | None]:
        def run(h: Tensor) -> Tensor | None:
            flat = h.reshape(-1, h.shape[-1])
            if not program.writes(site):
                program(site, flat)
                return None
            return program(site, flat.clone()).reshape(h.shape)

        return run


def _response_only(operation: Operation) -> Operation:
    """Return the operation for a pass that holds nothing of the prompt, whose length is then taken as 0."""
    if not operation.region.counted:
        return operation
    return replace(operation, tokens=replace(operation.region, prompt=None, parts=(), spans_in_prompt=None))


def _assert_exactly(site: Site, step: _Step, before: Tensor, written: Tensor, after: Tensor) -> None:
    others = torch.ones(len(after), dtype=torch.bool, device=after.device)
    others[step.tokens] = False
    landed = torch.equal(_bits(after[step.tokens]), _bits(written))
    assert landed, f"{site}: what {step.kind} computed did not reach the stream"
    kept = torch.equal(_bits(after[others]), _bits(before[others]))
    assert kept, f"{site}: {step.kind} changed tokens of other rows"


def _bits(h: Tensor) -> Tensor:
    return h.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[h.element_size()])


def spans_of(operation: Operation, prompt_length: int) -> tuple[tuple[int, int | None], ...]:
    """Return which positions of a row an operation acts on: ascending, half-open; None is the end of the row.

    Of a scope by sinks, these are all positions that it may act on.

    Raises:
        ValueError: if a range of tokens lies outside the prompt, or parts of the prompt are not resolved.
    """
    return operation.region.spans(prompt_length)


def acts_on_prompts(operation: Operation) -> bool:
    """Tell whether an operation changes anything while prompts are read."""
    return operation.region.prompt is not None and not is_identity(operation)


def acts_on_responses(operation: Operation) -> bool:
    """Tell whether an operation changes anything while responses are read or generated."""
    return operation.region.response is not None and not is_identity(operation)


def is_identity(operation: Operation) -> bool:
    """Tell whether an operation leaves everything as it is: -0.0 + 0.0 would not, so zeros are never added."""
    if operation.kind == "project_out":
        return operation.fraction == 0
    return operation.kind == "add" and not operation.vectors.any()


def _targets(operation: Operation) -> list[float]:
    if operation.kind == "clamp":
        return [operation.value]
    return list(operation.to or [0.0] * len(operation.vectors))


def _parameter(operation: Operation) -> float:
    return (
        {"at_most": -1.0, "both": 0.0, "at_least": 1.0}[operation.side]
        if operation.kind == "clamp"
        else (operation.fraction)
    )


def _steps(segments: Sequence[Segment], device: torch.device) -> dict[Site, tuple[_Step, ...]]:
    """Collect the operations of all segments by site, order in the condition, kind, rank and scope by sinks."""
    # A condition's i-th operation at a site comes before its (i+1)-th; rows are independent of each other.
    found: dict[Site, dict[_Bucket, tuple[dict[int, Operation], list[tuple[int, int, int, int, int, int]]]]] = {}
    recorded = all(segment.labels is not None for segment in segments)
    for number, segment in enumerate(segments):
        order: dict[Site, int] = {}
        for index, operation in enumerate(segment.operations):
            if is_identity(operation):
                continue
            inside = [
                (begin, end)
                for first, last in spans_of(operation, segment.prompt_length)
                if (begin := max(first - segment.first, 0))
                < (end := segment.length if last is None else min(last - segment.first, segment.length))
            ]
            if not inside:
                continue
            step = order.get(operation.site, 0)
            order[operation.site] = step + 1
            bucket = (step, operation.kind, len(operation.vectors), operation.region.sink)
            operations, ranges = found.setdefault(operation.site, {}).setdefault(bucket, ({}, []))
            operations.setdefault(id(operation), operation)
            label = -1 if segment.labels is None else segment.labels[index]
            for begin, end in inside:
                ranges.append((segment.start + begin, end - begin, id(operation), number, begin, label))
    steps: dict[Site, tuple[_Step, ...]] = {}
    for site, buckets in found.items():
        made = []
        for (_, kind, _, sink), (operations, ranges) in sorted(buckets.items(), key=lambda item: item[0]):
            place = {key: index for index, key in enumerate(operations)}
            starts, lengths, keys, owners, begins, labels = zip(*ranges, strict=True)
            n = np.array(lengths)
            which = np.repeat(np.array([place[key] for key in keys]), n)
            within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
            made.append(
                _Step(
                    kind,
                    torch.from_numpy(np.repeat(np.array(starts), n) + within).to(device),
                    torch.from_numpy(np.stack([o.vectors for o in operations.values()])).to(device),
                    torch.from_numpy(which).to(device),
                    torch.tensor([_targets(o) for o in operations.values()], dtype=torch.float32, device=device),
                    torch.tensor([[_parameter(o)] for o in operations.values()], dtype=torch.float32, device=device),
                    any(o.to or o.fraction != 1 or o.side != "both" for o in operations.values()),
                    sink,
                    np.repeat(np.array(owners), n),
                    np.repeat(np.array(begins), n) + within,
                    np.repeat(np.array(labels), n) if recorded else None,
                )
            )
        steps[site] = tuple(made)
    return steps
