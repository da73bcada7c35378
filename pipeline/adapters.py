"""PEFT adapters, merged into the weights in memory so that a model's blocks are found where they always are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from store.errors import ModelError

# Largest relative L2 difference of a stream or of the logits that merging may make: it rounds weights anew.
MERGE_BOUND = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


def merged(model: Any, folder: Path) -> Any:
    """Add the adapter's changes to the weights in memory, so that blocks are found where they always are.

    Raises:
        ModelError: if the adapter cannot be merged, or the merged model does not give what the unmerged one gives.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        # A key that the adapter's file lacks would leave that part of the adapter at its initial value.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        # Merging unties what needs it, just below.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        adapted = PeftModel.from_pretrained(model, folder).eval()
        if not hasattr(adapted, "merge_and_unload"):
            raise ModelError(f"adapter {folder}: its PEFT method cannot be merged into weights; use LoRA or similar")
        expected = _trial_outputs(adapted)
        _untie(model)
        whole = adapted.merge_and_unload(safe_merge=True)
    for name, value in _trial_outputs(whole).items():
        error = float((value - expected[name]).norm() / expected[name].norm())
        if not error <= MERGE_BOUND[model.dtype]:
            raise ModelError(
                f"adapter {folder}: merged into the weights, it does not give what it gives unmerged: {name} is "
                f"off by {error:.3g} (relative L2; {MERGE_BOUND[model.dtype]:g} is allowed in {model.dtype})\n"
                "  remedy: merge the adapter yourself, check the result, and name that folder as the model"
            )
    return whole


@torch.inference_mode()
def _trial_outputs(model: Any) -> dict[str, torch.Tensor]:
    """Return what a model makes of a few tokens: the stream after each block, and the logits, in float32."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(1, vocabulary - 1, 8).long()[None].to(model.device)
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    streams = {f"hidden_states[{i}]": h.float().cpu() for i, h in enumerate(output.hidden_states)}
    return {**streams, "the logits": output.logits.float().cpu()}


def unties(folder: Path) -> bool:
    """Whether an adapter changes embeddings or head, which a model may share."""
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as tensors:
        return any(
            "lora_embedding" in name or ".lm_head." in name
            for name in tensors.keys()  # noqa: SIM118 (safe_open is not a mapping)
        )


def _untie(model: Any) -> None:
    """Give the head weights of its own where an adapter changes it or the embeddings, and both share theirs."""
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in parts:
        return
    embeddings, head = (getattr(part, "base_layer", part) for part in parts)
    if embeddings.weight is head.weight and not (embeddings is parts[0] and head is parts[1]):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
