"""``resid results``: what the result tables hold, whether they are whole, and what nothing shows any more."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.context import data_location
from jobs.store import _seconds
from jobs.verify import holds_results, place
from store.errors import DamageError, MissingDataError
from store.results import Commit, ResultStore
from store.results_collect import Unused, find_unused, remove_unused
from store.schemas import TABLES
from store.sizes import spell_bytes
from store.study_file import load_study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    commands = parser.add_subparsers(dest="results_command", required=True, metavar="command")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--results", metavar="URL", help="a folder or an fsspec URL (default: RESID_RESULTS)")
        command.add_argument("--study", metavar="FILE", help="use the results of this study")
        return command

    listing = add("ls", "list tables, and what each study asked for")
    listing.add_argument("--format", choices=("table", "json"), default="table")
    add("verify", "compare every committed byte with its checksum; exit 1 if anything is damaged")
    collect = add("gc", "list files that nothing shows; remove those of killed writers and replaced ones with --delete")
    collect.add_argument("--delete", action="store_true", help="remove what is listed")
    collect.add_argument(
        "--superseded",
        action="store_true",
        help="also what no study here asks for any more: reverting an edit would have to make it again",
    )
    collect.add_argument(
        "--min-age", metavar="AGE", type=_seconds, help="only what is older: 30m, 2d (default 1h; 1d on object storage)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run a sub-command.

    Raises:
        MissingDataError: if there are no results.
        ResidError: as the sub-commands do.
    """
    study = load_study(arguments.study) if arguments.study else None
    results = ResultStore(data_location(place("results", arguments.results, study), "results"))
    if not holds_results(results):
        raise MissingDataError(
            f"{results.location} holds no results\n  remedy: resid run --study <study>, or name another --results"
        )
    handlers = {"ls": _ls, "verify": _verify, "gc": _gc}
    return handlers[arguments.results_command](results, arguments)


# -- ls --------------------------------------------------------------------------------------------------------------


def _ls(results: ResultStore, arguments: argparse.Namespace) -> int:
    tables = {table: commits for table in TABLES if (commits := results.commits(table))}
    studies = _studies(results)
    if arguments.format == "json":
        listed = {
            table: {"files": len(commits), "rows": _rows(commits), "bytes": _size(commits)}
            for table, commits in tables.items()
        }
        print(json.dumps({"tables": listed, "studies": studies}, indent=1))
        return 0
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"{results.location}: {spell_bytes(sum(map(_size, tables.values())))}", highlight=False)
    shown = Table(title="tables", title_justify="left")
    shown.add_column("table")
    for name in ("files", "rows", "size"):
        shown.add_column(name, justify="right")
    for table, commits in tables.items():
        shown.add_row(table, f"{len(commits):,}", f"{_rows(commits):,}", spell_bytes(_size(commits)))
    console.print(shown)
    shown = Table(title="studies", title_justify="left")
    shown.add_column("study")
    for name in ("prompt sets", "directions", "conditions", "texts asked for"):
        shown.add_column(name, justify="right")
    for study, counts in studies.items():
        shown.add_row(escape(study), *(f"{count:,}" for count in counts.values()))
    console.print(shown)
    return 0


def _studies(results: ResultStore) -> dict[str, dict[str, int]]:
    """Return how many prompt sets, directions, conditions and texts each study has here."""
    distinct = {
        "prompt_sets": ("memberships", ["study", "prompt_set"]),
        "directions": ("directions", ["study", "direction"]),
        "conditions": ("conditions", ["study", "condition"]),
        "texts": ("replay_rows", ["study", "condition_key", "decoding_key", "row_key", "seed"]),
    }
    counts: dict[str, dict[str, int]] = {}
    for name, (table, columns) in distinct.items():
        rows = results.read(table, columns=columns).group_by(columns).aggregate([])
        for study in rows.column("study").to_pylist():
            counts.setdefault(study, dict.fromkeys(distinct, 0))[name] += 1
    return dict(sorted(counts.items()))


def _rows(commits: list[Commit]) -> int:
    return sum(commit.rows for commit in commits)


def _size(commits: list[Commit]) -> int:
    return sum(commit.size for commit in commits)


# -- verify ----------------------------------------------------------------------------------------------------------


def _verify(results: ResultStore, arguments: argparse.Namespace) -> int:
    findings = results.verify()
    damaged = [f"{item.table}/{item.file}: {item.kind}: {item.detail}" for item in findings if item.is_damage]
    files = sum(
        len((results.location / table / folder).list()) for table in TABLES for folder in ("_commits", "_current")
    )
    print(f"checked every byte of {files} result files in {results.location}")
    leftovers = len(findings) - len(damaged)
    if leftovers:
        print(f"{leftovers} replaced or unfinished files, which nothing reads: resid results gc lists them")
    if damaged:
        raise DamageError(
            f"{len(damaged)} damaged:\n  "
            + "\n  ".join(damaged)
            + "\n  remedy: remove the record of each (the .json of its name in _commits or _current), then run the "
            "study again"
        )
    print("all of it is whole")
    return 0


# -- gc --------------------------------------------------------------------------------------------------------------


def _gc(results: ResultStore, arguments: argparse.Namespace) -> int:
    every = find_unused(results, arguments.min_age)
    superseded = [item for item in every if item.kind == "superseded"]
    chosen = [item for item in every if arguments.superseded or item.kind != "superseded"]
    left: list[Unused] = []
    if arguments.delete:
        results.location.require_first_wins()  # what is committed in the moment of its removal is put back
        chosen, left = remove_unused(results, chosen)
    for item in chosen:
        print(f"{item.place}  {spell_bytes(item.size)}  {item.why}")
    if left:
        print(f"{len(left)} files were left: somebody has committed or replaced them since")
    size = spell_bytes(sum(item.size for item in chosen))
    if arguments.delete:
        print(f"removed {len(chosen)} files, {size}")
    elif chosen:
        print(f"{len(chosen)} files, {size}; nothing was removed: add --delete for that")
    else:
        print("nothing to remove")
    if superseded and not arguments.superseded:
        size = spell_bytes(sum(item.size for item in superseded))
        print(f"besides, {len(superseded)} blocks ({size}) hold rows that no study here asks for, as after an edit")
        print("  --superseded lists them too; once they are removed, reverting the edit makes them again")
    return 0
