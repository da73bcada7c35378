"""Families of directions and analyses as users run them: capture, directions, geometry, again, and after a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMOLLM2
from test_jobs import Change, Project, Resid, resid, tiny_folder

from jobs.context import Context
from store.conditions import resolve_conditions
from store.study_file import load_study

__all__ = ["resid", "tiny_folder"]  # fixtures


def extended(study: dict[str, Any]) -> None:
    study["directions"] = {
        "matched": {
            "method": "random_matched",
            "seeds": [7, 13],
            "match_energy": "refusal",
            "prompts": ["good@test", "bad"],
        },
        "refusal": {"positive": "bad@train", "negative": "good@train"},
        "pc": {"method": "principal_components", "positive": "bad@train", "negative": "good@train", "k": 3},
        "axis": {
            "method": "assistant_axis",
            "default": "good@train",
            "roles": ["bad"],
            "by": "topic",
            "position": "prompt_end",
        },
        "noise": {"method": "random", "seeds": [7, 13, 29], "match_norm": "refusal"},
        "top": {"method": "principal_directions", "directions": ["pc", "noise", "axis"], "index": 1},
    }
    study["prompts"]["bad"]["columns"] = {"prompt": "prompt", "tags": ["topic"]}
    study["geometry"] = {
        "alignment": [{"pair": ["refusal", "pc.1"]}],
        "explained_variance": {"all": {"directions": ["*"], "k": 4, "resamples": 100}},
        "cosine_nulls": {"directions": ["refusal", "pc.1-2", "noise.7"], "resamples": 100, "layers": [0, -1]},
        "separability": {
            "test": {
                "positive": "bad@test",
                "negative": "good@test",
                "directions": ["refusal", "noise"],
                "resamples": 100,
            },
            "train": {"positive": "bad@train", "negative": "good@train", "directions": ["top"], "resamples": 100},
        },
    }
    study["capture"] = [{"prompts": ["bad", "good"]}]
    study["replay"] = {
        "prompts": ["bad@test"],
        "conditions": {"gone": {"interventions": [{"project_out": ["pc.1-2", "matched.7"], "layers": [1]}]}},
    }


@pytest.fixture
def project(tmp_path: Path, tiny_folder: Path) -> Project:
    project = Project(tmp_path, tiny_folder)
    project.write(extended)
    return project


def stages(project: Project, resid: Resid, *names: str) -> str:
    printed = ""
    for name in names:
        code, out, err = resid(name, "--study", project.study)
        assert code == 0, err
        printed += out
    return printed


def test_families_and_analyses_come_out_of_the_cache(project: Project, resid: Resid) -> None:
    printed = stages(project, resid, "capture", "directions", "geometry")
    assert "waits" not in printed
    names = [row["direction"] for row in project.ask("SELECT DISTINCT direction FROM directions ORDER BY ALL")]
    assert names == ["axis", "matched.13", "matched.7", *(f"noise.{s}" for s in (13, 29, 7)), "pc.1", "pc.2", "pc.3",
                     "refusal", "top"]  # fmt: skip
    context = Context(load_study(project.study))
    directions = context.directions.current()
    layers = directions["refusal"].layers
    facts = dict(directions["matched.7"].provenance or {})
    assert [energy["layer"] for energy in facts["energies"]] == list(layers)
    roles = dict(directions["axis"].provenance or {})["roles"]
    assert sum(roles.values()) == 12
    assert len(roles) > 1

    (condition,), waiting = resolve_conditions(
        context.study.replay,
        directions,
        len(layers),
        directions["refusal"].model,  # type: ignore[arg-type]
    )
    assert waiting == []
    assert condition.operations[0].vectors.shape[0] == 3

    counts = {table: project.ask(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in
              ("alignments", "explained_variance", "cosine_nulls", "separability")}  # fmt: skip
    assert counts == {
        "alignments": len(layers) ** 2,
        "explained_variance": 4 * len(layers),
        "cosine_nulls": 2 * (6 + 6),
        "separability": len(layers) * (4 + 1),
    }
    seen = project.ask("SELECT DISTINCT analysis, held_out, n_training FROM separability ORDER BY ALL")
    assert seen == [
        {"analysis": "test", "held_out": True, "n_training": 0},
        {"analysis": "train", "held_out": False, "n_training": 16},
    ]
    code, _, err = resid("report", "--study", project.study)
    assert code == 0, err


def test_a_second_run_finds_everything_and_a_lost_block_alone_is_redone(project: Project, resid: Resid) -> None:
    stages(project, resid, "capture", "directions", "geometry")
    again = stages(project, resid, "directions", "geometry")
    assert "directions: 0 directions done, 11 found" in again
    assert "geometry: 0 blocks done" in again
    before = project.ask("FROM explained_variance ORDER BY ALL")
    records = sorted((project.folder / "results" / "explained_variance").rglob("*.json"))
    records[0].unlink()
    assert "geometry: 1 blocks done" in stages(project, resid, "geometry")
    assert project.ask("FROM explained_variance ORDER BY ALL") == before


def test_after_a_change_only_what_is_asked_for_now_is_shown(project: Project, resid: Resid) -> None:
    stages(project, resid, "capture", "directions", "geometry")
    n = project.ask("SELECT count(*) AS n FROM cosine_nulls")[0]["n"]

    def changed(study: dict[str, Any]) -> None:
        extended(study)
        study["geometry"]["cosine_nulls"]["seed"] = 1
        study["geometry"]["separability"].pop("train")
        study["directions"]["pc"]["k"] = 4

    project.write(changed)
    printed = stages(project, resid, "directions", "geometry")
    assert "directions: 2 directions done, 10 found" in printed  # pc.4, and top, which now includes it
    assert project.ask("SELECT DISTINCT seed FROM cosine_nulls") == [{"seed": 1}]
    assert project.ask("SELECT count(*) AS n FROM cosine_nulls")[0]["n"] == n
    assert project.ask("SELECT DISTINCT analysis FROM separability") == [{"analysis": "test"}]


def untagged() -> Change:
    def change(study: dict[str, Any]) -> None:
        extended(study)
        study["prompts"]["bad"].pop("columns")

    return change


def test_a_role_without_its_tag_is_an_error_that_names_the_key(project: Project, resid: Resid) -> None:
    project.write(untagged())
    stages(project, resid, "capture")
    code, _, err = resid("directions", "--study", project.study)
    assert code == 1
    assert "directions.axis.by" in err
    assert "has no tag 'topic'" in err


def test_what_waits_says_for_which_directions(project: Project, resid: Resid) -> None:
    stages(project, resid, "capture", "directions")

    def more(study: dict[str, Any]) -> None:
        extended(study)
        study["directions"]["late"] = {"method": "random", "seed": 1, "match_norm": "refusal"}
        study["geometry"]["alignment"].append({"pair": ["late", "refusal"]})

    project.write(more)
    printed = stages(project, resid, "geometry")
    assert "geometry.explained_variance.all: no directions late yet" in printed
    assert "geometry.alignment: no directions late yet" in printed
    assert project.ask("SELECT count(*) AS n FROM explained_variance")[0]["n"] == 0
    assert json.dumps(project.ask("SELECT DISTINCT direction_a FROM alignments")) == '[{"direction_a": "refusal"}]'


def test_on_the_real_model_everything_equals_numpy_on_the_cached_rows(
    tmp_path: Path, smollm2: Any, resid: Resid
) -> None:
    from sklearn.metrics import roc_auc_score

    from store.activations import ActivationStore

    project = Project(tmp_path, SMOLLM2)  # type: ignore[arg-type]
    project.write(extended)
    stages(project, resid, "capture", "directions", "geometry")
    store = ActivationStore.open(str(tmp_path / "store"))
    directions = Context(load_study(project.study)).directions.current()
    sets = {
        name: store.select(prompts=name).to_numpy().astype(np.float64)
        for name in ("bad@train", "good@train", "bad@test", "good@test", "bad")
    }
    matched_rows = np.concatenate([sets["good@test"], sets["bad"]])
    for layer in range(30):
        refusal = sets["bad@train"][:, layer].mean(axis=0) - sets["good@train"][:, layer].mean(axis=0)
        assert directions["refusal"].at(layer) == pytest.approx(refusal, rel=1e-5, abs=1e-6 * np.abs(refusal).max())
        contrasts = sets["bad@train"][:, layer] - sets["good@train"][:, layer].mean(axis=0)
        _, vectors = np.linalg.eigh(contrasts @ contrasts.T)
        for i in (1, 2, 3):
            vector = vectors[:, -i] @ contrasts
            vector = vector / np.linalg.norm(vector)
            assert directions[f"pc.{i}"].unit(layer) == pytest.approx(vector * np.sign(vector @ refusal), abs=1e-5)
        energies = {
            name: np.mean([(h @ directions[name].unit(layer)) ** 2 for h in matched_rows[:, layer]])
            for name in ("refusal", "matched.7", "matched.13")
        }
        assert energies["matched.7"] == pytest.approx(energies["refusal"], rel=1e-3)
        assert energies["matched.13"] == pytest.approx(energies["refusal"], rel=1e-3)
        assert abs(directions["matched.7"].unit(layer) @ directions["refusal"].unit(layer)) < 1e-6
        (row,) = project.ask(f"FROM separability WHERE analysis = 'test' AND direction = 'refusal' AND layer = {layer}")
        sides = [sets[name][:, layer] @ directions["refusal"].unit(layer) for name in ("bad@test", "good@test")]
        assert row["auc"] == pytest.approx(roc_auc_score([1] * 4 + [0] * 4, np.concatenate(sides)), abs=1e-9)
        (cosine,) = project.ask(
            f"SELECT cosine FROM alignments WHERE layer_a = {layer} AND layer_b = 29 AND direction_b = 'pc.1'"
        )
        assert cosine["cosine"] == pytest.approx(
            directions["refusal"].unit(layer) @ directions["pc.1"].unit(29), abs=1e-12
        )
