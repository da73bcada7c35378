"""``resid store gc``: what it removes nobody needs, whoever is at work or was killed."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    capture,
    committed_files,
    expected,
    files,
    make_row,
    make_rows,
    make_texts,
    new_store,
    request,
    write,
)

from jobs.cli import build_parser
from jobs.store import run
from store import locks
from store.activations import ActivationStore, ModelStore
from store.collect import Garbage, find_garbage, remove_garbage
from store.errors import MissingDataError
from store.generation import RECORDS, Generation
from store.location import PARTIAL, Location
from store.sites import ALL_TOKENS

ROWS = make_rows(10)
FIRST = request(ROWS[:7], ("resid_post", "mlp_out"), positions=["prompt_end", "response_avg"])
TEXTS = request(make_texts(6), layers=[2], positions=[ALL_TOKENS])
PROBE = f".probe-{'0' * 32}{PARTIAL}"
Command = Callable[..., int]


@pytest.fixture
def model(tmp_path: Path) -> ModelStore:
    """Return a store of three captures, all committed."""
    model = new_store(str(tmp_path / "store"))
    capture(model, FIRST, block_rows=3)
    capture(model, request(ROWS[7:]))
    capture(model, TEXTS, block_rows=2)
    return model


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run ``resid store`` on the store of this test."""

    def call(name: str, *options: str) -> int:
        return run(build_parser().parse_args(["store", name, "--store", str(tmp_path / "store"), *options]))

    return call


def root(model: ModelStore) -> Path:
    return model.location.path.parent


def found(model: ModelStore, min_age: float | None = 0) -> list[Garbage]:
    return find_garbage(ActivationStore.open(str(root(model))), min_age)


def but_locks(garbage: list[Garbage]) -> set[str]:
    return {item.place.url for item in garbage if item.kind != "lock"}


def tree(store: Path) -> dict[str, bytes]:
    """Return all files but locks."""
    paths = [path for path in store.rglob("*") if path.is_file() and "locks" not in path.parts]
    return {str(path): path.read_bytes() for path in paths}


def age(store: Path, seconds: float) -> None:
    """Make all files so much older."""
    for path in store.rglob("*"):
        if path.is_file() and not path.is_symlink():
            before = path.stat().st_mtime - seconds
            os.utime(path, (before, before))


def first_capture(model: ModelStore) -> Generation:
    return next(generation for generation in model.generations() if generation.plan.n_rows == 7)


def litter(model: ModelStore) -> set[str]:
    """Leave what killed writers leave; return where."""
    generation = first_capture(model)
    left = [
        generation.shard("resid_post", 0).path.with_name("0.0123456789ab.partial"),
        generation.records.path / "commits" / "7.json.0123456789ab.partial",
        root(model) / "resid.json.0123456789ab.partial",
        root(model) / PROBE,
    ]
    for path in left:
        path.write_bytes(b"torn")
    # A probe is younger than a minute only while somebody tries the place.
    os.utime(left[-1], (time.time() - 100,) * 2)
    fresh = model.create(model.work([request([make_row(40)])]))[0]
    unborn = Generation(model.location / fresh.generation)
    (unborn.records / "generation.json").remove()
    left += [path for folder in (unborn.location, unborn.records) for path in folder.path.rglob("*") if path.is_file()]
    (generation.records.path / "commits" / "2.json").unlink()
    left += [generation.shard(component, 2).path for component in ("resid_post", "mlp_out")]
    texts = next(generation for generation in model.generations() if generation.plan.ragged)
    (texts.records.path / "commits" / "0.json").unlink()
    left.append(texts.shard("resid_post", 0).path)
    return {str(path) for path in left}


def foreign(model: ModelStore) -> list[Path]:
    """Put files of somebody else everywhere; return them."""
    generation = first_capture(model)
    unborn = "0123456789abcdef"
    below = [
        "README.txt",
        "download.partial",
        ".probe-mine.partial",
        f"{MODEL[:16]}/notes.md",
        f"{MODEL[:16]}/{RECORDS}/mine/x",
        f"{MODEL[:16]}/{RECORDS}/locks/mine",
        f"{MODEL[:16]}/{unborn}/thesis.tex",
        f"{MODEL[:16]}/{unborn}/resid_post/c/0/0/0.bak",
        f"{MODEL[:16]}/{RECORDS}/{unborn}/generation.json.old",
        f"{MODEL[:16]}/abc/c/0/0/0",
        f"{MODEL[:16]}/{generation.id}/resid_post/c/99/0/0/0",  # a block that the capture does not have
        f"{MODEL[:16]}/{generation.id}/resid_pre/c/0/0/0/0",  # a site that it does not have
        f"{MODEL[:16]}/{generation.id}/resid_post/c/2/0/0/0.copy",
    ]
    for name in below:
        path = root(model) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not resid's")
    link = root(model) / "link.0123456789ab.partial"
    link.symlink_to(root(model) / "README.txt")
    return [*(root(model) / name for name in below), link]


