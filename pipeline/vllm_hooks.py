"""Interventions and monitors inside vLLM's worker: hooks on its decoder layers that act on its flattened token batch.

vLLM adds `ReplayExtension` to its worker class (`worker_extension_cls`) and the engine calls its methods by
`collective_rpc`. Nothing here imports vllm. Blocks of vLLM's models return two tensors whose sum is the residual
stream (the next norm adds them), or the stream itself; both are served, and `pipeline.vllm_selftest` checks it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.architecture import Architecture, find_architecture
from pipeline.interventions import Program, Segment, acts_on_responses
from pipeline.replay import next_tokens
from pipeline.vllm_selftest import Laws, Probe
from store.conditions import MonitorPlan, Operation
from store.errors import ModelError
from store.sites import Site
from store.study import Decoding

JOB = "resid_job"  # key in a request's extra_args: its number in the work that has begun


class SiteProgram(Protocol):
    """What acts at sites in one forward pass: a `Program`, or the self-test's `Probe`."""

    def __call__(self, site: Site, h: Tensor) -> Tensor: ...
    def writes(self, site: Site) -> bool: ...
    def tokens(self, site: Site) -> Tensor: ...


@dataclass(frozen=True)
class Work:
    """What the requests of one run ask for, by their number."""

    conditions: Sequence[Sequence[Operation]]  # each once
    which: Sequence[int]  # [job]: its condition
    decoding: Decoding
    monitor: MonitorPlan | None = None
    noise: npt.NDArray[np.float64] | None = None  # [job, token]: uniform numbers, None for greedy decoding

    @property
    def sites(self) -> frozenset[Site]:
        written = {operation.site for operations in self.conditions for operation in operations}
        return frozenset(written | set(self.monitor.units if self.monitor is not None else ()))


@dataclass
class Record:
    """What a run left behind in the worker."""

    broken: set[int] = field(default_factory=set)  # jobs whose logits held NaN or infinity
    monitored: dict[int, dict[int, npt.NDArray[np.float32]]] = field(default_factory=dict)  # job -> pass -> values
    passes: int = 0
    chunks: int = 0  # pieces of prompts after which prompts went on
    resumed: int = 0  # pieces of rows whose keys and values were dropped and computed again, responses included


@dataclass(frozen=True)
class _Pass:
    """One forward pass: which job each request of the batch is, and where it stands."""

    program: Program
    jobs: tuple[int, ...]  # [request]
    token: npt.NDArray[np.int64]  # [request]: number of the token that this pass chooses; below 0 inside the prompt
    rows: dict[Site, Tensor]  # tokens that change, as they are asked for


class ReplayExtension:
    """Methods that vLLM's worker gets; state lives in one attribute of it."""

    model_runner: Any

    def resid_begin(self, work: Work) -> None:
        """Put hooks where the work acts; requests may follow.

        Raises:
            ModelError: if the model has no such site, or vLLM's model keeps it in another form.
        """
        self.resid_end()
        self._resid_hooks: StepHooks | None = StepHooks(self.model_runner, work)

    def resid_end(self) -> Record:
        """Take the hooks away and return what they recorded."""
        hooks: StepHooks | None = getattr(self, "_resid_hooks", None)
        self._resid_hooks = None
        return Record() if hooks is None else hooks.close()

    def resid_self_test_begin(self) -> None:
        """Put the self-test's hooks at every site; one request may follow."""
        self.resid_end()
        self._resid_probe = ProbeHooks(self.model_runner.model)

    def resid_self_test_end(self) -> Laws:
        """Take the self-test's hooks away and return what it measured."""
        return self._resid_probe.close()

    def resid_layers(self) -> tuple[int, int]:
        """Return the number of layers and the width of the model."""
        found = find_architecture(self.model_runner.model)
        return found.n_layers, found.d_model


