"""``resid store``: what it lists is there, and what is damaged is found, named and made again."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from s3_server import bucket as bucket
from s3_server import s3 as s3
from store_worker import LAYERS, MODEL, capture, make_row, make_rows, new_store, request, write

from jobs.cli import build_parser, main
from jobs.store import run
from store.activations import ActivationStore, ModelStore
from store.errors import DamageError, MissingDataError
from store.layers import spell_ranges
from store.rows import Row

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


# -- ls and verify -----------------------------------------------------------------------------------------------


def test_ls_counts_what_is_there(model: ModelStore, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = model.create(model.work([request([make_row(i) for i in range(20, 26)])], block_rows=2))
    write(model, waiting[0])
    assert command("ls", "--format", "json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["fingerprint"], found["dtype"], found["n_layers"]) == (MODEL, "float32", LAYERS)
    rows = {
        (tuple(c["components"]), tuple(c["positions"])): (c["committed_rows"], c["rows"]) for c in found["captures"]
    }
    assert rows[("resid_post", "mlp_out"), ("prompt_end", "response_avg")] == (7, 7)
    assert sorted((c["committed_rows"], c["rows"], c["committed_blocks"], c["blocks"]) for c in found["captures"]) == [
        (2, 6, 1, 3),
        (3, 3, 1, 1),
        (7, 7, 3, 3),
    ]
    shards = [path for path in model.location.path.rglob("c/*/0/0/0") if path.is_file()]
    assert sum(c["nbytes"] for c in found["captures"]) == sum(path.stat().st_size for path in shards)
    sets = {held["prompt_set"]: held for held in found["prompt_sets"]}
    assert sets["all"]["rows"] == 10
    assert sets["all"]["held"] == {
        "resid_post at prompt_end": 10,
        "resid_post at response_avg": 7,
        "mlp_out at prompt_end": 7,
        "mlp_out at response_avg": 7,
    }
    assert sets["harmful@test"]["held"]["resid_post at response_avg"] == 3
    assert command("ls") == 0
    shown = capsys.readouterr().out
    assert "7 of 10" in shown
    assert "0-5" in shown


def test_ls_says_which_layers_a_prompt_set_has(
    model: ModelStore, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tuple(make_row(i) for i in range(20, 30))
    capture(model, request(rows[:6], layers=[0, 1, 5]), block_rows=4)
    capture(model, request(rows[4:], layers=[1, 2]), block_rows=4)
    capture(model, request(rows[:2], layers=[2, 3, 4]))
    remember(model, {"new": (*rows, make_row(99))})
    command("ls", "--format", "json")
    (found,) = json.loads(capsys.readouterr().out)
    (held,) = found["prompt_sets"]
    assert (held["study"], held["prompt_set"], held["responses"], held["rows"]) == ("demo", "new", None, 11)
    assert held["held"] == {
        "resid_post at prompt_end": 2,
        "resid_post at prompt_end, layers 0-1, 5": 2,
        "resid_post at prompt_end, layers 0-2, 5": 2,
        "resid_post at prompt_end, layers 1-2": 4,
    }


def test_ls_agrees_with_what_can_be_selected(
    model: ModelStore, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared with the slow way: ask for each row alone."""
    rng = np.random.default_rng(6)
    rows = tuple(make_row(i) for i in range(100, 120))
    for i in range(6):
        asked = request(
            [rows[j] for j in rng.permutation(20)[:9]],
            ("resid_post", "attn_out") if i % 2 else ("resid_post",),
            layers=sorted(rng.permutation(LAYERS)[:3].tolist()),
            positions=["prompt_end"] if i % 3 else ["response_start", "token:0"],
        )
        for block in model.create(model.work([asked], block_rows=2))[: 3 + i]:
            write(model, block)
    remember(model, {"some": rows[:12], "others": rows[8:]})
    command("ls", "--format", "json")
    (found,) = json.loads(capsys.readouterr().out)
    for held in found["prompt_sets"]:
        members = rows[:12] if held["prompt_set"] == "some" else rows[8:]
        counts: Counter[str] = Counter()
        for row, component, position in itertools.product(
            members, ("resid_post", "attn_out"), ("prompt_end", "response_start", "token:0")
        ):
            with contextlib.suppress(MissingDataError):
                layers = model.select([row.key], component, position).layers
                which = "" if layers == tuple(range(LAYERS)) else f", layers {spell_ranges(layers)}"
                counts[f"{component} at {position}{which}"] += 1
        assert held["held"] == counts


def test_ls_shows_what_is_imported(
    tmp_path: Path, model: ModelStore, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2, 8), np.float16))
    command("import", str(tmp_path / "a.npz"), "--model", "org/[name]", "--convention", "mlp_out", "--set", "bad [set]")
    capsys.readouterr()
    assert command("ls") == 0
    shown = capsys.readouterr().out
    assert "imported, float16, d_model 8: " in shown
    assert "org/[name]" in shown
    assert "bad [set]" in shown
    assert "mlp_out at prompt_end, layers 0-1" in shown


