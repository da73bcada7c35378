"""The report: one page that stands alone, shows what is there, says what is not, and never trusts a text."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Iterable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from analysis import page, plots
from analysis.layer_plots import layer_heatmap
from jobs.report import add_arguments, report_page, run
from jobs.report_source import Source, with_controls
from jobs.report_sql import AUROC
from store.errors import MismatchError, MissingDataError, StudyError
from store.location import Location
from store.results import ResultStore
from store.schemas import TABLES
from store.sql import connect, query

MODEL, OTHER = "a" * 64, "b" * 64
EVIL = '</pre><script>alert("x")</script><img src=https://evil.example/x.png onerror=alert(1)>\x00 & $x^2$'
LAYERS = range(6)
TOKENS = 5
SECTIONS = [
    *("refusals", "sweeps", "cosines", "alignments", "nulls", "explained_variance"),
    *("directions", "projections", "separability", "monitored", "texts"),
]
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """What a browser would find: elements, attributes, nesting, text by section."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = "head"
        self.texts: dict[str, list[str]] = {"head": []}
        self.figures: dict[str, int] = {}
        self.queries: list[str] = []
        self.missing: dict[str, list[str]] = {}
        self.collecting: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "section":
            self.section = str(attributes["id"])
            self.texts[self.section] = []
        if tag == "svg":
            self.figures[self.section] = self.figures.get(self.section, 0) + 1
        if tag == "code":
            self.queries.append("")
            self.collecting = self.queries
        if attributes.get("class") == "missing":
            self.collecting = self.missing.setdefault(self.section, [])
            self.collecting.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        if tag in ("code", "p"):
            self.collecting = None

    def handle_data(self, data: str) -> None:
        self.texts[self.section].append(data)
        if self.collecting is not None:
            self.collecting[-1] += data

    def text(self, section: str) -> str:
        return "".join(self.texts[section])


def put(results: ResultStore, table: str, rows: Iterable[dict[str, Any]], name: str = "s") -> None:
    results.replace(table, name, pa.Table.from_pylist(list(rows), schema=TABLES[table]))


def put_prompts(results: ResultStore, sets: dict[str, int], study: str = "s") -> None:
    """Prompt sets of given sizes; prompt 0 of each is hostile."""
    members, prompts, rows = [], [], []
    for name, count in sets.items():
        for i in range(count):
            key = f"{name}-{i}"
            content = EVIL if i == 0 else f"question {i} of {name}"
            messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
            ids = {"prompt_id": key, "row_key": f"row-{key}"}
            members.append({"study": study, "prompt_set": name, "model": MODEL, "responses": None, **ids})
            prompts.append({"prompt_id": key, "messages": json.dumps(messages), "text": content, "tags": "{}"})
            lengths = {"n_tokens": 9, "prompt_length": 9, "response_end": 9}
            rows.append({"model": MODEL, "source": "prompt", **ids, **lengths})
    put(results, "memberships", members, study)
    put(results, "prompts", prompts, study)
    put(results, "rows", rows, study)
    model = {"model": MODEL, "source": "org/chat <b>", "dtype": "float32", "n_layers": 6, "d_model": 64}
    put(results, "models", [{**model, "family": "llama", "receipt": '{"spread": 0.5}'}], "m")


def put_directions(results: ResultStore, names: Iterable[str], study: str = "s") -> None:
    names = list(names)
    random = np.random.default_rng(0)
    common = {"study": study, "model": MODEL, "component": "resid_post"}
    directions = [
        {
            **common,
            **{"direction": name, "direction_key": f"key-{name}", "method": "difference_of_means", "layer": layer},
            **{"position": "prompt_end", "vector": [1.0], "norm": 1.5**layer * (1 + i), "n_positive": 8},
            **{"n_negative": 8, "split_half_cosine": 0.9 - 0.05 * i if i < 2 else None, "provenance": "{}"},
        }
        for i, name in enumerate(names)
        for layer in LAYERS
    ]
    put(results, "directions", directions, study)
    cosines = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            walk = np.clip(np.cumsum(random.normal(0, 0.25, len(LAYERS))), -1, 1)
            for first, second in ((a, b), (b, a)):
                cosines += [
                    {
                        **common,
                        **{"layer": layer, "direction_a": first, "direction_b": second, "cosine": walk[layer]},
                        **{"direction_key_a": f"key-{first}", "direction_key_b": f"key-{second}"},
                        **{"position_a": "prompt_end", "position_b": "prompt_end"},
                    }
                    for layer in LAYERS
                ]
    put(results, "cosines", cosines, study)


