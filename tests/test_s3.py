"""On object storage nothing is half there, the first of many writers wins, and failures are survived or explained."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from s3_server import Fault, FaultyProxy
from s3_server import bucket as bucket
from s3_server import faulty as faulty
from s3_server import s3 as s3
from store_worker import LAYERS, MODEL, capture, expected, make_rows, new_store, request
from zarr.storage import FsspecStore

from store import remote
from store.activations import ActivationStore
from store.errors import ResourceError
from store.location import Location
from store.readers import ZarrReader

# Settings of botocore, without its own pauses between attempts: what is tested is what goes on after it gave up.
PATIENT = {"connect_timeout": 5, "read_timeout": 5, "retries": {"total_max_attempts": 1}}
QUICK = {"connect_timeout": 0.2, "read_timeout": 0.2, "retries": {"total_max_attempts": 1}}
EVERY_OPERATION: dict[str, Callable[[Location], object]] = {
    "exists": lambda place: (place / "a").exists(),
    "size": lambda place: (place / "a").size(),
    "read_bytes": lambda place: (place / "a").read_bytes(),
    "read_range": lambda place: (place / "a").read_range(2, 4),
    "tail": lambda place: (place / "a").tail(3),
    "read_many": lambda place: place.read_many(["a", "b"]),
    "list": Location.list,
    "walk": lambda place: [file.name for file in place.walk()],
    "write": lambda place: (place / "new").write(b"data"),
    "create": lambda place: (place / "newer").create(b"data"),
    "remove": lambda place: (place / "none").remove(),
}


@pytest.fixture
def place(bucket: str) -> Location:
    """A folder with two files."""
    place = Location.of(bucket) / "store"
    (place / "a").write(b"0123456789")
    (place / "b").write(b"abc")
    return place


def in_process(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


# -- many processes ----------------------------------------------------------------------------------------------


def test_of_many_processes_exactly_one_creates(bucket: str) -> None:
    code = """
import sys
from store.location import Location
me = sys.argv[2].encode() * 1000
(Location.of(sys.argv[1]) / "warm").exists()
for line in sys.stdin:
    print("ready" if line == "ready\\n" else (Location.of(sys.argv[1]) / line.strip()).create(me), flush=True)
"""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, bucket, str(me)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for me in range(8)
    ]

    def say(line: str) -> list[str]:
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(line + "\n")
            racer.stdin.flush()
        return [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]

    try:
        assert say("ready") == ["ready"] * 8
        for turn in range(10):
            answers = say(f"commits/{turn}.json")
            assert sorted(answers) == ["False"] * 7 + ["True"]
            winner = str(answers.index("True"))
            assert (Location.of(bucket) / "commits" / f"{turn}.json").read_bytes() == winner.encode() * 1000
    finally:
        for racer in racers:
            racer.communicate()


def test_what_another_process_commits_and_removes_is_seen_at_once(place: Location) -> None:
    def names() -> tuple[list[str], list[str], bool]:
        return place.list(), sorted(file.name for file in place.walk()), (place / "c").exists()

    assert names() == (["a", "b"], ["a", "b"], False)
    code = "import sys; from store.location import Location; (Location.of(sys.argv[1]) / 'c')."
    in_process(f"{code}create(b'')", str(place))
    assert names() == (["a", "b", "c"], ["a", "b", "c"], True)
    in_process(f"{code}remove()", str(place))
    assert names() == (["a", "b"], ["a", "b"], False)


def test_a_fork_opens_its_own_connections(place: Location) -> None:
    # What a forked process inherits is a connection whose thread is not there: it would wait for ever.
    code = """
import os, sys
from store.location import Location
place = Location.of(sys.argv[1])
assert place.list() == ["a", "b"]
child = os.fork()
if child == 0:
    os._exit(int(place.list() != ["a", "b"]))