def test_ls_on_object_storage_is_the_same(
    bucket: str, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in (f"{bucket}/store", str(tmp_path / "store")):
        there = new_store(url)
        capture(there, request(ROWS[:5]), block_rows=2, compression="zstd")
        capture(there, request(ROWS[3:], ("attn_out",)), block_rows=4)
        remember(there, {"all": ROWS})
    shown = []
    for url in (f"{bucket}/store", str(tmp_path / "store")):
        command("ls", "--store", url, "--format", "json")
        shown.append(json.loads(capsys.readouterr().out))
        assert command("verify", "--store", url, "--deep") == 0
        capsys.readouterr()
    assert shown[0] == shown[1]
    assert "zstd" in str(shown[0])


@pytest.mark.parametrize("name", ["ls", "verify", "gc", "export", "import"])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["store", name, "--help"])
    assert ended.value.code == 0
    assert "--store URL" in capsys.readouterr().out


def test_errors_are_messages_and_exit_codes(
    model: ModelStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--store", str(tmp_path / "store")]
    path = model.generations()[0].shard("resid_post", 0).path
    path.write_bytes(path.read_bytes()[:-9])
    for arguments, message in (
        (["verify", *where], "error: 1 damaged:"),
        (["ls", "--store", str(tmp_path / "none")], "holds no activations"),
        (["export", *where, "--format", "npz", "--output", str(tmp_path / "o"), "--layers", "77"], "no layer 77"),
        (["import", *where, str(tmp_path / "x.npz"), "--model", "m", "--convention", "attn_out"], "no such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["store", *arguments])
        assert ended.value.code == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["store", "gc", *where, "--min-age", "soon"])
    assert ended.value.code == 2


@pytest.mark.parametrize("name", ["ls", "verify", "gc"])
def test_a_place_without_a_store_is_said_to_be_one(tmp_path: Path, command: Command, name: str) -> None:
    with pytest.raises(MissingDataError, match="holds no activations"):
        command(name)
    assert not (tmp_path / "store").exists()


def test_verify_finds_a_flip_only_when_deep_and_repairs_it(
    model: ModelStore, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = next(g for g in model.generations() if g.plan.n_rows == 7)
    path = generation.shard("mlp_out", 1).path
    data = bytearray(path.read_bytes())
    data[40] ^= 4
    path.write_bytes(bytes(data))
    assert command("verify") == 0
    assert "--deep" in capsys.readouterr().out
    with pytest.raises(DamageError, match=rf"{generation.id} block 1"):
        command("verify", "--deep")
    with pytest.raises(DamageError, match=r"un-committed; run resid capture --study studies/demo\.yaml"):
        command("verify", "--deep", "--repair")
    assert command("verify", "--deep") == 0
    asked = request(ROWS[:7], ("resid_post", "mlp_out"), positions=["prompt_end", "response_avg"])
    assert [(block.generation, block.block) for block in capture(model, asked)] == [(generation.id, 1)]


def test_verify_names_each_damaged_block_and_one_remedy(model: ModelStore, command: Command, tmp_path: Path) -> None:
    generation = next(g for g in model.generations() if g.plan.n_rows == 7)
    for block in (0, 2):
        generation.shard("resid_post", block).path.unlink()
    with pytest.raises(DamageError) as caught:
        command("verify")
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 damaged:"
    assert [line.split(": ")[0].strip() for line in lines[1:3]] == [f"{generation.id} block {i}" for i in (0, 2)]
    assert lines[3:] == [f"  remedy: resid store verify --store {tmp_path}/store --deep --repair"]
    with pytest.raises(DamageError, match="just these again"):
        command("verify", "--repair")
    assert command("verify", "--deep") == 0


def test_verify_finds_a_model_that_readers_do_not_see(
    model: ModelStore, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model.location.path / "model.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    for options in ((), ("--repair",)):
        with pytest.raises(DamageError, match=r"model\.json"):
            command("verify", *options)
    assert not path.exists()
    for name in ("verify", "ls"):
        with pytest.raises(DamageError, match=r"model\.json: this file is missing\n.*resid capture"):
            command(name)
    new_store(str(model.location.path.parent))
    assert command("verify", "--deep") == 0
    other = model.location.path.parent / ("a" * 16)
    (other / "_records" / ("b" * 16)).mkdir(parents=True)
    with pytest.raises(DamageError, match=rf"1 damaged:\n.*{'a' * 16}/model\.json: this file is missing"):
        command("verify")


def test_a_damaged_import_is_imported_again(tmp_path: Path, command: Command) -> None:
    values = np.random.default_rng(7).standard_normal((3, 2, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=values)
    arguments = [str(tmp_path / "a.npz"), "--model", "m", "--convention", "resid_post"]
    command("import", *arguments)
    store = ActivationStore.open(str(tmp_path / "store"))
    (generation,) = store.models()[0].generations()
    path = generation.shard("resid_post", 0).path
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamageError, match="run the `resid store import` that brought it"):
        command("verify", "--repair")
    command("import", *arguments)
    assert command("verify", "--deep") == 0
    np.testing.assert_array_equal(store.select(prompts="imported").to_numpy(), values)


def test_verify_finds_a_cut_shard_without_reading_everything(model: ModelStore, command: Command) -> None:
    path = model.generations()[0].shard("resid_post", 0).path
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamageError, match="size"):
        command("verify")


def test_verify_finds_a_damaged_table_of_prompt_sets(model: ModelStore, command: Command) -> None:
    path = model.location.path / "_sets" / "demo.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    for options in ((), ("--repair",)):
        with pytest.raises(DamageError, match=r"demo\.parquet"):
            command("verify", *options)
    assert command("verify") == 0
