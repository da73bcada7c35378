"""The site self-test on vLLM's model: one pass in which a known vector is written at every site, and read again.

The laws of `pipeline.selftest` in one go. A vector is added to every other token at all four sites of every block. What
block L+1 reads is then what block L was made to return, and ``resid_pre + attn_out + mlp_out == resid_post`` holds for
the written values: both fail where a write does not reach the stream, or a name means another place in vLLM's model.
Tokens that nothing is written to go through the model as vLLM made it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from store.sites import COMPONENTS, Site

SEED = 0
WRITE_SIZE = 0.25  # size of the added vectors, relative to the stream at that place
# Largest relative L2 difference of a token's values; the sums are the same up to the rounding of the model's dtype.
BOUNDS = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Laws:
    """The worst deviation from each law, relative to the stream, what is allowed, and the number of tokens."""

    next_block: float  # resid_pre.(L+1) against resid_post.L
    sum_of_parts: float  # resid_pre + attn_out + mlp_out against resid_post
    worst_block: int
    bound: float
    tokens: int

    @property
    def passed(self) -> bool:
        return self.tokens > 0 and max(self.next_block, self.sum_of_parts) <= self.bound


class Probe:
    """Writes at every site of the first pass that comes, to every other token, and keeps what the stream then holds."""

    def __init__(self, n_layers: int, d_model: int):
        self.n_layers = n_layers
        self.sites = frozenset(Site(component, layer) for component in COMPONENTS for layer in range(n_layers))
        generator = torch.Generator().manual_seed(SEED)
        self._vectors = {s: torch.randn(d_model, generator=generator) / d_model**0.5 for s in sorted(self.sites)}
        self._read: dict[Site, Tensor] = {}  # as it came
        self._written: dict[Site, Tensor] = {}  # as it went on

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        if site not in self._written:
            self._read[site] = h.clone()
            some = h[::2]
            size = WRITE_SIZE * some.float().norm(dim=-1, keepdim=True)
            h[::2] = some + (size * self._vectors[site].to(h.device)).to(h.dtype)
            self._written[site] = h.clone()
        return h

    def writes(self, site: Site) -> bool:
        return True

    def tokens(self, site: Site) -> Tensor:
        written = self._written[site]
        return torch.arange(0, len(written), 2, device=written.device)

    def laws(self) -> Laws:
        """Compare what was read and written in the pass."""
        if set(self._written) != self.sites:
            return Laws(torch.inf, torch.inf, -1, 0.0, 0)
        first = self._written[Site("resid_pre", 0)]
        worst, sums, block = 0.0, 0.0, 0
        for layer in range(self.n_layers):
            pre, attention, mlp = (
                self._written[Site(component, layer)].double() for component in ("resid_pre", "attn_out", "mlp_out")
            )
            apart = _apart(self._read[Site("resid_post", layer)].double(), pre + attention + mlp)
            if apart > sums:
                sums, block = apart, layer
            if layer + 1 < self.n_layers:
                written = self._written[Site("resid_post", layer)].double()
                worst = max(worst, _apart(self._read[Site("resid_pre", layer + 1)].double(), written))
        return Laws(worst, sums, block, BOUNDS[first.dtype], len(first))


def _apart(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