sys.exit(os.waitpid(child, 0)[1])
"""
    in_process(code, str(place))


def test_a_folder_of_more_names_than_one_answer_holds_is_listed_whole(bucket: str) -> None:
    place = Location.of(bucket) / "commits"
    names = [f"{i}.json" for i in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: (place / name).write(b"x"), names))
    assert place.list() == sorted(names)
    assert sorted(file.name for file in place.walk()) == sorted(names)
    assert place.read_many(names) == dict.fromkeys(names, b"x")


def test_objects_that_stand_for_folders_are_no_files(place: Location) -> None:
    filesystem, path = remote.connect(str(place))
    for folder in (f"{path}/", f"{path}/empty/"):
        filesystem.call_s3("put_object", Bucket=path.split("/")[0], Key=folder.split("/", 1)[1], Body=b"")
    assert place.list() == ["a", "b", "empty"]
    assert (place / "empty").list() == []
    assert sorted(file.name for file in place.walk()) == ["a", "b"]
    assert (place / "a").list() == []
    for folder in (place, place / "empty"):
        with pytest.raises(FileNotFoundError):
            folder.size()


def test_zarr_opens_the_same_url(place: Location) -> None:
    store = FsspecStore.from_url(f"{place}/group", storage_options=place.storage_options)
    written = zarr.create_array(store, name="x", shape=(5, 3), chunks=(2, 3), dtype="float32")
    values = np.arange(15, dtype=np.float32).reshape(5, 3)
    written[:] = values
    assert {"x/zarr.json", "x/c/0/0", "x/c/2/0"} <= {file.name for file in (place / "group").walk()}
    again = zarr.open_array(FsspecStore.from_url(f"{place}/group", read_only=True), path="x", mode="r")
    np.testing.assert_array_equal(again[:], values)


# -- short failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_a_short_failure_is_survived(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = EVERY_OPERATION[name](place)
    for new in ("new", "newer"):
        (place / new).remove()
    faulty.use(monkeypatch, **PATIENT)
    faulty.faults = [Fault("status", 503, "SlowDown"), Fault("status", 500, "InternalError"), Fault("drop")]
    assert EVERY_OPERATION[name](place) == expected
    assert faulty.faults == []


def test_a_server_that_is_busy_for_a_few_answers_is_survived_with_the_default_settings(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.use(monkeypatch)
    faulty.faults = [Fault("status", 503), Fault("status", 503), Fault("status", 500, "InternalError")]
    assert (place / "new").create(b"data")
    assert (place / "new").read_bytes() == b"data"
    assert faulty.faults == []


def test_an_answer_that_comes_too_late_is_asked_for_again(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.use(monkeypatch, **{**PATIENT, "read_timeout": 1})
    faulty.faults = [Fault("hang")]
    assert (place / "a").read_bytes() == b"0123456789"
    assert faulty.faults == []


def test_an_answer_that_is_cut_is_asked_for_again_and_never_taken(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = [
        ("a", lambda: (place / "a").read_bytes(), b"0123456789"),
        ("a", lambda: (place / "a").tail(8), b"23456789"),
    ]
    reads.append(("b", lambda: place.read_many(["a", "b"])["b"], b"abc"))
    faulty.methods = ("GET",)
    for path, read, whole in reads:
        faulty.path = f"store/{path}"
        faulty.use(monkeypatch, **PATIENT)
        faulty.faults, faulty.always = [Fault("cut_answer")] * 2, None
        assert read() == whole
        faulty.use(monkeypatch, **QUICK)
        faulty.always = Fault("cut_answer")
        with pytest.raises(ResourceError, match=f"{place}/{path}: reading it failed"):
            read()


# -- puts whose request or answer is lost --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["write", "create"])
def test_a_put_that_is_cut_never_leaves_a_half_object(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    data = os.urandom(300_000)
    faulty.use(monkeypatch, **QUICK)
    faulty.always = Fault("cut_request")
    with pytest.raises(ResourceError, match=f"{place}/new: writing it failed"):
        getattr(place / "new", method)(data)
    faulty.always = None
    faulty.use(monkeypatch, **PATIENT)
    assert place.list() == ["a", "b"]
    faulty.faults = [Fault("cut_request"), Fault("cut_request")]
    getattr(place / "new", method)(data)
    assert (place / "new").read_bytes() == data


@pytest.mark.parametrize("lost", [1, 3])
def test_a_create_whose_answer_was_lost_knows_its_own_object(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    faulty.use(monkeypatch, **PATIENT)
    faulty.faults = [Fault("lose")] * lost
    assert (place / "new").create(b"mine")
    assert faulty.faults == []
    assert len([seen for seen in faulty.seen if seen.startswith("PUT")]) > lost
    assert (place / "new").read_bytes() == b"mine"
    # The same bytes of another writer are another object: one of them wins, whatever is lost.
    faulty.faults = [Fault("lose")] * lost
    assert not (place / "new").create(b"mine")
    faulty.faults = [Fault("lose")] * lost
    (place / "new").write(b"replaced")
    assert (place / "new").read_bytes() == b"replaced"


def test_a_create_that_meets_another_one_under_way_is_tried_again(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.use(monkeypatch, **PATIENT)
    faulty.faults = [Fault("status", 409, "ConditionalRequestConflict")]
    assert (place / "new").create(b"mine")
    faulty.faults = [Fault("status", 409, "ConditionalRequestConflict")]
    assert not (place / "new").create(b"other")
    assert (place / "new").read_bytes() == b"mine"


def test_a_refusal_without_details_is_a_lost_race(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some servers do not say which condition failed.
    faulty.use(monkeypatch, **PATIENT)
    faulty.faults = [Fault("status", 412, "PreconditionFailed")]
    faulty.methods = ("PUT",)
    assert not (place / "a").create(b"other")
    assert faulty.faults == []


def test_an_object_of_several_parts_is_put_as_one(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"0123456789abcdef" * (100 * 2**16)  # 100 MiB: from here on s3fs uploads in parts
    faulty.use(monkeypatch, connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 2})
    # The upload is completed and the answer lost; when asked again the server knows no such upload any more.
    faulty.methods, faulty.path = ("POST",), "uploadId"
    faulty.faults = [Fault("lose"), Fault("status", 404, "NoSuchUpload")]
    assert (place / "large").create(data)
    assert faulty.faults == []
    assert (place / "large").size() == len(data)
    assert (place / "large").read_range(50 * 2**20 - 8, 16) == data[:16][8:] + data[:16][:8]
    assert not (place / "large").create(data)
    faulty.faults = [Fault("lose"), Fault("status", 404, "NoSuchUpload")]
    (place / "large").write(data[1:])
    assert (place / "large").size() == len(data) - 1


# -- failures that last --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_OPERATION)
@pytest.mark.parametrize(
    ("fault", "reason", "remedy"),
    [
        (Fault("status", 503), "Service ?Unavailable|timeout|too long", "check that the endpoint"),
        (Fault("status", 403, "AccessDenied"), "AccessDenied|Forbidden", "check the credentials"),
        (Fault("drop"), "Connection was closed|timeout|too long", "check that the endpoint"),
    ],
    ids=["busy", "denied", "drop"],
)
def test_a_failure_that_lasts_is_an_error_with_a_remedy(
    place: Location,
    faulty: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: Fault,
    reason: str,
    remedy: str,
) -> None:
    # An upload of a few bytes has 0.4 s under QUICK: a pause of the garbage collector that is longer ends it before the
    # server's failure is seen, which is "too long".
    faulty.use(monkeypatch, **(PATIENT if fault.status == 403 else QUICK))
    faulty.always = fault
    with pytest.raises(ResourceError, match=f"^{place}.* it (up )?failed: .*({reason}).*\n  remedy: {remedy}"):
        EVERY_OPERATION[name](place)


def test_an_endpoint_that_never_answers_is_an_error_after_few_requests(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # s3fs by itself repeats up to 25 times what botocore tries.
    faulty.use(monkeypatch, **QUICK)
    faulty.always = Fault("hang")
    for operation in (Location.list, lambda place: (place / "a").read_bytes(), lambda place: (place / "a").create(b"")):
        faulty.seen.clear()
        with pytest.raises(ResourceError, match="timeout"):
            operation(place)
        assert 1 <= len(faulty.seen) <= 10


def test_zarrs_reading_is_as_patient_as_ours(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Used to happen: zarr-python's connections had s3fs's own retries, five times what botocore tries.
    capture(new_store(str(place)), request(make_rows(4)))
    (generation,) = ActivationStore.open(place).model(MODEL).generations()
    truth = expected(generation.rows, "resid_post", range(LAYERS), "prompt_end", "float32")
    faulty.use(monkeypatch, **QUICK)
    faulty.path = "/c/0/"  # the shard
    model = ActivationStore.open(place).model(MODEL)
    (generation,) = model.generations()
    assert isinstance(generation.reader, ZarrReader)
    for fault in (Fault("hang"), Fault("cut_answer")):
        with generation.open_block("resid_post", 0) as opened:
            faulty.always = fault
            faulty.seen.clear()
            begun = time.monotonic()
            with pytest.raises(ResourceError, match=r"s3://.*(.|\n)*remedy: "):
                opened.read([0])
            # Two and a half read timeouts: three requests. Answers that are cut come at once: of these there are more.
            assert len(faulty.seen) <= 4 or fault.kind == "cut_answer"
            assert time.monotonic() - begun < 60
            faulty.always = None
            # A failure that passes is survived.
            faulty.faults = [fault]
            np.testing.assert_array_equal(opened.read([3])[0, :4, 0], truth[:, 3])
            assert faulty.faults == []


def test_a_server_that_is_not_there_is_an_error_with_a_remedy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        FaultyProxy("", url=f"http://127.0.0.1:{taken.getsockname()[1]}").use(monkeypatch, **QUICK)
        with pytest.raises(ResourceError, match=r"Could not connect(.|\n)*AWS_ENDPOINT_URL"):
            (Location.of(bucket) / "a").read_bytes()


def test_a_missing_bucket_is_not_a_missing_file(s3: str) -> None:
    place = Location.of("s3://no-such-bucket/store")
    for name, operation in EVERY_OPERATION.items():
        with pytest.raises(ResourceError, match=r"bucket does not exist .*\n  remedy: create the bucket"):
            operation(place)
        assert name


def test_missing_credentials_are_an_error_with_a_remedy(place: Location) -> None:
    code = """
