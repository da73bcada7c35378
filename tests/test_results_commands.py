"""`resid results ls|verify|gc`: what is there, whether it is whole, and what nothing shows any more."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_jobs import Project, Resid, project, resid, tiny_folder  # noqa: F401 (fixtures)

from store.location import Location
from store.results import ResultStore
from store.results_collect import find_unused, remove_unused
from store.schemas import TABLES


def small(study: dict[str, Any]) -> None:
    """Two conditions on two prompts, one direction and its projections."""
    study["capture"] = study["capture"][:1]
    study["directions"] = {"refusal": study["directions"]["refusal"]}
    study["geometry"] = {"projections": [{"prompts": ["bad@test"]}]}
    del study["replay"]["monitor"]
    study["replay"] |= {"prompts": ["bad@test"], "decoding": {"max_new_tokens": 2}, "block_rows": 1}
    add = {"add": "refusal", "layers": [1], "coefficient": 1}
    study["replay"]["conditions"] = {"baseline": {}, "added": {"interventions": [add]}}


def edited(study: dict[str, Any]) -> None:
    small(study)
    study["capture"][0]["positions"] = ["prompt_end", "token:-2"]
    study["directions"]["refusal"]["position"] = "token:-2"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_gc_removes_what_nothing_reads_and_on_request_what_no_study_asks_for(
    project: Project,  # noqa: F811
    resid: Resid,  # noqa: F811
) -> None:
    where = ("--results", str(project.folder / "results"))
    for change in (small, edited):
        code, _, err = resid("run", "--study", project.write(change), "--quiet")
        assert code == 0, err
    before = files(project.folder / "results")
    code, out, err = resid("results", "gc", *where, "--min-age", "0s")
    assert code == 0, err
    assert "it was replaced" in out
    assert "nothing was removed: add --delete" in out
    assert "hold rows that no study here asks for" in out
    assert files(project.folder / "results") == before
    assert "nothing to remove" in resid("results", "gc", *where)[1]  # young files may belong to a live writer
    shown = project.ask("SELECT * FROM generations ORDER BY ALL"), project.ask("SELECT * FROM labels ORDER BY ALL")
    assert resid("results", "gc", *where, "--min-age", "0s", "--delete")[0] == 0
    assert not [item for item in ResultStore(Location.of(where[1])).verify() if item.kind == "leftover"]
    assert len(project.ask("SELECT * FROM all_generations")) == 12
    code, out, _ = resid("results", "gc", *where, "--superseded")
    assert out.count("1 rows of generations that no study here asks for") == 4
    assert "rows of projections that no study here asks for" in out
    assert resid("results", "gc", *where, "--superseded", "--delete")[0] == 0
    assert len(project.ask("SELECT * FROM all_generations")) == 8
    assert (
        project.ask("SELECT * FROM generations ORDER BY ALL"),
        project.ask("SELECT * FROM labels ORDER BY ALL"),
    ) == shown
    assert "all of it is whole" in resid("results", "verify", *where)[1]
    code, out, err = resid("replay", "--study", project.write(edited), "--quiet")
    assert code == 0, err
    assert "replay: 0 generations" in out


def rows(*keys: str) -> pa.Table:
    records = [{"generation_key": key, "judge": "j", "judge_version": "1", "value": 1.0} for key in keys]
    return pa.Table.from_pylist(records, schema=TABLES["scores"])


def test_a_writer_that_commits_the_same_file_meanwhile_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultStore(Location.of(tmp_path))
    results.write_block("scores", "b", rows("a"))
    record = tmp_path / "scores" / "_commits" / "b.json"
    content = record.read_bytes()
    record.unlink()
    [unused] = find_unused(results, 0)
    remove = Location.remove

    def remove_and_commit(self: Location) -> None:
        remove(self)
        record.write_bytes(content)

    monkeypatch.setattr(Location, "remove", remove_and_commit)
    assert remove_unused(results, [unused]) == ([], [unused])
    assert results.verify() == []
    assert results.read("scores").num_rows == 1


def test_partial_files_and_files_of_others_are_told_apart(tmp_path: Path) -> None:
    results = ResultStore(Location.of(tmp_path))
    results.write_block("scores", "b", rows("a"))
    partial = tmp_path / "scores" / "b-0123456789abcdef.parquet.0123456789ab.partial"
    partial.write_bytes(b"x")
    (tmp_path / "scores" / "mine.parquet").write_bytes(b"x")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "x-0123456789abcdef.parquet").write_bytes(b"x")
    unused = [item for item in find_unused(results, 0) if item.kind != "superseded"]
    assert [item.place.path for item in unused] == [partial]
    assert find_unused(results, 3600)[0].kind == "superseded"
    old = time.time() - 7200
    os.utime(partial, (old, old))
    assert [item.kind for item in find_unused(results)] == ["partial", "superseded"]
    assert remove_unused(results, unused) == (unused, [])


def test_a_replaced_part_stays_until_its_successor_is_old_enough(tmp_path: Path) -> None:
    """A query that began before may still read it."""
    results = ResultStore(Location.of(tmp_path))
    results.replace("judges", "s", TABLES["judges"].empty_table())
    [file] = [location.path for location in results.files("judges")]
    record = {"study": "s", "judge": "j", "judge_version": "1", "measures": "refusal", "options": None}
    results.replace("judges", "s", pa.Table.from_pylist([record], schema=TABLES["judges"]))
    old = time.time() - 7200
    os.utime(file, (old, old))
    assert find_unused(results) == []
    pointer = tmp_path / "judges" / "_current" / "s.json"
    os.utime(pointer, (old, old))
    assert [(item.place.path, item.why) for item in find_unused(results)] == [(file, "it was replaced")]


@pytest.mark.parametrize("command", [["results", "ls"], ["results", "verify"], ["results", "gc"], ["verify"]])
def test_an_empty_place_says_that_it_is_empty(tmp_path: Path, resid: Resid, command: list[str]) -> None:  # noqa: F811
    """`resid verify` of a mistyped folder used to print "all of it is whole"."""
    places = ["--results", str(tmp_path / "results")]
    places += ["--store", str(tmp_path / "store")] if command == ["verify"] else []
    code, out, err = resid(*command, *places)
    assert (code, out) == (1, "")
    assert "holds no results" in err or "are empty: there is nothing to check" in err
    assert list(tmp_path.iterdir()) == []


def test_ls_counts_and_verify_names_what_is_damaged(tmp_path: Path, resid: Resid) -> None:  # noqa: F811
    results = ResultStore(Location.of(tmp_path))
    results.write_block("scores", "b", rows("a", "c"))
    asked = {"study": "s", "condition": "x", "condition_key": "x", "decoding_key": "d", "model": "m", "row_key": "r"}
    asked |= {"prompt_set": "p", "prompt_id": "i", "seed": 0}
    results.replace("replay_rows", "s", pa.Table.from_pylist([asked], schema=TABLES["replay_rows"]))
    where = ("--results", str(tmp_path))
    listed = json.loads(resid("results", "ls", *where, "--format", "json")[1])
    assert (listed["tables"]["scores"]["files"], listed["tables"]["scores"]["rows"]) == (1, 2)
    assert listed["studies"] == {"s": {"prompt_sets": 0, "directions": 0, "conditions": 0, "texts": 1}}
    assert "replay_rows" in resid("results", "ls", *where)[1]
    assert "checked every byte of 2 result files" in resid("results", "verify", *where)[1]
    [file] = [location.path for location in results.files("scores")]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, _, err = resid("results", "verify", *where)
    assert code == 1
    assert f"scores/{file.name}: changed: its SHA-256 is not the recorded one" in err