def put_structure(results: ResultStore, names: Iterable[str], study: str = "s") -> None:
    """Alignments, nulls, explained variance and separability of directions, one of them not held out."""
    names = list(names)
    random = np.random.default_rng(3)
    common = {"model": MODEL, "component": "resid_post", "seed": 0}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i:]]
    alignments = [
        {
            **{"study": study, "model": MODEL, "direction_a": a, "direction_b": b, "layer_a": i, "layer_b": j},
            **{"direction_key_a": f"key-{a}", "direction_key_b": f"key-{b}", "cosine": random.uniform(-1, 1)},
            **{"component_a": "resid_post", "component_b": "resid_post"},
        }
        for a, b in pairs[:3]
        for i in LAYERS
        for j in LAYERS
    ]
    put(results, "alignments", alignments, study)
    nulls = [
        {
            **common,
            **{"block_key": f"n{layer}", "layer": layer, "direction_a": a, "direction_b": b, "null": null},
            **{"direction_key_a": f"key-{a}", "direction_key_b": f"key-{b}", "cosine": 0.5 - 0.2 * layer},
            **{"q025": -width, "q500": 0.0, "q975": width, "p_value": 0.01, "p_holm": 0.02 * layer, "draws": 1000},
        }
        for null, width in (("random", 0.08), ("permuted_labels", 0.3))
        for a, b in pairs
        if a != b
        for layer in LAYERS
    ]
    explained = [
        {
            **common,
            **{"block_key": f"e{layer}", "layer": layer, "rank": rank, "share": 0.5**rank, "low": 0.4**rank},
            **{"high": 0.6**rank, "bootstrap_mean": 0.52**rank, "cumulative": 1 - 0.5**rank, "n_directions": 9},
            **{"cumulative_low": 0.9 - 0.5**rank, "cumulative_high": 1 - 0.4**rank, "n_kept": 8 - layer % 2},
            **{"duplicates": '{"<b>": "refusal"}', "resamples": 1000, "confidence": 0.95},
        }
        for layer in LAYERS
        for rank in range(1, 6)
    ]
    separability = [
        {
            **common,
            **{"block_key": f"s{layer}", "layer": layer, "direction": name, "direction_key": f"key-{name}"},
            **{"position": "prompt_end", "n_positive": 7, "n_negative": 6, "n_training": 3 * i},
            **{"auc": 0.6 + 0.05 * layer, "auc_low": 0.5, "auc_high": 0.95, "d_prime": 0.1 * layer if layer else None},
            **{"d_prime_low": 0.0 if layer else None, "d_prime_high": 0.9 if layer else None},
            **{"resamples": 1000, "confidence": 0.95},
        }
        for i, name in enumerate(names)
        for layer in LAYERS
    ]
    analyses = []
    for table, rows in (("cosine_nulls", nulls), ("explained_variance", explained), ("separability", separability)):
        for key in sorted({str(row["block_key"]) for row in rows}):
            results.write_block(
                table, key, pa.Table.from_pylist([r for r in rows if r["block_key"] == key], TABLES[table])
            )
            analyses.append({"study": study, "model": MODEL, "kind": table, "analysis": "all <i>", "block_key": key})
    put(results, "analyses", analyses, study)


