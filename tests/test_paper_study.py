"""The paper's study, condition by condition against its table, for models of 28, 30 and 32 blocks, and planned without
weights for the two that the paper used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_tokenizers import save_model_text

from jobs.context import Context
from jobs.plan import plan_lines
from store.conditions import source_layer
from store.layers import resolve_layers
from store.sizes import spell_bytes
from store.study import Study
from store.study_checks import pairs
from store.study_choices import settled, with_choices
from store.study_directions import ancestors, reads
from store.study_expand import expand_conditions
from store.study_file import load_study
from store.study_interventions import Add
from store.study_layers import check_layers

STUDIES = Path(__file__).parent.parent / "studies"
PAPER = {"refusal": {"given": {"layer": 10}}, "persona": {"given": {"layer": 20, "coefficient": 3}}}

# (operation, direction, layer, coefficient); the coefficient of what is projected out is None. From the paper's
# inventory: persona at block 20, coefficient 3; refusal rescaled, coefficient 2.
Step = tuple[str, str, int, float | None]
MP: Step = ("add", "persona", 20, 3)
SEEDS = (7, 13, 29, 2024)
TABLE: dict[str, list[Step]] = {
    "baseline": [],
    "mp_only": [MP],
    "mp_early_refusal": [MP, ("add", "refusal", 14, 2)],
    "mp_late_refusal_L22": [MP, ("add", "refusal", 22, 2)],
    "mp_late_refusal_L22_L24": [MP, ("add", "refusal", 22, 2), ("add", "refusal", 24, 2)],
    "mp_only_ko_L18": [MP, ("out", "persona", 18, None)],
    "mp_only_ko_L20": [MP, ("out", "persona", 20, None)],
    "mp_only_ko_L22": [MP, ("out", "persona", 22, None)],
    "mp_only_ko_L24": [MP, ("out", "persona", 24, None)],
    "mp_early_ref_ko_L22": [MP, ("add", "refusal", 14, 2), ("out", "persona", 22, None)],
    "mp_random_ko_L22[seed=7]": [MP, ("out", "random_7", 22, None)],
    "mp_random_ko_L22[seed=13]": [MP, ("out", "random_13", 22, None)],
    "mp_random_ko_L22[seed=29]": [MP, ("out", "random_29", 22, None)],
    "mp_random_ko_L22[seed=2024]": [MP, ("out", "random_2024", 22, None)],
    **{f"mp_matched_ko_L22[seed={seed}]": [MP, ("out", f"matched_{seed}", 22, None)] for seed in (7, 13, 29, 2024)},
    "ko_window_L22": [MP, ("out", "persona", 22, None)],
    "ko_window_L22_L24": [MP, ("out", "persona", 22, None), ("out", "persona", 24, None)],
    "ko_window_L22_L24_L26": [
        MP,
        ("out", "persona", 22, None),
        ("out", "persona", 24, None),
        ("out", "persona", 26, None),
    ],
    "refusal_ablation": [
        ("out", "refusal", layer, None) for layer in (14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27)
    ],
    "refusal_additive[coefficient=-0.5]": [("add", "refusal", 10, -0.5)],
    "refusal_additive[coefficient=-1]": [("add", "refusal", 10, -1)],
    "refusal_additive[coefficient=-1.5]": [("add", "refusal", 10, -1.5)],
    "refusal_additive[coefficient=-2]": [("add", "refusal", 10, -2)],
    "refusal_additive[coefficient=-2.5]": [("add", "refusal", 10, -2.5)],
    "refusal_additive[coefficient=-3]": [("add", "refusal", 10, -3)],
    "refusal_additive[coefficient=-3.5]": [("add", "refusal", 10, -3.5)],
    "ko_only_L22": [("out", "persona", 22, None)],
    "ko_only_window": [("out", "persona", 22, None), ("out", "persona", 24, None), ("out", "persona", 26, None)],
    "late_refusal_only": [("add", "refusal", 22, 2)],
    "prompted_persona": [],
    "prompted_ko_L22": [("out", "persona", 22, None)],
    **{
        f"random_add_ko_L22[seed={n}]": [("add", f"random_{n}", 20, 3), ("out", f"random_{n}", 22, None)] for n in SEEDS
    },
}
# All others act on all tokens.
TOKENS = {
    "mp_only_ko_L22_but_sink": "all_but_sink",
    "mp_only_ko_L22_sink": "sink",
    "ko_only_L22_but_sink": "all_but_sink",
    "ko_only_L22_sink": "sink",
    "prompted_ko_L22_but_sink": "all_but_sink",
    "prompted_ko_L22_sink": "sink",
}
for name in TOKENS:
    TABLE[name] = TABLE[name.removesuffix("_but_sink").removesuffix("_sink")]
for rank in (1, 2, 3, 5, 10):
    subspace = "+".join(f"refusal_pc.{i}" for i in range(1, rank + 1))
    TABLE[f"refusal_subspace_ablation_{rank}"] = [("out", subspace, layer, None) for layer in range(14, 28)]
SWEEP = ("0.5", "1", "1.5", "2", "2.5", "3", "3.5")
for text in SWEEP:
    for direction in ("user_persona", "i_thou", "v_perp"):
        TABLE[f"single_add[direction={direction},coefficient={text}]"] = [("add", direction, 20, float(text))]
    TABLE[f"i_thou_multi[coefficient={text}]"] = [("add", "i_thou", layer, float(text)) for layer in (18, 20, 22)]
for seed in (7, 13, 29, 2024):
    for text in ("1", "2", "3"):
        TABLE[f"random_add[seed={seed},coefficient={text}]"] = [("add", f"random_{seed}", 20, float(text))]
# The same as the paper's source does it: vectors of the layer below.
PUBLISHED = {
    "published_mp_only": "mp_only",
    "published_mp_early_refusal": "mp_early_refusal",
    "published_mp_late_refusal_L22": "mp_late_refusal_L22",
    "published_mp_only_ko_L20": "mp_only_ko_L20",
    "published_mp_only_ko_L22": "mp_only_ko_L22",
    "published_mp_random_ko_L22": "mp_random_ko_L22[seed=7]",
    "published_refusal_ablation": "refusal_ablation",
}


def study_with(folder: Path, **changes: Any) -> Study:
    """Return the study with changes on top, without the organism's adapter, which need not be there."""
    path = folder / "on_top.yaml"
    content = {"base": str(STUDIES / "persona_gates_refusal.yaml"), "model": {"adapter": None}, **changes}
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


