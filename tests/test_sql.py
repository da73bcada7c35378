"""SQL over results: what the views show, and that nothing can be written or read elsewhere."""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.statistics import wilson_interval
from jobs.cli import main as resid
from jobs.sql import main, run_sql, run_statements
from store.errors import MissingDataError, QueryError
from store.location import Location
from store.results import ResultStore
from store.schemas import TABLES
from store.sql import VIEWS, connect, query

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def rows_of(connection: Any, sql: str) -> list[dict[str, Any]]:
    return query(connection, sql).to_pylist()


def table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=TABLES[name])


def condition(name: str, study: str = "s", **changes: Any) -> dict[str, Any]:
    return {
        "study": study,
        "model": "m",
        "condition": name,
        "base_condition": name.split("=")[0],
        "condition_key": f"key-{name}",
        "control_of": None,
        "interventions": "[]",
        "coefficient": None,
        "decoding_key": "greedy",
        "decoding": "{}",
        **changes,
    }


def asked(name: str, prompt: int, seed: int = 0, study: str = "s") -> dict[str, Any]:
    return {
        "study": study,
        "condition": name,
        "condition_key": f"key-{name}",
        "decoding_key": "greedy",
        "model": "m",
        "row_key": f"row{prompt}",
        "prompt_set": "harmful@test",
        "prompt_id": f"prompt{prompt}",
        "seed": seed,
    }


def generation(name: str, prompt: int, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "generation_key": f"{name}/{prompt}/{seed}",
        "study": "s",
        "model": "m",
        "row_key": f"row{prompt}",
        "prompt_id": f"prompt{prompt}",
        "condition_key": f"key-{name}",
        "decoding_key": "greedy",
        "seed": seed,
        "text": f"text of {name} {prompt}",
        "token_ids": [1, 2, 3],
        "n_tokens": 3,
        "finish_reason": "stop",
        "code_version": "1",
        "transformers_version": "5",
        "torch_version": "2",
        "created": CREATED,
        **changes,
    }


def score(key: str, label: str | None, judge: str = "refusal_phrases", **changes: Any) -> dict[str, Any]:
    value = None if label is None else float(label in ("refusal", "degenerate"))
    return {
        "generation_key": key,
        "judge": judge,
        "judge_version": "1",
        "value": value,
        "label": label,
        "detail": None,
        "error": None if label is not None else "out of memory",
        **changes,
    }


def place(kind: str, folder: Path) -> ResultStore:
    if kind == "memory":
        return ResultStore(Location.of(f"memory://{uuid.uuid4().hex}/results"))
    # A folder like this must be neither a pattern nor a column.
    return ResultStore(Location.of(folder / "lr=3 [old]*it's"))


