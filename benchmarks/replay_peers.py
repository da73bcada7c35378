"""One published tool that generates with a direction added, for `benchmarks/replay.py --peers`.

Runs in an environment of its own (`make benchmark-peers`) and imports nothing of this project: reads prompts, a layer
and a vector from a folder, generates greedily on every line of its input, writes the token ids to answer.json and says
so. Each tool adds the vector to every token's output of that block, as its documentation shows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Generate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of token ids and mask, [row, token] each


def greedy(asked: dict[str, Any], pad: int) -> dict[str, Any]:
    """Return what transformers' generate is to do."""
    return {
        "max_new_tokens": asked["tokens"],
        "do_sample": False,
        "eos_token_id": asked["stop"],
        "pad_token_id": pad,
    }


def steering_vectors(model: Any, tokenizer: Any, asked: dict[str, Any]) -> Generate:
    from steering_vectors import SteeringVector

    vector = SteeringVector({asked["layer"]: torch.tensor(asked["vector"])}, layer_type="decoder_block")
    options = greedy(asked, tokenizer.pad_token_id)

    def generate(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with vector.apply(model):
            return model.generate(ids, attention_mask=mask, **options)

    return generate


def nnsight(model: Any, tokenizer: Any, asked: dict[str, Any]) -> Generate:
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


def transformer_lens(model: Any, tokenizer: Any, asked: dict[str, Any]) -> Generate:
    from transformer_lens.model_bridge import TransformerBridge

    checkpoint = model.config._name_or_path
    lens = TransformerBridge.boot_transformers(
        checkpoint, device="cpu", dtype=torch.float32, tokenizer=tokenizer, hf_model=model
    )
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


def repeng(model: Any, tokenizer: Any, asked: dict[str, Any]) -> Generate:
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


TOOLS = {
    "steering-vectors": steering_vectors,
    "nnsight": nnsight,
    "transformer-lens": transformer_lens,
    "repeng": repeng,
}


def main() -> None:
    folder, name, checkpoint, threads, batch = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    asked = json.loads((Path(folder) / "asked.json").read_text())
    generate = TOOLS[name](model, tokenizer, asked)
    print("@", importlib.metadata.version(name), flush=True)
    for _ in sys.stdin:
        found: list[list[int]] = []
        for start in range(0, len(asked["ids"]), int(batch)):
            some = asked["ids"][start : start + int(batch)]
            width = max(map(len, some))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in some])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
            with torch.inference_mode():
                found += generate(ids, mask)[:, width:].tolist()
        (Path(folder) / "answer.json").write_text(json.dumps(found))
        print("@ done", flush=True)


if __name__ == "__main__":
    main()
