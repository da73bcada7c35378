"""Adapters that change embeddings or head: the merged model gives what the unmerged one gives, or loading says so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import COMMON, tiny_tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config

from pipeline import adapters, models
from pipeline.models import load, model_fingerprint
from store.errors import ModelError
from store.model_ref import ModelRef

IDS = torch.tensor([[1, 10, 20, 30]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_config(Qwen2Config(**COMMON, tie_word_embeddings=True)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapted(base: Path, **how: Any) -> tuple[Any, ModelRef]:
    """Return a tied model with an untouched adapter on it, and the same as a study names it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT speaks of tied weights
        config = LoraConfig(r=4, init_lora_weights=False, **how)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
        model.save_pretrained(base.parent / "adapter")
    return model, ModelRef(source=str(base), adapter=str(base.parent / "adapter"))


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["head", "embeddings", "both", "dora", "saved head"],
)
def test_a_merged_adapter_gives_what_the_unmerged_one_gives(base: Path, how: dict[str, Any]) -> None:
    # Used to happen: on tied weights a LoRA of the head moved resid_post.1 by 0.95 of its norm.
    unmerged, ref = adapted(base, **how)
    merged = load(ref, device="cpu").model
    with torch.inference_mode():
        theirs, ours = (model(IDS, output_hidden_states=True) for model in (unmerged, merged))
    for expected, value in zip([*theirs.hidden_states, theirs.logits], [*ours.hidden_states, ours.logits], strict=True):
        assert (value - expected).norm() <= 1e-5 * expected.norm()


def test_a_merge_that_changes_the_model_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ref = adapted(base, target_modules=["lm_head"])
    monkeypatch.setattr(adapters, "_untie", lambda model: None)
    with pytest.raises(ModelError, match="does not give what it gives unmerged"):
        load(ref, device="cpu")


def test_activations_of_before_the_repair_have_another_fingerprint(base: Path) -> None:
    _, ref = adapted(base, target_modules=["lm_head"])
    repaired = model_fingerprint(ref)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "unties", lambda folder: False)
        assert model_fingerprint(ref) != repaired
