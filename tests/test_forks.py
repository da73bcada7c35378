"""Rows share a computation exactly as long as their tokens and the operations on the way are the same."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.forks import block_of, layouts
from store.conditions import Operation
from store.sites import COMPONENTS, Site

operations = st.builds(
    lambda component, layer, size: Operation("add", Site(component, layer), np.full((1, 2), size, np.float32), "all"),
    st.sampled_from(COMPONENTS),
    st.integers(0, 3),
    st.integers(1, 2),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.lists(operations, max_size=3)), min_size=1, max_size=7))
def test_rows_are_one_segment_if_and_only_if_nothing_told_them_apart_so_far(
    rows: list[tuple[int, list[Operation]]],
) -> None:
    found = layouts([history for history, _ in rows], [done for _, done in rows])
    assert found[0].first == 0
    assert [layout.first for layout in found] == sorted({layout.first for layout in found})
    for block in range(5):
        current = [layout for layout in found if layout.first <= block][-1]
        segment = current.segment_of(len(rows))
        for a, (history_a, done_a) in enumerate(rows):
            for b, (history_b, done_b) in enumerate(rows):
                same = history_a == history_b and all(
                    [o.digest for o in done_a if block_of(o.site) == at]
                    == [o.digest for o in done_b if block_of(o.site) == at]
                    for at in range(block + 1)
                )
                assert (segment[a] == segment[b]) == same
    for before, after in itertools.pairwise(found):
        for parent, members in zip(after.parents, after.members, strict=True):
            assert set(members) <= set(before.members[parent])


def test_without_sharing_every_row_is_on_its_own_from_the_start() -> None:
    (only,) = layouts(["a", "a"], [[], []], share=False)
    assert only.members == ((0,), (1,))
    assert only.first == 0