@pytest.fixture(params=["local", "memory"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    return place(request.param, tmp_path)


@pytest.fixture
def study(results: ResultStore) -> ResultStore:
    return fill(results)


@pytest.fixture(scope="module", params=["local", "memory"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """One connection for the queries that must change nothing."""
    store = fill(place(request.param, tmp_path_factory.mktemp("shared")))
    connection = connect(store.location)
    yield Shared(store, connection)
    connection.close()


@dataclass(frozen=True)
class Shared:
    store: ResultStore
    connection: Any


def fill(results: ResultStore) -> ResultStore:
    """Baseline (4 prompts) and one steering condition at two coefficients (2 prompts x 2 seeds)."""
    results.replace(
        "conditions",
        "s",
        table(
            "conditions",
            [
                condition("baseline"),
                condition("steer=1", coefficient=1.0, control_of="baseline"),
                condition("steer=2", coefficient=2.0, control_of="baseline"),
            ],
        ),
    )
    wanted = [asked("baseline", prompt) for prompt in range(4)]
    wanted += [asked(name, prompt, seed) for name in ("steer=1", "steer=2") for prompt in range(2) for seed in (0, 1)]
    results.replace("replay_rows", "s", table("replay_rows", wanted))
    made = [generation("baseline", prompt) for prompt in range(3)]  # prompt 3 is still to come
    made += [
        generation(name, prompt, seed) for name in ("steer=1", "steer=2") for prompt in range(2) for seed in (0, 1)
    ]
    made.append(generation("dropped", 0))  # an older version of the study asked for it
    results.write_block("generations", "b0", table("generations", made))
    results.write_block(
        "scores",
        "b0",
        table(
            "scores",
            [
                score("baseline/0/0", "refusal"),
                score("baseline/1/0", "no_refusal"),
                score("baseline/2/0", None),  # the judge failed
                *[score(f"steer=1/{prompt}/{seed}", "no_refusal") for prompt in range(2) for seed in (0, 1)],
                *[score(f"steer=2/{prompt}/{seed}", "refusal") for prompt in range(2) for seed in (0, 1)],
                score("dropped/0/0", "refusal"),
                score("baseline/0/0", "degenerate", "degenerate"),
                score("baseline/1/0", "degenerate", "degenerate"),
                score("steer=1/0/0", "intact", "degenerate"),
            ],
        ),
    )
    return results


def test_every_view_of_an_empty_store_is_empty_and_typed(results: ResultStore) -> None:
    connection = connect(results.location)
    for view in VIEWS:
        assert query(connection, f"SELECT * FROM {view}").num_rows == 0
    types = {row["column_name"]: row["column_type"] for row in rows_of(connection, "DESCRIBE directions")}
    assert types["vector"] == "FLOAT[]"
    assert types["layer"] == "INTEGER"
    assert rows_of(connection, "DESCRIBE all_generations")[-1]["column_type"] == "TIMESTAMP WITH TIME ZONE"


def test_stored_and_empty_tables_have_the_same_types(study: ResultStore, tmp_path: Path) -> None:
    empty = connect(Location.of(tmp_path / "none"))
    full = connect(study.location)
    for view in VIEWS:
        assert rows_of(full, f"DESCRIBE {view}") == rows_of(empty, f"DESCRIBE {view}"), view


def test_generations_show_what_the_study_asks_for_and_all_generations_everything(study: ResultStore) -> None:
    connection = connect(study.location)
    assert len(rows_of(connection, "FROM generations")) == 11
    assert len(rows_of(connection, "FROM all_generations")) == 12
    assert rows_of(connection, "FROM generations WHERE condition = 'dropped'") == []


def test_generations_written_twice_count_once_and_the_first_stays(study: ResultStore) -> None:
    late = generation("baseline", 0, text="another", study="t", created=CREATED + timedelta(days=1))
    study.write_block("generations", "b1", table("generations", [late]))
    connection = connect(study.location)
    shown = rows_of(connection, "SELECT text, written_by FROM generations WHERE generation_key = 'baseline/0/0'")
    assert shown == [{"text": "text of baseline 0", "written_by": "s"}]
    assert rows_of(connection, "SELECT n_scored FROM refusal_rates WHERE condition = 'baseline'") == [{"n_scored": 2}]


def test_two_studies_share_a_generation_and_each_shows_it(study: ResultStore) -> None:
    study.replace("conditions", "t", table("conditions", [condition("baseline", "t", condition="plain")]))
    study.replace("replay_rows", "t", table("replay_rows", [asked("baseline", 0, study="t") | {"condition": "plain"}]))
    shown = rows_of(
        connect(study.location),
        "SELECT study, condition FROM generations WHERE generation_key = 'baseline/0/0' ORDER BY study",
    )
    assert shown == [{"study": "s", "condition": "baseline"}, {"study": "t", "condition": "plain"}]


def test_two_conditions_that_do_the_same_show_each_its_own_prompts(study: ResultStore) -> None:
    """They have one condition_key; joined by it alone, each showed the prompts of both."""
    names = [condition("baseline", "t"), condition("baseline", "t", condition="plain")]
    study.replace("conditions", "t", table("conditions", names))
    wanted = [asked("baseline", 0, study="t"), asked("baseline", 1, study="t") | {"condition": "plain"}]
    study.replace("replay_rows", "t", table("replay_rows", wanted))
    shown = "SELECT condition, prompt_id FROM generations WHERE study = 't' ORDER BY condition"
    assert [tuple(row.values()) for row in rows_of(connect(study.location), shown)] == [
        ("baseline", "prompt0"),
        ("plain", "prompt1"),
    ]


def test_refusal_rates_keep_the_coefficient_and_count_what_is_missing(study: ResultStore) -> None:
    rates = rows_of(connect(study.location), "FROM refusal_rates ORDER BY condition")
    counts = [
        (r["condition"], r["base_condition"], r["coefficient"], r["control_of"], r["n"], r["n_prompts"], r["n_seeds"])
        for r in rates
    ]
    assert counts == [
        ("baseline", "baseline", None, None, 4, 4, 1),
        ("steer=1", "steer", 1.0, "baseline", 4, 2, 2),
        ("steer=2", "steer", 2.0, "baseline", 4, 2, 2),
    ]
    assert [(r["n_generated"], r["n_scored"], r["n_refused"], r["rate"]) for r in rates] == [
        (3, 2, 1, 0.5),  # a failed score is no label and no part of the rate
        (4, 4, 0, 0.0),
        (4, 4, 4, 1.0),
    ]
    assert {r["judge"] for r in rates} == {"refusal_phrases"}


def test_refusal_rates_by_seed_keep_the_seed(study: ResultStore) -> None:
    rates = rows_of(connect(study.location), "FROM refusal_rates_by_seed WHERE coefficient = 2 ORDER BY seed")
    assert [(r["seed"], r["n"], r["n_refused"]) for r in rates] == [(0, 2, 2), (1, 2, 2)]


def test_wilson_bounds_in_sql_equal_the_ones_in_python(study: ResultStore) -> None:
    connection = connect(study.location)
    for row in rows_of(connection, "FROM refusal_rates"):
        interval = wilson_interval(row["n_refused"], row["n_scored"])
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high), abs=1e-12)
    grid = rows_of(
        connection,
        "SELECT k, n, wilson_low(k, n) AS low, wilson_high(k, n) AS high "
        "FROM range(0, 60) a(k), (VALUES (1), (7), (59), (313)) b(n) WHERE k <= n",
    )
    for row in grid:
        interval = wilson_interval(row["k"], row["n"])
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert rows_of(connection, "SELECT wilson_low(0, 0) AS low") == [{"low": None}]


def test_a_condition_that_nobody_scored_has_no_rate(study: ResultStore) -> None:
    study.replace("conditions", "t", table("conditions", [condition("baseline", "t")]))
    study.replace("replay_rows", "t", table("replay_rows", [asked("baseline", 3, study="t")]))
    [rate] = rows_of(connect(study.location), "FROM refusal_rates WHERE study = 't'")
    assert (rate["n"], rate["n_generated"], rate["n_scored"], rate["n_refused"]) == (1, 0, 0, 0)
    assert (rate["rate"], rate["low"], rate["high"], rate["judge"]) == (None, None, None, None)


def test_a_missing_score_is_never_a_label(study: ResultStore) -> None:
    labels = {
        row["generation_key"]: (row["refusal"], row["degenerate"], row["verdict"])
        for row in rows_of(connect(study.location), "FROM labels")
    }
    assert len(labels) == 11
    assert labels["baseline/0/0"] == (True, True, "refusal")
    assert labels["baseline/1/0"] == (False, True, "degenerate")
    assert labels["baseline/2/0"] == (None, None, None)  # the judge failed
    assert labels["steer=1/0/0"] == (False, False, "other")
    assert labels["steer=1/1/0"] == (False, None, None)  # nobody looked whether it is degenerate


def test_a_score_after_an_error_replaces_it_and_never_the_other_way_round(study: ResultStore) -> None:
    again = [score("baseline/2/0", "refusal"), score("baseline/1/0", None)]
    study.write_block("scores", "b1", table("scores", again))
    connection = connect(study.location)
    labels = rows_of(connection, "SELECT refusal FROM labels WHERE condition = 'baseline' ORDER BY prompt_id")
    assert [row["refusal"] for row in labels] == [True, False, True]


def test_judge_versions_stay_apart_until_the_study_says_which_one_it_wants(study: ResultStore) -> None:
    study.write_block("scores", "v2", table("scores", [score("baseline/1/0", "refusal", judge_version="2")]))
    rates = "SELECT judge_version, n_scored, n_refused FROM refusal_rates WHERE condition = 'baseline' ORDER BY ALL"
    assert rows_of(connect(study.location), rates) == [
        {"judge_version": "1", "n_scored": 2, "n_refused": 1},
        {"judge_version": "2", "n_scored": 1, "n_refused": 1},
    ]
    wanted = {"study": "s", "judge": "refusal_phrases", "judge_version": "2", "measures": "refusal", "options": None}
    study.replace("judges", "s", table("judges", [wanted]))
    connection = connect(study.location)
    assert rows_of(connection, rates) == [{"judge_version": "2", "n_scored": 1, "n_refused": 1}]
    assert len(rows_of(connection, "FROM scores")) == 1
    assert len(rows_of(connection, "FROM all_scores")) == 16


def test_prompts_rows_and_projections_of_two_studies_count_once(results: ResultStore) -> None:
    prompt = {"prompt_id": "p", "messages": "[]", "text": "hello", "response": None, "tags": None}
    row = {"row_key": "r", "model": "m", "prompt_id": "p", "n_tokens": 3, "prompt_length": 3, "response_end": 3}
    projection = {"model": "m", "row_key": "r", "direction": "d", "direction_key": "k", "component": "resid_post"}
    projection |= {"layer": 1, "position": "prompt_end", "projection": 0.5, "norm": 2.0}
    direction = {**projection, "method": "m", "vector": [1.0]}
    direction = {name: value for name, value in direction.items() if name not in ("row_key", "projection")}
    for study in ("s", "t"):
        results.replace("prompts", study, table("prompts", [prompt]))
        results.replace("rows", study, table("rows", [{**row, "source": "prompt"}]))
        results.write_block("projections", study, table("projections", [projection]))
        results.replace("directions", study, table("directions", [{**direction, "study": study}]))
    older = {**projection, "direction_key": "of an older version"}
    results.write_block("projections", "older", table("projections", [older]))
    connection = connect(results.location)
    for view in ("prompts", "rows", "projections"):
        assert rows_of(connection, f"SELECT count(*) AS n FROM {view}") == [{"n": 1}]


def folder_of(store: ResultStore) -> str:
    """The results as DuckDB sees them, ready to stand between single quotes."""
    return str(store.location).replace("'", "''") if store.location.is_local else "resid-results:/"


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{folder}/x.csv'",
        "WITH x AS (COPY (SELECT 1) TO '{folder}/x.csv') SELECT * FROM x",
        "WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM x",
        "WITH x AS MATERIALIZED (COPY generations TO '{folder}/x.parquet') SELECT 1",
        "ATTACH '{folder}/x.db'",
        "EXPORT DATABASE '{folder}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP VIEW generations",
        "",
        "-- nothing",
        "PRAGMA version",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "SET threads = 1",
        "RESET lock_configuration",
        "SET VARIABLE a = 1",
        "CREATE TABLE t (a INTEGER)",
        "CREATE OR REPLACE VIEW generations AS SELECT 1",
        "DROP VIEW generations",
        "DELETE FROM stored.generations",
        "EXPLAIN ANALYZE SELECT 1",
        "PREPARE p AS SELECT 1",
        "CHECKPOINT",
        "BEGIN",
        "VACUUM",
    ],
)
def test_statements_that_could_write_are_refused(shared: Shared, sql: str) -> None:
    with pytest.raises(QueryError, match="accepted"):
        query(shared.connection, sql.format(folder=folder_of(shared.store)))
    assert shared.store.verify() == []
    assert len(rows_of(shared.connection, "FROM generations")) == 11


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_text('{folder}/../../../../../../../../etc/passwd')",
        "SELECT * FROM read_blob('{folder}/../secret')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')",
        "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
        "SELECT * FROM query('COPY (SELECT 1) TO ''x.csv''')",
        "SELECT * FROM query('WITH x AS (COPY (SELECT 1) TO ''x.csv'') SELECT 1')",
        "SELECT * FROM python_variable",
    ],
)
def test_nothing_outside_the_results_can_be_read(shared: Shared, sql: str) -> None:
    if shared.store.location.is_local:
        (shared.store.location.path.parent / "secret").write_text("secret")
    python_variable = pa.table({"a": [1]})
    assert python_variable.num_rows == 1
    with pytest.raises(QueryError):
        query(shared.connection, sql.format(folder=folder_of(shared.store)))


