"""The capture engine: forward passes that keep a few positions of many sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.batching import Batch, by_token_budget, pad, release_memory
from pipeline.hooks import on_sites, stop_after
from pipeline.models import LoadedModel
from store.generation import GenerationPlan
from store.rows import Row
from store.sites import Site

# A captured vector of a batched row against the same row alone, float32: largest difference of an element relative to
# the vector's largest absolute element. Batches of another shape sum products in another order; nothing else may
# differ. Measured on SmolLM2-135M (40 rows, all sites and layers, five positions, budgets of 1 to 10,000 tokens, one
# and two threads): at most 2.1e-6 in the residual stream and 7.8e-6 in attn_out and mlp_out.
BATCH_BOUND = 5e-5

# On a CPU larger passes fall out of its caches: SmolLM2, 64 prompts, one core: 5.4 rows/s at 512 tokens, 3.4 at 4096.
CPU_TOKENS, DEVICE_TOKENS = 512, 4096


class CaptureEngine:
    """Runs a model over rows and returns their activations, whatever the batch they happen to share.

    Batches are sorted by length under a token budget (None: what suits the device). Out of memory halves the budget
    and the batch is run again; the lower budget stays. Only the wanted positions leave the device.
    """

    def __init__(self, model: LoadedModel, token_budget: int | None = None):
        default = CPU_TOKENS if model.device.type == "cpu" else DEVICE_TOKENS
        self.model, self.token_budget = model, default if token_budget is None else token_budget

    def run(self, rows: Sequence[Row], plan: GenerationPlan) -> dict[str, npt.NDArray[Any]]:
        """Capture rows.

        Returns:
            For each component of the plan an array [row, layer, position, d_model] in the model's compute dtype
            (averages over responses are accumulated in float32); of all tokens [token, layer, d_model], the tokens of
            the rows one after the other.

        Raises:
            torch.OutOfMemoryError: if a single row does not fit.
        """
        lengths = [row.spans.response_end for row in rows]
        entries = sum(lengths) if plan.ragged else len(rows)
        # Layer by layer, as it is stored.
        shape = (len(plan.layers), entries, *plan.inner)
        out: dict[str, Tensor] = {
            component: torch.empty(shape, dtype=self.model.dtype) for component in plan.components
        }
        ends = list(accumulate(lengths))
        queue = by_token_budget(lengths, self.token_budget)
        while queue:
            indices = queue[0]
            try:
                at = [range(ends[i] - lengths[i], ends[i]) for i in indices] if plan.ragged else [[i] for i in indices]
                self._forward([rows[i] for i in indices], [entry for row in at for entry in row], plan, out)
                queue.pop(0)
                continue
            except torch.OutOfMemoryError:
                if len(indices) == 1:
                    raise
            # Out of the handler: the error's traceback held the failed pass's tensors.
            release_memory(self.model.device)
            padded = len(indices) * lengths[indices[-1]]
            self.token_budget = max(1, min(self.token_budget, padded) // 2)
            waiting = [i for batch in queue for i in batch]
            queue = [[waiting[i] for i in b] for b in by_token_budget([lengths[i] for i in waiting], self.token_budget)]
        return {component: np.moveaxis(_to_numpy(values), 0, 1) for component, values in out.items()}

    @torch.inference_mode()
    def _forward(self, rows: list[Row], entries: list[int], plan: GenerationPlan, out: dict[str, Tensor]) -> None:
        sequences = [row.token_ids[: row.spans.response_end] for row in rows]
        # Right padding: a causal model never looks at it, and every row keeps positions 0, 1, 2, ...
        batch = pad(sequences, side="right", pad_id=self.model.tokenizer.pad_token_id, device=self.model.device)
        gather = _gatherer(rows, batch, plan)
        seen: dict[Site, Tensor] = {}

        def keep(site: Site) -> Callable[[Tensor], None]:
            def read(h: Tensor) -> None:
                seen[site] = gather(h)

            return read

        sites = [Site(component, layer) for component in plan.components for layer in plan.layers]
        architecture = self.model.architecture
        with on_sites(architecture, {site: keep(site) for site in sites}), stop_after(architecture, max(plan.layers)):
            architecture.base(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        if missing := [str(site) for site in sites if site not in seen]:
            raise RuntimeError(f"the forward pass did not reach {', '.join(missing[:3])}")
        # One transfer per component: each one waits for the device.
        at = torch.tensor(entries)
        for component in plan.components:
            values = torch.stack([seen[Site(component, layer)] for layer in plan.layers])
            out[component][:, at] = values.to("cpu")


def _gatherer(rows: Sequence[Row], batch: Batch, plan: GenerationPlan) -> Callable[[Tensor], Tensor]:
    """Return a function from h [row, token, d_model] to [row, position, d_model] (of all tokens: [token, d_model])."""
    if plan.ragged:
        real = batch.attention_mask.bool()
        return lambda h: h[real]
    ranges = [[row.spans.token_range(position) for position in plan.positions] for row in rows]
    device = batch.input_ids.device
    first = torch.tensor([[start for start, _ in row] for row in ranges], device=device)[..., None]
    token = torch.arange(batch.input_ids.shape[1], device=device)
    averages: dict[int, tuple[Tensor, Tensor]] = {}  # position -> inside [row, token, 1], tokens in it [row, 1]
    for index in range(len(plan.positions)):
        starts, stops = torch.tensor([row[index] for row in ranges], device=device).unbind(1)
        if bool((stops - starts > 1).any()):
            inside = (token >= starts[:, None]) & (token < stops[:, None])
            averages[index] = inside[..., None], (stops - starts)[:, None]

    def gather(h: Tensor) -> Tensor:
        values = h.gather(1, first.expand(-1, -1, h.shape[-1]))
        for index, (inside, count) in averages.items():
            # where(), not a product: a non-finite value outside the range must stay outside the sum.
            values[:, index] = torch.where(inside, h, 0.0).sum(dim=1, dtype=torch.float32) / count
        return values

    return gather


def _to_numpy(values: Tensor) -> npt.NDArray[Any]:
    if values.dtype == torch.bfloat16:
        import ml_dtypes

        return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = values.numpy()
    return array
