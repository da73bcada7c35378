"""Damaged files of a store are an error or are not missed, are found, and are made again: never wrong numbers."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from failure_table import Tally
from failure_table import tally as tally
from store_worker import LAYERS, MODEL, capture, expected, make_rows, make_texts, new_store, request

from jobs.cli import main
from store.activations import ActivationStore, CaptureRequest, ModelStore
from store.errors import DamageError, MismatchError, MissingDataError, ResidError
from store.generation import Generation
from store.layout import Compression
from store.readers import DirectReader, ZarrReader
from store.selection import Selection
from store.sites import ALL_TOKENS

ROWS, TEXTS = make_rows(20), make_texts(20)
D_MODEL = 4  # small, so that hundreds of places in a shard can be tried
COMPONENTS = ("resid_post", "mlp_out")


@dataclass(frozen=True)
class Layout:
    """What is captured, and what reads it."""

    asked: CaptureRequest
    reader: type[DirectReader] | type[ZarrReader]
    compression: Compression = "none"

    @property
    def position(self) -> str:
        return self.asked.positions[0]

    def other(self) -> CaptureRequest:
        """Return the same of as many other rows: shards of the same shape."""
        rows = (TEXTS if self.position == ALL_TOKENS else ROWS)[10:]
        return CaptureRequest(rows, self.asked.components, self.asked.layers, self.asked.positions, self.asked.dtype)

    @cached_property
    def reference(self) -> dict[str, np.ndarray]:
        """What must be read, by component: [row or token, layer, d_model]."""
        asked = self.asked
        return {
            component: expected(asked.rows, component, range(LAYERS), self.position, asked.dtype, D_MODEL)
            for component in COMPONENTS
        }


_NAMED = request(ROWS[:10], COMPONENTS, positions=["prompt_end", "response_avg"])
_TOKENS = request(TEXTS[:10], COMPONENTS, positions=[ALL_TOKENS])
LAYOUTS = {
    "direct": Layout(_NAMED, DirectReader),
    "zarr": Layout(_NAMED, ZarrReader),
    "direct all_tokens": Layout(_TOKENS, DirectReader),
    "zarr all_tokens": Layout(_TOKENS, ZarrReader),
    "bfloat16": Layout(request(ROWS[:10], COMPONENTS, dtype="bfloat16"), DirectReader),
    "zstd": Layout(_NAMED, ZarrReader, "zstd"),
    "zstd all_tokens": Layout(_TOKENS, ZarrReader, "zstd"),
}


class Held:
    """A store of ten rows in blocks of at most three, all committed."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout, self.folder, self.reference = layout, folder, layout.reference
        self.model = ActivationStore.open(str(folder)).model(MODEL)
        (generation,) = self.model.generations()
        self.generation, self.id = generation, generation.id

    @property
    def reopened(self) -> ModelStore:
        return ActivationStore.open(str(self.folder)).model(MODEL)

    def select(self, component: str = "mlp_out", keys: Sequence[str] | None = None) -> Selection:
        """Select rows in a store that was just opened, to be read by the reader of the layout."""
        keys = [row.key for row in self.layout.asked.rows] if keys is None else keys
        selection = self.reopened.select(keys, component, self.layout.position)
        for part in selection.parts:
            generation = part.generation
            assert generation.reader  # which looks at the metadata
            if not isinstance(generation.reader, self.layout.reader):
                generation.reader = self.layout.reader(generation.location, generation.plan)
        return selection

    def require_right(self, component: str = "mlp_out") -> None:
        np.testing.assert_array_equal(self.select(component).to_numpy(), self.reference[component])

    def shard(self, block: int, component: str = "mlp_out") -> Path:
        return self.generation.shard(component, block).path

    def commit(self, block: int) -> Path:
        return self.generation.records.path / "commits" / f"{block}.json"


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole store of every layout."""
    folder = tmp_path_factory.mktemp("stores")
    for name, layout in LAYOUTS.items():
        model = new_store(str(folder / name), layout.asked.dtype, D_MODEL)
        capture(model, layout.asked, block_rows=3, compression=layout.compression)
    return folder


@pytest.fixture(params=LAYOUTS)
def held(request: pytest.FixtureRequest, stores: Path, tmp_path: Path) -> Held:
    shutil.copytree(stores / request.param, tmp_path / "store")
    return Held(tmp_path / "store", LAYOUTS[request.param])


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    whole = path.read_bytes()
    flip(path, bit)
    yield
    path.write_bytes(whole)


def bits(path: Path, count: int, seed: str) -> list[int]:
    """Return so many places in a file: spread over all of it, the last byte included."""
    size = path.stat().st_size
    rng = random.Random(seed)
    return [8 * round(i * (size - 1) / (count - 1)) + rng.randrange(8) for i in range(count)]


def exchange(one: Path, other: Path) -> None:
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


# -- damage to one block -----------------------------------------------------------------------------------------


def regions(held: Held) -> dict[str, tuple[int, int]]:
    """Return where in shard 1 of mlp_out its parts lie, as bytes [start, stop)."""
    size, index = held.shard(1).stat().st_size, held.generation.plan.shard_shape.index_bytes
    places = np.frombuffer(held.shard(1).read_bytes(), "<u8", 2 * LAYERS, size - index).reshape(-1, 2)
    first, last = places[0], places[-1]
    return {
        "first chunk": (int(first[0]), int(first[0] + first[1] - 4)),
        "checksum of the first chunk": (int(first[0] + first[1] - 4), int(first[0] + first[1])),
        "last chunk": (int(last[0]), int(last[0] + last[1] - 4)),
        "checksum of the last chunk": (int(last[0] + last[1] - 4), int(last[0] + last[1])),
        "offsets": (size - index, size - 4),
        "checksum of the offsets": (size - 4, size),
    }


def overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def empty_block(held: Held) -> None:
    """Write what zarr-python takes for a block of fill values: an index without chunks, with its right checksum."""
    from crc32c import crc32c

    index = b"\xff" * 16 * LAYERS
    overwrite(held.shard(1), index + crc32c(index).to_bytes(4, "little"))


BLOCK_DAMAGE: dict[str, Callable[[Held], object]] = {
    "missing shard": lambda held: held.shard(1).unlink(),
    "empty shard": lambda held: overwrite(held.shard(1), b""),
    "shard without its last byte": lambda held: overwrite(held.shard(1), held.shard(1).read_bytes()[:-1]),
    "shard of half the length": lambda held: overwrite(
        held.shard(1), held.shard(1).read_bytes()[: held.shard(1).stat().st_size // 2]
    ),
    "shard with a byte more": lambda held: overwrite(held.shard(1), held.shard(1).read_bytes() + b"\0"),
    "shard of zeros": lambda held: overwrite(held.shard(1), bytes(held.shard(1).stat().st_size)),
    "shard without chunks": empty_block,
    "shard of another block": lambda held: overwrite(held.shard(1), held.shard(0).read_bytes()),
    "shard of another component": lambda held: overwrite(held.shard(1), held.shard(1, "resid_post").read_bytes()),
    "commit that is no JSON": lambda held: overwrite(held.commit(1), b"{"),
    "commit that is no UTF-8": lambda held: overwrite(held.commit(1), b"\xff\xfe\xfd"),
    "empty commit": lambda held: overwrite(held.commit(1), b""),
    "commit that is a list": lambda held: overwrite(held.commit(1), b"[1]"),
    "commit of another block": lambda held: overwrite(held.commit(1), held.commit(0).read_bytes()),
    "commit that lacks a field": lambda held: overwrite(held.commit(1), b'{"block": 1}'),
    "commit with another size": lambda held: overwrite(
        held.commit(1), held.commit(1).read_bytes().replace(b'"size": ', b'"size": 1')
    ),
}
for _region in (
    "first chunk",
    "checksum of the first chunk",
    "last chunk",
    "checksum of the last chunk",
    "offsets",
    "checksum of the offsets",
):
    BLOCK_DAMAGE[f"flipped bit in the {_region}"] = lambda held, name=_region: flip(  # type: ignore[misc]
        held.shard(1), 8 * (regions(held)[name][0] + 1) + 3
    )


@pytest.mark.parametrize("damage", BLOCK_DAMAGE)
def test_a_damaged_block_is_an_error_is_found_and_alone_is_made_again(held: Held, damage: str) -> None:
    BLOCK_DAMAGE[damage](held)
    with pytest.raises(DamageError, match=r"remedy: resid (store )?verify --store .*--repair"):
        held.select().to_numpy()
    (finding,) = held.reopened.verify()
    assert "block 1:" in finding
    assert held.reopened.verify() == [finding]  # looking changes nothing
    assert len(held.reopened.verify(repair=True)) == 1
    assert held.reopened.verify() == []
    with pytest.raises(MissingDataError, match=r"of 10 rows"):
        held.select()
    blocks = capture(held.reopened, held.layout.asked)
    assert [block.block for block in blocks] == [1]
    for component in COMPONENTS:
        held.require_right(component)
    assert held.reopened.verify() == []


def test_a_flipped_bit_anywhere_in_a_shard_is_never_read_as_numbers(held: Held, tally: Tally) -> None:
    held.require_right()
    selection = held.select()
    for bit in bits(held.shard(1), 120, "shard"):
        with flipped(held.shard(1), bit):
            assert len(held.model.verify()) == 1
            with pytest.raises(DamageError):
                selection.to_numpy()
        tally.add()
    held.require_right()


def test_a_shard_cut_at_any_length_is_never_read_as_numbers(held: Held, tally: Tally) -> None:
    whole = held.shard(1).read_bytes()
    selection = held.select()
    for i in range(60):
        overwrite(held.shard(1), whole[: i * len(whole) // 60])
        assert len(held.model.verify(deep=False)) == 1
        with pytest.raises(DamageError):
            selection.to_numpy()
        tally.add()
    overwrite(held.shard(1), whole)
    held.require_right()


def test_a_flipped_bit_anywhere_in_a_commit_is_never_read_as_other_numbers(held: Held, tally: Tally) -> None:
    for bit in bits(held.commit(1), 100, "commit"):
        with flipped(held.commit(1), bit):
            found = held.reopened.verify()
            assert len(found) <= 1
            errors = 0
            for component in COMPONENTS:
                try:
                    held.require_right(component)
                except DamageError:
                    errors += 1
            # Not found: what is kept for people, white space and the like.
            assert bool(errors) == bool(found)
        tally.add()


@pytest.mark.parametrize("held", ["direct", "zarr", "direct all_tokens", "zarr all_tokens", "bfloat16"], indirect=True)
def test_exchanged_layers_of_a_shard_are_found(held: Held) -> None:
    # Each chunk carries its own right checksum, and the index is the same: only the commit knows better.
    data = bytearray(held.shard(1).read_bytes())
    size = held.generation.plan.shard_shape.chunk_bytes + 4
    data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]
    overwrite(held.shard(1), bytes(data))
    with pytest.raises(DamageError):
        held.select().to_numpy()
    assert len(held.reopened.verify()) == 1


def test_a_folder_in_the_place_of_a_shard_is_an_error(held: Held) -> None:
    held.shard(1).unlink()
    held.shard(1).mkdir()
    with pytest.raises(ResidError, match=str(held.shard(1))):
        held.select().to_numpy()
    (finding,) = held.reopened.verify()
    assert str(held.shard(1)) in finding


@pytest.mark.parametrize("kind", ["blocks", "components", "generations"])
def test_exchanged_shards_are_found(held: Held, kind: str) -> None:
    if kind == "generations":
        capture(held.model, held.layout.other(), block_rows=3, compression=held.layout.compression)
    (other,) = [each for each in held.model.generations() if each.id != held.id] or [held.generation]
    partner = {
        "blocks": held.shard(2),
        "components": held.shard(0, "resid_post"),
        "generations": other.shard("mlp_out", 0).path,
    }[kind]
    exchange(held.shard(0), partner)
    with pytest.raises(DamageError):
        held.select().to_numpy()
    for deep in (False, True):
        assert len(held.reopened.verify(deep=deep)) == (1 if kind == "components" else 2)


def test_other_blocks_of_a_damaged_generation_are_read(held: Held) -> None:
    held.shard(1).unlink()
    plan, keys = held.generation.plan, held.generation.keys
    kept = [key for i, key in enumerate(keys) if int(plan.blocks_of(np.array([i]))[0]) != 1]
    rows = {row.key: row for row in held.layout.asked.rows}
    read = held.select(keys=kept).to_numpy()
    found = [rows[key] for key in kept]
    asked = held.layout.asked
    np.testing.assert_array_equal(
        read, expected(found, "mlp_out", range(LAYERS), held.layout.position, asked.dtype, D_MODEL)
    )


def test_a_shard_that_vanishes_while_it_is_read_is_damage(held: Held) -> None:
    selection = held.select()
    selection.to_numpy()
    held.shard(2).unlink()
    with pytest.raises(DamageError, match="missing"):
        selection.to_numpy()


def test_a_deleted_commit_is_a_block_that_waits(held: Held) -> None:
    held.commit(2).unlink()
    assert held.reopened.verify() == []
    with pytest.raises(MissingDataError, match="of 10 rows"):
        held.select()
    assert [block.block for block in capture(held.reopened, held.layout.asked)] == [2]
    held.require_right()


def test_a_commit_of_a_block_that_does_not_exist_is_damage_and_serves_nothing(held: Held) -> None:
    overwrite(held.commit(99), held.commit(0).read_bytes())
    held.require_right()
    assert "block 99" in held.model.verify(repair=True)[0]
    assert held.model.verify() == []
    held.require_right()


def test_shards_without_a_commit_are_not_read(tmp_path: Path, held: Held) -> None:
    other = new_store(str(tmp_path / "other"), held.layout.asked.dtype, D_MODEL)
    other.create(other.work([held.layout.asked], 3, held.layout.compression))
    (generation,) = other.generations()
    keys = [row.key for row in held.layout.asked.rows]
    for component in COMPONENTS:
        for block in range(generation.plan.n_blocks):
            target = generation.shard(component, block).path
            target.parent.mkdir(parents=True)
            data = held.shard(block, component).read_bytes()
            target.write_bytes(data[: -block or None])  # one whole, the others torn
    with pytest.raises(MissingDataError):
        other.select(keys, "mlp_out", held.layout.position)
    assert len(capture(other, held.layout.asked)) == generation.plan.n_blocks
    read = other.select(keys, "mlp_out", held.layout.position).to_numpy()
    np.testing.assert_array_equal(read, held.reference["mlp_out"])
    assert other.verify() == []


# -- damage to metadata ------------------------------------------------------------------------------------------

METADATA = [
    "generation.json",
    "rows.parquet",
    "zarr.json",
    "mlp_out/zarr.json",
    "row/zarr.json",
    "row/c/0",
    "layer/c/0",
]


def metadata_file(generation: Generation, name: str) -> Path:
    folder = generation.records if name in ("generation.json", "rows.parquet") else generation.location
    return folder.path / name


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("held", ["direct", "zarr all_tokens", "zstd"], indirect=True)
def test_damaged_metadata_is_found_and_made_again_without_its_blocks(held: Held, tally: Tally, name: str) -> None:
    path = metadata_file(held.generation, name)
    whole = path.read_bytes()
    for bit in bits(path, 20, name):
        with flipped(path, bit):
            with contextlib.suppress(ResidError):  # files that resid itself does not read may be damaged
                held.require_right()
            with contextlib.suppress(MismatchError):  # the flip may have hit the version
                assert len(held.reopened.verify()) == 1
        tally.add()
    again = {"block_rows": 3, "compression": held.layout.compression}
    for damage in ("missing", "empty"):
        path.unlink() if damage == "missing" else overwrite(path, b"")
        findings = held.reopened.verify(repair=True)
        # Without generation.json there is no such capture.
        assert [name in finding for finding in findings] == [True] * (name != "generation.json" or damage == "empty")
        assert capture(held.reopened, held.layout.asked, **again) == ()  # type: ignore[arg-type]
        assert held.reopened.verify() == []
        assert path.read_bytes() == whole
        held.require_right()


@pytest.mark.parametrize("name", ["rows.parquet", "mlp_out/zarr.json"])
@pytest.mark.parametrize("held", ["direct", "zarr all_tokens"], indirect=True)
def test_reading_without_the_metadata_that_it_needs_is_an_error(held: Held, name: str) -> None:
    metadata_file(held.generation, name).unlink()
    with pytest.raises(DamageError, match=r"missing\n  remedy: resid verify --store .*--repair"):
        held.select()


def test_torn_files_of_a_capture_that_never_began_are_written_anew(tmp_path: Path, held: Held, tally: Tally) -> None:
    layout, generation = held.layout, held.generation
    names = ["rows.parquet", *(each.name for each in generation.location.walk())]
    begun = sorted(name for name in names if not name.startswith(tuple(f"{each}/c/" for each in COMPONENTS)))
    for i in range(6):  # files up to one are whole, that one is cut, and the others are lacking
        count = i * (len(begun) - 1) // 5
        model = new_store(str(tmp_path / f"other-{i}"), layout.asked.dtype, D_MODEL)
        other = Generation(model.location / held.id)
        for j, name in enumerate(begun[: count + 1]):
            metadata_file(other, name).parent.mkdir(parents=True, exist_ok=True)
            data = metadata_file(held.generation, name).read_bytes()
            metadata_file(other, name).write_bytes(data if j < count else data[:3])
        assert model.generations() == []
        blocks = model.create(model.work([layout.asked], 3, layout.compression))
        assert len(blocks) == generation.plan.n_blocks
        assert model.verify() == []
        for name in (*begun, "generation.json"):
            assert metadata_file(other, name).read_bytes() == metadata_file(held.generation, name).read_bytes()
        tally.add()


@pytest.mark.parametrize("held", ["direct"], indirect=True)
@pytest.mark.parametrize("name", ["resid.json", f"{MODEL[:16]}/model.json", f"{MODEL[:16]}/zarr.json"])
def test_a_flipped_bit_in_the_files_of_store_and_model_is_never_read_as_other_numbers(
    held: Held, tally: Tally, name: str
) -> None:
    path = held.folder / name
    for bit in bits(path, 40, name):
        with flipped(path, bit), contextlib.suppress(ResidError):
            held.require_right()
        tally.add()
    held.require_right()


@pytest.mark.parametrize("held", ["direct"], indirect=True)
def test_a_flipped_bit_in_a_prompt_set_never_chooses_other_rows(held: Held) -> None:
    records = [
        {"prompt_set": "ab"[i % 2], "responses": None, "prompt_id": f"p{i}", "row_key": row.key, "text": f"text {i}"}
        for i, row in enumerate(ROWS[:10])
    ]
    held.model.memberships.write("study", "/study.yaml", records)
    path = held.model.memberships.location.path / "study.parquet"
    whole = held.model.memberships.find(["a"])
    assert whole.keys == tuple(row.key for row in ROWS[:10:2])
    for bit in bits(path, path.stat().st_size, "set"):
        with flipped(path, bit), contextlib.suppress(DamageError):
            assert held.model.memberships.find(["a"]) == whole


@pytest.mark.parametrize(
    "content", ["{", "", "[1]", json.dumps({"fingerprint": "0" * 64, "dtype": "float32", "d_model": 1})]
)
@pytest.mark.parametrize("held", ["direct"], indirect=True)
def test_a_damaged_model_file_is_found_and_written_again(held: Held, content: str) -> None:
    path = held.folder / MODEL[:16] / "model.json"
    path.write_text(content)
    with pytest.raises(ResidError, match=MODEL[:16]):
        held.select()
    store = ActivationStore.open(str(held.folder))
    for repair in (False, True):
        assert len(store.models()[0].verify(repair=repair)) == 1
    assert store.models() == []
    new_store(str(held.folder), d_model=D_MODEL)
    held.require_right()


@pytest.mark.parametrize("held", ["direct"], indirect=True)
def test_a_model_file_of_another_model_is_refused(held: Held) -> None:
    path = held.folder / MODEL[:16] / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 64}))
    with pytest.raises(MismatchError, match="belongs to model"):
        held.select()


@pytest.mark.parametrize("held", ["direct"], indirect=True)
def test_the_verify_command_finds_and_repairs_one_block(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(*options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(["verify", "--store", str(held.folder), "--results", str(tmp_path / "results"), *options])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    code, said = verify()
    assert code == 0
    assert "checked 4 activation blocks" in said
    flip(held.shard(3), 800)
    for options in ((), ("--repair",)):
        code, said = verify(*options)
        assert code == 1
        assert "block 3" in said
    assert verify()[0] == 0
    assert [block.block for block in capture(held.reopened, held.layout.asked)] == [3]


def test_an_unrelated_folder_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("...")
    with pytest.raises(MissingDataError, match="holds nothing"):
        ActivationStore.open(str(tmp_path)).model(MODEL)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\0", '"resid"'])
def test_a_folder_that_is_no_resid_store_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "resid.json").write_text(content)
    with pytest.raises(DamageError, match="not of a resid store"):
        ActivationStore.open(str(tmp_path))


# -- what is not resid's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["direct", "zarr all_tokens", "zstd"], indirect=True)
def test_foreign_files_and_folders_anywhere_are_left_alone(held: Held, tally: Tally) -> None:
    names = {"README.txt": b"not resid's", ".DS_Store": b"\0", "7.json.bak": b"{}", "core.partial": b"?"}
    folders = [held.folder, *(path for path in held.folder.rglob("*") if path.is_dir())]
    for folder in folders:
        for name, content in names.items():
            (folder / name).write_bytes(content)
        (folder / "a folder").mkdir()
        (folder / "a folder" / "zarr.json").write_bytes(b"{")
        (folder / "link").symlink_to(held.folder)
    tally.add(min(len(folders), 30))
    for name in ("007.json", "x.json", "1.json.partial", "-1.json", "٣.json"):
        (held.commit(0).parent / name).write_text("{}")
    (held.generation.records.path.parent / "empty").mkdir()
    held.require_right()
    assert [each.fingerprint for each in ActivationStore.open(str(held.folder)).models()] == [MODEL]
    assert [each.id for each in held.reopened.generations()] == [held.id]
    assert held.reopened.verify() == []
    assert held.reopened.work([held.layout.asked]).rows_to_capture == 0
    assert all((folder / name).read_bytes() == content for folder in folders for name, content in names.items())
