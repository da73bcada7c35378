"""``resid reproduce``: claim by claim, what a paper says and what the study's results show, written into a document.

Only what stands between two markers of a claim is written; the prose around it is kept. So no number is typed by hand,
and the same command brings the document up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import duckdb

from jobs.check_model import noise_floor
from jobs.context import Context
from jobs.effects import effect_warnings
from jobs.stage import add_study_arguments, study_from
from store.errors import QueryError, StudyError
from store.sql import connect, query
from store.study_select import Claim
from store.yaml_file import where

BLOCK = re.compile(r"<!-- resid: ([\w.+-]+) -->\n(.*?)<!-- resid: end -->", re.DOTALL)
OVERVIEW = "overview"
MOST_ROWS = 60  # of a query's table
_COMPARISONS = """
SELECT comparison, first, second, prompt_set, outcome, n_pairs, n_left_out, first_rate, first_low, first_high,
    second_rate, second_low, second_high, difference, low, high, test, p_exact, p_rank, n_among, n_as_far, reported,
    p_reported, p_holm, p_bh, n_family
FROM comparisons WHERE study = $study AND comparison IN ($names)
"""
_CHOICES = """
SELECT choice, status, chosen, condition, n_prompts, n_tied, against_rate, against_low, against_high, rate, low, high
FROM choices LEFT JOIN (FROM choice_candidates WHERE is_chosen) USING (study, choice, choice_key, condition)
WHERE study = $study ORDER BY choice
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``resid reproduce``."""
    add_study_arguments(parser)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="a Markdown file; its claims' blocks are renewed"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write or renew a document and say what each claim came to."""
    study = study_from(arguments)
    context = Context(study)
    file = Path(arguments.output)
    command = f"resid reproduce --study {shlex.quote(arguments.study)} --output {shlex.quote(arguments.output)}"
    blocks, verdicts = document_blocks(context, command)
    before = file.read_text(encoding="utf-8") if file.exists() else None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(renewed(before, blocks, study.name, str(file)), encoding="utf-8")
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    return 0


