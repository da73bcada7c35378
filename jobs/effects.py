"""Warnings about where interventions act: a projection at all tokens may act through a single one."""

from __future__ import annotations

from itertools import groupby

import duckdb

from jobs.report_sql import quoted
from store.sql import query

# Share of an intervention's squared change that one token may hold without a warning.
MOST = 0.5
EFFECTS = """\
SELECT condition, intervention, kind, component, layer, count(*) AS texts, avg(largest_share) AS share,
    mode(largest_token) AS token, avg(max_relative) AS relative
FROM intervention_effects JOIN generations USING (generation_key)
WHERE study = {study} AND model = {model} AND intervention_effects.n_tokens > 1 AND largest_share IS NOT NULL
GROUP BY ALL HAVING avg(largest_share) > {most} ORDER BY condition, kind, component, layer, intervention"""


# Share of the squared change of what a control stands for that it makes itself without a warning.
LEAST = 0.5
CONTROLS = """\
WITH changes AS (
    SELECT condition, base_condition, control_of, kind, sum(change) / count(DISTINCT generation_key) AS change
    FROM intervention_effects JOIN generations USING (generation_key)
    WHERE study = {study} AND model = {model} GROUP BY ALL
)
SELECT control.base_condition AS condition, control.control_of, kind,
    avg(control.change) / avg(controlled.change) AS share
FROM changes AS control JOIN changes AS controlled USING (kind)
WHERE control.control_of IN (controlled.condition, controlled.base_condition)
GROUP BY ALL HAVING share < {least} ORDER BY ALL"""  # what `each` or a sweep expands into counts together


def effect_warnings(connection: duckdb.DuckDBPyConnection, study: str, model: str) -> list[str]:
    """Return a warning for each condition and kind of intervention that acts mostly on one token.

    Named are interventions with, on average over texts, more than half of their squared change in a single token of
    several that they act on. Texts that an earlier version generated have no record, and give no warning.
    """
    asked = EFFECTS.format(study=quoted(study), model=quoted(model), most=MOST)
    records = query(connection, asked).to_pylist()
    warnings = []
    for (condition, kind), group in groupby(records, key=lambda record: (record["condition"], record["kind"])):
        members = list(group)
        sites = [f"{record['component']}.{record['layer']}" for record in members]
        where = sites[0] if len(sites) == 1 else f"{sites[0]} to {sites[-1]} ({len(sites)} sites)"
        share = min(record["share"] for record in members)
        tokens = sorted({record["token"] for record in members})
        token = f"token {tokens[0]}" if len(tokens) == 1 else f"tokens {', '.join(map(str, tokens))}"
        warnings.append(
            f"{condition}: {kind} at {where} acts mostly on one token: {'at least ' if len(sites) > 1 else ''}"
            f"{share:.0%} of its squared change sits in {token}. Compare it with tokens: all_but_sink"
        )
    return warnings


def control_warnings(connection: duckdb.DuckDBPyConnection, study: str, model: str) -> list[str]:
    """Return a warning for each control that changes the stream far less than what it controls.

    Compared is the squared change summed over the tokens of a text, its mean over texts, for each kind of intervention.
    A random direction that is projected out usually takes next to nothing away: that the texts stay as they are then
    says nothing about the direction it stands beside.
    """
    asked = CONTROLS.format(study=quoted(study), model=quoted(model), least=LEAST)
    return [
        f"{record['condition']}: its {record['kind']} changes the stream {record['share']:.2g} times as much (squared) "
        f"as that of {record['control_of']}. It is too weak to be a control of it"
        for record in query(connection, asked).to_pylist()
    ]
