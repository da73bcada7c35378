"""Per-row interventions in one forward pass: which tokens change at which site, without a loop over rows or tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from store.conditions import MonitorPlan, Operation
from store.sites import Site
from store.study_interventions import TokenRange


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one row in a forward pass whose tokens lie in one dimension."""

    operations: Sequence[Operation]  # in the condition's order
    prompt_length: int  # of the row
    start: int  # index of the segment's first token in the pass
    length: int
    first: int = 0  # position of that token in its row


@dataclass(frozen=True)
class _Step:
    """The same kind of operation at one site for several tokens of a pass."""

    kind: str
    tokens: Tensor  # [n] int64, indices in the pass, each once
    table: Tensor  # [operation, rank, d_model] float32
    which: Tensor  # [n] int64, the operation of each token
    values: Tensor  # [operation, 1] float32: what a clamp sets the projection to

    def changed(self, h: Tensor) -> Tensor:
        """Return the tokens' values after the operation, [n, d_model] in the dtype of h [token, d_model]."""
        x = h.index_select(0, self.tokens)
        y = x.float()
        # Sums over d_model for each token on its own, so that they do not depend on the other tokens.
        v = self.table[0] if len(self.table) == 1 else self.table.index_select(0, self.which)
        if self.kind == "add":
            return (y + v.reshape(-1, v.shape[-1])).to(x.dtype)
        if self.table.shape[1] > 1:
            v = v.expand(len(y), -1, -1)
            along = torch.bmm(v, y[..., None])  # [n, rank, 1]
            return (y - torch.bmm(along.mT, v)[:, 0]).to(x.dtype)
        v = v.reshape(-1, v.shape[-1])
        along = (y * v).sum(-1, keepdim=True)
        if self.kind == "clamp":
            return (y + (self.values.index_select(0, self.which) - along) * v).to(x.dtype)
        return (y - along * v).to(x.dtype)


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
    ):
        """With `every`, all tokens of the segments are monitored instead of their last ones."""
        self._steps = _steps(segments, device)
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
        for step in self._steps.get(site, ()):
            before = None if site in self._checked else h.clone()
            y = step.changed(h)
            h.index_copy_(0, step.tokens, y)
            if before is not None:
                _assert_exactly(site, step, before, y, h)
        self._checked.add(site)
        units = self._units.get(site)
        if units is not None:
            self.seen[site] = h.index_select(0, self._read).float() @ units.to(h.device).T
        return h

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

    def __init__(self, rows: Sequence[Sequence[Operation]], device: torch.device, monitor: MonitorPlan | None = None):
        self.device, self.n_rows = device, len(rows)
        self._rows, self._monitor = tuple(rows), monitor
        self._program: Program | None = None
        self._decoding = False

    def begin(self, mask: Tensor, *, decoding: bool) -> None:
        """Tell what the next forward pass holds: its real tokens [row, token], and prompts or responses.

        A pass that is not decoding holds whole prompts.

        Raises:
            ValueError: if the mask has another number of rows than the batch.
        """
        if len(mask) != self.n_rows:
            raise ValueError(f"the program is for {self.n_rows} rows, the forward pass has {len(mask)}")
        if decoding and self._decoding:
            return  # one token for each row, as before
        self._decoding = decoding
        real, width = mask.bool().cpu(), mask.shape[1]
        starts, lengths = real.int().argmax(dim=1).tolist(), real.sum(dim=1).tolist()
        segments = [
            Segment([o for o in row if acts_on_responses(o)], 0, start=index * width + start, length=length)
            if decoding
            else Segment(row, length, start=index * width + start, length=length)
            for index, (row, start, length) in enumerate(zip(self._rows, starts, lengths, strict=True))
        ]
        self._program = Program(segments, self.device, self._monitor)

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


def _assert_exactly(site: Site, step: _Step, before: Tensor, written: Tensor, after: Tensor) -> None:
    others = torch.ones(len(after), dtype=torch.bool, device=after.device)
    others[step.tokens] = False
    landed = torch.equal(_bits(after[step.tokens]), _bits(written))
    assert landed, f"{site}: what {step.kind} computed did not reach the stream"
    kept = torch.equal(_bits(after[others]), _bits(before[others]))
    assert kept, f"{site}: {step.kind} changed tokens of other rows"


def _bits(h: Tensor) -> Tensor:
    return h.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[h.element_size()])


def scope_of(operation: Operation, prompt_length: int) -> tuple[int, int | None]:
    """Return which positions of a row an operation acts on, half-open; None is the end of the row.

    Raises:
        ValueError: if a range of tokens lies outside the prompt.
    """
    match operation.tokens:
        case "all":
            return 0, None
        case "prompt":
            return 0, prompt_length
        case "response":
            return prompt_length, None
        case TokenRange() as tokens:
            return tokens.span(prompt_length)


def acts_on_prompts(operation: Operation) -> bool:
    """Tell whether an operation changes anything while prompts are read."""
    return operation.tokens != "response" and not is_identity(operation)


def acts_on_responses(operation: Operation) -> bool:
    """Tell whether an operation changes anything while responses are read or generated."""
    return operation.tokens in ("all", "response") and not is_identity(operation)


def is_identity(operation: Operation) -> bool:
    """Tell whether an operation leaves everything as it is: -0.0 + 0.0 would not, so zeros are never added."""
    return operation.kind == "add" and not operation.vectors.any()


def _steps(segments: Sequence[Segment], device: torch.device) -> dict[Site, tuple[_Step, ...]]:
    """Collect the operations of all segments by site, order in the condition, kind and rank."""
    # A condition's i-th operation at a site comes before its (i+1)-th; rows are independent of each other.
    found: dict[Site, dict[tuple[int, str, int], tuple[dict[int, Operation], list[tuple[int, int, int]]]]] = {}
    for segment in segments:
        order: dict[Site, int] = {}
        for operation in segment.operations:
            begin, end = scope_of(operation, segment.prompt_length)
            begin = max(begin - segment.first, 0)
            end = segment.length if end is None else min(end - segment.first, segment.length)
            if begin >= end or is_identity(operation):
                continue
            step = order.get(operation.site, 0)
            order[operation.site] = step + 1
            bucket = (step, operation.kind, len(operation.vectors))
            operations, ranges = found.setdefault(operation.site, {}).setdefault(bucket, ({}, []))
            operations.setdefault(id(operation), operation)
            ranges.append((segment.start + begin, end - begin, id(operation)))
    steps: dict[Site, tuple[_Step, ...]] = {}
    for site, buckets in found.items():
        made = []
        for (_, kind, _), (operations, ranges) in sorted(buckets.items(), key=lambda item: item[0]):
            number = {key: index for index, key in enumerate(operations)}
            starts = np.array([start for start, _, _ in ranges])
            lengths = np.array([length for _, length, _ in ranges])
            which = np.repeat(np.array([number[key] for _, _, key in ranges]), lengths)
            before = np.cumsum(lengths) - lengths
            tokens = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
            made.append(
                _Step(
                    kind,
                    torch.from_numpy(tokens).to(device),
                    torch.from_numpy(np.stack([o.vectors for o in operations.values()])).to(device),
                    torch.from_numpy(which).to(device),
                    torch.tensor([[o.value] for o in operations.values()], dtype=torch.float32, device=device),
                )
            )
        steps[site] = tuple(made)
    return steps
