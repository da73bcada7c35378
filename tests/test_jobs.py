"""The stages as users run them: plan, run, rerun, kill and resume, change a study, query, verify, repair."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

from jobs.cli import main
from jobs.context import Context
from store.activations import ActivationStore
from store.location import Location
from store.results import ResultStore
from store.sql import connect, query
from store.study_file import load_study

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer and chat template, as a folder that users could have."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


Change = Callable[[dict[str, Any]], None]


class Project:
    """A folder with a study and where its data goes."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model
        self.study = folder / "study.yaml"
        self.write()

    def write(self, change: Change | None = None, name: str = "s", file: str = "study.yaml") -> Path:
        """Write a study: every kind of direction, responses that feed capture, and a few conditions."""
        parts = {"seed": 2, "parts": {"train": 8, "test": 4}}  # of these 12 prompts, just so many fall to each
        study: dict[str, Any] = {
            "name": name,
            "model": {"source": str(self.model), "dtype": "float32"},
            "prompts": {
                "bad": {"path": str(ROOT / "prompts/harmful.jsonl"), "limit": 12, "split": parts},
                "good": {"path": str(ROOT / "prompts/harmless.jsonl"), "limit": 12, "split": parts},
            },
            "capture": [
                {"prompts": ["bad", "good"]},
                {"prompts": ["bad@test"], "responses": "plain", "positions": ["response_avg"]},
                {"prompts": ["good@test"], "responses": "plain", "positions": ["response_avg"]},
            ],
            "directions": {
                "refusal": {"positive": "bad@train", "negative": "good@train"},
                "answer": {
                    "positive": "bad@test",
                    "negative": "good@test",
                    "position": "response_avg",
                    "responses": "plain",
                },
                "gap": {"method": "difference", "minuend": "answer", "subtrahend": "refusal"},
                "perp": {"method": "orthogonalised", "direction": "answer", "orthogonal_to": ["refusal"]},
                "random": {"method": "random", "seed": 3, "match_norm": "refusal"},
            },
            "geometry": {"projections": [{"prompts": ["bad@test", "good@test"]}]},
            "replay": {
                "prompts": ["bad@test", "good@test"],
                "decoding": {"max_new_tokens": 8},
                "block_rows": 5,
                "monitor": {"directions": ["refusal"], "layers": [-1]},
                "conditions": {
                    "baseline": {},
                    "plain": {"prompts": ["bad@test", "good@test"]},
                    "sweep": {"interventions": [{"add": "refusal", "layers": [1], "coefficient": [1, -2.5]}]},
                    "gone": {"interventions": [{"project_out": ["refusal", "answer"], "layers": "all"}]},
                    "control": {
                        "control_of": "gone",
                        "interventions": [{"project_out": "random", "layers": [0.5], "tokens": "response"}],
                    },
                },
            },
            "block_rows": 3,
            "store": str(self.folder / "store"),
            "results": str(self.folder / "results"),
            "ray": {"address": "off"},
        }
        if change is not None:
            change(study)
        path = self.folder / file
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    def ask(self, sql: str, results: str = "results") -> list[dict[str, Any]]:
        connection = connect(Location.of(self.folder / results))
        try:
            return query(connection, sql).to_pylist()
        finally:
            connection.close()

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "jobs.cli", *arguments]


@pytest.fixture
def project(tmp_path: Path, tiny_folder: Path) -> Project:
    return Project(tmp_path, tiny_folder)


@pytest.fixture
def resid(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


Resid = Callable[..., tuple[int, str, str]]


def test_a_study_runs_to_its_end_and_a_second_run_finds_everything(project: Project, resid: Resid) -> None:
    code, out, err = resid("run", "--study", project.study)
    assert code == 0, err
    assert "refusals by condition" in out
    rates = project.ask("SELECT condition, n, n_scored FROM refusal_rates")
    assert {rate["condition"] for rate in rates} == {
        "baseline", "plain", "sweep[coefficient=1]", "sweep[coefficient=-2.5]", "gone", "control",
    }  # fmt: skip
    assert all(rate["n"] == rate["n_scored"] == 4 for rate in rates)
    assert {row["direction"] for row in project.ask("FROM directions")} == {
        "refusal",
        "answer",
        "gap",
        "perp",
        "random",
    }
    # Three layers, two rows of each prompt set: every row on every direction, once.
    [count] = project.ask("SELECT count(*) AS n, count(DISTINCT row_key) AS rows FROM projections")
    assert (count["n"], count["rows"]) == (8 * 5 * 3, 8)
    monitored = project.ask("SELECT DISTINCT condition FROM monitored JOIN generations USING (generation_key)")
    assert "baseline" in {row["condition"] for row in monitored}

    before = sorted((path, path.stat().st_mtime_ns) for path in project.folder.rglob("*commits/*.json"))
    code, out, _ = resid("run", "--study", project.study)
    assert code == 0
    for line in ("capture: 0 rows done, 32 found", "replay: 0 generations done", "score: 0 scores done"):
        assert line in out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in project.folder.rglob("*commits/*.json"))
    code, out, _ = resid("plan", "--study", project.study)
    assert code == 0
    assert "capture: 0 rows to capture" in out
    assert "replay: 0 generations to make" in out


