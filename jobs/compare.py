"""Stage 5, compare: the study's planned comparisons, from its scores. Small, and computed anew each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.comparisons import Counts, compare
from analysis.statistics import benjamini_hochberg, holm, rank_test
from jobs.context import Context, StageReport, table_of
from jobs.outcomes import Outcomes
from jobs.progress import Progress
from jobs.stage import main_for
from pipeline.cluster import Cluster
from store.fingerprint import fingerprint
from store.sql import connect
from store.study_checks import Side, controls_of, pairs
from store.study_expand import expand_conditions
from store.study_select import Comparison

_ASKED = """
SELECT condition, prompt_set, prompt_id, seed, model, list(generation_key) AS generations
FROM stored.asked LEFT JOIN stored.unique_generations USING (model, row_key, condition_key, decoding_key, seed)
WHERE study = $study AND model = $model GROUP BY ALL
"""
Texts = Mapping[tuple[str, str], Mapping[str, list[str | None]]]  # (condition, prompt set) -> prompt -> generations


@dataclass(frozen=True)
class Planned:
    """One comparison on one prompt set."""

    name: str
    spec: Comparison
    first: Side
    second: Side
    prompt_set: str
    among: tuple[str, ...] = ()  # the random conditions that the effect is ranked among


def planned(context: Context) -> list[Planned]:
    """Return every single comparison that the study plans."""
    study = context.study
    conditions = expand_conditions(study.replay) if study.replay else []
    return [
        Planned(name, spec, first, second, prompts, controls_of(spec, first, conditions))
        for name, spec in study.comparisons.items()
        for prompts in spec.prompts
        for first, second in pairs(spec, conditions)
    ]


def run(context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Compare what is scored, and write the table `comparisons`."""
    report = StageReport("compare", unit="comparisons")
    plan = planned(context)
    before = context.results.read("comparisons", filters=[("study", "=", context.study.name)])
    if not plan and not before.num_rows:
        return report
    model = context.recalled_model().fingerprint
    outcomes, texts = Outcomes(context), texts_of(context, model)
    records: list[dict[str, Any]] = []
    keys: list[str] = []
    families: dict[tuple[str, str], int] = {}
    for item in plan:
        judge = outcomes.refusal_judge(item.spec.judge, f"comparisons.{item.name}")
        families[item.spec.family, judge] = families.get((item.spec.family, judge), 0) + 1
        record = _record(context, item, judge, outcomes, texts)
        if isinstance(record, str):
            report.waiting.append(f"comparison {item.name!r}: {record}")
        else:
            records.append({**record, "model": model, "judge_version": outcomes.judges[judge]})
            keys.append(comparison_key(item, judge, outcomes, texts))
    for (family, judge), size in families.items():
        members = [record for record in records if (record["family"], record["judge"]) == (family, judge)]
        reported = [record["p_reported"] for record in members]
        whole = len(members) == size
        by_holm, by_bh = ([*f(reported)] if whole else [None] * len(members) for f in (holm, benjamini_hochberg))
        for record, p_holm, p_bh in zip(members, by_holm, by_bh, strict=True):
            record.update(n_family=size, p_holm=p_holm, p_bh=p_bh)
    table = table_of("comparisons", records)
    known = known_keys(context)
    same = before.equals(table)
    older = same and not known  # written before comparisons had keys
    report.cached = len(keys) if older else sum(key in known for key in keys)
    report.done = len(keys) - report.cached
    if not same or set(keys) != known:
        context.results.replace("comparisons", context.study.name, table, provenance={"keys": keys})
    return report


def known_keys(context: Context) -> set[str]:
    """Return the keys of the study's comparisons, as they were last written."""
    commit = context.results.current("comparisons", context.study.name)
    return set() if commit is None else set(commit.provenance.get("keys", ()))


