"""Published activations taken into the store: tensors of a file, with what is declared of them, as rows and sites.

Imported rows never mix with captured ones: they belong to a model entry of their own, whose fingerprint says that it
was imported under a name. All that is imported under one name is one model, so that `select` finds it by that name;
what is declared of a file (convention, key, axes) distinguishes rows instead.

Nothing is known of the tokens of an imported row. Its key is the hash of the file's SHA-256, of how the file was read
(`store.conventions`) and of its index in it, which stand in place of token ids: the same file read the same way gives
the same rows, and read in another way others. Its spans are such that it has the declared position.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from store import locks
from store.activations import ActivationStore, ModelStore
from store.conventions import CONVENTIONS as CONVENTIONS  # these are part of this module's interface
from store.conventions import DIMS as DIMS
from store.conventions import Convention as Convention
from store.conventions import Declared as Declared
from store.conventions import Slab, by_layer, to_sites
from store.dtypes import DTypeName
from store.errors import MismatchError, MissingDataError, NonFiniteError
from store.fingerprint import file_digest, fingerprint, short
from store.generation import RECORDS, Generation
from store.needs import CaptureRequest
from store.prompts import Message, Prompt
from store.rows import Row
from store.sites import RESPONSE_POSITIONS, Component, Site, Spans
from store.tensor_files import Tensors
from store.tensor_files import read_tensors as read_tensors

_WORDS = 4  # numbers that stand for an imported row in place of its tokens
_CHECKED_ROWS = 4096  # at a time


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    model: str  # fingerprint
    rows: int
    sites: tuple[Site, ...]
    new_blocks: int
    skipped: str  # what was left out, and why; "" for nothing


def import_activations(
    store: ActivationStore, path: Path, tensors: Tensors, declared: Declared, texts: Sequence[str] | None = None
) -> Imported:
    """Take a file's activations into the store.

    Args:
        tensors: what the file holds.
        texts: the prompts, row by row.

    Raises:
        MismatchError: if the file is not as declared, or the store has something else under that name.
        NonFiniteError: if a value is NaN or infinite.
        ResourceError: if the store cannot be written.
    """
    found = by_layer(path, tensors, declared)
    sites, n_layers, skipped = to_sites(path, found.slabs, declared)
    n_rows, d_model = next(iter(sites.values())).values.shape
    if texts is not None and len(texts) != n_rows:
        raise MismatchError(f"{path} has {n_rows} rows, and there are {len(texts)} prompts")
    for site, slab in sites.items():
        _check(site, slab)
    (dtype,) = {_stored_dtype(slab) for slab in sites.values()}  # one tensor, or tensors of one dtype
    manifest = _manifest(store, declared, dtype, d_model, n_layers)
    digest = file_digest(path)
    rows = _rows(manifest["fingerprint"], f"{digest}:{found.reading}", digest, n_rows, declared, texts)
    _check_set(store.preview(manifest), declared, rows)
    model = store.add_model(manifest)
    blocks = _write(model, rows, sites, dtype, declared, {"file": path.name, "sha256": digest})
    with locks.exclusive(model.location / RECORDS, "imports"):
        _check_set(model, declared, rows)  # another import may have given its rows that name in the meantime
        _remember(model, declared, rows, texts)
    return Imported(model.fingerprint, n_rows, tuple(sites), blocks, skipped)


def _write(
    model: ModelStore,
    rows: Sequence[Row],
    sites: Mapping[Site, Slab],
    dtype: DTypeName,
    declared: Declared,
    provenance: Mapping[str, str],
) -> int:
    """Write what the store lacks of the rows; return how many blocks that was."""
    components: dict[Component, tuple[int, ...]] = {}
    for site in sites:
        components[site.component] = (*components.get(site.component, ()), site.layer)
    requests = [
        CaptureRequest(tuple(rows), (component,), tuple(sorted(layers)), (declared.position,), dtype)
        for component, layers in components.items()
    ]
    index = {row.key: i for i, row in enumerate(rows)}
    _, blocks = model.assign(requests)
    for block in blocks:
        generation = Generation(model.location / block.generation)
        plan = generation.plan
        chosen = np.array([index[key] for key in generation.keys[slice(*plan.block_range(block.block))]])
        values: dict[str, npt.NDArray[Any]] = {}
        for component in plan.components:
            # A generation from before may hold layers that this import leaves out.
            lacking = [str(site) for layer in plan.layers if (site := Site(component, layer)) not in sites]
            if lacking:
                raise MismatchError(
                    f"an earlier import of these rows, also at {', '.join(lacking)}, was not finished\n"
                    "  remedy: run that one again first"
                )
            layers = [sites[Site(component, layer)].values[chosen] for layer in plan.layers]
            values[component] = np.stack(layers, axis=1)[:, :, None]
        generation.write_block(block.block, values, {**provenance, "convention": declared.convention})
    return len(blocks)


# -- what is in the file -----------------------------------------------------------------------------------------------


def _stored_dtype(slab: Slab) -> DTypeName:
    name = slab.values.dtype.name
    return cast(DTypeName, "float32" if name == "float64" else name)


def _check(site: Site, slab: Slab) -> None:
    """Refuse what is not finite, or would lose bits."""
    for start in range(0, len(slab.values), _CHECKED_ROWS):
        values = slab.values[start : start + _CHECKED_ROWS]
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float32)
        finite = np.isfinite(values if values.dtype == np.float64 else narrow).all(axis=1)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            raise NonFiniteError(f"{slab.where} ({site}) holds NaN or infinity, first in row {row}")
        if values.dtype == np.float64:
            exact = (narrow.astype(np.float64) == values).all(axis=1)
            if not exact.all():
                row = start + int(np.flatnonzero(~exact)[0])
                raise MismatchError(
                    f"{slab.where} ({site}) is float64 and does not fit float32 exactly, first in row {row}\n"
                    "  remedy: save it as float32"
                )


# -- the model ---------------------------------------------------------------------------------------------------------


def _manifest(
    store: ActivationStore, declared: Declared, dtype: str, d_model: int, n_layers: int | None
) -> dict[str, Any]:
    """Return the model entry of all that is imported under a name.

    Raises:
        MismatchError: if the store has another model of that name.
    """
    manifest = {
        "fingerprint": fingerprint({"imported": declared.model}),
        "imported": True,
        "ref": {"source": declared.model},
        "dtype": dtype,
        "d_model": d_model,
        "n_layers": n_layers,
    }
    for other in store.models():
        if (
            other.fingerprint != manifest["fingerprint"]
            and other.manifest.get("ref", {}).get("source") == declared.model
        ):
            raise MismatchError(
                f"{store.location} holds captures of {declared.model!r} (model {short(other.fingerprint)}), and that "
                "name would mean both\n  remedy: give what you import another name with --model"
            )
    known = store.preview(manifest).manifest
    layers = known.get("n_layers")
    if known["d_model"] != d_model or (None not in (layers, n_layers) and layers != n_layers):
        raise MismatchError(
            f"{declared.model!r} was imported with d_model {known['d_model']} and {layers} blocks, and this file has "
            f"d_model {d_model} and {n_layers} blocks\n  remedy: give one of them another name with --model"
        )
    return manifest


# -- rows and prompt sets ----------------------------------------------------------------------------------------------


def _rows(
    model: str, content: str, digest: str, count: int, declared: Declared, texts: Sequence[str] | None
) -> list[Row]:
    needs_response = declared.position in RESPONSE_POSITIONS
    spans = Spans(_WORDS - 1, _WORDS) if needs_response else Spans(_WORDS, _WORDS)
    rows = []
    for i in range(count):
        # In place of token ids, which nobody knows: numbers below 2^31 that address the file and the row in it.
        words = struct.unpack(f"<{_WORDS}I", hashlib.sha256(f"{content}:{i}".encode()).digest()[: 4 * _WORDS])
        prompt_id = f"{short(digest)}:{i}" if texts is None else Prompt((Message("user", texts[i]),)).id
        rows.append(Row(model, prompt_id, tuple(word >> 1 for word in words), spans, "imported"))
    return rows


def _held(model: ModelStore, study: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = model.memberships.table(study).to_pylist()
    except MissingDataError:
        return []
    return found


def _check_set(model: ModelStore, declared: Declared, rows: Sequence[Row]) -> None:
    there = {each["row_key"] for each in _held(model, declared.study) if each["prompt_set"] == declared.prompt_set}
    if there and there != {row.key for row in rows}:
        raise MismatchError(
            f"prompt set {declared.prompt_set!r} of {declared.model!r} was imported from another file, or with other "
            "--convention, --key, --dims, --layers or --position\n  remedy: choose another name with --set"
        )


def _remember(model: ModelStore, declared: Declared, rows: Sequence[Row], texts: Sequence[str] | None) -> None:
    held = _held(model, declared.study)
    others = [record for record in held if record["prompt_set"] != declared.prompt_set]
    if texts is None and len(others) < len(held):
        return  # it is there, perhaps with texts
    mine = [
        {
            "prompt_set": declared.prompt_set,
            "responses": None,
            "prompt_id": row.prompt_id,
            "row_key": row.key,
            "text": None if texts is None else texts[i],
        }
        for i, row in enumerate(rows)
    ]
    if [*others, *mine] != held:
        model.memberships.write(declared.study, None, [*others, *mine])
