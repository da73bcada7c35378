"""The table that a run ends with, and the report's page as a browser lays it out."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_report import MODEL, SETS, Page, conditions, fill, make, put, put_prompts, put_replay

from jobs.context import Context
from jobs.summary import print_summary
from store.location import Location
from store.results import ResultStore

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
JUDGES = {
    "refusal_phrases": "refusal",
    "careful": "refusal",
    "degenerate": "degenerate",
    "llm_trait": "trait",
    "guard": "unsafe",
}


@pytest.fixture
def judged(tmp_path: Path) -> ResultStore:
    """Texts with scores of two refusal judges, an endpoint's trait judge and a guard that failed on one text."""
    results = ResultStore(Location.of(tmp_path / "results"))
    put_prompts(results, SETS)
    put_replay(results, conditions(), SETS)
    texts = results.read("generations", columns=["generation_key"])["generation_key"].to_pylist()
    scores: list[dict[str, Any]] = []
    for key in texts:
        first = key.endswith("/0")
        common = {"generation_key": key, "judge_version": "1", "detail": None, "error": None, "label": None}
        scores.append({**common, "judge": "careful", "value": 0.0, "label": "no_refusal"})
        scores.append({**common, "judge": "llm_trait", "value": 40.0})
        failure = {"value": None, "label": None, "error": "no reply"} if first else {"value": 0.9, "label": "unsafe"}
        scores.append({**common, "judge": "guard", **failure})
    put(results, "scores", scores, "more")
    asked = [
        {"study": "s", "judge": judge, "judge_version": "1", "measures": measures, "options": None}
        for judge, measures in JUDGES.items()
    ]
    put(results, "judges", asked)
    return results


def printed(results: ResultStore, capsys: pytest.CaptureFixture[str]) -> str:
    replay = SimpleNamespace(prompts=list(SETS), monitor=None)
    study = SimpleNamespace(name="s", replay=replay, description="What it is.\n")
    identity = SimpleNamespace(fingerprint=MODEL, n_layers=6)
    print_summary(cast(Context, SimpleNamespace(study=study, results=results, identity=identity)))
    return capsys.readouterr().out


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"[\u2502\u2503]", line)[1:-1]]


