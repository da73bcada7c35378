"""docs/failures.md names every failure test, with as many cases as it has."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from failure_table import PATH, table

ROOT = Path(__file__).parents[1]


def test_the_table_of_failure_tests_is_that_of_the_tests() -> None:
    rows = table()
    modules = sorted({module for module, _ in rows})
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", *(f"tests/{module}.py" for module in modules)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = Counter(re.findall(r"^tests/(\w+)\.py::(\w+)", done.stdout, re.MULTILINE))
    assert {name: row.tests for name, row in rows.items()} == dict(found)


def test_the_sum_in_the_text_is_that_of_the_table() -> None:
    rows = table().values()
    tests, cases = sum(row.tests for row in rows), sum(row.tests * row.cases for row in rows)
    assert f"{tests:,} tests go through {cases:,} cases" in PATH.read_text(encoding="utf-8")
