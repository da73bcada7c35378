"""A store on S3 under errors, timeouts, cut connections and kills: an error with a remedy, or what it is locally."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from failure_table import Tally
from failure_table import tally as tally
from s3_server import Fault, FaultyProxy
from s3_server import bucket as bucket
from s3_server import faulty as faulty
from s3_server import s3 as s3
from store_forks import Forks
from store_forks import forks as forks
from store_worker import LAYERS, MODEL, capture, expected, files, make_rows, make_texts, new_store, request, write

from store.activations import ActivationStore, BlockRef, CaptureRequest, ModelStore
from store.errors import DamageError, MissingDataError, ResourceError
from store.layout import Compression
from store.location import Location
from store.readers import ZarrReader
from store.sites import ALL_TOKENS

COMPONENTS = ("resid_post", "mlp_out")
ROWS = make_rows(6)
ASKED = request(ROWS, COMPONENTS)
CAPTURES: dict[str, tuple[CaptureRequest, Compression]] = {
    "float32": (ASKED, "none"),
    "zstd": (ASKED, "zstd"),
    "all_tokens": (request(make_texts(6), COMPONENTS, positions=[ALL_TOKENS]), "none"),
}
# Of botocore: failures that last end soon.
QUICK = {"connect_timeout": 2, "read_timeout": 2, "retries": {"total_max_attempts": 2}}
IMPATIENT = {"connect_timeout": 0.3, "read_timeout": 0.3, "retries": {"total_max_attempts": 1}}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pauses between two attempts, which are random, be short."""
    monkeypatch.setattr(random, "random", lambda: 0.01)


def objects(store: Location) -> dict[str, bytes]:
    """Return what a store on S3 holds, without leases."""
    names = [found.name for found in store.walk() if "locks" not in found.name.split("/")]
    return store.read_many(names)


@pytest.fixture
def local(tmp_path: Path) -> Callable[[str], dict[str, bytes]]:
    """Return the files of a local store with the same content."""

    def made(name: str) -> dict[str, bytes]:
        asked, compression = CAPTURES[name]
        capture(new_store(str(tmp_path / name)), asked, block_rows=2, compression=compression)
        return files(tmp_path / name)

    return made


def read(model: ModelStore) -> np.ndarray:
    selection = model.select([row.key for row in ROWS], "mlp_out", "prompt_end")
    assert all(isinstance(part.generation.reader, ZarrReader) for part in selection.parts)
    return selection.to_numpy()


TRUTH = expected(ROWS, "mlp_out", range(LAYERS), "prompt_end", "float32")


# -- one operation at a time ---------------------------------------------------------------------------------------


def check_begin(url: str) -> None:
    _, blocks = new_store(url).assign([ASKED], block_rows=2)
    assert len(blocks) == 2


def check_write(url: str) -> None:
    model = ActivationStore.open(url).model(MODEL)
    (generation,) = model.generations()
    write(model, BlockRef(generation.id, 2, 2))
    assert generation.commit_record(2).block == 2
    generation.verify_block(2)


def check_read(url: str) -> None:
    model = ActivationStore.open(url).model(MODEL)
    keys = [row.key for row in ROWS]
    held = model.committed_rows("mlp_out", "prompt_end")
    assert len(held) >= 4
    found = model.select(held, "mlp_out", "prompt_end").to_numpy()
    np.testing.assert_array_equal(found, TRUTH[[keys.index(key) for key in held]])


def check_list(url: str) -> None:
    (model,) = ActivationStore.open(url).models()
    (generation,) = model.generations()
    assert generation.committed() >= {0, 1}


def check_verify(url: str) -> None:
    (model,) = ActivationStore.open(url).models()
    assert model.verify() == []


OPERATIONS = {"write": check_write, "read": check_read, "list": check_list, "verify": check_verify}
SHORT = {
    "503": Fault("status", 503, "SlowDown"),
    "500": Fault("status", 500, "InternalError"),
    "drop": Fault("drop"),
    "lose": Fault("lose"),
    "cut_answer": Fault("cut_answer"),
    "cut_request": Fault("cut_request"),
}
LASTING = {
    "403": Fault("status", 403, "AccessDenied"),
    "404 bucket": Fault("status", 404, "NoSuchBucket"),
    "503": Fault("status", 503, "SlowDown"),
    "drop": Fault("drop"),
    "hang": Fault("hang"),
}


