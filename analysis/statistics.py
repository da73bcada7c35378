"""Intervals and tests for rates and paired outcomes. Nothing to compute on is an error, never a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; ``n`` is the number of observations behind it."""

    estimate: float
    low: float
    high: float
    n: int
    confidence: float


@dataclass(frozen=True)
class McNemar:
    """McNemar's test on pairs: do the two conditions differ in how often the outcome occurs?"""

    n_pairs: int
    only_first: int  # pairs with the outcome in the first condition only
    only_second: int
    p_exact: float  # two-sided, binomial
    statistic: float  # chi-square with one degree of freedom, continuity-corrected
    p_corrected: float


def wilson_interval(k: float, n: int, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of ``k`` successes in ``n`` independent trials (Wilson 1927).

    ``k`` may be a sum of shares, one per trial: shares vary less than yes or no does, so the interval is wide enough.

    Raises:
        ValueError: unless ``0 <= k <= n``, ``n >= 1`` and ``0 < confidence < 1``.
    """
    if n < 1:
        raise ValueError(f"a rate needs at least one trial, got n = {n}")
    if not 0 <= k <= n:
        raise ValueError(f"successes must be between 0 and n = {n}, got {k}")
    z = _normal_quantile(confidence)
    p = k / n
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n * n))
    scale = 1 + z**2 / n
    # At the ends the bound is exactly 0 or 1; rounding would leave it just outside or inside.
    low = 0.0 if k == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if k == n else min(1.0, (centre + half) / scale)
    return Interval(p, low, high, n, confidence)


def mcnemar(first: Sequence[bool] | npt.ArrayLike, second: Sequence[bool] | npt.ArrayLike) -> McNemar:
    """Compare a yes/no outcome of the same units (prompts) under two conditions.

    Args:
        first, second: booleans, one per unit, in the same order.  # [unit]

    Returns:
        The exact test (binomial on the discordant pairs, McNemar 1947) and the chi-square test with Edwards' (1948)
        continuity correction, ``max(|b - c| - 1, 0)**2 / (b + c)``. Without discordant pairs both p-values are 1.

    Raises:
        ValueError: if there are no pairs, the lengths differ, or a value is not a boolean (a missing score must be
            left out together with its partner, not turned into a label).
    """
    a, b = _booleans(first, "first"), _booleans(second, "second")
    if a.shape != b.shape:
        raise ValueError(f"pairs need equal lengths, got {a.size} and {b.size}")
    only_first, only_second = int(np.sum(a & ~b)), int(np.sum(~a & b))
    discordant = only_first + only_second
    if discordant == 0:
        return McNemar(a.size, 0, 0, 1.0, 0.0, 1.0)
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    p_exact = min(1.0, 2 * tail / 2**discordant)
    statistic = max(abs(only_first - only_second) - 1, 0) ** 2 / discordant
    return McNemar(a.size, only_first, only_second, p_exact, statistic, math.erfc(math.sqrt(statistic / 2)))


def holm(p_values: Sequence[float] | npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return p-values adjusted for multiple tests (Holm 1979), in the order given.  # [test]

    Raises:
        ValueError: if there are none, or one is not in [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or p.size == 0:
        raise ValueError(f"p-values must be a list of at least one, got the shape {p.shape}")
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values must be between 0 and 1, got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def benjamini_hochberg(p_values: Sequence[float] | npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return p-values adjusted for the false discovery rate (Benjamini and Hochberg 1995), in the order given.

    Raises:
        ValueError: if one is not in [0, 1].
    """
    adjusted: npt.NDArray[np.float64] = false_discovery_control(np.asarray(p_values, dtype=np.float64))
    return adjusted


def rank_test(effect: float, among: Sequence[float] | npt.ArrayLike) -> tuple[int, float]:
    """Rank an effect among those of controls drawn at random: return b, and p = (1 + b) / (1 + m).

    b of the m controls have an effect at least as far from 0; equal ones count as farther. The test is exact if
    effect and controls are exchangeable under the null hypothesis, whatever their spread (Phipson and Smyth 2010). No
    number of prompts makes p smaller than 1 / (1 + m): the controls are the sample.

    Raises:
        ValueError: if there are no controls.
    """
    controls = np.abs(np.asarray(among, dtype=np.float64))
    if controls.ndim != 1 or controls.size == 0:
        raise ValueError(f"an effect is ranked among at least one control, got the shape {controls.shape}")
    as_far = int(np.sum(controls >= abs(effect) - 1e-9))
    return as_far, (1 + as_far) / (1 + controls.size)


def bootstrap_mean_interval(
    values: Sequence[float] | npt.ArrayLike,
    *,
    seed: int,
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Return the mean with its percentile bootstrap interval (Efron 1979).

    Args:
        values: finite numbers.  # [observation]
        seed: of the resampling; the same seed gives the same interval.
        groups: what each observation belongs to (a prompt with several seeds, say). Whole groups are then resampled,
            because observations within one are not independent.
        confidence: share of the bootstrap distribution between the bounds.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: if there are no values, one is not finite, or the groups do not match.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"a mean needs a list of at least one value, got the shape {x.shape}")
    if not np.all(np.isfinite(x)):
        raise ValueError(f"{int(np.sum(~np.isfinite(x)))} of {x.size} values are not finite")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    _normal_quantile(confidence)
    sums: npt.NDArray[np.float64] = x
    counts: npt.NDArray[np.float64] = np.ones_like(x)
    if groups is not None:
        if len(groups) != x.size:
            raise ValueError(f"need one group for each of {x.size} values, got {len(groups)}")
        _, inverse = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        sums = np.bincount(inverse, weights=x).astype(np.float64)
        counts = np.bincount(inverse).astype(np.float64)
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # one at a time: memory stays that of one sample
        drawn = random.integers(0, sums.size, sums.size)
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high), int(x.size), confidence)


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _booleans(values: object, name: str) -> npt.NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: pairs need a list of at least one, got the shape {array.shape}")
    if array.dtype != np.bool_:
        raise ValueError(f"{name}: outcomes must be booleans, got {array.dtype}")
    return array
