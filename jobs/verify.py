"""``resid verify``: every committed byte of a store and its results against the checksums that were kept."""

from __future__ import annotations

import argparse
import os

from jobs.context import data_location
from store.activations import ActivationStore
from store.errors import DamageError, MissingDataError
from store.results import ResultStore
from store.study import Study
from store.study_file import load_study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", metavar="FILE", help="check what this study uses")
    parser.add_argument("--store", metavar="URL", help="activation store")
    parser.add_argument("--results", metavar="URL", help="result tables")
    parser.add_argument(
        "--repair", action="store_true", help="un-commit damaged activation blocks: the next capture redoes just these"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check and report.

    Raises:
        DamageError: if anything is damaged.
        MissingDataError: if there is nothing to check.
    """
    study = load_study(arguments.study) if arguments.study else None
    store = ActivationStore.open(data_location(place("store", arguments.store, study), "store"))
    results = ResultStore(data_location(place("results", arguments.results, study), "results"))
    empty = [] if store.models() else [str(store.location)]
    empty += [] if holds_results(results) else [str(results.location)]
    if len(empty) == 2:
        raise MissingDataError(
            f"{empty[0]} and {empty[1]} are empty: there is nothing to check\n"
            "  remedy: resid run --study <study>, or name other places with --store and --results"
        )
    lines, blocks = [], 0
    for model in store.models():
        blocks += sum(len(generation.committed()) for generation in model.generations())
        lines += model.verify(repair=arguments.repair)
    findings = results.verify()
    files = sum(len(results.commits(table)) for table in {finding.table for finding in findings} | set(_tables()))
    lines += [f"{item.table}/{item.file}: {item.kind}: {item.detail}" for item in findings if item.is_damage]
    leftovers = sum(not item.is_damage for item in findings)
    print(f"checked {blocks} activation blocks in {store.location} and {files} result files in {results.location}")
    if leftovers:
        print(f"{leftovers} replaced or unfinished result files, which nothing reads: resid results gc lists them")
    if empty:
        print(f"{empty[0]} is empty")
    if lines:
        done = "un-committed the damaged activation blocks" if arguments.repair else "remedy: resid verify --repair"
        raise DamageError("damage:\n  " + "\n  ".join(lines) + f"\n  {done}, then run the study again")
    print("all of it is whole")
    return 0


def place(what: str, given: str | None, study: Study | None) -> str:
    """Return a location: from the option, else the study, else RESID_STORE or RESID_RESULTS, else the default."""
    if given:
        return given
    if study is not None:
        return str(getattr(study, what))
    default = Study.model_fields[what].default
    return os.environ.get(f"RESID_{what.upper()}") or str(default)


def _holds(results: ResultStore) -> bool:
    return any((results.location / table).list() for table in _tables())


def holds_results(results: ResultStore) -> bool:
    """Tell whether a place holds any file of a result table."""
    return any((results.location / table).list() for table in _tables())


def _tables() -> list[str]:
    from store.schemas import TABLES

    return list(TABLES)
