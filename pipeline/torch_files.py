"""Tensors of ``.pt`` files as NumPy arrays, without running what a pickle may hold."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from store.errors import MismatchError, StudyError
from store.tensor_files import Tensor as StoredTensor


def read_torch_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a ``torch.save`` file: a tensor, or dicts and lists of tensors.

    Nested names are joined with dots; a lone tensor is named "tensor". What is no tensor is left out.

    Raises:
        StudyError: if there is no such file.
        MismatchError: if it is none, or holds objects that only running its code could restore.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StudyError("there is no such file", file=str(path)) from None
    # Whatever a damaged pickle makes of itself.
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MismatchError(
            f"{path}: this is no file of plain tensors ({reason})\n"
            "  remedy: load it where you trust it, and save its tensors with safetensors"
        ) from None
    return {name: _stored(value) for name, value in _tensors(loaded, "")}


def _tensors(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "tensor", value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}.{index}" if name else str(index))


def _stored(value: Tensor) -> StoredTensor:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided:
        dtype = f"{dtype} ({value.layout})"
    return StoredTensor(dtype, tuple(value.shape), lambda: _array(value.detach()))


def _array(value: Tensor) -> npt.NDArray[Any]:
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(np.dtype(ml_dtypes.bfloat16))
    array: npt.NDArray[Any] = value.contiguous().numpy()
    return array
