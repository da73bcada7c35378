"""``resid sql`` alone, on a terminal: a prompt that answers, survives a mistake, and ends when told to."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from store.location import Location
from store.results import ResultStore
from store.schemas import TABLES


def read_until(terminal: int, text: str, seconds: float = 60) -> str:
    """Return what the terminal showed up to and including a text."""
    shown = ""
    deadline = time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < deadline, f"no {text!r} in {shown!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start ``resid sql`` on a terminal over results that hold one prompt; yield the process and our end."""
    row = {"prompt_id": "p", "messages": "[]", "text": "hello there", "response": None, "tags": None}
    results = ResultStore(Location.of(folder / "results"))
    results.replace("prompts", "s", pa.Table.from_pylist([row], schema=TABLES["prompts"]))
    ours, theirs = pty.openpty()
    loaded = "import sys, jobs.cli; jobs.cli.build_parser(); from jobs import plan, run"
    code = f"{loaded}; print('ready', flush=True); jobs.cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "sql", *arguments, "--results", str(folder / "results")]
    environment = {**os.environ, "HOME": str(folder), "TERM": "dumb"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=Path(__file__).parent.parent, env=environment
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_the_prompt_answers_survives_a_mistake_and_quits(tmp_path: Path) -> None:
    with started(tmp_path) as (process, terminal):
        read_until(terminal, "resid>")
        os.write(terminal, b"SELECT nothing FROM prompts;\n")
        read_until(terminal, "not found")
        os.write(terminal, b"SELECT text\nFROM prompts;\n")  # a statement may span lines
        read_until(terminal, "hello there")
        os.write(terminal, b".quit\n")
        assert process.wait(timeout=30) == 0


LONG = "SELECT count(*) FROM range(100000000) a, range(100000) b WHERE hash(a.range, b.range) = 1"


@pytest.mark.parametrize("attempt", range(3))
def test_ctrl_c_stops_a_running_query_within_a_second(tmp_path: Path, attempt: int) -> None:
    """DuckDB used to run on: Ctrl-C took effect when the statement had ended, and the message spoke of blocks."""
    with started(tmp_path, LONG) as (process, terminal):
        read_until(terminal, "ready")
        time.sleep(1.5 + 0.2 * attempt)
        assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        shown = read_until(terminal, "the query was stopped", seconds=5)
        assert process.wait(timeout=10) == 130
        assert time.monotonic() - begun < 4  # a second to stop, the rest to end a process on a busy machine
        assert "blocks" not in shown


def test_ctrl_c_at_the_prompt_stops_the_statement_and_not_the_prompt(tmp_path: Path) -> None:
    with started(tmp_path) as (process, terminal):
        read_until(terminal, "resid>")
        for _ in range(3):
            os.write(terminal, f"{LONG};\n".encode())
            read_until(terminal, "= 1;")
            time.sleep(0.7)
            process.send_signal(signal.SIGINT)
            read_until(terminal, "the query was stopped", seconds=5)
        os.write(terminal, b"SELECT text FROM prompts;\n")
        read_until(terminal, "hello there")
        os.write(terminal, b".quit\n")
        assert process.wait(timeout=30) == 0
