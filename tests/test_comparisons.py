"""Paired comparisons: the same as McNemar with one text a prompt, honest with several, and as the study plans them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_choices import run
from test_jobs import Project, tiny_folder  # noqa: F401 (a fixture)

from analysis.comparisons import Counts, compare, paired_difference, share_interval, sign_flip, within_prompt
from analysis.statistics import benjamini_hochberg, holm, mcnemar, rank_test, wilson_interval
from store.errors import StudyError
from store.location import Location
from store.results import ResultStore
from store.study import Replay
from store.study_checks import pairs
from store.study_expand import expand_conditions
from store.study_file import load_study
from store.study_select import Comparison

pairs_of_bits = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@given(pairs_of_bits)
def test_the_sign_flip_test_of_yes_or_no_is_mcnemars(rows: list[tuple[int, int]]) -> None:
    first, second = (np.array([row[i] for row in rows], dtype=bool) for i in (0, 1))
    expected = mcnemar(first, second)
    assert sign_flip([a - b for a, b in rows]) == pytest.approx(expected.p_exact)
    result = compare(Counts([row[0] for row in rows], 1), Counts([row[1] for row in rows], 1))
    assert (result.test, result.p_exact, result.p_corrected) == ("mcnemar", expected.p_exact, expected.p_corrected)
    assert (result.only_first, result.only_second) == (expected.only_first, expected.only_second)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_the_sign_flip_test_counts_every_flip(differences: list[int]) -> None:
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    assert sign_flip(differences) == pytest.approx(np.mean([value >= observed for value in sums]))


@given(pairs_of_bits)
def test_exchanging_single_texts_within_prompts_is_mcnemars_test(rows: list[tuple[int, int]]) -> None:
    first, second = (Counts([row[i] for row in rows], 1) for i in (0, 1))
    assert within_prompt(first, second) == pytest.approx(mcnemar(first.shares > 0, second.shares > 0).p_exact)


def test_exchanging_texts_within_prompts_counts_every_exchange() -> None:
    """One text against three, on three prompts: 4^3 ways to say which text is the first side's."""
    texts = [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]]  # of each prompt: the first side's, then the second's
    first, second = Counts([row[0] for row in texts], 1), Counts([sum(row[1:]) for row in texts], 3)
    observed = abs(sum(row[0] - sum(row[1:]) / 3 for row in texts))
    sums = [
        abs(sum(row[i] - (sum(row) - row[i]) / 3 for row, i in zip(texts, chosen, strict=True)))
        for chosen in product(range(4), repeat=3)
    ]
    assert within_prompt(first, second) == pytest.approx(np.mean([value >= observed - 1e-9 for value in sums]))


def test_the_rank_test_counts_ties_against_the_effect() -> None:
    assert rank_test(0.5, [0.1] * 20) == (0, 1 / 21)
    assert rank_test(-0.5, [0.1] * 18 + [0.5, -0.6]) == (2, 3 / 21)
    assert rank_test(0.0, [0.0] * 20) == (20, 1.0)
    with pytest.raises(ValueError, match="at least one control"):
        rank_test(0.5, [])


def test_benjamini_and_hochberg_are_never_above_holm() -> None:
    p = [0.01, 0.04, 0.03, 0.5]
    assert benjamini_hochberg(p) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert (benjamini_hochberg(p) <= holm(p) + 1e-12).all()


def newcombe(e: int, f: int, g: int, h: int) -> tuple[float, float, float]:
    """Method 10 as the article writes it: e both, f first only, g second only, h neither."""
    n = e + f + g + h
    a, b = wilson_interval(e + f, n), wilson_interval(e + g, n)
    numerator = e * h - f * g
    if numerator > n / 2:
        numerator = numerator - n / 2
    elif numerator >= 0:
        numerator = 0.0
    product_ = (e + f) * (g + h) * (e + g) * (f + h)
    phi = numerator / product_**0.5 if product_ else 0.0
    dl, du = a.estimate - a.low, b.high - b.estimate
    el, eu = b.estimate - b.low, a.high - a.estimate
    theta = (f - g) / n
    low = theta - max(0.0, dl**2 - 2 * phi * dl * du + du**2) ** 0.5
    return theta, low, theta + max(0.0, el**2 - 2 * phi * el * eu + eu**2) ** 0.5


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(lambda cells: sum(cells) > 0))
def test_the_interval_is_that_of_the_article(cells: tuple[int, int, int, int]) -> None:
    e, f, g, h = cells
    first = np.array([1.0] * (e + f) + [0.0] * (g + h))
    second = np.array([1.0] * e + [0.0] * f + [1.0] * g + [0.0] * h)
    found = paired_difference(first, second)
    theta, low, high = newcombe(e, f, g, h)
    assert (found.estimate, found.low, found.high) == pytest.approx((theta, max(-1.0, low), min(1.0, high)), abs=1e-9)
    swapped = paired_difference(second, first)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    assert found.low <= found.estimate <= found.high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(1000):
        both, only = random.random(48) < 0.6, random.random(48) < 0.3
        first, second = (both | only).astype(float), both.astype(float)
        interval = paired_difference(first, second)
        covered += interval.low <= 0.3 * 0.4 <= interval.high
    assert covered >= 930


