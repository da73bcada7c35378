"""What is drafted: what followed the same tokens in texts of the prompt, as much of it as pays."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import drafts
from pipeline.drafts import LONGEST, Drafts

PROMPT = (90, 91, 92, 93, 94, 95, 96, 97)


def ready(said: Sequence[Sequence[int]], fixed_rows: float = 1e6, max_new_tokens: int = 50) -> Drafts:
    """Return rows 0, 1, ... of one prompt that have said so much."""
    found = Drafts([PROMPT] * len(said), max_new_tokens, fixed_rows)
    for row, tokens in enumerate(said):
        found.begin(row, PROMPT)
        for token in tokens:
            found.said(row, [token])
    return found


def test_a_row_that_begins_like_a_sibling_goes_on_like_it_and_finds_it_again_after_they_part() -> None:
    sibling = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert ready([sibling, [1, 2]]).propose([1], more=True) == [(3, 4, 5, 6, 7, 8, 9)]
    assert ready([sibling, [1, 2, 20, 21, 5, 6]]).propose([1], more=True) == [(7, 8, 9)]
    assert ready([sibling, [1, 2, 20, 21]]).propose([1], more=True) == [()]
    # The longer match wins over the later one; the row's own text and its prompt serve as well.
    assert ready([[1, 5, 6, 7, 8], [30, 6, 7, 31], [40, 5, 6, 7]]).propose([2], more=True) == [(8,)]
    assert ready([[1, 2, 3, 4, 1, 2, 3]]).propose([0], more=True) == [(4, 1, 2, 3)]
    assert ready([[1, 92, 93]]).propose([0], more=True) == [(94, 95, 96, 97, 1, 92, 93)]
    # Another prompt's text does not.
    other = Drafts([PROMPT, PROMPT[1:]], 50, 1e6)
    for row, prompt in enumerate((PROMPT, PROMPT[1:])):
        other.begin(row, prompt)
        other.said(row, sibling[: 2 if row else None])
    assert other.propose([1], more=True) == [()]


def test_the_last_token_that_is_wanted_is_not_drafted_but_comes_out_of_the_pass() -> None:
    sibling = list(range(1, 9))
    for n in (1, 2, 3):
        # 3 tokens said of `3 + n`: the pass reads n - 1 drafts and yields n tokens at most.
        found = ready([sibling, [1, 2, 3]], max_new_tokens=3 + n)
        assert found.propose([1], more=True) == [tuple(sibling[3 : 2 + n])]
    long = list(range(1, 60))
    assert ready([long, [1, 2, 3]], max_new_tokens=100).propose([1], more=True) == [tuple(long[3 : 3 + LONGEST])]


def test_drafts_pay_for_few_rows_and_not_for_many() -> None:
    said = [list(range(1, 30)), *([1, 2, 20, 21, 5, 6] for _ in range(40))]
    # Matches of two: right in half of all cases.
    n_drafted = [
        sum(map(len, ready(said, fixed_rows=20.0).propose(range(1, 1 + rows), more=True))) / rows
        for rows in (1, 4, 20, 40)
    ]
    assert n_drafted[0] >= 2
    assert n_drafted == sorted(n_drafted, reverse=True)
    assert n_drafted[-1] == 0
    assert not any(ready(said, fixed_rows=0.0).propose(range(1, 41), more=True))


def test_without_rows_that_wait_only_those_that_have_most_to_say_draft() -> None:
    loop = [1, 2, 3] * 6
    found = ready([loop, loop[:9], loop[:4]])
    assert all(found.propose([0, 1, 2], more=True))
    ahead, between, last = found.propose([0, 1, 2], more=False)
    assert (ahead, between) == ((), ())
    assert len(last) >= drafts.LEAD
    assert ready([loop]).propose([0], more=False) != [()]


def test_drafts_that_keep_being_refused_are_no_longer_made() -> None:
    found = Drafts([PROMPT] * 4, 2000, 20.0)
    for row in range(4):
        found.begin(row, PROMPT)
        found.said(row, [1, 2, 3])
    made = []
    for i in range(300):
        # What followed (1, 2, 3) is refused each time.
        proposed = found.propose(range(4), more=True)
        made.append(sum(map(len, proposed)))
        for row in range(4):
            found.said(row, [1000 + 4 * i + row])
            found.said(row, [1, 2, 3])
    assert max(made[:20]) > 0
    assert not any(made[-100:])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_drafts_are_what_followed_the_same_tokens(data: st.DataObject) -> None:
    n, most = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 25))
    prompt = tuple(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5)))
    found = Drafts([prompt] * n, most, data.draw(st.sampled_from([5.0, 1e6])))
    known: dict[int, list[int]] = {}
    for row in range(n):
        found.begin(row, prompt)
        known[row] = [*prompt, data.draw(st.integers(0, 2))]
        found.said(row, known[row][-1:])
    running = [row for row in range(n) if most > 1]
    while running:
        proposed = found.propose(running, more=data.draw(st.booleans()))
        for row, one in zip(running, proposed, strict=True):
            assert len(one) <= min(LONGEST, len(prompt) + most - len(known[row]) - 1)
            if one:
                again = (*known[row][-2:], *one)
                assert any(tuple(t[i : i + len(again)]) == again for t in known.values() for i in range(len(t)))
        for row, one in zip(list(running), proposed, strict=True):
            right = data.draw(st.integers(0, len(one)))
            new = [*one[:right], data.draw(st.integers(0, 2))]
            found.said(row, new)
            known[row] += new
            if len(known[row]) == len(prompt) + most or data.draw(st.integers(0, 9)) == 0:
                found.end(row)
                running.remove(row)
    assert found.accepted <= sum(map(len, known.values()))
