"""Writers and readers of one store at the same time: every block is committed once, and what is seen is whole."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from failure_table import Tally
from failure_table import tally as tally
from s3_server import bucket as bucket
from s3_server import s3 as s3
from store_forks import Forks
from store_forks import forks as forks
from store_worker import (
    LAYERS,
    MODEL,
    activations,
    capture,
    committed_files,
    expected,
    make_rows,
    make_texts,
    new_store,
    request,
    write,
)

from store.activations import ActivationStore, BlockRef, CaptureRequest, ModelStore
from store.dtypes import NUMPY_DTYPES
from store.generation import Generation
from store.layout import Compression
from store.records import Commit
from store.rows import Row
from store.sites import ALL_TOKENS
from store.writing import put_shard

# What each of the writers asks for: overlapping ranges of 60 rows.
RANGES = {2: [(0, 42), (18, 60)], 4: [(0, 30), (10, 45), (25, 60), (0, 60)]}


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store is: on local disk, or on S3."""
    return str(tmp_path / "store") if request.param == "local" else f"{request.getfixturevalue('bucket')}/store"


def environment() -> dict[str, str]:
    """Return what forked processes need of this one's: the S3 server starts after the process that they come from."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@pytest.mark.parametrize(
    ("url", "n_writers", "kind"),
    [
        ("local", 2, "rows"),
        ("local", 4, "rows"),
        ("local", 4, "texts"),
        ("s3", 2, "texts"),
        ("s3", 4, "rows"),
    ],
    indirect=["url"],
)
def test_captures_that_start_together_share_the_work_and_readers_see_whole_blocks(
    url: str, tmp_path: Path, forks: Forks, n_writers: int, kind: str
) -> None:
    new_store(url)
    rows: tuple[Row, ...] = (make_texts if kind == "texts" else make_rows)(60)
    position = ALL_TOKENS if kind == "texts" else "prompt_end"
    block_rows = 3 if "://" not in url else 10
    until = tmp_path / "stop"
    reader = forks.start(
        "read_blocks", environment(), store=url, stop=60, position=position, kind=kind, until=str(until)
    )
    writers = {
        f"writer {i}": forks.start(
            "capture_range",
            environment(),
            store=url,
            start=start,
            stop=stop,
            writer=f"writer {i}",
            block_rows=block_rows,
            compression="none",
            kind=kind,
        )
        for i, (start, stop) in enumerate(RANGES[n_writers])
    }
    for writer in writers.values():
        assert writer.hear() == "ready"
    for writer in writers.values():
        writer.say("go")
    reader.say("go")
    won: dict[str, list[str]] = {}
    for name, writer in writers.items():
        code, lines = writer.end()
        assert code == 0
        won[name] = [line.rpartition(" ")[0] for line in lines[1:] if line.endswith(" 1")]
    until.touch()
    code, looks = reader.end()
    assert code == 0
    seen = [int(look) for look in looks]
    assert seen == sorted(seen)
    assert seen[-1] == 60

    model = ActivationStore.open(url).model(MODEL)
    generations = model.generations()
    held = [key for generation in generations for key in generation.keys]
    assert sorted(held) == sorted(row.key for row in rows)  # each row in one generation
    every = [f"{generation.id}/{block}" for generation in generations for block in range(generation.plan.n_blocks)]
    assert sorted(block for mine in won.values() for block in mine) == sorted(every)  # each block won by one writer
    for name, mine in won.items():
        for block in mine:
            generation, _, number = block.partition("/")
            commit = Generation(model.location / generation).commit_record(int(number))
            assert commit.provenance == {"writer": name}
    assert model.verify() == []
    read = model.select([row.key for row in rows], "resid_post", position).to_numpy()
    np.testing.assert_array_equal(read, expected(rows, "resid_post", range(LAYERS), position, "float32"))


# -- rivals whose sums differ in the last bits --------------------------------------------------------------------

NOISE = 2e-6  # relative
LAYOUTS: dict[str, tuple[CaptureRequest, Compression]] = {
    "float32": (request(make_rows(4), ("resid_post", "mlp_out")), "none"),
    "bfloat16": (request(make_rows(4), ("resid_post", "mlp_out"), dtype="bfloat16"), "none"),
    "all_tokens": (request(make_texts(4), ("resid_post", "mlp_out"), positions=(ALL_TOKENS,)), "none"),
    "zstd": (request(make_rows(4), ("resid_post", "mlp_out")), "zstd"),
    "zstd all_tokens": (request(make_texts(4), ("resid_post", "mlp_out"), positions=(ALL_TOKENS,)), "zstd"),
}


def check_one_of(model: ModelStore, asked: CaptureRequest, noises: list[float]) -> None:
    """Check that the store is whole and that each shard is, bit for bit, what one of the writers wrote."""
    assert model.verify(deep=True) == []
    (position,) = asked.positions
    (generation,) = model.generations()
    for component in asked.components:
        for block in range(generation.plan.n_blocks):
            start, stop = generation.plan.block_range(block)
            rows = generation.rows[start:stop]
            read = model.select([row.key for row in rows], component, position).to_numpy()
            dtype = NUMPY_DTYPES[asked.dtype]
            written = [activations(rows, generation.plan, noise)[component].astype(dtype) for noise in noises]
            found = [np.array_equal(read, each.astype(np.float32).reshape(read.shape)) for each in written]
            assert any(found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_in_every_order_of_two_rivals_the_commit_describes_what_is_there(
    tmp_path: Path, tally: Tally, name: str
) -> None:
    asked, compression = LAYOUTS[name]
    url = str(tmp_path)
    # Each puts its two shards, then commits; A is whoever begins.
    orders = sorted(set(itertools.permutations("AAABBB")))[:10]
    assert {order[0] for order in orders} == {"A"}
    for order in orders:
        model = new_store(f"{url}/{''.join(order)}", dtype=asked.dtype)
        model.create(model.work([asked], 4, compression))
        noises = {"A": 0.0, "B": NOISE}
        commits = []
        turns = {writer: writing(model, noise) for writer, noise in noises.items()}
        for writer in order:
            commits += next(turns[writer])
        assert sorted(commits) == [False, True]
        check_one_of(model, asked, list(noises.values()))
        tally.add()


def writing(model: ModelStore, noise: float):  # type: ignore[no-untyped-def]
    """Do what `write_block` does, one write at a time."""
    (generation,) = model.generations()
    plan = generation.plan
    shards = {}
    values = activations(generation.rows, plan, noise)
    for component, array in values.items():
        shards[component] = put_shard(generation.shard(component, 0), array.astype(NUMPY_DTYPES[plan.dtype]), plan)
        yield []
    commit = Commit(generation.id, plan.model, 0, *plan.block_range(0), shards, {})
    yield [(generation.records / "commits" / "0.json").create(commit.to_json())]


@pytest.mark.parametrize(
    ("url", "name"),
    [*(("local", name) for name in LAYOUTS), ("s3", "float32"), ("s3", "all_tokens"), ("s3", "zstd")],
    indirect=["url"],
)
def test_rivals_at_full_speed_agree_on_what_is_there(url: str, forks: Forks, name: str) -> None:
    asked, compression = LAYOUTS[name]
    rows = (make_texts if ALL_TOKENS in asked.positions else make_rows)(24)
    asked = CaptureRequest(rows, asked.components, asked.layers, asked.positions, asked.dtype)
    model = new_store(url, dtype=asked.dtype)
    model.create(model.work([asked], 2 if "://" not in url else 6, compression))
    noises = [0.0, NOISE, -NOISE]
    writers = [forks.start("write_blocks", environment(), store=url, noise=noise) for noise in noises]
    for writer in writers:
        assert writer.hear() == "ready"
    for writer in writers:
        writer.say("go")
    won: list[str] = []
    for writer in writers:
        code, lines = writer.end()
        assert code == 0
        won += [line for line in lines if line.endswith(" 1")]
    (generation,) = model.generations()
    assert len(won) == len(set(won)) == generation.plan.n_blocks
    check_one_of(model, asked, noises)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("left", ["whole", "of a rival", "torn", "flipped", "of other rows", "no shard"])
def test_a_shard_that_was_left_without_a_commit_is_taken_if_it_is_right_and_else_replaced(
    tmp_path: Path, name: str, left: str
) -> None:
    asked, compression = LAYOUTS[name]

    def shards(folder: str, noise: float = 0.0) -> Path:
        model = new_store(str(tmp_path / folder), dtype=asked.dtype)
        (block,) = model.create(model.work([asked], 4, compression))
        assert write(model, block, noise)
        return model.generations()[0].shard("mlp_out", 0).path

    right, rival = shards("right").read_bytes(), shards("rival", NOISE).read_bytes()
    other = {
        "whole": right,
        "of a rival": rival,
        "torn": right[:-7],
        "flipped": bytes([right[0] ^ 1]) + right[1:],
        "of other rows": shards("other", noise=0.5).read_bytes(),  # of the same shape
        "no shard": b"not a shard",
    }[left]
    model = new_store(str(tmp_path / "store"), dtype=asked.dtype)
    (block,) = model.create(model.work([asked], 4, compression))
    (generation,) = model.generations()
    place = generation.shard("mlp_out", 0)
    place.write(other)
    assert write(model, block)
    assert place.read_bytes() == (rival if left == "of a rival" else right)
    check_one_of(model, asked, [0.0, NOISE])


def test_a_committed_block_is_not_written_again(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(make_rows(6)), block_rows=3)
    before = committed_files(model)
    (generation,) = model.generations()
    assert not write(model, BlockRef(generation.id, 0, 3))
    other = activations(generation.rows[:3], generation.plan)
    other["resid_post"] += 1
    assert not generation.write_block(0, other)
    assert committed_files(model) == before