def steps(study: Study, n_layers: int) -> dict[str, list[tuple[Step, int]]]:
    """Return what every condition does, layers as numbers: each step with the layer that its vector comes from."""
    assert study.replay is not None
    values: dict[str, Any] = {}
    for name, selection in study.select.items():
        assert selection.given is not None
        values |= settled(name, selection.given, n_layers)
    replay, waiting = with_choices(study.replay, values)
    assert waiting == {}
    found: dict[str, list[tuple[Step, int]]] = {}
    for item in expand_conditions(replay):
        found[item.name] = []
        for step in item.spec.interventions:
            for layer in resolve_layers(step.layers, n_layers):
                source = source_layer(step, layer, n_layers)
                if isinstance(step, Add):
                    assert isinstance(step.coefficient, int | float)
                    found[item.name].append((("add", step.add, layer, step.coefficient), source))
                    if step.add == "refusal":
                        assert step.norm.match == "i_thou"  # type: ignore[union-attr]
                    else:
                        assert step.norm == "natural"
                else:
                    found[item.name].append((("out", "+".join(step.project_out), layer, None), source))
                scoped = step is item.spec.interventions[-1]
                assert step.component == "resid_post"
                assert step.tokens == (TOKENS.get(item.name, "all") if scoped else "all")
    return found


@pytest.mark.parametrize("n_layers", [28, 30, 32])
def test_the_study_is_the_papers_table(tmp_path: Path, n_layers: int) -> None:
    study = study_with(tmp_path, select=PAPER)
    check_layers(study, n_layers)
    found = steps(study, n_layers)
    assert {name: found[name] for name in TABLE} == {
        name: [(step, step[2]) for step in expected] for name, expected in TABLE.items()
    }
    for published, aligned in PUBLISHED.items():
        assert found[published] == [(step, step[2] - 1) for step in TABLE[aligned]]
    everywhere = [(("out", "refusal", layer, None), 10) for layer in range(n_layers)]
    assert found["refusal_project_out_chosen"] == everywhere
    assert set(found) == {*TABLE, *PUBLISHED, "refusal_project_out_chosen", "persona_answers"}


@pytest.mark.parametrize("n_layers", [28, 30, 32])
def test_every_candidate_fits_every_model_and_moves_the_whole_table(tmp_path: Path, n_layers: int) -> None:
    study = study_with(tmp_path)
    check_layers(study, n_layers)  # under every candidate
    assert study.replay is not None
    candidates = [item for item in expand_conditions(study.replay) if item.base == "persona_candidates"]
    assert len(candidates) == 12
    for candidate in candidates:
        values = settled("persona", candidate.variables, n_layers)
        given = {"persona": {"given": {"layer": values["persona.layer"], "coefficient": 3}}}
        found = steps(study_with(tmp_path, select=PAPER | given), n_layers)
        shift = int(values["persona.layer"]) - 20
        for name, expected in TABLE.items():
            if not name.startswith("refusal_additive"):
                moved = [(op, direction, layer + shift, coefficient) for op, direction, layer, coefficient in expected]
                assert [step for step, _ in found[name]] == moved


def test_all_conditions_but_those_of_persona_choice_and_subspaces_are_replayed_on_both_test_parts(
    tmp_path: Path,
) -> None:
    study = study_with(tmp_path)
    assert study.replay is not None
    for item in expand_conditions(study.replay):
        subspace = item.base.startswith(("refusal_subspace_ablation", "prompted_"))  # harmful requests alone
        if not subspace and item.base not in ("persona_answers", "refusal_candidates", "persona_candidates"):
            assert {"harmful@test", "harmless@test"} <= set(item.spec.prompts or study.replay.prompts)
    sizes = {name: len(found.prompts) for name, found in Context(study).fixed_sets.items()}
    assert sizes["harmful@test"] >= 64
    assert sizes["harmless@test"] >= 32


