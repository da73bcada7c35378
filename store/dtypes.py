"""A ``bfloat16`` data type for Zarr v3, which zarr-python 3.1 lacks, and safe up- and downcasts.

The stored name is the one that tensorstore, zarrs and the zarr-extensions registry use, so files open there as they
are. Importing this module registers the type; the NumPy scalar type comes from ml_dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
from zarr.core.dtype.npy.float import BaseFloat
from zarr.dtype import data_type_registry

DTypeName = Literal["float32", "float16", "bfloat16"]
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """16 bits: sign, 8 exponent bits, 7 fraction bits. Same range as float32."""

    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))
    _zarr_v3_name = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @property
    def item_size(self) -> int:
        return 2


def _register() -> None:
    if "bfloat16" not in data_type_registry.contents:
        data_type_registry.register("bfloat16", BFloat16)


_register()


def to_storage(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Cast activations to their storage dtype.

    Raises:
        OverflowError: if a finite value does not fit (float16 ends at 65504; SmolLM2's first token reaches 24,926).
    """
    target = NUMPY_DTYPES[dtype]
    if values.dtype == target:
        return values
    with np.errstate(over="ignore"):
        stored = values.astype(target)
    lost = np.isinf(stored) & np.isfinite(values)
    if lost.any():
        largest = np.abs(values[lost].astype(np.float64)).max()
        raise OverflowError(f"{largest:.6g} does not fit {dtype}")
    return stored


def to_float32(values: npt.NDArray[Any], out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
    """Upcast stored activations exactly; arithmetic on the 16-bit types themselves loses or overflows.

    Args:
        out: where to put them, of the same shape; None for a new array (or `values`, if that is float32).
    """
    if values.dtype == NUMPY_DTYPES["bfloat16"]:
        out = np.empty(values.shape, dtype=np.float32) if out is None else out
        # bfloat16 is the upper half of float32. Five times faster than a cast.
        np.left_shift(values.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
        return out
    if out is None:
        return values.astype(np.float32, copy=False)
    np.copyto(out, values)
    return out
