"""What readers of object storage hold on its way: bounded for the process, and given back however a reader ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np
import pytest
from store_worker import D_MODEL, capture, make_rows, new_store, request

from store import read_ahead
from store.read_ahead import Budget
from store.selection import Selection

LAYERS = range(4)


@pytest.fixture
def selection() -> Iterator[Selection]:
    """Twelve rows in six blocks on object storage."""
    url = "memory://read-ahead"
    model = new_store(url)
    rows = make_rows(12)
    capture(model, request(rows, layers=LAYERS), block_rows=2)
    yield model.select([row.key for row in rows], "resid_post", "prompt_end", LAYERS)
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Budget:
    """A budget of two requests of two chunks each, which notes the most that was ever taken."""
    chunk = 2 * D_MODEL * 4
    monkeypatch.setattr(read_ahead, "REQUEST", 2 * chunk)
    found = Budget(4 * chunk)
    monkeypatch.setattr(read_ahead, "_in_flight", found)
    return found


def chunk_bytes(selection: Selection) -> int:
    return selection.parts[0].generation.plan.shard_shape.chunk_bytes


def test_a_small_budget_gives_the_same_values_and_all_of_it_back(
    selection: Selection, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, take = 0, Budget.take

    def noted(self: Budget, nbytes: int, even_so: bool) -> bool:
        nonlocal most
        taken = take(self, nbytes, even_so)
        most = max(most, self.used)
        return taken

    monkeypatch.setattr(Budget, "take", noted)
    whole = selection.to_numpy()
    assert budget.used == 0
    assert most == 4 * chunk_bytes(selection)
    monkeypatch.setattr(read_ahead, "_in_flight", Budget(10**9))
    np.testing.assert_array_equal(whole, selection.to_numpy())


def test_a_reader_that_is_left_or_fails_gives_back_what_it_held(
    selection: Selection, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = selection.chunks()
    next(chunks)
    assert budget.used > 0
    chunks.close()  # type: ignore[attr-defined]
    assert budget.used == 0
    parts = selection.parts
    url = parts[3].generation.location / "resid_post"
    fsspec.filesystem("memory").rm(url.url, recursive=True)
    with pytest.raises(Exception, match="resid_post"):
        selection.to_numpy()
    assert budget.used == 0


def test_readers_do_not_wait_for_each_other(selection: Selection, budget: Budget) -> None:
    """One that holds the whole budget stands still; another one reads on, one request at a time."""
    standing = selection.chunks()
    next(standing)
    assert not budget.take(4 * chunk_bytes(selection), even_so=False)
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(selection.to_numpy()))
    reader.start()
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert len(list(standing)) == len(selection.parts) * len(LAYERS) - 1
    assert budget.used == 0
