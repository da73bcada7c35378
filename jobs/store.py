"""``resid store``: what an activation store holds, whether it is whole, and what comes out of it and into it."""

from __future__ import annotations

import argparse
import json
import re

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs import store_files
from jobs.context import data_location
from jobs.verify import place
from store.activations import ActivationStore
from store.collect import Garbage, find_garbage, remove_garbage
from store.errors import DamageError, MissingDataError
from store.inventory import Model, inventory
from store.layers import spell_ranges
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


def _existing(store: ActivationStore) -> ActivationStore:
    if not store.models():
        raise MissingDataError(
            f"{store.location} holds no activations\n  remedy: resid capture --study <study>, or name another --store"
        )
    return store


# -- ls --------------------------------------------------------------------------------------------------------------


def _ls(store: ActivationStore, arguments: argparse.Namespace) -> int:
    models = inventory(_existing(store))
    if arguments.format == "json":
        print(json.dumps([model.to_dict() for model in models], indent=1))
        return 0
    console = Console(width=None if Console().is_terminal else 160)
    for model in models:
        size = sum(capture.nbytes for capture in model.captures)
        console.print(
            f"{escape(model.source)}  {model.fingerprint[:16]}  {model.dtype}, {model.n_layers} layers, "
            f"d_model {model.d_model}: {_bytes(size)}",
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
    for name in ("rows", "blocks", "size"):
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
            _part(capture.committed_blocks, capture.blocks),
            _bytes(capture.nbytes),
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
            escape(held.study), escape(held.prompt_set), held.responses or "", str(held.rows), ", ".join(what) or "-"
        )
    return table


def _part(some: int, every: int) -> str:
    return f"{some:,}" if some == every else f"{some:,} of {every:,}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# -- verify ----------------------------------------------------------------------------------------------------------


def _verify(store: ActivationStore, arguments: argparse.Namespace) -> int:
    lines, blocks, files = [], 0, set()
    for model in _existing(store).models():
        blocks += sum(len(generation.committed()) for generation in model.generations())
        lines += model.verify(repair=arguments.repair, deep=arguments.deep)
        files |= model.memberships.study_files()
    how = "every byte of" if arguments.deep else "size and index of"
    print(f"checked {how} {blocks} blocks in {store.location}")
    if lines:
        again = " or ".join(f"resid capture --study {file}" for file in sorted(files)) or "the capture"
        done = f"un-committed; run {again}" if arguments.repair else "remedy: resid store verify --deep --repair"
        raise DamageError("damage:\n  " + "\n  ".join(lines) + f"\n  {done}")
    print("all of it is whole" if arguments.deep else "none is missing or cut; --deep reads every byte")
    return 0


# -- gc --------------------------------------------------------------------------------------------------------------


def _gc(store: ActivationStore, arguments: argparse.Namespace) -> int:
    garbage = find_garbage(_existing(store), arguments.min_age)
    left: list[Garbage] = []
    if arguments.delete:
        garbage, left = remove_garbage(garbage)
    for item in garbage:
        print(f"{item.place}  {_bytes(item.size)}  {item.why}")
    size = _bytes(sum(item.size for item in garbage))
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