def test_the_locked_connection_itself_cannot_reach_other_files(study: ResultStore, tmp_path: Path) -> None:
    connection = connect(study.location)
    with pytest.raises(Exception, match="disabled by configuration"):
        connection.execute(f"COPY (SELECT 1) TO '{tmp_path}/x.csv'")
    with pytest.raises(Exception, match="locked"):
        connection.execute("SET enable_external_access = true")


def test_remote_results_cannot_be_written_even_without_the_statement_check() -> None:
    connection = connect(Location.of(f"memory://{uuid.uuid4().hex}"))
    with pytest.raises(Exception, match="read-only"):
        connection.execute("COPY (SELECT 1) TO 'resid-results://x.csv'")


@pytest.mark.parametrize(
    "sql",
    [
        "SHOW TABLES",
        "DESCRIBE generations",
        "SUMMARIZE refusal_rates",
        "FROM generations",
        "VALUES (1)",
        "WITH x AS (SELECT 1) SELECT * FROM x UNION ALL SELECT 2",
        "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t WHERE i < 3) SELECT * FROM t",
        "SELECT * FROM (PIVOT generations ON condition IN ('baseline') USING count(*) GROUP BY prompt_id)",
        "SELECT ';' AS a -- one; two\n;",
        "SELECT created::DATE FROM generations",
    ],
)
def test_statements_that_read_are_accepted(shared: Shared, sql: str) -> None:
    assert query(shared.connection, sql).num_columns > 0


