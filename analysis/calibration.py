"""How often the tests and intervals err, by simulation: ``make calibration`` writes the table of docs/statistics.md.

Every function returns how often something happened among seeded replicates; nothing here reads a store.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.comparisons import Counts, compare, paired_difference, sign_flip
from analysis.components import components_of_directions
from analysis.directions import orthogonalise
from analysis.layerwise import Floats
from analysis.permutations import Contrast, design, two_sided, vectors
from analysis.statistics import benjamini_hochberg, rank_test, wilson_interval

MARKERS = ("<!-- calibration -->", "<!-- calibration: end -->")
D_MODEL, PER_SIDE, DRAWS = 24, 16, 199
# The sides of the contrasts in each situation; a letter is a set of rows.
SITUATIONS: dict[str, tuple[str, ...]] = {
    "same rows": ("PN", "PN"),
    "one side shared": ("PN", "QN"),
    "disjoint rows": ("PN", "QM"),
    "difference": ("PN", "QN"),
    "orthogonalised": ("PN", "QN", "RN"),
    "principal component of rows": ("PN", "QN"),
    "principal component of directions": ("PN", "QN", "RN", "SN"),
    "axis against a trait": ("NQRST", "QN"),
    "texts shared": ("PN", "QN"),
    "groups": ("PN", "QN"),
}


def cosine_p_values(
    situation: str, replicates: int, seed: int, effect: float = 0.0, apart: bool = False, grouped: bool = True
) -> Floats:
    """Return the p-values of cosines of two directions in one situation, [replicate].

    Args:
        situation: of `SITUATIONS`.
        replicates: how many.
        seed: of all draws.
        effect: how far every first side lies from the rest along one axis, in standard deviations.
        apart: permute each direction's labels apart from the other's (what was done before; of two contrasts only).
        grouped: exchange whole groups, where the situation has groups.
    """
    rng = np.random.default_rng(seed)
    sides = SITUATIONS[situation]
    names = sorted(set("".join(sides)))
    place = {name: i for i, name in enumerate(names)}
    keys = [f"{name}{i:02d}" for name in names for i in range(PER_SIDE)]
    texts = {key: f"t{key[1:]}" for key in keys} if situation == "texts shared" else {}
    groups = {key: f"{key[0]}{int(key[1:]) // 4}" for key in keys} if situation == "groups" else None
    contrasts = []
    for i, side in enumerate(sides):
        roles = {key: side.index(key[0]) for key in keys if key[0] in side}
        coefficients = (1.0, *[-1 / (len(side) - 1)] * (len(side) - 1))
        pca = 1 if situation == "principal component of rows" and i == 0 else None
        contrasts.append(Contrast(roles, coefficients, texts, pca=pca))
    plan = design(contrasts, groups if grouped else None)
    alone = [design([contrast]) for contrast in contrasts] if apart else []
    scale = np.linspace(0.5, 2.0, D_MODEL)  # the rows vary more along some axes
    found = np.empty(replicates)
    for replicate in range(replicates):
        rows = rng.standard_normal((len(keys), D_MODEL)) * scale
        if texts:
            rows += np.tile(rng.standard_normal((PER_SIDE, D_MODEL)), (len(names), 1))
        if groups is not None:
            rows += np.repeat(rng.standard_normal((len(keys) // 4, D_MODEL)), 4, axis=0)
        for name in {side[0] for side in sides}:
            rows[place[name] * PER_SIDE : (place[name] + 1) * PER_SIDE, -1] += effect
        values = [rows] * len(sides)
        if situation == "same rows":  # read at another position
            values = [rows, 0.7 * rows + rng.standard_normal(rows.shape)]
        drawn_seed = (seed, replicate)
        if apart:
            shuffled = []
            for i, one in enumerate(alone):
                drawn_roles = np.full((DRAWS, len(keys)), -1)
                drawn_roles[:, [keys.index(key) for key in one.keys]] = one.shuffled(DRAWS, (*drawn_seed, i))[:, 0]
                shuffled.append(drawn_roles)
            roles_of = [np.stack(shuffled, axis=1)]
        else:
            roles_of = [plan.shuffled(DRAWS, drawn_seed)]
        observed, drawn = (
            _cosines(situation, [vectors(c, plan.keys, drawn_of[:, i], values[i]) for i, c in enumerate(contrasts)])
            for drawn_of in (plan.roles[None], *roles_of)
        )
        found[replicate] = two_sided(float(observed[0]), drawn)
    return found


def _cosines(situation: str, made: Sequence[Floats]) -> Floats:
    if situation == "difference":
        first, second = made[0] - made[1], made[0]
    elif situation == "orthogonalised":
        first = np.stack([orthogonalise(a, [b / np.linalg.norm(b)]) for a, b in zip(made[0], made[1], strict=True)])
        second = made[2]
    elif situation == "principal component of directions":
        first = np.stack(
            [components_of_directions(np.stack(v), True, 1, "")[0][0] for v in zip(*made[:3], strict=True)]
        )
        second = made[3]
    else:
        first, second = made
    cosines: Floats = np.sum(first * second, axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    return cosines


def pooled_p_values(
    replicates: int, seed: int, n: int = 24, pool: int = 4, spread: float = 0.0, rate: float = 0.2, effect: float = 0.0
) -> dict[str, Floats]:
    """Return p-values of one text a prompt against `pool` texts, [replicate], by test.

    Args:
        replicates, seed: how many, and of which draws.
        n: prompts; they differ in their rate.
        pool: random conditions, each with one text a prompt.
        spread: standard deviation of the conditions' own effects on the log-odds; the first is another such draw.
        rate: about which prompts' rates lie.
        effect: what the first has more, in log-odds.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"sign_flip": [], "within_prompt": [], "rank": []}
    for _ in range(replicates):
        logits = np.log(rate / (1 - rate)) + rng.standard_normal(n)
        own = spread * rng.standard_normal(1 + pool)
        own[0] += effect
        hits = rng.random((1 + pool, n)) < 1 / (1 + np.exp(-(logits[None] + own[:, None])))
        first, second = hits[0].astype(int), hits[1:].sum(axis=0)
        found["sign_flip"].append(sign_flip([int(a) * pool - int(b) for a, b in zip(first, second, strict=True)]))
        found["within_prompt"].append(compare(Counts(first.tolist(), 1), Counts(second.tolist(), pool)).p_exact)
        shares = hits.mean(axis=1)
        baseline = float((rng.random(n) < 1 / (1 + np.exp(-logits))).mean())
        found["rank"].append(rank_test(shares[0] - baseline, shares[1:] - baseline)[1])
    return {name: np.array(values) for name, values in found.items()}


