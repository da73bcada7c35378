"""The Llama layout on packed tokens: no padding, fused products, no cache classes. Llama, SmolLM2, Qwen2, Mistral.

Rows of a forward pass lie one after the other in tensors of [token, d_model]; who attends to whom is up to the caller's
`attend`, so prefill (`PackedCausal`), decoding from a cache and capture share the same blocks. Anything that is not
exactly this layout (other classes, quantised or replaced modules, several devices, rotary angles that depend on the
longest row) is refused by `why_not`; callers then use transformers' own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.utils import output_capturing

from pipeline.models import LoadedModel
from pipeline.packed_gemm import Product, product
from store.sites import Site

# Rotary angles of these depend on nothing but a token's position.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_MODELS: dict[type, tuple[Any, str]] = {
    modeling_llama.LlamaForCausalLM: (modeling_llama, "Llama"),
    modeling_qwen2.Qwen2ForCausalLM: (modeling_qwen2, "Qwen2"),
    modeling_mistral.MistralForCausalLM: (modeling_mistral, "Mistral"),
}

# At a site's value h [token, d_model]: return h, or what flows on in its place. h belongs to the forward pass: it may
# be changed in place, and must be copied to be kept.
AtSite = Callable[[Site, Tensor], Tensor]


class Attend(Protocol):
    """Attention of a forward pass: who sees whom, and where keys and values are kept."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [token, head, head_dim] for queries [token, head, head_dim] and new keys and values
        [token, kv_head, head_dim], rotated already."""
        ...


@dataclass(frozen=True)
class _Block:
    attention_norm: Tensor  # [d_model]
    qkv: Product
    o: Product
    mlp_norm: Tensor  # [d_model]
    gate_up: Product
    down: Product


class LeanLlama:
    """Weights of one model and the forward pass of its parts. Parameters stay the model's own where nothing is packed.

    ::

        lean = lean_llama(model)
        h, rotary, attend = lean.embed(ids), lean.rotary(positions), PackedCausal(lean, lengths)
        for layer in range(lean.n_layers):
            h = lean.block(layer, h, rotary, attend, at, sites={Site("resid_post", 14)})
        logits = lean.logits(h[last])
    """

    def __init__(self, model: LoadedModel, *, pack: bool):
        inner, config = model.model, model.model.config
        base = inner.model
        first = base.layers[0].self_attn
        self.n_layers, self.d_model, self.device, self.dtype = (
            len(base.layers),
            config.hidden_size,
            model.device,
            model.dtype,
        )
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scaling = int(first.head_dim), float(first.scaling)
        self.eps = float(base.norm.variance_epsilon)
        self.windows = _windows(inner)
        self._activation = base.layers[0].mlp.act_fn
        self._embedding, self._rotary, self._norm = base.embed_tokens, base.rotary_emb, base.norm.weight
        self._head = product([inner.lm_head], pack=pack)
        plain = not pack and inner.lm_head.bias is None and self.dtype == torch.float32
        self._head_weight = inner.lm_head.weight if plain else None
        self._blocks = []
        for block in base.layers:
            attention, mlp = block.self_attn, block.mlp
            self._blocks.append(
                _Block(
                    block.input_layernorm.weight,
                    product([attention.q_proj, attention.k_proj, attention.v_proj], pack=pack),
                    product([attention.o_proj], pack=pack),
                    block.post_attention_layernorm.weight,
                    product([mlp.gate_proj, mlp.up_proj], pack=pack),
                    product([mlp.down_proj], pack=pack),
                )
            )

    def embed(self, ids: Tensor) -> Tensor:
        """Return resid_pre.0 [token, d_model] of token ids [token]; the tensor is the caller's own."""
        h: Tensor = self._embedding(ids)
        return h

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [token, 1, head_dim / 2] of positions [token], counted from each row's first token."""
        cos, sin = self._rotary(self._norm, positions[None])
        half = self.head_dim // 2  # both halves are alike
        return cos[0, :, None, :half], sin[0, :, None, :half]

    def block(
        self,
        layer: int,
        h: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        at: AtSite | None = None,
        sites: frozenset[Site] = frozenset(),
    ) -> Tensor:
        """Return resid_post.<layer> [token, d_model] for resid_pre.<layer>; `at` is called at those of `sites`."""
        weights = self._blocks[layer]

        def visit(component: Any, value: Tensor) -> Tensor:
            site = Site(component, layer)
            return at(site, value) if at is not None and site in sites else value

        h = visit("resid_pre", h)
        heads = self.n_heads + self.n_kv_heads
        qkv = weights.qkv(self._rms(h, weights.attention_norm)).view(len(h), heads + self.n_kv_heads, self.head_dim)
        turned = _rotated(qkv[:, :heads], *rotary)
        mixed = attend(layer, turned[:, : self.n_heads], turned[:, self.n_heads :], qkv[:, heads:])
        h = h + visit("attn_out", weights.o(mixed.reshape(len(h), -1)))
        gate, up = weights.gate_up(self._rms(h, weights.mlp_norm)).chunk(2, dim=-1)
        h = h + visit("mlp_out", weights.down(self._activation(gate).mul_(up)))
        return visit("resid_post", h)

    def logits(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """Return float32 logits [token, vocabulary] of the last block's output [token, d_model], in `out` if it can."""
        normed = self._rms(h, self._norm)
        if out is None or self._head_weight is None:
            return self._head(normed).float()
        return torch.mm(normed, self._head_weight.T, out=out)

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return len(self._embedding.weight) if self._head_weight is None else len(self._head_weight)

    def _rms(self, h: Tensor, weight: Tensor) -> Tensor:
        if h.dtype == torch.float32:
            return functional.rms_norm(h, (self.d_model,), weight, self.eps)
        wide = h.float()  # as transformers rounds: normalised in float32, weighted in the stream's dtype
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(h.dtype)


class PackedCausal:
    """Causal attention of rows that lie one after the other; runs of rows of equal length are one call."""

    def __init__(self, lean: LeanLlama, lengths: Sequence[int]):
        self._lean = lean
        self._runs: list[tuple[int, int, int]] = []  # first token, rows, tokens of each row
        start = 0
        for length in lengths:
            if self._runs and self._runs[-1][2] == length:
                first, rows, _ = self._runs[-1]
                self._runs[-1] = (first, rows + 1, length)
            else:
                self._runs.append((start, 1, length))
            start += length

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, out = self._lean.windows[layer], torch.empty_like(q, memory_format=torch.contiguous_format)
        for start, rows, length in self._runs:
            end = start + rows * length
            queries, keys, values = (
                x[start:end].reshape(rows, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
            )
            mask = None if window is None or length <= window else _band(length, window, q.device)
            mixed = functional.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=mask is None, scale=self._lean.scaling, enable_gqa=True
            )
            out[start:end] = mixed.transpose(1, 2).flatten(0, 1)
        return out


def lean_llama(model: LoadedModel, *, pack: bool = False) -> LeanLlama | None:
    """Return the lean form of a model, or None where `why_not` has a reason.

    `pack` holds a second, packed copy of the weights on the CPU, where torch has that (`pipeline.packed_gemm`). Off by
    default: plain products were as fast where it was measured (docs/performance.md).
    """
    if why_not(model) is not None:
        return None
    return LeanLlama(model, pack=pack)


def why_not(model: LoadedModel) -> str | None:
    """Return why a model cannot take the lean path, or None if it can. Modules are compared by class and shape."""
    inner = model.model
    if type(inner) not in _MODELS:
        return f"{type(inner).__name__} is not one of {', '.join(sorted(found.__name__ for found in _MODELS))}"
    module, name = _MODELS[type(inner)]
    config, base = inner.config, inner.model
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attn_implementation is {config._attn_implementation}"
    if config.rope_parameters["rope_type"] not in _ROPE_TYPES:
        return f"rotary angles of the kind {config.rope_parameters['rope_type']} depend on more than the position"
    norm = getattr(module, f"{name}RMSNorm")
    wanted: list[tuple[nn.Module, type]] = [
        (base, getattr(module, f"{name}Model")),
        (base.embed_tokens, nn.Embedding),
        (base.rotary_emb, getattr(module, f"{name}RotaryEmbedding")),
        (base.norm, norm),
        (inner.lm_head, nn.Linear),
    ]
    for block in base.layers:
        attention, mlp = block.self_attn, block.mlp
        wanted += [
            (block, getattr(module, f"{name}DecoderLayer")),
            (block.input_layernorm, norm),
            (block.post_attention_layernorm, norm),
            (attention, getattr(module, f"{name}Attention")),
            (mlp, getattr(module, f"{name}MLP")),
        ]
        inner_linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        wanted += [(linear, nn.Linear) for linear in (*inner_linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    for part, expected in wanted:
        if type(part) is not expected:
            return f"a {type(part).__name__} stands where a {expected.__name__} is expected"
    parameters = list(inner.parameters())
    if len({(p.device, p.dtype) for p in parameters}) > 1:
        return "its weights lie on several devices or have several dtypes"
    if inner.training:
        return "it is in training mode"
    hooks = [
        h for part in inner.modules() for held in (part._forward_hooks, part._forward_pre_hooks) for h in held.values()
    ]
    # transformers' own, left behind by output_hidden_states=True, only look; they do nothing outside such a pass.
    if any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks):
        return "forward hooks are registered on its modules"
    epsilons = {m.variance_epsilon for m in inner.modules() if isinstance(m, norm)}
    return "its norms differ in epsilon" if len(epsilons) > 1 else None


def _windows(model: Any) -> tuple[int | None, ...]:
    """Return how many tokens each layer's queries see, themselves included; None is all of them."""
    config = model.config
    if isinstance(model, modeling_qwen2.Qwen2ForCausalLM):
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        return tuple(config.sliding_window if slides else None for slides in sliding)
    window: int | None = config.sliding_window if isinstance(model, modeling_mistral.MistralForCausalLM) else None
    return (window,) * int(config.num_hidden_layers)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [token, head, head_dim] by angles [token, 1, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Return which keys [query, key] a causal sliding window lets through."""
    at = torch.arange(length, device=device)
    behind = at[:, None] - at
    return (behind >= 0) & (behind < window)
