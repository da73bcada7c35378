"""What published activations mean: which axis is what, and which place of the residual stream each layer number is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from store.errors import MismatchError
from store.fingerprint import fingerprint
from store.sites import COMPONENTS, NAMED_POSITIONS, Site
from store.tensor_files import FLOATS, Tensors

Convention = Literal["hidden_states", "resid_pre", "resid_post", "attn_out", "mlp_out"]
CONVENTIONS: tuple[Convention, ...] = ("hidden_states", *COMPONENTS)
DIMS = ("row", "layer", "d_model")


@dataclass(frozen=True)
class Declared:
    """What is said of a file's tensors.

    ``hidden_states`` counts as transformers does: index 0 is the embedding, resid_pre.0; index i is resid_post.(i - 1);
    the last one, whose index is the number of blocks, is after the final norm and no place in the residual stream.

    Attributes:
        dims: the axes of the tensor; without "layer" for files with a tensor a layer, or of one layer.
        key: the tensor's name in the file, or a pattern ``layer_{layer}``; None where there is only one.
        layers: the layers (of hidden_states: its indices) along the layer axis, or, where that has all of the model
            (`n_layers`) or there is a tensor a layer, those that are wanted; None: all, counted from 0.
        n_layers: blocks of the model; of hidden_states, where None, one less than the entries of the layer axis.
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

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise MismatchError(f"unknown convention {self.convention!r}; known: {', '.join(CONVENTIONS)}")
        if sorted(self.dims) not in (sorted(DIMS), sorted(("row", "d_model"))):
            given = ",".join(self.dims)
            raise MismatchError(f"dims are row, layer (or no layer) and d_model in the tensor's order, not {given}")
        if self.position not in NAMED_POSITIONS:
            raise MismatchError(
                f"an imported row has no position {self.position}: nothing is known of its tokens\n"
                f"  remedy: choose from {', '.join(NAMED_POSITIONS)}"
            )
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise MismatchError(f"each layer is named once, and at least one, not {list(self.layers)}")
        if self.n_layers is not None and self.n_layers < 1:
            raise MismatchError(f"a model has at least one block, not {self.n_layers}")
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.study) is None:
            raise MismatchError(f"{self.study!r} cannot be the name of a study: letters, digits, _ . and - make one")

    @property
    def is_pattern(self) -> bool:
        return self.key is not None and "{layer}" in self.key

    @property
    def entries(self) -> int | None:
        """Entries of a layer axis that has all layers, where the number of blocks is known."""
        return None if self.n_layers is None else self.n_layers + (self.convention == "hidden_states")


@dataclass(frozen=True)
class Slab:
    """The values of one layer number in a file, [row, d_model], and where in the file they are."""

    values: npt.NDArray[Any]
    where: str  # for messages: file, key, index


@dataclass(frozen=True)
class Found:
    """What a file holds, as declared.

    Attributes:
        reading: hash of how the file was read. Another reading gives other values, hence other rows.
    """

    slabs: dict[int, Slab]
    reading: str


def by_layer(path: Path, tensors: Tensors, declared: Declared) -> Found:
    """Return layer number (of hidden_states: index) -> values [row, d_model].

    Raises:
        MismatchError: if keys, axes, sizes or dtypes are not as declared.
    """
    if declared.is_pattern:
        return _a_tensor_a_layer(path, tensors, declared)
    key = _key(path, tensors, declared)
    tensor = tensors[key]
    _require_floats(path, tensors, key)
    if len(tensor.shape) != len(declared.dims):
        raise MismatchError(
            f"{path}: {key!r} has the shape {list(tensor.shape)}, which is not {','.join(declared.dims)}"
        )
    _require_some(path, key, tensor.shape)
    if "layer" not in declared.dims:
        if declared.layers is None or len(declared.layers) != 1:
            raise MismatchError(f"{path}: {key!r} has no layer axis\n  remedy: say which layer it is with --layers")
        values = tensor.read().transpose([declared.dims.index(name) for name in ("row", "d_model")])
        return Found({declared.layers[0]: Slab(values, f"{path}: {key!r}")}, _reading(declared, key, declared.layers))
    count = tensor.shape[declared.dims.index("layer")]
    labels, wanted = _labels(path, key, count, declared)
    values = tensor.read().transpose([declared.dims.index(name) for name in ("layer", "row", "d_model")])
    slabs = {
        label: Slab(values[i], f"{path}: {key!r} at {i} of its layer axis")
        for i, label in enumerate(labels)
        if label in wanted
    }
    return Found(slabs, _reading(declared, key, labels))


def _key(path: Path, tensors: Tensors, declared: Declared) -> str:
    if declared.key is not None:
        if declared.key not in tensors:
            raise MismatchError(f"{path} has no tensor {declared.key!r}; it holds {_some(tensors)}")
        return declared.key
    floats = [name for name, tensor in tensors.items() if tensor.dtype in FLOATS]
    if len(floats) != 1:
        raise MismatchError(
            f"{path} holds {len(floats)} tensors of floats: {_some(tensors)}\n"
            "  remedy: say which with --key, or with a pattern such as --key 'layer_{layer}'"
        )
    return floats[0]


