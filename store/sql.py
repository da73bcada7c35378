"""SQL over the committed results: an in-memory DuckDB connection with views, read-only by construction.

`connect` makes the views over an explicit list of committed files, takes file access down to the results, and locks
the configuration. `query` then accepts one statement that only reads. Being a SELECT is not enough for that: DuckDB 2
takes ``WITH x AS (COPY ... TO 'file') SELECT ...`` as one. So the parsed statement is searched for what writes.

The views join what studies ask for (conditions, replay_rows, judges) with what was ever generated and scored, so an
answer never contains rows of an older version of a study, and nothing is counted twice.
"""

from __future__ import annotations

import difflib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from threading import Thread
from time import monotonic
from typing import Any

import duckdb
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from store.errors import QueryError
from store.location import Location
from store.results import ResultStore
from store.schemas import TABLES
from store.sql_activations import add_functions
from store.sql_verdicts import VERDICTS

REMOTE = "resid-results"  # protocol under which DuckDB sees results that are not on local disk
STOPS_WITHIN = 1.0  # seconds that a statement has to stop after Ctrl-C
Z95 = NormalDist().inv_cdf(0.975)

VIEWS: dict[str, str] = {
    "prompts": "one row per prompt: messages, text, given response",
    "memberships": "which prompts each study's prompt sets hold",
    "models": "models by fingerprint",
    "exactness": "how many texts of a model depend on what runs beside them",
    "rows": "tokenised prompts (and responses) by row_key",
    "directions": "one vector per study, direction and layer, with its raw norm",
    "cosines": "signed cosines of every pair of directions at every layer",
    "alignments": "cosine of a direction at each layer with another, or itself, at each layer",
    "failures": "layers, directions, analyses and conditions that could not be computed, with cause and remedy",
    "cosine_nulls": "cosines beside those of random directions and of permuted labels, with p-values",
    "explained_variance": "PCA over directions: share of variance by component, with bootstrap intervals",
    "separability": "AUC and d' of two sides of rows along directions, with bootstrap intervals; held out or not",
    "projections": "projection of every row on every direction that a study has now",
    "computed_directions": "every direction ever computed, by its key, as stored",
    "conditions": "what each study replays, sweeps expanded",
    "choices": "what each study chose by measuring, with its rule",
    "choice_candidates": "every candidate of every choice, with its rate and rank",
    "comparisons": "conditions compared prompt by prompt, with paired intervals and corrected p-values",
    "generations": "the texts that current studies ask for",
    "all_generations": "every text ever written, as stored",
    "monitored": "projections recorded while generating",
    "intervention_effects": "how each intervention's change of a text is spread over its tokens",
    "scores": "judge scores of the generations that current studies ask for",
    "all_scores": "every score ever written, as stored",
    "labels": "per generation and refusal judge: refusal, degenerate, verdict (NULL where not scored)",
    "verdicts": "per generation and refusal judge the paper's label: refusal, bypass, neither (NULL: not scored)",
    "refusal_rates": "refusals per condition with 95% Wilson intervals, seeds pooled",
    "refusal_rates_by_seed": "the same for each seed",
}

# What a generation was asked as. Ordered: views list these columns first.
_ASKED = "study, model, prompt_set, prompt_id, condition, base_condition, coefficient, control_of, seed"
_CONDITION = "study, model, prompt_set, condition, base_condition, coefficient, control_of"

_RATE = """CASE WHEN count(refusal) > 0 THEN count(*) FILTER (WHERE refusal) / count(refusal) END AS rate,
        wilson_low(count(*) FILTER (WHERE refusal), count(refusal)) AS low,
        wilson_high(count(*) FILTER (WHERE refusal), count(refusal)) AS high"""

