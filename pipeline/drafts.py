"""Drafts for greedy decoding: what a row may say next, read from texts of the same prompt under all conditions.

A forward pass may read tokens of a row that nobody has chosen yet. Those that turn out to be what the row chooses stay,
so that texts are the same with and without them (speculative decoding: Leviathan et al., arXiv:2211.17192). They are
looked up where the row's last tokens have been before: in the text of a sibling, in the prompt or in its own text.

How often the next token agrees depends on the length of that match more than on the row: estimates are by that
length, learnt in a run from a stated start. A running mean for each row on top of it gained nothing where it was tried.
Nothing here measures time, so that a repeated run drafts the same tokens and rounds alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

# What a pass costs however few rows it has, in rows: SmolLM2-135M takes 90 ms and 4.3 ms a row on a CPU core, between 2
# and 128 rows. On a GPU it is the time in which weights are read: for 8B parameters on an H100 5 ms, 30 us a row.
# Stated, because what each engine measured would scatter.
FIXED_ROWS = {"cpu": 20.0}
FIXED_ROWS_ELSEWHERE = 160.0
# Most drafts of one row in one pass.
LONGEST = 16
# When no rows wait, drafts may bring a row this far ahead of the one that has most to say: those that are further
# ahead would end sooner, and the passes that the others need would be as many.
LEAD = 4
# Lengths of matches that are looked up, longest first; what lies between is found by comparing backwards.
LOOKED_UP = (8, 5, 3, 2)
# Matches longer than this are all alike.
LONG = 12
# How often the next token agreed, by length of the match: 7,161 tokens of SmolLM2 under eight conditions.
AGREED = (0.0, 0.2, 0.5, 0.6, 0.65, 0.75, 0.8, 0.8, 0.8, 0.8, 0.9, 0.9, 0.97)
# As many tries as that is worth beside those of a run.
PRIOR = 20.0


@dataclass
class _Group:
    """Texts of one prompt."""

    left: int  # rows that have not ended
    # The last n tokens, for each n of LOOKED_UP -> the latest text that had them, and the index behind them.
    seen: dict[tuple[int, ...], tuple[list[int], int]] = field(default_factory=dict)

    def add(self, tokens: list[int], end: int) -> None:
        """Note what stands in front of index `end` of a text."""
        for n in LOOKED_UP:
            if n <= end:
                self.seen[tuple(tokens[end - n : end])] = (tokens, end)


@dataclass
class _Text:
    """What a row has read and said, and where it seems to go on."""

    group: _Group
    tokens: list[int]  # the prompt's first: texts that begin alike match from there on
    end: int  # as long as it may become
    source: list[int] | None = None  # a text, perhaps this one
    at: int = 0  # index in the source of what may come next
    matched: int = 0  # tokens in front of that which agree, LONG at most
    drafts: tuple[int, ...] = ()  # of the pass that is under way

    def follow(self, token: int) -> None:
        """Append a token; the source stays while it goes on alike."""
        if self.source is not None and self.at < len(self.source) and self.source[self.at] == token:
            self.at, self.matched = self.at + 1, min(self.matched + 1, LONG)
        else:
            self.source, self.matched = None, 0
        self.tokens.append(token)

    def look_up(self) -> None:
        """Find the latest of the longest matches, where that is longer than what is followed."""
        goes_on = self.source is not None and self.at < len(self.source)
        if goes_on and self.matched == LONG:
            return
        for n in LOOKED_UP:
            if goes_on and n <= self.matched:
                return
            found = self.group.seen.get(tuple(self.tokens[-n:]))
            if found is not None:
                self.source, self.at = found
                while n < min(LONG, self.at) and self.source[self.at - 1 - n] == self.tokens[-1 - n]:
                    n += 1
                self.matched = n
                return


class Drafts:
    """Proposes tokens for running rows, where that is worth a larger pass.

    A draft costs a row in the products. It is worth that while it is right more often than a pass yields tokens for
    each row that it costs: with R rows, D drafts and A of them expected to be right, (R + A) / (fixed + R + D). When no
    rows wait any more, only rows that have most to say can save a pass, each of c such rows its part of one: then
    c / (fixed + c). A row whose matches are no longer good for that is not asked until it matches better.
    """

    def __init__(self, prompts: Iterable[Sequence[int]], max_new_tokens: int, fixed_rows: float):
        """`prompts` are those of all rows that will run; texts are forgotten with the last row of their prompt."""
        self.max_new_tokens, self.fixed_rows = max_new_tokens, fixed_rows
        self.proposed = self.accepted = 0  # tokens
        self._left = Counter(map(tuple, prompts))
        self._groups: dict[Hashable, _Group] = {}
        self._texts: dict[int, _Text] = {}
        self._tries = [PRIOR] * (LONG + 1)
        self._right = [PRIOR * share for share in AGREED]

    def begin(self, row: int, prompt: Sequence[int]) -> None:
        """Take in a row, or one that begins again: what it had said then serves as a draft."""
        key, tokens = tuple(prompt), list(prompt)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(self._left[key])
            for end in range(1, len(tokens)):
                group.add(tokens, end)
        self._texts[row] = _Text(group, tokens, len(tokens) + self.max_new_tokens)

    def said(self, row: int, tokens: Sequence[int]) -> None:
        """Take what a row chose in a pass, which may be an end token."""
        text = self._texts[row]
        self.accepted += len(tokens) - 1
        for i, (draft, token) in enumerate(zip(text.drafts, tokens, strict=False)):
            length = min(text.matched + i, LONG)
            self._tries[length] += 1
            if draft != token:
                break
            self._right[length] += 1
        text.drafts = ()
        first = len(text.tokens)
        for token in tokens:
            text.follow(token)
        text.look_up()
        for end in range(first, len(text.tokens)):  # not the last one: nothing has followed it yet
            text.group.add(text.tokens, end)

    def end(self, row: int) -> None:
        """Let a row go; its text stays for its siblings."""
        group = self._texts.pop(row).group
        group.left -= 1
        if not group.left:
            group.seen.clear()

    def propose(self, rows: Sequence[int], *, more: bool) -> list[tuple[int, ...]]:
        """Return drafts for each of the running rows, perhaps none; `more` tells whether others wait to enter."""
        texts = [self._texts[row] for row in rows]
        left = [text.end - len(text.tokens) for text in texts]
        most = [min(LONGEST, n - 1) for n in left]  # a pass yields a token more than drafts that were right
        second, top = sorted([-LONGEST, -LONGEST, *left])[-2:]
        last = sum(n >= top - LEAD for n in left)
        if not more:
            behind = (top if last > 1 else second) - LEAD
            most = [min(one, n - behind) if n >= top - LEAD else 0 for one, n in zip(most, left, strict=True)]
        n_drafts, right = [0] * len(texts), 0.0
        chances = [
            (-self._chance(text.matched), i)
            for i, text in enumerate(texts)
            if most[i] > 0 and text.source is not None and text.at < len(text.source)
        ]
        heapify(chances)
        drafted = 0
        while chances:
            chance, i = heappop(chances)
            rate = (len(texts) + right) / (self.fixed_rows + len(texts) + drafted)
            if -chance <= (rate if more else last / (self.fixed_rows + last)):
                break
            right, drafted, n_drafts[i] = right - chance, drafted + 1, n_drafts[i] + 1
            text = texts[i]
            assert text.source is not None
            if n_drafts[i] < most[i] and text.at + n_drafts[i] < len(text.source):
                heappush(chances, (chance * self._chance(text.matched + n_drafts[i]), i))
        for text, n in zip(texts, n_drafts, strict=True):
            text.drafts = () if text.source is None else tuple(text.source[text.at : text.at + n])
        self.proposed += drafted
        return [text.drafts for text in texts]

    def _chance(self, matched: int) -> float:
        """Return how often the next token agrees behind a match."""
        length = min(matched, LONG)
        return self._right[length] / self._tries[length]
