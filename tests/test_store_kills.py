"""A writer that is killed anywhere leaves committed blocks, and files that nobody reads; the next one does the rest."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from failure_table import Tally
from failure_table import tally as tally
from store_forks import Forks
from store_forks import forks as forks
from store_worker import capture, committed_files, files, make_rows, make_texts, new_store, request, write

from store.activations import ActivationStore, CaptureRequest, ModelStore
from store.layout import Compression
from store.location import PARTIAL
from store.sites import ALL_TOKENS

KILLS = 50
D_MODEL = 1024
COMPONENTS = ("resid_post", "mlp_out")
POSITIONS = ("prompt_end", "response_avg")
# name -> (what is captured, rows of a block, compression): 80 blocks of two shards of 0.1 to 0.3 MB each
CAPTURES: dict[str, tuple[CaptureRequest, int, Compression]] = {
    "float32": (request(make_rows(320), COMPONENTS, positions=POSITIONS), 4, "none"),
    "bfloat16": (request(make_rows(320), COMPONENTS, positions=POSITIONS, dtype="bfloat16"), 4, "none"),
    "all_tokens": (request(make_texts(160), COMPONENTS, positions=(ALL_TOKENS,)), 2, "none"),
    "zstd": (request(make_rows(320), COMPONENTS, positions=POSITIONS), 4, "zstd"),
}


def phase(model: ModelStore, seen: set[Path]) -> tuple[str, set[Path]]:
    """Tell from the files where in a block its writer was killed; `seen` are the leftovers of those before."""
    (generation,) = model.generations()
    block = min(set(range(generation.plan.n_blocks)) - generation.committed())
    shards = sum(generation.shard(component, block).exists() for component in COMPONENTS)
    leftovers = set(generation.location.path.parent.rglob(f"*{PARTIAL}"))
    is_inside = bool(leftovers - seen)
    name = {
        (0, False): "before the first shard",
        (0, True): "inside the first shard",
        (1, False): "between the shards",
        (1, True): "inside the second shard",
        (2, False): "before the commit",
        (2, True): "inside the commit",
    }[shards, is_inside]
    return name, leftovers


@pytest.mark.parametrize("name", CAPTURES)
def test_fifty_kills_at_random_moments_change_nothing_and_repeat_nothing(
    tmp_path: Path, forks: Forks, tally: Tally, name: str
) -> None:
    asked, block_rows, compression = CAPTURES[name]
    for each in ("whole", "killed"):
        model = new_store(str(tmp_path / each), d_model=D_MODEL, dtype=asked.dtype)
        n_blocks = len(model.create(model.work([asked], block_rows, compression)))
    assert n_blocks >= 30

    uninterrupted = forks.start("write_blocks", store=str(tmp_path / "whole"))
    uninterrupted.say("go")
    code, lines = uninterrupted.end()
    assert (code, len(lines)) == (0, n_blocks + 2)
    a_block = int(lines[-1].removeprefix("operations ")) / n_blocks  # file operations
    whole = files(tmp_path / "whole")

    rng = random.Random(name)
    killed = ActivationStore.open(str(tmp_path / "killed")).model(asked.rows[0].model)
    before: dict[str, tuple[int, int]] = {}
    phases: Counter[str] = Counter()
    leftovers: set[Path] = set()
    for _ in range(KILLS):
        writer = forks.start("write_blocks", store=str(tmp_path / "killed"), at=rng.randint(1, round(1.5 * a_block)))
        assert writer.hear() == "ready"
        writer.say("go")
        while (line := writer.hear()) != "now":
            assert line, "the writer came to an end before"
        time.sleep(rng.uniform(0, 0.003))  # a moment, and no wait for anything
        writer.kill()
        assert writer.end()[0] == -9
        now = committed_files(killed)
        assert before.items() <= now.items()  # nothing committed was written again
        assert files(tmp_path / "killed", without=before).items() <= whole.items()  # nothing but leftovers remains
        assert killed.verify() == []
        where, leftovers = phase(killed, leftovers)
        phases[where] += 1
        before = now
        tally.add()
    assert 0 < len(before) < len(COMPONENTS) * n_blocks + n_blocks
    assert len(phases) >= 4, phases
    assert {"inside the first shard", "inside the second shard"} & set(phases), phases
    assert {"between the shards", "before the commit"} & set(phases), phases

    last = forks.start("write_blocks", store=str(tmp_path / "killed"))
    last.say("go")
    code, lines = last.end()
    assert (code, len(lines) - 2) == (0, n_blocks - len(before) // 3)
    assert before.items() <= committed_files(killed).items()
    assert files(tmp_path / "killed") == whole
    assert killed.work([asked]).rows_to_capture == 0


def steps(lines: list[str], count: int) -> list[int]:
    """Return so many of the file operations that an uninterrupted task reported, the first and the last among them."""
    n = int(lines[-1].removeprefix("operations "))
    chosen = sorted({round(1 + i * (n - 1) / (count - 1)) for i in range(count)})
    assert len(chosen) == count
    return chosen


def test_a_capture_killed_at_any_step_of_its_beginning_begins_again(tmp_path: Path, forks: Forks, tally: Tally) -> None:
    _, lines = forks.start("create", store=str(tmp_path / "whole"), n_rows=6).end()
    whole = files(tmp_path / "whole")
    for step in steps(lines, 20):
        store = tmp_path / str(step)
        assert forks.start("create", store=str(store), n_rows=6, at=step).end() == (-9, [])
        assert files(store).items() <= whole.items()
        assert all(model.verify() == [] for model in ActivationStore.open(str(store)).models())
        assert forks.start("create", store=str(store), n_rows=6).end()[0] == 0
        assert files(store) == whole
        tally.add()


def test_a_block_killed_at_any_step_is_made_again(tmp_path: Path, forks: Forks, tally: Tally) -> None:
    asked = request(make_rows(2), COMPONENTS)

    def killed(name: str, at: int) -> list[str]:
        model = new_store(str(tmp_path / name))
        model.create(model.work([asked], block_rows=2))
        writer = forks.start("write_blocks", store=str(tmp_path / name), at=at, suicide=True)
        writer.say("go")
        code, lines = writer.end()
        assert code == (-9 if at else 0)
        return lines

    lines = killed("whole", 0)
    whole = files(tmp_path / "whole")
    waiting = []
    for step in steps(lines, 20):
        killed(str(step), step)
        model = new_store(str(tmp_path / str(step)))
        assert model.verify() == []
        waiting.append(len(pending := model.work([asked]).pending))
        for block in pending:
            assert write(model, block)
        assert files(tmp_path / str(step)) == whole
        tally.add()
    # Not there until the commit, and there ever after.
    assert waiting == sorted(waiting, reverse=True)
    assert set(waiting) == {0, 1}


@pytest.mark.parametrize("name", ["shard", "metadata"])
def test_a_repair_killed_at_any_step_is_done_again(tmp_path: Path, forks: Forks, tally: Tally, name: str) -> None:
    asked = request(make_rows(6), COMPONENTS)

    def killed(at: int) -> tuple[ModelStore, dict[str, bytes], list[str]]:
        model = new_store(str(tmp_path / str(at)))
        capture(model, asked, block_rows=2)
        whole = files(tmp_path / str(at))
        (generation,) = model.generations()
        broken = generation.shard("mlp_out", 1) if name == "shard" else generation.location / "row" / "c" / "0"
        broken.path.write_bytes(b"damaged")
        code, lines = forks.start("repair", store=str(tmp_path / str(at)), at=at).end()
        assert code == (-9 if at else 0)
        return model, whole, lines

    _, _, lines = killed(0)
    for step in steps(lines, 6):
        model, whole, _ = killed(step)
        model.verify(repair=True)
        assert model.verify() == []
        assert len(capture(model, asked, block_rows=2)) == (1 if name == "shard" else 0)
        assert files(tmp_path / str(step)) == whole
        tally.add()
