"""Exports hold what is selected, exactly, in the formats of other libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from store_worker import MODEL, capture, make_rows, make_texts, new_store, request, truth

from jobs.cli import build_parser
from jobs.store import run
from store import export_steps, exports
from store.activations import ModelStore
from store.dtypes import NUMPY_DTYPES
from store.errors import DamageError, MismatchError, ResidError, ResourceError
from store.exports import FORMATS, Export, export
from store.generation import Generation
from store.rows import Row
from store.sites import ALL_TOKENS

ROWS = make_rows(10)
Command = Callable[..., int]


@pytest.fixture
def model(tmp_path: Path) -> ModelStore:
    """Return a store of ten rows in two captures, and two prompt sets."""
    model = new_store(str(tmp_path / "store"))
    capture(model, request(ROWS[:7], ("resid_post", "mlp_out"), positions=["prompt_end", "response_avg"]), block_rows=3)
    capture(model, request(ROWS[7:]))
    remember(model, {"harmful@test": ROWS[4:9], "all": ROWS})
    return model


def remember(model: ModelStore, sets: dict[str, tuple[Row, ...]]) -> None:
    records = [
        {
            "prompt_set": n,
            "responses": None,
            "prompt_id": row.prompt_id,
            "row_key": row.key,
            "text": f"of {row.prompt_id}",
        }
        for n, rows in sets.items()
        for row in rows
    ]
    model.memberships.write("demo", "studies/demo.yaml", records)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run ``resid store`` on the store of this test."""

    def call(name: str, *options: str) -> int:
        return run(build_parser().parse_args(["store", name, "--store", str(tmp_path / "store"), *options]))

    return call


# -- export ------------------------------------------------------------------------------------------------------


