"""``resid sql``: ask the committed results in SQL, once or at a prompt, as a table, CSV, JSON or Parquet."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from store.errors import MissingDataError, QueryError, ResidError
from store.location import Location
from store.results import ResultStore
from store.schemas import TABLES
from store.sql import VIEWS, connect, query, split
from store.sql_activations import FUNCTIONS

FORMATS = ("table", "csv", "json", "parquet")
ROW_LIMIT = 100  # rows that a table shows; other formats hold all
CELL = 60  # characters of a cell in a table
NARROW = 8  # characters; with less for each column of a terminal, rows are shown as records
RECORD_LIMIT = 10
STOPPED = "interrupted: the query was stopped; nothing was written"
QUIT = (".quit", ".exit")
_STRINGS_AND_COMMENTS = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)


def run_sql(
    results: Location,
    sql: str | None,
    format: str = "table",
    output: str | None = None,
    activations: Location | None = None,
) -> int:
    """Answer one query, or without one run the prompt (or the statements that arrive on standard input).

    Args:
        results: where the result tables are.
        sql: one reading statement; None for the prompt.
        format: table, csv, json or parquet.
        output: a path or URL to write to; None for standard output.
        activations: the activation store, for the functions that read it.

    Returns:
        The exit status: 1 if a statement from standard input failed, 130 if Ctrl-C stopped one.

    Raises:
        MissingDataError: if no result table is there at all.
        QueryError: if the query is refused or fails.
    """
    store = ResultStore(results)
    if not any(store.commits(table) for table in TABLES):
        raise MissingDataError(
            f"{results}: there are no results; make some with `resid run --study S` or name another place"
        )
    try:
        return _answered(results, sql, format, output, activations)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130


def _answered(results: Location, sql: str | None, format: str, output: str | None, activations: Location | None) -> int:
    connection = connect(results, activations)
    try:
        if sql is not None:
            write_answer(query(connection, sql), format, output)
            return 0
        if output is not None:
            raise QueryError("an output file holds one answer: give the statement on the command line")
        if sys.stdin.isatty():
            return _prompt(connection, format)
        return run_statements(connection, sys.stdin, format)
    finally:
        connection.close()


def run_statements(connection: duckdb.DuckDBPyConnection, lines: IO[str], format: str) -> int:
    """Run statements (ended by ``;``) and dot commands from a stream; an error is printed and does not end it.

    Returns:
        1 if any failed, else 0.
    """
    failed = False
    for statement in _statements(lines):
        if statement in QUIT:
            break
        failed |= not _run(connection, statement, format)
    return int(failed)


def write_answer(answer: pa.Table, format: str, output: str | None = None) -> None:
    """Write a result; a file appears whole or not at all.

    Raises:
        QueryError: for an unknown format, or Parquet on a terminal.
    """
    if format not in FORMATS:
        raise QueryError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if output is None and format == "parquet":
        if sys.stdout.isatty():
            raise QueryError("Parquet is not for a terminal: name a file with --output or redirect")
        sys.stdout.buffer.write(_parquet(answer))
        return
    if output is None:
        text = _as_table(answer, _terminal_width(), ROW_LIMIT) if format == "table" else _as_text(answer, format)
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    if format == "parquet":
        content = _parquet(answer)
    else:
        content = (_as_table(answer, None, None) if format == "table" else _as_text(answer, format)).encode()
    Location.of(output).write(content)


def _as_text(answer: pa.Table, format: str) -> str:
    return _as_csv(answer) if format == "csv" else _as_json(answer)


def _parquet(answer: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(answer, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _rows(answer: pa.Table) -> list[list[Any]]:
    """Return the rows as plain JSON types; names may repeat, so rows are lists."""
    columns = [[_plain(value) for value in column.to_pylist()] for column in answer.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() and value.as_tuple().exponent == 0 else float(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _as_csv(answer: pa.Table) -> str:
    """CSV with a header; NULL is the empty field, and lists and structs are JSON."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(answer.column_names)
    for row in _rows(answer):
        writer.writerow(
            [json.dumps(cell, ensure_ascii=False) if isinstance(cell, (list, dict)) else cell for cell in row]
        )
    return stream.getvalue()


def _as_json(answer: pa.Table) -> str:
    records = [
        json.dumps(dict(zip(answer.column_names, row, strict=True)), ensure_ascii=False) for row in _rows(answer)
    ]
    return "[" + ",\n ".join(records) + "]\n"


def _as_table(answer: pa.Table, width: int | None, limit: int | None) -> str:
    """A table for reading: long cells are cut (``…``), numbers rounded to 6 digits and right-aligned."""
    if width is not None and answer.num_columns * NARROW > width:
        return _as_records(answer, width, RECORD_LIMIT)
    shown = answer if limit is None else answer.slice(0, limit)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, column in zip(answer.column_names, answer.columns, strict=True):
        kind = column.type
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        table.add_column(Text(name), justify="right" if number else "left", overflow="ellipsis", no_wrap=True)
    for row in _rows(shown):
        table.add_row(*[Text(_cell(cell), style="dim" if cell is None else "") for cell in row])
    stream = io.StringIO()
    colour = width is not None
    # Without a terminal there is no width to fit: columns keep theirs, so that other programs find whole cells.
    wide = 4 + sum(max(CELL, len(name)) + 3 for name in answer.column_names)
    console = Console(file=stream, width=width or wide, force_terminal=colour, highlight=False, legacy_windows=False)
    console.print(table)
    console.print(Text(_count(answer, shown), style="dim"))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _as_records(answer: pa.Table, width: int, limit: int) -> str:
    """One line per column and a rule per row, for answers with too many columns for the terminal."""
    shown = answer.slice(0, limit)
    names = max(map(len, answer.column_names))
    lines = []
    for number, row in enumerate(_rows(shown), start=1):
        lines.append(f"── {number} ".ljust(names + 3, "─"))
        lines += [f"{name:>{names}}  {_cell(value)}" for name, value in zip(answer.column_names, row, strict=True)]
    return "\n".join([*(line[:width] for line in lines), "", _count(answer, shown)]) + "\n"


