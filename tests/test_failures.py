"""What does not exist costs itself only: one layer, one direction, the conditions that need it, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_jobs import Project, Resid, resid, tiny_folder

__all__ = ["resid", "tiny_folder"]  # fixtures


def at_the_embedding(study: dict[str, Any]) -> None:
    """Read a direction before block 0, where every prompt ends in the same token; and one that exists nowhere."""
    study["capture"] = [{"prompts": ["bad", "good"], "components": ["resid_post", "resid_pre"]}]
    study["directions"] = {
        "refusal": {"positive": "bad@train", "negative": "good@train"},
        "copy": {"positive": "bad@train", "negative": "good@train"},
        "early": {"positive": "bad@train", "negative": "good@train", "component": "resid_pre"},
        "nothing": {"method": "difference", "minuend": "refusal", "subtrahend": "copy"},
        "child": {"method": "random", "seed": 3, "match_norm": "nothing"},
    }
    study["geometry"] = {"projections": [{"prompts": ["bad@test"]}], "alignment": [{"pair": ["early", "nothing"]}]}
    replay = study["replay"]
    replay["monitor"] = {"directions": ["refusal", "nothing"], "layers": [-1]}
    replay["conditions"] = {
        "baseline": {},
        "late": {"interventions": [{"project_out": "early", "component": "resid_pre", "layers": [-1]}]},
        "everywhere": {"interventions": [{"project_out": "early", "component": "resid_pre", "layers": "all"}]},
        "lost": {"interventions": [{"project_out": "child", "layers": [1]}]},
        "twice": {"interventions": [{"project_out": ["refusal", "copy"], "layers": [1]}]},
    }


@pytest.fixture
def project(tmp_path: Path, tiny_folder: Path) -> Project:
    project = Project(tmp_path, tiny_folder)
    project.write(at_the_embedding)
    return project


def test_what_does_not_exist_costs_itself_only(project: Project, resid: Resid) -> None:
    """The whole stage used to fail after all captures."""
    code, out, err = resid("run", "--study", project.study)
    assert code == 3, err
    failures = project.ask("SELECT stage, kind, name, layer, remedy IS NULL AS bare FROM failures ORDER BY ALL")
    assert [(f["stage"], f["kind"], f["name"], f["layer"]) for f in failures] == [
        ("directions", "direction", "child", None),
        ("directions", "direction", "early", 0),
        ("directions", "direction", "nothing", None),
        ("replay", "condition", "everywhere", None),
        ("replay", "condition", "lost", None),
        ("replay", "condition", "twice", None),
    ]
    assert "set aside: direction 'early' at layer 0: direction 'early' is zero, up to rounding, at resid_pre.0" in out
    assert "set aside: condition 'lost': direction 'child' is computed from 'nothing'" in out
    layers: dict[str, set[int]] = {name: set() for name in ("copy", "early", "refusal")}
    for row in project.ask("SELECT direction, layer FROM directions"):
        layers[row["direction"]].add(row["layer"])
    assert layers["early"] == layers["refusal"] - {0}
    texts = project.ask("SELECT DISTINCT condition FROM generations ORDER BY ALL")
    assert [row["condition"] for row in texts] == ["baseline", "late"]
    assert project.ask("SELECT DISTINCT direction FROM monitored") == [{"direction": "refusal"}]

    code, plan, err = resid("plan", "--study", project.study)
    assert code == 0, err
    assert "directions: 0 to compute" in plan
    assert "set aside: direction 'nothing'" in plan
    assert "replay: 0 generations to make" in plan
    code, out, err = resid("run", "--study", project.study)
    assert code == 3, err
    assert "replay: 0 generations done" in out
    assert "set aside: direction 'nothing': direction 'nothing' is zero" in out


def test_a_failure_is_forgotten_once_it_is_mended(project: Project, resid: Resid) -> None:
    assert resid("run", "--study", project.study)[0] == 3

    def mended(study: dict[str, Any]) -> None:
        at_the_embedding(study)
        study["directions"]["early"]["component"] = "resid_post"
        study["directions"]["nothing"] = {"method": "random", "seed": 5, "match_norm": "refusal"}
        for name in ("everywhere", "late"):
            del study["replay"]["conditions"][name]
        del study["replay"]["conditions"]["twice"]

    project.write(mended)
    code, out, err = resid("run", "--study", project.study)
    assert code == 0, err
    assert "set aside" not in out
    assert project.ask("SELECT * FROM failures") == []
    assert project.ask("SELECT count(DISTINCT condition) AS n FROM generations") == [{"n": 2}]
