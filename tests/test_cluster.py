"""Blocks on workers that raise, hang and die: every block is done once or named, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from pydantic import ValidationError

from pipeline.cluster import BlockFailure, Cluster, RunReport, require_room, worker_demand
from store.errors import ModelError, ResourceError, StudyError
from store.ray_settings import RaySettings
from tests import cluster_workers as workers
from tests.cluster_workers import FileWorker, NumberBlock, driver_environment, ids, number_blocks
from tests.ray_head import RayHead, ray_head

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(num_cpus=2) as head:
        yield head


@pytest.fixture(scope="module")
def connected(head: RayHead) -> Iterator[str]:
    """The address of the head, with this process connected: clusters of single tests share the connection."""
    settings = RaySettings(address=head.gcs)
    with Cluster(settings) as cluster:
        cluster.map(workers.double, [1])
        yield head.gcs


@pytest.fixture(params=["off", pytest.param("head", marks=pytest.mark.ray)])
def address(request: pytest.FixtureRequest) -> str:
    """Laws that hold in this process and on a cluster alike."""
    return "off" if request.param == "off" else request.getfixturevalue("connected")


def run(address: str, folder: Path, count: int, /, settings: dict[str, Any] | None = None, **kwargs: Any) -> RunReport:
    with Cluster(RaySettings(address=address, **(settings or {}))) as cluster:
        return cluster.run_blocks(FileWorker, {"folder": str(folder), **kwargs}, number_blocks(count))


# Laws of both modes


def test_every_block_is_done_once_and_reported_once(address: str, tmp_path: Path) -> None:
    squares: dict[str, int] = {}

    def note(block: Any, answer: Any) -> None:
        assert block.id not in squares
        squares[block.id] = answer["square"]

    with Cluster(RaySettings(address=address)) as cluster:
        report = cluster.run_blocks(FileWorker, {"folder": str(tmp_path)}, number_blocks(12), on_done=note)
    assert report == RunReport(done=12, failed=(), lost_workers=0)
    assert squares == {block.id: block.number**2 for block in number_blocks(12)}
    assert workers.attempts(tmp_path) == dict.fromkeys(ids(*range(12)), 1)


def test_a_poison_block_is_set_aside_after_its_attempts_and_the_others_are_done(address: str, tmp_path: Path) -> None:
    report = run(address, tmp_path, 6, poison=[2])
    assert report.done == 5
    (failure,) = report.failed
    assert (failure.block_id, failure.attempts) == (*ids(2), 3)
    assert failure.cause.startswith("ValueError: poison in block-002")
    assert "cluster_workers.py" in failure.cause, "the traceback of an unexpected error is kept"
    assert workers.finished(tmp_path) == ids(0, 1, 3, 4, 5)
    assert workers.attempts(tmp_path)["block-002"] == 3


def test_an_error_that_would_come_again_is_not_tried_again(address: str, tmp_path: Path) -> None:
    report = run(address, tmp_path, 4, not_finite=[1])
    assert report.failed == (BlockFailure("block-001", 1, "NonFiniteError: NaN in block-001"),)
    assert workers.attempts(tmp_path) == dict.fromkeys(ids(*range(4)), 1)


def test_a_model_error_in_construction_surfaces_at_once_with_its_type(address: str, tmp_path: Path) -> None:
    with (
        Cluster(RaySettings(address=address, workers=1)) as cluster,
        pytest.raises(ModelError, match=r"^no such architecture$"),
    ):
        cluster.run_blocks(workers.fail_with_model_error, {"folder": str(tmp_path)}, number_blocks(3))
    assert workers.builds(tmp_path) == 1
    assert workers.attempts(tmp_path) == {}


def test_another_error_in_construction_is_raised_after_its_attempts(address: str, tmp_path: Path) -> None:
    with (
        Cluster(RaySettings(address=address, workers=1, max_attempts=2)) as cluster,
        pytest.raises(ValueError, match="cannot be built"),
    ):
        cluster.run_blocks(workers.fail_with_value_error, {"folder": str(tmp_path)}, number_blocks(3))
    assert workers.builds(tmp_path) == 2


def test_an_error_of_the_callback_ends_the_run(address: str, tmp_path: Path) -> None:
    def refuse(block: Any, answer: Any) -> None:
        raise KeyError(block.id)

    with Cluster(RaySettings(address=address)) as cluster, pytest.raises(KeyError, match="block-"):
        cluster.run_blocks(FileWorker, {"folder": str(tmp_path)}, number_blocks(3), on_done=refuse)


def test_blocks_with_one_id_are_refused(tmp_path: Path) -> None:
    with Cluster(RaySettings(address="off")) as cluster, pytest.raises(ValueError, match="1 of 2 blocks"):
        cluster.run_blocks(FileWorker, {"folder": str(tmp_path)}, [NumberBlock(1), NumberBlock(1)])


def test_map_keeps_the_order_of_its_items(address: str) -> None:
    with Cluster(RaySettings(address=address)) as cluster:
        assert cluster.map(workers.double, range(9)) == [2 * number for number in range(9)]


def test_map_raises_the_error_of_its_function_with_its_type_and_fields(address: str) -> None:
    with Cluster(RaySettings(address=address)) as cluster, pytest.raises(StudyError) as caught:
        cluster.map(workers.refuse_seven, range(9))
    assert type(caught.value) is StudyError
    assert (caught.value.file, caught.value.key, caught.value.remedy) == ("s.yaml", "numbers", "leave it out")
    assert str(caught.value) == "s.yaml: numbers: seven is refused\n  remedy: leave it out"


def test_no_work_starts_no_ray_and_importing_the_module_loads_neither_ray_nor_torch(tmp_path: Path) -> None:
    code = """
