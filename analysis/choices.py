"""Choosing among conditions by their measured rates: a pure function, the same numbers give the same choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.comparisons import paired_difference, share_interval
from analysis.statistics import Interval
from store.references import Value
from store.study_select import Bound, Outcome, Selection

TIES = "the first candidate in the study's order"


@dataclass(frozen=True)
class Measured:
    """How often each outcome occurred under one condition.

    Outcomes are by prompt: the share of the prompt's texts (one per seed) with that outcome.
    """

    condition: str
    condition_key: str
    variables: Mapping[str, Value]
    outcomes: Mapping[tuple[Outcome, str], Mapping[str, float]]  # (outcome, prompt set) -> prompt id -> share

    def rate(self, outcome: Outcome, sets: Iterable[str]) -> float:
        """Return the mean over the distinct prompts of some sets.

        Raises:
            ValueError: if there are none.
        """
        shares = self.shares(outcome, sets)
        if not shares:
            raise ValueError(f"{self.condition}: no prompts to measure {outcome} on")
        return sum(shares.values()) / len(shares)

    def shares(self, outcome: Outcome, sets: Iterable[str]) -> dict[str, float]:
        """Return the share of each distinct prompt of some sets."""
        return {prompt: share for name in sets for prompt, share in self.outcomes[outcome, name].items()}


@dataclass(frozen=True)
class Verdict:
    """One candidate and what the rule says of it."""

    candidate: Measured
    rate: float
    change: float  # rate minus the rate under `against`
    faults: tuple[str, ...]  # why it cannot be chosen; empty if it can
    rank: int  # 1 is the best; those with faults come last
    interval: Interval  # of the rate: Wilson, the prompts being the units
    change_interval: Interval  # of the change: paired, Newcombe 1998


@dataclass(frozen=True)
class Ranking:
    """All candidates, in the study's order, and the chosen one (None: none passes)."""

    against: float  # rate under the condition that candidates are compared with
    verdicts: tuple[Verdict, ...]
    chosen: Measured | None
    tied: int  # candidates that share the best rate, the chosen one included
    against_interval: Interval

    def is_tied(self, verdict: Verdict) -> bool:
        """Whether a candidate passes and shares the chosen one's rate."""
        best = min(self.verdicts, key=lambda one: one.rank)
        return self.chosen is not None and not verdict.faults and round(verdict.rate, 9) == round(best.rate, 9)


def choose(selection: Selection, candidates: Sequence[Measured], against: Measured) -> Ranking:
    """Apply a selection's rule.

    Raises:
        ValueError: if there are no candidates, or no prompts.
    """
    if not candidates:
        raise ValueError("there is nothing to choose from")
    sign = 1.0 if selection.want == "lowest" else -1.0
    below = against.rate(selection.outcome, selection.prompts)
    judged = []
    for candidate in candidates:
        rate = candidate.rate(selection.outcome, selection.prompts)
        change = rate - below
        faults = [fault for keep in selection.keep if (fault := _fault(keep, candidate, against))]
        # Rates are shares of whole prompts: what looks equal is equal, up to rounding.
        if -sign * change < selection.change_at_least - 1e-9:
            faults.insert(0, f"{selection.outcome} changes by {change:+.3f} on {', '.join(selection.prompts)}")
        judged.append((candidate, rate, change, tuple(faults)))
    order = sorted(range(len(judged)), key=lambda i: (bool(judged[i][3]), round(sign * judged[i][1], 9), i))
    verdicts = tuple(
        Verdict(candidate, rate, change, faults, order.index(i) + 1, *_intervals(selection, candidate, against))
        for i, (candidate, rate, change, faults) in enumerate(judged)
    )
    best = verdicts[order[0]]
    base = share_interval(below, len(against.shares(selection.outcome, selection.prompts)))
    if best.faults:
        return Ranking(below, verdicts, None, 0, base)
    tied = sum(not one.faults and round(one.rate, 9) == round(best.rate, 9) for one in verdicts)
    return Ranking(below, verdicts, best.candidate, tied, base)


def _intervals(selection: Selection, candidate: Measured, against: Measured) -> tuple[Interval, Interval]:
    """Return the 95% intervals of a candidate's rate and of its change, over the prompts that both have."""
    one, other = (side.shares(selection.outcome, selection.prompts) for side in (candidate, against))
    both = [prompt for prompt in one if prompt in other]
    first, second = (np.array([side[prompt] for prompt in both]) for side in (one, other))
    return share_interval(float(np.mean([*one.values()])), len(one)), paired_difference(first, second)


def _fault(keep: Bound, candidate: Measured, against: Measured) -> str:
    rate = candidate.rate(keep.outcome, keep.prompts)
    where = ", ".join(keep.prompts)
    if keep.at_most is not None:
        return f"{keep.outcome} is {rate:.3f} on {where}" if rate > keep.at_most + 1e-9 else ""
    change = rate - against.rate(keep.outcome, keep.prompts)
    if keep.rise_at_most is not None:
        beyond = change > keep.rise_at_most + 1e-9
    else:
        assert keep.change_at_most is not None
        beyond = abs(change) > keep.change_at_most + 1e-9
    return f"{keep.outcome} changes by {change:+.3f} on {where}" if beyond else ""
