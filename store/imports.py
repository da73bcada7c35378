"""Published activations taken into the store: tensors of a file, with what is declared of them, as rows and sites.

Imported rows never mix with captured ones: they belong to a model entry of their own, whose fingerprint says that it
was imported under a name. Nothing is known of their tokens. An imported row is its file's SHA-256 and its index in it:
the same file gives the same rows.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from store.activations import ActivationStore, ModelStore
from store.dtypes import DTypeName
from store.errors import MismatchError, MissingDataError, NonFiniteError, StudyError
from store.fingerprint import file_digest, fingerprint
from store.generation import Generation
from store.needs import CaptureRequest
from store.prompts import Message, Prompt
from store.rows import Row
from store.sites import COMPONENTS, Component, Site, Spans

Convention = Literal["hidden_states", "resid_pre", "resid_post", "attn_out", "mlp_out"]
CONVENTIONS: tuple[Convention, ...] = ("hidden_states", *COMPONENTS)
DIMS = ("row", "layer", "d_model")
_WORDS = 4  # numbers that stand for an imported row in place of its tokens
_SAFETENSORS: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
}

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Declared:
    """What is said of a file's tensors.

    Attributes:
        dims: the axes of the tensor; without "layer" for files with a tensor a layer, or of one layer.
        key: the tensor's name in the file, or a pattern ``layer_{layer}``; None where there is only one.
        layers: the layers (for hidden_states: its indices) along the layer axis; None: 0, 1, 2, ...
        n_layers: blocks of the model; needed to tell which of hidden_states is after the final norm.
    """

    model: str
    convention: Convention
    dims: tuple[str, ...] = DIMS
    key: str | None = None
    layers: tuple[int, ...] | None = None
    n_layers: int | None = None
    position: str = "prompt_end"
    prompt_set: str = "imported"
    study: str = "imported"


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    rows: int
    sites: tuple[Site, ...]
    new_blocks: int
    skipped: str | None  # what was left out, and why


def read_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read a ``.npz`` or ``.safetensors`` file; ``.npy`` is one tensor named "array".

    Raises:
        MismatchError: if it is none, or would have to run code to be read.
    """
    try:
        if path.suffix == ".safetensors":
            return {
                name: np.frombuffer(record["data"], dtype=_SAFETENSORS[record["dtype"]]).reshape(record["shape"])
                for name, record in deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
                if record["dtype"] in _SAFETENSORS
            }
        if path.suffix in (".npz", ".npy"):
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"array": loaded}
            with loaded:
                return {name: loaded[name] for name in loaded.files if loaded[name].dtype.kind == "f"}
    except (ValueError, OSError, SafetensorError) as error:
        if isinstance(error, FileNotFoundError):
            raise StudyError("there is no such file", file=str(path)) from None
        raise MismatchError(f"{path}: {error}") from None
    raise MismatchError(f"{path}: files that can be imported end in .npz, .npy, .safetensors or .pt")


def by_layer(path: Path, tensors: Tensors, declared: Declared) -> dict[int, npt.NDArray[Any]]:
    """Return layer (or hidden_states index) -> values [row, d_model].

    Raises:
        MismatchError: if keys, axes or sizes are not as declared.
    """
    if declared.key is not None and "{layer}" in declared.key:
        return _a_tensor_a_layer(path, tensors, declared)
    if declared.key is None and len(tensors) != 1:
        raise MismatchError(
            f"{path} holds {len(tensors)} tensors of floats: {_some(tensors)}\n"
            "  remedy: say which with --key, or with a pattern such as --key 'layer_{layer}'"
        )
    key = declared.key if declared.key is not None else next(iter(tensors))
    if key not in tensors:
        raise MismatchError(f"{path} has no tensor {key!r}; it holds {_some(tensors)}")
    values = tensors[key]
    if sorted(declared.dims) not in (sorted(DIMS), sorted(("row", "d_model"))):
        raise MismatchError(
            f"--dims are row, layer and d_model in their order (layer may be absent), not {declared.dims}"
        )
    if values.ndim != len(declared.dims):
        raise MismatchError(f"{path}: {key!r} has the shape {values.shape}, which is not {','.join(declared.dims)}")
    if "layer" not in declared.dims:
        if declared.layers is None or len(declared.layers) != 1:
            raise MismatchError(f"{path}: {key!r} has no layer axis\n  remedy: say which layer it is with --layers")
        return {declared.layers[0]: values.transpose([declared.dims.index(name) for name in ("row", "d_model")])}
    values = values.transpose([declared.dims.index(name) for name in ("layer", "row", "d_model")])
    layers = declared.layers if declared.layers is not None else tuple(range(len(values)))
    if len(layers) != len(values) or len(set(layers)) < len(layers):
        raise MismatchError(f"{path}: {key!r} has {len(values)} layers, and {len(layers)} are declared: {list(layers)}")
    return dict(zip(layers, values, strict=True))


