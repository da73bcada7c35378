"""Slow references for the engines: one row at a time, no padding, plain hooks on transformers' own modules.

Nothing here uses `pipeline.hooks`, `pipeline.interventions` or `pipeline.batching`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from tiny_models import STD, VOCAB, tiny_model, tiny_tokenizer
from torch import Tensor

from pipeline.architecture import find_architecture
from pipeline.models import LoadedModel
from store.conditions import Condition, Operation, orthonormal_basis
from store.model_ref import ModelRef
from store.rows import Row
from store.sites import Site, Spans
from store.study import ConditionSpec
from store.study_interventions import TokenRange, Tokens, TokenScope


@cache
def tiny(family: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Return a tiny model of ``family`` as `pipeline.models.load` would return it. Tests must not change it."""
    model = tiny_model(family, dtype=dtype)
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        # A head of its own: with tied random embeddings a model repeats its last token for ever.
        weight = STD * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1))
        head.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    return LoadedModel(
        ref=ModelRef(source="./tiny"),
        model=model,
        tokenizer=tiny_tokenizer(),
        architecture=find_architecture(model),
        fingerprint=f"tiny-{family}",
        receipt=None,
        device=torch.device("cpu"),
        dtype=dtype,
    )


def random_rows(lengths: Sequence[tuple[int, int]], seed: int = 0, model: str = "tiny") -> list[Row]:
    """Return rows of random token ids with (prompt, response) lengths."""
    rng = np.random.default_rng(seed)
    return [
        Row(model, f"p{i}", tuple(rng.integers(6, VOCAB - 4, a + b).tolist()), Spans(a, a + b))
        for i, (a, b) in enumerate(lengths)
    ]


@dataclass(frozen=True)
class Step:
    """One intervention in words: raw directions [n, d_model], of which project_out removes the whole span."""

    kind: Literal["add", "project_out", "clamp"]
    site: Site
    raw: Tensor
    tokens: Tokens = "all"
    value: float = 0.0
    bound: float = float("inf")  # norm beyond which a token is a sink, for scopes by sinks

    def operation(self) -> Operation:
        """Return what the engines are given."""
        raw = self.raw.double().numpy()
        vectors = raw if self.kind == "add" else orthonormal_basis([v / np.linalg.norm(v) for v in raw])
        return Operation(self.kind, self.site, vectors.astype(np.float32), self.tokens, self.value)

    def apply(self, h: Tensor) -> Tensor:
        """Return h [..., d_model] after the intervention, in float32."""
        if self.kind == "add":
            return h.float() + self.raw[0]
        if self.kind == "clamp":
            unit = self.raw[0].double() / self.raw[0].double().norm()
            clamped: Tensor = h.double() - (h.double() @ unit)[..., None] * unit + self.value * unit
            return clamped.float()
        basis, _ = torch.linalg.qr(self.raw.double().T)  # [d_model, n]
        wide = h.double()
        removed: Tensor = wide - (wide @ basis) @ basis.T
        return removed.float()


def named(tokens: Tokens, at: int, prompt_length: int, sink: bool) -> bool:
    """Tell whether a scope names the token at a position of a row."""

    def within(bounds: object, index: int, length: int) -> bool:
        if bounds is None:
            return False
        if isinstance(bounds, TokenRange):
            first = bounds.first + length if bounds.first < 0 else bounds.first
            end = bounds.end if bounds.end is None or bounds.end >= 0 else bounds.end + length
            return first <= index and (end is None or index < end)
        return True

    in_prompt = at < prompt_length
    match tokens:
        case TokenRange():
            return within(tokens, at, prompt_length) and (in_prompt or tokens.end is None)
        case TokenScope():
            both = tokens.prompt is None and tokens.response is None
            side = tokens.prompt if in_prompt else tokens.response
            inside = within("all" if both else side, at if in_prompt else at - prompt_length, prompt_length)
            return inside and (tokens.sink == "with" or sink == (tokens.sink == "only"))
    if tokens in ("all_but_sink", "sink"):
        return sink == (tokens == "sink")
    return tokens == "all" or in_prompt == (tokens == "prompt")


def condition(name: str, steps: Sequence[Step] = ()) -> Condition:
    """Return a condition of these steps, in order."""
    operations = tuple(step.operation() for step in steps)
    return Condition(name, name, None, None, (), ConditionSpec(), name, operations)