def _count(answer: pa.Table, shown: pa.Table) -> str:
    if shown.num_rows < answer.num_rows:
        return f"{shown.num_rows} of {answer.num_rows} rows; --format csv, json or parquet hold all"
    return f"{answer.num_rows} {'row' if answer.num_rows == 1 else 'rows'}"


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    text = (
        value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
        if not isinstance(value, int)
        else str(value)
    )
    text = " ".join(text.split())
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def _terminal_width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _statements(lines: IO[str] | Iterator[str]) -> Iterator[str]:
    """Yield each dot command and each text that a ``;`` outside quotes and comments ends (the last needs none)."""
    buffer = ""
    for line in lines:
        if not buffer and line.strip().startswith("."):
            yield line.strip()
            continue
        buffer = (buffer + line.rstrip("\n") + "\n") if line.strip() or buffer else ""
        if _is_complete(buffer):
            yield buffer
            buffer = ""
    if buffer.strip():
        yield buffer


def _is_complete(text: str) -> bool:
    bare = _STRINGS_AND_COMMENTS.sub(" ", text)
    return bare.rstrip().endswith(";") and not any(opening in bare for opening in ("'", '"', "/*"))


def _run(connection: duckdb.DuckDBPyConnection, text: str, format: str) -> bool:
    """Run one dot command or text of statements; print what went wrong and return whether nothing did."""
    try:
        if text.startswith("."):
            _command(connection, text)
        else:
            for statement in split(connection, text):
                write_answer(query(connection, statement), format)
    except ResidError as error:
        print(error, file=sys.stderr)
        return False
    return True


def _command(connection: duckdb.DuckDBPyConnection, text: str) -> None:
    name, _, argument = text.partition(" ")
    argument = argument.strip().rstrip(";")
    if name == ".tables":
        print(_listed({**VIEWS, **FUNCTIONS}))
    elif name == ".schema" and argument in VIEWS:
        answer = query(connection, f"SELECT column_name, column_type FROM (DESCRIBE {argument})")
        write_answer(answer, "table")
    elif name == ".schema":
        raise QueryError(f".schema needs one of the views {', '.join(VIEWS)}")
    elif name == ".help":
        print("A statement ends with ;   .tables   .schema VIEW   .quit")
    else:
        raise QueryError(f"unknown command {name}; known: .tables, .schema VIEW, .help, .quit")


def _listed(entries: dict[str, str]) -> str:
    width = max(map(len, entries))
    return "\n".join(f"{name:<{width}}  {about}" for name, about in entries.items())


def _prompt(connection: duckdb.DuckDBPyConnection, format: str) -> int:
    """Read statements at a terminal until ``.quit`` or the end of input; Ctrl-C drops the one being typed."""
    history = _history()
    print("Statements end with ;   .tables   .schema VIEW   .quit")
    buffer = ""
    try:
        while True:
            try:
                line = input("   ...> " if buffer else "resid> ")
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                buffer = ""
                continue
            if not buffer and line.strip().startswith("."):
                if line.strip() in QUIT:
                    return 0
                _run(connection, line.strip(), format)
                continue
            buffer = f"{buffer}{line}\n" if line.strip() or buffer else ""
            if _is_complete(buffer):
                statement, buffer = buffer, ""
                try:
                    _run(connection, statement, format)
                except KeyboardInterrupt:
                    print(STOPPED, file=sys.stderr)
    finally:
        history()


def _history() -> Any:
    """Load the prompt's history, where readline is there; return the function that saves it."""
    try:
        import readline
    except ImportError:
        return lambda: None
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "resid"
    file = folder / "sql_history"

    def save() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(2000)
            readline.write_history_file(file)
        except OSError as error:
            print(f"the history was not saved: {error}", file=sys.stderr)

    try:
        readline.read_history_file(file)
    except FileNotFoundError:
        pass
    except OSError as error:
        print(f"the history was not read: {error}", file=sys.stderr)
    return save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments, except those that say where results and store are, and what SQL finds there."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"views:\n{_listed(VIEWS)}\n\nfunctions:\n{_listed(FUNCTIONS)}"
    parser.add_argument("query", nargs="?", help="one SELECT statement; without it a prompt opens")
    parser.add_argument("--format", choices=FORMATS, help="default: what --output's name ends with, or table")
    parser.add_argument("--output", help="file or URL to write to instead of standard output")


def run_arguments(arguments: argparse.Namespace, results: Location, activations: Location | None = None) -> int:
    """Run the command as `add_arguments` parsed it."""
    suffix = Path(arguments.output).suffix.removeprefix(".") if arguments.output else ""
    format = arguments.format or (suffix if suffix in FORMATS else "table")
    return run_sql(results, arguments.query, format, arguments.output, activations)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m jobs.sql``."""
    parser = argparse.ArgumentParser(prog="python -m jobs.sql", description=__doc__)
    parser.add_argument("--results", required=True, help="folder or URL of the result tables")
    parser.add_argument("--store", help="folder or URL of the activation store")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        store = Location.of(arguments.store) if arguments.store else None
        return run_arguments(arguments, Location.of(arguments.results), store)
    except ResidError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python would complain once more while closing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