def _a_tensor_a_layer(path: Path, tensors: Tensors, declared: Declared) -> dict[int, npt.NDArray[Any]]:
    assert declared.key is not None
    pattern = re.compile(re.escape(declared.key).replace(re.escape("{layer}"), r"(0|[1-9][0-9]*)"))
    found = {int(match[1]): tensors[name] for name in tensors if (match := pattern.fullmatch(name))}
    wanted = declared.layers if declared.layers is not None else tuple(sorted(found))
    if not found or not set(wanted) <= set(found):
        lacking = ", ".join(str(layer) for layer in wanted if layer not in found) or "every layer"
        raise MismatchError(f"{path}: --key {declared.key!r} finds nothing for {lacking}; it holds {_some(tensors)}")
    axes = [name for name in declared.dims if name != "layer"]
    for layer in wanted:
        if found[layer].ndim != 2 or found[layer].shape != found[wanted[0]].shape:
            raise MismatchError(
                f"{path}: layer {layer} has the shape {found[layer].shape}, not [row, d_model] as others"
            )
    return {layer: found[layer] if axes == ["row", "d_model"] else found[layer].T for layer in wanted}


def to_sites(
    path: Path, layers: Mapping[int, npt.NDArray[Any]], declared: Declared
) -> tuple[dict[Site, npt.NDArray[Any]], int | None, str | None]:
    """Translate a convention to sites.

    ``hidden_states[0]`` is the embedding, resid_pre.0; ``hidden_states[i]`` is resid_post.(i - 1); the last one is
    after the final norm and no site.

    Returns:
        Values by site; the model's number of blocks where known; what was left out, and why.

    Raises:
        MismatchError: if a layer does not exist.
    """
    n_layers = declared.n_layers
    if declared.convention != "hidden_states":
        if n_layers is not None and max(layers) >= n_layers:
            raise MismatchError(f"{path}: layer {max(layers)} of a model of {n_layers} blocks; they count from 0")
        return {Site(declared.convention, layer): values for layer, values in layers.items()}, n_layers, None
    if n_layers is None and declared.layers is None:
        n_layers = max(layers)  # hidden_states has an entry more than the model has blocks
    if n_layers is None:
        raise MismatchError(f"{path}: which of hidden_states is after the final norm?\n  remedy: say --n-layers")
    if max(layers) > n_layers:
        raise MismatchError(f"{path}: hidden_states[{max(layers)}] of a model of {n_layers} blocks")
    sites: dict[Site, npt.NDArray[Any]] = {}
    skipped = None
    for index, values in layers.items():
        if index == n_layers:
            skipped = f"hidden_states[{index}] is after the final norm: no place in the residual stream"
        else:
            sites[Site("resid_post", index - 1) if index else Site("resid_pre", 0)] = values
    if not sites:
        raise MismatchError(f"{path}: {skipped}; nothing is left to import")
    return sites, n_layers, skipped


def import_activations(
    store: ActivationStore, path: Path, tensors: Tensors, declared: Declared, texts: Sequence[str] | None = None
) -> Imported:
    """Take a file's activations into the store.

    Args:
        texts: the prompts, row by row.

    Raises:
        MismatchError: if the file is not as declared, or the store has something else under that name.
        NonFiniteError: if a value is NaN or infinite.
    """
    sites, n_layers, skipped = to_sites(path, by_layer(path, tensors, declared), declared)
    first = next(iter(sites.values()))
    n_rows, d_model = first.shape
    if texts is not None and len(texts) != n_rows:
        raise MismatchError(f"{path} has {n_rows} rows, and there are {len(texts)} prompts")
    stored = {site: _storable(path, site, values) for site, values in sites.items()}
    dtype: DTypeName = next(iter(stored.values())).dtype.name  # type: ignore[assignment]
    model = _model(store, declared, dtype, d_model, n_layers)
    rows = _rows(model.fingerprint, path, n_rows, declared.position, texts)
    _check_set(model, declared, rows)
    components: dict[Component, tuple[int, ...]] = {}
    for site in stored:
        components[site.component] = (*components.get(site.component, ()), site.layer)
    requests = [
        CaptureRequest(tuple(rows), (component,), tuple(sorted(layers)), (declared.position,), dtype)
        for component, layers in components.items()
    ]
    at = {row.key: i for i, row in enumerate(rows)}
    _, blocks = model.assign(requests)
    provenance = {"file": path.name, "sha256": file_digest(path), "convention": declared.convention}
    for block in blocks:
        generation = Generation(model.location / block.generation)
        plan = generation.plan
        start, stop = plan.block_range(block.block)
        if not all(key in at for key in generation.keys[start:stop]):
            continue  # of another import that has not finished
        chosen = [at[key] for key in generation.keys[start:stop]]
        values: dict[str, npt.NDArray[Any]] = {
            component: np.stack([stored[Site(component, layer)][chosen] for layer in plan.layers], axis=1)[:, :, None]
            for component in plan.components
        }
        generation.write_block(block.block, values, provenance)
    _remember(model, declared, rows, texts)
    return Imported(n_rows, tuple(stored), len(blocks), skipped)