_STATEMENTS = f"""
CREATE MACRO wilson_centre(k, n) AS k / n + {Z95}^2 / (2 * n);
CREATE MACRO wilson_half(k, n) AS {Z95} * sqrt(k / n * (1 - k / n) / n + {Z95}^2 / (4 * n * n));
CREATE MACRO wilson_low(k, n) AS CASE WHEN n = 0 THEN NULL WHEN k = 0 THEN 0.0::DOUBLE
    ELSE greatest(0.0, (wilson_centre(k, n) - wilson_half(k, n)) / (1 + {Z95}^2 / n)) END;
CREATE MACRO wilson_high(k, n) AS CASE WHEN n = 0 THEN NULL WHEN k = n THEN 1.0::DOUBLE
    ELSE least(1.0, (wilson_centre(k, n) + wilson_half(k, n)) / (1 + {Z95}^2 / n)) END;

CREATE VIEW prompts AS SELECT * FROM stored.prompts
    QUALIFY row_number() OVER (PARTITION BY prompt_id ORDER BY response NULLS LAST, tags NULLS LAST) = 1;
CREATE VIEW memberships AS SELECT DISTINCT * FROM stored.memberships;
CREATE VIEW exactness AS SELECT * FROM stored.exactness;
CREATE VIEW models AS SELECT * FROM stored.models
    QUALIFY row_number() OVER (PARTITION BY model ORDER BY source, revision NULLS LAST) = 1;
CREATE VIEW rows AS SELECT * FROM stored.rows
    QUALIFY row_number() OVER (PARTITION BY row_key ORDER BY prompt_id, source, generation_key NULLS LAST) = 1;
CREATE VIEW directions AS SELECT * FROM stored.directions;
CREATE VIEW computed_directions AS SELECT * FROM stored.computed_directions;
CREATE VIEW cosines AS SELECT * FROM stored.cosines;
CREATE VIEW alignments AS SELECT * FROM stored.alignments; CREATE VIEW failures AS SELECT * FROM stored.failures;
-- Analyses share their blocks between studies and versions of a study; each shows what it asks for now.
CREATE VIEW explained_variance AS SELECT DISTINCT study, analysis, * EXCLUDE (study, kind, analysis, block_key)
    FROM stored.analyses JOIN stored.explained_variance USING (model, block_key) WHERE kind = 'explained_variance';
CREATE VIEW cosine_nulls AS SELECT DISTINCT study, * EXCLUDE (study, kind, analysis, block_key)
    FROM stored.analyses JOIN stored.cosine_nulls USING (model, block_key) WHERE kind = 'cosine_nulls';
CREATE VIEW separability AS
    SELECT DISTINCT study, analysis, * EXCLUDE (study, kind, analysis, block_key), n_training = 0 AS held_out
    FROM stored.analyses JOIN stored.separability USING (model, block_key) WHERE kind = 'separability';
CREATE VIEW conditions AS SELECT * FROM stored.conditions;
CREATE VIEW choices AS SELECT * FROM stored.choices;
CREATE VIEW choice_candidates AS SELECT * FROM stored.choice_candidates;
CREATE VIEW comparisons AS SELECT * FROM stored.comparisons;
-- Of the directions that studies have now; stored.projections has those of all older ones as well.
CREATE VIEW projections AS
    SELECT DISTINCT ON (model, row_key, direction, direction_key, component, layer, position) * FROM stored.projections
    WHERE (model, direction_key) IN (SELECT (model, direction_key) FROM stored.directions);
CREATE VIEW monitored AS
    SELECT DISTINCT ON (generation_key, direction, direction_key, component, layer, token_index) *
    FROM stored.monitored;
CREATE VIEW intervention_effects AS
    SELECT DISTINCT ON (generation_key, intervention) * FROM stored.intervention_effects;
CREATE VIEW all_generations AS SELECT * FROM stored.generations;
CREATE VIEW all_scores AS SELECT * FROM stored.scores;

-- Every text that is asked for, whether it exists or not.
CREATE VIEW stored.asked AS
    SELECT DISTINCT {_ASKED}, row_key, condition_key, decoding_key
    FROM stored.replay_rows JOIN stored.conditions USING (study, model, condition, condition_key, decoding_key);

-- The first one written stays the one that is shown.
CREATE VIEW stored.unique_generations AS
    SELECT generation_key, model, row_key, condition_key, decoding_key, seed, study AS written_by, text, n_tokens,
        finish_reason, token_ids, code_version, transformers_version, torch_version, created
    FROM stored.generations
    QUALIFY row_number() OVER (PARTITION BY generation_key ORDER BY created, study, n_tokens) = 1;

CREATE VIEW generations AS
    SELECT {_ASKED}, generation_key, text, n_tokens, finish_reason, row_key, condition_key, decoding_key, token_ids,
        code_version, transformers_version, torch_version, created, written_by
    FROM stored.asked JOIN stored.unique_generations USING (model, row_key, condition_key, decoding_key, seed);

-- A later success replaces an error; an error never replaces a score.
CREATE VIEW stored.unique_scores AS SELECT * FROM stored.scores
    QUALIFY row_number() OVER (PARTITION BY generation_key, judge, judge_version
        ORDER BY error IS NOT NULL, label NULLS LAST, value NULLS LAST, detail NULLS LAST, error) = 1;

-- What judges a study asks for; where it does not say, every judge and version that scored it, each apart.
CREATE VIEW stored.asked_judges AS
    SELECT DISTINCT study, judge, judge_version, measures FROM stored.judges
    UNION ALL BY NAME
    SELECT study, judge, judge_version, CASE
        WHEN bool_or(label IN ('refusal', 'no_refusal')) THEN 'refusal'
        WHEN bool_or(label IN ('degenerate', 'cut', 'intact')) THEN 'degenerate'
        WHEN bool_or(label IN ('unsafe', 'safe')) THEN 'unsafe' END AS measures
    FROM generations JOIN stored.unique_scores USING (generation_key)
    WHERE study NOT IN (SELECT study FROM stored.judges)
    GROUP BY study, judge, judge_version;

CREATE VIEW scores AS
    SELECT {_ASKED}, generation_key, judge, judge_version, measures, value, label, detail, error
    FROM generations JOIN stored.unique_scores USING (generation_key)
    JOIN stored.asked_judges USING (study, judge, judge_version);

-- One row per text asked for and refusal judge; refusal is NULL where there is no text or no score.
CREATE VIEW stored.judged AS
    SELECT {_ASKED}, decoding_key, generation_key, judge, judge_version,
        CASE WHEN error IS NULL THEN label = 'refusal' END AS refusal
    FROM stored.asked
    LEFT JOIN stored.unique_generations USING (model, row_key, condition_key, decoding_key, seed)
    LEFT JOIN (FROM stored.asked_judges WHERE measures = 'refusal') USING (study)
    LEFT JOIN stored.unique_scores USING (generation_key, judge, judge_version);

CREATE VIEW labels AS
    SELECT {_ASKED}, generation_key, judge AS refusal_judge, judge_version AS refusal_judge_version, refusal,
        degenerate,
        CASE WHEN refusal THEN 'refusal'
            WHEN NOT refusal AND degenerate THEN 'degenerate'
            WHEN NOT refusal AND NOT degenerate THEN 'other' END AS verdict
    FROM stored.judged LEFT JOIN (
        SELECT study, generation_key, bool_or(label = 'degenerate') AS degenerate
        FROM (SELECT DISTINCT study, generation_key, label FROM scores WHERE measures = 'degenerate' AND error IS NULL)
        GROUP BY study, generation_key) USING (study, generation_key)
    WHERE generation_key IS NOT NULL;

-- Pooled seeds of one prompt are not independent: compare n with n_prompts before trusting a narrow interval.
CREATE VIEW refusal_rates AS
    SELECT {_CONDITION}, judge, judge_version, count(*) AS n, count(DISTINCT prompt_id) AS n_prompts,
        count(DISTINCT seed) AS n_seeds, count(generation_key) AS n_generated, count(refusal) AS n_scored,
        count(*) FILTER (WHERE refusal) AS n_refused,
        {_RATE}, decoding_key
    FROM stored.judged GROUP BY {_CONDITION}, judge, judge_version, decoding_key;

CREATE VIEW refusal_rates_by_seed AS
    SELECT {_CONDITION}, seed, judge, judge_version, count(*) AS n, count(generation_key) AS n_generated,
        count(refusal) AS n_scored, count(*) FILTER (WHERE refusal) AS n_refused,
        {_RATE}, decoding_key
    FROM stored.judged GROUP BY {_CONDITION}, seed, judge, judge_version, decoding_key;
"""