def test_the_texts_fit_the_time_that_the_study_states(tmp_path: Path) -> None:
    """The arithmetic in the file's comments, from the file itself."""
    study = study_with(tmp_path)
    assert study.replay is not None
    sets = Context(study).fixed_sets
    same: set[tuple[str, str]] = set()
    for item in expand_conditions(study.replay):
        does = json.dumps([step.model_dump(mode="json") for step in item.spec.interventions])
        for name in item.spec.prompts or study.replay.prompts:
            if name in sets:
                same |= {(does, prompt.id) for prompt in sets[name].prompts}
    turns = sum(len(sets[f"compliant.{side}"].prompts) for side in ("positive", "negative"))  # of user personas
    text = (STUDIES / "persona_gates_refusal.yaml").read_text()
    assert f"{len(same) + turns:,} texts" in text
    assert (len(same) + turns) * study.replay.decoding.max_new_tokens / 110 < 33 * 60


def test_the_geometry_is_the_papers_and_its_test_prompts_are_held_out(tmp_path: Path) -> None:
    study = study_with(tmp_path)
    geometry, specs = study.geometry, study.directions
    persona = {"persona", "persona_prompt_end", "persona_response_start"}
    compared = {*persona, "refusal", "assistant_axis", "traits_pc"}
    assert geometry.cosines == "all"
    assert compared <= set(specs)
    assert geometry.cosine_nulls is not None
    assert compared <= set(geometry.cosine_nulls.directions)
    assert ["persona", "refusal"] in [item.pair for item in geometry.alignment]
    assert {f"refusal_pc.{i}" for i in range(1, 11)} <= set(specs)
    traits = geometry.explained_variance["traits"]
    assert traits.duplicate_cosine is not None
    assert set(traits.directions) == {name for name in specs if name.endswith("_trait")}
    separated = geometry.separability["harmful_on_test"]
    read = {
        name
        for direction in separated.directions
        for spec in ancestors(specs, direction)
        for _, sets in reads(spec)
        for name in sets
    }
    assert {"harmful@train", "harmless@train"} <= read
    assert not any(name.endswith(("@test", "@val")) for name in read)


def test_the_planned_comparisons_pair_up(tmp_path: Path) -> None:
    study = study_with(tmp_path)
    assert study.replay is not None
    found = {name: pairs(comparison, expand_conditions(study.replay)) for name, comparison in study.comparisons.items()}
    [(projection, control)] = found["projection_against_random"]
    assert (projection.members, len(control.members)) == (("mp_only_ko_L22",), 4)
    assert len(found["sweep_against_baseline"]) == 7 + 3 * 7 + 7 + 3
    assert len(found["refusal_subspaces"]) == 5


@pytest.mark.parametrize(("file", "family", "n_layers", "d_model"), [
    ("llama-3.1-8b.yaml", "llama", 32, 4096),
    ("qwen2.5-7b.yaml", "qwen2", 28, 3584),
])  # fmt: skip
def test_the_papers_models_are_planned_without_their_weights(
    tmp_path: Path, file: str, family: str, n_layers: int, d_model: int
) -> None:
    save_model_text(tmp_path / "model", family)
    places = {"store": str(tmp_path / "store"), "results": str(tmp_path / "results")}
    model = {"source": str(tmp_path / "model")}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": str(STUDIES / file), "model": model, **places}))
    study = load_study(tmp_path / "s.yaml")
    lines = plan_lines(Context(study, only_planning=True))
    assert f"{n_layers} layers, d_model {d_model}, float16" in lines[0]
    assert "the weights are not on this machine: everything counts as new" in lines
    assert any(
        line.startswith("  choice persona (given): $persona.layer = 20, $persona.coefficient = 3") for line in lines
    )
    rows = 2 * 64 + 64 + 32 + 5 * 12
    size = spell_bytes(rows * n_layers * d_model * 2)
    [head] = [line for line in lines if line.startswith("capture: ")]
    assert head.startswith(f"capture: {rows} rows to capture ({size} new), 0 of {rows} cached")
    assert "  condition mp_only: 96 prompts x 1 seed(s)" in lines
    assert not list((tmp_path / "results").rglob("*"))


@pytest.mark.parametrize("file", ["llama-3.1-8b.yaml", "qwen2.5-7b.yaml"])
def test_the_two_studies_differ_in_model_and_published_values_only(file: str) -> None:
    content = yaml.safe_load((STUDIES / file).read_text())
    assert set(content) <= {"base", "name", "description", "model", "prompts", "select"}
    assert content["base"] == "persona_gates_refusal.yaml"
    assert all(set(choice) == {"given"} for choice in content["select"].values())
