"""Contrasts of rows under exchanged labels: jointly, for all the directions that a statistic compares.

A **contrast** gives each of its rows a role (positive, negative, one of several roles). Two contrasts that share rows
are one **design**: the null hypothesis is that none of their roles matters, so that all rows of the design could have
had each other's roles. A row's roles in all contrasts move together: exchanged apart, the noise of the shared rows
would count as an effect. Contrasts without a common row are exchanged apart. Rows are exchanged among those of one text
where the contrasts share texts. With **groups** (rows under one instruction, say, which are not independent) whole
groups are exchanged where every group has one role; where every group has several, all of its rows in one role are
exchanged with all of its rows in another.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from store.errors import ResidError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class NotExchangeableError(ResidError):
    """No permutation is exact here; the message says why."""


@dataclass(frozen=True)
class Contrast:
    """Which role each row has and what each role counts for; roles count from 0.

    ``pca`` makes it the principal component with that number (from 1) of the contrast's rows instead of its mean: of
    the rows of role 0 minus the mean of role 1, or ``paired`` of the differences of the rows' texts.
    """

    roles: Mapping[str, int]  # row key -> role
    coefficients: tuple[float, ...]  # of each role's mean
    texts: Mapping[str, str] = field(default_factory=dict)  # row key -> what it shares with rows of other roles
    pca: int | None = None
    paired: bool = False
    centred: bool = False


@dataclass(frozen=True)
class Design:
    """The union of the rows of some contrasts, and what may be exchanged among them."""

    keys: tuple[str, ...]
    roles: Ints  # [contrast, row]; -1: not among its rows
    strata: Ints  # [unit]
    unit: Ints  # [row]: what is exchanged as one
    level: str

    def shuffled(self, count: int, seed: int | Sequence[int]) -> Ints:
        """Return roles [draw, contrast, row] after permutations of the units within strata."""
        first = np.unique(self.unit, return_index=True)[1]
        of_unit = self.roles[:, first]  # [contrast, unit]
        random = np.random.default_rng(seed).random((count, len(first)))
        order = np.argsort(self.strata, kind="stable")
        drawn = np.argsort(self.strata + random, axis=1)  # by stratum, and at random within it
        place = np.empty_like(drawn)
        place[:, order] = drawn
        return np.ascontiguousarray(np.moveaxis(of_unit[:, place], 0, 1)[:, :, self.unit])


def design(contrasts: Sequence[Contrast], groups: Mapping[str, str] | None = None) -> Design:
    """Join contrasts into one design.

    Raises:
        NotExchangeableError: if some groups have one role and others several, or nothing can be exchanged.
    """
    keys = tuple(sorted({key for contrast in contrasts for key in contrast.roles}))
    roles = np.array([[contrast.roles.get(key, -1) for key in keys] for contrast in contrasts], dtype=np.int64)
    part = _parts(roles)
    combined = [tuple(column) for column in roles.T]
    texts = {key: text for contrast in contrasts for key, text in contrast.texts.items()}
    units: list[Hashable]
    strata: list[Hashable]
    if groups is None:
        units = list(keys)
        strata = [(part[i], texts.get(key)) for i, key in enumerate(keys)]
        level = "row within text" if texts else "row"
    else:
        names = [(part[i], groups[key]) if key in groups else (part[i], key, "row") for i, key in enumerate(keys)]
        members: dict[Hashable, set[Hashable]] = {}
        for name, role in zip(names, combined, strict=True):
            members.setdefault(name, set()).add(role)
        several = {len(found) > 1 for found in members.values()}
        if len(several) > 1:
            raise NotExchangeableError("some groups have rows of one role only and others of several")
        if several == {True}:
            units, strata, level = list(zip(names, combined, strict=True)), list(names), "roles within group"
        else:
            units, strata, level = list(names), list(part), "group"
    unit, stratum_of = _numbered(units), _numbered(strata)
    first = np.unique(unit, return_index=True)[1]
    by_stratum: dict[int, set[Hashable]] = {}
    for i in first:
        by_stratum.setdefault(int(stratum_of[i]), set()).add(combined[i])
    if all(len(found) == 1 for found in by_stratum.values()):
        raise NotExchangeableError("no two units of different roles can be exchanged")
    return Design(keys, roles, stratum_of[first], unit, level)


def _parts(roles: Ints) -> list[int]:
    """Return for each row the number of its connected part: contrasts that share a row are connected."""
    part = list(range(len(roles)))
    for column in (roles >= 0).T:
        linked = {part[i] for i in np.flatnonzero(column)}
        part = [min(linked) if own in linked else own for own in part]
    return [part[int(np.flatnonzero(column)[0])] for column in (roles >= 0).T]


def _numbered(items: Sequence[Hashable]) -> Ints:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(item, len(numbers)) for item in items], dtype=np.int64)


def mean_weights(roles: Ints, coefficients: Sequence[float], counts: Floats | None = None) -> Floats:
    """Return each row's weight in a contrast of means, [draw, row]: coefficient over the number of rows in its role."""
    weights = np.zeros(roles.shape)
    for role, coefficient in enumerate(coefficients):
        inside = (roles == role) * (1.0 if counts is None else counts)
        total = inside.sum(axis=1, keepdims=True)
        weights += np.divide(coefficient * inside, total, out=np.zeros_like(inside), where=total > 0)
    return weights