class StepHooks:
    """Hooks of one run. The index of a pass is built once, before its first block; sites then take it as it is."""

    def __init__(self, runner: Any, work: Work):
        self.runner, self.work, self.record = runner, work, Record()
        self._acting = [[o for o in operations if acts_on_responses(o)] for operations in work.conditions]
        self._bounded = [any(o.region.bounded for o in operations) for operations in work.conditions]
        self._pass: _Pass | None = None
        self._programs: dict[tuple[int, ...], tuple[Program, dict[Site, Tensor]]] = {}  # of decoding, by conditions
        model = runner.model
        # First of all: this may raise, and then nothing is left behind.
        self._handles = hook_sites(find_architecture(model), work.sites, self._current, self._rows)
        self._handles.append(model.register_forward_pre_hook(lambda module, args: self._begin()))
        self._handles.append(model.register_forward_hook(lambda module, args, output: self._done()))
        self._compute_logits = model.compute_logits
        model.compute_logits = self._logits

    def close(self) -> Record:
        for handle in self._handles:
            handle.remove()
        del self.runner.model.compute_logits  # the class's own is behind it
        return self.record

    def _begin(self) -> None:
        """Find out what the pass holds: each request's tokens in the batch and in its row."""
        batch, runner = self.runner.input_batch, self.runner
        n = batch.num_reqs
        self._pass = None
        if n == 0:  # a trial pass of vLLM's own
            return
        jobs = tuple(runner.requests[name].sampling_params.extra_args[JOB] for name in batch.req_ids[:n])
        starts = runner.query_start_loc.np[: n + 1].astype(np.int64)
        first = batch.num_computed_tokens_cpu[:n].astype(np.int64)
        prompts = batch.num_prompt_tokens[:n].astype(np.int64)
        lengths = np.diff(starts)
        token = first + lengths - prompts
        which = tuple(self.work.which[job] for job in jobs)
        if (lengths == 1).all() and (first >= prompts).all():
            found = None if any(self._bounded[c] for c in which) else self._programs.get(which)
            if found is None:
                self._programs.clear()  # batches change for good
                stand = zip(which, prompts.tolist(), first.tolist(), strict=True)
                segments = [
                    Segment(self._acting[c], p, start=i, length=1, first=f) for i, (c, p, f) in enumerate(stand)
                ]
                found = self._programs[which] = (self._program(segments), {})
            program, rows = found
        else:
            pieces = zip(which, prompts.tolist(), starts.tolist(), lengths.tolist(), first.tolist(), strict=False)
            segments = [Segment(self.work.conditions[c], *where) for c, *where in pieces]
            program, rows = self._program(segments), {}
        self.record.passes += 1
        self.record.chunks += int((token < 0).sum())
        self.record.resumed += int(((token > 0) & (lengths > 1)).sum())
        self._pass = _Pass(program, jobs, token, rows)

    def _current(self) -> SiteProgram | None:
        return None if self._pass is None else self._pass.program

    def _program(self, segments: Sequence[Segment]) -> Program:
        return Program(segments, self.runner.device, self.work.monitor)

    def _rows(self, site: Site) -> Tensor:
        assert self._pass is not None
        rows = self._pass.rows.get(site)
        if rows is None:
            rows = self._pass.rows[site] = self._pass.program.tokens(site)
        return rows

    def _done(self) -> None:
        if self._pass is None:
            return
        values = self._pass.program.monitored()
        if values is None:
            return
        found = values.cpu().numpy()
        for index, (job, token) in enumerate(zip(self._pass.jobs, self._pass.token.tolist(), strict=True)):
            if token >= 0:  # again after a preemption: as before
                self.record.monitored.setdefault(job, {}).setdefault(token, found[index])

    def _logits(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Look for NaN and infinity; where texts are sampled, leave vLLM nothing but the token that our rule takes."""
        logits: Tensor | None = self._compute_logits(*args, **kwargs)
        if logits is None or self._pass is None:
            return logits
        jobs, token = self._pass.jobs, self._pass.token
        assert len(logits) == len(jobs), f"vLLM asks for {len(logits)} rows of logits in a pass of {len(jobs)} requests"
        broken = ~logits.amax(dim=-1).isfinite()  # the maximum of a row with NaN is NaN
        if bool(broken.any()):
            self.record.broken |= {jobs[row] for row in broken.nonzero().flatten().tolist() if token[row] >= 0}
        if self.work.noise is None:
            return logits
        uniform = torch.from_numpy(self.work.noise[list(jobs), token.clip(min=0)]).to(logits.device)
        chosen = next_tokens(logits.float(), self.work.decoding, uniform)
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class ProbeHooks:
    """Hooks of the self-test: every site is written and read in the first pass that comes."""

    def __init__(self, model: Any):
        architecture = find_architecture(model)
        self.probe = Probe(architecture.n_layers, architecture.d_model)
        self._handles = hook_sites(architecture, self.probe.sites, lambda: self.probe, self.probe.tokens)

    def close(self) -> Laws:
        for handle in self._handles:
            handle.remove()
        return self.probe.laws()


Current = Callable[[], SiteProgram | None]


def hook_sites(
    architecture: Architecture, sites: frozenset[Site], current: Current, rows: Callable[[Site], Tensor]
) -> list[Any]:
    """Let what `current` returns act at sites in every pass; `rows` gives the tokens that it changes there.

    Raises:
        ModelError: if the model has no such site, or keeps it in another form; no hook is left then.
    """
    bindings = {site: architecture.binding(site) for site in sorted(sites)}
    inputs: dict[Site, tuple[int, int | None]] = {}  # which parameters of a block hold the stream
    for site, binding in bindings.items():
        if binding.scale != 1:
            raise ModelError(f"site {site}: the vLLM engine does not serve it where a residual multiplier applies")
        if binding.where == "input":
            names = list(inspect.signature(binding.module.forward).parameters)
            if "hidden_states" not in names:
                raise ModelError(f"site {site}: vLLM's {type(binding.module).__name__} has no input hidden_states")
            inputs[site] = (names.index("hidden_states"), names.index("residual") if "residual" in names else None)
    handles: list[Any] = []
    for site, binding in bindings.items():
        if site in inputs:
            hook = _on_input(site, inputs[site], current, rows)
            handles.append(binding.module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            whole = site.component == "resid_post"  # of the other two, what comes with the tensor is no residual
            handles.append(binding.module.register_forward_hook(_on_output(site, whole, current, rows)))
    return handles


def _on_input(
    site: Site, at: tuple[int, int | None], current: Current, rows: Callable[[Site], Tensor]
) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        program = current()
        if program is None:
            return None

        def given(name: str, index: int | None) -> Any:
            return None if index is None else args[index] if index < len(args) else kwargs.get(name)

        changed = _changed(site, given("hidden_states", at[0]), given("residual", at[1]), program, rows)
        if changed is None:
            return None
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, index, value in zip(("hidden_states", "residual"), at, changed, strict=True):
            if index is not None and index < len(args):
                new_args[index] = value
            elif name in kwargs:
                new_kwargs[name] = value
        return tuple(new_args), new_kwargs

    return hook


def _on_output(site: Site, whole: bool, current: Current, rows: Callable[[Site], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        program = current()
        if program is None:
            return None
        in_tuple = isinstance(output, tuple)
        hidden = output[0] if in_tuple else output
        residual = output[1] if in_tuple and whole and len(output) > 1 else None
        changed = _changed(site, hidden, residual, program, rows)
        if changed is None:
            return None
        if not in_tuple:
            return changed[0]
        return (*changed, *output[2:]) if whole and len(output) > 1 else (changed[0], *output[1:])

    return hook


def _changed(
    site: Site, hidden: Any, residual: Any, program: SiteProgram, rows: Callable[[Site], Tensor]
) -> tuple[Tensor, Tensor | None] | None:
    """Run a program at a site; return both parts of the stream, or None where they stay.

    A token that changes has the whole stream in the first part and zero in the second: adding the difference to one
    part would lose bits where the other is large. Parts of the other tokens keep their bits.
    """
    if not isinstance(hidden, Tensor) or hidden.ndim != 2:
        found = f"a tensor of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ModelError(f"site {site}: vLLM's model passes {found} where [token, d_model] was expected")
    h = hidden.clone() if residual is None else hidden + residual
    program(site, h)
    if not program.writes(site):
        return None
    if residual is None:
        return h, None
    tokens = rows(site)
    return hidden.index_copy(0, tokens, h.index_select(0, tokens)), residual.index_fill(0, tokens, 0)