def document_blocks(context: Context, command: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return what each block says, and each claim's verdict, by name.

    Raises:
        StudyError: if the study claims nothing, or a claim's SQL does not run.
    """
    study = context.study
    if not study.claims:
        raise StudyError("the study claims nothing", file=str(study.file), key="claims", remedy="add `claims:`")
    connection = connect(context.results.location)
    try:
        verdicts = {name: _verdict(connection, context, name, claim) for name, claim in study.claims.items()}
        blocks = {OVERVIEW: _overview(connection, context, command, verdicts)}
        for name, claim in study.claims.items():
            blocks[name] = _claim(connection, context, name, claim, verdicts[name])
    finally:
        connection.close()
    return blocks, verdicts


def renewed(before: str | None, blocks: dict[str, str], title: str, file: str) -> str:
    """Return a document with its blocks renewed, and those that it lacks at its end.

    Raises:
        StudyError: if it holds a block that the study has no claim for.
    """
    text = f"# Reproduction: {title}\n" if before is None else before
    there = {match[1] for match in BLOCK.finditer(text)}
    for name in sorted(there - set(blocks)):
        raise StudyError(f"there is no claim {name!r}", file=file, remedy="remove its block, or name another document")
    text = BLOCK.sub(lambda match: _wrapped(match[1], blocks[match[1]]), text)
    for name, block in blocks.items():
        if name not in there:
            text = f"{text.rstrip()}\n\n## {name.replace('_', ' ').capitalize()}\n\n{_wrapped(name, block)}\n"
    return text


def _wrapped(name: str, block: str) -> str:
    return f"<!-- resid: {name} -->\n{block.strip()}\n<!-- resid: end -->"


def _ask(
    connection: duckdb.DuckDBPyConnection, context: Context, sql: str, key: str | None = None
) -> list[dict[str, Any]]:
    # A study's name holds letters, digits and _ . - only.
    text = sql.replace("$study", f"'{context.study.name}'")
    try:
        records: list[dict[str, Any]] = query(connection, text).to_pylist()
        return records
    except QueryError as error:
        if key is None:
            raise
        file = where(context.study.file, key)
        raise StudyError(f"its SQL does not run: {error}", file=file, key=key, remedy="try it with resid sql") from None


def _rows(connection: duckdb.DuckDBPyConnection, context: Context, names: Sequence[str]) -> list[dict[str, Any]]:
    quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names)
    rows = _ask(connection, context, _COMPARISONS.replace("$names", quoted))
    order = {name: place for place, name in enumerate(names)}
    return sorted(rows, key=lambda row: order[row["comparison"]])


def _verdict(connection: duckdb.DuckDBPyConnection, context: Context, name: str, claim: Claim) -> str:
    from jobs.compare import planned

    wanted = set(claim.comparisons or [])
    missing = sum(item.name in wanted for item in planned(context)) - len(
        _rows(connection, context, sorted(wanted) or [""])
    )
    if missing:
        return f"not decided: {missing} of its comparisons are not made yet"
    key = f"claims.{name}.shown"
    records = _ask(connection, context, claim.shown, key)
    values = [value for record in records for value in record.values()]
    if len(values) != 1 or not isinstance(values[0], bool | None):
        problem = f"the rule gives {len(values)} values, and must give one boolean"
        raise StudyError(problem, file=where(context.study.file, key), key=key, remedy="SELECT bool_and(...)")
    return {True: "shown", False: "not shown", None: "not decided: what the rule asks for is not there"}[values[0]]


def _overview(connection: duckdb.DuckDBPyConnection, context: Context, command: str, verdicts: dict[str, str]) -> str:
    study = context.study
    models = _ask(
        connection,
        context,
        "SELECT source, adapter, dtype, n_layers, d_model, model FROM models "
        "WHERE model IN (SELECT model FROM conditions WHERE study = $study)",
    )
    lines = [
        f"Written by `{command}`; every number below comes from the study's results.",
        "",
        study.description.strip(),
        "",
    ]
    lines += [
        f"\nModel: {m['source']}{' with ' + Path(m['adapter']).name if m['adapter'] else ''}, {m['dtype']}, "
        f"{m['n_layers']} blocks, d_model {m['d_model']}, fingerprint {m['model'][:16]}."
        for m in models
    ]
    choices = _ask(connection, context, _CHOICES)
    if choices:
        lines += ["", "Chosen beforehand, on prompts that nothing below is reported on:", ""]
        lines += _table(
            ["choice", "status", "chosen", "candidate", "prompts", "tied", "rate", "rate under `against`"],
            [
                [
                    c["choice"],
                    c["status"],
                    ", ".join(f"{key} {value}" for key, value in json.loads(c["chosen"]).items()),
                    c["condition"] or "-",
                    c["n_prompts"],
                    c["n_tied"],
                    _interval(c["rate"], c["low"], c["high"]),
                    _interval(c["against_rate"], c["against_low"], c["against_high"]),
                ]
                for c in choices
            ],
        )
    if warnings := effect_warnings(connection, study.name, context.identity.fingerprint):
        lines += ["", "Warnings:", "", *(f"- {warning}." for warning in warnings)]
    lines += ["", *_table(["claim", "verdict"], [[name, verdict] for name, verdict in verdicts.items()])]
    return "\n".join(lines)


def _claim(connection: duckdb.DuckDBPyConnection, context: Context, name: str, claim: Claim, verdict: str) -> str:
    lines = [f"**The paper.** {claim.paper.strip()}", "", f"**Rule, stated beforehand.** {claim.rule.strip()}"]
    if claim.comparisons:
        lines.append("")
        rows = _rows(connection, context, claim.comparisons)
        head = [
            "first",
            "second",
            "prompts",
            "outcome",
            "pairs",
            "first rate",
            "second rate",
            "difference",
            "paired p (test)",
            "rank p",
            "reported p, Holm",
            "BH",
        ]
        lines += _table(head, [_cells(row) for row in rows]) if rows else ["(No comparison is made yet.)"]
        left = sum(row["n_left_out"] for row in rows)
        lines += [
            "",
            "Brackets: 95% intervals (Wilson; of the paired difference Newcombe's). Holm and BH (Benjamini and "
            "Hochberg) correct, within the family, the rank's p where there is one and else the paired test's."
            + f" {left} pairs left out."
            * bool(left),
            "",
            noise_floor(context.results.location, context.identity.fingerprint),
        ]
    if claim.query is not None:
        records = _ask(connection, context, claim.query, f"claims.{name}.query")
        lines += ["", "```sql", claim.query.strip(), "```", ""]
        lines += (
            _table(list(records[0]), [[_cell(v) for v in r.values()] for r in records[:MOST_ROWS]])
            if records
            else ["(No rows.)"]
        )
        lines += [f"({len(records) - MOST_ROWS} more rows.)"] if len(records) > MOST_ROWS else []
    lines += ["", "```sql", claim.shown.strip(), "```", "", f"**Verdict: {verdict}.**"]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[object]:
    rates = [
        f"{_percent(row[f'{s}_rate'])} [{_percent(row[f'{s}_low'])}, {_percent(row[f'{s}_high'])}]"
        for s in ("first", "second")
    ]
    difference = f"{100 * row['difference']:+.0f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}] points"
    rank = "-" if row["p_rank"] is None else f"{_p(row['p_rank'])} ({row['n_as_far']} of {row['n_among']} as far)"
    corrected = ["-" if row[key] is None else _p(row[key]) for key in ("p_holm", "p_bh")]
    names = [row["first"], row["second"], row["prompt_set"], row["outcome"], row["n_pairs"]]
    return [*names, *rates, difference, f"{_p(row['p_exact'])} ({row['test']})", rank, *corrected]


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _interval(rate: float | None, low: float | None, high: float | None) -> str:
    return _percent(rate) if low is None else f"{_percent(rate)} [{_percent(low)}, {_percent(high)}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _cell(value: object) -> object:
    return f"{value:.3f}" if isinstance(value, float) else "-" if value is None else value


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return lines + [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