def vectors(contrast: Contrast, keys: Sequence[str], roles: Ints, values: Floats) -> Floats:
    """Return a contrast's vector under each draw's roles, [draw, d_model].

    Args:
        keys, values: the design's rows and their activations, [row, d_model].
        roles: of the contrast, [draw, row].
    """
    weights = mean_weights(roles, contrast.coefficients)
    if contrast.pca is None:
        return weights @ values
    from scipy.linalg import eigh

    gram = values @ values.T
    texts = _numbered([contrast.texts.get(key, ("none", key)) for key in keys])
    for draw, (role, weight) in enumerate(zip(roles, weights.copy(), strict=True)):
        contrasts = _contrast_rows(contrast, role, texts)
        if contrast.centred:
            contrasts = contrasts - contrasts.mean(axis=0)
        last = len(contrasts) - contrast.pca
        found = eigh(contrasts @ gram @ contrasts.T, subset_by_index=[last, last])[1][:, 0] @ contrasts
        along = found @ gram @ weight
        weights[draw] = found if along >= 0 else -found
    return weights @ values


def _contrast_rows(contrast: Contrast, role: Ints, texts: Ints) -> Floats:
    """Return the contrasts that a principal component is of, each as weights of rows, [contrast, row]."""
    positive, negative = role == 0, role == 1
    if not contrast.paired:
        to_mean: Floats = np.eye(len(role))[positive] - negative / negative.sum()
        return to_mean
    shared = [text for text in np.unique(texts[positive]) if (texts[negative] == text).any()]
    sides = [np.array([(side & (texts == text)) for text in shared], dtype=np.float64) for side in (positive, negative)]
    pairs: Floats = sides[0] / sides[0].sum(axis=1, keepdims=True) - sides[1] / sides[1].sum(axis=1, keepdims=True)
    return pairs


def resampled_counts(plan: Design, texts: Mapping[str, str], count: int, seed: int | Sequence[int]) -> Floats:
    """Return how often each row occurs in bootstrap samples, [draw, row].

    Whole texts or groups are drawn where rows are exchanged within or as them, else rows; always among those whose
    rows have the same roles, so that each role keeps its size.
    """
    cluster: list[Hashable] = [texts.get(key, (key,)) for key in plan.keys]
    if plan.level == "group":
        cluster = [int(unit) for unit in plan.unit]
    elif plan.level == "roles within group":
        cluster = [int(plan.strata[unit]) for unit in plan.unit]
    number = _numbered(cluster)
    kinds: dict[int, set[tuple[int, ...]]] = {}
    for i, own in enumerate(number):
        kinds.setdefault(int(own), set()).add(tuple(plan.roles[:, i]))
    kind = _numbered([tuple(sorted(kinds[own])) for own in range(len(kinds))])
    rng = np.random.default_rng(seed)
    counts = np.zeros((count, len(kinds)))
    for each in range(int(kind.max()) + 1):
        members = np.flatnonzero(kind == each)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=count)
    return counts[:, number]


def two_sided(value: float, drawn: Floats, rounding: float = 0.0) -> float:
    """Return twice the smaller tail of a null's draws, the value itself among them; the null need not be about 0."""
    above, below = np.sum(drawn >= value - rounding), np.sum(drawn <= value + rounding)
    return float(min(1.0, 2 * (1 + min(above, below)) / (1 + len(drawn))))