def wilson_coverage(replicates: int, seed: int, n: int = 24, rate: float = 0.2) -> float:
    """Return how often Wilson's 95% interval of a rate holds it."""
    hits = np.random.default_rng(seed).binomial(n, rate, replicates)
    intervals = {k: wilson_interval(k, n) for k in set(hits.tolist())}
    return float(np.mean([intervals[k].low <= rate <= intervals[k].high for k in hits.tolist()]))


def newcombe_coverage(replicates: int, seed: int, n: int = 24) -> float:
    """Return how often Newcombe's 95% interval of a paired difference holds it (0.12: rates 0.72 and 0.6)."""
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(replicates):
        both, only = rng.random(n) < 0.6, rng.random(n) < 0.3
        interval = paired_difference((both | only).astype(float), both.astype(float))
        covered += interval.low <= 0.12 <= interval.high
    return covered / replicates


def false_discoveries(replicates: int, seed: int, true: int = 30, shifted: int = 10) -> float:
    """Return the mean share of true hypotheses among those that Benjamini and Hochberg reject at 5%."""
    from scipy.stats import norm

    rng = np.random.default_rng(seed)
    z = rng.standard_normal((replicates, true + shifted))
    z[:, true:] += 3
    shares = []
    for p in 2 * norm.sf(np.abs(z)):
        rejected = benjamini_hochberg(p) <= 0.05
        shares.append(rejected[:true].sum() / max(1, rejected.sum()))
    return float(np.mean(shares))


def below(p_values: Floats, level: float = 0.05) -> float:
    """Return the share of p-values that reject at a level."""
    return float(np.mean(p_values <= level))


def table(replicates: int) -> str:
    """Return the table of docs/statistics.md (Markdown)."""
    rows: list[tuple[str, str, str]] = []

    def add(what: str, nothing: float, effect: float | None = None) -> None:
        rows.append((what, f"{nothing:.1%}", "-" if effect is None else f"{effect:.0%}"))
        print(*rows[-1], sep=" | ", flush=True)

    for name in SITUATIONS:
        fewer = replicates // 4
        nothing, effect = cosine_p_values(name, replicates, 1), cosine_p_values(name, fewer, 2, effect=4)
        add(f"cosine, {name}", below(nothing), below(effect))
    singly = below(cosine_p_values("groups", replicates, 1, grouped=False))
    add("cosine, groups, rows exchanged singly", singly)
    for name in ("one side shared", "axis against a trait"):
        add(f"cosine, {name}, permuted apart (wrong)", below(cosine_p_values(name, replicates, 1, apart=True)))
    more = 4 * replicates
    pooled, moved = pooled_p_values(more, 3, rate=0.05), pooled_p_values(replicates, 4, effect=1.5, rate=0.05)
    for name, title in (("sign_flip", "sign flip (no longer used)"), ("within_prompt", "within_prompt")):
        add(f"1 text against 4 alike, 24 prompts, {title}", below(pooled[name]), below(moved[name]))
    spread = pooled_p_values(more, 5, pool=20, spread=1)
    far = pooled_p_values(replicates, 6, pool=20, spread=1, effect=4)
    for name, title in (("within_prompt", "within_prompt (wrong here)"), ("rank", "rank")):
        add(f"1 of 21 random conditions that differ, {title}", below(spread[name]), below(far[name]))
    add("Wilson interval misses, n = 24, rate 0.2", 1 - wilson_coverage(more, 7))
    add("Newcombe interval misses, n = 24", 1 - newcombe_coverage(more, 8))
    add("false discoveries, Benjamini-Hochberg, 30 of 40 true", false_discoveries(more, 9))
    lines = ["| situation | without an effect | with one |", "| --- | --: | --: |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    """Write the table between the markers of a document: ``python -m analysis.calibration FILE [REPLICATES]``."""
    file, replicates = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    text = file.read_text(encoding="utf-8")
    start, end = text.index(MARKERS[0]) + len(MARKERS[0]), text.index(MARKERS[1])
    made = table(replicates)
    file.write_text(f"{text[:start]}\n{made}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
