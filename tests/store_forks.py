"""Processes that write or read a store and may be killed at any moment, forked from a warm one: start-up costs nothing.

A test holds `Forks` and starts tasks, the functions at the end of this module. Test and task talk in lines over a
socket. An interruption is a `Trigger`: the n-th file operation of a task.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.testing  # before forking, as everything that tasks use: some of them may not read Python's folder
import pyarrow.dataset
import pyarrow.parquet
import pytest
from store_worker import LAYERS, MODEL, activations, expected, make_rows, make_texts, new_store, request

from store.activations import ActivationStore, ModelStore
from store.errors import ResidError
from store.generation import Generation
from store.layout import Compression
from store.readers import ZarrReader
from store.rows import Row
from store.sites import ALL_TOKENS

OPERATIONS = {"open", "fcntl.flock", "os.link", "os.remove", "os.rename", "os.mkdir"}


# -- what tests use ------------------------------------------------------------------------------------------------


class Fork:
    """A running task."""

    def __init__(self, forks: Forks, pid: int, stream: TextIO) -> None:
        self._forks, self.pid, self._stream = forks, pid, stream

    def hear(self) -> str:
        """Return the task's next line; "" when it has ended."""
        return self._stream.readline().rstrip("\n")

    def say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end; return exit code (negative: signal) and the lines not heard yet."""
        lines: list[str] = []
        # Killed with lines unread at its side: the connection is reset.
        with contextlib.suppress(ConnectionResetError):
            lines += [line.rstrip("\n") for line in self._stream]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._stream.close()
        return self._forks.wait(self.pid), lines


def _stream(connection: socket.socket) -> TextIO:
    with connection:
        # A line is to arrive at once, and not with the next one.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection.makefile("rw")


class Forks:
    """A process with everything imported, which forks for each task."""

    def __init__(self) -> None:
        here = Path(__file__)
        environment = {**os.environ, "PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(here)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._listener = socket.create_server(("127.0.0.1", 0))

    def _ask(self, **order: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, task: str, /, environment: dict[str, str] | None = None, **arguments: object) -> Fork:
        """Begin a task. Its environment is that of the first start, with these changes."""
        port = self._listener.getsockname()[1]
        pid = self._ask(task=task, port=port, environment=environment or {}, arguments=arguments)
        connection, _ = self._listener.accept()
        return Fork(self, pid, _stream(connection))

    def wait(self, pid: int) -> int:
        return self._ask(wait=pid)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)
        self._listener.close()


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


# -- in the forked processes ---------------------------------------------------------------------------------------


class Trigger:
    """Counts the operations of this process on files of a store; at a given one says "now", or ends the process."""

    def __init__(self, channel: TextIO, store: str, at: int, suicide: bool = False) -> None:
        self.count, self.armed, self._store = 0, False, store
        self.fired = False
        self._channel, self._at, self._suicide = channel, at, suicide
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: Sequence[object]) -> None:
        if not self.armed or event not in OPERATIONS:
            return
        if event == "open" and not str(arguments[0]).startswith(self._store):
            return  # a module
        self.count += 1
        if self.count == self._at:
            if self._suicide:
                os.kill(os.getpid(), signal.SIGKILL)
            self.fired = True
            say(self._channel, "now")


def say(channel: TextIO, line: object) -> None:
    channel.write(f"{line}\n")
    channel.flush()


def open_model(store: str) -> ModelStore:
    return ActivationStore.open(store).model(MODEL)


def rows_of(kind: str, start: int, stop: int) -> Sequence[Row]:
    """Return rows of fixed length, or of different ones ("texts")."""
    return (make_texts if kind == "texts" else make_rows)(stop)[start:]


def write_blocks(
    channel: TextIO, store: str, writer: str = "", at: int = 0, suicide: bool = False, noise: float = 0.0
) -> None:
    """Write every block that waits, in the order of the store; report each, then the number of file operations."""
    model = open_model(store)
    trigger = Trigger(channel, store, at, suicide)
    blocks = [
        (generation, block)
        for generation in model.generations()
        # Listed once: another writer may commit these in the meantime, which `write_block` has to notice.
        for block in sorted(set(range(generation.plan.n_blocks)) - generation.committed())
    ]
    say(channel, "ready")
    channel.readline()
    trigger.armed = True
    for generation, block in blocks:
        start, stop = generation.plan.block_range(block)
        values = activations(generation.rows[start:stop], generation.plan, noise)
        won = generation.write_block(block, values, {"writer": writer} if writer else {})
        say(channel, f"{generation.id}/{block} {int(won)}")
        if trigger.fired:
            channel.readline()  # the kill is late: no further block
    trigger.armed = False
    say(channel, f"operations {trigger.count}")


def create(channel: TextIO, store: str, n_rows: int, at: int = 0) -> None:
    """Begin a capture of a new store: model, plan, rows; killed at a file operation, or the number of them."""
    trigger = Trigger(channel, store, at, suicide=True)
    trigger.armed = True
    new_store(store).assign([request(make_rows(n_rows), ("resid_post", "mlp_out"))], block_rows=2)
    trigger.armed = False
    say(channel, f"operations {trigger.count}")


def repair(channel: TextIO, store: str, at: int) -> None:
    """Repair a store; killed at a file operation, or the number of them."""
    model = open_model(store)
    trigger = Trigger(channel, store, at, suicide=True)
    trigger.armed = True
    model.verify(repair=True)
    trigger.armed = False
    say(channel, f"operations {trigger.count}")


def capture_range(
    channel: TextIO,
    store: str,
    start: int,
    stop: int,
    writer: str,
    block_rows: int,
    compression: Compression,
    kind: str,
) -> None:
    """Do what `resid capture` does for some rows, with workers that wait for each other's blocks."""
    model = open_model(store)
    positions = (ALL_TOKENS,) if kind == "texts" else ("prompt_end", "response_avg")
    asked = request(rows_of(kind, start, stop), positions=positions)
    say(channel, "ready")
    channel.readline()
    _, blocks = model.assign([asked], block_rows, compression)
    say(channel, f"assigned {len(blocks)}")
    for block in blocks:
        generation = Generation(model.location / block.generation)
        won = False
        with generation.claim(block.block) as wanted:
            if wanted:
                begin, end = generation.plan.block_range(block.block)
                values = activations(generation.rows[begin:end], generation.plan)
                won = generation.write_block(block.block, values, {"writer": writer})
        say(channel, f"{block.id} {int(won)}")