def _labels(path: Path, key: str, count: int, declared: Declared) -> tuple[list[int], set[int]]:
    """Return the layer number of each entry of the layer axis, and those that are wanted."""
    layers, entries = declared.layers, declared.entries
    if layers is not None and len(layers) == count:
        return list(layers), set(layers)
    if entries is not None and count != entries:
        what = "entries of hidden_states (one more than blocks)" if declared.convention == "hidden_states" else "layers"
        raise MismatchError(
            f"{path}: {key!r} has {count} layers, and a model of {declared.n_layers} blocks has {entries} {what}\n"
            "  remedy: correct --n-layers, or name each layer on the axis with --layers"
        )
    if layers is None:
        return list(range(count)), set(range(count))
    if entries is None or max(layers) >= count:
        raise MismatchError(
            f"{path}: {key!r} has {count} layers, and {len(layers)} are declared: {list(layers)}\n"
            "  remedy: name each layer on the axis with --layers; or, if it has all of the model, say --n-layers"
        )
    return list(range(count)), set(layers)


def _a_tensor_a_layer(path: Path, tensors: Tensors, declared: Declared) -> Found:
    assert declared.key is not None
    pattern = re.compile(re.escape(declared.key).replace(re.escape("{layer}"), r"(0|[1-9][0-9]*)", 1))
    names = {int(match[1]): name for name in tensors if (match := pattern.fullmatch(name))}
    wanted = declared.layers if declared.layers is not None else tuple(sorted(names))
    if not names or not set(wanted) <= set(names):
        lacking = ", ".join(str(layer) for layer in wanted if layer not in names) or "every layer"
        raise MismatchError(f"{path}: --key {declared.key!r} finds nothing for {lacking}; it holds {_some(tensors)}")
    axes = [name for name in declared.dims if name != "layer"]
    first = tensors[names[wanted[0]]]
    slabs = {}
    for layer in wanted:
        name, tensor = names[layer], tensors[names[layer]]
        _require_floats(path, tensors, name)
        if len(tensor.shape) != 2 or (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise MismatchError(
                f"{path}: {name!r} is {tensor.dtype} {list(tensor.shape)}, and not {','.join(axes)} of one size and "
                f"dtype in all layers: {names[wanted[0]]!r} is {first.dtype} {list(first.shape)}"
            )
        _require_some(path, name, tensor.shape)
        values = tensor.read()
        slabs[layer] = Slab(values if axes == ["row", "d_model"] else values.T, f"{path}: {name!r}")
    return Found(slabs, _reading(declared, declared.key, None))


def _require_floats(path: Path, tensors: Tensors, key: str) -> None:
    if tensors[key].dtype not in FLOATS:
        raise MismatchError(
            f"{path}: {key!r} is {tensors[key].dtype}; float32, float16, bfloat16, and float64 that fits float32, can "
            "be imported (NumPy's files have no bfloat16: save that as float32)"
        )


def _require_some(path: Path, key: str, shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise MismatchError(f"{path}: {key!r} has the shape {list(shape)}: there is nothing in it")


def _reading(declared: Declared, key: str, labels: list[int] | tuple[int, ...] | None) -> str:
    """Hash what decides which value is which row's at which site, but not which of the layers are wanted."""
    axes = [name for name in declared.dims if name != "layer" or not declared.is_pattern]
    record = {"key": key, "dims": axes, "convention": declared.convention}
    return fingerprint({**record, "layers": None if labels is None else list(labels)})


def to_sites(path: Path, slabs: Mapping[int, Slab], declared: Declared) -> tuple[dict[Site, Slab], int | None, str]:
    """Translate the layer numbers of a convention (`Declared`) to sites.

    Returns:
        Values by site; the model's number of blocks where known; what was left out, and why ("": nothing).

    Raises:
        MismatchError: if a layer does not exist, or the one after the final norm is asked for.
    """
    n_layers = declared.n_layers
    if declared.convention != "hidden_states":
        if n_layers is not None and max(slabs) >= n_layers:
            raise MismatchError(f"{path}: there is no layer {max(slabs)} in a model of {n_layers} blocks, from 0")
        return {Site(declared.convention, layer): slab for layer, slab in slabs.items()}, n_layers, ""
    if n_layers is None and declared.layers is None and sorted(slabs) == list(range(len(slabs))):
        n_layers = len(slabs) - 1  # hidden_states has an entry more than the model has blocks
    if not n_layers:
        raise MismatchError(
            f"{path}: which of hidden_states is after the final norm, that of the model's last block?\n"
            "  remedy: say how many blocks it has with --n-layers"
        )
    if max(slabs) > n_layers:
        raise MismatchError(f"{path}: there is no hidden_states[{max(slabs)}] in a model of {n_layers} blocks")
    after = f"hidden_states[{n_layers}] is after the final norm, which is no place in the residual stream"
    if n_layers in slabs and declared.layers is not None:
        raise MismatchError(f"{path}: {after}\n  remedy: without --layers it is skipped; else take it out of the file")
    sites = {
        Site("resid_post", index - 1) if index else Site("resid_pre", 0): slab
        for index, slab in slabs.items()
        if index != n_layers
    }
    return sites, n_layers, after if n_layers in slabs else ""


def _some(tensors: Tensors) -> str:
    names = [f"{name} {list(tensors[name].shape)}" for name in sorted(tensors)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