def test_each_refusal_judge_has_a_block_and_a_name(judged: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    """With two refusal judges every row was once printed twice, and nothing said whose it was."""
    lines = [cells(line) for line in printed(judged, capsys).splitlines()]
    [head] = [line for line in lines if line[:3] == ["condition", "prompts", "judge"]]
    rows = [dict(zip(head, line, strict=True)) for line in lines if len(line) == len(head) and "test" in line[1]]
    names = [row["judge"] for row in rows]
    assert names == ["careful"] * (len(names) // 2) + ["refusal_phrases"] * (len(names) // 2)
    assert {row["refused"] for row in rows if row["judge"] == "careful"} == {"0/7", "0/6"}


def test_scores_of_other_judges_are_columns(judged: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    """An endpoint judge's scores once appeared nowhere."""
    lines = [cells(line) for line in printed(judged, capsys).splitlines()]
    [head] = [line for line in lines if "condition" in line]
    rows = [dict(zip(head, line, strict=True)) for line in lines if len(line) == len(head) and "test" in line[1]]
    assert {row["llm_trait (trait)"] for row in rows} == {"40.0"}
    assert {row["guard (unsafe)"] for row in rows} == {"100% (1 unscored)"}


def test_one_judge_has_no_column_and_controls_stand_below_what_they_control(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ResultStore(Location.of(tmp_path / "results"))
    put_prompts(results, SETS)
    put_replay(results, conditions(), SETS)
    text = printed(results, capsys)
    lines = [cells(line) for line in text.splitlines()]
    assert not any("judge" in line for line in lines)
    names = list(dict.fromkeys(line[0] for line in lines if line and "test" in "".join(line[1:2])))
    assert names[names.index("steer[coefficient=2]") + 1] == "\u2514 random_add"
    assert text.startswith("What to look at: ")
    assert "its control does not do" in " ".join(text.split())
    assert text.rstrip().endswith("What it is.")


def test_without_controls_the_table_says_what_it_cannot_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ResultStore(Location.of(tmp_path / "results"))
    put_prompts(results, SETS)
    put_replay(results, [{"condition": "baseline"}], SETS)
    assert "cannot tell whether any other direction would do the same" in " ".join(printed(results, capsys).split())


def test_the_report_shows_other_scores_and_names_its_judges(judged: ResultStore) -> None:
    text = Page(make(judged)).text("refusals")
    assert "Judge careful 1" in text
    assert "Judge refusal_phrases 1" in text
    assert "Scores of other judges" in text
    assert "guardunsafeharmful@testbaseline61" in text  # 6 scored, 1 not
    assert "llm_traittraitharmless@testbaseline6040.00" in text


def test_the_texts_say_in_words_which_they_are(judged: ResultStore) -> None:
    """A whole query once stood in that sentence."""
    page = Page(make(judged))
    words = page.text("texts").replace("".join(page.queries), "")
    assert "At most 4 prompts, chosen by a hash of their ids" in words
    assert "SELECT" not in words.partition("SQL")[0]


def test_a_control_that_changes_far_less_than_what_it_controls_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random direction that is projected out takes next to nothing away, which once passed for a control."""
    results = ResultStore(Location.of(tmp_path / "results"))
    put_prompts(results, SETS)
    put_replay(
        results,
        [
            {"condition": "out"},
            {"condition": "weak", "control_of": "out"},
            {"condition": "fair", "control_of": "out"},
            {"condition": "other", "control_of": "out"},
        ],
        SETS,
    )
    change = {0: ("project_out", 100.0), 1: ("project_out", 0.2), 2: ("project_out", 60.0), 3: ("add", 0.1)}
    effects = [
        {
            **{"generation_key": f"{number}/{prompts}/{i}", "intervention": 0, "kind": kind, "component": "resid_post"},
            **{"layer": 3, "n_tokens": 9, "change": squared, "largest_share": 0.2, "largest_token": 4},
            **{"max_relative": 0.1, "mean_relative": 0.1},
        }
        for number, (kind, squared) in change.items()
        for prompts, count in SETS.items()
        for i in range(count)
    ]
    put(results, "intervention_effects", effects)
    text = " ".join(printed(results, capsys).split())
    warning = "weak: its project_out changes the stream 0.002 times as much (squared) as that of out."
    assert f"warning: {warning} It is too weak to be a control of it" in text
    assert text.count("warning: ") == 1
    assert warning in " ".join(Page(make(results)).text("head").split())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_its_window(tmp_path: Path, width: int) -> None:
    """The navigation was once one line of 2,270 px."""
    content = make(fill(ResultStore(Location.of(tmp_path / "results"))))
    content = content.replace("<details", "<details open").replace("open open", "open")
    measure = "o.textContent = document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    frame = f'<iframe style="border:0" width="{width}" height="900" srcdoc="{html.escape(content)}"></iframe>'
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8">{frame}<p id="o"></p><script>onload = () => {{ {measure} }}</script>',
        encoding="utf-8",
    )
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(CHROMIUM), *quiet, "--virtual-time-budget=2000", "--dump-dom", outer.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    [found] = re.findall(r'<p id="o">(\d+)</p>', dom)
    assert int(found) <= width


def test_the_table_warns_of_an_intervention_that_acts_through_one_token(
    judged: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    # Used to happen: a projection at all tokens was read as one, where 99.9% of it was a change of a constant token 0.
    assert "acts mostly on one token" not in printed(judged, capsys)
    texts = judged.read("generations", columns=["generation_key", "condition_key"]).to_pylist()
    name = sorted({text["condition_key"] for text in texts})[0]
    effects = []
    for text in texts:
        inside = text["condition_key"] == name
        for number, share in enumerate((0.8 if inside else 0.2, 1.0)):
            effect = {"intervention": number, "kind": "project_out", "component": "resid_post", "layer": 3 + number}
            effect |= {"n_tokens": 1 if number else 9, "change": 2.0, "largest_share": share, "largest_token": 0}
            effects.append(
                {**effect, "generation_key": text["generation_key"], "max_relative": 0.1, "mean_relative": 0.1}
            )
    put(judged, "intervention_effects", effects)
    lines = [line for line in printed(judged, capsys).splitlines() if "acts mostly" in line]
    # One token alone, as in the second operation, is what the study asked for.
    assert len(lines) == 1
    assert lines[0].startswith(
        f"warning: {name.removeprefix('key-')}: project_out at resid_post.3 acts mostly on one token"
    )