def read_blocks(channel: TextIO, store: str, stop: int, position: str, kind: str, until: str) -> None:
    """Look at what is committed, until a file is there and once more; compare it with what it has to be.

    Reports a line per look: how many rows there were.
    """
    rows = {row.key: row for row in rows_of(kind, 0, stop)}
    channel.readline()
    looks, stopped = 0, False
    while True:
        last, stopped = stopped, Path(until).exists()
        model = open_model(store)
        keys = model.committed_rows("resid_post", position)
        if keys:
            selection = model.select(keys, "resid_post", position)
            if looks % 2:
                for part in selection.parts:
                    generation = part.generation
                    generation.reader = ZarrReader(generation.location, generation.plan)
            found = [rows[key] for key in keys]
            truth = expected(found, "resid_post", range(LAYERS), position, "float32")
            np.testing.assert_array_equal(selection.to_numpy(), truth)
            for generation in model.holders("resid_post", position):
                for block in range(generation.plan.n_blocks):
                    start, stop_row = generation.plan.block_range(block)
                    seen = [key in keys for key in generation.keys[start:stop_row]]
                    assert all(seen) or not any(seen), "half a block"
        looks += 1
        say(channel, len(keys))
        if last:
            return


def as_nobody(channel: TextIO, store: str) -> None:
    """Read, verify and try to capture a store as a user who may not write it."""
    import zarr.core.sync  # its loop is a thread, and starts after the change of user

    assert zarr.core.sync
    os.setgid(65534)
    os.setuid(65534)
    model = open_model(store)
    keys = model.committed_rows("resid_post", "prompt_end")
    values = model.select(keys, "resid_post", "prompt_end").to_numpy()
    rows = {row.key: row for row in make_rows(100)}
    truth = expected([rows[key] for key in keys], "resid_post", range(LAYERS), "prompt_end", "float32")
    np.testing.assert_array_equal(values, truth)
    say(channel, f"read {len(keys)}")
    say(channel, f"verify {model.verify()}")
    try:
        model.assign([request(make_rows(100))])
    except ResidError as error:
        say(channel, f"{type(error).__name__}: {error}".replace("\n", " "))


TASKS: dict[str, Any] = {
    task.__name__: task for task in (write_blocks, create, repair, capture_range, read_blocks, as_nobody)
}


def _child(order: dict[str, Any]) -> int:
    os.environ.update(order["environment"])
    channel = _stream(socket.create_connection(("127.0.0.1", order["port"])))
    try:
        TASKS[order["task"]](channel, **order["arguments"])
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(OSError):
            channel.close()
    return 0


def main() -> None:
    """Fork and wait on orders, one JSON object a line; answer a process id or an exit code."""
    assert numpy.testing, (pyarrow.parquet, pyarrow.dataset)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _child(order)
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