def put_projections(results: ResultStore, sets: dict[str, int], names: Iterable[str]) -> None:
    random = np.random.default_rng(1)
    rows = [
        {
            **{"model": MODEL, "row_key": f"row-{prompts}-{i}", "direction": name, "direction_key": f"key-{name}"},
            **{"component": "resid_post", "layer": layer, "position": "prompt_end", "norm": 3.0},
            # Rounded, so that there are ties.
            "projection": round(float(random.normal(layer * (1 if "harmful" in prompts else -0.2), 1.5)), 1),
        }
        for name in names
        for prompts, count in sets.items()
        for i in range(count)
        for layer in LAYERS
    ]
    put(results, "projections", rows, "p")


def put_replay(
    results: ResultStore, conditions: list[dict[str, Any]], sets: dict[str, int], scored: bool = True, study: str = "s"
) -> None:
    """Every condition on every prompt, texts, monitored projections and (of all but prompt 1) scores."""
    asked, texts, monitored, scores = [], [], [], []
    random = np.random.default_rng(2)
    full = []
    for number, given in enumerate(conditions):
        condition = {
            **{"study": study, "model": MODEL, "condition_key": f"key-{given['condition']}", "decoding_key": "greedy"},
            **{"base_condition": given["condition"], "control_of": None, "coefficient": None},
            **{"interventions": "[]", "decoding": '{"max_new_tokens": 5}'},
            **given,
        }
        full.append(condition)
        for prompts, count in sets.items():
            for i in range(count):
                ids = {"row_key": f"row-{prompts}-{i}", "prompt_id": f"{prompts}-{i}"}
                how = {"condition_key": condition["condition_key"], "decoding_key": "greedy", "model": MODEL, "seed": 0}
                asked.append({"study": study, "prompt_set": prompts, "condition": condition["condition"], **ids, **how})
                key = f"{number}/{prompts}/{i}"
                texts.append(
                    {
                        **{"generation_key": key, "study": study, **ids, **how, "token_ids": [1] * TOKENS},
                        **{"text": EVIL if i == 0 else f"answer {i}", "n_tokens": TOKENS},
                        **{"finish_reason": "length", "code_version": "1", "transformers_version": "5"},
                        **{"torch_version": "2", "created": datetime(2026, 1, 2, tzinfo=UTC)},
                    }
                )
                for layer in (2, 4):
                    where = {"direction": "refusal", "direction_key": "key-refusal", "component": "resid_post"}
                    monitored += [
                        {
                            **{"generation_key": key, **where, "layer": layer, "token_index": token},
                            "projection": number + layer + float(random.normal()),
                        }
                        for token in range(TOKENS - i % 2)
                    ]
                refused = bool(random.random() < (0.8 if number % 3 == 0 else 0.2))
                label = None if i == 1 else "refusal" if refused else "no_refusal"
                value = None if label is None else float(refused)
                score = {"generation_key": key, "judge": "refusal_phrases", "judge_version": "1", "value": value}
                scores.append({**score, "label": label, "detail": None, "error": "late" if label is None else None})
                degenerate = {"judge": "degenerate", "label": "intact", "value": 0.0, "error": None}
                scores.append({**score, **degenerate, "detail": None})
    put(results, "conditions", full, study)
    put(results, "replay_rows", asked, study)
    put(results, "generations", texts, study)
    put(results, "monitored", monitored, study)
    if scored:
        put(results, "scores", scores, study)


def conditions(extra: int = 0) -> list[dict[str, Any]]:
    add = [{"add": "persona", "layers": [0.5], "component": "resid_post", "coefficient": 1.0, "norm": "natural"}]
    out = json.dumps([{"project_out": ["refusal"], "layers": "all", "component": "resid_post", "tokens": "all"}])
    swept = [
        {"condition": f"steer[coefficient={c:g}]", "base_condition": "steer", "coefficient": c, "interventions": i}
        for c in (0.5, 1.0, 2.0)
        for i in [json.dumps(add)]
    ]
    control = {"condition": "random_add", "control_of": "steer", "interventions": out}
    more = [
        {"condition": f"persona_add_project_out_at_a_late_layer_number_{i}", "interventions": out} for i in range(extra)
    ]
    return [
        {"condition": "baseline"},
        control,
        *swept,
        {"condition": "<i>out</i> $a$ $b$", "interventions": out},
        *more,
    ]


