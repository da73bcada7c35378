"""Prompts that sets share: refused where they spoil a result, reported where sets are used together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.context import Context
from jobs.prompt_notes import changed_sets, set_lines
from store.errors import StudyError
from store.leaks import overlaps
from store.schemas import TABLES
from store.study_file import load_study

TRAIT = {
    "name": "kind",
    "instructions": {"positive": ["be kind"], "negative": ["be cold"]},
    "questions": ["question 0", "question 1"],
}


def write(folder: Path, **changes: Any) -> Path:
    """Write a study over two sets of 40 prompts that share 5, with a trait, one direction and a choice."""
    for name, start in (("bad", 0), ("other", 35)):
        records = [{"prompt": f"prompt {n}" + " " * (name == "other")} for n in range(start, start + 40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "good.jsonl").write_text("".join(json.dumps({"prompt": f"good {n}"}) + "\n" for n in range(40)))
    (folder / "kind.yaml").write_text(yaml.safe_dump(TRAIT))
    split = {"parts": {"train": 0.4, "val": 0.3, "test": 0.3}}
    study: dict[str, Any] = {
        "name": "s",
        "model": {"source": "org/name"},
        "prompts": {
            "bad": {"path": "bad.jsonl", "split": split},
            "good": {"path": "good.jsonl", "split": split},
            "other": {"path": "other.jsonl"},
        },
        "traits": {"kind": {"path": "kind.yaml"}},
        "capture": [{"prompts": ["bad", "good", "other", "kind.positive", "kind.negative"]}],
        "directions": {"d": {"positive": "bad@train", "negative": "good@train"}},
        "replay": {
            "prompts": ["bad@test"],
            "conditions": {
                "baseline": {"prompts": ["bad@val", "bad@test", "kind.positive"]},
                "candidates": {
                    "prompts": ["bad@val", "kind.positive"],
                    "each": {"layer": [0, 1]},
                    "interventions": [{"add": "d", "layers": ["$layer"]}],
                },
                "chosen": {"interventions": [{"add": "d", "layers": ["$site.layer"]}]},
            },
        },
        "select": {"site": {"of": "candidates", "prompts": "bad@val"}},
        "store": str(folder / "store"),
        "results": str(folder / "results"),
    }
    for section, change in changes.items():
        if isinstance(change, dict):
            study[section].update(change)
        else:
            study[section] = change
    if changes.get("select") is None and "e" in changes.get("directions", {}):
        study["select"] = {}
        del study["replay"]["conditions"]["chosen"]
    if "conditions" in changes.get("replay", {}):
        study.pop("select")
        study["replay"].update(changes["replay"])
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def opened(folder: Path, **changes: Any) -> Context:
    return Context(load_study(write(folder, **changes)))


@pytest.fixture(autouse=True)
def template(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that changes nothing; org/name has none."""
    monkeypatch.setattr(Context, "rendered", lambda self, prompt: repr(prompt.messages))


AXIS = {"method": "assistant_axis", "position": "prompt_end"}
MATCHED = {"method": "random_matched", "seed": 1, "match_energy": "d"}


@pytest.mark.parametrize(
    ("direction", "choice"),
    [
        ({"positive": "bad@val", "negative": "good@train"}, "bad@val"),
        ({"positive": "good@train", "negative": "bad"}, "bad@val"),
        ({**AXIS, "default": "bad@val", "roles": ["good@train"]}, "bad@val"),
        ({**AXIS, "default": "good@train", "roles": ["bad@val", "other"]}, "bad@val"),
        ({**MATCHED, "prompts": ["bad@val"]}, "bad@val"),
        ({"method": "principal_components", "positive": "bad@val", "negative": "good@val"}, "bad@val"),
        ({"positive": "kind.positive", "negative": "kind.negative"}, "kind.positive"),
    ],
    ids=["positive", "whole-set", "axis-default", "axis-role", "matched", "components", "trait"],
)
def test_a_choice_measured_on_what_a_direction_reads_is_refused(
    tmp_path: Path, direction: dict[str, Any], choice: str
) -> None:
    """Only positive and negative were looked at: an axis or a matched control could read @val."""
    assert opened(tmp_path).fixed_sets
    changes = {"directions": {"e": direction}, "select": {"site": {"of": "candidates", "prompts": choice}}}
    with pytest.raises(
        StudyError, match=rf"select\.site\.prompts: the choice is measured on '{choice}'.* 'e(\.1)?' reads"
    ):
        assert opened(tmp_path, **changes).fixed_sets
    assert opened(tmp_path, **changes, allow_overlap=True).fixed_sets


