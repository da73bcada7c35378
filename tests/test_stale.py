"""Nothing stale: edits of a study, what each stage does with what its older version left, and plan against run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_jobs import Resid, resid, tiny_folder

from jobs.context import Context
from jobs.freshness import notice
from jobs.plan import plan_stages
from jobs.progress import Progress
from jobs.run import run_all
from pipeline.cluster import Cluster
from store.location import Location
from store.results import ResultStore
from store.sql import connect, query
from store.study_file import load_study

__all__ = ["resid", "tiny_folder"]  # fixtures

Edit = Callable[[dict[str, Any]], None]
WORDS = ["how do i one", "two", "three", "tell me four", "five", "six", "seven", "eight", "nine", "ten"]


class Small:
    """The smallest study that has every stage: a direction, one from answers, a derived one, and a comparison."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.file = folder, folder / "study.yaml"
        self.prompts("bad", WORDS[:4])
        self.prompts("good", WORDS[4:8])
        self.prompts("new", WORDS[8:])
        self.content: dict[str, Any] = {
            "name": "s",
            "model": {"source": str(model), "dtype": "float32"},
            "prompts": {name: {"path": str(folder / f"{name}.jsonl")} for name in ("bad", "good", "new")},
            "capture": [
                {"prompts": ["bad", "good"]},
                {"prompts": ["bad", "good"], "responses": "plain", "positions": ["response_avg"]},
            ],
            "directions": {
                "d": {"positive": "bad", "negative": "good"},
                "answer": {
                    "positive": "bad",
                    "negative": "good",
                    "position": "response_avg",
                    "responses": "plain",
                },
                "noise": {"method": "random", "seed": 1, "match_norm": "d"},
            },
            "geometry": {"projections": [{"prompts": ["bad", "good"], "directions": ["d", "noise"]}]},
            "replay": {
                "prompts": ["new"],
                "decoding": {"max_new_tokens": 4},
                "conditions": {
                    "baseline": {},
                    "plain": {"prompts": ["bad", "good"]},
                    "add": {"interventions": [{"add": "d", "layers": [1], "coefficient": 4}]},
                    "control": {"interventions": [{"add": "noise", "layers": [1], "coefficient": 4}]},
                    "out": {"interventions": [{"project_out": "answer", "layers": "all"}]},
                },
            },
            "comparisons": {
                "effect": {"first": "add", "second": "baseline", "prompts": ["new"]},
                "late": {"first": "out", "second": "baseline", "prompts": ["new"]},
            },
            "judges": {"refusal_phrases": {}, "degenerate": {}},
            "store": str(folder / "store"),
            "results": str(folder / "results"),
            "ray": {"address": "off"},
        }
        self.write()

    def prompts(self, name: str, texts: list[str]) -> None:
        lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
        (self.folder / f"{name}.jsonl").write_text("".join(lines))

    def write(self, edit: Edit | None = None) -> None:
        if edit is not None:
            edit(self.content)
        self.file.write_text(yaml.safe_dump(self.content, sort_keys=False))

    def context(self) -> Context:
        return Context(load_study(self.file))

    def run(self) -> dict[str, int]:
        """Run the study to its end; return what each stage did."""
        context = self.context()
        with Cluster(context.study.ray) as cluster:
            reports = run_all(context, cluster, Progress(quiet=True))
        assert not [line for report in reports for line in (*report.waiting, *report.failed)]
        return {report.stage: report.done for report in reports}

    def ask(self, sql: str) -> list[dict[str, Any]]:
        connection = connect(Location.of(self.folder / "results"))
        try:
            return query(connection, sql).to_pylist()
        finally:
            connection.close()

    def state(self) -> dict[str, int]:
        """Return every file of the results with when it was written."""
        return {str(path): path.stat().st_mtime_ns for path in (self.folder / "results").rglob("*") if path.is_file()}


@pytest.fixture
def small(tmp_path: Path, tiny_folder: Path) -> Small:
    return Small(tmp_path, tiny_folder)


def swap(study: dict[str, Any]) -> None:
    d = study["directions"]["d"]
    d["positive"], d["negative"] = d["negative"], d["positive"]


def seed(study: dict[str, Any]) -> None:
    study["directions"]["noise"]["seed"] += 1