SETS = {"harmful@test": 7, "harmless@test": 6}
NAMES = ["refusal", "persona", "random_7"]


@pytest.fixture
def results(tmp_path: Path) -> ResultStore:
    return ResultStore(Location.of(tmp_path / "results"))


def fill(results: ResultStore) -> ResultStore:
    put_prompts(results, SETS)
    put_directions(results, NAMES)
    put_projections(results, SETS, NAMES)
    put_structure(results, NAMES)
    put_replay(results, conditions(), SETS)
    return results


@pytest.fixture
def whole(results: ResultStore) -> ResultStore:
    return fill(results)


@pytest.fixture
def small(results: ResultStore) -> ResultStore:
    """One condition without scores: a page in no time."""
    put_prompts(results, SETS)
    put_replay(results, [{"condition": "baseline"}], SETS, scored=False)
    return results


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    """Results with everything, for tests that only read."""
    return fill(ResultStore(Location.of(tmp_path_factory.mktemp("whole") / "results")))


@pytest.fixture(scope="module")
def content(unchanged: ResultStore) -> str:
    """The page about `unchanged`."""
    return make(unchanged)


def make(results: ResultStore, study: str = "s", model: str = MODEL) -> str:
    connection = connect(results.location)
    try:
        return report_page(Source(connection, results.location, study, model))
    finally:
        connection.close()


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(item) for item in given])


def test_every_section_is_drawn_when_all_data_is_there(content: str) -> None:
    found = Page(content)
    assert [attributes["id"] for tag, attributes in found.elements if tag == "section"] == SECTIONS
    assert found.missing == {}
    assert set(found.figures) == set(SECTIONS) - {"texts"}
    assert found.figures["projections"] == len(NAMES)
    head = found.text("head")
    for expected in ("org/chat <b>", MODEL, "float32", "transformers 5", "max_new_tokens", "spread"):
        assert expected in head
    assert "late" not in found.text("texts")  # why a judge failed is no verdict
    assert "unscored" in found.text("texts")


def test_the_page_refers_to_nothing_outside_itself_and_runs_nothing(content: str) -> None:
    found = Page(content)
    assert not {"script", "link", "iframe", "object", "embed", "img", "image", "base", "form"} & {
        tag for tag, _ in found.elements
    }
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in found.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            assert key not in ("src", "srcset", "action", "xlink:href")
            if key == "href":
                assert str(value).startswith("#"), (tag, value)
                assert str(value)[1:] in ids
            if key in ("style", "clip-path") and "url(" in str(value):
                assert f"url(#{str(value).partition('url(#')[2].partition(')')[0]})" in str(value)
                assert str(value).partition("url(#")[2].partition(")")[0] in ids
    policies = [attributes["content"] for _, attributes in found.elements if "http-equiv" in attributes]
    assert policies == [page.POLICY]
    assert "http" not in page.STYLE


def test_a_script_in_a_text_or_a_name_stays_text(content: str) -> None:
    assert "<script" not in content
    assert "<img" not in content
    assert "\x00" not in content
    shown = Page(content).text("texts")
    # Once per condition, and once as the prompt's words behind it.
    assert shown.count(EVIL.replace("\x00", "\ufffd")) >= len(conditions())
    assert "<i>out</i> $a$ $b$" in Page(content).text("refusals")


def test_every_query_on_the_page_runs_again(unchanged: ResultStore, content: str) -> None:
    found = Page(content)
    assert len(found.queries) >= 10
    connection = connect(unchanged.location)
    for sql in found.queries:
        assert query(connection, sql).num_rows > 0, sql