# Nodes of DuckDB's parsed statements that only read.
_READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_ACCEPTED = "one statement that reads is accepted: SELECT, FROM, WITH ... SELECT, VALUES, DESCRIBE, SHOW or SUMMARIZE"


def connect(results: Location, activations: Location | None = None) -> duckdb.DuckDBPyConnection:
    """Open SQL over what is committed under ``results`` now; later commits need a new connection. Close it after use.

    Besides the views (`VIEWS`) there are two macros, ``wilson_low(k, n)`` and ``wilson_high(k, n)``: the bounds of the
    95% Wilson score interval of k successes in n trials; and functions that read ``activations``, an activation store
    (`store.sql_activations`).

    Raises:
        DamageError: if a commit record cannot be read.
        QueryError: if a committed file is missing or is no Parquet file.
    """
    store = ResultStore(results)
    connection = duckdb.connect(":memory:")
    try:
        if not results.is_local:
            connection.register_filesystem(_ReadOnlyFiles(results))
        # Nothing may be fetched for a query, and what does not fit in memory goes to the system's temporary folder.
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET autoload_known_extensions = false")
        connection.execute("SET TimeZone = 'UTC'")
        # DuckDB draws it on standard output, into what is printed there, wherever it takes Python to be interactive.
        connection.execute("SET enable_progress_bar = false")
        connection.execute(f"SET temp_directory = {_quoted(str(Path(tempfile.gettempdir()) / 'resid-sql'))}")
        root = str(results) if results.is_local else f"{REMOTE}://"
        connection.execute(f"SET allowed_directories = [{_quoted(root)}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET python_enable_replacements = false")
        connection.execute("SET lock_configuration = true")
        add_functions(connection, store, activations)
        connection.execute("CREATE SCHEMA stored")
        for table in TABLES:
            connection.execute(f"CREATE VIEW stored.{table} AS {_select_files(table, store.files(table))}")
        connection.execute(_STATEMENTS)
        connection.execute(VERDICTS)
    except duckdb.Error as error:
        connection.close()
        raise QueryError(f"{results}: {_message(error)}\n  `resid verify` lists missing and damaged files") from error
    except BaseException:
        connection.close()
        raise
    return connection


