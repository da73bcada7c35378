"""A wrong study file is refused before a model loads, with the file's line, the key path and what to do about it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from jobs.context import data_location
from store.errors import StudyError
from store.model_ref import ModelRef
from store.ray_settings import RaySettings
from store.study import Study
from store.study_file import component_of, load_study
from store.study_layers import check_layers, direction_layers
from store.yaml_file import where

DEMO = Path(__file__).resolve().parent.parent / "studies" / "demo.yaml"
STUDY = """\
name: s
model:
  source: org/model
prompts:
  harmful:
    path: p.jsonl
    split: {seed: 0, parts: {train: 2, test: 2}}
  harmless: {path: q.jsonl}
traits:
  compliant: {path: t.yaml}
capture:
  - prompts: [harmful@train, harmless]
    layers: all
  - prompts: [compliant.positive, compliant.negative]
    responses: answers
    positions: [response_avg]
directions:
  refusal: {positive: harmful@train, negative: harmless}
  persona:
    positive: compliant.positive
    negative: compliant.negative
    position: response_avg
    responses: answers
  drift: {method: difference, minuend: persona, subtrahend: refusal}
geometry:
  projections:
    - prompts: [harmless]
      directions: all
replay:
  prompts: [harmful@test]
  monitor: {directions: [refusal], layers: [0.5]}
  conditions:
    baseline: {}
    answers: {prompts: [compliant.positive, compliant.negative]}
    sweep: {interventions: [{add: refusal, layers: [2], coefficient: [1, 2]}]}
    ko.late:
      interventions:
        - {add: persona, layers: [3], coefficient: 2}
        - project_out: refusal
          layers: [1, 2]