def test_a_page_is_the_same_each_time_but_for_its_date(unchanged: ResultStore, content: str) -> None:
    lines = zip(content.splitlines(), make(unchanged).splitlines(), strict=True)
    assert all("UTC" in one for one, two in lines if one != two)


def test_a_section_without_data_says_what_makes_it(results: ResultStore) -> None:
    put_prompts(results, SETS)
    found = Page(make(results))
    assert set(found.missing) == set(SECTIONS)
    assert found.figures == {}
    assert "resid replay --study FILE" in found.missing["refusals"][0]
    assert "resid geometry" in found.missing["cosines"][0]
    assert "resid directions" in found.missing["directions"][0]
    assert "replay.monitor" in found.missing["monitored"][0]
    connection = connect(results.location)
    for sql in found.queries:
        query(connection, sql)


def test_texts_without_scores_ask_for_the_score_stage_and_are_shown(results: ResultStore) -> None:
    put_prompts(results, SETS)
    put_replay(results, conditions(), SETS, scored=False)
    found = Page(make(results))
    assert "resid score" in found.missing["refusals"][0]
    assert "not scored yet" in found.missing["sweeps"][0]
    assert "texts" not in found.missing
    assert "unscored" in found.text("texts")


def test_conditions_without_a_sweep_have_no_sweep(results: ResultStore) -> None:
    put_prompts(results, SETS)
    put_replay(results, [{"condition": "baseline"}], SETS)
    found = Page(make(results))
    assert "list of coefficients" in found.missing["sweeps"][0]
    assert found.figures["refusals"] == 1


def test_counts_beside_a_rate_are_those_of_the_view(unchanged: ResultStore, content: str) -> None:
    found = Page(content)
    [row] = query(
        connect(unchanged.location), "FROM refusal_rates WHERE condition = 'baseline' AND prompt_set = 'harmful@test'"
    ).to_pylist()
    assert (row["n"], row["n_scored"]) == (7, 6)
    assert f"{row['n_refused']}/6  (1 unscored)" in found.text("refusals")
    assert f"{row['low']:.1%} to {row['high']:.1%}" in found.text("refusals")


def test_controls_follow_what_they_control() -> None:
    def condition(name: str, control_of: str | None = None, base: str | None = None) -> dict[str, Any]:
        return {"condition": name, "base_condition": base or name, "control_of": control_of}

    given = [
        condition("random", "steer"),
        condition("baseline"),
        condition("steer[1]", base="steer"),
        condition("steer[2]", base="steer"),
        condition("of_one", "steer[1]"),
        condition("of_random", "random"),
        condition("lost", "nowhere"),
        condition("x", "y"),
        condition("y", "x"),
    ]
    placed = [(record["condition"], depth) for record, depth in with_controls(given)]
    assert placed == [
        ("baseline", 0),
        ("steer[1]", 0),
        ("of_one", 1),
        ("steer[2]", 0),
        ("random", 1),
        ("of_random", 2),
        ("lost", 0),
        ("x", 0),
        ("y", 1),
    ]


def test_auroc_in_sql_equals_the_one_of_scikit_learn_with_ties(unchanged: ResultStore) -> None:
    connection = connect(unchanged.location)
    source = Source(connection, unchanged.location, "s", MODEL)
    order = "['harmful@test', 'harmless@test']"
    answers = source.ask(source.sql(AUROC, chosen="true", order=order))
    assert len(answers) == len(NAMES) * len(LAYERS)
    for answer in answers:
        rows = source.ask(
            f"SELECT row_key, projection FROM projections WHERE direction = '{answer['direction']}' "
            f"AND layer = {answer['layer']}"
        )
        positive = ["harmful" in row["row_key"] for row in rows]
        expected = roc_auc_score(positive, [row["projection"] for row in rows])
        assert answer["auroc"] == pytest.approx(expected, abs=1e-12)
        assert (answer["n_a"], answer["n_b"]) == (7, 6)