def test_a_choice_measured_on_what_is_reported_is_refused(tmp_path: Path) -> None:
    choice = {"site": {"of": "candidates", "prompts": ["kind.positive"]}}
    with pytest.raises(StudyError, match=r"'kind.positive', on which its effect is reported"):
        assert opened(tmp_path, select=choice, replay={"prompts": ["bad@test", "kind.positive"]}).fixed_sets


def test_a_study_whose_train_and_test_parts_share_prompts_is_refused(tmp_path: Path) -> None:
    """Also where they differ only in the space at their ends; with one seed and the same sizes none can."""
    prompts = {"other": {"path": "other.jsonl", "split": {"seed": 1, "parts": {"test": 0.9}}}}
    with pytest.raises(StudyError, match=r"prompts\.other\.split: 'other@test' and 'bad@\w+' share a prompt"):
        assert opened(tmp_path, prompts=prompts).fixed_sets
    assert opened(tmp_path, prompts=prompts, allow_overlap=True).fixed_sets
    prompts["other"]["exclude"] = ["bad"]  # type: ignore[assignment]
    assert opened(tmp_path, prompts=prompts).fixed_sets["other"].excluded == 5


def test_sets_that_are_used_together_and_share_prompts_are_listed(tmp_path: Path) -> None:
    context = opened(tmp_path)
    assert overlaps(context.study, context.fixed_sets) == []  # `other` is captured, and nothing uses it
    context = opened(tmp_path, directions={"e": {"positive": ["bad", "other"], "negative": "good@train"}})
    [line] = [line for line in set_lines(context) if line.startswith("shared: ")]
    assert line == "shared: bad and other share 5 prompts (direction e); prompts.other.exclude: [bad] removes them"
    replay = {"conditions": {"plain": {"prompts": ["other"], "interventions": [{"project_out": "f", "layers": "all"}]}}}
    directions = {"f": {"positive": "bad", "negative": "good"}}
    context = opened(tmp_path, directions=directions, replay=replay)
    assert any("bad and other share 5 prompts (replay)" in line for line in set_lines(context))
    prompts = {"other": {"path": "other.jsonl", "exclude": ["bad"]}}
    context = opened(tmp_path, directions=directions, replay=replay, prompts=prompts)
    assert not any(line.startswith("shared: ") for line in set_lines(context))
    assert "prompts other: 35 (5 excluded)" in set_lines(context)


def test_prompts_that_a_template_makes_equal_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directions = {"e": {"positive": "kind.positive", "negative": "kind.negative"}}
    assert not any(line.startswith("shared: ") for line in set_lines(opened(tmp_path, directions=directions)))
    monkeypatch.setattr(Context, "rendered", lambda self, prompt: prompt.text)  # as one that drops system prompts
    lines = set_lines(opened(tmp_path, directions=directions))
    assert "shared: kind.positive and kind.negative share 2 prompts (direction e)" in lines


def test_an_unknown_set_to_exclude_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"prompts\.other\.exclude: no prompt set is named 'bat'\n.*mean 'bad'"):
        load_study(write(tmp_path, prompts={"other": {"path": "other.jsonl", "exclude": ["bat"]}}))


def test_prompts_that_a_model_may_not_tell_apart_are_counted(tmp_path: Path) -> None:
    """The file of shared/cases/files/dups_ws.jsonl: one repeated row, and one that differs by a space."""
    context = opened(tmp_path)
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in ("hello", "hello ", "Hello", "hello"))
    )
    [line] = [line for line in set_lines(context) if line.startswith("prompts other")]
    assert line.startswith("prompts other: 3 (1 repeated rows dropped; 1 differ from another only in the space")


def test_a_part_that_changed_says_by_how_many(tmp_path: Path) -> None:
    context = opened(tmp_path)
    records = [
        {
            "study": "s",
            "prompt_set": name,
            "prompt_id": prompt.id,
            "model": "m",
            "row_key": prompt.id,
            "responses": None,
        }
        for name in ("bad@train", "bad@test")
        for prompt in context.fixed_sets[name].prompts
    ]
    table = TABLES["memberships"].empty_table().from_pylist(records, schema=TABLES["memberships"])
    context.results.replace("memberships", "s", table)
    assert changed_sets(opened(tmp_path)) == []
    split = {"path": "bad.jsonl", "split": {"seed": 5, "parts": {"train": 0.4, "test": 0.3}}}
    lines = changed_sets(opened(tmp_path, prompts={"bad": split}, replay={"conditions": {"baseline": {}}}))
    assert len(lines) == 2
    for line, other in zip(lines, ("bad@test", "bad@train"), strict=True):
        assert "changed since the last run: " in line
        assert f"of the new from {other}" in line