def test_parameters_fill_the_question_marks(study: ResultStore) -> None:
    connection = connect(study.location)
    sql = "SELECT count(*) AS n FROM generations WHERE condition = ? AND seed = ?"
    assert query(connection, sql, ["steer=1", 1]).to_pylist() == [{"n": 2}]
    with pytest.raises(QueryError, match="parameter"):
        query(connection, sql)


def test_an_unknown_table_names_the_views(study: ResultStore) -> None:
    with pytest.raises(QueryError, match=r"did you mean generations\? the views are prompts, .*refusal_rates"):
        query(connect(study.location), "SELECT * FROM generation")


def test_an_unknown_column_says_so(study: ResultStore) -> None:
    with pytest.raises(QueryError, match="txt"):
        query(connect(study.location), "SELECT txt FROM generations")


def test_a_missing_committed_file_points_to_verify(study: ResultStore) -> None:
    study.files("scores")[0].remove()
    with pytest.raises(QueryError, match="resid verify"):
        connect(study.location)


def test_formats_hold_the_same_rows(study: ResultStore, tmp_path: Path) -> None:
    sql = "SELECT generation_key, coefficient, token_ids, sum(n_tokens) AS n FROM generations GROUP BY ALL ORDER BY 1"
    expected = query(connect(study.location), sql)
    for form in ("csv", "json", "parquet", "table"):
        run_sql(study.location, sql, form, str(tmp_path / f"out.{form}"))
    records = json.loads((tmp_path / "out.json").read_text())
    assert records[0] == {"generation_key": "baseline/0/0", "coefficient": None, "token_ids": [1, 2, 3], "n": 3}
    assert len(records) == expected.num_rows
    assert pq.read_table(tmp_path / "out.parquet").equals(expected)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[:2] == ["generation_key,coefficient,token_ids,n", 'baseline/0/0,,"[1, 2, 3]",3']
    assert "baseline/0/0" in (tmp_path / "out.table").read_text()
    assert sorted(os.listdir(tmp_path))[-4:] == ["out.csv", "out.json", "out.parquet", "out.table"]


