"""Imported activations are those of the file, at the sites that its convention means, and never mix with captures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from s3_server import bucket as bucket
from s3_server import s3 as s3
from safetensors.torch import save_file
from slow_reference import random_rows, tiny
from store_worker import capture, make_rows, new_store, request

from jobs.cli import build_parser
from jobs.store import run
from pipeline.capture import BATCH_BOUND, CaptureEngine
from pipeline.torch_files import read_torch_tensors
from store.activations import ActivationStore
from store.dtypes import NUMPY_DTYPES
from store.errors import DamageError, MismatchError, MissingDataError, NonFiniteError
from store.exports import Export, export
from store.generation import Generation, GenerationPlan
from store.imports import Declared, import_activations, read_tensors
from store.sites import Component

ROWS = make_rows(10)
Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run ``resid store`` on the store of this test."""

    def call(name: str, *options: str) -> int:
        return run(build_parser().parse_args(["store", name, "--store", str(tmp_path / "store"), *options]))

    return call


# -- import ------------------------------------------------------------------------------------------------------

VALUES = np.random.default_rng(3).standard_normal((6, 5, 8)).astype(np.float32)  # [row, layer, d_model]
VALUES_T = torch.from_numpy(VALUES)


def arrays(path: Path, **tensors: np.ndarray) -> Path:
    np.savez(path, **tensors)
    return path


def take(tmp_path: Path, path: Path, texts: list[str] | None = None, **declared: Any) -> Any:
    known = {"model": "org/name", "convention": "resid_post", **declared}
    store = ActivationStore.open(str(tmp_path / "store"))
    return import_activations(store, path, read_tensors(path), Declared(**known), texts)


def test_hidden_states_become_the_sites_that_they_are(tmp_path: Path) -> None:
    done = take(tmp_path, arrays(tmp_path / "a.npz", acts=VALUES), convention="hidden_states", prompt_set="harmful")
    assert "hidden_states[4] is after the final norm" in done.skipped
    store = ActivationStore.open(str(tmp_path / "store"))
    np.testing.assert_array_equal(store.select(prompts="harmful", site="resid_pre.0").to_numpy(), VALUES[:, 0])
    read = store.select(prompts="harmful", model="name")
    assert read.layers == (0, 1, 2)
    np.testing.assert_array_equal(read.to_numpy(), VALUES[:, 1:4])
    assert store.models()[0].manifest["n_layers"] == 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npz"])
def test_hidden_states_of_a_model_are_the_sites_that_resid_captures(tmp_path: Path, family: str, suffix: str) -> None:
    model = tiny(family)
    n = model.architecture.n_layers
    rows = [dataclasses.replace(row, model=model.fingerprint) for row in random_rows([(4, 0), (7, 0), (5, 0)])]
    published = []
    for row in rows:
        with torch.inference_mode():
            states = model.model(input_ids=torch.tensor([row.token_ids]), output_hidden_states=True).hidden_states
        published.append(torch.stack([state[0, -1] for state in states]))
    values = torch.stack(published).clone()  # [row, layer, d_model]
    assert values.shape[1] == n + 1
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":
        torch.save({"acts": values}, path)
    elif suffix == "safetensors":
        save_file({"acts": values}, path)
    else:
        arrays(path, acts=values.numpy())
    arguments = ["--store", str(tmp_path / "store"), "--model", family, "--convention", "hidden_states", "--set", "all"]
    assert run(build_parser().parse_args(["store", "import", str(path), *arguments])) == 0
    store = ActivationStore.open(str(tmp_path / "store"))
    assert store.find_model(family).manifest["n_layers"] == n
    sites: dict[Component, list[int]] = {"resid_pre": [0], "resid_post": list(range(n - 1))}
    for component, layers in sites.items():
        plan = GenerationPlan(
            model=model.fingerprint,
            d_model=model.architecture.d_model,
            components=(component,),
            layers=tuple(layers),
            positions=("prompt_end",),
            dtype="float32",
            n_rows=len(rows),
            block_rows=len(rows),
        )
        captured = CaptureEngine(model).run(rows, plan)[component][:, :, 0]
        read = store.select(model=family, prompts="all", site=component)
        assert list(read.layers) == layers
        bound = BATCH_BOUND * np.abs(captured).max(axis=-1, keepdims=True)
        assert (np.abs(read.to_numpy() - captured) <= bound).all()
    # What is after the final norm is at no site: the last block's output is not what the file ends with.
    with pytest.raises(MissingDataError):
        store.select(model=family, prompts="all", layer=n - 1)