def blocks(model: Any) -> Any:
    """Return the model's list of blocks, by transformers' own accessor."""
    decoder = model.get_decoder()
    for name in ("layers", "h"):
        if hasattr(decoder, name):
            return getattr(decoder, name)
    raise AssertionError(f"{type(decoder).__name__} has no list of blocks")


def module_of(model: Any, site: Site) -> tuple[Any, bool]:
    """Return the module that carries a site of a model without post-norms, and whether it is the module's input."""
    block = blocks(model)[site.layer]
    if site.component in ("resid_pre", "resid_post"):
        return block, site.component == "resid_pre"
    names = {"attn_out": ("self_attn", "attn"), "mlp_out": ("mlp",)}[site.component]
    return next(getattr(block, name) for name in names if hasattr(block, name)), False


@contextmanager
def steered(
    model: Any,
    steps: Sequence[Step],
    prompt_length: int,
    seen: dict[Site, list[Tensor]] | None = None,
    changes: dict[int, list[tuple[int, float, float]]] | None = None,
) -> Iterator[None]:
    """Apply steps in forward passes of one unpadded row; `seen` collects what resid_post of each layer then holds.

    `changes` collects, by step, each changed token's position, and the squared norms of its change and of itself.
    """

    def change(site: Site) -> Callable[[Tensor], Tensor]:
        start = 0  # tokens that went through this site so far
        here = [step for step in steps if step.site == site]

        def run(raw: Tensor) -> Tensor:
            nonlocal start
            h = raw.clone()
            assert h.ndim == 3
            assert len(h) == 1
            for step in here:
                for token in range(h.shape[1]):
                    at = start + token
                    arrived = raw[0, token].float().norm() > step.bound
                    if named(step.tokens, at, prompt_length, bool(arrived)):
                        before = h[0, token].float().clone()
                        h[0, token] = step.apply(h[0, token]).to(h.dtype)
                        if changes is not None:
                            moved = (h[0, token].float() - before).double().norm() ** 2
                            change = (at, float(moved), float(before.double().norm() ** 2))
                            changes.setdefault(list(steps).index(step), []).append(change)
            start += h.shape[1]
            if seen is not None and site.component == "resid_post":
                seen.setdefault(site, []).append(h[0])
            return h

        return run

    def on_input(run: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], Any]:
        return lambda module, args: (run(args[0]), *args[1:])

    def on_output(run: Callable[[Tensor], Tensor]) -> Callable[[Any, Any, Any], Any]:
        return lambda module, args, out: (run(out[0]), *out[1:]) if isinstance(out, tuple) else run(out)

    with ExitStack() as stack:
        sites = {step.site: None for step in steps}
        if seen is not None:
            sites |= {Site("resid_post", layer): None for layer in range(len(blocks(model)))}
        for site in sites:
            module, is_input = module_of(model, site)
            run = change(site)
            handle = (
                module.register_forward_pre_hook(on_input(run))
                if is_input
                else module.register_forward_hook(on_output(run))
            )
            stack.callback(handle.remove)
        yield


def generate(
    model: Any, ids: Sequence[int], steps: Sequence[Step], max_new_tokens: int, stop_ids: Sequence[int]
) -> tuple[list[int], list[Tensor]]:
    """Generate greedily with transformers' generate, one prompt alone.

    Returns:
        The generated token ids, a stop token included, and the logits [vocabulary] that chose each.
    """
    prompt = torch.tensor([list(ids)])
    with steered(model, steps, len(ids)), torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, len(ids) :].tolist(), [logits[0].float() for logits in out.logits]


@torch.inference_mode()
def teacher_forced(
    model: Any, ids: Sequence[int], steps: Sequence[Step], prompt_length: int
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Run one forward pass over an unpadded row, without a cache.

    Returns:
        Logits [token, vocabulary] from the last prompt token on, and what resid_post of every layer holds after
        the steps, [token, d_model].
    """
    seen: dict[Site, list[Tensor]] = {}
    with steered(model, steps, prompt_length, seen):
        keep = len(ids) - prompt_length + 1
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False, logits_to_keep=keep).logits[0].float()
    return logits, {site: values[0] for site, values in seen.items()}


def gap(logits: Tensor, token: int) -> float:
    """Return how far a token's logit is below the largest one, relative to the largest absolute logit."""
    return float((logits.max() - logits[token]) / logits.abs().max())