def exported(path: Path, format: str) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    """Read an export with the library that it is for: row keys, values [row, layer, d_model], about."""
    if format == "npz":
        with np.load(path, allow_pickle=False) as found:
            return list(found["row_key"]), found["activations"], json.loads(str(found["about"]))
    if format == "safetensors":
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            values = file.get_tensor("activations")
            values = values.view(torch.int16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
            return json.loads(about["row_key"]), values, json.loads(about["about"])
    file = path if format == "parquet" else path / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    about = json.loads(table.schema.metadata[b"resid"])
    values = table["activation"].combine_chunks().values.to_numpy()
    values = values.reshape(-1, len(about["layers"]), table.schema.field("activation").type.list_size)
    return list(dict.fromkeys(table["row_key"].to_pylist())), values, about


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_holds_what_is_selected(model: ModelStore, command: Command, tmp_path: Path, format: str) -> None:
    output = tmp_path / f"out.{format}"
    options = ["--format", format, "--output", str(output), "--prompts", "harmful@test", "--layers", "1,3-4"]
    assert command("export", *options) == 0
    keys, values, about = exported(output, format)
    assert set(keys) == {row.key for row in ROWS[4:9]}
    for key, found in zip(keys, values, strict=True):
        row = next(row for row in ROWS if row.key == key)
        np.testing.assert_array_equal(found, [truth(row, "resid_post", layer, "prompt_end") for layer in (1, 3, 4)])
    assert (about["component"], about["layers"], about["model"]) == ("resid_post", [1, 3, 4], MODEL)
    with pytest.raises(MismatchError, match="--force"):
        command("export", *options)
    assert command("export", *options, "--force") == 0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_dtype_is_exported_exactly(tmp_path: Path, format: str, dtype: Any) -> None:
    model = new_store(str(tmp_path / "store"), dtype)
    capture(model, request(ROWS, dtype=dtype), block_rows=4)
    selection = model.select([row.key for row in ROWS], "resid_post", "prompt_end")
    export(Export(selection, {}), format, tmp_path / "a")
    keys, values, _ = exported(tmp_path / "a", format)
    at = [selection.row_keys.index(key) for key in keys]
    np.testing.assert_array_equal(values, selection.to_numpy()[at])
    if dtype == "bfloat16" and format != "safetensors":
        with pytest.raises(MismatchError, match="no bfloat16"):
            export(Export(selection, {}, "stored"), format, tmp_path / "b")
    else:
        export(Export(selection, {}, "stored"), format, tmp_path / "b")
        keys, values, _ = exported(tmp_path / "b", format)
        width = f"u{values.dtype.itemsize}"
        np.testing.assert_array_equal(values.view(width), selection.to_numpy("stored")[at].copy().view(width))


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_all_tokens_are_exported_row_by_row(tmp_path: Path, dtype: Any) -> None:
    model = new_store(str(tmp_path / "store"), dtype)
    texts = make_texts(12)
    # Different captures, with different blocks, serve different layers.
    capture(model, request(texts, layers=[2], positions=[ALL_TOKENS], dtype=dtype), block_rows=5)
    capture(model, request(texts[3:9], layers=[4], positions=[ALL_TOKENS], dtype=dtype), block_rows=2)
    selection = model.select([row.key for row in texts[3:9]], "resid_post", ALL_TOKENS)
    assert selection.layers == (2, 4)
    everything = selection.to_numpy()
    for format in FORMATS:
        export(Export(selection, {}), format, tmp_path / format)
    with np.load(tmp_path / "npz") as found:
        keys, offsets, values = list(found["row_key"]), found["offsets"], found["activations"]
    assert selection.offsets is not None
    for i, key in enumerate(keys):
        r = selection.row_keys.index(key)
        expected = everything[selection.offsets[r] : selection.offsets[r + 1]]
        np.testing.assert_array_equal(values[offsets[i] : offsets[i + 1]], expected)
    with safe_open(tmp_path / "safetensors", framework="pt") as file:
        np.testing.assert_array_equal(file.get_tensor("offsets").numpy(), offsets)
        np.testing.assert_array_equal(file.get_tensor("activations").numpy(), values)
    for path in (tmp_path / "parquet", tmp_path / "hf" / "data" / "train-00000-of-00001.parquet"):
        table = pq.read_table(path)
        index = [t for n in np.diff(offsets) for t in range(n)]
        assert table["token_index"].to_pylist() == [t for t in index for _ in range(2)]
        assert table["layer"].to_pylist() == [2, 4] * len(index)
        of = [keys[i] for i, n in enumerate(np.diff(offsets)) for _ in range(2 * n)]
        assert table["row_key"].to_pylist() == of
        flat = table["activation"].combine_chunks().values.to_numpy()
        np.testing.assert_array_equal(flat.reshape(values.shape), values)


def test_tokens_of_any_number_are_exported_as_they_are_stored(tmp_path: Path) -> None:
    """bfloat16 values before 64-bit offsets in a file used to leave these where PyTorch cannot read them."""
    model = new_store(str(tmp_path / "store"), "bfloat16", d_model=1)
    (text,) = [row for row in make_texts(9) if row.spans.response_end == 3]
    capture(model, request([text], layers=[0], positions=[ALL_TOKENS], dtype="bfloat16"))
    selection = model.select([text.key], "resid_post", ALL_TOKENS)
    export(Export(selection, {}, "stored"), "safetensors", tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.get_tensor("offsets").tolist() == [0, 3]
        np.testing.assert_array_equal(file.get_tensor("activations").float().numpy(), selection.to_numpy())


# -- steps -------------------------------------------------------------------------------------------------------------


def spread(tmp_path: Path) -> tuple[ModelStore, list[str]]:
    """Return a store whose layers lie in captures with different blocks, and row keys in no order."""
    model = new_store(str(tmp_path / "store"), "bfloat16")
    rows = make_rows(50)
    capture(model, request(rows[10:], layers=[0, 1], dtype="bfloat16"), block_rows=7)
    capture(model, request(rows[:40], layers=[1, 2], dtype="bfloat16"), block_rows=4)
    capture(model, request(rows, layers=[3]), block_rows=16)
    return model, [rows[i].key for i in np.random.default_rng(2).permutation(np.arange(10, 40))]


def test_steps_give_each_value_once_in_the_order_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, keys = spread(tmp_path)
    for layers in ([0], [1, 2], [0, 1, 2, 3], [3]):
        selection = model.select(keys, "resid_post", "prompt_end", layers)
        what = Export(selection, {})
        for size in (1, 3 * 16 * 4, 1 << 24):
            monkeypatch.setattr(export_steps, "STEP_BYTES", size)
            steps = list(what.steps())
            assert [first for first, _ in steps] == list(np.cumsum([0, *(len(v) for _, v in steps)])[:-1])
            np.testing.assert_array_equal(np.concatenate([values for _, values in steps]), what.ordered.to_numpy())
            assert all(values.nbytes <= max(size, len(layers) * 16 * 4) for _, values in steps)
    assert sorted(what.ordered.row_keys) == sorted(keys)


def test_each_block_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_store(str(tmp_path / "store"))
    rows = make_rows(50)
    capture(model, request(rows), block_rows=7)
    (generation,) = model.generations()
    chosen = [key for i, key in enumerate(generation.keys) if i % 3]  # every block in part
    opened: list[int] = []
    original = Generation.open_block

    def spy(self: Generation, component: str, block: int) -> Any:
        opened.append(block)
        return original(self, component, block)

    monkeypatch.setattr(Generation, "open_block", spy)
    steps = list(Export(model.select(chosen, "resid_post", "prompt_end"), {}).steps())
    assert len(steps) == len(opened) == 8
    assert opened == list(range(8))


MEMORY = """
import re, sys
from pathlib import Path
from store.activations import ActivationStore
from store.exports import FORMATS, Export, export

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

def one(layer, folder):
    selection = ActivationStore.open(sys.argv[1]).select(layer=layer)
    Path(folder).mkdir()
    before = peak()
    for format in FORMATS:
        export(Export(selection, {}), format, Path(folder, format))
    return peak() - before, selection.nbytes / 1e6

one([0], sys.argv[2] + "/warm")
print(*one(None, sys.argv[2] + "/all"))
"""


def test_memory_stays_at_a_few_blocks(tmp_path: Path) -> None:
    d_model, block = 4096, 64
    rows = make_rows(1536)
    model = new_store(str(tmp_path / "store"), d_model=d_model)
    noise = np.random.default_rng(0).standard_normal((block, 6, 1, d_model)).astype(np.float32)
    for ref in model.create(
        model.work(
            [
                request(rows, ("resid_post",)),
            ],
            block_rows=block,
        )
    ):
        generation = Generation(model.location / ref.generation)
        generation.write_block(ref.block, {"resid_post": noise[: ref.n_rows]})
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "store"), str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    growth, size = (float(number) for number in result.stdout.split())
    # A block is 6.3 MB and a row group 16 MB. Measured: 25 MB.
    assert size > 150  # MB
    assert growth < 100


# -- files and folders -------------------------------------------------------------------------------------------------


def test_force_never_removes_what_is_no_export(model: ModelStore, tmp_path: Path) -> None:
    """A folder of somebody's work, given with --force, used to be removed with all that was in it."""
    selection = model.select([row.key for row in ROWS], "resid_post", "prompt_end")
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.tex").write_text("mine")
    for format in FORMATS:
        with pytest.raises(MismatchError, match="another --output"):
            export(Export(selection, {}), format, work, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MismatchError, match="no folder"):
        export(Export(selection, {}), "hf", tmp_path / "file", overwrite=True)
    assert (work / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_fails_leaves_what_was_there(model: ModelStore, tmp_path: Path, format: str) -> None:
    selection = model.select([row.key for row in ROWS[:7]], "resid_post", "prompt_end")
    export(Export(selection, {}), format, tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shard = next(g for g in model.generations() if g.plan.n_rows == 7).shard("resid_post", 1).path
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + b"?" + whole[101:])
    with pytest.raises(DamageError):
        export(Export(selection, {}), format, tmp_path / "out", overwrite=True)
    with pytest.raises(DamageError):
        export(Export(selection, {}), format, tmp_path / "new" / "out")
    shard.write_bytes(whole)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    export(Export(selection, {}), format, tmp_path / "out", overwrite=True)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_place_that_cannot_be_written_is_said_to_be_one(model: ModelStore, tmp_path: Path) -> None:
    selection = model.select([row.key for row in ROWS], "resid_post", "prompt_end")
    (tmp_path / "file").write_text("")
    for format in FORMATS:
        with pytest.raises(ResourceError, match="file"):
            export(Export(selection, {}), format, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--site", "resid_mid"], "unknown site"),
        (["--layers", "99"], "no layer 99"),
        (["--position", "last"], "unknown position"),
        (["--prompts", "none"], "no captured study has a prompt set"),
        (["--model", "gpt-9"], "holds no model"),
        (["--output", "s3://bucket/out"], "local disk"),
        (["--dtype", "stored", "--site", "mlp_out"], "have no mlp_out|bfloat16"),
    ],
)
def test_what_cannot_be_exported_is_a_message(
    model: ModelStore, command: Command, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ResidError, match=message):
        command("export", "--format", "npz", "--output", str(tmp_path / "out"), "--prompts", "all", *options)
    assert not (tmp_path / "out").exists()


def test_the_command_keeps_the_stored_dtype_where_the_format_has_it(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    model = new_store(str(tmp_path / "store"), "bfloat16")
    capture(model, request(ROWS, dtype="bfloat16"))
    for format, dtype in (("npz", "float32"), ("safetensors", "bfloat16"), ("parquet", "float32"), ("hf", "float32")):
        assert command("export", "--format", format, "--output", str(tmp_path / format)) == 0
        assert f"10 rows, resid_post at prompt_end, layers 0-5, {dtype}" in capsys.readouterr().out
        about = exported(tmp_path / format, format)[2]
        assert (about["dtype"], about["stored_dtype"]) == (dtype, "bfloat16")


def test_prompts_and_their_texts_go_along(model: ModelStore, command: Command, tmp_path: Path) -> None:
    options = ["--prompts", "harmful@test", "--layers", "1"]
    for format in ("npz", "safetensors", "parquet"):
        command("export", "--format", format, "--output", str(tmp_path / format), *options)
    table = pq.read_table(tmp_path / "parquet").to_pydict()
    ids = {row.key: row.prompt_id for row in ROWS}
    assert table["prompt_id"] == [ids[key] for key in table["row_key"]]
    assert table["text"] == [f"of {name}" for name in table["prompt_id"]]
    with np.load(tmp_path / "npz", allow_pickle=False) as found:
        assert json.loads(str(found["prompt_id"])) == table["prompt_id"]
        assert json.loads(str(found["text"])) == table["text"]
    with safe_open(tmp_path / "safetensors", framework="np") as file:
        assert json.loads(file.metadata()["text"]) == table["text"]


def test_a_header_that_readers_refuse_is_not_written(
    model: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "MOST_HEADER", 500)
    selection = model.select([row.key for row in ROWS], "resid_post", "prompt_end")
    with pytest.raises(ResourceError, match="--format parquet"):
        export(Export(selection, {}), "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def test_a_hub_data_set_declares_its_columns(model: ModelStore, command: Command, tmp_path: Path) -> None:
    command("export", "--format", "hf", "--output", str(tmp_path / "set"), "--prompts", "all", "--layers", "1")
    card = (tmp_path / "set" / "README.md").read_text()
    assert card.startswith("---\nconfigs:\n")
    (file,) = (tmp_path / "set" / "data").iterdir()
    table = pq.read_table(file)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.schema.names
    assert set(table["text"].to_pylist()) == {f"of {row.prompt_id}" for row in ROWS}


def test_a_hub_data_set_of_several_files_is_loaded_as_one(
    model: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(exports, "SHARD_BYTES", 3 * 6 * 16 * 4)
    selection = model.select([row.key for row in ROWS], "resid_post", "prompt_end")
    export(Export(selection, {ROWS[0].key: ("id", "text")}), "hf", tmp_path / "set")
    files = sorted(path.name for path in (tmp_path / "set" / "data").iterdir())
    assert len(files) > 2
    assert files == [f"train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))]
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 60
    loaded = loaded.with_format("numpy")
    for record in (loaded[i] for i in range(60)):
        row = next(row for row in ROWS if row.key == record["row_key"])
        expected = truth(row, "resid_post", int(record["layer"]), "prompt_end")
        assert record["activation"].dtype == np.float32
        np.testing.assert_array_equal(record["activation"], expected)
        assert record["text"] == ("text" if row == ROWS[0] else None)
