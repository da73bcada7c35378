"""``resid store export`` and ``resid store import``: activations as files of other programs, and back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from store.activations import ActivationStore
from store.errors import MismatchError, ResidError, StudyError
from store.exports import FORMATS, Export, default_dtype, export
from store.imports import CONVENTIONS, DIMS, Declared, import_activations, read_tensors
from store.layers import spell_ranges
from store.location import is_url


def add_arguments(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add both sub-commands; `add` makes a parser with the options that all have."""
    out = add("export", "write activations as npz, safetensors, Parquet or a Hugging Face data set")
    out.add_argument("--format", choices=FORMATS, required=True)
    out.add_argument("--output", type=Path, required=True, metavar="PATH", help="a file; for hf a folder")
    out.add_argument("--model", metavar="NAME", help="name or beginning of the fingerprint; default: the only one")
    out.add_argument("--prompts", action="append", metavar="SET", help="a prompt set; may be given more than once")
    out.add_argument("--of-study", metavar="NAME", help="whose prompt sets, where studies have different ones")
    out.add_argument("--responses", metavar="CONDITION", help="the condition that generated the responses")
    out.add_argument("--site", default="resid_post", help="resid_post (default), resid_pre, attn_out or mlp_out")
    out.add_argument("--layers", type=_numbers, metavar="L,L-L", help="such as 14 or 0,10-20; default: all")
    out.add_argument("--position", default="prompt_end", help="default prompt_end; also all_tokens")
    out.add_argument(
        "--dtype", choices=("float32", "stored"), help="default: stored for safetensors, else float32, which is exact"
    )
    out.add_argument("--force", action="store_true", help="replace an output that exists")
    into = add("import", "take published activations into the store, as a model of their own")
    into.add_argument("file", type=Path, metavar="FILE", help=".safetensors, .npz, .npy or .pt")
    into.add_argument("--model", required=True, metavar="NAME", help="the model that they are of")
    into.add_argument("--convention", choices=CONVENTIONS, required=True, help="what the layer numbers mean")
    into.add_argument("--dims", default=",".join(DIMS), help="axes of the tensor (default row,layer,d_model)")
    into.add_argument("--key", help="name of the tensor, or a pattern for one a layer: 'layer_{layer}'")
    into.add_argument(
        "--layers",
        type=_numbers,
        metavar="L,L-L",
        help="layers (hidden_states: indices) on the axis; of a file with all of them: those to import",
    )
    into.add_argument("--n-layers", type=int, metavar="N", help="blocks of the model (hidden_states: from the axis)")
    into.add_argument("--position", default="prompt_end", help="prompt_end (default), response_start or response_avg")
    into.add_argument("--set", default="imported", metavar="NAME", help="name of the prompt set that the rows become")
    into.add_argument("--of-study", default="imported", metavar="NAME", help="and of the study that it is of")
    into.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help='texts row by row: {"prompt": "..."}')


def run_export(store: ActivationStore, arguments: argparse.Namespace) -> int:
    """Write a selection to a file."""
    if is_url(str(arguments.output)) or ":/" in str(arguments.output):
        raise ResidError(f"--output {arguments.output}: exports are written to local disk\n  remedy: name a path")
    try:
        selection = store.select(
            prompts=arguments.prompts,
            model=arguments.model,
            study=arguments.of_study,
            responses=arguments.responses,
            site=arguments.site,
            layer=arguments.layers,
            position=arguments.position,
        )
    except ValueError as error:
        raise ResidError(f"{error}\n  remedy: see `resid store export --help`, and `resid store ls`") from None
    model = store.find_model(arguments.model)
    what = Export(
        selection,
        model.memberships.prompts(arguments.prompts),
        arguments.dtype or default_dtype(arguments.format),
        model.manifest.get("ref", {}).get("source"),
    )
    export(what, arguments.format, arguments.output, overwrite=arguments.force)
    print(
        f"{arguments.output}: {len(selection.row_keys):,} rows, {selection.component} at {selection.position}, "
        f"layers {spell_ranges(selection.layers)}, {what.value_dtype.name}"
    )
    return 0


def run_import(store: ActivationStore, arguments: argparse.Namespace) -> int:
    """Take a file into the store."""
    declared = Declared(
        model=arguments.model,
        convention=arguments.convention,
        dims=tuple(arguments.dims.split(",")),
        key=arguments.key,
        layers=None if arguments.layers is None else tuple(arguments.layers),
        n_layers=arguments.n_layers,
        position=arguments.position,
        prompt_set=arguments.set,
        study=arguments.of_study,
    )
    texts = None if arguments.prompts is None else _texts(arguments.prompts)
    if arguments.file.suffix in (".pt", ".pth", ".bin"):
        from pipeline.torch_files import read_torch_tensors

        tensors = read_torch_tensors(arguments.file)
    else:
        tensors = read_tensors(arguments.file)
    done = import_activations(store, arguments.file, tensors, declared, texts)
    if done.skipped:
        print(f"left out: {done.skipped}")
    what = "found in the store" if not done.new_blocks else "imported"
    sites = ", ".join(dict.fromkeys(str(site) for site in (done.sites[0], done.sites[-1])))
    print(f"{what}: {done.rows:,} rows at {len(done.sites)} sites ({sites}) as prompts {arguments.set!r}")
    return 0


def _texts(path: Path) -> list[str]:
    texts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise StudyError("there is no such file", file=str(path)) from None
    for number, line in enumerate(lines, 1):
        try:
            texts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise MismatchError(
                f'{path}, line {number}: a line is an object with a text: {{"prompt": "..."}}'
            ) from None
    return texts


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} are no layers: write 14 or 0,10-20")
        found += range(int(first), int(last if dash else first) + 1)
    return found
