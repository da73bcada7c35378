"""The short table that a study ends with, and what to try next."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.context import Context
from store.sql import connect

_RATES = """
SELECT base_condition, coefficient, condition, prompt_set, n_scored, n_refused, rate, low, high, tokens, degenerate
FROM refusal_rates
JOIN (SELECT condition, prompt_set, avg(n_tokens) AS tokens FROM generations WHERE study = $study GROUP BY ALL)
    USING (condition, prompt_set)
LEFT JOIN (
    SELECT condition, prompt_set, avg(degenerate::INT) AS degenerate FROM labels WHERE study = $study GROUP BY ALL)
    USING (condition, prompt_set)
WHERE study = $study AND model = $model AND prompt_set IN (SELECT unnest($sets))
"""
_MONITORED = """
SELECT condition, prompt_set, avg(projection) AS projection
FROM monitored JOIN generations USING (generation_key)
WHERE study = $study AND direction = $direction AND layer = $layer GROUP BY ALL
"""


def print_summary(context: Context) -> None:
    """Print refusal rates per condition with intervals, and the mean monitored projection, for the replayed prompts."""
    study = context.study
    if study.replay is None:
        return
    console = Console(width=None if Console().is_terminal else 120)
    connection = connect(context.results.location)
    try:
        model = context.identity.fingerprint
        parameters = {"study": study.name, "model": model, "sets": list(study.replay.prompts)}
        rates = connection.execute(_RATES, parameters).fetchall()
        monitored: dict[tuple[str, str], float] = {}
        watched = _watched(context)
        if watched is not None:
            answer = connection.execute(_MONITORED, {"study": study.name, "direction": watched[0], "layer": watched[1]})
            monitored = {(condition, name): value for condition, name, value in answer.fetchall()}
    finally:
        connection.close()
    order = list(study.replay.conditions)
    rates.sort(key=lambda row: (order.index(row[0].partition("[")[0]), row[0], row[1] or 0.0, row[3]))
    table = Table(title=f"study {study.name}: refusals by condition (95% Wilson intervals)", title_justify="left")
    for name in ("condition", "prompts"):
        table.add_column(name, no_wrap=True)
    heads = ["refused", "rate", "95% interval", "degenerate", "tokens"]
    if watched is not None:
        heads.append(f"h.{watched[0]} @{watched[1]}")
    for name in heads:
        table.add_column(name, justify="right")
    for _, _, condition, prompt_set, n, k, rate, low, high, tokens, degenerate in rates:
        cells = [escape(condition), escape(prompt_set), f"{k}/{n}"]
        cells += ["-", "-"] if rate is None else [f"{rate:.0%}", f"{low:.0%} to {high:.0%}"]
        cells += ["-" if degenerate is None else f"{degenerate:.0%}", f"{tokens:.0f}"]
        if watched is not None:
            value = monitored.get((condition, prompt_set))
            # Adding 0.0 turns the -0.0 of a projection that was taken out into 0.0.
            cells.append("-" if value is None else f"{round(value, 1) + 0.0:.1f}")
        table.add_row(*cells)
    console.print(table)
    if watched is not None:
        console.print(
            f"h.{watched[0]} @{watched[1]}: mean projection of generated tokens on the unit direction "
            f"{watched[0]!r} at layer {watched[1]}, after the interventions there",
            highlight=False,
        )
    if study.description:
        console.print(study.description.strip(), markup=False, highlight=False)


def _watched(context: Context) -> tuple[str, int] | None:
    """Return the first monitored direction and the last monitored layer."""
    from store.layers import resolve_layers

    replay = context.study.replay
    if replay is None or replay.monitor is None:
        return None
    layers = resolve_layers(replay.monitor.layers, context.identity.n_layers)
    return replay.monitor.directions[0], layers[-1]