@pytest.mark.parametrize("format", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_what_was_exported_can_be_imported(tmp_path: Path, dtype: Any, format: str) -> None:
    model = new_store(str(tmp_path / "first"), dtype)
    capture(model, request(ROWS, dtype=dtype))
    selection = model.select([row.key for row in ROWS], "resid_post", "prompt_end")
    kept: Any = "float32" if (dtype, format) == ("bfloat16", "npz") else "stored"
    what = Export(selection, {}, kept)
    export(what, format, tmp_path / f"a.{format}")
    take(tmp_path, tmp_path / f"a.{format}")
    read = ActivationStore.open(str(tmp_path / "store")).select(prompts="imported")
    assert read.stored_dtype == (np.float32 if kept == "float32" else NUMPY_DTYPES[dtype])
    at = [selection.row_keys.index(key) for key in what.ordered.row_keys]
    np.testing.assert_array_equal(read.to_numpy(), selection.to_numpy()[at])
    width = f"u{read.stored_dtype.itemsize}"
    np.testing.assert_array_equal(
        read.to_numpy("stored").copy().view(width), selection.to_numpy(kept)[at].copy().view(width)
    )


def test_a_second_import_of_a_file_finds_it(tmp_path: Path) -> None:
    path = arrays(tmp_path / "a.npz", acts=VALUES)
    assert take(tmp_path, path).new_blocks == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.json")}
    assert take(tmp_path, path).new_blocks == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.json")} == before


def test_what_an_imported_model_lacks_is_to_be_imported(tmp_path: Path) -> None:
    # Used to happen: "resid capture", which no capture of a model that is only a name could follow.
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2, 8), np.float32))
    store = ActivationStore.open(str(tmp_path / "store"))
    declared = Declared(model="some lab/a model", convention="resid_post")
    path = tmp_path / "a.npz"
    import_activations(store, path, read_tensors(path), declared)
    command = "resid store import <file> --model 'some lab/a model' --convention <convention>"
    model = store.find_model("some lab/a model")
    rows = [store.select(prompts="imported").row_keys[0]]
    for lacking in (
        lambda: store.select(prompts="imported", position="response_avg"),
        lambda: store.select(prompts="imported", site="mlp_out"),
        lambda: store.select(site="attn_out"),
        lambda: store.select(rows=["0" * 64]),
        lambda: model.select(rows, "mlp_out", "prompt_end"),
    ):
        with pytest.raises(MissingDataError) as caught:
            lacking()
        assert f"remedy: {command} (its file has to hold components: [" in str(caught.value)
        assert "capture" not in str(caught.value).partition("remedy")[2]
    with pytest.raises(MissingDataError, match="remedy: resid store import <file>"):
        model.memberships.table("other")
    table = model.memberships.location.path / "imported.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(DamageError, match=r"remedy: remove it, then resid store import <file>, which writes it again"):
        ActivationStore.open(str(tmp_path / "store")).select(prompts="imported")
    table.unlink()
    import_activations(store, path, read_tensors(path), declared)
    assert store.select(prompts="imported").shape == (3, 2, 8)


def test_two_sets_of_one_model_lie_beside_each_other_with_their_texts(tmp_path: Path) -> None:
    other = VALUES[::-1] * 2
    take(tmp_path, arrays(tmp_path / "a.npz", x=VALUES), prompt_set="harmful", texts=[f"do {i}" for i in range(6)])
    take(tmp_path, arrays(tmp_path / "b.npz", x=other), prompt_set="harmless")
    store = ActivationStore.open(str(tmp_path / "store"))
    np.testing.assert_array_equal(store.select(prompts="harmful", layer=3).to_numpy(), VALUES[:, 3])
    np.testing.assert_array_equal(store.select(prompts="harmless", layer=3).to_numpy(), other[:, 3])
    texts = store.models()[0].memberships.prompts(["harmful"])
    assert [texts[key][1] for key in store.select(prompts="harmful").row_keys] == [f"do {i}" for i in range(6)]
    with pytest.raises(MismatchError, match="--set"):
        take(tmp_path, tmp_path / "b.npz", prompt_set="harmful")


def test_imported_rows_never_mix_with_captured_ones(tmp_path: Path) -> None:
    captured = new_store(str(tmp_path / "store"))
    capture(captured, request(ROWS))
    take(tmp_path, arrays(tmp_path / "a.npz", x=VALUES), model="5e5e")
    store = ActivationStore.open(str(tmp_path / "store"))
    assert len(store.models()) == 2
    imported = next(model for model in store.models() if model.manifest.get("imported"))
    assert not {g.id for g in imported.generations()} & {g.id for g in captured.generations()}


