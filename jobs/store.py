"""``resid store``: what an activation store holds, whether it is whole, and what comes out of it and into it."""

from __future__ import annotations

import argparse
import json
import re
import shlex

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs import store_files
from jobs.context import data_location
from jobs.verify import place
from store.activations import ActivationStore, ModelStore
from store.collect import Garbage, find_garbage, remove_garbage
from store.errors import DamageError, MissingDataError
from store.finding import CAPTURE
from store.generation import RECORDS
from store.inventory import Model, inventory
from store.layers import spell_ranges
from store.sizes import spell_bytes
from store.study_file import load_study

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    commands = parser.add_subparsers(dest="store_command", required=True, metavar="command")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--store", metavar="URL", help="a folder or an fsspec URL (default: RESID_STORE)")
        command.add_argument("--study", metavar="FILE", help="use the store of this study")
        return command

    listing = add("ls", "list models, captures and how much of each prompt set is there")
    listing.add_argument("--format", choices=("table", "json"), default="table")
    verify = add("verify", "compare commits with their shards; exit 1 if anything is damaged")
    verify.add_argument("--deep", action="store_true", help="read every committed byte and compare its checksum")
    verify.add_argument("--repair", action="store_true", help="un-commit damaged blocks: the next capture redoes these")
    collect = add("gc", "list what killed writers left behind; remove it with --delete")
    collect.add_argument("--delete", action="store_true", help="remove what is listed")
    collect.add_argument(
        "--min-age", metavar="AGE", type=_seconds, help="only what is older: 30m, 2d (default 1h; 1d on object storage)"
    )
    store_files.add_arguments(add)


def run(arguments: argparse.Namespace) -> int:
    """Run a sub-command.

    Raises:
        ResidError: as the sub-commands do.
    """
    study = load_study(arguments.study) if arguments.study else None
    location = data_location(place("store", arguments.store, study), "store")
    store = ActivationStore.open(location)
    handlers = {
        "ls": _ls,
        "verify": _verify,
        "gc": _gc,
        "export": store_files.run_export,
        "import": store_files.run_import,
    }
    return handlers[arguments.store_command](store, arguments)


def _models(store: ActivationStore) -> list[ModelStore]:
    models = store.models()
    if not models and (lost := _without_manifest(store)):
        raise DamageError("damage:\n  " + "\n  ".join(lost) + f"\n  remedy: {CAPTURE}, which writes it again")
    if not models:
        raise _nothing(store)
    return models


def _nothing(store: ActivationStore) -> MissingDataError:
    return MissingDataError(f"{store.location} holds no activations\n  remedy: {CAPTURE}, or name another --store")


def _without_manifest(store: ActivationStore) -> list[str]:
    """Return a line for each model that has captures and no model.json: readers do not see it."""
    root = store.location
    return [
        f"{root / name / 'model.json'}: this file is missing"
        for name in root.list()
        if (root / name / RECORDS).list() and not (root / name / "model.json").exists()
    ]


# -- ls --------------------------------------------------------------------------------------------------------------


def _ls(store: ActivationStore, arguments: argparse.Namespace) -> int:
    _models(store)
    models = inventory(store)
    if arguments.format == "json":
        print(json.dumps([model.to_dict() for model in models], indent=1))
        return 0
    console = Console(width=None if Console().is_terminal else 160)
    for model in models:
        size = sum(capture.nbytes for capture in model.captures)
        layers = "" if model.n_layers is None else f"{model.n_layers} layers, "
        imported = "imported, " if model.imported else ""
        console.print(
            f"{escape(model.source)}  {model.fingerprint[:16]}  {imported}{model.dtype}, {layers}"
            f"d_model {model.d_model}: {spell_bytes(size)}",
            highlight=False,
        )
        console.print(_captures(model))
        if model.prompt_sets:
            console.print(_prompt_sets(model))
    return 0


