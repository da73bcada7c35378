"""What a capture is compared with: every site of one unpadded row, read by the definition of each position."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from slow_reference import blocks
from torch import Tensor

from pipeline.chat import prompt_row
from pipeline.models import LoadedModel
from store.generation import GenerationPlan
from store.layout import ragged_blocks
from store.prompts import Message, Prompt
from store.rows import Row
from store.sites import ALL_TOKENS, COMPONENTS, Site

POSITIONS = ("prompt_end", "response_start", "response_avg", "token:3", "token:-1")
# Families that have passes without padding beside those through transformers' own modules.
LEAN = ("llama", "mistral", "qwen2")
PROMPTS = Path(__file__).parent.parent / "prompts"


def paths(family: str) -> tuple[bool, ...]:
    """Return the values of `packed` under which a capture of this family takes different paths."""
    return (False, True) if family in LEAN else (False,)


def plan_of(model: LoadedModel, **changes: Any) -> GenerationPlan:
    dtype = str(model.dtype).removeprefix("torch.")
    defaults: dict[str, Any] = {
        "model": model.fingerprint,
        "d_model": model.architecture.d_model,
        "components": COMPONENTS,
        "layers": tuple(range(model.architecture.n_layers)),
        "positions": POSITIONS,
        "dtype": dtype,
        "n_rows": 1,
        "block_rows": 1,
    }
    return GenerationPlan(**{**defaults, **changes})


def plan_of_all_tokens(model: LoadedModel, rows: Sequence[Row], **changes: Any) -> GenerationPlan:
    lengths = [row.spans.response_end for row in rows]
    dtype = str(model.dtype).removeprefix("torch.")
    blocks = ragged_blocks(lengths, None, model.architecture.d_model, dtype)
    return plan_of(model, positions=(ALL_TOKENS,), n_rows=len(rows), **blocks, **changes)


@torch.inference_mode()
def unbatched(model: LoadedModel, row: Row) -> dict[Site, Tensor]:
    """Every site [token, d_model] of one row alone: transformers' own hidden_states, and hooks for what they lack."""
    architecture, found = model.architecture, {}
    last = architecture.n_layers - 1
    raw: dict[Any, Tensor] = {}

    def keep(key: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            raw[key] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        return hook

    handles = [blocks(model.model)[last].register_forward_hook(keep("last"))]
    for layer in range(architecture.n_layers):
        handles.append(architecture.attention[layer].register_forward_hook(keep(Site("attn_out", layer))))
        handles.append(architecture.mlp[layer].register_forward_hook(keep(Site("mlp_out", layer))))
    ids = torch.tensor([row.token_ids[: row.spans.response_end]])
    states = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    for layer in range(architecture.n_layers):
        found[Site("resid_pre", layer)] = states[layer][0]
        found[Site("resid_post", layer)] = raw["last"] if layer == last else states[layer + 1][0]
        for component in ("attn_out", "mlp_out"):
            found[Site(component, layer)] = raw[Site(component, layer)] * architecture.residual_scale
    return found


def at_position(values: Tensor, row: Row, position: str) -> Tensor:
    """Read a position of [token, d_model] by its definition in words."""
    prompt = row.spans.prompt_length
    match position:
        case "prompt_end":
            return values[prompt - 1]
        case "response_start":
            return values[prompt]
        case "response_avg":
            return values[prompt:].double().mean(0)
        case _:
            return values[int(position.removeprefix("token:"))]


def deviations(values: dict[str, Any], rows: Sequence[Row], plan: GenerationPlan, model: LoadedModel) -> list[float]:
    """Largest difference of each captured vector from the unbatched one, relative to its largest absolute value."""
    found = []
    for index, row in enumerate(rows):
        alone = unbatched(model, row)
        for component in plan.components:
            for at, layer in enumerate(plan.layers):
                for p, position in enumerate(plan.positions):
                    expected = at_position(alone[Site(component, layer)], row, position).double()
                    got = torch.from_numpy(values[component][index, at, p].astype(np.float64))
                    found.append(float((got - expected).abs().max() / expected.abs().max()))
    return found


def real_rows(model: LoadedModel, n: int) -> list[Row]:
    """Rows of real prompts, with answers of unequal length."""
    answers = ("Yes.", "Here is what I would write, if I were you and had to say it in a few words:", "No, not today.")
    rows = []
    for name in ("harmful", "harmless"):
        for index, line in enumerate((PROMPTS / f"{name}.jsonl").read_text().splitlines()[: n // 2]):
            system = (Message("system", "Answer in one sentence."),) if index % 3 else ()
            messages = (*system, Message("user", json.loads(line)["prompt"]))
            prompt = Prompt(messages, answers[index % 3] * (1 + index % 2))
            rows.append(prompt_row(prompt, model.tokenizer, model.ref, model.fingerprint, with_response=True))
    return rows
