"""The activation store under damage, kills and rivals: a clear error or the right answer, never wrong numbers."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_worker import D_MODEL, LAYERS, MODEL, activations, capture, make_rows, new_store, request, truth, write

from jobs.verify import run as verify_command
from store.activations import ActivationStore, BlockRef, ModelStore
from store.errors import DamageError, MismatchError, MissingDataError, ResidError
from store.generation import Generation

ROWS = make_rows(10)
KEYS = [row.key for row in ROWS]
ASKED = request(ROWS, positions=["prompt_end", "response_avg"])
REFERENCE = np.stack(
    [np.stack([truth(row, "resid_post", layer, "prompt_end") for layer in range(LAYERS)]) for row in ROWS]
)
WORKER = Path(__file__).with_name("store_worker.py")


@pytest.fixture
def model(tmp_path: Path) -> ModelStore:
    """Return a store of ten rows in blocks of three, all committed."""
    model = new_store(str(tmp_path / "store"))
    capture(model, ASKED, block_rows=3)
    return model


def reopened(model: ModelStore) -> ModelStore:
    return ActivationStore.open(model.location.url.rpartition("/")[0]).model(MODEL)


def values(model: ModelStore) -> np.ndarray:
    return reopened(model).select(KEYS, "resid_post", "prompt_end").to_numpy()


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))


def shard(model: ModelStore, block: int) -> Path:
    (generation,) = model.generations()
    return generation.shard("resid_post", block).path


def commit(model: ModelStore, block: int) -> Path:
    (generation,) = model.generations()
    return generation.records.path / "commits" / f"{block}.json"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def exchange(one: Path, other: Path) -> None:
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


# -- damage to one block -----------------------------------------------------------------------------------------

BLOCK_DAMAGE: dict[str, Callable[[ModelStore], object]] = {
    "missing shard": lambda model: shard(model, 1).unlink(),
    "empty shard": lambda model: shard(model, 1).write_bytes(b""),
    "truncated shard": lambda model: truncate(shard(model, 1)),
    "shard with more bytes": lambda model: shard(model, 1).write_bytes(shard(model, 1).read_bytes() + b"\0"),
    "flipped bit in the first chunk": lambda model: flip(shard(model, 1), 5, 3),
    "flipped bit in a chunk's checksum": lambda model: flip(shard(model, 1), 3 * 2 * D_MODEL * 4),
    "flipped bit in the index": lambda model: flip(shard(model, 1), -40),
    "flipped bit in the index checksum": lambda model: flip(shard(model, 1), -1),
    "shard of zeros": lambda model: shard(model, 1).write_bytes(bytes(shard(model, 1).stat().st_size)),
    "shard of another block": lambda model: shard(model, 1).write_bytes(shard(model, 0).read_bytes()),
    "commit that is no JSON": lambda model: commit(model, 1).write_bytes(b"{"),
    "empty commit": lambda model: commit(model, 1).write_bytes(b""),
    "commit of another block": lambda model: commit(model, 1).write_bytes(commit(model, 0).read_bytes()),
    "commit that lacks a field": lambda model: commit(model, 1).write_bytes(b'{"block": 1}'),
}


@pytest.mark.parametrize("damage", BLOCK_DAMAGE)
def test_a_damaged_block_is_an_error_is_found_and_alone_is_made_again(model: ModelStore, damage: str) -> None:
    BLOCK_DAMAGE[damage](model)
    with pytest.raises(DamageError, match=r"remedy: resid verify --store .*--repair"):
        values(model)
    (finding,) = reopened(model).verify()
    assert "block 1:" in finding
    assert reopened(model).verify() == [finding]  # looking changes nothing
    assert len(reopened(model).verify(repair=True)) == 1
    assert reopened(model).verify() == []
    with pytest.raises(MissingDataError, match="3 of 10 rows"):
        values(model)
    blocks = capture(model, ASKED)
    assert [(block.block, block.n_rows) for block in blocks] == [(1, 3)]
    np.testing.assert_array_equal(values(model), REFERENCE)
    assert reopened(model).verify() == []


def test_other_blocks_of_a_damaged_generation_are_read(model: ModelStore) -> None:
    shard(model, 1).unlink()
    (generation,) = model.generations()
    keys = [key for i, key in enumerate(generation.keys) if i // 3 != 1]
    read = reopened(model).select(keys, "resid_post", "prompt_end").to_numpy()
    np.testing.assert_array_equal(read, REFERENCE[[KEYS.index(key) for key in keys]])


def test_exchanged_shards_are_found(model: ModelStore) -> None:
    exchange(shard(model, 0), shard(model, 2))
    with pytest.raises(DamageError):
        values(model)
    assert len(model.verify()) == 2


def test_a_shard_that_vanishes_while_it_is_read_is_damage(model: ModelStore) -> None:
    selection = model.select(KEYS, "resid_post", "prompt_end")
    selection.to_numpy()
    shard(model, 2).unlink()
    with pytest.raises(DamageError, match="missing"):
        selection.to_numpy()


def test_a_flipped_bit_anywhere_in_a_shard_is_never_read_as_numbers(model: ModelStore) -> None:
    rng = random.Random(11)
    for i in range(60):
        path = shard(model, i % 4)
        at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, at, bit)
        assert len(model.verify()) == 1
        with pytest.raises(DamageError):
            values(model)
        flip(path, at, bit)
    np.testing.assert_array_equal(values(model), REFERENCE)


def test_a_deleted_commit_is_a_block_that_waits(model: ModelStore) -> None:
    commit(model, 2).unlink()
    assert model.verify() == []
    with pytest.raises(MissingDataError, match="3 of 10 rows"):
        values(model)
    assert [block.block for block in capture(model, ASKED)] == [2]
    np.testing.assert_array_equal(values(model), REFERENCE)


def test_uncommitted_shards_are_not_read(tmp_path: Path, model: ModelStore) -> None:
    other = new_store(str(tmp_path / "other"))
    other.create(other.work([ASKED], block_rows=3))
    (generation,) = other.generations()
    for block in range(4):
        target = generation.shard("resid_post", block).path
        target.parent.mkdir(parents=True)
        target.write_bytes(shard(model, block).read_bytes()[: -block or None])  # also torn ones
    with pytest.raises(MissingDataError):
        other.select(KEYS, "resid_post", "prompt_end")
    assert len(capture(other, ASKED)) == 4
    np.testing.assert_array_equal(values(other), REFERENCE)


# -- damage to a generation, a model, a store --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["generation.json", "rows.parquet", "zarr.json", "resid_post/zarr.json", "row/zarr.json", "row/c/0", "layer/c/0"],
)
def test_damaged_metadata_is_found_and_made_again_without_its_blocks(model: ModelStore, name: str) -> None:
    (generation,) = model.generations()
    folder = generation.records if name in ("generation.json", "rows.parquet") else generation.location
    path = folder.path / name
    whole = path.read_bytes()
    rng = random.Random(name)
    for _ in range(5):
        flip(path, rng.randrange(len(whole)), rng.randrange(8))
        with contextlib.suppress(ResidError):  # files that resid itself does not read may be damaged
            np.testing.assert_array_equal(values(model), REFERENCE)
        with contextlib.suppress(MismatchError):  # the flip may have hit the version number
            assert len(reopened(model).verify()) == 1
        path.write_bytes(whole)
    path.write_bytes(b"")
    (finding,) = reopened(model).verify(repair=True)
    assert name in finding
    assert capture(model, ASKED, block_rows=3) == ()
    assert reopened(model).verify() == []
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(values(model), REFERENCE)


def test_a_missing_metadata_file_is_damage(model: ModelStore) -> None:
    (generation,) = model.generations()
    (generation.location.path / "resid_post" / "zarr.json").unlink()
    with pytest.raises(DamageError, match="missing"):
        values(model)
    assert len(model.verify(repair=True)) == 1
    assert capture(model, ASKED, block_rows=3) == ()
    np.testing.assert_array_equal(values(model), REFERENCE)


def test_a_killed_creation_is_done_again(tmp_path: Path) -> None:
    whole = new_store(str(tmp_path / "whole"))
    ((plan, rows),) = whole.work([ASKED], block_rows=3).new
    generation = Generation.create(whole.location, plan, rows)
    names = sorted(p for p in generation.location.path.rglob("*") if p.is_file())
    for count in range(len(names)):  # killed after so many files, the last of them cut short
        killed = new_store(str(tmp_path / f"killed-{count}"))
        for i, path in enumerate(names[: count + 1]):
            target = killed.location.path / path.relative_to(whole.location.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes()[: None if i < count else 3])
        assert killed.generations() == []
        assert len(killed.create(killed.work([ASKED], block_rows=3))) == 4
        assert killed.verify() == []


def test_foreign_files_are_left_alone(model: ModelStore) -> None:
    (generation,) = model.generations()
    store = model.location.path.parent
    for folder in (
        store,
        model.location.path,
        generation.location.path,
        generation.records.path,
        commit(model, 0).parent,
    ):
        (folder / "README.txt").write_text("not resid's")
        (folder / ".DS_Store").write_bytes(b"\0")
        (folder / "a folder").mkdir()
    for name in ("007.json", "x.json", "1.json.partial", "-1.json", "٣.json"):
        (commit(model, 0).parent / name).write_text("{}")
    (generation.records.path.parent / "empty").mkdir()
    np.testing.assert_array_equal(values(model), REFERENCE)
    assert [m.fingerprint for m in ActivationStore.open(str(store)).models()] == [MODEL]
    assert model.verify() == []
    assert model.work([ASKED]).rows_to_capture == 0


def test_a_commit_of_a_block_that_does_not_exist_is_damage_and_serves_nothing(model: ModelStore) -> None:
    commit(model, 99).write_bytes(commit(model, 0).read_bytes())
    np.testing.assert_array_equal(values(model), REFERENCE)
    assert "block 99" in model.verify(repair=True)[0]
    assert model.verify() == []


def test_a_newer_format_is_refused(tmp_path: Path, model: ModelStore) -> None:
    (generation,) = model.generations()
    record = generation.records.path / "generation.json"
    record.write_text(record.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(MismatchError, match="update resid"):
        values(model)
    (tmp_path / "store" / "resid.json").write_text('{"format_version": 3}')
    with pytest.raises(MismatchError, match="update resid"):
        ActivationStore.open(str(tmp_path / "store"))


@pytest.mark.parametrize("content", ["", "[]", "{}", "\0", '"resid"'])
def test_a_folder_that_is_no_resid_store_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "resid.json").write_text(content)
    with pytest.raises(DamageError, match="not of a resid store"):
        ActivationStore.open(str(tmp_path))


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MismatchError, match="not a store"):
        ActivationStore.open(str(tmp_path / "file"))


def test_an_unrelated_folder_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("...")
    with pytest.raises(MissingDataError, match="holds nothing"):
        ActivationStore.open(str(tmp_path)).model(MODEL)


@pytest.mark.parametrize(
    "content", ["{", "", "[1]", json.dumps({"fingerprint": "0" * 64, "dtype": "float32", "d_model": 1})]
)
def test_a_damaged_model_file_is_found_and_written_again(model: ModelStore, content: str) -> None:
    path = model.location.path / "model.json"
    path.write_text(content)
    with pytest.raises((DamageError, MismatchError), match=MODEL[:16]):
        values(model)
    store = ActivationStore.open(str(path.parents[1]))
    for repair in (False, True):
        assert len(store.models()[0].verify(repair=repair)) == 1
    assert store.models() == []
    np.testing.assert_array_equal(values(new_store(str(path.parents[1]))), REFERENCE)


def test_a_model_file_of_another_model_is_refused(model: ModelStore) -> None:
    path = model.location.path / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 64}))
    with pytest.raises(MismatchError, match="belongs to model"):
        values(model)


def test_the_verify_command_repairs_one_block(model: ModelStore, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import argparse

    def arguments(repair: bool) -> argparse.Namespace:
        places = {"store": str(tmp_path / "store"), "results": str(tmp_path / "results")}
        return argparse.Namespace(study=None, repair=repair, **places)

    assert verify_command(arguments(False)) == 0
    assert "checked 4 activation blocks" in capsys.readouterr().out
    flip(shard(model, 3), 100)
    for repair in (False, True):
        with pytest.raises(DamageError, match="block 3"):
            verify_command(arguments(repair))
    assert verify_command(arguments(False)) == 0
    assert [block.block for block in capture(model, ASKED)] == [3]


# -- what is committed stays ------------------------------------------------------------------------------------


def committed_files(model: ModelStore) -> dict[str, tuple[int, int]]:
    """Return inode and time of every file of a committed block."""
    found = {}
    for generation in model.generations():
        for block in generation.committed():
            places = [generation.shard(component, block).path for component in generation.plan.components]
            for path in (*places, generation.records.path / "commits" / f"{block}.json"):
                status = path.stat()
                found[str(path)] = (status.st_ino, status.st_mtime_ns)
    return found


def test_a_committed_block_is_not_written_again(model: ModelStore) -> None:
    before = committed_files(model)
    (generation,) = model.generations()
    assert not write(model, BlockRef(generation.id, 0, 3))
    other = activations(generation.rows[:3], generation.plan)
    other["resid_post"] += 1
    assert not generation.write_block(0, other)
    assert committed_files(model) == before
