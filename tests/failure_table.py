"""The table of docs/failures.md, and the fixture that holds tests to the number of cases it gives them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

PATH = Path(__file__).parents[1] / "docs" / "failures.md"
_ROW = re.compile(r"^\|.*\| `(test_\w+)\.(test_\w+)` \| ([0-9,]+)(?: × ([0-9,]+))? \|$", re.MULTILINE)


class Row(NamedTuple):
    """How often a test runs, and how many cases it goes through each time."""

    tests: int
    cases: int


def table() -> dict[tuple[str, str], Row]:
    """Return the table's rows by module and test."""

    def number(text: str | None) -> int:
        return int((text or "1").replace(",", ""))

    found = _ROW.findall(PATH.read_text(encoding="utf-8"))
    return {(module, test): Row(number(tests), number(cases)) for module, test, tests, cases in found}


@dataclass
class Tally:
    """Counts the cases of a test that goes through several."""

    count: int = 0

    def add(self, cases: int = 1) -> None:
        self.count += cases


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """What a test counts its cases with; they must be as many as the table says, if it passes so far."""
    tally, failed = Tally(), request.session.testsfailed
    yield tally
    if request.session.testsfailed == failed and tally.count:
        name = (request.module.__name__.rpartition(".")[2], request.function.__name__)
        assert table().get(name, Row(0, 0)).cases == tally.count, f"{PATH.name} has another number of cases for {name}"
