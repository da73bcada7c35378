"""The lean path computes what transformers' modules compute, row by row, at every site, and refuses other layouts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_reference import random_rows, tiny
from tiny_models import FAMILIES, LAYERS, tiny_model
from torch import Tensor, nn

from pipeline import packed_gemm
from pipeline.architecture import find_architecture
from pipeline.chat import prompt_row
from pipeline.hooks import on_sites
from pipeline.lean_llama import LeanLlama, PackedCausal, lean_llama, why_not
from pipeline.models import LoadedModel
from pipeline.packed_gemm import fused, packed, product
from store.prompts import Message, Prompt
from store.sites import COMPONENTS, Site

LEAN = ("llama", "mistral", "qwen2")
PROMPTS = Path(__file__).parent.parent / "prompts"
# Largest difference to transformers' modules on one unpadded row, relative to the site's largest value.
BOUND = 2e-6


def own(family: str) -> LoadedModel:
    """Return a tiny model that a test may change, with a head of its own."""
    return dataclasses.replace(tiny(family), model=tiny_model(family))


def all_sites(n_layers: int) -> frozenset[Site]:
    return frozenset(Site(component, layer) for component in COMPONENTS for layer in range(n_layers))


@torch.inference_mode()
def packed_values(lean: LeanLlama, rows: list[list[int]]) -> tuple[Tensor, dict[Site, Tensor]]:
    """Return logits [token, vocabulary] and every site's values [token, d_model] of rows lying one after the other."""
    ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, h: Tensor) -> Tensor:
        seen[site] = h.clone()
        return h

    h, rotary, attend = lean.embed(ids), lean.rotary(positions), PackedCausal(lean, [len(row) for row in rows])
    for layer in range(lean.n_layers):
        h = lean.block(layer, h, rotary, attend, keep, all_sites(lean.n_layers))
    return lean.logits(h), seen


@torch.inference_mode()
def unbatched(model: LoadedModel, row: list[int]) -> tuple[Tensor, dict[Site, Tensor]]:
    seen: dict[Site, Tensor] = {}

    def reader(site: Site) -> Any:
        return lambda h: seen.update({site: h[0].clone()})

    with on_sites(model.architecture, {site: reader(site) for site in all_sites(model.architecture.n_layers)}):
        logits = model.model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
    return logits, seen


def compare(model: LoadedModel, lean: LeanLlama, rows: list[list[int]], bound: float) -> None:
    logits, seen = packed_values(lean, rows)
    start = 0
    for row in rows:
        expected_logits, expected = unbatched(model, row)
        here = slice(start, start + len(row))
        start += len(row)
        for name, got, want in [("logits", logits[here], expected_logits)] + [
            (str(site), seen[site][here], value) for site, value in expected.items()
        ]:
            assert (got - want).abs().max() <= bound * want.abs().max(), name


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", LEAN)
def test_packed_rows_hold_at_every_site_what_each_holds_alone(family: str, pack: bool) -> None:
    model = tiny(family)
    lean = lean_llama(model, pack=pack)
    assert lean is not None
    rows = [list(row.token_ids) for row in random_rows([(5, 0), (5, 0), (11, 0), (1, 0), (3, 0), (3, 0)])]
    compare(model, lean, rows, BOUND)


