"""SQL functions over activations give what NumPy gives, read lazily, and never mix models or studies."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from s3_server import bucket as bucket
from s3_server import s3 as s3
from store_worker import D_MODEL, LAYERS, MODEL, capture, make_row, make_rows, new_store, request, truth, write

from analysis.geometry import projection_blocks, projections
from store.activations import ActivationStore, ModelStore
from store.directions import Direction
from store.dtypes import NUMPY_DTYPES
from store.errors import QueryError
from store.generation import Generation
from store.location import Location
from store.results import ResultStore
from store.rows import Row
from store.schemas import TABLES
from store.sites import Spans
from store.sql import connect, query

ROWS = make_rows(9)
KEYS = [row.key for row in ROWS]
POSITIONS = ("prompt_end", "response_avg", "token:0")


def make_direction(name: str = "refusal", seed: int = 0, model: str = MODEL, **changes: Any) -> Direction:
    vectors = np.random.default_rng(seed).standard_normal((LAYERS, D_MODEL)).astype(np.float32)
    return Direction(
        **{
            "name": name,
            "key": f"{name}-{seed}",
            "model": model,
            "method": "difference_of_means",
            "component": "resid_post",
            "position": "prompt_end",
            "layers": tuple(range(LAYERS)),
            "vectors": vectors,
            **changes,
        }
    )


def remember(model: ModelStore, study: str = "s", **sets: list[Row]) -> None:
    records = [
        {
            "prompt_set": name.replace("_", "@"),
            "responses": None,
            "prompt_id": row.prompt_id,
            "row_key": row.key,
            "text": "",
        }
        for name, rows in sets.items()
        for row in rows
    ]
    model.memberships.write(study, "studies/some.yaml", records)


def write_directions(results: Location, *directions: Direction, study: str = "s") -> None:
    tables = [direction.to_table(study) for direction in directions]
    ResultStore(results).replace("directions", study, pa.concat_tables(tables))


@pytest.fixture
def places(tmp_path: Path) -> tuple[Location, Location]:
    """Return results and store: two sets of rows in two captures, two directions."""
    model = new_store(str(tmp_path / "store"))
    capture(model, request(ROWS[:5], positions=POSITIONS), block_rows=2)
    capture(model, request(ROWS[5:], positions=POSITIONS), block_rows=3)
    remember(model, harmful_test=[ROWS[i] for i in (7, 0, 5, 3)], harmless=list(ROWS))
    results = Location.of(tmp_path / "results")
    write_directions(results, make_direction(), make_direction("persona", 1))
    return results, Location.of(tmp_path / "store")


@pytest.fixture
def connection(places: tuple[Location, Location]) -> Iterator[duckdb.DuckDBPyConnection]:
    with connect(*places) as connection:
        yield connection


def write_table(results: ResultStore, name: str, records: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(records, schema=TABLES[name])
    if name in ("generations", "scores"):
        results.write_block(name, "b", table)
    else:
        results.replace(name, "s", table)


def answer(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    return query(connection, sql).to_pylist()


@pytest.mark.parametrize("position", POSITIONS)
def test_project_equals_numpy_in_prompt_order(connection: duckdb.DuckDBPyConnection, position: str) -> None:
    found = answer(connection, f"SELECT * FROM project('harmful@test', 'refusal', 3, position := '{position}')")
    assert [record["row_key"] for record in found] == [KEYS[i] for i in (7, 0, 5, 3)]
    assert [record["prompt_id"] for record in found] == [ROWS[i].prompt_id for i in (7, 0, 5, 3)]
    direction = make_direction()
    for record in found:
        h = truth(ROWS[KEYS.index(record["row_key"])], "resid_post", 3, position).astype(np.float64)
        assert record["projection"] == pytest.approx(h @ direction.unit(3), rel=1e-12)
        assert record["norm"] == pytest.approx(np.linalg.norm(h), rel=1e-12)
        assert (record["direction"], record["layer"], record["prompt_set"]) == ("refusal", 3, "harmful@test")
        assert (record["component"], record["position"], record["model"]) == ("resid_post", position, MODEL)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_project_equals_the_projections_table(tmp_path: Path, dtype: Any, compression: Any) -> None:
    model = new_store(str(tmp_path / "store"), dtype)
    for block in model.create(model.work([request(ROWS, dtype=dtype)], 4, compression)):
        assert write(model, block)
    remember(model, all=list(ROWS))
    direction = make_direction()
    results = Location.of(tmp_path / "results")
    write_directions(results, direction)
    selection = model.select(KEYS, "resid_post", "prompt_end")
    table = {}
    for block in projection_blocks(selection, [direction]):
        for record in projections([block])[block.id].to_pylist():
            table[record["row_key"], record["layer"]] = (record["projection"], record["norm"])
    with connect(results, Location.of(tmp_path / "store")) as connection:
        for layer in range(LAYERS):
            found = answer(connection, f"SELECT row_key, projection, norm FROM project('all', 'refusal', {layer})")
            for record in found:
                expected = table[record["row_key"], layer]
                assert (record["projection"], record["norm"]) == pytest.approx(expected, rel=1e-13)


def test_an_activation_is_the_stored_vector(connection: duckdb.DuckDBPyConnection) -> None:
    sql = (
        "SELECT k, activation(k, 'resid_post.4') AS a, activation(k, 'resid_post.1', position := 'token:0') AS b FROM "
    )
    keys = [KEYS[i] for i in (8, 1, 1, 5)]
    found = answer(connection, sql + "(VALUES " + ", ".join(f"('{key}')" for key in keys) + ", (NULL)) AS t(k)")
    assert [record["k"] for record in found] == [*keys, None]
    for record in found[:-1]:
        row = ROWS[KEYS.index(record["k"])]
        np.testing.assert_array_equal(np.float32(record["a"]), truth(row, "resid_post", 4, "prompt_end"))
        np.testing.assert_array_equal(np.float32(record["b"]), truth(row, "resid_post", 1, "token:0"))
    assert found[-1]["a"] is None


def test_dot_and_cos_of_an_activation_and_a_direction(connection: duckdb.DuckDBPyConnection) -> None:
    sql = (
        f"SELECT dot(activation('{KEYS[2]}', 'resid_post.2'), direction('persona', 2)) AS dot, "
        f"cos(activation('{KEYS[2]}', 'resid_post.2'), direction('persona', 2)) AS cos, cos(0.5) AS plain"
    )
    ((dot, cos, plain),) = [tuple(record.values()) for record in answer(connection, sql)]
    h, v = truth(ROWS[2], "resid_post", 2, "prompt_end").astype(np.float64), make_direction("persona", 1).at(2)
    assert dot == pytest.approx(h @ v, rel=1e-12)
    assert cos == pytest.approx(h @ v / np.linalg.norm(h) / np.linalg.norm(v), rel=1e-12)
    assert plain == pytest.approx(np.cos(0.5))


def test_the_cosine_of_two_directions_in_sql(connection: duckdb.DuckDBPyConnection) -> None:
    sql = "SELECT layer, cos(a.vector, b.vector) AS c FROM directions a JOIN directions b USING (study, layer) "
    found = answer(connection, sql + "WHERE a.direction = 'refusal' AND b.direction = 'persona' ORDER BY layer")
    a, b = make_direction(), make_direction("persona", 1)
    assert [record["c"] for record in found] == pytest.approx([a.unit(i) @ b.unit(i) for i in range(LAYERS)], rel=1e-9)


def test_dot_is_taken_in_double_precision(connection: duckdb.DuckDBPyConnection) -> None:
    ((found,),) = (
        query(connection, "SELECT dot([1e8, 1, -1e8]::FLOAT[], [1, 1, 1]::FLOAT[3]) AS d").to_pydict().values()
    )
    assert found == 1.0


def test_projections_join_with_the_other_views(connection: duckdb.DuckDBPyConnection) -> None:
    sql = (
        "SELECT p.prompt_set, avg(p.projection - q.projection) AS gap FROM project('harmful@test', 'refusal', 1) p "
        "JOIN project('harmless', 'persona', 1) q USING (row_key) GROUP BY ALL"
    )
    ((found,),) = [[record["gap"]] for record in answer(connection, sql)]
    rows = [truth(ROWS[i], "resid_post", 1, "prompt_end").astype(np.float64) for i in (7, 0, 5, 3)]
    difference = make_direction().unit(1) - make_direction("persona", 1).unit(1)
    assert found == pytest.approx(np.mean([row @ difference for row in rows]), rel=1e-9)


MISTAKES = {
    "project('harmfull@test', 'refusal', 3)": "did you mean 'harmful@test'",
    "project('harmful@test', 'refusl', 3)": "did you mean 'refusal'",
    "project('harmful@test', 'refusal', 99)": "no layer 99",
    "project('harmful@test', 'refusal', 3, position := 'response_start')": r"resid capture --study studies/some\.yaml",
    "project('harmful@test', 'refusal', 3, study := 'other')": "in study 'other'",
    "project('harmful@test', NULL, 3)": "none of these may be NULL",
    f"(SELECT activation('{KEYS[0]}', 'resid_post.77'))": "no layer 77: model 5e5e5e5e5e5e5e5e has 0 to 5",
    f"(SELECT activation('{KEYS[0]}', 'mlp_out.1'))": "no mlp_out at prompt_end at all of the layers",
    f"(SELECT activation('{KEYS[0]}', 'resid_post.1', 'nowhere'))": "nowhere",
    f"(SELECT activation('{KEYS[0]}', 'layer 5'))": "is no site",
    "(SELECT activation('0000', 'resid_post.1'))": "row 0000 is not in",
    "(SELECT dot([1.0], [1.0, 2.0]))": "dimensions must be equal",
    "(SELECT cos([0.0, 0.0], [1.0, 2.0]))": "a vector of zeros, or with NaN, has no direction",
}


@pytest.mark.parametrize("call", MISTAKES)
def test_a_mistake_in_a_call_is_named(connection: duckdb.DuckDBPyConnection, call: str) -> None:
    with pytest.raises(QueryError, match=MISTAKES[call]) as caught:
        query(connection, f"SELECT * FROM {call}")
    assert "Traceback" not in str(caught.value)
    assert "UDF" not in str(caught.value)


def test_a_query_may_take_the_layer_from_a_column(connection: duckdb.DuckDBPyConnection) -> None:
    sql = (
        "SELECT l, avg(projection) AS mean FROM range(6) AS t(l), project('harmful@test', 'refusal', l) "
        "GROUP BY l ORDER BY l"
    )
    found = [record["mean"] for record in answer(connection, sql)]
    rows = [ROWS[i] for i in (7, 0, 5, 3)]
    for layer, mean in enumerate(found):
        values = [truth(row, "resid_post", layer, "prompt_end").astype(np.float64) for row in rows]
        assert mean == pytest.approx(np.mean(values @ make_direction().unit(layer)), rel=1e-9)
    assert len(found) == LAYERS


def test_the_mean_projection_of_refused_and_of_answered_prompts(places: tuple[Location, Location]) -> None:
    results, store = ResultStore(places[0]), places[1]
    base = {"study": "s", "model": MODEL, "decoding_key": "greedy", "condition_key": "c", "condition": "baseline"}
    unused = {"interventions": "[]", "decoding": "{}", "base_condition": "baseline", "coefficient": None}
    write_table(results, "conditions", [{**base, **unused, "control_of": None}])
    asked = {"prompt_set": "harmful@test", "seed": 0}
    keys = [{"row_key": ROWS[i].key, "prompt_id": ROWS[i].prompt_id} for i in (7, 0, 5, 3)]
    write_table(results, "replay_rows", [{**base, **asked, **key} for key in keys])
    text = {"text": "", "token_ids": [1], "n_tokens": 1, "finish_reason": "stop", "seed": 0}
    versions = dict.fromkeys(("code_version", "transformers_version", "torch_version"), "1")
    text = {**text, **versions, "created": datetime(2026, 1, 2, tzinfo=UTC)}
    made = [{**base, **key, **text, "generation_key": key["row_key"]} for key in keys]
    write_table(results, "generations", made)
    score = {"judge": "phrases", "judge_version": "1", "value": 1.0}
    refused = {7: "refusal", 0: "no_refusal", 5: "refusal", 3: "no_refusal"}
    scores = [{**score, "generation_key": ROWS[i].key, "label": label} for i, label in refused.items()]
    write_table(results, "scores", scores)
    sql = (
        "SELECT refusal, avg(projection) AS mean, count(*) AS n FROM labels JOIN project('harmful@test', 'refusal', 3) "
        "USING (model, prompt_id) GROUP BY refusal ORDER BY refusal"
    )
    by_row = (
        "SELECT refusal, avg(dot(activation(row_key, 'resid_post.3'), direction('refusal', 3))) AS mean "
        "FROM labels JOIN generations USING (study, generation_key) GROUP BY refusal ORDER BY refusal"
    )
    direction = make_direction()
    with connect(places[0], store) as connection:
        found, raw = answer(connection, sql), answer(connection, by_row)
    for record, other, chosen in zip(found, raw, ((0, 3), (7, 5)), strict=True):
        rows = [truth(ROWS[i], "resid_post", 3, "prompt_end").astype(np.float64) for i in chosen]
        mean = np.mean([row @ direction.unit(3) for row in rows])
        assert (record["n"], record["mean"]) == (2, pytest.approx(mean, rel=1e-9))
        assert other["mean"] == pytest.approx(mean * direction.norms[3], rel=1e-9)
    assert [record["refusal"] for record in found] == [False, True]


def test_a_batch_reads_each_of_its_chunks_once(
    connection: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, int]] = []
    original = Generation.open_block

    def count(self: Generation, component: Any, block: int) -> Any:
        opened.append((self.id, block))
        return original(self, component, block)

    monkeypatch.setattr(Generation, "open_block", count)
    keys = ", ".join(f"('{key}')" for key in [*KEYS, *KEYS])
    sql = f"SELECT cos(activation(k, 'resid_post.4'), direction('refusal', 4)) AS c FROM (VALUES {keys}) AS t(k)"
    assert len(answer(connection, sql)) == 18
    # Five rows in blocks of two, four in blocks of three; a macro that names an argument twice would read them twice.
    assert len(opened) == len(set(opened)) == 3 + 2


def test_directions_of_one_name_in_two_studies_need_the_study(places: tuple[Location, Location]) -> None:
    results, _ = places
    write_directions(results, make_direction(seed=5), study="t")
    with connect(*places) as connection:
        with pytest.raises(QueryError, match=r"say which with study := 's'"):
            query(connection, "SELECT * FROM project('harmful@test', 'refusal', 3)")
        found = answer(connection, "SELECT direction('refusal', 3, study := 't') AS v")
        np.testing.assert_array_equal(np.float32(found[0]["v"]), make_direction(seed=5).vectors[3])


def test_models_never_mix(places: tuple[Location, Location]) -> None:
    results, store = places
    other = "77" * 32
    manifest = {"fingerprint": other, "dtype": "float32", "n_layers": LAYERS, "d_model": D_MODEL}
    second = ActivationStore.open(store).add_model(manifest)
    rows = [make_row(i, other) for i in range(3)]
    capture(second, request(rows))
    remember(second, harmful_test=rows)
    write_directions(results, make_direction("foreign", 3, other), study="t")
    with connect(*places) as connection:
        found = answer(connection, "SELECT * FROM project('harmful@test', 'foreign', 3)")
        assert {record["row_key"] for record in found} == {row.key for row in rows}
        assert {record["model"] for record in found} == {other}
        both = answer(
            connection, f"SELECT activation(k, 'resid_post.1') AS a FROM (VALUES ('{rows[0].key}'), ('{KEYS[0]}')) t(k)"
        )
        np.testing.assert_array_equal(np.float32(both[0]["a"]), truth(rows[0], "resid_post", 1, "prompt_end"))
        np.testing.assert_array_equal(np.float32(both[1]["a"]), truth(ROWS[0], "resid_post", 1, "prompt_end"))
        product = "SELECT dot(activation(k, 'resid_post.1'), direction('{}', 1)) AS d FROM (VALUES {}) t(k)"
        keys = [f"('{rows[0].key}')", f"('{KEYS[0]}')"]
        for name, of in (("foreign", keys[1:]), ("refusal", keys[:1]), ("foreign", keys), ("refusal", keys)):
            with pytest.raises(QueryError, match="models do not mix"):
                query(connection, product.format(name, ", ".join(of)))
        # What another statement read does not count.
        h, v = truth(rows[0], "resid_post", 1, "prompt_end").astype(np.float64), make_direction("foreign", 3).at(1)
        assert answer(connection, product.format("foreign", keys[0])) == [{"d": pytest.approx(h @ v, rel=1e-9)}]
        h, v = truth(ROWS[0], "resid_post", 1, "prompt_end").astype(np.float64), make_direction().at(1)
        assert answer(connection, product.format("refusal", keys[1])) == [{"d": pytest.approx(h @ v, rel=1e-9)}]
        with pytest.raises(QueryError, match="direction 'foreign' is of model 7777777777777777, and only that"):
            query(connection, "SELECT * FROM project('harmless', 'foreign', 1)")


def test_a_missing_store_matters_only_to_who_asks_it(places: tuple[Location, Location], tmp_path: Path) -> None:
    results, _ = places
    with connect(results) as connection:
        assert len(answer(connection, "SELECT * FROM directions")) == 2 * LAYERS
        assert len(answer(connection, "SELECT direction('refusal', 1) AS v")[0]["v"]) == D_MODEL
        with pytest.raises(QueryError, match="--store"):
            query(connection, "SELECT * FROM project('harmful@test', 'refusal', 1)")
    elsewhere = connect(results, Location.of(tmp_path / "nowhere"))
    with elsewhere as connection, pytest.raises(QueryError, match="holds nothing of model"):
        query(connection, "SELECT * FROM project('harmful@test', 'refusal', 1)")
    assert not (tmp_path / "nowhere").exists()


def test_activations_committed_later_are_seen(places: tuple[Location, Location]) -> None:
    with connect(*places) as connection:
        sql = "SELECT count(*) AS n FROM project('harmless', 'refusal', 2, position := 'response_start')"
        with pytest.raises(QueryError, match="response_start"):
            query(connection, sql)
        capture(ActivationStore.open(places[1]).model(MODEL), request(ROWS, positions=["response_start"]))
        assert answer(connection, sql) == [{"n": 9}]
        late = make_row(20)
        one = f"SELECT activation('{late.key}', 'resid_post.1') AS a"
        with pytest.raises(QueryError, match=f"row {late.key[:16]} is not in"):
            query(connection, one)
        capture(ActivationStore.open(places[1]).model(MODEL), request([late]))
        expected = truth(late, "resid_post", 1, "prompt_end")
        np.testing.assert_array_equal(np.float32(answer(connection, one)[0]["a"]), expected)


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else request.getfixturevalue("bucket")


def test_everything_may_lie_on_object_storage(places: tuple[Location, Location], url: str) -> None:
    model = new_store(f"{url}/store")
    capture(model, request(ROWS), block_rows=2)
    remember(model, harmful_test=list(ROWS))
    write_directions(Location.of(f"{url}/results"), make_direction())
    sql = "SELECT row_key, projection, activation(row_key, 'resid_post.0')[1] AS first FROM project('harmful@test', "
    sql += "'refusal', 5) ORDER BY row_key"
    with connect(Location.of(f"{url}/results"), Location.of(f"{url}/store")) as remote, connect(*places) as local:
        found, expected = answer(remote, sql), answer(local, sql.replace("harmful@test", "harmless"))
        for exact in ("row_key", "first"):
            assert [record[exact] for record in found] == [record[exact] for record in expected]
        # Blocks of another size sum in another order.
        projections = [[record["projection"] for record in each] for each in (found, expected)]
        assert projections[0] == pytest.approx(projections[1], rel=1e-13)


def test_the_command_asks_the_store(places: tuple[Location, Location]) -> None:
    results, store = places
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "sql",
        "--results",
        str(results),
        "--store",
        str(store),
        "--format",
        "csv",
    ]
    sql = "SELECT round(avg(projection), 6) AS mean FROM project('harmless', 'refusal', 2)"
    done = subprocess.run([*command, sql], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    unit = make_direction().unit(2)
    mean = np.mean([truth(row, "resid_post", 2, "prompt_end").astype(np.float64) @ unit for row in ROWS])
    assert float(done.stdout.split()[1]) == pytest.approx(mean, abs=1e-6)
    assert done.stderr == ""


def test_projecting_keeps_two_numbers_of_each_row(tmp_path: Path) -> None:
    """A layer of 256 MB is projected within half of that."""
    d_model, n_rows = 4096, 32768
    model = new_store(str(tmp_path / "store"), "bfloat16", d_model=d_model)
    rows = [Row(MODEL, str(i), (i,), Spans(1, 1)) for i in range(n_rows)]
    values = np.ones((n_rows, 1, 1, d_model), NUMPY_DTYPES["bfloat16"])
    for block in model.create(model.work([request(rows, layers=[0], dtype="bfloat16")])):
        generation = next(g for g in model.generations() if g.id == block.generation)
        assert generation.write_block(block.block, {"resid_post": values[: block.n_rows]})
    del values
    remember(model, all=rows)
    vectors = np.ones((1, d_model), np.float32)
    write_directions(Location.of(tmp_path / "results"), make_direction(layers=(0,), vectors=vectors))
    code = (
        "import sys, re; from pathlib import Path\n"
        "from store.sql import connect, query; from store.location import Location\n"
        "hwm = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024\n"
        "with connect(Location.of(sys.argv[1]), Location.of(sys.argv[2])) as c:\n"
        "    query(c, \"SELECT direction('refusal', 0)\"); before = hwm()\n"
        "    print(query(c, \"SELECT avg(projection) FROM project('all', 'refusal', 0)\").to_pydict())\n"
        "    print(hwm() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "results"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    mean, grown = done.stdout.splitlines()
    assert "64.0" in mean  # 4096 ones on the unit vector of 4096 ones
    assert float(grown) < 256 / 2


def test_no_progress_bar_is_drawn_into_the_output(tmp_path: Path) -> None:
    """Used to happen: under `python -c`, which DuckDB takes for a person at a prompt, once a query took two seconds."""
    code = (
        "import sys; from store.sql import connect, query; from store.location import Location\n"
        "with connect(Location.of(sys.argv[1]), Location.of(sys.argv[2])) as c:\n"
        "    print(query(c, \"SELECT current_setting('enable_progress_bar') AS bar\").to_pydict())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "results"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "{'bar': [False]}\n"
