"""A lock has one holder at a time, whoever dies; and what the dead held is free."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import Fault, FaultyProxy
from s3_server import bucket as bucket
from s3_server import faulty as faulty
from s3_server import s3 as s3

from store import locks
from store.errors import ResourceError
from store.location import Location
from store.locks import exclusive

HOLD = """
import sys
from store.location import Location
from store.locks import exclusive
with exclusive(Location.of(sys.argv[1]), "x", wait=False, stale_after=float(sys.argv[2])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""
COUNT = """
import sys
from store.location import Location
from store.locks import exclusive
folder, turns = Location.of(sys.argv[1]), int(sys.argv[2])
for _ in range(turns):
    with exclusive(folder, "x", poll=0.02) as held:
        assert held
        (folder / "count").write(b"%d" % (int((folder / "count").read_bytes()) + 1))
"""


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    match request.param:
        case "disk":
            return Location.of(tmp_path / "data")
        case "memory":
            return Location.of(f"memory://{uuid.uuid4().hex}")
        case _:
            return Location.of(request.getfixturevalue("bucket")) / "data"


@pytest.fixture(params=["disk", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A folder that other processes see as well."""
    return Location.of(tmp_path if request.param == "disk" else request.getfixturevalue("bucket"))


@contextlib.contextmanager
def holder(folder: Location, stale_after: float = 600) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that holds the lock "x"."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(stale_after)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        yield process


def is_free(folder: Location, name: str = "x") -> bool:
    with exclusive(folder, name, wait=False) as held:
        return held


def test_one_holder_at_a_time(folder: Location) -> None:
    for _ in range(3):
        with exclusive(folder, "x") as held:
            assert held
            assert not is_free(folder)
            assert is_free(folder, "y")
        assert is_free(folder)


def test_a_lock_is_free_after_an_exception(folder: Location) -> None:
    with pytest.raises(KeyError), exclusive(folder, "x"):
        raise KeyError
    assert is_free(folder)


def test_who_does_not_get_it_does_not_release_it(folder: Location) -> None:
    with exclusive(folder, "x"):
        assert not is_free(folder)
        assert not is_free(folder)


def test_processes_count_without_losing_one(shared: Location) -> None:
    (shared / "count").write(b"0")
    turns = 30 if shared.is_local else 5
    counters = [subprocess.Popen([sys.executable, "-c", COUNT, str(shared), str(turns)]) for _ in range(4)]
    assert [counter.wait() for counter in counters] == [0] * 4
    assert (shared / "count").read_bytes() == b"%d" % (4 * turns)


def test_threads_count_without_losing_one(folder: Location) -> None:
    counted = [0]

    def count() -> None:
        for _ in range(5):
            with exclusive(folder, "x", poll=0.01):
                before = counted[0]
                time.sleep(0)  # lets others in, if they could
                counted[0] = before + 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == [20]


def test_a_killed_holder_frees_a_local_lock_at_once(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    with holder(folder) as process:
        assert not is_free(folder)
        process.kill()
        process.wait()
    assert is_free(folder)


def test_a_killed_holders_lease_is_held_until_it_expires_and_then_free(bucket: str) -> None:
    folder = Location.of(bucket)
    with holder(folder) as process:
        process.kill()
    assert not is_free(folder)
    # As if ten minutes had gone by.
    with pytest.MonkeyPatch.context() as patch:
        now = time.time()
        patch.setattr(time, "time", lambda: now + 599)
        assert not is_free(folder)
        patch.setattr(time, "time", lambda: now + 601)
        assert is_free(folder)
    with exclusive(folder, "x") as held:  # released by the one who took it over
        assert held


def test_a_waiter_takes_over_when_a_lease_expires(bucket: str) -> None:
    folder = Location.of(bucket)
    with holder(folder, stale_after=1.5) as process:
        process.kill()
    with exclusive(folder, "x", poll=0.05) as held:
        assert held


def test_of_many_that_take_over_at_once_one_proceeds(bucket: str) -> None:
    folder = Location.of(bucket)
    for _ in range(5):
        with holder_of_expired_lease(folder):
            start, finish, held = threading.Barrier(8), threading.Barrier(8), []

            def take(
                start: threading.Barrier = start, finish: threading.Barrier = finish, held: list[bool] = held
            ) -> None:
                start.wait()
                with exclusive(folder, "x", wait=False) as got:
                    held.append(got)
                    finish.wait()  # nobody releases it before all have tried

            threads = [threading.Thread(target=take) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(held) == [False] * 7 + [True]


@contextlib.contextmanager
def holder_of_expired_lease(folder: Location) -> Iterator[None]:
    with exclusive(folder, "x", wait=False, stale_after=-1) as held:
        assert held
        yield


def test_a_holder_that_was_taken_over_does_not_release_anothers_lease(bucket: str) -> None:
    folder = Location.of(bucket)
    with contextlib.ExitStack() as second:
        with holder_of_expired_lease(folder):
            assert second.enter_context(exclusive(folder, "x", wait=False))
        assert not is_free(folder)
    assert is_free(folder)


def test_who_looked_long_ago_does_not_take_what_is_held(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Between its look and its put two others come and go or stay, and the number that it makes is removed as old.
    folder, create = Location.of(bucket), Location.create
    with contextlib.ExitStack() as others:
        with holder_of_expired_lease(folder):
            pass

        def late(self: Location, data: bytes) -> bool:
            monkeypatch.setattr(Location, "create", create)
            assert is_free(folder)
            assert others.enter_context(exclusive(folder, "x", wait=False))
            assert self.create(data)  # free again: it was used, and removed as old
            return True

        monkeypatch.setattr(Location, "create", late)
        assert not is_free(folder)
        assert not is_free(folder)
    assert is_free(folder)


def test_old_leases_do_not_pile_up(bucket: str) -> None:
    folder = Location.of(bucket)
    for _ in range(5):
        assert is_free(folder)
    assert len((folder / "locks" / "x").list()) == 1


def test_a_lease_that_somebody_damaged_is_free(bucket: str) -> None:
    folder = Location.of(bucket)
    for data in (b"", b"{}", b"[1]", b'{"holder": "a", "expires": "soon"}'):
        number = locks._numbers(folder / "locks" / "x")[-1:] or [0]
        (folder / "locks" / "x" / f"{number[0]}.json").write(data)
        assert is_free(folder)


def test_a_lease_whose_answer_was_lost_is_held(
    bucket: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.use(monkeypatch, connect_timeout=5, read_timeout=5, retries={"total_max_attempts": 1})
    faulty.methods, faulty.faults = ("PUT",), [Fault("lose"), Fault("lose"), Fault("lose")]
    with exclusive(Location.of(bucket), "x", wait=False) as held:
        assert held
    assert faulty.faults == []


def test_an_unwritable_store_is_an_error_and_not_a_wait(
    bucket: str, tmp_path: Path, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.use(monkeypatch)
    faulty.methods, faulty.always = ("PUT",), Fault("status", 403, "AccessDenied")
    (tmp_path / "file").write_bytes(b"")
    for folder in (Location.of(bucket), Location.of(tmp_path / "file")):
        with pytest.raises(ResourceError, match=f"{folder}/locks"), exclusive(folder, "x"):
            pass

    def refuse(*_: object) -> int:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(ResourceError, match=r"Read-only file system\n  remedy: mount it for writing"),
        exclusive(Location.of("/"), "x"),
    ):
        pass


def test_a_name_is_a_name(tmp_path: Path) -> None:
    for name in ("", "a/b", "..", ".hidden", "a b"):
        with pytest.raises(ValueError, match="cannot be the name of a lock"), exclusive(Location.of(tmp_path), name):
            pass