def test_real_prompts_hold_at_every_site_what_each_holds_alone(smollm2: LoadedModel) -> None:
    lines = (PROMPTS / "harmful.jsonl").read_text().splitlines()[:4]
    prompts = [Prompt((Message("user", json.loads(line)["prompt"]),)) for line in lines]
    rows = [list(prompt_row(p, smollm2.tokenizer, smollm2.ref, smollm2.fingerprint).token_ids) for p in prompts]
    lean = lean_llama(smollm2)
    assert lean is not None
    compare(smollm2, lean, rows, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_packed_rows_are_as_near_as_rounding_allows(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    lean = lean_llama(model)
    assert lean is not None
    rows = [list(row.token_ids) for row in random_rows([(5, 0), (9, 0)])]
    compare(model, lean, rows, 0.05 if dtype == torch.bfloat16 else 0.008)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_scaled_rotary_angles_are_those_of_the_model(rope: dict[str, Any]) -> None:
    config = FAMILIES["llama"]()
    config.rope_parameters = {"rope_theta": 10_000.0, **rope}
    torch.manual_seed(0)
    inner = type(tiny("llama").model)(config).eval().requires_grad_(False)
    model = dataclasses.replace(own("llama"), model=inner, architecture=find_architecture(inner))
    lean = lean_llama(model)
    assert lean is not None
    compare(model, lean, [list(random_rows([(9, 0)])[0].token_ids)], BOUND)


def test_what_a_function_returns_at_a_site_flows_on() -> None:
    lean = lean_llama(tiny("llama"))
    assert lean is not None
    ids = torch.tensor([7, 8, 9, 10])
    for site in all_sites(LAYERS):
        outputs = []
        for factor in (1.0, 2.0):
            h, attend = lean.embed(ids), PackedCausal(lean, [4])
            rotary = lean.rotary(torch.arange(4))
            for layer in range(LAYERS):
                at = lambda _, value, factor=factor: factor * value  # noqa: E731
                h = lean.block(layer, h, rotary, attend, at, frozenset({site}))
            outputs.append(h)
        assert not torch.equal(*outputs), f"{site} was not written"


def test_other_layouts_are_refused_with_a_reason(family: str) -> None:
    reason = why_not(tiny(family))
    assert (reason is None) == (family in LEAN)
    assert (lean_llama(tiny(family)) is None) == (family not in LEAN)


def test_a_replaced_module_a_hook_or_another_rotary_embedding_is_refused() -> None:
    class Other(nn.Linear):
        pass

    replaced = own("llama")
    replaced.model.model.layers[1].mlp.up_proj = Other(48, 80)
    assert "a Other stands where a Linear is expected" in str(why_not(replaced))
    hooked = own("llama")
    handle = hooked.model.model.layers[0].register_forward_hook(lambda *args: None)
    assert "hooks" in str(why_not(hooked))
    handle.remove()
    hooked.model(torch.tensor([[7, 8]]), output_hidden_states=True)
    assert hooked.model.model.layers[0]._forward_hooks, "transformers leaves hooks of its own behind"
    assert why_not(hooked) is None
    dynamic = own("llama")
    dynamic.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "dynamic" in str(why_not(dynamic))
    mixed = own("llama")
    mixed.model.model.layers[0].mlp.down_proj.to(torch.bfloat16)
    assert "several dtypes" in str(why_not(mixed))
    flash = own("llama")
    flash.model.config._attn_implementation = "flex_attention"
    assert "flex_attention" in str(why_not(flash))


# -- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_keep_their_parameters_bit_for_bit_and_hold_nothing_twice(bias: bool) -> None:
    torch.manual_seed(0)
    for make in (lambda linears: product(linears, pack=False), fused):
        linears = [nn.Linear(12, n, bias=bias).requires_grad_(False) for n in (5, 3)]
        before = [linear.weight.clone() for linear in linears]
        places = [linear.weight.data_ptr() for linear in linears]
        run, x = make(linears), torch.randn(4, 12)
        torch.testing.assert_close(run(x), torch.cat([linear(x) for linear in linears], 1))
        assert all(torch.equal(linear.weight, old) for linear, old in zip(linears, before, strict=True))
        storages = {linear.weight.untyped_storage().data_ptr() for linear in linears}
        if make is fused:
            assert len(storages) == 1
        else:
            assert places == [linear.weight.data_ptr() for linear in linears]


def test_layers_with_and_without_a_bias_are_not_one_product() -> None:
    with pytest.raises(ValueError, match="bias"):
        product([nn.Linear(12, 2), nn.Linear(12, 2, bias=False)], pack=False)


@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_is_the_plain_one_within_the_bound(bias: bool) -> None:
    torch.manual_seed(0)
    weight, offset = torch.randn(96, 64), torch.randn(96) if bias else None
    run = packed(weight, offset)
    if run is None:
        pytest.skip("this torch has no packed products")
    for rows in (1, 2, 7, 33, 200):
        x = torch.randn(rows, 64)
        expected = nn.functional.linear(x, weight, offset)
        assert (run(x) - expected).abs().max() <= packed_gemm.PACKED_BOUND * expected.abs().max()


def test_packed_products_are_left_where_they_are_wrong_or_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 8)
    assert packed(weight.bfloat16()) is None
    monkeypatch.setattr(packed_gemm, "PACKED_BOUND", -1.0)
    assert packed(weight) is None
    linear = nn.Linear(8, 8)
    x = torch.randn(2, 8)
    assert torch.equal(product([linear], pack=True)(x), linear(x))