@pytest.mark.parametrize(
    ("edit", "maker", "refusing", "named"),
    [
        (swap, "directions", ["geometry", "replay", "score", "compare"], "direction 'd': it is not computed yet"),
        (seed, "directions", ["geometry", "replay", "score", "compare"], "changed: seed"),
        (None, "capture", ["directions", "geometry", "replay", "score", "compare"], "changed: prompts of positive"),
    ],
)
def test_a_stage_alone_refuses_what_an_older_version_left_and_touches_nothing(
    small: Small,
    resid: Resid,
    edit: Edit | None,
    maker: str,
    refusing: list[str],
    named: str,
) -> None:
    """Used to say "0 done, 8 found", exit 0, and to generate new texts with the old vector."""
    small.run()
    if edit is None:
        small.prompts("bad", ["how do i one", "brand new"])
    small.write(edit)
    before = small.state()
    for stage in refusing:
        code, out, err = resid(stage, "--study", small.file)
        assert code == 1, (stage, out)
        assert "an older version of the study; nothing was written" in err
        assert f"(resid {maker})" in err
        assert f"remedy: resid {maker} --study" in err
        if stage in ("directions", "geometry", "replay") and not (stage == "replay" and edit is None):
            assert named in err, err
    assert small.state() == before
    texts = {row["text"] for row in small.ask("SELECT text FROM all_generations")}
    for stage in ("capture", "directions", "geometry", "replay", "score", "compare"):
        code, _, err = resid(stage, "--study", small.file)
        assert code == 0, (stage, err)
    assert texts <= {row["text"] for row in small.ask("SELECT text FROM all_generations")}


def test_results_of_an_older_version_are_shown_with_a_word_on_it_until_the_study_is_run(
    small: Small,
    resid: Resid,
) -> None:
    small.run()
    assert notice(small.context()) == []
    small.write(swap)
    code, out, err = resid("sql", "SELECT count(*) AS n FROM directions", "--study", small.file, "--format", "csv")
    assert (code, out.split()) == (0, ["n", str(len(small.ask("FROM directions")))])
    for part in ("direction 'd'", "condition 'add'", "cosines", "remedy: resid run"):
        assert part in err
    code, _, err = resid("report", "--study", small.file, "--output", small.folder / "page.html")
    assert code == 0
    assert "older version of the study" in err
    assert "older version of the study" in (small.folder / "page.html").read_text()
    small.run()
    assert notice(small.context()) == []
    keys = {row["direction_key"] for row in small.ask("SELECT direction_key FROM directions")}
    assert {row["direction_key"] for row in small.ask("SELECT direction_key FROM projections")} <= keys
    code, _, err = resid("report", "--study", small.file, "--output", small.folder / "page.html")
    assert (code, "older version" in err) == (0, False)


def test_an_edit_and_its_revert_have_nothing_to_compute(small: Small) -> None:
    small.run()
    first = small.ask("SELECT direction, direction_key, layer, vector FROM directions ORDER BY ALL")
    small.write(swap)
    done = small.run()
    assert (done["directions"], done["replay"]) == (2, 2)  # d and noise, whose norm stays: its texts do
    assert small.ask("SELECT direction, direction_key, layer, vector FROM directions ORDER BY ALL") != first
    small.write(swap)
    plan = {stage: (one.make, one.later) for stage, one in plan_stages(small.context()).items()}
    assert plan == {**dict.fromkeys(plan, (0, 0)), "compare": (1, 0)}  # comparisons are small, and not kept by key
    assert small.run() == {stage: make for stage, (make, _) in plan.items()}
    assert small.ask("SELECT direction, direction_key, layer, vector FROM directions ORDER BY ALL") == first


def test_a_renamed_or_moved_direction_is_not_computed_again(small: Small) -> None:
    small.run()

    def rename(study: dict[str, Any]) -> None:
        directions = study["directions"]
        study["directions"] = {"answer": directions["answer"], "e": directions["d"], "noise": directions["noise"]}
        study["directions"]["noise"]["match_norm"] = "e"
        study["replay"]["conditions"]["add"]["interventions"][0]["add"] = "e"
        study["geometry"]["projections"][0]["directions"] = ["noise"]

    small.write(rename)
    plan = plan_stages(small.context())
    assert {stage: (one.make, one.later) for stage, one in plan.items()} == dict.fromkeys(plan, (0, 0))
    assert sum(small.run().values()) == 0
    assert [row["direction"] for row in small.ask("SELECT DISTINCT direction FROM directions ORDER BY 1")] == [
        "answer", "e", "noise",
    ]  # fmt: skip


