"""One published tool that reads the block outputs at the last token, for `benchmarks/capture.py --peers`.

Runs in an environment of its own (`make benchmark-peers`) and imports nothing of this project: reads rows from a
folder, captures them on every line of its input, writes [row, layer, d_model] to answer.npy and says so. Each tool is
used as its documentation shows, at batch 8, rows in the order given.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def batches(ids: list[list[int]], pad: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return token ids and masks padded on the left, so that the last column is every row's last token."""
    found = []
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        width = max(map(len, some))
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in some])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
        found.append((tokens, mask))
    return found


def steering_vectors(model: Any, tokenizer: Any, rows: dict[str, Any]) -> Any:
    from steering_vectors import record_activations

    padded = batches(rows["ids"], tokenizer.pad_token_id)

    def run() -> torch.Tensor:
        found = []
        for tokens, mask in padded:
            with record_activations(model, layer_type="decoder_block") as recorded, torch.inference_mode():
                model(input_ids=tokens, attention_mask=mask)
            found.append(torch.stack([recorded[layer][0][:, -1] for layer in sorted(recorded)], dim=1))
        return torch.cat(found)

    return run


def nnsight(model: Any, tokenizer: Any, rows: dict[str, Any]) -> Any:
    from nnsight import LanguageModel

    wrapped = LanguageModel(model, tokenizer=tokenizer)
    padded = batches(rows["ids"], tokenizer.pad_token_id)
    layers = range(model.config.num_hidden_layers)

    def run() -> torch.Tensor:
        found = []
        for tokens, mask in padded:
            with torch.inference_mode(), wrapped.trace({"input_ids": tokens, "attention_mask": mask}):
                saved = [wrapped.model.layers[layer].output[:, -1].save() for layer in layers].save()
            found.append(torch.stack(list(saved), dim=1))
        return torch.cat(found)

    return run


def transformer_lens(model: Any, tokenizer: Any, rows: dict[str, Any]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    checkpoint = model.config._name_or_path
    lens = TransformerBridge.boot_transformers(
        checkpoint, device="cpu", dtype=torch.float32, tokenizer=tokenizer, hf_model=model
    )
    padded = batches(rows["ids"], tokenizer.pad_token_id)
    names = [f"blocks.{layer}.hook_out" for layer in range(model.config.num_hidden_layers)]

    def run() -> torch.Tensor:
        found = []
        for tokens, mask in padded:
            with torch.inference_mode():
                _, cache = lens.run_with_cache(tokens, attention_mask=mask, names_filter=names)
            found.append(torch.stack([cache[name][:, -1] for name in names], dim=1))
        return torch.cat(found)

    return run


def repeng(model: Any, tokenizer: Any, rows: dict[str, Any]) -> Any:
    np.float_ = np.float64  # type: ignore[attr-defined]  # gone from numpy 2, and a default value in repeng 0.4.0
    from repeng.extract import batched_get_hiddens

    tokenizer.padding_side = "left"
    layers = list(range(model.config.num_hidden_layers))

    def run() -> torch.Tensor:
        found = batched_get_hiddens(model, tokenizer, rows["texts"], layers, BATCH)
        return torch.stack([torch.from_numpy(np.asarray(found[layer])) for layer in layers], dim=1)

    return run


TOOLS = {
    "steering-vectors": steering_vectors,
    "nnsight": nnsight,
    "transformer-lens": transformer_lens,
    "repeng": repeng,
}


def main() -> None:
    folder, name, checkpoint, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    run = TOOLS[name](model, tokenizer, json.loads((Path(folder) / "asked.json").read_text()))
    print("@", importlib.metadata.version(name), flush=True)
    for _ in sys.stdin:
        np.save(Path(folder) / "answer.npy", run().float().numpy())
        print("@ done", flush=True)


if __name__ == "__main__":
    main()