def test_sets_that_share_rows_or_are_projected_in_part_are_not_compared(whole: ResultStore) -> None:
    members = whole.read("memberships").to_pylist()
    both = [{**member, "prompt_set": "harmful"} for member in members if member["prompt_set"] == "harmful@test"]
    part = [{**members[0], "prompt_set": "wide"}, {**members[0], "prompt_set": "wide", "row_key": "never projected"}]
    put(whole, "memberships", [*members, *both, *part])
    table = Page(make(whole)).text("projections")
    assert "harmful above harmless@test" in table
    assert "harmful above harmful@test" not in table
    assert "n = 7" in table
    assert "wide (n" not in table


def test_projections_of_another_study_and_model_stay_out(whole: ResultStore) -> None:
    strange = [{**row, "model": OTHER} for row in whole.read("projections").to_pylist()]
    put(whole, "projections", strange, "other")
    alone = Page(make(whole)).text("projections")
    assert "n = 7" in alone
    assert "n = 14" not in alone


def test_many_pairs_of_directions_also_become_a_matrix(results: ResultStore) -> None:
    put_prompts(results, SETS)
    put_directions(results, [f"direction_{i}" for i in range(8)])
    found = Page(make(results))
    assert found.figures["cosines"] == 2
    assert "the first 12 of 28 pairs" in found.text("cosines")


def test_the_command_writes_beside_local_results_and_prints_where(
    small: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments("--results", small.location, "--study-name", "s")) == 0
    target = small.location.path / "reports" / "s.html"
    assert str(target) in capsys.readouterr().out
    assert "texts" not in Page(target.read_text()).missing
    assert small.verify() == []  # a page among the results is none of them