def test_a_long_table_says_how_many_rows_it_leaves_out(study: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sql(study.location, "SELECT range AS i, repeat('x', 500) AS text FROM range(250)", "table") == 0
    shown = capsys.readouterr().out
    assert "100 of 250 rows" in shown
    assert "x" * 100 not in shown


def test_rows_with_too_many_columns_for_a_terminal_are_shown_as_records(
    study: ResultStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.sql._terminal_width", lambda: 80)
    run_sql(study.location, "SELECT * FROM generations")
    shown = capsys.readouterr().out
    assert "        condition  baseline\n" in shown
    assert "10 of 11 rows" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_piped_statements_run_to_the_end_in_spite_of_errors(
    study: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO(
        "SELECT 'a;\nb' AS x;\nSELECT nope;\n.nonsense\n-- half; a comment\nSELECT 1 AS y; SELECT 2 AS z;\n"
        "SELECT count(*) AS n\nFROM generations"
    )
    assert run_statements(connect(study.location), stream, "json") == 1
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert answers == [[{"x": "a;\nb"}], [{"y": 1}], [{"z": 2}], [{"n": 11}]]
    assert "nope" in captured.err
    assert ".nonsense" in captured.err


def test_dot_commands_show_the_views_and_their_columns(study: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO(".tables\n.schema labels\n.quit\nSELECT 'never' AS reached;\n")
    assert run_statements(connect(study.location), stream, "table") == 0
    shown = capsys.readouterr().out
    assert all(view in shown for view in VIEWS)
    assert "verdict" in shown
    assert "never" not in shown


def test_the_help_lists_what_a_query_may_use(capsys: pytest.CaptureFixture[str]) -> None:
    for command, arguments in ((main, ["--help"]), (resid, ["sql", "--help"])):
        with pytest.raises(SystemExit):
            command(arguments)
        shown = capsys.readouterr().out
        assert "\nlabels  " in shown
        assert "\nproject(prompt_set, name, layer)  " in shown


def test_the_module_runs_as_a_command(study: ResultStore, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = ["--results", str(study.location)]
    assert main([*where, "SELECT count(*) AS n FROM generations", "--format", "csv"]) == 0
    assert capsys.readouterr().out == "n\n11\n"
    assert main([*where, "SELECT 1 AS a", "--output", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == [{"a": 1}]
    assert main([*where, "DROP VIEW generations"]) == 1
    assert "DROP statement is refused" in capsys.readouterr().err


def test_results_that_do_not_exist_are_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"resid run"):
        run_sql(Location.of(tmp_path / "mistyped"), "SELECT 1", "table")
