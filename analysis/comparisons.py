"""Rates of one outcome under two conditions, compared prompt by prompt.

The prompt is the unit: several texts of a prompt (sampling seeds, or random directions as controls) count as one prompt
whose outcome is the share of its texts, and never as further prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import hypergeom

from analysis.statistics import Interval, mcnemar, wilson_interval


@dataclass(frozen=True)
class Counts:
    """How many of each prompt's texts have the outcome; every prompt has as many texts."""

    hits: Sequence[int]  # [prompt]
    repeats: int  # texts per prompt

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"a prompt has at least one text, got {self.repeats}")
        if not self.hits:
            raise ValueError("there are no prompts to compare")
        if min(self.hits) < 0 or max(self.hits) > self.repeats:
            raise ValueError(f"of {self.repeats} texts between 0 and {self.repeats} have the outcome, got {self.hits}")

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        shares: npt.NDArray[np.float64] = np.asarray(self.hits, dtype=np.float64) / self.repeats
        return shares

    @property
    def interval(self) -> Interval:
        """The mean share with its 95% Wilson interval for as many trials as there are prompts.

        Shares vary less than yes or no does, so with several texts a prompt the interval is wide enough, or too wide.
        """
        return share_interval(float(self.shares.mean()), len(self.hits))


@dataclass(frozen=True)
class Compared:
    """First minus second, prompt by prompt."""

    first: Interval
    second: Interval
    difference: Interval
    only_first: int  # prompts with a larger share in the first
    only_second: int
    test: str  # mcnemar; sign_flip or within_prompt where a prompt has several texts
    p_exact: float  # two-sided
    p_corrected: float | None  # McNemar's chi-square with continuity correction; None for the others


def compare(first: Counts, second: Counts) -> Compared:
    """Compare the same prompts, in the same order, under two conditions.

    With one text each the test is McNemar's. With as many texts on both sides it is the sign-flip test of the mean
    difference of shares, the same test there: under the null hypothesis a prompt's two sides are exchanged as a whole.
    With unequal numbers the difference of a prompt is not symmetric and flipping its sign is not exact; the texts of a
    prompt are exchanged instead (`within_prompt`), as if each came from either side alike.

    Raises:
        ValueError: if the numbers of prompts differ.
    """
    if len(first.hits) != len(second.hits):
        raise ValueError(f"pairs need equal lengths, got {len(first.hits)} and {len(second.hits)}")
    # Differences in units of 1 / (repeats of the first * repeats of the second): whole numbers.
    differences = [a * second.repeats - b * first.repeats for a, b in zip(first.hits, second.hits, strict=True)]
    single = first.repeats == second.repeats == 1
    test = mcnemar(first.shares > 0, second.shares > 0) if single else None
    if test is not None:
        name, p_exact = "mcnemar", test.p_exact
    elif first.repeats == second.repeats:
        name, p_exact = "sign_flip", sign_flip(differences)
    else:
        name, p_exact = "within_prompt", within_prompt(first, second)
    return Compared(
        first=first.interval,
        second=second.interval,
        difference=paired_difference(first.shares, second.shares),
        only_first=sum(difference > 0 for difference in differences),
        only_second=sum(difference < 0 for difference in differences),
        test=name,
        p_exact=p_exact,
        p_corrected=None if test is None else test.p_corrected,
    )


def share_interval(rate: float, n: int, confidence: float = 0.95) -> Interval:
    """Return the Wilson interval of a mean share of ``n`` units; of whole numbers `wilson_interval` is the same.

    Raises:
        ValueError: unless ``0 <= rate <= 1`` and ``n >= 1``.
    """
    total = rate * n
    whole = round(total)
    return wilson_interval(whole if math.isclose(total, whole, abs_tol=1e-9) else total, n, confidence)


def paired_difference(
    first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], confidence: float = 0.95
) -> Interval:
    """Return the mean of first minus second with an interval for paired rates.

    Newcombe (1998, Statistics in Medicine 17:2635, method 10): Wilson intervals of both rates, squared and added with
    the correlation of the pairs, whose covariance is lowered by 1/(2n) where it is positive. Its bounds stay sensible
    where no pair differs, which a bootstrap's do not.

    Args:
        first, second: shares between 0 and 1.  # [prompt]
        confidence: of both Wilson intervals and of the result.

    Raises:
        ValueError: if there are no pairs or the lengths differ.
    """
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(f"pairs need equal lengths of at least one, got {first.shape} and {second.shape}")
    n = int(first.size)
    a, b = (share_interval(float(side.mean()), n, confidence) for side in (first, second))
    covariance = float(np.mean(first * second)) - a.estimate * b.estimate
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * n))
    spread = math.sqrt(a.estimate * (1 - a.estimate) * b.estimate * (1 - b.estimate))
    correlation = 0.0 if spread == 0 else max(-1.0, min(1.0, covariance / spread))
    difference = a.estimate - b.estimate
    below = _added(a.estimate - a.low, b.high - b.estimate, correlation)
    above = _added(a.high - a.estimate, b.estimate - b.low, correlation)
    return Interval(difference, max(-1.0, difference - below), min(1.0, difference + above), n, confidence)


def _added(x: float, y: float, correlation: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))


def sign_flip(differences: Sequence[int]) -> float:
    """Return the exact two-sided p-value of the sign-flip test on whole numbers: P(|sum of +-d| >= |sum of d|).

    Without a difference it is 1.
    """
    sizes = [abs(difference) for difference in differences if difference]
    total, observed = sum(sizes), abs(sum(differences))
    chances = np.zeros(2 * total + 1)  # of sums from -total to total
    chances[total] = 1.0
    for size in sizes:
        shifted = np.zeros_like(chances)
        shifted[size:] += 0.5 * chances[: chances.size - size]
        shifted[: chances.size - size] += 0.5 * chances[size:]
        chances = shifted
    sums = np.arange(-total, total + 1)
    return min(1.0, float(chances[np.abs(sums) >= observed].sum()))


def within_prompt(first: Counts, second: Counts) -> float:
    """Return the exact two-sided p-value where the texts of each prompt are exchanged between the two sides.

    Given how many of a prompt's texts have the outcome, the number among the first side's is hypergeometric; the sums
    over prompts are convolved, and p is the chance of a sum at least as far from its mean: the exact conditional test
    of Cochran, Mantel and Haenszel (Birch 1964). With one text a side it is McNemar's exact test. Exact if a prompt's
    texts are exchangeable under the null hypothesis, apart from those of other prompts: so for sampling seeds, and not
    for a pool of directions that differ from each other; those are ranked (`analysis.statistics.rank_test`).
    """
    n = first.repeats + second.repeats
    totals = np.asarray(first.hits) + np.asarray(second.hits)
    chances = np.ones(1)  # of the first side's sum, from 0
    for total, times in zip(*np.unique(totals, return_counts=True), strict=True):
        of_prompt = hypergeom.pmf(np.arange(first.repeats + 1), n, total, first.repeats)
        for _ in range(times):
            chances = np.convolve(chances, of_prompt)
    centre = first.repeats * int(totals.sum())
    far = np.abs(n * np.arange(len(chances)) - centre)
    return min(1.0, float(chances[far >= abs(n * sum(first.hits) - centre)].sum()))
