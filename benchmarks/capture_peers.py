"""One published tool that reads the block outputs at the last token, for `benchmarks/capture.py --peers`.

Runs in an environment of its own (`make benchmark-peers`): captures the rows that it is asked for on every line of its
input and writes [row, layer, d_model] to answer.npy. Each tool is used as its documentation shows, rows in the order
given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_tools import Asked, bridged, padded_batches, serve

Run = Callable[[], torch.Tensor]  # to [row, layer, d_model]


def steering_vectors(model: Any, tokenizer: Any, asked: Asked) -> Run:
    from steering_vectors import record_activations

    padded = list(padded_batches(asked["ids"], tokenizer.pad_token_id, asked["batch"]))

    def run() -> torch.Tensor:
        found = []
        for tokens, mask in padded:
            with record_activations(model, layer_type="decoder_block") as recorded:
                model(input_ids=tokens, attention_mask=mask)
            found.append(torch.stack([recorded[layer][0][:, -1] for layer in sorted(recorded)], dim=1))
        return torch.cat(found)

    return run


def nnsight(model: Any, tokenizer: Any, asked: Asked) -> Run:
    from nnsight import LanguageModel

    wrapped = LanguageModel(model, tokenizer=tokenizer)
    padded = list(padded_batches(asked["ids"], tokenizer.pad_token_id, asked["batch"]))
    layers = range(model.config.num_hidden_layers)

    def run() -> torch.Tensor:
        found = []
        for tokens, mask in padded:
            with wrapped.trace({"input_ids": tokens, "attention_mask": mask}):
                saved = [wrapped.model.layers[layer].output[:, -1].save() for layer in layers].save()
            found.append(torch.stack(list(saved), dim=1))
        return torch.cat(found)

    return run


def transformer_lens(model: Any, tokenizer: Any, asked: Asked) -> Run:
    lens = bridged(model, tokenizer)
    padded = list(padded_batches(asked["ids"], tokenizer.pad_token_id, asked["batch"]))
    names = [f"blocks.{layer}.hook_out" for layer in range(model.config.num_hidden_layers)]

    def run() -> torch.Tensor:
        found = []
        for tokens, mask in padded:
            _, cache = lens.run_with_cache(tokens, attention_mask=mask, names_filter=names)
            found.append(torch.stack([cache[name][:, -1] for name in names], dim=1))
        return torch.cat(found)

    return run


def repeng(model: Any, tokenizer: Any, asked: Asked) -> Run:
    np.float_ = np.float64  # type: ignore[attr-defined]  # gone from numpy 2, and a default value in repeng 0.4.0
    from repeng.extract import batched_get_hiddens

    tokenizer.padding_side = "left"
    layers = list(range(model.config.num_hidden_layers))

    def run() -> torch.Tensor:
        found = batched_get_hiddens(model, tokenizer, asked["texts"], layers, asked["batch"])
        return torch.stack([torch.from_numpy(np.asarray(found[layer])) for layer in layers], dim=1)

    return run


def write(folder: Path, answer: torch.Tensor) -> None:
    np.save(folder / "answer.npy", answer.float().numpy())


TOOLS = {
    "steering-vectors": steering_vectors,
    "nnsight": nnsight,
    "transformer-lens": transformer_lens,
    "repeng": repeng,
}

if __name__ == "__main__":
    serve(TOOLS, write)
