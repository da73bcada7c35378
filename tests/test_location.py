"""A location behaves alike on disk and on object storage: whole files, and the first of many writers wins."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from s3_server import bucket as bucket
from s3_server import s3 as s3

from store.errors import ResourceError
from store.location import PARTIAL, Location, is_abandoned, is_url, remove_abandoned


@pytest.fixture(params=["disk", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    match request.param:
        case "disk":
            return Location.of(tmp_path / "data")
        case "memory":
            return Location.of(f"memory://{uuid.uuid4().hex}")
        case _:
            return Location.of(request.getfixturevalue("bucket")) / "data"


def test_a_file_is_written_read_listed_and_removed(place: Location) -> None:
    assert place.list() == []
    assert list(place.walk()) == []
    (place / "sub" / "b").write(b"bb")
    (place / "a").write(b"")
    (place / "a").write(b"new")
    assert place.list() == ["a", "sub"]
    assert (place / "sub").list() == ["b"]
    assert ((place / "a").read_bytes(), (place / "a").size()) == (b"new", 3)
    assert (place / "a").exists()
    assert (place / "sub").exists()
    (place / "a").remove()
    (place / "a").remove()
    assert not (place / "a").exists()
    assert place.list() == ["sub"]


def test_a_missing_file_is_not_found(place: Location) -> None:
    for read in (Location.size, Location.read_bytes):
        with pytest.raises(FileNotFoundError):
            read(place / "none")
    assert not place.exists()


def test_a_part_of_a_file_is_a_slice_of_it(place: Location) -> None:
    data = bytes(range(200))
    (place / "a").write(data)
    (place / "empty").write(b"")
    for start in (0, 1, 150, 199, 200, 1000):
        for length in (0, 1, 50, 200, 1000):
            assert (place / "a").read_range(start, length) == data[start : start + length]
    for length in (1, 7, 200, 1000):
        assert (place / "a").tail(length) == data[-length:]
        assert (place / "empty").tail(length) == (place / "empty").read_range(0, length) == b""
    for read in (lambda: (place / "none").tail(9), *(lambda n=n: (place / "none").read_range(0, n) for n in (0, 9))):
        with pytest.raises(FileNotFoundError):
            read()
    for wrong in (lambda: (place / "a").tail(0), lambda: (place / "a").read_range(-1, 3)):
        with pytest.raises(ValueError, match="a: "):
            wrong()


def test_many_files_are_read_as_one_by_one(place: Location) -> None:
    files = {f"{i % 3}/lr=3 [old]*it's {i}": bytes([i]) * i for i in range(40)}
    for name, data in files.items():
        (place / name).write(data)
    assert place.read_many([*files, *files]) == files
    assert place.read_many([]) == {}
    with pytest.raises(FileNotFoundError):
        place.read_many([*files, "none"])


def test_all_files_below_are_found_also_unfinished_ones(place: Location) -> None:
    before = time.time()
    for name, data in (("a", b"1"), ("b/c", b"22"), (f"b/d.x{PARTIAL}", b""), ("b.c", b"333")):
        (place / name).write(data)
    found = {file.name: file for file in place.walk()}
    assert {name: file.size for name, file in found.items()} == {"a": 1, "b/c": 2, f"b/d.x{PARTIAL}": 0, "b.c": 3}
    assert {file.name for file in (place / "b").walk()} == {"c", f"d.x{PARTIAL}"}
    # To the second, on object storage.
    assert all(before - 1 <= file.modified <= time.time() for file in found.values())


def test_what_is_writable_is_found_out_by_writing(place: Location) -> None:
    (place / "new").require_writable()
    assert not (place / "new").exists()


def test_create_never_replaces(place: Location) -> None:
    assert (place / "a").create(b"first")
    assert not (place / "a").create(b"second")
    assert (place / "a").read_bytes() == b"first"
    assert place.list() == ["a"]


def test_of_many_threads_exactly_one_creates(tmp_path: Path) -> None:
    place = Location.of(tmp_path / "commits")
    for turn in range(20):
        target, start, won = place / f"{turn}.json", threading.Barrier(8), []

        def race(me: int, target: Location = target, start: threading.Barrier = start, won: list[int] = won) -> None:
            start.wait()
            if target.create(str(me).encode() * 1000):
                won.append(me)

        threads = [threading.Thread(target=race, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert target.read_bytes() == str(won[0]).encode() * 1000
    assert len(os.listdir(place.path)) == 20  # no temporary file is left


def test_writers_that_replace_leave_one_whole_file(tmp_path: Path) -> None:
    target = Location.of(tmp_path) / "a"
    threads = [threading.Thread(target=target.write, args=(bytes([48 + i]) * 100_000,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(target.read_bytes())) == 1
    assert os.listdir(tmp_path) == ["a"]


def test_a_killed_writer_leaves_no_name_and_its_leftover_is_not_listed(tmp_path: Path) -> None:
    code = """
import os, sys
from store.location import Location
os.link = os.replace = lambda *_: os._exit(9)
getattr(Location.of(sys.argv[1]) / "a", sys.argv[2])(b"x")
"""
    for method in ("write", "create"):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path), method], check=False).returncode == 9
    left = os.listdir(tmp_path)
    assert len(left) == 2
    assert all(name.endswith(PARTIAL) for name in left)
    assert Location.of(tmp_path).list() == []


def partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(PARTIAL)]


def test_a_live_writers_partial_file_is_not_abandoned_and_a_dead_ones_is(tmp_path: Path) -> None:
    code = """
