"""A worker that writes one block while it computes the next: never further ahead, and no error is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from capture_reference import plan_of
from cluster_workers import number_blocks
from slow_reference import random_rows, tiny

from pipeline import workers
from pipeline.cluster_ledger import Ledger, run_inline
from pipeline.cluster_worker import Host, Outcome, overlaps
from store.activations import ActivationStore, CaptureRequest
from store.errors import NonFiniteError
from store.location import Location
from store.rows import Row
from store.sites import COMPONENTS


class Recorder:
    """Notes when blocks are computed and written. Writes of the first blocks take long; what `fails` names raises."""

    def __init__(self, fails: tuple[str, ...] = ()):
        self.fails, self.events = fails, []
        self.computing = self.writing = 0
        self.ahead = 0

    def compute(self, block: Any) -> Callable[[], Any]:
        self._enter("compute", block)
        self.ahead = max(self.ahead, sum(name == "compute" for name, _ in self.events) - self._written())

        def write() -> str:
            assert self.writing == 0
            self.writing += 1
            time.sleep(0.02)
            self.writing -= 1
            self._enter("write", block)
            return str(block.id)

        return write

    def run(self, block: Any) -> Any:
        raise AssertionError("an overlapping worker is not run")

    def _written(self) -> int:
        return sum(name == "write" for name, _ in self.events)

    def _enter(self, name: str, block: Any) -> None:
        self.events.append((name, block.id))
        if f"{name} {block.id}" in self.fails:
            raise NonFiniteError(f"{name} {block.id}")


def inline(recorder: Recorder, count: int) -> tuple[Any, list[Any]]:
    answers: list[Any] = []
    ledger = Ledger(number_blocks(count), 2, lambda block, answer: answers.append((block.id, answer)))
    return run_inline(ledger, lambda: recorder, {}, 2), answers


def test_a_block_is_written_while_the_next_is_computed_and_no_more_than_that() -> None:
    recorder = Recorder()
    report, answers = inline(recorder, 6)
    ids = [block.id for block in number_blocks(6)]
    assert report.done == 6
    assert answers == [(name, name) for name in ids]
    assert recorder.events.index(("compute", ids[1])) < recorder.events.index(("write", ids[0]))
    assert recorder.events.index(("write", ids[0])) < recorder.events.index(("compute", ids[2]))
    assert recorder.ahead <= 2


def test_errors_of_computing_and_of_writing_are_their_own_blocks() -> None:
    ids = [block.id for block in number_blocks(5)]
    report, answers = inline(Recorder((f"compute {ids[1]}", f"write {ids[3]}")), 5)
    assert [failure.block_id for failure in report.failed] == [ids[1], ids[3]]
    assert [failure.cause.partition(": ")[2] for failure in report.failed] == [f"compute {ids[1]}", f"write {ids[3]}"]
    assert [name for name, _ in answers] == [ids[0], ids[2], ids[4]]


def test_an_actor_answers_when_a_block_is_written_and_computes_the_next_meanwhile() -> None:
    recorder, host = Recorder(("write block-002",)), Host()
    host._worker = recorder  # type: ignore[assignment]
    blocks = number_blocks(4)
    answers: dict[str, Outcome] = {}

    def call(block: Any) -> None:
        answers[block.id] = host.run(block)

    threads = []
    for block in blocks:  # as the scheduler does: no more than two at a time
        threads.append(threading.Thread(target=call, args=(block,)))
        threads[-1].start()
        while sum(thread.is_alive() for thread in threads) > 1:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    failed = {block.id for block in blocks if f"write {block.id}" in recorder.fails}
    assert {name for name, outcome in answers.items() if outcome.error is not None} == failed
    assert {name: outcome.value for name, outcome in answers.items() if outcome.error is None} == {
        block.id: block.id for block in blocks if block.id not in failed
    }


def test_an_actor_builds_only_once_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    seen: list[str] = []
    monkeypatch.setattr(host, "_build", lambda packed: seen.append("built"))
    building = threading.Thread(target=host.build, args=(b"",))
    building.start()
    time.sleep(0.05)
    assert not seen
    host.prepare({})
    building.join(5)
    assert seen == ["built"]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> tuple[Any, list[Row], Any]:
    """A store with three blocks to capture, and a worker for it."""
    model = tiny("llama")
    monkeypatch.setattr(workers, "_load", lambda ref, fingerprint: model)
    monkeypatch.setenv("RESID_CACHE", str(tmp_path / "cache"))
    rows = random_rows([(4 + n % 5, 2) for n in range(12)], model=model.fingerprint)
    store = ActivationStore.open(Location.of(str(tmp_path / "store")))
    manifest = {"fingerprint": model.fingerprint, "dtype": "float32", "n_layers": 3, "d_model": 48, "family": "llama"}
    model_store = store.add_model(manifest)
    request = CaptureRequest(tuple(rows), COMPONENTS, (0, 1, 2), ("prompt_end", "response_avg"), "float32")
    _, blocks = model_store.assign([request], 4, "none")
    worker = workers.CaptureWorker(str(tmp_path / "store"), model.ref, model.fingerprint, 64, {"study": "s"})
    return worker, rows, blocks


def test_blocks_that_overlap_are_committed_as_they_are_one_by_one(capture: Any) -> None:
    worker, rows, blocks = capture
    assert overlaps(workers.CaptureWorker)
    assert not overlaps(workers.ReplayWorker)
    assert len(blocks) == 3
    ledger = Ledger(blocks, 1, None)
    report = run_inline(ledger, lambda: worker, {}, 1)
    assert report.done == 3
    assert not report.failed
    generation = worker._generations[blocks[0].generation]
    assert generation.committed() == {0, 1, 2}
    for block in range(3):
        generation.verify_block(block)
    plan = plan_of(worker.model, positions=("prompt_end", "response_avg"))
    start, stop = generation.plan.block_range(1)
    expected = worker.engine.run(generation.rows[start:stop], plan)["resid_post"]
    with generation.open_block("resid_post", 1) as shard:
        np.testing.assert_array_equal(shard.read([0, 1, 2]).swapaxes(0, 1), expected)
    assert {row.key for row in rows} == set(generation.keys)


def test_a_block_whose_writing_fails_is_free_again(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _, blocks = capture
    commit = worker.compute(blocks[0])
    generation = worker._generations[blocks[0].generation]
    assert generation._claimed == {0}

    def full(*args: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(generation, "write_block", full)
    with pytest.raises(OSError, match="no space"):
        commit()
    assert generation._claimed == set()
    monkeypatch.undo()
    assert generation.committed() == set()


def test_a_block_that_cannot_be_computed_is_free_again(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _, blocks = capture

    def broken(*args: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(worker.engine, "run", broken)
    with pytest.raises(RuntimeError, match="broken"):
        worker.compute(blocks[0])
    assert worker._generations[blocks[0].generation]._claimed == set()
