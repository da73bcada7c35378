"""The receipt that says whether texts depend on their batch, and where it is shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_reference import random_rows, tiny

from jobs.check_model import noise_floor
from jobs.context import table_of
from pipeline.exactness import N_CONDITIONS, agreements
from pipeline.models import LoadedModel
from store.location import Location
from store.results import ResultStore
from store.study import Decoding


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_float32_every_way_to_run_gives_the_same_texts(family: str) -> None:
    rows = random_rows([(5, 0), (9, 0), (7, 0)], seed=8)
    receipt = list(agreements(tiny(family), rows, Decoding(max_new_tokens=8)))
    assert {"the same again", "a quarter at a time", "one at a time", "nothing shared"} <= {one.way for one in receipt}
    for one in receipt:
        assert (one.n_texts, one.n_equal, one.first_difference) == (len(rows) * N_CONDITIONS,) * 2 + (None,)


def test_a_text_that_depends_on_its_batch_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import exactness

    class Leaky(exactness.ReplayEngine):
        def run(self, jobs: Any) -> Any:
            outputs = super().run(jobs)
            if len(jobs) == 1:
                outputs[0].token_ids[2:3] = [0]
            return outputs

    monkeypatch.setattr(exactness, "ReplayEngine", Leaky)
    receipt = {one.way: one for one in agreements(tiny("llama"), random_rows([(5, 0)]), Decoding(max_new_tokens=8))}
    assert receipt["one at a time"].n_equal == 0
    assert receipt["one at a time"].first_difference == 2
    assert receipt["nothing shared"].n_equal == N_CONDITIONS


def test_bfloat16_texts_of_smollm2_are_counted_and_repeat(smollm2: LoadedModel) -> None:
    from pipeline.chat import prompt_row
    from store.prompts import Prompt

    model = dataclasses.replace(smollm2, model=_in_bfloat16(smollm2.ref), dtype=torch.bfloat16)
    row = prompt_row(Prompt.of("Name three rivers."), model.tokenizer, model.ref, "m", with_response=False)
    receipt = {one.way: one for one in agreements(model, [row], Decoding(max_new_tokens=6))}
    assert receipt["the same again"].n_equal == N_CONDITIONS
    assert all(0 <= one.n_equal <= one.n_texts for one in receipt.values())


def _in_bfloat16(ref: Any) -> Any:
    from pipeline.models import load

    return load(ref.model_copy(update={"dtype": "bfloat16"}), device="cpu", self_test=False).model


def test_the_noise_floor_is_the_worst_way_to_run(tmp_path: Path) -> None:
    results = Location.of(str(tmp_path))
    assert "not measured" in noise_floor(results, "m")
    record = {"model": "m", "dtype": "bfloat16", "device": "cpu", "n_texts": 48, "max_new_tokens": 32}
    ways = [{**record, "way": way, "n_equal": n, "first_difference": None} for way, n in (("a", 39), ("b", 33))]
    ResultStore(results).replace("exactness", "m", table_of("exactness", ways))
    assert "15 of 48 texts (31%)" in noise_floor(results, "m")
    assert "run b (bfloat16 on cpu)" in noise_floor(results, "m")
    ResultStore(results).replace("exactness", "m", table_of("exactness", [{**ways[0], "n_equal": 48}]))
    assert noise_floor(results, "m") == "Noise floor: 0 of 48 texts depended on their batch (bfloat16 on cpu)."