import sys
from store.location import Location
with (Location.of(sys.argv[1]) / "a").writing(first_wins=True) as stream:
    stream.write(b"half")
    print("ready", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        (path,) = partial_files(tmp_path)
        assert not is_abandoned(path)
        assert not remove_abandoned(path)
        assert path.exists()
        writer.kill()
    assert is_abandoned(path)
    assert path.exists()
    assert remove_abandoned(path)
    assert os.listdir(tmp_path) == []
    assert not is_abandoned(path)
    with pytest.raises(ValueError, match="not a partial file"):
        remove_abandoned(tmp_path / "a")


def test_a_writer_that_is_swept_before_it_locks_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, swept = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not swept:
            swept.append(remove_abandoned(partial_files(tmp_path)[0]))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    (Location.of(tmp_path) / "a").write(b"data")
    assert swept == [True]
    assert os.listdir(tmp_path) == ["a"]


def test_a_sweeper_and_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    place, done = Location.of(tmp_path), threading.Event()

    def sweep() -> None:
        while not done.is_set():
            for path in partial_files(tmp_path):
                remove_abandoned(path)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for i in range(300):
            assert (place / str(i)).create(b"data")
    finally:
        done.set()
        sweeper.join()
    assert sorted(os.listdir(tmp_path)) == sorted(str(i) for i in range(300))


def test_a_file_written_in_pieces_appears_whole_at_the_end(tmp_path: Path) -> None:
    target = Location.of(tmp_path / "new") / "a"
    with target.writing(first_wins=True) as first, target.writing(first_wins=True) as second:
        for stream in (first, second):
            stream.write(b"half")
            assert stream.won is None
        second.write(b" and half")
        assert not target.exists()
    assert (first.won, second.won) == (False, True)
    with target.writing(first_wins=False) as third:
        third.write(b"new")
        assert target.read_bytes() == b"half and half"
    assert third.won
    assert target.read_bytes() == b"new"
    assert os.listdir(target.path.parent) == ["a"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_while_writing_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    for first_wins in (True, False):

        def fail(first_wins: bool = first_wins) -> None:
            with (Location.of(tmp_path) / "a").writing(first_wins) as stream:
                stream.write(b"half")
                raise error

        with pytest.raises(error):
            fail()
    assert os.listdir(tmp_path) == []


def test_a_file_that_grows_too_large_is_an_error_with_a_remedy_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource, sys
from store.errors import ResourceError
from store.location import Location
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    getattr(Location.of(sys.argv[1]) / "a", sys.argv[2])(bytes(2000))
except ResourceError as error:
    print(error)
"""
    for method in ("write", "create"):
        answer = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), method], check=True, capture_output=True, text=True
        ).stdout
        assert f"{tmp_path}/a: writing it failed" in answer
        assert "remedy: free some space" in answer
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "mount it for writing"), (errno.EACCES, "get permission")],
)
def test_what_the_disk_refuses_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    place = Location.of(tmp_path) / "a"
    place.write(b"x")
    for module, name in ((os, "fsync"), (io, "FileIO"), (Path, "open"), (Path, "unlink"), (Path, "touch")):
        monkeypatch.setattr(module, name, refuse)
    operations = (Location.read_bytes, Location.remove, Location.require_writable, lambda place: place.tail(3))
    for operation in (*operations, lambda place: place.write(b"y"), lambda place: place.create(b"y")):
        with pytest.raises(ResourceError, match=f"{place}: .* failed: .*{os.strerror(number)}\n  remedy: {remedy}"):
            operation(place)


def test_a_file_in_the_way_of_a_folder_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (Location.of(tmp_path) / "a").write(b"")
    for write in (lambda: (Location.of(tmp_path) / "a" / "b").write(b""), (Location.of(tmp_path) / "a").make_folder):
        with pytest.raises(ResourceError, match="a file is in the way"):
            write()


def test_without_hard_links_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    with pytest.raises(ResourceError, match="makes no hard links"):
        (Location.of(tmp_path) / "a").create(b"x")
    assert os.listdir(tmp_path) == []


def test_a_link_whose_answer_was_lost_is_a_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)  # as the client of a network file system repeats it

    monkeypatch.setattr(os, "link", lost)
    assert (Location.of(tmp_path) / "a").create(b"x")
    assert not (Location.of(tmp_path) / "a").create(b"x")
    assert os.listdir(tmp_path) == ["a"]


def test_an_unknown_scheme_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ResourceError, match=r"s4://bucket/a: .*\n  remedy: correct the URL"):
        Location.of("s4://bucket/a").exists()


def test_a_failed_write_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(os, "link", full)
    for write in (Location.write, Location.create):
        with pytest.raises(ResourceError, match=r"No space left.*\n.*free some space"):
            write(Location.of(tmp_path) / "a", b"x")
    assert os.listdir(tmp_path) == []


def test_equal_text_means_equal_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Location.of(tmp_path / "x")
    assert Location.of("x") == Location.of("x/") == Location.of(f"file://{tmp_path}/x") == here
    assert (Location.of("s3://bucket/x/") / "y").url == "s3://bucket/x/y"
    assert (Location.of("memory://") / "y").url == "memory://y"
    assert (Location.of("/") / "y").path == Path("/y")
    assert (here.name, here.is_local, here.path) == ("x", True, tmp_path / "x")
    assert (is_url("s3://b"), is_url("/a:b"), is_url("a")) == (True, False, False)
    with pytest.raises(ValueError, match="s3://b is not on local disk"):
        _ = Location.of("s3://b").path
