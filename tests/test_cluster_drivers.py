"""Drivers in processes of their own: killed, interrupted and pointed at other clusters, they leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.cluster import Cluster, RunReport
from store.ray_settings import RaySettings
from tests import cluster_workers as workers
from tests.cluster_workers import FileWorker, driver_environment, ids, number_blocks
from tests.ray_head import RayHead, ray_head


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(num_cpus=2) as head:
        yield head


DRIVER = """
import sys
from pipeline.cluster import Cluster
from store.ray_settings import RaySettings
from tests.cluster_workers import FileWorker, finished, number_blocks
from pathlib import Path
folder = sys.argv[1]
missing = [block for block in number_blocks(16) if block.id not in finished(Path(folder))]
with Cluster(RaySettings(address=sys.argv[2])) as cluster:
    report = cluster.run_blocks(FileWorker, {"folder": folder, "seconds": 0.3}, missing)
print("done", report.done, "of", len(missing))
"""


def _start_driver(folder: Path, address: str, temporary: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), address],
        env=driver_environment(temporary),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _session_of(leader: int) -> list[int]:
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == leader and pid != leader:
                found.append(pid)
        except ProcessLookupError:
            continue
    return found


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets need a short path, shorter than tmp_path may be."""
    folder = Path(tempfile.mkdtemp(prefix="", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
def test_a_driver_killed_half_way_leaves_no_ray_and_its_rerun_does_exactly_what_is_missing(
    head: RayHead, tmp_path: Path, short_folder: Path
) -> None:
    with _start_driver(tmp_path, "local", short_folder) as driver:
        _wait_until(lambda: len(workers.finished(tmp_path)) >= 4)
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
    _wait_until(lambda: not _session_of(driver.pid), seconds=15)
    _wait_until(lambda: not list(short_folder.glob("resid-ray-*")), seconds=15)
    before = workers.finished(tmp_path)
    begun = workers.attempts(tmp_path)
    assert 4 <= len(before) < 16

    missing = [block for block in number_blocks(16) if block.id not in before]
    with Cluster(RaySettings(address=head.gcs)) as cluster:
        report = cluster.run_blocks(FileWorker, {"folder": str(tmp_path)}, missing)
    assert report == RunReport(done=16 - len(before), failed=(), lost_workers=0)
    assert workers.finished(tmp_path) == ids(*range(16))
    for name in before:
        assert workers.attempts(tmp_path)[name] == begun[name], f"{name} was done already"


@pytest.mark.ray
def test_an_interrupted_driver_takes_its_ray_with_it(tmp_path: Path, short_folder: Path) -> None:
    with _start_driver(tmp_path, "auto", short_folder) as driver:
        _wait_until(lambda: len(workers.finished(tmp_path)) >= 2)
        listening = [
            connection.laddr.ip
            for pid in _session_of(driver.pid)
            for connection in psutil.Process(pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        os.kill(driver.pid, signal.SIGINT)
        _, errors = driver.communicate(timeout=60)
    assert driver.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert len(workers.finished(tmp_path)) < 16
    _wait_until(lambda: not _session_of(driver.pid), seconds=10)
    assert list(short_folder.glob("resid-ray-*")) == []
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


@pytest.mark.ray
def test_auto_joins_the_cluster_that_the_environment_names(head: RayHead, tmp_path: Path, short_folder: Path) -> None:
    environment = driver_environment(short_folder) | {"RAY_ADDRESS": head.gcs}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), "auto"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done 16 of 16\n", "")
    assert all(psutil.pid_exists(pid) for pid in head.pids[:1]), "the head is not ours to stop"
    assert list(short_folder.iterdir()) == [], "no Ray was started"


def test_an_address_where_nobody_listens_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    # In a process of its own: this one may be connected already.
    code = """
from pipeline.cluster import Cluster
from store.errors import ResourceError
from store.ray_settings import RaySettings
try:
    Cluster(RaySettings(address="127.0.0.1:9")).map(len, ["item"])
except ResourceError as error:
    print(error)
"""
    environment = driver_environment(tmp_path)
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, env=environment, capture_output=True, text=True
    ).stdout
    assert "no Ray cluster answers at 127.0.0.1:9" in output
    assert "remedy: start the cluster" in output
