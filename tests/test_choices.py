"""Choices: a pure rule, references that take its values, and studies that choose on one part and report on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_jobs import Project, tiny_folder  # noqa: F401 (a fixture)

from analysis.choices import Measured, choose
from jobs.cli import main
from jobs.context import Context
from jobs.plan import plan_lines
from jobs.replay import ReplayPlan
from store.errors import StudyError
from store.location import Location
from store.references import filled, names_in
from store.results import ResultStore
from store.study import ConditionSpec
from store.study_expand import expand
from store.study_file import load_study
from store.study_layers import check_layers
from store.study_select import Bound, Selection

# --- references and `each` ---------------------------------------------------------------------------------------


def test_a_reference_becomes_the_value_and_inside_a_text_its_spelling() -> None:
    values = {"seed": 7, "persona.layer": 20, "c": 1.5}
    spec = {"a": "random_$seed", "b": ["$persona.layer", "$persona.layer + 2", "$persona.layer-6"], "c": "$c"}
    assert filled(spec, values) == {"a": "random_7", "b": [20, 22, 14], "c": 1.5}
    assert filled("${c}x$seed$other", values) == "1.5x7$other"
    assert names_in(spec) == {"seed", "persona.layer", "c"}
    with pytest.raises(ValueError, match="counts from a layer's number"):
        filled("$c+1", values)
    with pytest.raises(ValueError, match="below the first"):
        filled("$persona.layer-21", values)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.integers() | st.text("xyz"), max_size=4))
def test_what_refers_to_nothing_is_left_alone(values: dict[str, Any]) -> None:
    content = {"x": ["no reference", 1, 2.5, None, True], "y": {"z": "price: 3 dollars"}}
    assert filled(content, values) == content
    assert names_in(content) == set()


def test_each_is_every_combination_and_the_last_name_changes_fastest() -> None:
    spec = ConditionSpec.model_validate(
        {
            "each": {"seed": [7, 13], "coefficient": [1, 2]},
            "control_of": "persona[coefficient=$coefficient]",
            "interventions": [
                {"add": "random_$seed", "layers": ["$p.layer"], "coefficient": "$coefficient"},
                {"project_out": "random_$seed", "layers": {"from": "$p.layer + 2", "to": -1}},
            ],
        }
    )
    found = list(expand("random", spec))
    assert [item.name for item in found] == [
        f"random[seed={seed},coefficient={coefficient}]" for seed in (7, 13) for coefficient in (1, 2)
    ]
    last = found[-1]
    assert (last.base, last.coefficient, dict(last.variables)) == ("random", 2, {"seed": 13, "coefficient": 2})
    assert last.series == "random[seed=13]"
    assert last.spec.control_of == "persona[coefficient=2]"
    assert last.spec.each == {}
    add, out = last.spec.interventions
    assert (add.add, add.coefficient, add.layers) == ("random_13", 2, ["$p.layer"])  # type: ignore[union-attr]
    assert out.project_out == ["random_13"]  # type: ignore[union-attr]


# --- the rule ----------------------------------------------------------------------------------------------------

RULE = Selection.model_validate(
    {
        "of": "c",
        "prompts": "bad@val",
        "change_at_least": 0.3,
        "keep": [
            {"outcome": "degenerate", "prompts": "bad@val", "at_most": 0.1},
            {"outcome": "refusal", "prompts": "good@val", "change_at_most": 0.2},
        ],
    }
)


def measured(name: str, refused: float, degenerate: float = 0.0, harmless: float = 0.0) -> Measured:
    def shares(rate: float) -> dict[str, float]:
        return {f"p{i}": float(i < round(rate * 10)) for i in range(10)}

    return Measured(
        name,
        name,
        {"layer": name},
        {
            ("refusal", "bad@val"): shares(refused),
            ("degenerate", "bad@val"): shares(degenerate),
            ("refusal", "good@val"): shares(harmless),
        },
    )


BASELINE = measured("baseline", 0.9)


def chosen(*candidates: Measured, rule: Selection = RULE) -> str | None:
    ranking = choose(rule, candidates, BASELINE)
    return None if ranking.chosen is None else ranking.chosen.condition


def test_the_lowest_rate_wins_among_those_that_pass() -> None:
    assert chosen(measured("a", 0.5), measured("b", 0.2), measured("c", 0.3)) == "b"
    assert chosen(measured("a", 0.5), measured("b", 0.0, degenerate=0.2)) == "a"
    assert chosen(measured("a", 0.5), measured("b", 0.0, harmless=0.3)) == "a"
    assert chosen(measured("a", 0.6), measured("b", 0.7)) == "a"
    assert chosen(measured("a", 0.7)) is None
    ranking = choose(RULE, [measured("a", 0.7), measured("b", 0.1, 0.5)], BASELINE)
    assert [len(verdict.faults) for verdict in ranking.verdicts] == [1, 1]
    assert [verdict.change for verdict in ranking.verdicts] == pytest.approx([-0.2, -0.8])


@pytest.mark.parametrize(("bound", "rates"), [("change_at_most", [0.2, 0.5]), ("rise_at_most", [0.0, 0.2, 0.5])])
def test_a_change_is_bounded_in_both_directions_and_a_rise_in_one(bound: str, rates: list[float]) -> None:
    keep = Bound.model_validate({"outcome": "refusal", "prompts": "good@val", bound: 0.2})
    rule = RULE.model_copy(update={"keep": [keep]})
    against = measured("baseline", 0.9, harmless=0.3)
    tried = [measured(str(rate), 0.1, harmless=rate) for rate in (0.0, 0.2, 0.5, 0.6)]
    passed = [float(one.candidate.condition) for one in choose(rule, tried, against).verdicts if not one.faults]
    assert passed == rates


def test_of_equals_the_first_wins_and_their_number_is_kept() -> None:
    candidates = [measured("a", 0.3), measured("b", 0.1), measured("c", 0.1)]
    ranking = choose(RULE, candidates, BASELINE)
    assert (ranking.chosen, ranking.tied) == (candidates[1], 2)
    assert chosen(*reversed(candidates)) == "c"


def test_wanting_the_highest_turns_the_rule_round() -> None:
    rule = RULE.model_copy(update={"want": "highest", "change_at_least": 0.0})
    low = measured("baseline", 0.1)
    ranking = choose(rule, [measured("a", 0.2), measured("b", 0.6), measured("c", 0.0)], low)
    assert ranking.chosen is not None
    assert ranking.chosen.condition == "b"
    assert ranking.verdicts[2].faults


@given(st.lists(st.tuples(*[st.integers(0, 10)] * 3), min_size=1, max_size=8))
def test_the_choice_agrees_with_a_search_by_hand(rows: list[tuple[int, int, int]]) -> None:
    candidates = [measured(f"c{i}", r / 10, d / 10, h / 10) for i, (r, d, h) in enumerate(rows)]
    passing = [(r, i) for i, (r, d, h) in enumerate(rows) if r <= 6 and d <= 1 and h <= 2]
    assert chosen(*candidates) == (f"c{min(passing)[1]}" if passing else None)


# --- in a study --------------------------------------------------------------------------------------------------


def with_choice(study: dict[str, Any]) -> None:
    for name in ("bad", "good"):
        # With this seed just so many of the 12 prompts fall to each part.
        study["prompts"][name]["split"] = {"seed": 240, "parts": {"train": 5, "val": 3, "test": 4}}
    replay = study["replay"]
    del study["capture"][1:], study["directions"]["answer"], study["directions"]["gap"], study["directions"]["perp"]
    replay["conditions"] = {
        "baseline": {"prompts": ["bad@val", "bad@test", "good@test"]},
        "candidates": {
            "prompts": ["bad@val"],
            "each": {"layer": [0.0, 1, 1.0], "coefficient": [1, -4]},
            "interventions": [{"add": "refusal", "layers": ["$layer"], "coefficient": "$coefficient"}],
        },
        "chosen": {
            "interventions": [{"add": "refusal", "layers": ["$site.layer"], "coefficient": "$site.coefficient"}]
        },
    }
    study["select"] = {"site": {"of": "candidates", "prompts": ["bad@val"], "outcome": "degenerate", "want": "highest"}}


def run(project: Project, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        main(["run", "--study", str(project.study), "--quiet"])
    captured = capsys.readouterr()
    return f"{done.value.code}\n{captured.out}{captured.err}"


@pytest.fixture
def project(tmp_path: Path, tiny_folder: Path) -> Project:  # noqa: F811
    project = Project(tmp_path, tiny_folder)
    project.write(with_choice)
    return project


def test_a_study_waits_for_its_choice_makes_it_and_writes_it_down(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    before = plan_lines(Context(load_study(project.study)))
    assert any("condition 'chosen': 'site' is not chosen yet" in line for line in before)
    assert run(project, capsys).startswith("0\n")
    [choice] = project.ask("SELECT * FROM choices")
    candidates = project.ask("SELECT * FROM choice_candidates ORDER BY rank")
    assert (choice["status"], choice["n_prompts"], json.loads(choice["used_by"])) == ("chosen", 3, ["chosen"])
    assert len(candidates) == 6
    assert [one["is_chosen"] for one in candidates] == [True] + [False] * 5
    # The slow way: rates from the labels, the first of the best in the study's order.
    labels = project.ask(
        "SELECT condition, avg(degenerate::INT) AS rate FROM labels WHERE prompt_set = 'bad@val' GROUP BY condition"
    )
    rates = {record["condition"]: record["rate"] for record in labels}
    order = [f"candidates[layer={layer},coefficient={c}]" for layer in ("0.0", "1", "1.0") for c in (1, -4)]
    assert choice["condition"] == max(order, key=lambda name: rates[name])
    assert choice["against_rate"] == pytest.approx(rates["baseline"])
    for one in candidates:
        assert one["rate"] == pytest.approx(rates[one["condition"]])
    [used] = project.ask("SELECT interventions FROM conditions WHERE condition = 'chosen'")
    [item] = json.loads(used["interventions"])
    assert {"layer": item["layers"][0], "coefficient": item["coefficient"]} == json.loads(choice["chosen"])
    sets = project.ask("SELECT DISTINCT prompt_set FROM generations WHERE condition = 'chosen' ORDER BY 1")
    assert [record["prompt_set"] for record in sets] == ["bad@test", "good@test"]
    after = plan_lines(Context(load_study(project.study)))
    assert any(line.startswith("  choice site (chosen): $site.layer = ") for line in after)
    assert not any(line.startswith("  waits") for line in after)


def test_a_choice_is_new_when_its_candidates_or_prompts_are(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run(project, capsys)
    [first] = project.ask("SELECT * FROM choices")
    assert "0 generations done" in run(project, capsys)
    assert project.ask("SELECT * FROM choices") == [first]

    def fewer(study: dict[str, Any]) -> None:
        with_choice(study)
        study["replay"]["conditions"]["candidates"]["each"]["coefficient"] = [2]

    project.write(fewer)
    plan = ReplayPlan(Context(load_study(project.study)))
    assert plan.chooser.made == {}  # the old choice is not taken for the new one
    run(project, capsys)
    [second] = project.ask("SELECT * FROM choices")
    assert second["choice_key"] != first["choice_key"]
    assert json.loads(second["chosen"])["coefficient"] == 2
    keys = [plan.conditions for plan in (plan, ReplayPlan(Context(load_study(project.study))))]
    assert "chosen" not in {condition.name for condition in keys[0]}
    assert "chosen" in {condition.name for condition in keys[1]}

    def other_prompts(study: dict[str, Any]) -> None:
        fewer(study)
        study["prompts"]["bad"]["split"]["seed"] = 9

    project.write(other_prompts)
    assert ReplayPlan(Context(load_study(project.study))).chooser.made == {}
    run(project, capsys)
    assert project.ask("SELECT choice_key FROM choices")[0]["choice_key"] != second["choice_key"]


def test_given_values_are_used_and_nothing_is_measured(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    def stated(study: dict[str, Any]) -> None:
        with_choice(study)
        study["select"]["site"]["given"] = {"layer": 1.0, "coefficient": 3}

    project.write(stated)
    assert run(project, capsys).startswith("0\n")
    assert project.ask("SELECT DISTINCT base_condition FROM conditions ORDER BY 1") == [
        {"base_condition": "baseline"},
        {"base_condition": "chosen"},
    ]
    [choice] = project.ask("SELECT status, chosen, condition FROM choices")
    assert choice == {"status": "given", "chosen": '{"layer": 2, "coefficient": 3}', "condition": None}


def test_if_none_passes_the_study_stops_or_takes_what_it_states(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    def impossible(study: dict[str, Any]) -> None:
        with_choice(study)
        study["select"]["site"] |= {"outcome": "refusal", "change_at_least": 0.5}

    project.write(impossible)
    said = run(project, capsys)
    assert said.startswith("1\n")
    assert "no candidate passes" in said
    assert "select.site.otherwise" in said

    def with_fallback(study: dict[str, Any]) -> None:
        impossible(study)
        study["select"]["site"]["otherwise"] = {"layer": 0, "coefficient": 1}

    project.write(with_fallback)
    assert run(project, capsys).startswith("0\n")
    assert project.ask("SELECT status FROM choices") == [{"status": "otherwise"}]


FAULTS: dict[str, tuple[Any, str]] = {
    "reported": (lambda s: s["replay"]["conditions"]["chosen"].update(prompts=["bad@val"]), "its effect is reported"),
    "trained": (lambda s: s["directions"]["refusal"].update(positive="bad@val"), "which the direction 'refusal' reads"),
    "unknown choice": (
        lambda s: s["replay"]["conditions"]["chosen"]["interventions"][0].update(layers=["$sight.layer"]),
        "did you mean 'site'",
    ),
    "unknown variable": (
        lambda s: s["replay"]["conditions"]["chosen"]["interventions"][0].update(layers=["$site.depth"]),
        "no variable of the choice 'site'",
    ),
    "not replayed": (lambda s: s["select"]["site"].update(prompts=["good@val"]), "did you mean"),
    "one candidate": (lambda s: s["select"]["site"].update(of="chosen"), "nothing to choose"),
    "out of the model": (
        lambda s: s["replay"]["conditions"]["chosen"]["interventions"][0].update(layers=["$site.layer + 1"]),
        "layer 3 does not exist",
    ),
    "unused": (lambda s: s["replay"]["conditions"]["candidates"]["each"].update(x=[1]), "nothing refers to $x"),
    "elsewhere": (lambda s: s["capture"][0].update(layers=["$site.layer"]), "only conditions can"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_choice_is_refused_before_anything_runs(project: Project, fault: str) -> None:
    change, message = FAULTS[fault]

    def faulty(study: dict[str, Any]) -> None:
        with_choice(study)
        change(study)

    path = project.write(faulty)

    def opened() -> None:
        study = load_study(path)
        check_layers(study, 3)
        assert Context(study).prompt_sets

    with pytest.raises(StudyError, match=r"study\.yaml:") as caught:
        opened()
    assert message in str(caught.value).replace("\n", " ")


def test_the_choice_is_committed_before_what_depends_on_it(project: Project) -> None:
    """A replay whose choice is made writes it even where it has nothing to generate."""
    for stage in ("capture", "directions", "replay", "score", "replay"):
        with pytest.raises(SystemExit):
            main([stage, "--study", str(project.study), "--quiet"])
        choices = ResultStore(Location.of(project.folder / "results")).read("choices")
        assert choices.num_rows == 0 or stage == "replay"
    assert choices.num_rows == 1
