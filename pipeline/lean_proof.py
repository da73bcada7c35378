"""Whether the lean path computes what transformers' modules compute, tried on the loaded model itself."""

from __future__ import annotations

import torch

from pipeline.lean_llama import LeanLlama, PackedCausal
from pipeline.models import LoadedModel

# Largest difference of a logit, relative to the largest; rows of other models reach 1e-6 in float32.
BOUNDS = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_LENGTHS = (7, 4)  # tokens of the two rows that are tried


@torch.inference_mode()
def agrees(lean: LeanLlama, model: LoadedModel) -> bool:
    """Compare the logits of two rows of random tokens, packed, with those of each row alone through the model."""
    bound = BOUNDS.get(lean.dtype)
    if bound is None:
        return False
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    rows = [torch.randint(vocabulary, (length,), generator=generator).to(lean.device) for length in _LENGTHS]
    h = lean.embed(torch.cat(rows))
    rotary = lean.rotary(torch.cat([torch.arange(len(row), device=lean.device) for row in rows]))
    attend = PackedCausal(lean, _LENGTHS)
    for layer in range(lean.n_layers):
        h = lean.block(layer, h, rotary, attend)
    for row, logits in zip(rows, torch.split(lean.logits(h), list(_LENGTHS)), strict=True):
        expected = model.model(input_ids=row[None], use_cache=False).logits[0].float()
        if not bool((logits - expected).abs().max() <= bound * expected.abs().max()):
            return False
    return True
