"""Sizes are spelt alike in every command."""

from __future__ import annotations

import pytest

from store.sizes import spell_bytes


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.0 kB"),
        (1000, "1.0 kB"),
        (999_940, "999.9 kB"),
        (999_960, "1.0 MB"),
        (2.5e9, "2.5 GB"),
        (7e15, "7000.0 TB"),
    ],
)
def test_a_size_is_spelt_in_decimal_units_and_never_as_1000_of_one(size: float, text: str) -> None:
    assert spell_bytes(size) == text