def test_layouts_of_published_files_are_read(tmp_path: Path) -> None:
    torch.save(
        {"acts": {"layer_0": torch.from_numpy(VALUES[:, 0]), "layer_1": torch.from_numpy(VALUES[:, 1])}},
        tmp_path / "a.pt",
    )
    store = ActivationStore.open(str(tmp_path / "store"))
    tensors = read_torch_tensors(tmp_path / "a.pt")
    declared = Declared("pt", "resid_post", key="acts.layer_{layer}", prompt_set="pt")
    import_activations(store, tmp_path / "a.pt", tensors, declared)
    np.testing.assert_array_equal(store.select(prompts="pt").to_numpy(), VALUES[:, :2])
    half = torch.from_numpy(VALUES[:, 2]).to(torch.bfloat16)
    save_file({"x": half}, tmp_path / "b.safetensors")
    take(tmp_path, tmp_path / "b.safetensors", model="b", dims=("row", "d_model"), layers=(17,), prompt_set="b")
    read = store.select(prompts="b", model="b", layer=17)
    np.testing.assert_array_equal(read.to_numpy(), half.float().numpy())
    take(tmp_path, arrays(tmp_path / "c.npz", x=VALUES.transpose(1, 2, 0)), model="c", dims=("layer", "d_model", "row"))
    np.testing.assert_array_equal(store.select(model="c", prompts="imported").to_numpy(), VALUES)