import sys
from pipeline.cluster import Cluster
from store.ray_settings import RaySettings
with Cluster(RaySettings(address="local")) as cluster:
    assert cluster.run_blocks(dict, {}, []).done == 0
    assert cluster.map(len, []) == []
assert not {"ray", "torch", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)
import ray
assert not ray.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=driver_environment(tmp_path))


# Laws of a cluster


@pytest.mark.ray
def test_all_blocks_are_done_when_workers_are_killed_at_random(connected: str, tmp_path: Path) -> None:
    draw = random.Random(7)
    over = threading.Event()
    killed: list[int] = []

    def kill_now_and_then() -> None:
        while len(killed) < 4 and not over.wait(0.6):
            # Names end in .1 (a process is built once), and dead processes keep theirs.
            pids = {int(path.stem) for path in (tmp_path / "builds").glob("*")} - set(killed)
            if pids:
                victim = draw.choice(sorted(pids))
                with contextlib.suppress(ProcessLookupError):  # the run has just ended
                    os.kill(victim, signal.SIGKILL)
                    killed.append(victim)

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        report = run(connected, tmp_path, 40, seconds=0.1, settings={"max_attempts": 5})
    finally:
        over.set()
        killer.join()
    assert (report.done, report.failed) == (40, ())
    assert workers.finished(tmp_path) == ids(*range(40))
    assert 0 < report.lost_workers <= len(killed)
    # A loss costs the block that was being done, and one whose answer died with the worker; nothing answered before.
    assert sum(workers.attempts(tmp_path).values()) <= 40 + 2 * len(killed)


@pytest.mark.ray
def test_a_block_that_kills_its_worker_costs_no_other_block_an_attempt(connected: str, tmp_path: Path) -> None:
    report = run(connected, tmp_path, 10, kill_always=[3], settings={"workers": 1, "max_attempts": 2})
    assert report.done == 9
    assert [(failure.block_id, failure.attempts) for failure in report.failed] == [("block-003", 2)]
    assert "worker died" in report.failed[0].cause
    assert report.lost_workers == 2
    assert workers.attempts(tmp_path) == {name: 2 if name == "block-003" else 1 for name in ids(*range(10))}


@pytest.mark.ray
def test_a_hanging_worker_is_killed_at_its_deadline_and_its_block_done_by_another(
    connected: str, tmp_path: Path
) -> None:
    report = run(connected, tmp_path, 5, hang_first=[1], settings={"block_timeout": 2.0})
    assert report == RunReport(done=5, failed=(), lost_workers=1)
    assert workers.attempts(tmp_path)["block-001"] == 2


@pytest.mark.ray
def test_a_device_fault_replaces_its_worker(connected: str, tmp_path: Path) -> None:
    report = run(connected, tmp_path, 3, fault_first=[0], settings={"workers": 1})
    assert report == RunReport(done=3, failed=(), lost_workers=1)
    assert workers.builds(tmp_path) == 2


@pytest.mark.ray
def test_a_worker_that_dies_while_it_is_built_is_not_built_for_ever(connected: str, tmp_path: Path) -> None:
    with (
        Cluster(RaySettings(address=connected, workers=1, max_attempts=2)) as cluster,
        pytest.raises(ResourceError, match="lost while it was built"),
    ):
        cluster.run_blocks(workers.die_while_built, {"folder": str(tmp_path)}, number_blocks(2))
    assert workers.builds(tmp_path) == 2


@pytest.mark.ray
def test_map_repeats_a_task_whose_process_died(connected: str, tmp_path: Path) -> None:
    with Cluster(RaySettings(address=connected)) as cluster:
        assert cluster.map(workers.die_on_first_call, [str(tmp_path)]) == [str(tmp_path)]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.ray