def test_answers_that_changed_make_their_direction_wait_for_replay(small: Small, resid: Resid) -> None:
    """Used to keep the direction, and what was generated with it, of answers that the study does not ask for."""
    small.run()
    small.write(lambda study: study["replay"]["conditions"]["plain"].update(decoding={"max_new_tokens": 6}))
    code, out, err = resid("directions", "--study", small.file)
    assert code == 0, err
    assert "direction 'answer': 4 answers of 'plain' to 'bad' are not generated yet" in out
    code, out, err = resid("replay", "--study", small.file)
    assert code == 0, err
    assert "replay: 8 generations done" in out
    assert "condition 'out': its directions are not computed yet" in out
    for stage in ("directions", "replay"):
        code, _, err = resid(stage, "--study", small.file)
        assert (code, "(resid capture)" in err) == (0, False) if stage == "directions" else (1, True), err
    small.run()
    assert notice(small.context()) == []


def test_results_without_kept_vectors_are_read_and_kept_before_they_are_replaced(small: Small) -> None:
    """Results of versions of resid that kept no older vectors."""
    small.run()
    folder = small.folder / "results" / "computed_directions"
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert all(plan.make == plan.later == 0 for plan in plan_stages(small.context()).values())
    assert sum(small.run().values()) == 0
    small.write(swap)
    small.run()
    small.write(swap)
    assert sum(done for stage, done in small.run().items() if stage != "compare") == 0
    assert ResultStore(Location.of(small.folder / "results")).committed("computed_directions")


# --- plan against run --------------------------------------------------------------------------------------------


def coefficient(study: dict[str, Any]) -> None:
    study["replay"]["conditions"]["add"]["interventions"][0]["coefficient"] += 1


def sweep(study: dict[str, Any]) -> None:
    study["replay"]["conditions"]["control"]["interventions"][0]["coefficient"] = [1, 2]


def decoding(study: dict[str, Any]) -> None:
    study["replay"]["decoding"]["max_new_tokens"] += 1


def monitor(study: dict[str, Any]) -> None:
    study["replay"]["monitor"] = None if study["replay"].get("monitor") else {"directions": ["noise"], "layers": [-1]}


def judge(study: dict[str, Any]) -> None:
    study["judges"]["degenerate"] = {} if study["judges"]["degenerate"] else {"min_tokens": 3}


def judges(study: dict[str, Any]) -> None:
    study["judges"].pop("degenerate") if "degenerate" in study["judges"] else study["judges"].update(degenerate={})


def layers(study: dict[str, Any]) -> None:
    study["capture"][0]["layers"] = [0, 1, 2] if study["capture"][0].get("layers") == [1, 2] else [1, 2]


def another(study: dict[str, Any]) -> None:
    study["replay"]["conditions"]["another"] = {"interventions": [{"add": "d", "layers": [2], "coefficient": 1}]}


def fewer(study: dict[str, Any]) -> None:
    study["comparisons"].pop("effect", None)
    study["replay"]["conditions"].pop("add", None)


def chain(study: dict[str, Any]) -> None:
    study["directions"]["gap"] = {"method": "difference", "minuend": "answer", "subtrahend": "d"}
    study["directions"]["far"] = {"method": "orthogonalised", "direction": "gap", "orthogonal_to": ["noise"]}
    study["geometry"]["projections"].append({"prompts": ["good"], "directions": ["far"]})


EDITS = [swap, seed, coefficient, sweep, decoding, monitor, judges, layers, another, fewer, chain, "prompts", "texts"]


@settings(
    max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_a_run_does_what_was_planned_to_the_row(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    data: st.DataObject,
) -> None:
    """Used to say "0 to make" where a run made every text of an edited direction."""
    small = Small(tmp_path_factory.mktemp("edits"), tiny_folder)
    for step in range(3):
        if step:
            chosen = data.draw(st.lists(st.sampled_from(EDITS), min_size=1, max_size=2, unique=True))
            for edit in chosen:
                if edit == "prompts":
                    small.prompts(
                        "new", data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True))
                    )
                elif edit == "texts":
                    small.prompts(
                        "bad", data.draw(st.lists(st.sampled_from(WORDS[:4]), min_size=2, max_size=4, unique=True))
                    )
                elif edit is not coefficient or "add" in small.content["replay"]["conditions"]:
                    small.write(edit)
        plan = plan_stages(small.context())
        done = small.run()
        for stage, one in plan.items():
            if one.later or one.open:
                most = float("inf") if one.open else one.make + one.later
                assert one.make <= done[stage] <= most, (stage, one, done)
            else:
                assert done[stage] == one.make, (stage, one, done)
        again = plan_stages(small.context())
        assert {stage: (one.make, one.later, one.open) for stage, one in again.items()} == dict.fromkeys(
            again, (0, 0, False)
        )
        assert notice(small.context()) == []
        assert sum(small.run().values()) == 0
