"""Workers for tests of the cluster: each leaves one file per block, and traces of every attempt."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import ModelError, NonFiniteError, StudyError


@dataclass(frozen=True)
class NumberBlock:
    number: int

    @property
    def id(self) -> str:
        return f"block-{self.number:03d}"


def number_blocks(count: int) -> list[NumberBlock]:
    return [NumberBlock(number) for number in range(count)]


def ids(*numbers: int) -> list[str]:
    return [NumberBlock(number).id for number in numbers]


def driver_environment(temporary: Path) -> dict[str, str]:
    """Return the environment of a process that finds this project, no running cluster, and room for its Ray."""
    names = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return names | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "TMPDIR": str(temporary)}


class FileWorker:
    """Writes ``done/<block id>`` atomically. ``attempts/`` gets one file per attempt, ``builds/`` one per worker."""

    def __init__(
        self,
        folder: str,
        *,
        seconds: float = 0.0,
        kill_first: Collection[int] = (),
        kill_always: Collection[int] = (),
        poison: Collection[int] = (),
        not_finite: Collection[int] = (),
        fault_first: Collection[int] = (),
        hang_first: Collection[int] = (),
    ):
        self.folder, self.seconds = Path(folder), seconds
        self.kill_first, self.kill_always, self.hang_first = kill_first, kill_always, hang_first
        self.poison, self.not_finite, self.fault_first = poison, not_finite, fault_first
        for name in ("done", "attempts", "builds"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _touch_new(self.folder / "builds", str(os.getpid()))

    def run(self, block: NumberBlock) -> dict[str, Any]:
        attempt = _touch_new(self.folder / "attempts", block.id)
        time.sleep(self.seconds)
        if block.number in self.kill_always or (block.number in self.kill_first and attempt == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if block.number in self.hang_first and attempt == 1:
            time.sleep(600)
        if block.number in self.poison:
            raise ValueError(f"poison in {block.id}")
        if block.number in self.not_finite:
            raise NonFiniteError(f"NaN in {block.id}")
        if block.number in self.fault_first and attempt == 1:
            raise RuntimeError("CUDA error: device-side assert triggered")
        temporary = self.folder / f"{block.id}.{os.getpid()}"
        temporary.write_text(str(block.number))
        temporary.rename(self.folder / "done" / block.id)
        return {"square": block.number**2, "pid": os.getpid()}


def _touch_new(folder: Path, name: str) -> int:
    """Create ``<name>.<n>`` with the first n that is free, and return n."""
    n = 1
    while True:
        try:
            (folder / f"{name}.{n}").touch(exist_ok=False)
        except FileExistsError:
            n += 1
        else:
            return n


def finished(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "done").glob("*"))


def attempts(folder: Path) -> dict[str, int]:
    """Return how often each block was begun."""
    names = [path.stem for path in (folder / "attempts").glob("*")]
    return {name: names.count(name) for name in sorted(set(names))}


def builds(folder: Path) -> int:
    """Return how many workers were built, or began to be."""
    return len(list((folder / "builds").glob("*")))


def fail_with_model_error(folder: str) -> FileWorker:
    FileWorker(folder)
    raise ModelError("no such architecture")


def fail_with_value_error(folder: str) -> FileWorker:
    FileWorker(folder)
    raise ValueError("cannot be built")


def die_while_built(folder: str) -> FileWorker:
    FileWorker(folder)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class EnvironmentWorker:
    """Returns what a worker sees of its environment."""

    def run(self, block: NumberBlock) -> dict[str, str | None]:
        names = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "RESID_CACHE", "RESID_TEST_STUDY", "AWS_TEST_KEY", "UNRELATED")
        return {name: os.environ.get(name) for name in names}


def double(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return 2 * number


def refuse_seven(number: int) -> int:
    if number == 7:
        raise StudyError("seven is refused", file="s.yaml", key="numbers", remedy="leave it out")
    return number


def die_on_first_call(folder: str) -> str:
    if _touch_new(Path(folder), "call") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return folder


def always_die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


class UnpicklableError(Exception):
    def __init__(self, one: str, two: str):
        super().__init__(f"{one} and {two}")


def raise_unpicklable(number: int) -> int:
    raise UnpicklableError("this", "that")