import os, sys
for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    del os.environ[name]
from store.errors import ResourceError
from store.location import Location
for operation in (Location.list, Location.read_bytes):
    try:
        operation(Location.of(sys.argv[1]))
    except ResourceError as error:
        print(error)
"""
    assert in_process(code, str(place)).stdout.count("remedy: check the credentials") == 2


def test_a_place_that_cannot_be_written_is_found_out(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.use(monkeypatch, **PATIENT)
    place.require_writable()
    assert sorted(file.name for file in place.walk()) == ["a", "b"]
    faulty.methods = ("PUT",)
    faulty.always = Fault("status", 403, "AccessDenied")
    with pytest.raises(ResourceError, match=f"{place}/.*AccessDenied(.|\n)*check the credentials"):
        place.require_writable()


def test_a_server_that_ignores_the_condition_is_found_out(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.use(monkeypatch, **PATIENT)
    faulty.always = Fault("no_condition")
    with pytest.raises(ResourceError, match="If-None-Match"):
        place.require_writable()
    assert sorted(file.name for file in place.walk()) == ["a", "b"]


def test_every_writer_finds_out_before_it_works_and_only_once(
    place: Location, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.use(monkeypatch, **PATIENT)
    monkeypatch.setattr("store.location._PROVED", set())
    probes: list[str] = []
    require = Location.require_writable
    monkeypatch.setattr(Location, "require_writable", lambda self: (probes.append(self.url), require(self))[1])
    manifest = {"fingerprint": "f" * 64, "dtype": "float32", "n_layers": 2, "d_model": 4}
    faulty.always = Fault("no_condition")
    with pytest.raises(ResourceError, match="If-None-Match"):
        ActivationStore(place / "store").add_model(manifest)
    assert not list((place / "store").walk())
    faulty.always = None
    for _ in range(2):
        ActivationStore(place / "store").add_model(manifest)
    assert probes == [(place / "store").url] * 2  # once refused, once proved


# -- settings ------------------------------------------------------------------------------------------------------


def test_waiting_is_bounded_unless_the_user_says_otherwise(bucket: str) -> None:
    code = """
import sys
from store import remote
filesystem, _ = remote.connect(sys.argv[1])
print(filesystem.retries, filesystem._prepare_config_kwargs())
"""
    bounded = {"connect_timeout": 5, "read_timeout": 12, "max_pool_connections": 32}
    assert in_process(code, bucket).stdout == f"1 {bounded}\n"
    mine = in_process(code, bucket, FSSPEC_S3='{"config_kwargs": {"read_timeout": 300}}').stdout
    assert mine == f"1 { ({**bounded, 'read_timeout': 300}) }\n"


def test_an_upload_that_stalls_ends(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read timeouts count from the end of the upload: this one would go on until the kernel gives up.
    with socket.create_server(("127.0.0.1", 0)) as server:  # connects, takes what fits its buffers, and reads nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        FaultyProxy("", url=url).use(monkeypatch, **{**QUICK, "read_timeout": 0.02})
        with pytest.raises(ResourceError, match="writing it failed"):
            (place / "new").write(bytes(30 * 2**20))
