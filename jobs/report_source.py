"""What a report is made from: one study and one model of the results, open for questions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import duckdb

from jobs.report_sql import CONDITIONS, DIRECTIONS, quoted
from store.errors import MismatchError, MissingDataError, StudyError
from store.location import Location
from store.sql import query
from store.study import Study

Record = dict[str, Any]


@dataclass
class Source:
    """The results of one study and model, open for questions."""

    connection: duckdb.DuckDBPyConnection
    results: Location
    name: str
    model: str
    study: Study | None = None

    def sql(self, template: str, **more: str) -> str:
        """Return a query with its values written in, so that it runs again as it stands."""
        return template.format(study=quoted(self.name), model=quoted(self.model), **more)

    def ask(self, sql: str) -> list[Record]:
        records: list[Record] = query(self.connection, sql).to_pylist()
        return records

    def remedy(self, stage: str) -> str:
        return f"resid {stage} --study {self.study.file if self.study else 'FILE'}"

    @cached_property
    def conditions(self) -> list[tuple[Record, int]]:
        """(condition, depth) in the study's order, each control below what it controls and one deeper."""
        return with_controls(self.ask(self.sql(CONDITIONS)))

    @cached_property
    def directions(self) -> list[Record]:
        return self.ask(self.sql(DIRECTIONS))

    @cached_property
    def styles(self) -> dict[str, tuple[int, bool]]:
        """Condition -> (style, drawn as a control): a control has the colour of what it controls, if that is free."""
        styles: dict[str, tuple[int, bool]] = {}
        plain = [record["condition"] for record, depth in self.conditions if depth == 0]
        styles.update({condition: (i, False) for i, condition in enumerate(plain)})
        latest: dict[str, int] = {}
        for record, depth in self.conditions:
            name = record["condition"]
            if depth:
                wanted = latest.get(record["control_of"], 0)
                taken = {style for style, control in styles.values() if control}
                styles[name] = (next(i for i in (wanted, *range(len(taken) + 1)) if i not in taken), True)
            latest[name] = latest[record["base_condition"]] = styles[name][0]
        return styles


def with_controls(conditions: Sequence[Record]) -> list[tuple[Record, int]]:
    """Order conditions so that controls (``control_of`` names a condition, or one before its sweep) follow theirs."""
    placed: list[tuple[Record, int]] = []
    seen: set[str] = set()

    def put(records: Iterable[Record], depth: int) -> None:
        for base, group in groupby(records, key=lambda record: record["base_condition"]):
            members = [record for record in group if record["condition"] not in seen]
            for record in members:
                seen.add(record["condition"])
                placed.append((record, depth))
                if record["condition"] != base:
                    put([other for other in conditions if other["control_of"] == record["condition"]], depth + 1)
            if members:
                put([other for other in conditions if other["control_of"] == base], depth + 1)

    known = {record[key] for record in conditions for key in ("condition", "base_condition")}
    put([record for record in conditions if record["control_of"] not in known], 0)
    put(conditions, 0)  # controls of each other, of which none is the first
    return placed


def _found(connection: duckdb.DuckDBPyConnection, column: str, where: str) -> list[str]:
    """Return the distinct values of ``study`` or ``model`` in everything that studies write under their names."""
    parts = [f"SELECT {column} FROM {view} {where}" for view in ("memberships", "directions", "cosines", "conditions")]
    records = query(connection, f"SELECT DISTINCT {column} FROM ({' UNION ALL '.join(parts)}) ORDER BY 1").to_pylist()
    return [str(record[column]) for record in records]


def named_study(connection: duckdb.DuckDBPyConnection, results: Location, asked: str | None) -> str:
    """Return the study asked for, or the only one there is; its name can be a file's."""
    known = _found(connection, "study", "")
    name = known[0] if asked is None and len(known) == 1 else asked
    if name is not None and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        return name
    if name is not None:
        raise StudyError(f"{name!r} cannot name a study", key="--study-name", remedy="use letters, digits, . _ -")
    raise MissingDataError(
        f"{results} holds {', '.join(known) or 'no study'}\n  remedy: name one with --study FILE or --study-name NAME"
    )


def noted_model(results: Location, study: str) -> str | None:
    """Return the fingerprint that the study's stages noted when they last loaded its model."""
    note = results / "studies" / f"{study}.json"
    return str(json.loads(note.read_bytes())["identity"]["fingerprint"]) if note.exists() else None


def chosen_model(
    connection: duckdb.DuckDBPyConnection, results: Location, study: str, asked: str | None, file: Study | None
) -> str:
    """Return the fingerprint of the model to report on: the one asked for, the study's present one, or the only one."""
    models = _found(connection, "model", f"WHERE study = {quoted(study)}")
    if not models:
        known = ", ".join(_found(connection, "study", "")) or "none"
        remedy = f"resid run --study {file.file if file else 'FILE'}, or name the right place with --results"
        raise MissingDataError(
            f"{results} holds nothing of study {study!r} (studies there: {known})\n  remedy: {remedy}"
        )
    if asked is None and len(models) > 1:
        asked = noted_model(results, study)
    matching = [model for model in models if asked is None or model.startswith(asked)]
    if len(matching) != 1:
        wanted = "none is chosen" if asked is None else f"{len(matching)} begin with {asked!r}"
        raise MismatchError(
            f"study {study!r} has results of the models {', '.join(models)}, and {wanted}\n"
            "  remedy: name one with --model and the beginning of its fingerprint"
        )
    return matching[0]


def judge_of(record: Record) -> str:
    return f"{record['judge']} {record['judge_version']}" if record["judge"] else "none"


def as_percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def as_number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