def _captures(model: Model) -> Table:
    table = Table(title="captures", title_justify="left")
    for name in ("capture", "sites", "layers", "positions", "dtype"):
        table.add_column(name)
    for name in ("rows", "blocks waiting", "size"):
        table.add_column(name, justify="right")
    for capture in model.captures:
        dtype = capture.dtype if capture.compression == "none" else f"{capture.dtype}, {capture.compression}"
        table.add_row(
            capture.id,
            ", ".join(capture.components),
            spell_ranges(capture.layers),
            ", ".join(capture.positions),
            dtype,
            _part(capture.committed_rows, capture.rows),
            f"{capture.blocks - capture.committed_blocks:,}",
            spell_bytes(capture.nbytes),
        )
    return table


def _prompt_sets(model: Model) -> Table:
    table = Table(title="prompt sets", title_justify="left")
    for name in ("study", "prompts", "responses"):
        table.add_column(name)
    table.add_column("rows", justify="right")
    table.add_column("captured")
    for held in model.prompt_sets:
        what = [
            name if count == held.rows else f"{name} ({_part(count, held.rows)})" for name, count in held.held.items()
        ]
        table.add_row(
            escape(held.study),
            escape(held.prompt_set),
            escape(held.responses or ""),
            f"{held.rows:,}",
            "; ".join(what) or "-",
        )
    return table


def _part(some: int, every: int) -> str:
    return f"{some:,}" if some == every else f"{some:,} of {every:,}"


# -- verify ----------------------------------------------------------------------------------------------------------


def _verify(store: ActivationStore, arguments: argparse.Namespace) -> int:
    damaged, blocks, files = [], 0, set()
    for model in _models(store):
        blocks += sum(len(generation.committed()) for generation in model.generations())
        files |= model.memberships.study_files()  # before a repair removes damaged ones
        damaged += model.verify(repair=arguments.repair, deep=arguments.deep)
    damaged += [line for line in _without_manifest(store) if not any(line.split(": ")[0] in each for each in damaged)]
    how = "every byte of" if arguments.deep else "size and index of"
    print(f"checked {how} {blocks} blocks, and all metadata, in {store.location}")
    if damaged:
        # The remedy of each is the same, and said once.
        lines = [line.partition("\n  remedy:")[0] for line in damaged]
        commands = [f"resid capture --study {shlex.quote(file)}" for file in sorted(files)]
        if any(model.manifest.get("imported") for model in store.models()):
            commands.append("the `resid store import` that brought it")
        again = " or ".join(commands) or CAPTURE
        repair = f"resid store verify --store {shlex.quote(str(store.location))} --deep --repair"
        then = f"un-committed; run {again}, which makes just these again" if arguments.repair else f"remedy: {repair}"
        raise DamageError(f"{len(lines)} damaged:\n  " + "\n  ".join(lines) + f"\n  {then}")
    print("all of it is whole" if arguments.deep else "none is missing or cut; --deep reads every byte")
    return 0


# -- gc --------------------------------------------------------------------------------------------------------------


def _gc(store: ActivationStore, arguments: argparse.Namespace) -> int:
    if not (store.location / "resid.json").exists():
        raise _nothing(store)
    garbage = find_garbage(store, arguments.min_age)
    left: list[Garbage] = []
    if arguments.delete:
        store.location.require_first_wins()
        garbage, left = remove_garbage(garbage)
    for item in garbage:
        if item.kind != "lock":
            print(f"{item.place}  {spell_bytes(item.size)}  {item.why}")
    # One for each block that was ever made: of them the number says enough.
    count = sum(item.kind == "lock" for item in garbage)
    if count:
        print(f"{count:,} lock files of committed blocks, empty")
    size = spell_bytes(sum(item.size for item in garbage))
    if left:
        print(f"{len(left)} files were left: somebody is writing them, or has committed them since")
    if arguments.delete:
        print(f"removed {len(garbage)} files, {size}")
    elif garbage:
        print(f"{len(garbage)} files, {size}; nothing was removed: add --delete for that")
    else:
        print("nothing to remove")
    return 0


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age: write 0s, 30m, 2h or 1d")
    return float(match[1]) * _UNITS[match[2]]