def _storable(path: Path, site: Site, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if values.dtype == np.float64:
        narrow = values.astype(np.float32)
        if not np.array_equal(narrow.astype(np.float64), values, equal_nan=True):
            raise MismatchError(
                f"{path}: {site} is float64 and does not fit float32 exactly\n  remedy: save it as float32"
            )
        values = narrow
    if values.dtype.name not in ("float32", "float16", "bfloat16"):
        raise MismatchError(f"{path}: {site} is {values.dtype}; float32, float16 and bfloat16 can be imported")
    bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)).all(axis=1))
    if len(bad):
        raise NonFiniteError(f"{path}: {site} holds NaN or infinity in {len(bad)} rows, first row {bad[0]}")
    return values


def _model(store: ActivationStore, declared: Declared, dtype: str, d_model: int, n_layers: int | None) -> ModelStore:
    identity = fingerprint({"imported": declared.model})
    model = store.add_model(
        {
            "fingerprint": identity,
            "imported": True,
            "ref": {"source": declared.model},
            "dtype": dtype,
            "d_model": d_model,
            "n_layers": n_layers,
        }
    )
    known = (model.manifest["d_model"], model.manifest.get("n_layers"))
    if known[0] != d_model or (None not in (known[1], n_layers) and known[1] != n_layers):
        raise MismatchError(
            f"{declared.model!r} was imported with d_model {known[0]} and {known[1]} layers, and this file has "
            f"{d_model} and {n_layers}\n  remedy: give the models different names with --model"
        )
    return model


def _rows(model: str, path: Path, count: int, position: str, texts: Sequence[str] | None) -> list[Row]:
    digest = file_digest(path)
    needs_response = position.startswith("response_")
    spans = Spans(_WORDS - 1, _WORDS) if needs_response else Spans(_WORDS, _WORDS)
    rows = []
    for i in range(count):
        # In place of token ids, which nobody knows: numbers below 2^31 that address the file and the row in it.
        words = struct.unpack(f"<{_WORDS}I", hashlib.sha256(f"{digest}:{i}".encode()).digest()[: 4 * _WORDS])
        prompt_id = f"{digest[:16]}:{i}" if texts is None else Prompt((Message("user", texts[i]),)).id
        rows.append(Row(model, prompt_id, tuple(word >> 1 for word in words), spans, "imported"))
    try:
        rows[0].spans.token_range(position)
    except ValueError:
        raise MismatchError(
            f"an imported row has no position {position}: nothing is known of its tokens\n  remedy: prompt_end, "
            "response_start or response_avg"
        ) from None
    return rows


def _held(model: ModelStore, study: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = model.memberships.table(study).to_pylist()
    except MissingDataError:
        return []
    return found


def _check_set(model: ModelStore, declared: Declared, rows: Sequence[Row]) -> None:
    there = {
        record["row_key"] for record in _held(model, declared.study) if record["prompt_set"] == declared.prompt_set
    }
    if there and there != {row.key for row in rows}:
        raise MismatchError(
            f"prompt set {declared.prompt_set!r} of {declared.model!r} was imported from another file\n"
            "  remedy: choose another name with --set"
        )


def _remember(model: ModelStore, declared: Declared, rows: Sequence[Row], texts: Sequence[str] | None) -> None:
    others = [record for record in _held(model, declared.study) if record["prompt_set"] != declared.prompt_set]
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
    model.memberships.write(declared.study, None, [*others, *mine])


def _some(tensors: Tensors) -> str:
    names = [f"{name} {list(tensors[name].shape)}" for name in sorted(tensors)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
