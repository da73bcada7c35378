"""Choosing the vLLM engine, as far as that goes without vLLM: refused before a model is loaded; and its self-test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from slow_reference import tiny
from torch import nn

from pipeline import vllm_engine, workers
from pipeline.vllm_hooks import hook_sites
from pipeline.vllm_selftest import Laws, Probe
from store.errors import ModelError
from store.model_ref import ModelRef
from store.sites import Site
from store.study import Decoding, Replay


def worker(folder: Path, **model: Any) -> workers.ReplayWorker:
    versions = {"versions": {}}
    ref = ModelRef(source="./nowhere", **model)
    return workers.ReplayWorker(
        str(folder), ref, "f" * 64, {}, Decoding(), None, 8, "study", "key", versions, engine="vllm"
    )


def test_the_built_in_engine_is_the_default() -> None:
    assert Replay.model_validate({"prompts": ["p"], "conditions": {"c": {}}}).engine == "resid"


def test_a_worker_without_vllm_says_how_to_get_it_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed here\n  remedy: .*resid\[vllm\].*replay.engine: resid"):
        worker(tmp_path)


@pytest.mark.parametrize("model", [{"adapter": "./adapter"}, {"attn_implementation": "eager"}])
def test_what_vllm_would_run_in_another_way_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, str]
) -> None:
    monkeypatch.setattr(vllm_engine, "vllm_version", lambda: "0")
    with pytest.raises(ModelError, match=rf"model.{next(iter(model))}: (.|\n)*remedy: .*replay.engine: resid"):
        worker(tmp_path, **model)


def test_a_residual_multiplier_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "vllm_version", lambda: "0")
    monkeypatch.setattr(vllm_engine, "load_config", lambda ref: tiny("granite").model.config)
    with pytest.raises(ModelError, match=r"residual multiplier\n  remedy: set `replay.engine: resid`"):
        worker(tmp_path)


class Block(nn.Module):
    """A block as vLLM writes them: two parts whose sum is the stream, here off by a factor where it is to be wrong."""

    def __init__(self, wrong: str | None):
        super().__init__()
        self.self_attn, self.mlp, self.wrong = nn.Linear(8, 8), nn.Linear(8, 8), wrong

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> Any:
        residual = hidden_states if residual is None else hidden_states + residual
        residual = residual + self.self_attn(residual) * (2 if self.wrong == "attention" else 1)
        return self.mlp(residual), residual


class Model(nn.Module):
    def __init__(self, wrong: str | None):
        super().__init__()
        self.model, self.wrong = nn.Module(), wrong
        self.model.layers = nn.ModuleList([Block(wrong), Block(wrong)])
        self.model.config = type("Config", (), {"hidden_size": 8, "model_type": "tiny"})

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        parts: Any = (h, None)
        for layer in self.model.layers:
            parts = layer(parts[0], residual=parts[1])
            if self.wrong == "stream":
                parts = (parts[0], parts[1] * 1.1)
        return parts[0] + parts[1]


def laws(wrong: str | None) -> Laws:
    from pipeline.architecture import find_architecture

    torch.manual_seed(0)
    model = Model(wrong)
    probe = Probe(2, 8)
    hook_sites(find_architecture(model), probe.sites, lambda: probe, probe.tokens)
    with torch.inference_mode():
        model(torch.randn(5, 8))
    return probe.laws()


def test_the_self_test_passes_where_sites_are_what_their_names_say() -> None:
    found = laws(None)
    assert found.passed
    assert found.tokens == 5
    assert not laws("attention").passed
    assert not laws("stream").passed
    assert not Probe(2, 8).laws().passed  # nothing came by


def test_a_site_behind_a_residual_multiplier_is_refused() -> None:
    with pytest.raises(ModelError, match=r"attn_out.0: the vLLM engine does not serve it"):
        hook_sites(
            tiny("granite").architecture, frozenset({Site("attn_out", 0)}), lambda: None, lambda site: torch.empty(0)
        )