def test_no_difference_at_all_still_has_an_interval() -> None:
    interval = paired_difference(np.zeros(64), np.zeros(64))
    assert interval.estimate == 0
    assert interval.low == -interval.high
    assert 0.02 < interval.high < 0.1


def test_repeated_texts_of_a_prompt_are_no_further_prompts() -> None:
    hits, other = [1, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0]
    once = compare(Counts(hits, 1), Counts(other, 1))
    four = compare(Counts([4 * hit for hit in hits], 4), Counts([4 * hit for hit in other], 4))
    assert four.p_exact == pytest.approx(once.p_exact)
    assert four.difference == once.difference
    assert four.first == once.first
    assert (once.test, four.test) == ("mcnemar", "sign_flip")


@given(st.integers(1, 50), st.floats(0, 1))
def test_the_interval_of_a_share_lies_between_those_of_its_neighbours(n: int, rate: float) -> None:
    found = share_interval(rate, n)
    assert found.low <= rate + 1e-12
    assert found.high >= rate - 1e-12
    below, above = wilson_interval(int(rate * n), n), wilson_interval(min(n, int(rate * n) + 1), n)
    assert below.low - 1e-9 <= found.low <= above.low + 1e-9
    assert below.high - 1e-9 <= found.high <= above.high + 1e-9


def conditions() -> Replay:
    add = {"layers": [1], "coefficient": "$coefficient"}
    sweep = {"coefficient": [1, 2]}
    return Replay.model_validate(
        {
            "prompts": ["p"],
            "conditions": {
                "baseline": {},
                "persona": {"each": sweep, "interventions": [{"add": "a", **add}]},
                "random": {"each": {"seed": [7, 13], **sweep}, "interventions": [{"add": "r_$seed", **add}]},
            },
        }
    )


def named(**spec: Any) -> list[tuple[str, int, str, int]]:
    found = pairs(Comparison.model_validate({"prompts": "p", **spec}), expand_conditions(conditions()))
    return [(a.name, len(a.members), b.name, len(b.members)) for a, b in found]


def test_a_name_stands_for_its_sweep_and_its_seeds_are_pooled() -> None:
    assert named(first="persona", second="baseline") == [
        ("persona[coefficient=1]", 1, "baseline", 1),
        ("persona[coefficient=2]", 1, "baseline", 1),
    ]
    assert named(first="persona", second="random") == [
        ("persona[coefficient=1]", 1, "random[coefficient=1]", 2),
        ("persona[coefficient=2]", 1, "random[coefficient=2]", 2),
    ]
    assert named(first="random", second="baseline", pool=[])[0] == ("random[seed=7,coefficient=1]", 1, "baseline", 1)
    assert named(first="random[seed=7,coefficient=1]", second="persona[coefficient=1]") == [
        ("random[seed=7,coefficient=1]", 1, "persona[coefficient=1]", 1)
    ]
    with pytest.raises(ValueError, match="several partners"):
        named(first="baseline", second="persona")
    with pytest.raises(ValueError, match="with itself"):
        named(first="baseline", second="baseline")


def compared(study: dict[str, Any]) -> None:
    del study["capture"][1:], study["directions"]["answer"], study["directions"]["gap"], study["directions"]["perp"]
    study["directions"]["random_7"] = study["directions"].pop("random")
    study["directions"]["random_8"] = {**study["directions"]["random_7"], "seed": 8}
    out = {"layers": [1], "coefficient": -6}
    study["replay"]["conditions"] = {
        "baseline": {},
        "away": {"interventions": [{"add": "refusal", **out}]},
        "random": {"each": {"seed": [7, 8]}, "interventions": [{"add": "random_$seed", **out}]},
    }
    study["comparisons"] = {
        "away": {"first": "away", "second": "baseline", "prompts": "bad@test", "outcome": "degenerate"},
        "control": {"first": "away", "second": "random", "prompts": ["bad@test", "good@test"], "outcome": "degenerate"},
    }


@pytest.fixture
def project(tmp_path: Path, tiny_folder: Path) -> Project:  # noqa: F811
    project = Project(tmp_path, tiny_folder)
    project.write(compared)
    return project