@pytest.fixture
def url(bucket: str) -> str:
    """A store of six rows in blocks of two, of which the last one waits."""
    model = new_store(f"{bucket}/store")
    for block in model.create(model.work([ASKED], block_rows=2))[:2]:
        assert write(model, block)
    return f"{bucket}/store"


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failure_at_any_request_is_survived_or_an_error_with_a_remedy(
    url: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tally: Tally, name: str
) -> None:
    operation = OPERATIONS[name]
    faulty.use(monkeypatch, **QUICK)
    waiting = ActivationStore.open(url).model(MODEL).generations()[0]

    def count() -> int:
        waiting.uncommit(2)
        faulty.seen.clear()
        operation(url)
        return len(faulty.seen)

    count()  # opens the connections
    survived = 0
    for fault in SHORT.values():
        for i in range(3):
            for _ in range(5):
                # Requests go out side by side, and some are repeated: their number differs from one time to the next.
                n_requests = count()
                waiting.uncommit(2)
                # Before it, requests that nothing happens to.
                faulty.faults = [*[None] * (i * (n_requests - 1) // 2), fault]  # type: ignore[list-item]
                try:
                    operation(url)
                    outcome = 1
                except ResourceError as error:
                    assert "remedy" in str(error)  # noqa: PT017
                    outcome = 0
                happened, faulty.faults = not faulty.faults, []
                if happened:
                    break
            assert happened
            survived += outcome
            if not outcome:
                operation(url)
            tally.add()
    assert survived >= tally.count * 2 // 3
    operation(url)


@pytest.mark.parametrize("fault", LASTING)
@pytest.mark.parametrize("name", [*OPERATIONS, "begin"])
def test_a_failure_that_lasts_is_an_error_with_a_remedy(
    url: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    operation = {**OPERATIONS, "begin": check_begin}[name]
    faulty.always = LASTING[fault]
    with monkeypatch.context() as patch:
        faulty.use(patch, **IMPATIENT)
        with pytest.raises(ResourceError, match=r"s3://.*(.|\n)*remedy: "):
            operation(url)
    operation(url) if name != "begin" else capture(new_store(url), ASKED)
    (model,) = ActivationStore.open(url).models()
    assert model.verify() == []


# -- whole captures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAPTURES)
def test_a_capture_over_a_bad_network_ends_as_the_local_one(
    bucket: str,
    faulty: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
    local: Callable[[str], dict[str, bytes]],
    name: str,
) -> None:
    asked, compression = CAPTURES[name]
    place = Location.of(f"{bucket}/store")
    rng = random.Random(name)
    # Of four requests, one fails.
    plan = [rng.choice(list(SHORT.values())) if rng.randrange(4) == 0 else None for _ in range(400)]
    with monkeypatch.context() as patch:
        faulty.use(patch, **QUICK)
        faulty.faults = list(plan)  # type: ignore[arg-type]
        for _ in range(50):
            try:
                model = new_store(str(place))
                for block in model.create(model.work([asked], 2, compression)):
                    write(model, block)
                break
            except ResourceError as error:
                assert "remedy" in str(error)  # noqa: PT017
    assert len(faulty.faults) < len(plan) - 20
    assert objects(place) == local(name)
    assert ActivationStore.open(str(place)).model(MODEL).verify() == []


@dataclass
class StoppingProxy(FaultyProxy):
    """Answers no put from the n-th on, and tells when it comes."""

    at: int = 0
    reached: threading.Event = field(default_factory=threading.Event)

    def take(self, method: str, path: str) -> Fault | None:
        super().take(method, path)
        with self.lock:
            puts = sum(each.startswith("PUT") for each in self.seen)
        if method == "PUT" and puts > self.at:
            self.reached.set()
            return Fault("hang")
        return None


@pytest.fixture
def stopping(s3: str) -> Iterator[StoppingProxy]:
    with StoppingProxy(s3).serving() as proxy:
        assert isinstance(proxy, StoppingProxy)
        yield proxy


@pytest.mark.parametrize(("n_puts", "name"), [*((n, "float32") for n in range(7)), (2, "zstd"), (5, "all_tokens")])
def test_a_writer_killed_before_any_put_leaves_what_the_next_one_completes(
    bucket: str, forks: Forks, stopping: StoppingProxy, local: Callable[[str], dict[str, bytes]], n_puts: int, name: str
) -> None:
    # Each block is put as two shards and a commit: 2 and 5 are the moments between shard and commit.
    asked, compression = CAPTURES[name]
    place = Location.of(f"{bucket}/store")
    model = new_store(str(place))
    model.create(model.work([asked], 2, compression))
    stopping.at = n_puts
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    writer = forks.start("write_blocks", {**environment, "AWS_ENDPOINT_URL": stopping.url}, store=str(place))
    writer.say("go")
    assert stopping.reached.wait(60)
    writer.kill()
    assert writer.end()[0] == -9
    (generation,) = model.generations()
    assert generation.committed() == set(range(n_puts // 3))
    shards = sum("/c/" in each and each.split("/")[2] in COMPONENTS for each in objects(place))
    assert shards == 2 * (n_puts // 3) + n_puts % 3
    assert model.verify() == []
    (position,) = asked.positions
    with pytest.raises(MissingDataError):
        model.select([row.key for row in asked.rows], "mlp_out", position)
    for block in model.work([asked]).pending:
        assert write(model, block)
    assert objects(place) == local(name)
    assert model.verify() == []


DAMAGE: dict[str, Callable[[Location], object]] = {
    "missing shard": lambda shard: shard.remove(),
    "empty shard": lambda shard: shard.write(b""),
    "truncated shard": lambda shard: shard.write(shard.read_bytes()[:-1]),
    "flipped bit": lambda shard: shard.write(bytes([shard.read_bytes()[0] ^ 4]) + shard.read_bytes()[1:]),
    "shard of another block": lambda shard: shard.write(
        Location(shard.url.replace("/c/1/", "/c/0/")).read_bytes(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_block_on_s3_is_an_error_is_found_and_alone_is_made_again(url: str, damage: str) -> None:
    model = new_store(url)
    capture(model, ASKED)
    (generation,) = model.generations()
    DAMAGE[damage](generation.shard("mlp_out", 1))
    with pytest.raises(DamageError, match=r"remedy: resid (store )?verify --store"):
        read(model)
    (finding,) = model.verify(repair=True)
    assert "block 1:" in finding
    assert [block.block for block in capture(model, ASKED)] == [1]
    np.testing.assert_array_equal(read(model), TRUTH)
    assert model.verify() == []
