"""Files of tensors that are imported: what is read of them, and what damaged, foreign and hostile ones are met with."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_imports import VALUES, VALUES_T, arrays, take
from torch import nn

from jobs.cli import build_parser
from jobs.store import run
from pipeline.torch_files import read_torch_tensors
from store.activations import ActivationStore
from store.errors import MismatchError, ResidError
from store.imports import Declared, import_activations, read_tensors


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResidError, match="no such file"):
        read_tensors(tmp_path / "none.npz")
    with pytest.raises(MismatchError, match="can be imported"):
        read_tensors(Path(__file__))


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_damaged_file_is_a_message(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        arrays(path, x=VALUES)
    elif suffix == ".npy":
        np.save(path, VALUES)
    elif suffix == ".safetensors":
        save_file({"x": torch.from_numpy(VALUES)}, path)
    else:
        torch.save(torch.from_numpy(VALUES), path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"{}\n" * 50, "cut": data[: len(data) // 2]}[damage])
    arguments = ["--store", str(tmp_path / "store"), "--model", "m", "--convention", "resid_post"]
    with pytest.raises(MismatchError, match=re.escape(str(path))):
        run(build_parser().parse_args(["store", "import", str(path), *arguments]))
    assert not (tmp_path / "store").exists()


class Bomb:
    """What a hostile pickle does."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("bomb", [Bomb(), Path("nothing"), np.dtype])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: object) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": torch.ones(2), "y": bomb}, tmp_path / "a.pt")
    with pytest.raises(MismatchError, match=r"no file of plain tensors.*\n.*safetensors"):
        read_torch_tensors(tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", x=np.array([bomb]), y=VALUES)
    take(tmp_path, tmp_path / "a.npz")  # the other array is fine
    with pytest.raises(MismatchError, match="'x' is object"):
        take(tmp_path, tmp_path / "a.npz", key="x")
    assert not (tmp_path / "exploded").exists()


def test_tensors_of_any_kind_are_listed_and_those_of_floats_read(tmp_path: Path) -> None:
    tensors = {
        "f64": torch.ones(2, 1, 3, dtype=torch.float64),
        "bf16": torch.full((2, 1, 3), 1.5, dtype=torch.bfloat16),
        "f8": torch.ones(2, 1, 3).to(torch.float8_e4m3fn),
        "ids": torch.arange(3),
        "mask": torch.ones(2, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(
        {**tensors, "name": "x", "n": 3, "list": [torch.ones(1)], "grad": nn.Parameter(VALUES_T)}, tmp_path / "a.pt"
    )
    for found in (read_tensors(tmp_path / "a.safetensors"), read_torch_tensors(tmp_path / "a.pt")):
        assert set(tensors) <= set(found)
        assert (found["bf16"].dtype, found["f64"].dtype) == ("bfloat16", "float64")
        np.testing.assert_array_equal(found["bf16"].read().astype(np.float32), np.full((2, 1, 3), 1.5))
    assert "list.0" in found
    np.testing.assert_array_equal(found["grad"].read(), VALUES)
    for key in ("f8", "ids", "mask"):
        for each in (read_tensors(tmp_path / "a.safetensors"), found):
            with pytest.raises(MismatchError, match=f"'{key}' is"):
                import_activations(
                    ActivationStore.open(str(tmp_path / "s")),
                    tmp_path / "a.pt",
                    each,
                    Declared("m", "resid_post", key=key),
                )