NAN = np.where(VALUES[4, 2, 1] == VALUES, np.nan, VALUES)
LAST = {"convention": "hidden_states", "layers": (4,)}
FAULTS: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "no such key": ({"x": VALUES}, {"key": "y"}, r"no tensor 'y'.*x \[6, 5, 8\]"),
    "several tensors": ({"x": VALUES, "y": VALUES}, {}, "--key"),
    "axes": ({"x": VALUES[0]}, {}, "which is not row,layer,d_model"),
    "layers": ({"x": VALUES}, {"layers": (1, 2)}, "5 layers, and 2 are declared"),
    "too deep": ({"x": VALUES}, {"n_layers": 3}, "5 layers, and a model of 3 blocks has 3"),
    "too deep by name": ({"x": VALUES}, {"layers": (1, 2, 3, 4, 5), "n_layers": 5}, "no layer 5 in a model of 5"),
    "too few": ({"x": VALUES}, {"n_layers": 5, "convention": "hidden_states"}, "a model of 5 blocks has 6 entries"),
    "too deep a state": (
        {"x": VALUES},
        {"n_layers": 4, "convention": "hidden_states", "layers": (1, 2, 3, 4, 5)},
        r"no hidden_states\[5\]",
    ),
    "one block": ({"x": VALUES[:, :1]}, {"convention": "hidden_states"}, "--n-layers"),
    "a layer twice": ({"x": VALUES}, {"layers": (1, 1)}, "named once"),
    "unknown axes": ({"x": VALUES}, {"dims": ("row", "token", "d_model")}, "dims are row"),
    "unknown convention": ({"x": VALUES}, {"convention": "resid_mid"}, "unknown convention"),
    "integers": ({"x": VALUES.astype(np.int32)}, {"key": "x"}, "'x' is int32"),
    "no bfloat16 in npz": ({"x": VALUES.astype(NUMPY_DTYPES["bfloat16"])}, {"key": "x"}, "NumPy's files have no bf"),
    "no values": ({"x": VALUES[:0]}, {}, "nothing in it"),
    "infinity": ({"x": np.where(VALUES[5, 4, 0] == VALUES, np.inf, VALUES)}, {}, "'x' at 4 of its.*NaN.*row 5"),
    "float64 too large": ({"x": VALUES.astype(np.float64) * 1e300}, {}, "float64 and does not fit"),
    "float64 NaN": ({"x": np.full((2, 1, 3), np.nan)}, {}, "NaN or infinity, first in row 0"),
    "a name like a path": ({"x": VALUES}, {"study": "../x"}, "name of a study"),
    "sizes": ({"l0": VALUES[:, 0], "l1": VALUES[1:, 1]}, {"key": "l{layer}"}, r"'l1' is float32 \[5, 8\]"),
    "dtypes": ({"l0": VALUES[:, 0], "l1": VALUES[:, 1].astype("f2")}, {"key": "l{layer}"}, "'l1' is float16"),
    "no such layer": ({"l0": VALUES[:, 0]}, {"key": "l{layer}", "layers": (0, 3)}, "finds nothing for 3"),
    "some states": (
        {"l1": VALUES[:, 0], "l2": VALUES[:, 1]},
        {"key": "l{layer}", "convention": "hidden_states"},
        "which of hidden_states",
    ),
    "NaN": ({"x": NAN}, {}, r"a\.npz: 'x' at 2 of its layer axis \(resid_post\.2\) holds NaN.*row 4"),
    "float64": ({"x": VALUES.astype(np.float64) / 3}, {}, "float64"),
    "after the norm": ({"x": VALUES[:, :1]}, {**LAST, "n_layers": 4}, "after the final norm"),
    "which is last": ({"x": VALUES[:, :1]}, LAST, "--n-layers"),
    "no layer axis": ({"x": VALUES[:, 0]}, {"dims": ("row", "d_model")}, "--layers"),
    "no position": ({"x": VALUES}, {"position": "token:9"}, "no position token:9"),
    "pickle": ({"x": np.array([object()])}, {}, "a.npz"),
    "no layer of the pattern": ({"x": VALUES}, {"key": "layer_{layer}"}, "finds nothing for every layer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_as_declared_is_refused(tmp_path: Path, fault: str) -> None:
    tensors, declared, message = FAULTS[fault]
    path = arrays(tmp_path / "a.npz", **tensors)
    with pytest.raises((MismatchError, NonFiniteError), match=message):
        take(tmp_path, path, **declared)
    assert not list((tmp_path / "store").glob("*/_records/*/commits/*"))


def test_a_mistake_that_is_corrected_leaves_no_wrong_numbers(tmp_path: Path) -> None:
    """Rows used to be those of the file, however it was read: what was corrected found the mistake in the store."""
    square = np.random.default_rng(4).standard_normal((5, 5, 8)).astype(np.float32)
    path = arrays(tmp_path / "a.npz", x=square, y=square * 2)
    readings: list[tuple[dict[str, Any], np.ndarray, int]] = [
        ({"key": "x"}, square, 0),
        ({"key": "y"}, square * 2, 0),  # another tensor of the file
        ({"key": "x", "dims": ("layer", "row", "d_model")}, square.transpose(1, 0, 2), 0),
        ({"key": "x", "layers": (10, 11, 12, 13, 14)}, square, 10),
        ({"key": "x", "convention": "attn_out"}, square, 0),
        ({"key": "x", "position": "response_avg"}, square, 0),
    ]
    store = ActivationStore.open(str(tmp_path / "store"))
    for i, (declared, values, first) in enumerate(readings):
        if i:
            with pytest.raises(MismatchError, match="--set"):
                take(tmp_path, path, **readings[0][0] | declared, prompt_set="set 0")
        take(tmp_path, path, **declared, prompt_set=f"set {i}")
        for j, (its, expected, at) in enumerate(readings[: i + 1]):
            asked = {"site": its.get("convention", "resid_post"), "position": its.get("position", "prompt_end")}
            read = store.select(prompts=f"set {j}", **asked)
            assert read.layers == tuple(range(at, at + 5))
            np.testing.assert_array_equal(read.to_numpy(), expected)
        assert values is expected
        assert first == at


def test_some_layers_of_a_file_are_imported_and_then_the_others(tmp_path: Path) -> None:
    path = arrays(tmp_path / "a.npz", x=VALUES)
    assert take(tmp_path, path, n_layers=5, layers=(3, 1)).new_blocks == 1
    store = ActivationStore.open(str(tmp_path / "store"))
    assert store.select(prompts="imported").layers == (1, 3)
    np.testing.assert_array_equal(store.select(prompts="imported", layer=3).to_numpy(), VALUES[:, 3])
    assert take(tmp_path, path, n_layers=5).new_blocks == 1
    np.testing.assert_array_equal(store.select(prompts="imported").to_numpy(), VALUES)
    (model,) = store.models()
    assert sorted(g.plan.layers for g in model.generations()) == [(0, 2, 4), (1, 3)]
    half = {f"layer_{i}": VALUES[:, i] for i in range(5)}
    take(tmp_path, arrays(tmp_path / "b.npz", **half), key="layer_{layer}", layers=(4, 2), prompt_set="b")
    assert store.select(prompts="b").layers == (2, 4)
    np.testing.assert_array_equal(store.select(prompts="b").to_numpy(), VALUES[:, [2, 4]])


def test_the_last_hidden_state_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    path = arrays(tmp_path / "a.npz", x=VALUES)
    declared: dict[str, Any] = {"convention": "hidden_states", "n_layers": 4}
    for layers in ((4,), (0, 1, 2, 3, 4)):
        with pytest.raises(MismatchError, match=r"hidden_states\[4\] is after the final norm"):
            take(tmp_path, path, **declared, layers=layers)
    assert take(tmp_path, path, **declared, layers=(0, 3)).skipped == ""
    store = ActivationStore.open(str(tmp_path / "store"))
    np.testing.assert_array_equal(store.select(prompts="imported", site="resid_post.2").to_numpy(), VALUES[:, 3])
    assert "after the final norm" in take(tmp_path, path, **declared).skipped


def test_float64_that_fits_is_kept_as_float32(tmp_path: Path) -> None:
    take(tmp_path, arrays(tmp_path / "a.npz", x=VALUES.astype(np.float64)))
    read = ActivationStore.open(str(tmp_path / "store")).select(prompts="imported")
    assert read.stored_dtype == np.float32
    np.testing.assert_array_equal(read.to_numpy(), VALUES)


def test_one_name_is_one_model(tmp_path: Path) -> None:
    take(tmp_path, arrays(tmp_path / "a.npz", x=VALUES), n_layers=5)
    take(tmp_path, arrays(tmp_path / "b.npz", x=VALUES[:, :3]), convention="mlp_out", prompt_set="b")
    wrong: list[tuple[np.ndarray, dict[str, Any]]] = [
        (VALUES[:, :3], {"n_layers": 7, "layers": (0, 1, 2)}),
        (VALUES, {"dims": ("row", "d_model", "layer")}),
    ]
    for values, declared in wrong:
        with pytest.raises(MismatchError, match="another name with --model"):
            take(tmp_path, arrays(tmp_path / "c.npz", x=values), **declared)
    captured = ActivationStore.open(str(tmp_path / "store")).add_model(
        {"fingerprint": "5e" * 32, "dtype": "float32", "n_layers": 5, "d_model": 8, "ref": {"source": "org/other"}}
    )
    with pytest.raises(MismatchError, match=r"holds captures of 'org/other'.*\n.*--model"):
        take(tmp_path, tmp_path / "a.npz", model="org/other")
    assert captured.generations() == []


def test_a_killed_import_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = np.random.default_rng(5).standard_normal((100, 2, 8)).astype(np.float32)
    path = arrays(tmp_path / "a.npz", x=many)
    original, calls = Generation.write_block, []

    def killed(self: Generation, *arguments: Any) -> bool:
        calls.append(arguments[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Generation, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            take(tmp_path, path)
    with pytest.raises(MismatchError, match=r"also at resid_post\.0, was not finished"):
        take(tmp_path, path, n_layers=2, layers=(1,))
    done = take(tmp_path, path)
    (generation,) = ActivationStore.open(str(tmp_path / "store")).models()[0].generations()
    assert done.new_blocks == generation.plan.n_blocks - 2
    np.testing.assert_array_equal(
        ActivationStore.open(str(tmp_path / "store")).select(prompts="imported").to_numpy(), many
    )


def test_an_import_on_object_storage_is_the_same(bucket: str, tmp_path: Path) -> None:
    path = arrays(tmp_path / "a.npz", x=VALUES)
    store = ActivationStore.open(f"{bucket}/store")
    for new in (1, 0):
        done = import_activations(store, path, read_tensors(path), Declared("m", "resid_post"))
        assert done.new_blocks == new
    np.testing.assert_array_equal(store.select(prompts="imported", model="m", layer=2).to_numpy(), VALUES[:, 2])


def test_import_by_command(tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    arrays(tmp_path / "a.npz", acts=VALUES)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"text {i}"}) + "\n" for i in range(6)))
    options = ["--model", "m", "--convention", "resid_post", "--set", "s", "--prompts", str(prompts), "--layers", "2-6"]
    assert command("import", str(tmp_path / "a.npz"), *options) == 0
    assert "imported: 6 rows at 5 sites (resid_post.2, resid_post.6)" in capsys.readouterr().out
    assert command("import", str(tmp_path / "a.npz"), *options) == 0
    assert "found in the store" in capsys.readouterr().out
    prompts.write_text('{"text": 1}\n')
    with pytest.raises(MismatchError, match="line 1"):
        command("import", str(tmp_path / "a.npz"), *options)
