"""Selections as arrays of other libraries. Each is imported where it is asked for: the store itself needs none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from store.buffers import Pool
from store.errors import ResidError
from store.selection import Dtype, Part, Selection
from store.sites import ALL_TOKENS

if TYPE_CHECKING:
    import dask.array
    import torch
    import xarray


_POOL = Pool()  # for Dask's threads


def _missing(package: str, error: ImportError) -> ResidError:
    return ResidError(f"this needs {package}, which is not installed ({error})\n  remedy: pip install '{package}'")


def to_dask(selection: Selection, dtype: Dtype = "float32") -> dask.array.Array:
    """Return a Dask array with the axes of `selection.dims`: a chunk is one block at one layer.

    Where the rows are not in the order in which they are stored, a `take` puts them into the order of `row_keys`, which
    costs memory; sums do not need it (`Selection.in_stored_order`).
    """
    try:
        import dask.array as da
        from dask.base import tokenize
    except ImportError as error:
        raise _missing("dask[array]", error) from None
    # Layer by layer: different captures may serve different layers, and cut them into different blocks.
    target = selection.dtype_of(dtype)
    # Dask takes arrays of one name for the same: the name says where every value comes from.
    origin = [
        (part.generation.location.url, part.block, part.within, part.into, part.layers) for part in selection.parts
    ]
    of = (selection.component, selection.position, selection.digest, selection.layers)
    name = f"resid-{tokenize(of, origin, dtype)}"
    columns = []
    for at in range(len(selection.layers)):
        parts = [(part, int(np.flatnonzero(part.at == at)[0])) for part in selection.parts if at in part.at]
        graph: dict[Any, Any] = {
            (f"{name}-{at}", i, 0): (_Layer(selection, part, index, dtype, f"{name}-{at}-{i}"),)
            for i, (part, index) in enumerate(parts)
        }
        chunks = (tuple(len(part.into) for part, _ in parts), (selection.d_model,))
        column = da.Array(graph, f"{name}-{at}", chunks, dtype=target)
        into = np.concatenate([part.into for part, _ in parts])
        order = np.argsort(into)
        if not np.array_equal(order, np.arange(len(into))):
            column = column[order]
        columns.append(column)
    return da.stack(columns, axis=1) if selection.layer_axis else columns[0]


@dataclass(frozen=True)
class _Layer:
    """A task: read one part at one layer, [row, d_model]."""

    selection: Selection
    part: Part
    index: int
    dtype: Dtype
    name: str

    def __call__(self) -> npt.NDArray[Any]:
        return self.selection.read(self.part.only(self.index), self.dtype, _POOL)[:, 0]

    def __dask_tokenize__(self) -> str:
        # Dask would hash every row key, for every task.
        return self.name


def to_xarray(selection: Selection, dtype: Dtype = "float32") -> xarray.DataArray:
    """Return a lazy xarray.DataArray: ``.sel(row=key, layer=14)``; attributes say site, position, model and captures.

    Of all tokens, `row` goes along the tokens, and ``.sel(row=key)`` gives those of the row.
    """
    try:
        import xarray as xr
    except ImportError as error:
        raise _missing("xarray", error) from None
    rows = np.array(selection.row_keys, dtype=object)
    coordinates: dict[str, Any] = {}
    if selection.position == ALL_TOKENS:
        assert selection.offsets is not None
        of = selection.token_rows
        coordinates["row"] = ("token", rows[of])
        coordinates["token_index"] = ("token", np.arange(len(of)) - selection.offsets[of])
    else:
        coordinates["row"] = rows
    layers = np.array(selection.layers)
    coordinates["layer"] = layers if selection.layer_axis else int(layers[0])
    plan = selection.parts[0].generation.plan
    attributes = {
        "component": selection.component,
        "position": selection.position,
        "model": plan.model,
        "captures": sorted({part.generation.id for part in selection.parts}),
        "stored_dtype": str(selection.stored_dtype),
    }
    array = xr.DataArray(
        to_dask(selection, dtype), coords=coordinates, dims=selection.dims, name=selection.component, attrs=attributes
    )
    return array.set_xindex("row") if selection.position == ALL_TOKENS else array


def to_torch(selection: Selection, dtype: Dtype = "float32") -> torch.Tensor:
    """Return a torch tensor on the CPU."""
    try:
        import torch
    except ImportError as error:
        raise _missing("torch", error) from None
    values = selection.to_numpy(dtype)
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
