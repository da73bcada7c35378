"""One published tool that generates with a direction added, for `benchmarks/replay.py --peers`.

Runs in an environment of its own (`make benchmark-peers`): continues the prompts that it is asked for, greedily, on
every line of its input and writes the new token ids to answer.json. Each tool adds the vector to every token's output
of one block, as its documentation shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer_tools import Asked, bridged, padded_batches, serve

Generate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of token ids and mask, [row, token] each


def greedy(asked: Asked, pad: int) -> dict[str, Any]:
    """Return what transformers' generate is to do."""
    return {
        "max_new_tokens": asked["tokens"],
        "do_sample": False,
        "eos_token_id": asked["stop"],
        "pad_token_id": pad,
    }


def steering_vectors(model: Any, tokenizer: Any, asked: Asked) -> Generate:
    from steering_vectors import SteeringVector

    vector = SteeringVector({asked["layer"]: torch.tensor(asked["vector"])}, layer_type="decoder_block")
    options = greedy(asked, tokenizer.pad_token_id)

    def generate(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with vector.apply(model):
            return model.generate(ids, attention_mask=mask, **options)

    return generate


def nnsight(model: Any, tokenizer: Any, asked: Asked) -> Generate:
    from nnsight import LanguageModel

    wrapped = LanguageModel(model, tokenizer=tokenizer)
    vector, layer = torch.tensor(asked["vector"]), asked["layer"]
    options = greedy(asked, tokenizer.pad_token_id)

    def generate(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with wrapped.generate(**options) as tracer:
            with tracer.invoke({"input_ids": ids, "attention_mask": mask}):
                for _ in tracer.all():
                    wrapped.model.layers[layer].output = wrapped.model.layers[layer].output + vector
            with tracer.invoke():  # what stands behind a loop without an end is not run
                found = tracer.result.save()
        return found

    return generate


def transformer_lens(model: Any, tokenizer: Any, asked: Asked) -> Generate:
    lens = bridged(model, tokenizer)
    vector = torch.tensor(asked["vector"])
    hooks = [(f"blocks.{asked['layer']}.hook_out", lambda value, hook: value + vector)]

    def generate(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with lens.hooks(fwd_hooks=hooks):
            return lens.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=asked["tokens"],
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                return_type="tokens",
                verbose=False,
            )

    return generate


def repeng(model: Any, tokenizer: Any, asked: Asked) -> Generate:
    import numpy as np

    np.float_ = np.float64  # type: ignore[attr-defined]  # gone from numpy 2, and a default value in repeng 0.4.0
    from repeng import ControlModel, ControlVector

    options = greedy(asked, tokenizer.pad_token_id)
    controlled = ControlModel(model, [asked["layer"]])
    directions = {asked["layer"]: np.asarray(asked["vector"], np.float32)}
    controlled.set_control(ControlVector(model_type=model.config.model_type, directions=directions))

    def generate(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return controlled.generate(ids, attention_mask=mask, **options)

    return generate


def in_batches(make: Callable[[Any, Any, Asked], Generate]) -> Callable[[Any, Any, Asked], Callable[[], Any]]:
    """Return the tool as one that continues all prompts, batch after batch, and returns a list of ids for each."""

    def tool(model: Any, tokenizer: Any, asked: Asked) -> Callable[[], list[list[int]]]:
        generate = make(model, tokenizer, asked)

        def run() -> list[list[int]]:
            found: list[list[int]] = []
            for ids, mask in padded_batches(asked["ids"], tokenizer.pad_token_id, asked["batch"]):
                found += generate(ids, mask)[:, ids.shape[1] :].tolist()
            return found

        return run

    return tool


def write(folder: Path, answer: list[list[int]]) -> None:
    (folder / "answer.json").write_text(json.dumps(answer))


TOOLS = {
    "steering-vectors": in_batches(steering_vectors),
    "nnsight": in_batches(nnsight),
    "transformer-lens": in_batches(transformer_lens),
    "repeng": in_batches(repeng),
}

if __name__ == "__main__":
    serve(TOOLS, write)