def test_a_study_makes_its_comparisons_and_counts_what_is_missing(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project, capsys).startswith("0\n")
    rows = project.ask("SELECT * FROM comparisons ORDER BY comparison, prompt_set")
    assert [(row["comparison"], row["second"], row["second_repeats"], row["test"]) for row in rows] == [
        ("away", "baseline", 1, "mcnemar"),
        ("control", "random", 2, "within_prompt"),
        ("control", "random", 2, "within_prompt"),
    ]
    assert [row["p_holm"] for row in rows] == pytest.approx(holm([row["p_exact"] for row in rows]).tolist())
    assert {(row["n_prompts"], row["n_pairs"], row["n_left_out"], row["n_family"]) for row in rows} == {(4, 4, 0, 3)}
    # The slow way, from the labels: means over prompts.
    rates = project.ask(
        "SELECT base_condition, avg(degenerate::INT) AS r FROM labels WHERE prompt_set = 'bad@test' GROUP BY ALL"
    )
    expected = {record["base_condition"]: record["r"] for record in rates}
    assert rows[1]["first_rate"] == pytest.approx(expected["away"])
    assert rows[1]["second_rate"] == pytest.approx(expected["random"])
    assert rows[1]["difference"] == pytest.approx(expected["away"] - expected["random"])

    # A judge that failed on one text takes its prompt out of both sides.
    results = ResultStore(Location.of(project.folder / "results"))
    [text] = project.ask(
        "SELECT generation_key FROM generations WHERE condition = 'away' AND prompt_set = 'bad@test' ORDER BY 1 LIMIT 1"
    )
    table = results.read("scores")
    keep = [key != text["generation_key"] for key in table["generation_key"].to_pylist()]
    for name in [*results.committed("scores")]:
        (results.location / "scores" / "_commits" / f"{name}.json").remove()
    results.write_block("scores", "without_one", table.filter(keep))
    from jobs.compare import run as compare_stage
    from jobs.context import Context
    from jobs.progress import Progress

    compare_stage(Context(load_study(project.study)), None, Progress(quiet=True))  # type: ignore[arg-type]
    row = project.ask("SELECT * FROM comparisons WHERE comparison = 'away'")[0]
    assert (row["n_prompts"], row["n_pairs"], row["n_left_out"]) == (4, 3, 1)


def ranked(study: dict[str, Any]) -> None:
    compared(study)
    for seed in range(9, 27):
        study["directions"][f"random_{seed}"] = {**study["directions"]["random_7"], "seed": seed}
    study["replay"]["conditions"]["random"]["each"]["seed"] = list(range(7, 27))
    study["comparisons"]["away"] |= {"among": "random", "family": "ranked"}


def test_an_effect_is_ranked_among_random_directions(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Pooled, four random directions were taken for as many texts of a prompt, however they differed."""
    project.write(ranked)
    assert run(project, capsys).startswith("0\n")
    [row] = project.ask("SELECT * FROM comparisons WHERE comparison = 'away'")
    rates = {
        record["condition"]: record["r"]
        for record in project.ask(
            "SELECT condition, avg(degenerate::INT) AS r FROM labels WHERE prompt_set = 'bad@test' GROUP BY ALL"
        )
    }
    effect = abs(rates["away"] - rates["baseline"])
    as_far = sum(abs(rates[f"random[seed={seed}]"] - rates["baseline"]) >= effect - 1e-9 for seed in range(7, 27))
    assert (row["among"], row["n_among"], row["n_as_far"], row["reported"]) == ("random", 20, as_far, "rank")
    assert row["p_rank"] == row["p_reported"] == row["p_holm"] == row["p_bh"] == (1 + as_far) / 21
    assert row["test"] == "mcnemar"
    others = project.ask("SELECT * FROM comparisons WHERE comparison <> 'away'")
    assert all((other["reported"], other["p_reported"]) == ("paired", other["p_exact"]) for other in others)
    assert all(other["p_rank"] is None for other in others)


def test_too_few_random_conditions_to_rank_among_are_refused(project: Project) -> None:
    def few(study: dict[str, Any]) -> None:
        ranked(study)
        study["replay"]["conditions"]["random"]["each"]["seed"] = [7, 8, 9, 10]

    with pytest.raises(StudyError, match="p cannot be below 1/5"):
        load_study(project.write(few))

    def pooled(study: dict[str, Any]) -> None:
        ranked(study)
        study["comparisons"]["away"]["first"] = "random"

    with pytest.raises(StudyError, match="pools 20 conditions"):
        load_study(project.write(pooled))


def test_a_comparison_that_cannot_be_made_is_refused(project: Project) -> None:
    def change(study: dict[str, Any]) -> None:
        compared(study)
        study["comparisons"]["away"]["prompts"] = "bad@train"

    with pytest.raises(StudyError, match="replayed prompt set"):
        load_study(project.write(change))