def test_a_study_runs_on_an_fsspec_url_as_on_a_path(project: Project, resid: Resid) -> None:
    base = f"memory://{project.folder.name}"
    places = ["--store", f"{base}/store", "--results", f"{base}/results"]
    for expected in ("24 rows to capture", "capture: 0 rows to capture"):
        assert expected in resid("plan", "--study", project.study, *places)[1]
        assert resid("run", "--study", project.study, *places)[0] == 0
    assert resid("verify", *places)[0] == 0
    assert resid("run", "--study", project.study)[0] == 0
    sql = "SELECT generation_key, text FROM all_generations ORDER BY ALL"
    connection = connect(Location.of(f"{base}/results"))
    assert query(connection, sql).to_pylist() == project.ask(sql)


def test_plan_writes_nothing_and_loads_no_weights(
    project: Project, resid: Resid, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("plan loaded the model")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    code, out, err = resid("plan", "--study", project.study)
    assert code == 0, err
    assert "24 rows to capture" in out
    assert not (project.folder / "store").exists()
    assert not (project.folder / "results").exists()


def test_directions_and_geometry_never_import_torch(project: Project, resid: Resid) -> None:
    assert resid("capture", "--study", project.study)[0] == 0
    for stage in ("directions", "geometry"):
        code = (
            f"import sys; sys.argv = ['x', '--study', {str(project.study)!r}]\n"
            f"from jobs.stage import main_for\n"
            f"try: main_for('{stage}')\n"
            f"except SystemExit as stop: assert not stop.code, stop.code\n"
            f"assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert project.ask("SELECT count(*) AS n FROM cosines")[0]["n"] > 0


def commits(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*commits/*.json")}


def killed(command: list[str], folder: Path, after: int, how: signal.Signals) -> subprocess.Popen[str]:
    """Start a command and kill it once so many blocks are committed."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 90
        while len(commits(folder)) < after and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(how)
        process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process


def test_a_capture_killed_and_resumed_equals_one_that_was_not(project: Project, resid: Resid) -> None:
    change = lambda study: study.update(block_rows=1)  # noqa: E731
    project.write(change)
    store = project.folder / "store"
    killed(project.command("capture", "--study", str(project.study)), store, 5, signal.SIGKILL)
    kept = commits(store)
    assert 5 <= len(kept) < 24, "the kill came too late to show anything"
    assert resid("capture", "--study", project.study)[0] == 0
    after = commits(store)
    assert len(after) == 24
    assert {name: after[name] for name in kept} == kept, "committed work was repeated"
    other = project.folder / "store2"
    assert resid("capture", "--study", project.study, "--store", other)[0] == 0
    shards = sorted(path.relative_to(store) for path in store.rglob("c/*/0/0/0"))
    assert shards == sorted(path.relative_to(other) for path in other.rglob("c/*/0/0/0"))
    assert len(shards) == 24
    for shard in shards:
        assert (store / shard).read_bytes() == (other / shard).read_bytes()


def test_a_replay_killed_and_resumed_equals_one_that_was_not(project: Project, resid: Resid) -> None:
    def change(study: dict[str, Any]) -> None:
        study["replay"].update(block_rows=1, prompts=["bad@train", "good@train"])
        study["replay"]["decoding"] = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
        study["replay"]["seeds"] = [0, 1]

    project.write(change)
    assert resid("capture", "--study", project.study)[0] == 0
    assert resid("directions", "--study", project.study)[0] == 0
    results = project.folder / "results"
    folder = results / "generations"
    killed(project.command("replay", "--study", str(project.study)), folder, 4, signal.SIGKILL)
    kept = commits(folder)
    assert len(kept) >= 4
    assert resid("run", "--study", project.study)[0] == 0
    after = commits(folder)
    assert {name: after[name] for name in kept} == kept, "committed work was repeated"
    assert len(kept) < len(after), "the kill came too late to show anything"
    fresh = ["--results", project.folder / "results2"]
    assert resid("run", "--study", project.study, *fresh)[0] == 0
    sql = "SELECT generation_key, text, n_tokens, finish_reason FROM all_generations ORDER BY ALL"
    texts = project.ask(sql)
    assert texts == project.ask(sql, "results2")
    assert len({text["generation_key"] for text in texts}) == len(texts)


def test_an_interrupt_says_how_to_go_on(project: Project) -> None:
    project.write(lambda study: study.update(block_rows=1))
    process = killed(
        project.command("capture", "--study", str(project.study)), project.folder / "store", 3, signal.SIGINT
    )
    assert process.returncode == 130


def test_a_second_study_captures_only_what_is_missing(project: Project, resid: Resid) -> None:
    assert resid("capture", "--study", project.study)[0] == 0

    def change(study: dict[str, Any]) -> None:
        for name in ("bad", "good"):
            study["prompts"][name].update(limit=14)
        study["capture"] = study["capture"][:1]
        study["directions"] = {"refusal": study["directions"]["refusal"]}
        del study["replay"]

    second = project.write(change, name="t", file="second.yaml")
    code, out, _ = resid("capture", "--study", second)
    assert code == 0
    assert "capture: 4 rows done, 24 found" in out

    def more(study: dict[str, Any]) -> None:
        change(study)
        study["capture"][0].update(components=["resid_post", "mlp_out"], positions=["prompt_end", "token:-2"])

    third = project.write(more, name="u", file="third.yaml")
    assert resid("capture", "--study", third)[0] == 0
    [model] = ActivationStore.open(project.folder / "store").models()
    boxes = [(g.plan.components, g.plan.positions, g.plan.n_rows) for g in model.generations()]
    assert (("resid_post",), ("prompt_end",), 24) in boxes
    held = {(c, p): 0 for c in ("resid_post", "mlp_out") for p in ("prompt_end", "token:-2")}
    for components, positions, rows in boxes:
        for box in ((c, p) for c in components for p in positions):
            held[box] += rows
    assert set(held.values()) == {28}, "something was captured twice, or not at all"


def test_a_changed_study_never_shows_results_of_its_older_self(project: Project, resid: Resid) -> None:
    assert resid("run", "--study", project.study)[0] == 0

    def change(study: dict[str, Any]) -> None:
        study["replay"]["conditions"]["sweep"]["interventions"][0]["coefficient"] = [4]

    project.write(change)
    code, out, _ = resid("run", "--study", project.study)
    assert code == 0
    assert "replay: 8 generations done" in out
    names = {row["condition"] for row in project.ask("SELECT DISTINCT condition FROM generations")}
    assert "sweep[coefficient=4]" in names
    assert "sweep[coefficient=1]" not in names
    assert project.ask("SELECT count(*) AS n FROM all_generations")[0]["n"] == 48 + 8

    project.write(lambda study: study["model"].update(system_prompt="Be brief."))
    code, _, err = resid("directions", "--study", project.study)
    assert code == 1, "directions were computed from rows of another system prompt"
    assert "has changed since the capture" in err
    assert "resid capture --study" in err


def test_damage_is_found_named_and_repaired(project: Project, resid: Resid) -> None:
    assert resid("run", "--study", project.study)[0] == 0
    code, out, _ = resid("verify", "--study", project.study)
    assert code == 0
    assert "all of it is whole" in out
    shard = sorted((project.folder / "store").rglob("c/0/0/0/0"))[0]
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    parquet = next((project.folder / "results" / "generations").glob("*.parquet"))
    original = parquet.read_bytes()
    parquet.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    code, _, err = resid("verify", "--study", project.study)
    assert code == 1
    assert "block 0" in err
    assert parquet.name in err
    parquet.write_bytes(original)
    assert resid("verify", "--study", project.study, "--repair")[0] == 1
    code, out, _ = resid("run", "--study", project.study)
    assert code == 0
    assert "capture: 3 rows done" in out
    assert resid("verify", "--study", project.study)[0] == 0


def test_a_model_that_overflows_names_the_row_and_commits_nothing_of_its_block(
    project: Project, resid: Resid, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    # Only prompts with a capital W pass through the poisoned embedding.
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("W")] = torch.inf
    folder = tmp_path / "poisoned"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    project.model = folder
    project.write(lambda study: study.update(block_rows=1))
    code, out, err = resid("capture", "--study", project.study)
    assert code == 1
    assert "NaN or infinity" in err
    assert "prompt" in err
    texts = {
        prompt.text for prompts in Context(load_study(project.study)).prompt_sets.values() for prompt in prompts.prompts
    }
    bad = sum("W" in text for text in texts)
    assert 0 < bad < 24
    assert f"capture: {24 - bad} rows done" in out
    assert len(commits(project.folder / "store")) == 24 - bad


def test_sql_answers_as_table_csv_json_and_parquet(project: Project, resid: Resid) -> None:
    assert resid("run", "--study", project.study)[0] == 0
    sql = "SELECT direction, layer, norm FROM directions ORDER BY ALL"
    places = ["--study", project.study]
    assert "direction" in resid("sql", *places, sql)[1]
    rows = list(csv.DictReader(io.StringIO(resid("sql", *places, sql, "--format", "csv")[1])))
    assert len(rows) == 15
    assert len(json.loads(resid("sql", *places, sql, "--format", "json")[1])) == 15
    target = project.folder / "answer.parquet"
    assert resid("sql", *places, sql, "--format", "parquet", "--output", target)[0] == 0
    assert target.stat().st_size > 0
    code, _, err = resid("sql", *places, "COPY (SELECT 1) TO 'x.csv'")
    assert code == 1
    assert "refused" in err
    assert resid("sql", "--results", project.folder / "nothing", "SELECT 1")[0] == 1


def test_a_generated_row_holds_the_tokens_that_were_generated(project: Project, resid: Resid) -> None:
    assert resid("run", "--study", project.study)[0] == 0
    sql = (
        "SELECT rows.row_key, n_tokens, prompt_length, token_ids FROM rows JOIN all_generations USING (generation_key) "
        "WHERE source = 'generated'"
    )
    rows = project.ask(sql.replace("n_tokens", "rows.n_tokens"))
    assert len(rows) == 8
    assert all(row["n_tokens"] == row["prompt_length"] + len(row["token_ids"]) for row in rows)


def test_every_number_leads_back_to_versions_and_inputs(project: Project, resid: Resid) -> None:
    assert resid("run", "--study", project.study)[0] == 0
    [versions] = project.ask("SELECT DISTINCT code_version, torch_version, transformers_version FROM all_generations")
    assert all(versions.values())
    for row in project.ask("SELECT DISTINCT direction, provenance, n_positive FROM directions"):
        assert json.loads(row["provenance"])["digest"]
    [model] = project.ask("SELECT receipt FROM models")
    assert json.loads(model["receipt"])["checks"]
    store = ActivationStore.open(project.folder / "store").models()[0]
    commit = store.generations()[0].commit_record(0)
    assert commit.provenance["versions"]["torch"]
    assert not [found for found in ResultStore(Location.of(project.folder / "results")).verify() if found.is_damage]


def test_a_template_that_reads_the_clock_is_told_the_moment_of_the_first_capture(
    tmp_path: Path, tiny_folder: Path, resid: Resid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row used to be new on the next day: captured and generated again, unnoticed."""
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    template = "{{ bos_token }}<|system|>Today {{ strftime_now('%H:%M:%S.%f') }}" + CHAT_TEMPLATE
    tiny_tokenizer(template.replace("}}{{ bos_token }}", "}}")).save_pretrained(model)

    def change(study: dict[str, Any]) -> None:
        study["capture"], study["directions"] = study["capture"][:1], {"refusal": study["directions"]["refusal"]}
        del study["geometry"], study["replay"]["monitor"]
        study["replay"]["conditions"] = {"baseline": {}}

    project = Project(tmp_path, model)
    study = project.write(change)
    code, out, err = resid("plan", "--study", study)
    assert code == 0, err
    assert "the chat template reads the clock" in out
    assert not (tmp_path / "store").exists()
    code, out, err = resid("run", "--study", study, "--quiet")
    assert code == 0, err
    assert "the first capture, kept in the store" in out
    for name in ("s", "other"):
        code, out, err = resid("run", "--study", project.write(change, name=name), "--quiet")
        assert code == 0, err
        assert "capture: 0 rows" in out
        assert "replay: 0 generations" in out

    def stated(study: dict[str, Any]) -> None:
        change(study)
        study["model"]["date"] = "2026-11-30"

    code, out, err = resid("plan", "--study", project.write(stated))
    assert "it is told 2026-11-30 (from model.date" in out
    assert "capture: 24 rows to capture" in out