"""
KO = "replay.conditions.ko.late.interventions"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{c}"}}\n' for c in "abcd"))
    (tmp_path / "q.jsonl").write_text('{"prompt": "e"}\n{"prompt": "f"}\n')
    (tmp_path / "t.yaml").write_text("name: t\ninstructions: {positive: [x], negative: [y]}\nquestions: [q]\n")
    return tmp_path


def written(folder: Path, old: str = "name: s", new: str = "name: s") -> Path:
    assert STUDY.count(old) >= 1, old
    path = folder / "s.yaml"
    path.write_text(STUDY.replace(old, new, 1))
    return path


def refused(folder: Path, old: str, new: str) -> StudyError:
    with pytest.raises(StudyError) as caught:
        load_study(written(folder, old, new))
    message = str(caught.value)
    for internal in ("pydantic", "https://", "Value error", "Input should", "literal[", "function-", "union", "tagged"):
        assert internal not in message
    return caught.value


def test_a_study_without_a_fault_is_read_with_absolute_paths_and_knows_its_file(folder: Path) -> None:
    study = load_study(written(folder))
    assert study.prompts["harmful"].path == str(folder / "p.jsonl")
    assert study.traits["compliant"].path == str(folder / "t.yaml")
    assert component_of(study, "drift") == "resid_post"
    assert study.file == folder / "s.yaml"
    assert pickle.loads(pickle.dumps(study)).file == study.model_copy(update={"name": "t"}).file == study.file
    assert "file" not in study.model_dump()


# (text, its replacement, line, key path, part of the problem, part of the remedy)
FAULTS = {
    "unknown key": ("prompts:\n  harm", "promts:\n  harm", 4, "promts", "unknown key", "did you mean 'prompts'?"),
    "unknown key with no neighbour": ("name: s", "name: s\nqqq: 1", 2, "qqq", "unknown key", "known: allow_overlap"),
    "file is no key": ("name: s", "name: s\nfile: x", 2, "file", "unknown key 'file'", "known:"),
    "missing key": ("  source: org/model", "  dtype: auto", 2, "model.source", "'source' is missing", "add it"),
    "missing section": ("model:\n  source: org/model\n", "", 1, "model", "'model' is missing", "add it"),
    "study name": ("name: s", "name: a/b", 1, "name", "cannot name a study", "letters"),
    "text for a number": (
        "path: p.jsonl",
        "path: p.jsonl\n    limit: ten",
        7,
        "prompts.harmful.limit",
        "an integer, not 'ten'",
        "demo.yaml",
    ),
    "true for a number": (
        "{train: 2,",
        "{train: true,",
        7,
        "prompts.harmful.split.parts.train",
        "a number, not true",
        "",
    ),
    "number for text": ("source: org/model", "source: 7", 3, "model.source", "it must be text, not 7", '"7"'),
    "engine": (
        "replay:\n",
        "replay:\n  engine: vlm\n",
        30,
        "replay.engine",
        "vlm",
        "vllm",
    ),
    "text for a list": (
        "- prompts: [harmful@train, harmless]",
        "- prompts: harmless",
        12,
        "capture[0].prompts",
        "a list, not 'harmless'",
        "write [harmless]",
    ),
    "text for a mapping": ("model:\n  source: org/model", "model: org/model", 2, "model", "a mapping of keys", ""),
    "nothing for a mapping": (
        "baseline: {}",
        "baseline:",
        33,
        "replay.conditions.baseline",
        "not null",
        "write {}",
    ),
    "two sources": ("path: p.jsonl", "path: p.jsonl\n    dataset: a/b", 5, "prompts.harmful", "exactly one", "path:"),
    "hub key of a file": (
        "path: p.jsonl",
        "path: p.jsonl\n    dataset_split: x",
        5,
        "prompts.harmful",
        "dataset_split is of a hub data set",
        "delete dataset_split",
    ),
    "two prompt columns": (
        "path: p.jsonl",
        "path: p.jsonl\n    columns: {prompt: a, messages: b}",
        7,
        "prompts.harmful.columns",
        "exactly one of prompt and messages",
        "",
    ),
    "missing file": ("p.jsonl", "x.jsonl", 6, "prompts.harmful.path", "x.jsonl does not exist", "relative paths start"),
    "a folder for a file": ("path: p.jsonl", "path: .", 6, "prompts.harmful.path", "is a folder", "check it"),
    "missing trait file": ("t.yaml", "x.yaml", 10, "traits.compliant.path", "does not exist", "relative paths"),
    "missing model": ("org/model", "./nowhere", 3, "model.source", "no file or folder", "relative to"),
    "fractions that overlap": (
        "{train: 2, test: 2}",
        "{train: 0.7, test: 0.5}",
        7,
        "prompts.harmful.split.parts",
        "parts would overlap",
        "at most 1",
    ),
    "no parts": ("{train: 2, test: 2}", "{}", 7, "prompts.harmful.split.parts", "no part is named", "delete split"),
    "an empty part": ("{train: 2,", "{train: 0,", 7, "prompts.harmful.split.parts", "the size 0", "above 0"),
    "a dot in a set": ("harmless: {", "harm.less: {", 8, "prompts.harm.less", "holds a dot or @", "rename it"),
    "an @ in a part": ("{train: 2,", "{a@b: 2,", 7, "prompts.harmful.split.parts.a@b", "holds a dot or @", "rename"),
    "a number for a name": ("harmless: {", "1: {", 8, "prompts.1", "it must be text, not 1", '"1"'),
    "a bracket in a condition": (
        "baseline: {}",
        '"sweep[coefficient=1]": {}',
        33,
        "replay.conditions.sweep[coefficient=1]",
        "cannot be a name",
        "letters",
    ),
    "missing prompt set": (
        "positive: harmful@train",
        "positive: harmful@trian",
        18,
        "directions.refusal.positive",
        "no prompt set is named 'harmful@trian'",
        "did you mean 'harmful@train'?",
    ),
    "both sides": (
        "negative: harmless",
        "negative: [harmless, harmful@train]",
        18,
        "directions.refusal.negative",
        "on both sides",
        "one side",
    ),
    "a set twice": (
        "positive: harmful@train",
        "positive: [harmless, harmless]",
        18,
        "directions.refusal.positive",
        "named twice",
        "once",
    ),
    "empty list": ("positive: harmful@train", "positive: []", 18, "directions.refusal.positive", "it is empty", ""),
    "uncaptured set": (
        "positive: harmful@train",
        "positive: harmful@test",
        18,
        "directions.refusal.positive",
        "nothing captures resid_post at prompt_end of 'harmful@test'",
        "`capture:`",
    ),
    "uncaptured component": (
        "positive: harmful@train",
        "positive: harmful@train, component: mlp_out",
        18,
        "directions.refusal.positive",
        "nothing captures mlp_out",
        "`capture:`",
    ),
    "unknown component": (
        "    layers: all",
        "    layers: all\n    components: [resid_pst]",
        14,
        "capture[0].components[0]",
        "'resid_pre', 'resid_post', 'attn_out' or 'mlp_out'",
        "did you mean 'resid_post'?",
    ),
    "unknown position": (
        "    layers: all",
        "    layers: all\n    positions: [promt_end]",
        14,
        "capture[0].positions[0]",
        "unknown position 'promt_end'",
        "did you mean 'prompt_end'?",
    ),
    "response position without responses": (
        "    layers: all",
        "    layers: all\n    positions: [response_start]",
        14,
        "capture[0].positions",
        "needs responses, and the prompt set 'harmful@train' has none",
        "`responses:`",
    ),
    "responses of no condition": (
        "responses: answers\n    positions",
        "responses: answer\n    positions",
        15,
        "capture[1].responses",
        "no replay condition is named 'answer'",
        "did you mean 'answers'?",
    ),
    "responses of a sweep": (
        "responses: answers\n    positions",
        "responses: sweep\n    positions",
        15,
        "capture[1].responses",
        "is a sweep",
        "sweep[coefficient=1], sweep[coefficient=2]",
    ),
    "responses to other prompts": (
        "responses: answers\n    positions",
        "responses: baseline\n    positions",
        15,
        "capture[1].responses",
        "does not replay the prompt set 'compliant.positive'",
        "replay.conditions.baseline.prompts",
    ),
    "a direction's unknown responses": (
        "    position: response_avg\n    responses: answers",
        "    position: response_avg\n    responses: anwers",
        23,
        "directions.persona.responses",
        "no replay condition",
        "did you mean 'answers'?",
    ),
    "unknown method": (
        "method: difference,",
        "method: diference,",
        24,
        "directions.drift",
        "unknown method 'diference'",
        "did you mean 'difference'?",
    ),
    "method left out": (
        "method: difference, ",
        "",
        24,
        "directions.drift",
        "'method' is missing",
        "add method: difference",
    ),
    "key of another method": (
        "minuend: persona, ",
        "minuend: persona, seed: 1, ",
        24,
        "directions.drift.seed",
        "unknown key 'seed'",
        "known: method, minuend, subtrahend",
    ),
    "no direction": (
        "drift: {method: difference, minuend: persona, subtrahend: refusal}",
        "drift: [x]",
        24,
        "",
        "",
        "",
    ),
    "missing direction": (
        "minuend: persona",
        "minuend: persna",
        24,
        "directions.drift.minuend",
        "no direction is named 'persna'",
        "did you mean 'persona'?",
    ),
    "a direction minus itself": (
        "subtrahend: refusal",
        "subtrahend: persona",
        24,
        "directions.drift.subtrahend",
        "nothing is left",
        "another",
    ),
    "circular": ("minuend: persona", "minuend: drift", 24, "directions.drift", "drift -> drift", "break the loop"),
    "circular through responses": (
        "answers: {prompts: [compliant.positive, compliant.negative]}",
        "answers: {prompts: [compliant.positive, compliant.negative], "
        "interventions: [{project_out: drift, layers: all}]}",
        19,
        "directions.persona",
        "persona -> drift -> persona",
        "break the loop",
    ),
    "uncaptured projection": (
        "- prompts: [harmless]",
        "- prompts: [harmful@test]",
        27,
        "geometry.projections[0].prompts",
        "nothing captures",
        "`capture:`",
    ),
    "a word for all": (
        "directions: all",
        "directions: al",
        28,
        "geometry.projections[0].directions",
        "'all' or a list, not 'al'",
        "did you mean 'all'?",
    ),
    "misspelt key of an intervention": (
        "coefficient: 2}",
        "coefficent: 2}",
        38,
        f"{KO}[0].coefficent",
        "unknown key",
        "did you mean 'coefficient'?",
    ),
    "coefficient on project_out": (
        "- project_out: refusal",
        "- project_out: refusal\n          coefficient: 1",
        40,
        f"{KO}[1].coefficient",
        "project_out takes no coefficient: it removes the component whole",
        "delete the key",
    ),
    "norm on project_out": (
        "- project_out: refusal",
        "- project_out: refusal\n          norm: unit",
        40,
        f"{KO}[1].norm",
        "project_out takes no norm",
        "delete the key",
    ),
    "add and project_out": (
        "- project_out: refusal",
        "- project_out: refusal\n          add: persona",
        39,
        f"{KO}[1]",
        "cannot both add and project_out",
        "two interventions",
    ),
    "clamp and project_out": (
        "- project_out: refusal",
        "- project_out: refusal\n          clamp: persona",
        39,
        f"{KO}[1]",
        "cannot both project_out and clamp",
        "two interventions",
    ),
    "clamp without projection": (
        "- project_out: refusal",
        "- clamp: refusal",
        39,
        f"{KO}[1].projection",
        "'projection' is missing",
        "add it",
    ),
    "unknown direction of a clamp": (
        "- project_out: refusal",
        "- clamp: refusl\n          projection: 1",
        39,
        f"{KO}[1].clamp",
        "no direction is named",
        "did you mean 'refusal'?",
    ),
    "unknown tokens": (
        "- project_out: refusal",
        "- project_out: refusal\n          tokens: prompts",
        40,
        f"{KO}[1].tokens",
        "unknown tokens 'prompts'",
        "did you mean 'prompt'?",
    ),
    "empty range of tokens": (
        "- project_out: refusal",
        "- project_out: refusal\n          tokens: {from: 3, to: 3}",
        40,
        f"{KO}[1].tokens",
        "no token lies from 3 up to 3",
        "left out",
    ),
    "unknown key of a range": (
        "- project_out: refusal",
        "- project_out: refusal\n          tokens: {from: 3, until: 4}",
        40,
        f"{KO}[1].tokens.until",
        "until",
        "",
    ),
    "neither": ("- project_out: refusal", "- projct_out: refusal", 39, f"{KO}[1]", "needs the key", "'project_out'?"),
    "no mapping": ("- project_out: refusal\n          layers: [1, 2]", "- persona", 39, f"{KO}[1]", "is a mapping", ""),
    "missing layers": ("layers: [3], ", "", 38, f"{KO}[0].layers", "'layers' is missing", "add it"),
    "missing direction of an intervention": (
        "- project_out: refusal",
        "- project_out: refusl",
        39,
        f"{KO}[1].project_out",
        "no direction is named",
        "did you mean 'refusal'?",
    ),
    "no match": ("coefficient: 2}", "norm: {match: x}}", 38, f"{KO}[0].norm.match", "no direction is named", "known:"),
    "misspelt match": (
        "coefficient: 2}",
        "norm: {matches: refusal}}",
        38,
        f"{KO}[0].norm.matches",
        "unknown key 'matches'",
        "did you mean 'match'?",
    ),
    "unknown norm": ("coefficient: 2}", "norm: unti}", 38, f"{KO}[0].norm", "'natural' or 'unit'", "mean 'unit'?"),
    "no layers": ("layers: [1, 2]", "layers: []", 40, f"{KO}[1].layers", "the list of layers is empty", "write all"),
    "a word for layers": ("layers: [1, 2]", "layers: al", 40, f"{KO}[1].layers", "'al' names no layers", "write all"),
    "a word for a layer": ("layers: [1, 2]", "layers: [1, x]", 40, f"{KO}[1].layers[1]", "'x' is no layer", "integer"),
    "fraction above 1": (
        "layers: [1, 2]",
        "layers: [1.5]",
        40,
        f"{KO}[1].layers[0]",
        "no fraction of depth",
        "integer",
    ),
    "misspelt range": (
        "layers: [1, 2]",
        "layers: {from: 1, until: 3}",
        40,
        f"{KO}[1].layers.until",
        "unknown key 'until'",
        "known: from, step, to",
    ),
    "half a range": ("layers: [1, 2]", "layers: {from: 1}", 40, f"{KO}[1].layers.to", "'to' is missing", "add it"),
    "backward range": (
        "layers: [1, 2]",
        "layers: {from: 5, to: 3}",
        40,
        f"{KO}[1].layers",
        "from 5 to 3 is empty",
        "swap its ends",
    ),
    "not finite": ("coefficient: 2}", "coefficient: .nan}", 38, f"{KO}[0].coefficient", "a finite number", ""),
    "empty sweep": ("coefficient: 2}", "coefficient: []}", 38, f"{KO}[0].coefficient", "at least one", "[1, 2]"),
    "two sweeps": (
        "coefficient: 2}",
        "coefficient: [1, 2]}\n        - {add: refusal, layers: [2], coefficient: [1, 2]}",
        37,
        KO,
        "two interventions sweep their coefficient",
        "one condition per combination",
    ),
    "seeds without sampling": (
        "  prompts: [harmful@test]",
        "  prompts: [harmful@test]\n  seeds: [0, 1]",
        31,
        "replay.seeds",
        "greedy decoding gives the same text for every seed",
        "replay.decoding.temperature",
    ),
    "top_p without sampling": (
        "  prompts: [harmful@test]",
        "  prompts: [harmful@test]\n  decoding: {top_p: 0.9}",
        31,
        "replay.decoding.top_p",
        "greedy decoding has no top_p",
        "temperature",
    ),
    "no prompts": ("baseline: {}", "baseline: {prompts: []}", 33, "replay.conditions.baseline.prompts", "empty", ""),
    "control of nothing": (
        "baseline: {}",
        "baseline: {control_of: ko.lat}",
        33,
        "replay.conditions.baseline.control_of",
        "no condition is named",
        "did you mean 'ko.late'?",
    ),
    "control of itself": (
        "baseline: {}",
        "baseline: {control_of: baseline}",
        33,
        "replay.conditions.baseline.control_of",
        "no control of itself",
        "",
    ),
    "monitor": ("[refusal], layers: [0.5]", "[refusl]", 31, "replay.monitor.directions", "no direction", "'refusal'?"),
    "ray": ("name: s", "name: s\nray: {workers: many}", 2, "ray.workers", "an integer or 'auto', not 'many'", ""),
    "empty store": ("name: s", "name: s\nstore: ''", 2, "store", "it is empty", ""),
    "key twice": ("  harmless: {", "  harmful: {", 8, None, "the key 'harmful' occurs twice (first on line 5)", ""),
    "tab": ("    path: p.jsonl", "\tpath: p.jsonl", 6, None, "'\\t'", "spaces, not tabs"),
    "template": ("path: p.jsonl", "path: {{x}}", 6, None, "a key is text", "correct that line"),
    "control character": ("path: p.jsonl", "path: p\x07", 6, None, "'\\x07' is not allowed", "remove it"),
    "two documents": ("traits:", "---\ntraits:", 9, None, "single document", "correct that line"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_refused_with_line_key_path_and_remedy(folder: Path, what: str) -> None:
    old, new, line, key, problem, remedy = FAULTS[what]
    error = refused(folder, old, new)
    assert error.file == f"{folder / 's.yaml'}:{line}"
    if key != "":
        assert error.key == key
    assert problem in error.problem
    assert error.remedy
    assert remedy in error.remedy


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(StudyError, match="holds no mapping of keys"):
        load_study(tmp_path / "s.yaml")


def test_a_missing_or_undecodable_study_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"none\.yaml: cannot read the study file: No such file"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "s.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(StudyError, match="not UTF-8"):
        load_study(tmp_path / "s.yaml")


def test_scalars_are_those_of_yaml_1_2(folder: Path) -> None:
    # YAML 1.1 reads off and no as false, 1e-1 as text, and a date as no text; the ray section documents `address: off`.
    decoding = "  prompts: [harmful@test]\n  decoding: {temperature: 1e-1}"
    path = written(folder, "  prompts: [harmful@test]", decoding)
    path.write_text(path.read_text() + "ray: {address: off}\ndescription: 2024-13-45\n")
    study = load_study(path)
    assert study.replay is not None
    assert (study.ray.address, study.description, study.replay.decoding.temperature) == ("off", "2024-13-45", 0.1)


def test_anchors_and_merges_work_and_may_override(folder: Path) -> None:
    path = written(folder, "harmless: {path: q.jsonl}", "harmless: &q {path: q.jsonl}\n  again: {<<: *q, limit: 1}")
    assert load_study(path).prompts["again"].limit == 1


def test_one_step_of_a_sweep_can_feed_a_capture(folder: Path) -> None:
    step = 'responses: "sweep[coefficient=2]"\n    positions'
    old = "compliant.negative]\n    responses: answers\n    positions"
    path = written(folder, old, "compliant.negative]\n    " + step)
    text = path.read_text().replace("    responses: answers\n", '    responses: "sweep[coefficient=2]"\n')
    text = text.replace("sweep: {inter", "sweep: {prompts: [compliant.positive, compliant.negative], inter")
    path.write_text(text)
    assert load_study(path).capture[1].responses == "sweep[coefficient=2]"


# -- layers, once the model's depth is known ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "problem"),
    [
        ("layers: all", "layers: [30]", 13, "capture[0].layers", "layer 30 does not exist: the model has 30 layers"),
        ("layers: all", "layers: -31", 13, "capture[0].layers", "layer -31 does not exist"),
        ("layers: all", "layers: {from: 3, to: 30}", 13, "capture[0].layers", "layer 30 does not exist"),
        ("layers: [1, 2]", "layers: {from: 0.9, to: 3}", 40, f"{KO}[1].layers", "from 0.9 to 3 is empty"),
        ("layers: [3],", "layers: [31],", 38, f"{KO}[0].layers", "layer 31 does not exist"),
        ("layers: [3],", "layers: [3], from_layer: 40,", 38, f"{KO}[0].from_layer", "layer 40 does not exist"),
        ("layers: [0.5]", "layers: [99]", 31, "replay.monitor.layers", "0 to 29, or -30 to -1"),
        ("layers: all", "layers: [1, 2]", 31, "replay.monitor.layers", "does not capture the direction 'refusal' at"),
        (
            "layers: all",
            "layers: {from: 2, to: -1}",
            40,
            f"{KO}[1].layers",
            "does not capture the direction 'refusal' at layer 1",
        ),
        (
            "    positions: [response_avg]",
            "    positions: [response_avg]\n    layers: [4]",
            39,
            f"{KO}[0].layers",
            "does not capture the direction 'persona' at layer 3",
        ),
    ],
)
def test_layers_are_checked_against_the_depth_with_line_and_key(
    folder: Path, old: str, new: str, line: int, key: str, problem: str
) -> None:
    study = load_study(written(folder, old, new))
    with pytest.raises(StudyError) as caught:
        check_layers(study, 30)
    assert caught.value.file == f"{folder / 's.yaml'}:{line}"
    assert caught.value.key == key
    assert problem in caught.value.problem
    assert caught.value.remedy


def test_valid_layers_pass_and_a_direction_has_those_that_all_of_its_parts_have(folder: Path) -> None:
    study = load_study(
        written(folder, "    positions: [response_avg]", "    positions: [response_avg]\n    layers: [3]")
    )
    check_layers(study, 30)
    assert direction_layers(study, "refusal", 30) == set(range(30))
    assert direction_layers(study, "drift", 30) == direction_layers(study, "persona", 30) == {3}


def test_a_direction_without_a_common_layer_is_refused(folder: Path) -> None:
    path = written(folder, "    layers: all", "    layers: [1]")
    path.write_text(path.read_text().replace("[response_avg]\n", "[response_avg]\n    layers: [2]\n"))
    with pytest.raises(StudyError, match=r"s\.yaml:25: directions\.drift: no layer is captured of all that 'drift'"):
        check_layers(load_study(path), 30)


# -- where ----------------------------------------------------------------------------------------------------------


def test_where_finds_lines_of_names_with_dots_and_falls_back(folder: Path) -> None:
    path = written(folder)
    assert where(path, f"{KO}[1].layers") == f"{path}:40"
    assert where(path, "replay.conditions.sweep[coefficient=1]") == f"{path}:35"
    assert where(path, "replay.nothing.of.this") == f"{path}:29"
    assert where(path, "capture[9]") == f"{path}:11"
    assert where(None, "name") is None
    path.unlink()
    assert where(path, "name") == str(path)


# -- the reference --------------------------------------------------------------------------------------------------


def records(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for child in model.__subclasses__():
        yield from records(child)


def test_the_demo_study_mentions_every_key() -> None:
    text = DEMO.read_text(encoding="utf-8")
    models = [Study, ModelRef, RaySettings]
    sections = ("directions", "geometry", "interventions", "select")
    modules = ("store.study", "store.layers", *(f"store.study_{section}" for section in sections))
    models += [record for record in records(BaseModel) if record.__module__ in modules]
    missing = {
        f"{model.__name__}.{key}"
        for model in models
        for name, field in model.model_fields.items()
        if re.search(rf"(?<!\w){re.escape(key := field.alias or name)}(?!\w)", text) is None
    }
    assert missing == set()


def test_the_demo_study_is_valid_for_its_model() -> None:
    study = load_study(DEMO)
    check_layers(study, 30)


# -- where results go -----------------------------------------------------------------------------------------------


def test_a_submitted_job_refuses_relative_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.delenv("RAY_JOB_SUBMISSION_ID", raising=False)
    assert data_location("data/store", "store").path.is_absolute()
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "raysubmit_1")
    with pytest.raises(StudyError, match=r"^store: data/store is relative, and a submitted job") as caught:
        data_location("data/store", "store")
    assert "--store /data/resid/store" in str(caught.value.remedy)
    assert str(data_location("/data/store", "store")) == "/data/store"
    assert str(data_location("s3://bucket/store", "store")) == "s3://bucket/store"