# -- what is garbage -------------------------------------------------------------------------------------------------


def test_gc_lists_first_and_removes_just_the_litter(
    model: ModelStore, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tree(tmp_path / "store")
    expected = litter(model)
    others = foreign(model)
    before = tree(tmp_path / "store")
    assert command("gc") == 0
    assert "nothing to remove" in capsys.readouterr().out  # all of it is younger than an hour
    assert command("gc", "--min-age", "0s") == 0
    out = capsys.readouterr().out
    assert "add --delete" in out
    assert "6 lock files of committed blocks" in out
    size = sum(len(before[name]) for name in expected)
    assert f"{len(expected) + 6} files, {size / 1000:.1f} kB" in out
    assert {line.split()[0] for line in out.splitlines() if line.startswith("/")} == expected
    assert tree(tmp_path / "store") == before
    assert command("gc", "--min-age", "0s", "--delete") == 0
    assert set(before) - set(tree(tmp_path / "store")) == expected
    assert all(path.read_text() == "not resid's" for path in others)
    assert but_locks(found(model)) == set()
    assert command("gc", "--min-age", "0s", "--delete") == 0
    assert "removed 0 files" in capsys.readouterr().out
    capture(model, FIRST, block_rows=3)
    capture(model, TEXTS, block_rows=2)
    after = tree(tmp_path / "store")
    assert {name: after[name] for name in whole} == whole


def test_gc_takes_only_what_is_old_enough(model: ModelStore) -> None:
    expected = litter(model)
    age(root(model), 3000)
    assert but_locks(found(model, None)) == set()
    assert but_locks(found(model, 2900)) == expected
    age(root(model), 700)
    assert but_locks(found(model, None)) == expected
    # One file of a capture that never began is new: somebody has begun it again.
    unborn = next(item.place.path for item in found(model) if item.kind == "unbegun")
    os.utime(unborn)
    assert {item.kind for item in found(model, None)} == {"partial", "probe", "shard", "lock"}


def test_gc_removes_the_folders_of_a_capture_that_never_began(model: ModelStore) -> None:
    litter(model)
    before = {path for path in model.location.path.iterdir() if path.is_dir()}
    remove_garbage(found(model))
    gone = before - {path for path in model.location.path.iterdir() if path.is_dir()}
    assert len(gone) == 1
    assert not (model.location.path / RECORDS / gone.pop().name).exists()


def test_gc_keeps_a_retired_capture_that_has_commits(model: ModelStore) -> None:
    whole = tree(root(model))
    generation = first_capture(model)
    record = generation.records.path / "generation.json"
    data = record.read_bytes()
    generation.retire()
    assert but_locks(found(model)) == set()
    remove_garbage(found(model))
    record.write_bytes(data)
    assert tree(root(model)) == whole
    assert model.verify() == []


def test_gc_keeps_locks_that_could_be_taken(model: ModelStore) -> None:
    generation = first_capture(model)
    planning = model.location.path / RECORDS / "locks" / "planning"
    model.assign([FIRST])
    assert planning.exists()
    (generation.records.path / "commits" / "2.json").unlink()
    names = {item.place.name for item in found(model) if item.kind == "lock" and item.generation.id == generation.id}
    assert names == {"0", "1"}
    removed, left = remove_garbage(found(model))
    assert left == []
    assert len(removed) == 2 + 1 + 2 + 4  # shards and locks of the three captures
    assert (generation.records.path / "locks" / "2").exists()
    assert planning.exists()
    capture(model, FIRST, block_rows=3)
    assert model.verify() == []


def test_gc_of_a_place_that_is_no_store_touches_nothing(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "store" / "thesis.0123456789ab.partial"
    with pytest.raises(MissingDataError, match="holds no activations"):
        command("gc", "--min-age", "0s", "--delete")
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(MissingDataError, match="holds no activations"):
        command("gc", "--min-age", "0s", "--delete")
    assert path.exists()


def test_gc_works_before_the_first_model(tmp_path: Path, command: Command) -> None:
    new_store(str(tmp_path / "store"))
    (tmp_path / "store" / MODEL[:16] / "model.json").unlink()
    left = tmp_path / "store" / MODEL[:16] / "model.json.0123456789ab.partial"
    left.write_bytes(b"{")
    assert command("gc", "--min-age", "0s", "--delete") == 0
    assert not left.exists()


# -- whoever is at work ----------------------------------------------------------------------------------------------


def test_gc_leaves_what_a_live_writer_holds(model: ModelStore) -> None:
    expected = litter(model)
    shards = {str(first_capture(model).shard(component, 2)) for component in ("resid_post", "mlp_out")}
    before = found(model)
    place = Location.of(root(model) / "file")
    with (
        first_capture(model).claim(2) as wanted,
        place.writing(first_wins=False) as draft,
        locks.exclusive(model.location / RECORDS, "planning"),
    ):
        assert wanted
        draft.write(b"half")
        (alive,) = root(model).glob("file.*.partial")
        unborn = {item.place.url for item in before if item.kind == "unbegun"}
        assert but_locks(found(model)) == expected - shards - unborn
        (item,) = [item for item in before if item.place.name == PROBE]
        removed, left = remove_garbage([*before, Garbage(Location.of(alive), 4, "partial", "")])
        assert {item.place.url for item in left} == {*shards, *unborn, str(alive)}
        assert item in removed
        draft.write(b" and whole")
    assert (root(model) / "file").read_bytes() == b"half and whole"
    remove_garbage(found(model))
    assert but_locks(found(model)) == set()


def test_what_was_committed_since_the_listing_is_kept(model: ModelStore) -> None:
    litter(model)
    before = [item for item in found(model) if item.kind in ("shard", "unbegun")]
    for ref in model.work([FIRST, TEXTS, request([make_row(40)])]).pending:
        assert write(model, ref)
    model.create(model.work([request([make_row(40)])]))
    removed, left = remove_garbage(before)
    assert (removed, left) == ([], before)
    assert model.verify() == []


def sweep(store: Path) -> Counter[str]:
    """Run gc --delete --min-age 0s; return how many files it removed, by kind."""
    removed, _ = remove_garbage(find_garbage(ActivationStore.open(str(store)), 0))
    return Counter(item.kind for item in removed)


@contextlib.contextmanager
def gc_all_the_while(store: Path) -> Iterator[Counter[str]]:
    """Sweep again and again in a thread; yield what is removed, and the number of rounds."""
    counts: Counter[str] = Counter()
    errors: list[BaseException] = []
    stop = threading.Event()

    def loop() -> None:
        try:
            while not stop.is_set():
                if (store / "resid.json").exists():
                    counts.update({**sweep(store), "rounds": 1})
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield counts
    finally:
        stop.set()
        thread.join()
    assert errors == []


@pytest.mark.parametrize("kind", ["rows", "texts"])
def test_gc_beside_writers_that_are_killed_loses_nothing(tmp_path: Path, forks: Forks, tally: Tally, kind: str) -> None:
    asked = request(make_rows(90)) if kind == "rows" else request(make_texts(60), positions=[ALL_TOKENS])
    asked = request(asked.rows, ("resid_post", "mlp_out"), positions=asked.positions)
    for each in ("whole", "store"):
        model = new_store(str(tmp_path / each))
        n_blocks = len(model.create(model.work([asked], block_rows=3)))
    capture(new_store(str(tmp_path / "whole")), asked)
    rng = random.Random(kind)
    with gc_all_the_while(tmp_path / "store") as counts:
        before: dict[str, tuple[int, int]] = {}
        between: Counter[str] = Counter()
        for _ in range(25):
            writer = forks.start("write_blocks", store=str(tmp_path / "store"), at=rng.randint(1, 70))
            writer.hear()
            writer.say("go")
            while (line := writer.hear()) and line != "now":
                pass
            writer.kill()
            writer.end()
            between.update(sweep(tmp_path / "store"))
            now = committed_files(model)
            assert before.items() <= now.items()
            before = now
            tally.add()
        last = forks.start("write_blocks", store=str(tmp_path / "store"))
        last.say("go")
        code, lines = last.end()
        assert code == 0
        assert len(lines) - 2 <= n_blocks - len(before) // 3
    assert counts["rounds"] > 5
    between.update(counts)
    assert between["partial"] + between["shard"] > 5, between
    sweep(tmp_path / "store")
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    assert not list((tmp_path / "store").rglob(f"*{PARTIAL}"))
    assert model.verify() == []


def test_gc_beside_captures_that_begin_and_write_together_loses_nothing(tmp_path: Path, forks: Forks) -> None:
    new_store(str(tmp_path / "store"))
    model = new_store(str(tmp_path / "whole"))
    asked = [request(make_rows(stop)[start:], positions=["prompt_end", "response_avg"]) for start, stop in RANGES]
    for each in asked:
        capture(model, each, block_rows=2)
    with gc_all_the_while(tmp_path / "store") as counts:
        for start, stop in RANGES:  # one after the other begins, and both are at work then
            writers = [
                forks.start(
                    "capture_range",
                    store=str(tmp_path / "store"),
                    start=start,
                    stop=stop,
                    writer="",
                    block_rows=2,
                    compression="none",
                    kind="rows",
                )
                for _ in range(2)
            ]
            for writer in writers:
                writer.say("go")
            for writer in writers:
                assert writer.end()[0] == 0
    assert counts["rounds"] > 3
    sweep(tmp_path / "store")
    model = new_store(str(tmp_path / "store"))
    assert model.verify() == []
    for each in asked:
        assert model.work([each]).rows_to_capture == 0

    def shards(store: str) -> dict[str, bytes]:
        everything = files(tmp_path / store)
        return {name: data for name, data in everything.items() if "commits" not in name}

    assert shards("store") == shards("whole")


RANGES = ((0, 30), (20, 50), (40, 60))


def test_gc_beside_captures_that_are_killed_while_they_begin_loses_nothing(
    tmp_path: Path, forks: Forks, tally: Tally
) -> None:
    code, lines = forks.start("create", store=str(tmp_path / "whole"), n_rows=6).end()
    assert code == 0
    n = int(lines[-1].removeprefix("operations "))
    rng = random.Random(5)
    between: Counter[str] = Counter()
    with gc_all_the_while(tmp_path / "store") as counts:
        for step in sorted(rng.sample(range(n // 3, n), 12)):
            forks.start("create", store=str(tmp_path / "store"), n_rows=6, at=step).end()
            between.update(sweep(tmp_path / "store"))
            tally.add()
        assert forks.start("create", store=str(tmp_path / "store"), n_rows=6).end()[0] == 0
    between.update(counts)
    assert between["unbegun"] > 0, between
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    model = new_store(str(tmp_path / "store"))
    capture(model, request(make_rows(6), ("resid_post", "mlp_out")))
    assert model.verify() == []


# -- writers whose claim cannot be seen ------------------------------------------------------------------------------

GATED = ("exists", "size", "list", "read_bytes", "tail", "remove", "write", "create", "writing")


class Turns:
    """Threads of which one at a time goes on to its next operation on the store, as a schedule says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._go: dict[str, threading.Semaphore] = {}
        self._events: queue.Queue[tuple[str, bool]] = queue.Queue()
        for name in GATED:
            patch.setattr(Location, name, self._gated(getattr(Location, name)))

    def _gated(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wait_and_do(*arguments: Any, **options: Any) -> Any:
            name = threading.current_thread().name
            if name in self._go:
                self._events.put((name, False))
                self._go[name].acquire()
            return operation(*arguments, **options)

        return wait_and_do

    def take(self, choose: Callable[[list[str]], str], **tasks: Callable[[], object]) -> dict[str, Any]:
        """Run the tasks to their ends; return their results, errors included."""
        results: dict[str, Any] = {}

        def run(name: str) -> None:
            try:
                results[name] = tasks[name]()
            except Exception as error:
                results[name] = error
            self._events.put((name, True))

        self._go = {name: threading.Semaphore(0) for name in tasks}
        threads = [threading.Thread(target=run, args=(name,), name=name) for name in tasks]
        for thread in threads:
            thread.start()
        running, waiting = set(tasks), set()
        while running or waiting:
            while running:
                name, ended = self._events.get(timeout=60)
                running.remove(name)
                waiting |= set() if ended else {name}
            if waiting:
                name = choose(sorted(waiting))
                waiting.remove(name)
                running.add(name)
                self._go[name].release()
        for thread in threads:
            thread.join()
        self._go = {}
        return results


@pytest.mark.parametrize("left", ["nothing", "whole", "of a rival", "torn"])
@pytest.mark.parametrize("place", ["local", "objects"])
def test_gc_and_a_writer_that_it_cannot_see_in_any_order_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally, place: str, left: str
) -> None:
    # Used to happen: a shard was removed that had just been committed, and only `verify` noticed. A writer holds no
    # lock on object storage, nor where it has lost patience with another one's.
    monkeypatch.setattr(Generation, "claim", lambda *_: contextlib.nullcontext(True))
    turns = Turns(monkeypatch)
    rng = random.Random(left)
    asked = request(make_rows(3), ("resid_post", "mlp_out"))
    removed = 0
    for i in range(30):
        url = str(tmp_path / str(i)) if place == "local" else f"memory://{uuid.uuid4().hex}"
        model = new_store(url)
        (block,) = model.create(model.work([asked]))
        (generation,) = model.generations()
        noise = {"of a rival": 2e-6}.get(left, 0.0)
        shards = [generation.shard(component, 0) for component in ("resid_post", "mlp_out")]
        if left != "nothing":
            assert write(model, block, noise)
            (generation.records / "commits" / "0.json").remove()
            if left == "torn":
                shards[0].write(shards[0].read_bytes()[:-9])
        garbage = [Garbage(shard, 0, "shard", "", generation, 0) for shard in shards]
        # The writer alone at first, up to its shards or beyond; then one of them, one more often than the other.
        alone, eager = iter(range(rng.randrange(7))), rng.uniform(0.2, 0.8)
        results = turns.take(
            lambda names, alone=alone, eager=eager: (
                names[next(alone, None) is not None or rng.random() > eager] if len(names) == 2 else names[0]
            ),
            gc=lambda garbage=garbage: remove_garbage(garbage),
            writer=lambda model=model, block=block: write(model, block),
        )
        assert results["writer"] is True
        removed += len(results["gc"][0])
        if 0 not in generation.committed():
            # A torn shard was replaced while it was taken for left over: the block waits, and is made again.
            assert left == "torn"
            assert write(model, block)
        assert model.verify() == []
        for component in asked.components:
            read = model.select([row.key for row in asked.rows], component, "prompt_end").to_numpy()
            truth = expected(asked.rows, component, range(LAYERS), "prompt_end", "float32")
            assert any(np.array_equal(read, truth * np.float32(1 + each)) for each in (0.0, noise))
        tally.add()
    assert 0 < removed < 2 * 30


# -- object storage --------------------------------------------------------------------------------------------------


def test_on_object_storage_age_decides(bucket: str) -> None:
    model = new_store(f"{bucket}/store")
    capture(model, request(ROWS[:4]), block_rows=2)
    store = ActivationStore.open(f"{bucket}/store")
    generation = model.generations()[0]
    generation._commit(1).remove()
    (store.location / PROBE).write(b"first")
    (store.location / "notes.partial").write(b"mine")
    planning = model.location / RECORDS / "locks" / "planning"
    for number in (7, 8):
        (planning / f"{number}.json").write(b'{"holder": "", "expires": 0}')
    (unborn,) = {ref.generation for ref in model.create(model.work([request([make_row(40)])]))}
    (Generation(model.location / unborn).records / "generation.json").remove()
    assert find_garbage(store) == []
    assert find_garbage(store, 3600) == []
    # The server's clock counts whole seconds.
    garbage = find_garbage(store, -2)
    kinds = Counter(item.kind for item in garbage)
    assert set(kinds) == {"probe", "shard", "lease", "unbegun"}
    assert (kinds["probe"], kinds["shard"]) == (1, 1)
    assert {item.place.name for item in garbage if item.kind == "lease"} >= {"7.json"}
    assert "8.json" not in {item.place.name for item in garbage}
    assert generation.shard("resid_post", 1) in {item.place for item in garbage}
    _, left = remove_garbage(garbage)
    assert left == []
    assert find_garbage(store, -2) == [] or {item.kind for item in find_garbage(store, -2)} == {"lease"}
    assert (store.location / "notes.partial").exists()
    assert [ref.block for ref in capture(model, request(ROWS[:4]))] == [1]
    assert model.verify() == []
