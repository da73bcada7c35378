"""Result tables: commits, replacement, reading and damage, on local disk and behind an fsspec URL."""

from __future__ import annotations

import json
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import DamageError, MismatchError
from store.location import Location
from store.results import ResultStore
from store.results_collect import find_unused, remove_unused
from store.schemas import TABLES, schema_of


@pytest.fixture(params=["local", "memory"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    place = f"memory://{uuid.uuid4().hex}/results" if request.param == "memory" else tmp_path / "results"
    return ResultStore(Location.of(place))


def scores(*keys: str, value: float = 1.0) -> pa.Table:
    rows = [
        {"generation_key": key, "judge": "refusal_phrases", "judge_version": "1", "value": value, "label": "refusal"}
        for key in keys
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["scores"])


def sweep(store: ResultStore) -> int:
    """Remove the files that no record names; return how many."""
    unused = [item for item in find_unused(store, 0) if item.kind != "superseded"]
    removed, left = remove_unused(store, unused)
    assert left == []
    return len(removed)


def keys(store: ResultStore) -> list[str]:
    return sorted(store.read("scores", columns=["generation_key"])["generation_key"].to_pylist())


def damage(store: ResultStore, deep: bool = True) -> list[tuple[str, bool]]:
    return [(finding.kind, finding.is_damage) for finding in store.verify(deep=deep)]


def filled(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return [1, 2]
    if pa.types.is_timestamp(kind):
        return datetime(2026, 1, 1, tzinfo=UTC)
    if pa.types.is_boolean(kind):
        return True
    return "text" if pa.types.is_string(kind) else 1


@pytest.mark.parametrize("table", TABLES)
def test_every_table_comes_back_as_it_was_written(results: ResultStore, table: str) -> None:
    schema = schema_of(table)
    rows = [{field.name: filled(field.type) for field in schema}]
    rows += [{field.name: None if field.nullable else filled(field.type) for field in schema}]
    data = pa.Table.from_pylist(rows, schema=schema)
    assert results.read(table).equals(schema.empty_table())
    assert results.write_block(table, "b0", data)
    results.replace(table, "study", data)
    assert results.read(table).equals(pa.concat_tables([data, data]))
    assert results.read(table).schema == schema
    assert results.verify() == []


def test_a_block_is_written_once(results: ResultStore) -> None:
    assert results.write_block("scores", "b0", scores("a"))
    assert not results.write_block("scores", "b0", scores("b"))
    assert keys(results) == ["a"]
    assert results.committed("scores") == {"b0"}
    assert results.verify() == []


def test_a_writer_that_loses_the_commit_leaves_the_winner_untouched(
    results: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other worker commits between this one's file and its commit record.
    create = Location.create

    def late(self: Location, data: bytes) -> bool:
        monkeypatch.setattr(Location, "create", create)
        assert ResultStore(results.location).write_block("scores", "b0", scores("winner"))
        return create(self, data)

    monkeypatch.setattr(Location, "create", late)
    assert not results.write_block("scores", "b0", scores("loser"))
    assert keys(results) == ["winner"]
    assert results.verify() == []


def test_a_loser_with_the_same_bytes_keeps_the_shared_file(
    results: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Location.create

    def late(self: Location, data: bytes) -> bool:
        monkeypatch.setattr(Location, "create", create)
        results.write_block("scores", "b0", scores("a"))
        return create(self, data)

    monkeypatch.setattr(Location, "create", late)
    assert not results.write_block("scores", "b0", scores("a"))
    assert keys(results) == ["a"]


def test_of_many_writers_of_one_block_exactly_one_wins(tmp_path: Path) -> None:
    store = ResultStore(Location.of(tmp_path))
    won: list[str] = []
    barrier = threading.Barrier(6)

    def write(name: str) -> None:
        barrier.wait()
        if store.write_block("scores", "b0", scores(name)):
            won.append(name)

    threads = [threading.Thread(target=write, args=(f"w{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert keys(store) == won
    assert store.verify() == []


def test_a_file_without_its_commit_is_not_read_and_is_a_leftover(
    results: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Location, data: bytes) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Location, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            results.write_block("scores", "b0", scores("a"))
    assert results.files("scores") == []
    assert keys(results) == []
    assert damage(results) == [("leftover", False)]
    assert results.write_block("scores", "b0", scores("b"))
    assert keys(results) == ["b"]
    assert sweep(results) == 1
    assert results.verify() == []


def test_replace_shows_the_new_rows_only_and_keeps_other_parts(results: ResultStore) -> None:
    results.replace("scores", "study-a", scores("a1", "a2"))
    results.replace("scores", "study-b", scores("b"))
    old = results.files("scores")[0]
    results.replace("scores", "study-a", scores("a3"))
    assert keys(results) == ["a3", "b"]
    assert old.exists()  # a reader that holds the old list can finish
    assert damage(results) == [("leftover", False)]
    assert results.committed("scores") == set()
    assert sweep(results) == 1
    assert not old.exists()
    assert keys(results) == ["a3", "b"]


def test_replacing_with_nothing_empties_the_part(results: ResultStore) -> None:
    results.replace("scores", "s", scores("a"))
    results.replace("scores", "s", scores())
    assert keys(results) == []


def test_columns_and_filters_select(results: ResultStore) -> None:
    results.write_block("scores", "b0", scores("a", value=0.0))
    results.write_block("scores", "b1", scores("b", "c", value=1.0))
    read = results.read("scores", columns=["value", "generation_key"], filters=pc.field("value") > 0.5)
    assert read.column_names == ["value", "generation_key"]
    assert read.num_rows == 2
    assert results.read("scores", columns=["judge"], filters=[("generation_key", "=", "a")]).num_rows == 1
    with pytest.raises(ValueError, match="no column 'valu'"):
        results.read("scores", columns=["valu"])


def test_provenance_stays_in_the_commit(results: ResultStore) -> None:
    results.write_block("scores", "b0", scores("a"), provenance={"code": "1.2", "seed": 7})
    [commit] = results.commits("scores")
    assert commit.provenance == {"code": "1.2", "seed": 7}
    assert (commit.rows, commit.name, commit.table) == (1, "b0", "scores")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (scores("a").drop_columns(["label"]), r"missing \['label'\]"),
        (scores("a").append_column("extra", pa.array([1])), r"unknown \['extra'\]"),
        (scores("a").select(list(reversed(TABLES["scores"].names))), "in the order"),
        (scores("a").set_column(3, "value", pa.array([1])), "column value .* is int64 and must be double"),
        (pa.Table.from_pylist([{"judge": "j"}], schema=TABLES["scores"]), "generation_key .* has 1 nulls"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, data: pa.Table, message: str) -> None:
    store = ResultStore(Location.of(tmp_path))
    for write in (store.write_block, store.replace):
        with pytest.raises(MismatchError, match=message):
            write("scores", "b0", data)
    assert store.verify() == []


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "a b", "a*", "x" * 300, "ä"])
def test_a_name_that_cannot_be_a_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a block"):
        ResultStore(Location.of(tmp_path)).write_block("scores", name, scores("a"))


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no result table 'score'"):
        ResultStore(Location.of(tmp_path)).read("score")


def test_a_missing_file_is_damage(results: ResultStore) -> None:
    results.write_block("scores", "b0", scores("a"))
    results.files("scores")[0].remove()
    assert damage(results) == [("missing", True)]
    with pytest.raises(DamageError, match="resid verify"):
        results.read("scores")


def test_a_truncated_file_is_damage_even_without_hashing(results: ResultStore) -> None:
    results.write_block("scores", "b0", scores("a"))
    file = results.files("scores")[0]
    file.write(file.read_bytes()[:-100])
    assert damage(results, deep=False) == [("changed", True)]
    with pytest.raises(DamageError):
        results.read("scores")


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, place: float, bit: int) -> None:
    store = ResultStore(Location.of(tmp_path_factory.mktemp("flip")))
    store.write_block("scores", "b0", scores(*map(str, range(50))))
    file = store.files("scores")[0]
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    file.write(bytes(content))
    assert damage(store) == [("changed", True)]


def test_a_flipped_bit_in_a_page_is_found_while_reading(tmp_path: Path) -> None:
    store = ResultStore(Location.of(tmp_path))
    store.write_block("scores", "b0", scores(*[uuid.uuid4().hex for _ in range(500)]))
    file = store.files("scores")[0]
    content = bytearray(file.read_bytes())
    content[2000] ^= 1  # inside the first column's data
    file.write(bytes(content))
    with pytest.raises(DamageError):
        store.read("scores")


def test_a_commit_record_that_cannot_be_read_is_damage(results: ResultStore) -> None:
    results.write_block("scores", "b0", scores("a"))
    (results.location / "scores" / "_commits" / "b0.json").write(b"{")
    assert ("record", True) in damage(results)
    with pytest.raises(DamageError, match="commit record"):
        results.read("scores")


def test_a_record_tells_the_size_and_hash_of_its_file(results: ResultStore) -> None:
    results.write_block("scores", "b0", scores("a"))
    record = json.loads((results.location / "scores" / "_commits" / "b0.json").read_bytes())
    content = results.files("scores")[0].read_bytes()
    assert record["size"] == len(content)
    assert record["sha256"][:16] in record["file"]


def test_a_file_of_an_earlier_version_is_read_with_nulls(tmp_path: Path) -> None:
    """Any new column made every older file of the table unreadable."""
    from store.sql import connect

    schema = schema_of("choice_candidates")
    results = ResultStore(Location.of(tmp_path))
    data = pa.Table.from_pylist(
        [{field.name: None if field.nullable else filled(field.type) for field in schema}], schema=schema
    )
    results.replace("choice_candidates", "s", data)
    [file] = results.files("choice_candidates")
    pq.write_table(data.drop_columns(["low", "is_tied"]), str(file.path))
    assert results.read("choice_candidates").equals(data)
    assert results.read("choice_candidates", ["rank", "low"]).equals(data.select(["rank", "low"]))
    rows = connect(results.location).sql("SELECT is_tied, rank FROM choice_candidates").fetchall()
    assert rows == [(None, data["rank"][0].as_py())]