def comparison_key(item: Planned, judge: str, outcomes: Outcomes, texts: Texts, predicted: bool = False) -> str:
    """Identify a comparison by all that it is computed from: rule, texts, and judges; with `predicted`, all scored."""
    groups = [item.first.members, item.second.members, item.among]
    sides = [[texts.get((name, item.prompt_set), {}) for name in members] for members in groups]
    keys = {key for side in sides for prompts in side for group in prompts.values() for key in group}
    lacking = [key or "" for key in keys if key is None or outcomes.of(key, item.spec.outcome, judge) is None]
    measures = outcomes.measures
    return fingerprint(
        {
            "name": item.name,
            "family": item.spec.family,
            "outcome": item.spec.outcome,
            "sides": [item.first.name, item.second.name],
            "prompt_set": item.prompt_set,
            "judges": {
                name: version
                for name, version in outcomes.judges.items()
                if name == judge or measures[name] == "degenerate"
            },
            "judge": judge,
            "texts": [
                [{prompt: sorted(key or "" for key in group) for prompt, group in one.items()} for one in side]
                for side in sides
            ],
            "lacking": [] if predicted else sorted(lacking),
        }
    )


def texts_of(context: Context, model: str) -> Texts:
    """Return which texts each condition has to each prompt, as the last replay asked for them."""
    connection = connect(context.results.location)
    try:
        table = connection.sql(_ASKED, params={"study": context.study.name, "model": model}).to_arrow_table()
    finally:
        connection.close()
    found: dict[tuple[str, str], dict[str, list[str | None]]] = {}
    for record in table.to_pylist():
        prompts = found.setdefault((record["condition"], record["prompt_set"]), {})
        # A text that does not exist yet is None: it makes its prompt incomplete.
        prompts.setdefault(record["prompt_id"], []).extend(record["generations"] or [None])
    return found


def _record(context: Context, item: Planned, judge: str, outcomes: Outcomes, texts: Texts) -> dict[str, Any] | str:
    """Return one comparison as a record, or what it waits for."""
    asked = [prompt.id for prompt in context.prompt_sets[item.prompt_set].prompts]
    sides = []
    for side in (item.first, item.second, *(Side(name, (name,), {}) for name in item.among)):
        absent = [name for name in side.members if (name, item.prompt_set) not in texts]
        if absent:
            return f"condition {absent[0]!r} is not replayed on {item.prompt_set!r} yet"
        sides.append({prompt: _hits(item, side, prompt, judge, outcomes, texts) for prompt in asked})
    both = [prompt for prompt in asked if all(side[prompt] is not None for side in sides)]
    if not both:
        return f"no text of {item.first.name!r} and {item.second.name!r} on {item.prompt_set!r} is scored yet"
    counts = []
    for found in sides:
        hits = [value for prompt in both if (value := found[prompt]) is not None]
        counts.append(Counts([sum(value) for value in hits], len(hits[0])))
    result = compare(*counts[:2])
    ranked: dict[str, Any] = {"reported": "paired", "p_reported": result.p_exact}
    if item.among:
        first, second, *controls = (float(side.shares.mean()) for side in counts)
        as_far, p_rank = rank_test(first - second, [control - second for control in controls])
        ranked = {"reported": "rank", "p_reported": p_rank, "p_rank": p_rank, "n_as_far": as_far}
        ranked |= {"among": item.spec.among, "n_among": len(controls)}
    record: dict[str, Any] = {
        "study": context.study.name,
        "comparison": item.name,
        "family": item.spec.family,
        "first": item.first.name,
        "second": item.second.name,
        "prompt_set": item.prompt_set,
        "outcome": item.spec.outcome,
        "judge": judge,
        "n_prompts": len(asked),
        "n_pairs": len(both),
        "n_left_out": len(asked) - len(both),
        "first_repeats": counts[0].repeats,
        "second_repeats": counts[1].repeats,
        "difference": result.difference.estimate,
        "low": result.difference.low,
        "high": result.difference.high,
        "only_first": result.only_first,
        "only_second": result.only_second,
        "test": result.test,
        "p_exact": result.p_exact,
        "p_corrected": result.p_corrected,
        **ranked,
    }
    for key, interval in (("first", result.first), ("second", result.second)):
        record |= {f"{key}_rate": interval.estimate, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return record


def _hits(item: Planned, side: Side, prompt: str, judge: str, outcomes: Outcomes, texts: Texts) -> list[bool] | None:
    """Return whether each of a prompt's texts has the outcome; None if one is not there or not scored."""
    hits = []
    for name in side.members:
        for key in texts[name, item.prompt_set].get(prompt, [None]):
            value = None if key is None else outcomes.of(key, item.spec.outcome, judge)
            if value is None:
                return None
            hits.append(value)
    return hits


if __name__ == "__main__":
    main_for("compare")