def test_map_gives_up_on_a_task_that_always_kills_its_process(connected: str) -> None:
    with (
        Cluster(RaySettings(address=connected, max_attempts=2)) as cluster,
        pytest.raises(ResourceError, match="item 0: its process died on each of 2 attempts"),
    ):
        cluster.map(workers.always_die, [0])


@pytest.mark.ray
def test_an_error_that_does_not_pickle_arrives_with_its_text(connected: str) -> None:
    with Cluster(RaySettings(address=connected)) as cluster, pytest.raises(RuntimeError, match="this and that"):
        cluster.map(workers.raise_unpicklable, [0])


@pytest.mark.ray
def test_workers_see_threads_caches_keys_and_the_studys_variables(
    connected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RESID_CACHE", "/some/where")
    monkeypatch.setenv("AWS_TEST_KEY", "key")
    monkeypatch.setenv("UNRELATED", "stays here")
    seen: list[dict[str, str]] = []
    settings = RaySettings(
        address=connected, cpus_per_worker=2, env_vars={"RESID_TEST_STUDY": "yes", "RESID_CACHE": "/else/where"}
    )
    with Cluster(settings) as cluster:
        cluster.run_blocks(
            workers.EnvironmentWorker, {}, number_blocks(1), on_done=lambda _, answer: seen.append(answer)
        )
    assert seen == [
        {
            "OMP_NUM_THREADS": "2",
            "HF_HUB_OFFLINE": "1",
            "RESID_CACHE": "/else/where",
            "RESID_TEST_STUDY": "yes",
            "AWS_TEST_KEY": "key",
            "UNRELATED": None,
        }
    ]


@pytest.mark.ray
def test_workers_that_fit_on_no_node_are_an_error_that_says_what_there_is(connected: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"a worker needs 64 CPU on one node(.|\n)*nodes: 2 CPU, 0 GPU"):
        run(connected, tmp_path, 1, settings={"cpus_per_worker": 64})
    with Cluster(RaySettings(address=connected)) as cluster, pytest.raises(ResourceError, match="a task needs 64 CPU"):
        cluster.map(workers.double, [1], num_cpus=64)


@pytest.mark.ray
def test_no_actor_outlives_its_run(connected: str, head: RayHead, tmp_path: Path) -> None:
    run(connected, tmp_path, 4)
    pids = [int(path.stem) for path in (tmp_path / "builds").glob("*")]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert pids
    assert not alive


# Settings, and the cluster file


def test_gpus_are_asked_for_only_where_the_cluster_has_them() -> None:
    settings = RaySettings(gpus_per_worker=2)
    without = [{"Alive": True, "Resources": {"CPU": 8.0}}]
    gone = [*without, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 4.0}}]
    with_gpus = [*without, {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}]
    assert worker_demand(settings, without) == worker_demand(settings, gone) == {"CPU": 1}
    assert worker_demand(settings, with_gpus) == {"CPU": 1, "GPU": 2}
    assert worker_demand(RaySettings(gpus_per_worker=0), with_gpus) == {"CPU": 1}


def test_room_is_counted_node_by_node() -> None:
    two = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}} for _ in range(2)]
    assert require_room(two, {"CPU": 3}, "a worker needs", "") == 4
    assert require_room(two, {"CPU": 1, "GPU": 0.1}, "a worker needs", "") == 16
    assert require_room([{"Alive": True, "Resources": {"CPU": 0.3}}], {"CPU": 0.1}, "a worker needs", "") == 3
    with pytest.raises(ResourceError, match=r"1 CPU and 2 GPU on one node(.|\n)*8 CPU, 1 GPU; 8 CPU, 1 GPU"):
        require_room(two, {"CPU": 1, "GPU": 2}, "a worker needs", "")


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": ""},
        {"address": "http://127.0.0.1:8265"},
        {"workers": 0},
        {"workers": True},
        {"workers": "many"},
        {"cpus_per_worker": 0},
        {"cpus_per_worker": 1.5},
        {"gpus_per_worker": 1.5},
        {"gpus_per_worker": -1},
        {"gpus_per_worker": "1"},
        {"block_timeout": 0},
        {"block_timeout": float("inf")},
        {"max_attempts": 0},
        {"env_vars": {"THREADS": 4}},
        {"worker": 2},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RaySettings(**wrong)


def test_rays_own_check_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(config))
    assert {"head_node", "worker_nodes"}.isdisjoint(config), "Ray ignores these without a word"
    assert config["available_node_types"]["gpu"]["max_workers"] >= config["available_node_types"]["gpu"]["min_workers"]


def test_the_cluster_file_runs_the_ray_that_was_tested() -> None:
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    version = next(
        line.partition("==")[2]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("ray==")
    )
    images = [config["docker"]["image"], config["available_node_types"]["gpu"]["docker"]["worker_image"]]
    assert all(f":{version}-py311-" in image for image in images), images
