"""The capture engine: forward passes that keep a few positions of many sites.

Rows are cut into the segments of a prefix tree, so that a common start goes through the model once; those behind others
are run after them. Models in the Llama layout take passes without padding where those are known to be right and faster
(`pipeline.packed_passes`), all others padded batches of like length through transformers' own modules
(`pipeline.prefix_cache`). See `pipeline.prefix_tree` for what is shared, `pipeline.gathering` for what is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.batching import DEVICE_PASS_TOKENS, PASS_TOKENS, by_token_budget, ran_out_of_memory, release_memory
from pipeline.gathering import Wanted
from pipeline.lean_llama import why_not
from pipeline.models import LoadedModel
from pipeline.packed_passes import PackedPass, lean_form, packed_batches
from pipeline.prefix_cache import PaddedPass
from pipeline.prefix_proof import rotary_limit, shares_prefixes
from pipeline.prefix_tree import Segment, prefix_tree, unshared
from pipeline.token_budget import TokenBudget, budget_file
from store.generation import GenerationPlan
from store.rows import Row
from store.sites import Site

# A captured vector of a batched row against the same row alone, float32: largest difference of an element relative to
# the vector's largest absolute element. Batches of another shape sum products in another order; nothing else may
# differ. Measured on SmolLM2-135M (40 rows, all sites and layers, five positions, budgets of 1 to 10,000 tokens, one
# and two threads): at most 2.1e-6 in the residual stream and 7.8e-6 in attn_out and mlp_out.
BATCH_BOUND = 5e-5


class CaptureEngine:
    """Runs a model over rows and returns their activations, whatever the batch they happen to share.

    Batches are sorted by length under a token budget (None: measured on the first passes and, given a folder, kept
    there). Out of memory halves the budget and the batch is run again; the lower budget stays. Only the wanted
    positions leave the device.
    """

    def __init__(
        self,
        model: LoadedModel,
        token_budget: int | None = None,
        share_prefixes: bool = True,
        packed: bool = True,
        remember: Path | None = None,
    ):
        self.model, self.share_prefixes = model, share_prefixes
        self._lean = lean_form(model) if packed else None
        file = None
        if remember is not None:
            file = budget_file(remember, model, "modules" if self._lean is None else "packed")
        self.budget = TokenBudget(model.device, token_budget, file)
        # What a pass costs beyond its tokens, and so what a segment with others behind it has to save.
        self.pass_tokens = PASS_TOKENS if model.device.type == "cpu" else DEVICE_PASS_TOKENS

    def run(self, rows: Sequence[Row], plan: GenerationPlan) -> dict[str, npt.NDArray[Any]]:
        """Capture rows.

        Returns:
            For each component of the plan an array [row, layer, position, d_model] in the model's compute dtype
            (averages over responses are accumulated in float32); of all tokens [token, layer, d_model], the tokens of
            the rows one after the other.

        Raises:
            torch.OutOfMemoryError: if a single row does not fit.
        """
        if self._lean is not None and why_not(self.model) is not None:
            self._lean = None  # somebody registered hooks, say, which only the model's own modules would call
        wanted = Wanted(rows, plan)
        # Layer by layer, as it is stored.
        shape = (len(plan.layers), wanted.entries, plan.d_model)
        out: dict[str, Tensor] = {
            component: torch.empty(shape, dtype=self.model.dtype) for component in plan.components
        }
        for roots in self._trees(wanted):
            self._run_tree(roots, wanted, plan, out)
        stored = {component: values.view(len(plan.layers), -1, *plan.inner) for component, values in out.items()}
        return {component: np.moveaxis(_to_numpy(values), 0, 1) for component, values in stored.items()}

    def _trees(self, wanted: Wanted) -> Iterator[list[Segment]]:
        """Yield roots of what may share passes: all rows, but for models whose rotary angles depend on the length."""
        limit = rotary_limit(self.model.architecture)
        lengths = [len(sequence) for sequence in wanted.sequences]
        apart = sorted((i for i in range(len(lengths)) if lengths[i] > limit), key=lengths.__getitem__)
        together = [i for i in range(len(lengths)) if lengths[i] <= limit]
        if together:
            sequences, shareable = [wanted.sequences[i] for i in together], wanted.shareable()
            roots = prefix_tree(sequences, [shareable[i] for i in together], self.pass_tokens)
            if not self.share_prefixes or (any(root.children for root in roots) and not self._may_share()):
                roots = unshared(sequences)
            _renumber(roots, together)
            yield roots
        for _, group in groupby(apart, key=lengths.__getitem__):
            rows = list(group)
            roots = unshared([wanted.sequences[i] for i in rows])
            _renumber(roots, rows)
            yield roots

    def _may_share(self) -> bool:
        return self._lean is not None or shares_prefixes(self.model)

    def _run_tree(self, roots: list[Segment], wanted: Wanted, plan: GenerationPlan, out: dict[str, Tensor]) -> None:
        """Run segments after those that they stand behind. Keys and values are kept for one pass of each depth."""
        stack = [_Level(roots, None)]
        while stack:
            level = stack[-1]
            if not level.batches:
                stack.pop()
                continue
            if level.budget != self.budget.tokens:
                level.cut(self.budget.tokens, self._batches)
            segments = level.batches[0]
            real = sum(len(segment.tokens) for segment in segments)
            padded = real if self._lean else len(segments) * max(len(segment.tokens) for segment in segments)
            started = time.perf_counter()
            try:
                past = self._forward(segments, level.past, wanted, plan, out)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                if len(segments) == 1:
                    raise torch.OutOfMemoryError(
                        f"a row of {segments[0].stop} tokens does not fit in memory: {error}"
                    ) from error
            else:
                level.batches.pop(0)
                self.budget.passed(level.budget, padded, real, time.perf_counter() - started)
                if past is not None:
                    children = [child for segment in segments for child in segment.children]
                    stack.append(_Level(children, past))
                continue
            # Out of the handler: the error's traceback held the failed pass's tensors.
            release_memory(self.model.device)
            self.budget.failed(padded)

    @torch.inference_mode()
    def _forward(
        self, segments: list[Segment], past: Any, wanted: Wanted, plan: GenerationPlan, out: dict[str, Tensor]
    ) -> Any:
        """Run one pass and put away what is wanted of it; return its keys and values if segments stand behind it."""
        keep = bool(segments[0].children)
        if self._lean is not None:
            one_pass: PackedPass | PaddedPass = PackedPass(self._lean, segments, past, keep)
        else:
            one_pass = PaddedPass(self.model, segments, past, keep)
        gather = wanted.of(segments, one_pass.first, self.model.device)
        seen: dict[Site, Tensor] = {}

        def reader(site: Site) -> Callable[[Tensor], None]:
            def read(h: Tensor) -> None:
                seen[site] = gather(h)

            return read

        sites = [Site(component, layer) for component in plan.components for layer in plan.layers if len(gather)]
        one_pass.run({site: reader(site) for site in sites}, max(plan.layers))
        if missing := [str(site) for site in sites if site not in seen]:
            raise RuntimeError(f"the forward pass did not reach {', '.join(missing[:3])}")
        for component in plan.components if len(gather) else ():
            # One transfer per component: each one waits for the device.
            values = torch.stack([seen[Site(component, layer)] for layer in plan.layers])
            out[component][:, gather.entries] = values.to("cpu")
        return one_pass.past() if keep else None

    def _batches(self, segments: list[Segment], budget: int) -> list[list[Segment]]:
        if self._lean is not None:
            return packed_batches(segments, budget)
        groups = by_token_budget([len(segment.tokens) for segment in segments], budget, self.pass_tokens)
        return [[segments[i] for i in group] for group in groups]


@dataclass(eq=False)
class _Level:
    """Segments that stand behind the same pass, and those of them that are still to be run."""

    waiting: list[Segment]
    past: Any  # what the class of the passes keeps
    budget: int = 0  # that the batches were cut for; 0: not yet

    def __post_init__(self) -> None:
        self.batches = [self.waiting]

    def cut(self, budget: int, batches: Callable[[list[Segment], int], list[list[Segment]]]) -> None:
        """Batch anew what is left: first the segments that others stand behind, whose passes keep keys and values."""
        left = [segment for batch in self.batches for segment in batch]
        self.budget, self.batches = budget, []
        for keep in (True, False):
            some = [segment for segment in left if bool(segment.children) is keep]
            self.batches += batches(some, budget)


def _renumber(segments: Sequence[Segment], rows: Sequence[int]) -> None:
    for segment in segments:
        segment.rows = [rows[row] for row in segment.rows]
        _renumber(segment.children, rows)


def _to_numpy(values: Tensor) -> npt.NDArray[Any]:
    if values.dtype == torch.bfloat16:
        import ml_dtypes

        return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = values.numpy()
    return array