def query(connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[object] = ()) -> pa.Table:
    """Run one reading statement on a connection from `connect`; each ``?`` takes the next of ``parameters``.

    Ctrl-C stops it within a second: it runs in a thread, because DuckDB may not look at signals while it works.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the statement has stopped.
        QueryError: if it is not exactly one statement, could write anything, or fails; with DuckDB's message.
    """
    try:
        return _interruptible(connection, lambda: _answer(connection, sql, parameters))
    except duckdb.Error as error:
        raise QueryError(_message(error) + _hint(error)) from error


def _answer(connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[object]) -> pa.Table:
    statement = _reading_statement(connection, sql)
    return connection.sql(statement, params=list(parameters) or None).to_arrow_table()


def _interruptible(connection: duckdb.DuckDBPyConnection, work: Callable[[], pa.Table]) -> pa.Table:
    """Do work on a connection in a thread; on Ctrl-C interrupt it, wait until it ends (at most a second), and raise."""
    outcome: Future[pa.Table] = Future()

    def act() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=act, daemon=True).start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        deadline = monotonic() + STOPS_WITHIN
        # Again and again: an interrupt between the steps of a statement is lost.
        while not outcome.done() and monotonic() < deadline:
            connection.interrupt()
            wait([outcome], timeout=0.02)
        raise