def test_the_only_study_needs_no_name_and_the_output_can_be_chosen(small: ResultStore, tmp_path: Path) -> None:
    assert run(arguments("--results", small.location, "--output", tmp_path / "x" / "page.html")) == 0
    assert (tmp_path / "x" / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_a_study_that_is_not_there_is_an_error_that_names_those_that_are(small: ResultStore, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"nothing of study 'nope' \(studies there: s\)"):
        run(arguments("--results", small.location, "--study-name", "nope"))
    with pytest.raises(StudyError, match="cannot name a study"):
        run(arguments("--results", small.location, "--study-name", "../s"))
    with pytest.raises(MissingDataError, match="no study"):
        run(arguments("--results", tmp_path / "empty"))


def test_several_models_of_a_study_are_never_mixed(small: ResultStore, tmp_path: Path) -> None:
    moved = [{**row, "model": OTHER, "study": "s"} for row in small.read("conditions").to_pylist()]
    put(small, "conditions", [*small.read("conditions").to_pylist(), *moved])
    with pytest.raises(MismatchError, match="--model"):
        run(arguments("--results", small.location))
    output = ("--output", tmp_path / "page.html")
    run(arguments("--results", small.location, "--model", "bbb", *output))
    assert OTHER in (tmp_path / "page.html").read_text()
    note = json.dumps({"identity": {"fingerprint": OTHER}}).encode()
    (small.location / "studies" / "s.json").write(note)
    run(arguments("--results", small.location, *output))
    assert OTHER in (tmp_path / "page.html").read_text()
    run(arguments("--results", small.location, "--model", "aaa", *output))
    assert "has since moved" in (tmp_path / "page.html").read_text()


def test_a_study_file_gives_its_description_and_the_prompt_sets_it_projects(whole: ResultStore, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    file = tmp_path / "s.yaml"
    file.write_text(
        "name: s\ndescription: What <this> is about.\nmodel: {source: org/name}\n"
        "prompts:\n  harmful: {path: p.jsonl, split: {parts: {test: 1, train: 1}}}\n"
        "capture:\n  - {prompts: [harmful@test, harmful@train]}\n"
        "directions:\n  refusal: {positive: harmful@train, negative: harmful@test}\n"
        "geometry: {projections: [{prompts: [harmful@test]}]}\n"
    )
    run(arguments("--results", whole.location, "--study", file))
    found = Page((whole.location.path / "reports" / "s.html").read_text())
    assert "What <this> is about." in found.text("head")
    assert "harmless@test" not in found.text("projections").partition("SQL")[0]
    assert "two projected prompt sets" in found.missing["projections"][0]


def test_the_command_imports_no_model_library(unchanged: ResultStore, tmp_path: Path) -> None:
    code = (
        "import argparse, sys\nfrom jobs import report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "parser = argparse.ArgumentParser()\nreport.add_arguments(parser)\n"
        "report.run(parser.parse_args(['--results', sys.argv[1], '--output', sys.argv[2]]))\n"
        "loaded = {'torch', 'transformers', 'ray', 'dask', 'sklearn'} & set(sys.modules)\n"
        "assert not loaded, loaded\nassert 'matplotlib.pyplot' not in sys.modules\n"
    )
    where = [str(unchanged.location), str(tmp_path / "page.html")]
    subprocess.run([sys.executable, "-c", code, *where], check=True, cwd=Path(__file__).parents[1])


def boxes(figure: Any) -> list[tuple[str, Any]]:
    """Return the extent of every text that a figure shows, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    FigureCanvasAgg(figure).draw()
    axes = [axis for one in figure.axes for axis in (one.xaxis, one.yaxis)]
    # Axes keep labels of ticks that are outside their view.
    kept = {id(tick.label1) for axis in axes for tick in (*axis.majorTicks, *axis.minorTicks)}
    in_view = {id(tick.label1) for axis in axes if axis.axes.axison for tick in axis._update_ticks()}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    shown = [text for text in texts if id(text) not in kept or id(text) in in_view]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


def test_no_text_of_a_figure_overlaps_another_with_many_long_conditions(
    results: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_prompts(results, SETS)
    put_directions(results, [f"direction_with_a_long_name_{i}" for i in range(8)] + ["refusal"])
    put_projections(results, SETS, ["refusal"])
    put_structure(results, [f"direction_with_a_long_name_{i}" for i in range(8)])
    put_replay(results, conditions(extra=16), SETS)
    drawn: list[tuple[str, Any]] = []
    original = plots._svg

    def keep(figure: Any, name: str, about: str) -> str:
        drawn.append((name, boxes(figure)))
        width, height = figure.get_size_inches() * figure.dpi
        for label, box in drawn[-1][1]:
            assert box.x0 >= -1, (name, label)
            assert box.x1 <= width + 1, (name, label)
            assert box.y0 >= -1, (name, label)
            assert box.y1 <= height + 1, (name, label)
        return original(figure, name, about)

    monkeypatch.setattr(plots, "_svg", keep)
    make(results)
    assert len(drawn) >= 6
    for name, texts in drawn:
        for i, (label, box) in enumerate(texts):
            for other, second in texts[i + 1 :]:
                across = min(box.x1, second.x1) - max(box.x0, second.x0)
                down = min(box.y1, second.y1) - max(box.y0, second.y0)
                assert min(across, down) < 1, (name, label, other)


def test_glyphs_that_the_measuring_font_lacks_are_kept_as_text() -> None:
    line = plots.Line("\u6f22\u5b57 <b>", [0, 1], [0.0, 1.0], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = plots.line_panels("x", [plots.Panel("t", [line], "layer", "y")], "about")
    assert "\u6f22\u5b57 &lt;b&gt;" in svg
    assert svg.startswith("<svg")


def test_a_figure_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        plots.line_panels("x", [plots.Panel("t", [], "layer", "y")], "about")
    with pytest.raises(ValueError, match="same labels"):
        plots.rate_dots("x", [], "refused (%)", "texts")
    with pytest.raises(ValueError, match="square"):
        plots.heatmap("x", ["a"], np.zeros((2, 2)), "t", "about")
    with pytest.raises(ValueError, match="2 x 1 values"):
        layer_heatmap("x", [0, 1], [3], np.zeros((1, 2)), "a", "b", "about")
    with pytest.raises(ValueError, match="not a figure"):
        page.figure("<p>")
