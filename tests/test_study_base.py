"""`base:`: a study on top of another one, and errors that name the file in which the faulty line stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.errors import StudyError
from store.study_file import load_study
from store.yaml_base import merged
from store.yaml_file import where

BASE = """\
name: below
model: {source: org/model, adapter: org/adapter}
prompts:
  bad: {path: ../data/p.jsonl, split: {seed: 3, parts: {train: 2, test: 2}}}
  good: {path: ../data/p.jsonl}
capture:
  - {prompts: [bad@train, good], layers: [1]}
directions:
  refusal: {positive: bad@train, negative: good}
"""
ABOVE = """\
base: studies/below.yaml
name: above
model: {source: org/other, adapter: null}
prompts:
  bad: {path: mine.jsonl}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "studies").mkdir()
    (tmp_path / "data").mkdir()
    lines = "".join(f'{{"prompt": "{c}"}}\n' for c in "abcd")
    (tmp_path / "data/p.jsonl").write_text(lines)
    (tmp_path / "mine.jsonl").write_text(lines)
    (tmp_path / "studies/below.yaml").write_text(BASE)
    (tmp_path / "above.yaml").write_text(ABOVE)
    return tmp_path


def fault(path: Path) -> str:
    with pytest.raises(StudyError) as caught:
        load_study(path)
    return str(caught.value)


def test_mappings_merge_key_by_key_and_everything_else_is_replaced() -> None:
    below = {"a": {"x": 1, "y": [1, 2], "z": {"p": 1}}, "b": 2, "c": {"d": 1}}
    above = {"a": {"y": [3], "z": {"q": 2}, "w": 4}, "b": {"n": 1}, "c": None, "new": None}
    expected = {"a": {"x": 1, "y": [3], "z": {"p": 1, "q": 2}, "w": 4}, "b": {"n": 1}, "new": None}
    assert merged(below, above) == expected
    assert below["a"] == {"x": 1, "y": [1, 2], "z": {"p": 1}}
    assert merged(below, {}) == below


def test_a_study_on_a_base_differs_in_what_it_says(folder: Path) -> None:
    above, below = load_study(folder / "above.yaml"), load_study(folder / "studies/below.yaml")
    assert (above.name, above.model.source, above.model.adapter) == ("above", "org/other", None)
    assert below.model.adapter == "org/adapter"
    assert above.prompts["bad"].split == below.prompts["bad"].split
    assert above.directions == below.directions
    assert above.file == folder / "above.yaml"


def test_a_path_is_relative_to_the_file_that_names_it(folder: Path) -> None:
    study = load_study(folder / "above.yaml")
    assert study.prompts["bad"].path == str(folder / "mine.jsonl")
    assert study.prompts["good"].path == str(folder / "data/p.jsonl")


@pytest.mark.parametrize(
    ("file", "old", "new", "at"),
    [
        ("studies/below.yaml", "negative: good", "negative: goood", "below.yaml:9"),
        ("studies/below.yaml", "layers: [1]", "layer: [1]", "below.yaml:7"),
        ("studies/below.yaml", "good: {path: ../data/p.jsonl}", "good: {path: ../p.jsonl}", "below.yaml:5"),
        ("above.yaml", "path: mine.jsonl", "pathh: mine.jsonl", "above.yaml:5"),
        ("above.yaml", "studies/below.yaml", "studies/blow.yaml", "above.yaml:1"),
        ("above.yaml", "studies/below.yaml", "above.yaml", "above.yaml:1"),
        ("above.yaml", "studies/below.yaml", "[a.yaml, b.yaml]", "above.yaml:1"),
    ],
)
def test_an_error_names_the_file_and_line_that_hold_the_fault(
    folder: Path, file: str, old: str, new: str, at: str
) -> None:
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert at in fault(folder / "above.yaml")


def test_files_that_build_on_each_other_are_refused(folder: Path) -> None:
    (folder / "studies/below.yaml").write_text("base: ../above.yaml\n" + BASE)
    assert "above.yaml -> below.yaml -> above.yaml" in fault(folder / "above.yaml")


def test_errors_found_later_name_the_base_too(folder: Path) -> None:
    file = folder / "above.yaml"
    assert where(file, "directions.refusal") == f"{folder}/studies/below.yaml:9"
    assert where(file, "model.source") == f"{file}:3"