def split(connection: duckdb.DuckDBPyConnection, sql: str) -> list[str]:
    """Split a text into its statements.

    Raises:
        QueryError: if it cannot be parsed.
    """
    try:
        return [statement.query for statement in connection.extract_statements(sql)]
    except duckdb.Error as error:
        raise QueryError(_message(error)) from error


def _reading_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise QueryError(f"this is {len(statements)} statements; {_ACCEPTED}")
    statement = statements[0]
    if statement.type != duckdb.StatementType.SELECT:
        raise QueryError(f"a {statement.type.name} statement is refused; {_ACCEPTED}")
    serialised = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [statement.query]).fetchall()
    tree = json.loads(serialised[0][0])
    if tree.get("error"):
        raise QueryError(f"this statement cannot be shown to only read ({tree.get('error_message')}); {_ACCEPTED}")
    for kind in _query_nodes(tree):
        if kind not in _READING_NODES:
            raise QueryError(f"the statement contains a part that may write ({kind}); {_ACCEPTED}")
    return statement


def _query_nodes(tree: object) -> Iterator[str]:
    """Yield the type of every query node of a serialised statement: SELECT_NODE, COPY_QUERY_NODE, ..."""
    if isinstance(tree, dict):
        kind = tree.get("type")
        if isinstance(kind, str) and kind.endswith("_NODE"):
            yield kind
        for value in tree.values():
            yield from _query_nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _query_nodes(value)


def _select_files(table: str, files: list[Location]) -> str:
    schema = TABLES[table]
    if not files:
        columns = ", ".join(f'NULL::{_sql_type(field.type)} AS "{field.name}"' for field in schema)
        return f"SELECT {columns} WHERE false"
    paths = [str(file) if file.is_local else f"{REMOTE}://{table}/{file.name}" for file in files]
    # A folder named a=b above the results must not turn into a column.
    source = f"read_parquet([{', '.join(map(_quoted, paths))}], union_by_name = true, hive_partitioning = false)"
    # Files of an earlier version may lack columns: an empty relation names them all.
    return f"{_select_files(table, [])} UNION ALL BY NAME SELECT * FROM {source}"


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    names = {"string": "VARCHAR", "int32": "INTEGER", "int64": "BIGINT", "float": "FLOAT", "double": "DOUBLE"}
    names["bool"] = "BOOLEAN"
    return "TIMESTAMP WITH TIME ZONE" if pa.types.is_timestamp(kind) else names[str(kind)]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _message(error: duckdb.Error) -> str:
    # What one of our functions says is enough; DuckDB's frame around it tells nothing.
    return re.sub(
        r"^.*Python exception occurred while executing the UDF: \w+: ", "", str(error).strip(), flags=re.DOTALL
    )


def _hint(error: duckdb.Error) -> str:
    unknown = re.search(r"Table with name \"?(.+?)\"? does not exist", str(error))
    if unknown:
        near = difflib.get_close_matches(unknown[1].lower(), VIEWS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        return f"\n  hint: {meant}the views are {', '.join(VIEWS)}"
    if "file system operations are disabled" in str(error):
        return "\n  hint: queries read the views and no other file"
    if isinstance(error, duckdb.IOException):
        return "\n  hint: `resid verify` lists missing and damaged files"
    return ""


class _ReadOnlyFiles(AbstractFileSystem):  # type: ignore[misc]
    """The files under one location, for DuckDB: reading only, and nothing outside."""

    protocol = REMOTE
    cachable = False

    def __init__(self, root: Location) -> None:
        super().__init__(skip_instance_cache=True)
        self._root = root

    def _inside(self, path: str) -> Location:
        parts = path.removeprefix(f"{REMOTE}://").strip("/").split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise PermissionError(f"{path} is outside the results")
        return Location(self._root.url + "".join(f"/{part}" for part in parts))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            raise PermissionError(f"{path}: results are read-only")
        file = self._inside(path)
        return file.filesystem.open(file.url, "rb")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "size": self._inside(path).size(), "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        return [path]

    def modified(self, path: str) -> datetime:
        # A file's name carries the hash of its bytes: they never change, so neither does this.
        return datetime(2000, 1, 1, tzinfo=UTC)
