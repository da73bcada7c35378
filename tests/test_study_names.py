"""Families of directions, and the short forms by which lists of a study name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.errors import StudyError
from store.study import Study
from store.study_directions import Orthogonalised, PrincipalComponents, Random, references
from store.study_file import load_study
from store.study_interventions import ProjectOut
from store.study_layers import check_layers, direction_layers

STUDY = """\
name: s
model:
  source: org/model
prompts:
  bad: {path: p.jsonl}
  good: {path: q.jsonl}
  pirate: {path: q.jsonl}
capture:
  - prompts: [bad, good]
    layers: {from: 0, to: 9}
  - prompts: [good]
    layers: [3, 4]
    components: [mlp_out]
directions:
  refusal: {positive: bad, negative: good}
  pc: {method: principal_components, positive: bad, negative: good, k: 3}
  perp: {method: orthogonalised, direction: refusal, orthogonal_to: [pc.2-3]}
  noise: {method: random, seeds: [7, 2024], match_norm: refusal}
  matched: {method: random_matched, seeds: [7, 13], match_energy: refusal, prompts: good}
  all: {method: principal_directions, directions: ["re*", pc, noise], k: 2}
geometry:
  cosines: [refusal, pc.1-2]
  alignment: [{pair: [refusal, pc.1]}]
  explained_variance:
    every: {directions: ["*"], layers: [2, 5], k: 2}
  cosine_nulls: {directions: [refusal, noise.7]}
  separability:
    sides: {positive: bad, negative: good, directions: pc}
replay:
  prompts: [bad]
  monitor: {directions: [pc.1-2], layers: [2]}
  conditions:
    baseline: {}
    ko: {interventions: [{project_out: pc, layers: [2]}]}
    ko_2: {interventions: [{project_out: [pc.1-2, refusal], layers: [2]}]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "q.jsonl").write_text('{"prompt": "e"}\n{"prompt": "f"}\n')
    return tmp_path


def load(folder: Path, old: str = "name: s", new: str = "name: s") -> Study:
    assert STUDY.count(old) >= 1, old
    path = folder / "s.yaml"
    path.write_text(STUDY.replace(old, new, 1))
    return load_study(path)


def test_families_and_short_forms_are_spelt_out(folder: Path) -> None:
    study = load(folder)
    assert list(study.directions) == [
        *("refusal", "pc.1", "pc.2", "pc.3", "perp", "noise.7", "noise.2024"),
        *("matched.7", "matched.13", "all.1", "all.2"),
    ]
    second = study.directions["pc.2"]
    assert isinstance(second, PrincipalComponents)
    assert second.index == 2
    noise = study.directions["noise.2024"]
    assert isinstance(noise, Random)
    assert (noise.seed, noise.seeds) == (2024, None)
    perp = study.directions["perp"]
    assert isinstance(perp, Orthogonalised)
    assert perp.orthogonal_to == ["pc.2", "pc.3"]
    named = [name for _, name in references(study.directions["all.2"])]
    assert named == ["refusal", "pc.1", "pc.2", "pc.3", "noise.7", "noise.2024"]
    assert study.geometry.cosines == ["refusal", "pc.1", "pc.2"]
    assert study.geometry.explained_variance["every"].directions == list(study.directions)
    assert study.geometry.separability["sides"].directions == ["pc.1", "pc.2", "pc.3"]
    assert study.replay is not None
    assert study.replay.monitor is not None
    assert study.replay.monitor.directions == ["pc.1", "pc.2"]
    whole, part = (study.replay.conditions[name].interventions[0] for name in ("ko", "ko_2"))
    assert isinstance(whole, ProjectOut)
    assert isinstance(part, ProjectOut)
    assert whole.project_out == ["pc.1", "pc.2", "pc.3"]
    assert part.project_out == ["pc.1", "pc.2", "refusal"]
    check_layers(study, 12)
    assert direction_layers(study, "matched.13", 12) == set(range(10))
    assert direction_layers(study, "all.1", 12) == set(range(10))


def test_an_index_gives_one_component_under_its_own_name(folder: Path) -> None:
    study = load(folder, "k: 2}\ngeo", "index: 2}\ngeo")
    assert "all" in study.directions
    assert "all.1" not in study.directions


FAULTS = {
    "unknown key": ("k: 3}", "kk: 3}", "directions.pc.kk", "unknown key 'kk'", "'k'"),
    "method": (
        "principal_components",
        "principal_component",
        "directions.pc",
        "unknown method",
        "principal_components",
    ),
    "both": ("k: 3}", "k: 3, index: 1}", "directions.pc", "exclude each other", "NAME.1"),
    "no seed": ("seeds: [7, 2024], ", "", "directions.noise", "exactly one of seed and seeds", "seeds: [7"),
    "seed twice": ("[7, 2024]", "[7, 7]", "directions.noise.seeds", "a seed is named twice", "once"),
    "too many": ("[pc.2-3]", "[pc.2-4]", "directions.perp.orthogonal_to", "no direction is named 'pc.2-4'", "pc"),
    "family for one": (
        "[refusal, pc.1]",
        "[refusal, pc]",
        "geometry.alignment[0].pair",
        "no direction is named 'pc'",
        "",
    ),
    "three": ("[refusal, pc.1]", "[refusal, pc.1, perp]", "geometry.alignment[0].pair", "at most 2", ""),
    "no match": ('"re*"', '"zz*"', "directions.all.directions", "no direction is named 'zz*'", ""),
    "clash": ("  perp:", "  pc.1:", "directions.pc", "two specs define the direction 'pc.1'", "rename"),
    "not captured": (
        "prompts: good}",
        "prompts: pirate}",
        "directions.matched.prompts",
        "nothing captures",
        "capture",
    ),
    "sides": (
        "positive: bad, negative: good, k",
        "positive: bad, negative: bad, k",
        "directions.pc.negative",
        "both sides",
        "",
    ),
    "two sides": (
        "{positive: bad, negative: good, directions",
        "{positive: bad, negative: bad, directions",
        "geometry.separability.sides",
        "on both sides",
        "",
    ),
    "misspelt": (
        "explained_variance",
        "explained_varience",
        "geometry.explained_varience",
        "unknown key",
        "explained_v",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_names_the_key_as_it_is_written(folder: Path, what: str) -> None:
    old, new, key, problem, remedy = FAULTS[what]
    with pytest.raises(StudyError) as caught:
        load(folder, old, new)
    assert caught.value.key == key
    assert problem in caught.value.problem
    assert remedy in str(caught.value.remedy)
    line = int(str(caught.value.file).rpartition(":")[2])
    text = (folder / "s.yaml").read_text().splitlines()[line - 1]
    assert key.split(".")[1].partition("[")[0] in text or new.strip() in text or key.split(".")[-1] in text


@pytest.mark.parametrize(
    ("old", "new", "key", "problem"),
    [
        ("layers: [2, 5], k: 2", "layers: [11], k: 2", "geometry.explained_variance.every.layers", "at layer 11"),
        (
            "{directions: [refusal, noise.7]}",
            "{layers: [99]}",
            "geometry.cosine_nulls.layers",
            "layer 99 does not exist",
        ),
    ],
)
def test_layers_are_checked_before_a_model_is_loaded(folder: Path, old: str, new: str, key: str, problem: str) -> None:
    study = load(folder, old, new)
    with pytest.raises(StudyError) as caught:
        check_layers(study, 12)
    assert str(caught.value.key).startswith(key)
    assert problem in caught.value.problem
    assert (folder / "s.yaml").read_text().splitlines()[int(str(caught.value.file).rpartition(":")[2]) - 1]
