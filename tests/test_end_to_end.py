"""The whole way on the real model: a study submitted to a running Ray head, stage by stage, then asked in SQL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray_head import RayHead, ray_head

from store.activations import ActivationStore
from store.location import Location
from store.results import ResultStore
from store.sql import connect, query

pytestmark = [pytest.mark.ray, pytest.mark.smollm2]
ROOT = Path(__file__).parent.parent


def small_study() -> dict[str, object]:
    """The demo with a few prompts: everything that it does, in seconds."""
    study = yaml.safe_load((ROOT / "studies" / "demo.yaml").read_text())
    study["name"] = "small"
    for name in ("harmful", "harmless"):
        study["prompts"][name]["path"] = f"../prompts/{name}.jsonl"
        study["prompts"][name]["split"]["parts"] = {"train": 6, "test": 3}
    study["traits"]["compliant"].update(instructions=2, questions=2)
    study["replay"]["decoding"]["max_new_tokens"] = 6
    study["replay"]["block_rows"] = 12
    study["block_rows"] = 4
    return study


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git keeps, with a study of its own: jobs run from an upload of it."""
    folder = tmp_path_factory.mktemp("upload")
    for name in ("store", "pipeline", "analysis", "jobs", "prompts", "studies", "organism"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "studies" / "small.yaml").write_text(yaml.safe_dump(small_study()))
    return folder


def submit(head: RayHead, upload: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a Ray job, the way the README says."""
    ray = str(Path(sys.executable).parent / "ray")
    return subprocess.run(
        [ray, "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *command],
        cwd=upload,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )


def generated(results: Path) -> dict[str, str]:
    table = ResultStore(Location.of(results)).read("generations", columns=["generation_key", "text"])
    return dict(zip(table["generation_key"].to_pylist(), table["text"].to_pylist(), strict=True))


def test_stages_submitted_as_jobs_give_what_one_process_gives(head: RayHead, upload: Path, tmp_path: Path) -> None:
    places = ["--store", str(tmp_path / "store"), "--results", str(tmp_path / "results")]
    for stage in ("capture", "replay", "run"):
        done = submit(head, upload, sys.executable, "-m", f"jobs.{stage}", "--study", "studies/small.yaml", *places)
        assert done.returncode == 0, done.stdout + done.stderr
    connection = connect(Location.of(tmp_path / "results"))
    rates = query(connection, "SELECT * FROM refusal_rates WHERE study = 'small'").to_pylist()
    assert len({rate["condition"] for rate in rates}) == 13
    assert all(rate["n"] == rate["n_scored"] > 0 for rate in rates)
    receipt = json.loads(query(connection, "SELECT receipt FROM models").to_pylist()[0]["receipt"])
    assert receipt["checks"]
    [model] = ActivationStore.open(str(tmp_path / "store")).models()
    assert model.verify() == []

    alone = [sys.executable, "-m", "jobs.run", "--study", "studies/small.yaml", "--ray", "off", "--quiet"]
    other = ["--store", str(tmp_path / "store2"), "--results", str(tmp_path / "results2")]
    subprocess.run([*alone, *other], cwd=upload, check=True, capture_output=True, timeout=300)
    assert generated(tmp_path / "results") == generated(tmp_path / "results2")


def test_a_job_refuses_a_relative_place_that_would_be_thrown_away(head: RayHead, upload: Path) -> None:
    done = submit(head, upload, sys.executable, "-m", "jobs.capture", "--study", "studies/small.yaml")
    assert done.returncode != 0
    assert "resid-data/store is relative" in done.stdout + done.stderr
