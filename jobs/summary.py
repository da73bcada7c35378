"""The short table that a run ends with: what each condition does to refusals, beside its control."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.statistics import bootstrap_mean_interval
from jobs.check_model import noise_floor
from jobs.context import Context
from jobs.effects import control_warnings, effect_warnings
from jobs.report_source import Record, Source, judge_of
from jobs.report_sql import OTHER_SCORES, RATES, TEXT_FACTS, quoted
from store.layers import resolve_layers
from store.sql import connect

WIDTH = 120  # characters of text where no terminal says how wide it is; the table may be wider
LOOK = (
    "What to look at: how far `refused` moves from the row without interventions, on the same prompts, and whether the "
    "control (\u2514) moves as far. Only what its control does not do is due to the direction itself."
)
LOOK_WITHOUT_CONTROLS = (
    "What to look at: how far `refused` moves from the row without interventions, on the same prompts. No condition "
    "here has a control (`control_of`), so the table cannot tell whether any other direction would do the same."
)
MONITORED = """
SELECT condition, prompt_set,
    list(projection ORDER BY generation_key) AS means, list(prompt_id ORDER BY generation_key) AS prompts
FROM (SELECT condition, prompt_set, prompt_id, generation_key, avg(projection) AS projection
    FROM monitored JOIN generations USING (generation_key)
    WHERE study = {study} AND model = {model} AND direction = {direction} AND layer = {layer} GROUP BY ALL)
GROUP BY ALL"""


def print_summary(context: Context) -> None:
    """Print refusal rates by condition with intervals, other scores, and the mean monitored projection."""
    study = context.study
    if study.replay is None:
        return
    terminal = Console().is_terminal
    console = Console(width=None if terminal else WIDTH, highlight=False)
    connection = connect(context.results.location)
    try:
        source = Source(connection, context.results.location, study.name, context.identity.fingerprint, study)
        shown = [record for record in source.ask(source.sql(RATES)) if record["prompt_set"] in study.replay.prompts]
        if not shown:
            return
        watched = _watched(context)
        controls = any(depth for _, depth in source.conditions)
        console.print(LOOK if controls else LOOK_WITHOUT_CONTROLS, markup=False)
        # A pipe or a file has no width that the columns would have to fit in.
        wide = console if terminal else Console(width=1000, highlight=False)
        wide.print(_table(source, shown, watched))
        console.print(noise_floor(context.results.location, context.identity.fingerprint), markup=False)
        about = (connection, study.name, context.identity.fingerprint)
        for warning in (*effect_warnings(*about), *control_warnings(*about)):
            console.print(f"warning: {warning}", markup=False)
    finally:
        connection.close()
    if watched is not None:
        console.print(
            f"h.{watched[0]} @{watched[1]}: mean projection of generated tokens on the unit direction "
            f"{watched[0]!r} at layer {watched[1]}, after the interventions there, with a 95% bootstrap interval over "
            "prompts",
            markup=False,
        )
    if study.description:
        console.print(study.description.strip(), markup=False)


def _table(source: Source, rates: Sequence[Record], watched: tuple[str, int] | None) -> Table:
    """Lay out one row a condition and prompt set, a block a refusal judge; other judges are columns."""
    depth = {record["condition"]: depth for record, depth in source.conditions}
    order = {name: i for i, name in enumerate(depth)}
    facts = _by_cell(source.ask(source.sql(TEXT_FACTS)))
    others = source.ask(source.sql(OTHER_SCORES))
    projections: dict[tuple[str, str], Record] = {}
    if watched is not None:
        asked = source.sql(MONITORED, direction=quoted(watched[0]), layer=str(watched[1]))
        projections = _by_cell(source.ask(asked))
    judges = {judge_of(record): record["judge"] for record in rates}
    named = judges if len(set(judges.values())) == len(judges) else {judge: judge for judge in judges}
    measured = dict.fromkeys((r["judge"], r["measures"]) for r in others if (r["condition"], r["prompt_set"]) in facts)
    table = Table(
        title=f"study {source.name}: refusals by condition (95% Wilson intervals)", title_justify="left", min_width=60
    )
    for name in ("condition", "prompts", *(["judge"] if len(judges) > 1 else [])):
        table.add_column(name, no_wrap=True)
    heads = ["refused", "rate", "95% interval", "degenerate", *(_head(*judge) for judge in measured), "tokens"]
    for name in [*heads, *([f"h.{watched[0]} @{watched[1]}"] if watched else [])]:
        table.add_column(escape(name), justify="right")
    scores = {(r["condition"], r["prompt_set"], r["judge"]): r for r in others}
    for judge in sorted(judges):
        mine = [record for record in rates if judge_of(record) == judge]
        for r in sorted(mine, key=lambda r: (order[r["condition"]], r["prompt_set"])):
            cell = (r["condition"], r["prompt_set"])
            fact = facts.get(cell, {})
            cells = ["\u2514 " * depth[r["condition"]] + r["condition"], r["prompt_set"]]
            cells += [named[judge] or "none"] if len(judges) > 1 else []
            cells += [f"{r['n_refused']}/{r['n_scored']}", _percent(r["rate"])]
            cells.append("-" if r["rate"] is None else f"{r['low']:.0%} to {r['high']:.0%}")
            cells.append(_percent(fact.get("degenerate")))
            cells += [_score(scores.get((*cell, name))) for name, _ in measured]
            cells.append(_number(fact.get("tokens"), 0))
            if watched is not None:
                cells.append(_mean(projections.get(cell)))
            table.add_row(*map(escape, cells))
        table.add_section()
    return table


def _by_cell(records: Sequence[Record]) -> dict[tuple[str, str], Record]:
    return {(record["condition"], record["prompt_set"]): record for record in records}


def _head(judge: str, measures: str) -> str:
    return judge if judge == measures else f"{judge} ({measures})"


def _score(record: Record | None) -> str:
    """A mean (or for unsafe content a share), and out of how many texts where some have no score."""
    if record is None or not record["n_scored"]:
        return "-"
    value = _percent(record["unsafe"]) if record["measures"] == "unsafe" else _number(record["mean"], 1)
    missing = record["n"] - record["n_scored"]
    return f"{value} ({missing} unscored)" if missing else value


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None, digits: int) -> str:
    # Adding 0.0 turns the -0.0 of a projection that was taken out into 0.0.
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _mean(record: Record | None) -> str:
    """A mean over texts, with its bootstrap interval over prompts."""
    if record is None:
        return "-"
    interval = bootstrap_mean_interval(record["means"], seed=0, groups=record["prompts"], resamples=2000)
    low, high = (_number(bound, 1) for bound in (interval.low, interval.high))
    return f"{_number(interval.estimate, 1)} [{low}, {high}]"


def _watched(context: Context) -> tuple[str, int] | None:
    """Return the first monitored direction and the last monitored layer."""
    replay = context.study.replay
    if replay is None or replay.monitor is None:
        return None
    layers = resolve_layers(replay.monitor.layers, context.identity.n_layers)
    return replay.monitor.directions[0], layers[-1]
