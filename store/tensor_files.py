"""Tensors of ``.safetensors``, ``.npz`` and ``.npy`` files by name, read when they are needed, without running code."""

from __future__ import annotations

import contextlib
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from store.errors import MismatchError, StudyError

FLOATS = ("float64", "float32", "float16", "bfloat16")
_SAFETENSORS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not read yet.

    Attributes:
        dtype: its name; NumPy's where NumPy has it.
        read: returns its values. Only for the dtypes of `FLOATS`.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any]]

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Tensor:
        """Return what is in memory already."""
        return cls(values.dtype.name, values.shape, lambda: values)


Tensors = Mapping[str, Tensor]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name; the one of a ``.npy`` file is named "array".

    Raises:
        StudyError: if there is no such file.
        MismatchError: if it is none of these, or is cut or damaged.
    """
    readers = {".safetensors": _safetensors, ".npz": _npz, ".npy": _npy}
    if path.suffix not in readers:
        known = ", ".join((*readers, ".pt"))
        raise MismatchError(
            f"{path}: this is no file of tensors by its name; files that can be imported end in {known}"
        )
    with _reading(path):
        tensors = readers[path.suffix](path)

    def guarded(read: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        with _reading(path):
            return read()

    return {name: replace(each, read=partial(guarded, each.read)) for name, each in tensors.items()}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise StudyError("there is no such file", file=str(path)) from None
    except (ValueError, OSError, EOFError, SafetensorError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise MismatchError(f"{path}: this file cannot be read ({error})\n  remedy: get it once more") from None


def _safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="numpy"):
        pass  # compares header and size
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)

    def tensor(dtype: str, shape: tuple[int, ...], start: int) -> Tensor:
        kind = _SAFETENSORS.get(dtype)
        if kind is None:
            return Tensor(dtype, shape, _unreadable)
        return Tensor(np.dtype(kind).name, shape, lambda: np.memmap(path, kind, "r", 8 + length + start, shape, "C"))

    return {
        name: tensor(record["dtype"], tuple(record["shape"]), record["data_offsets"][0])
        for name, record in header.items()
    }


def _npy(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as stream:
        shape, dtype = _header(stream)
    return {"array": Tensor(dtype, shape, lambda: np.load(path, mmap_mode="r", allow_pickle=False))}


def _npz(path: Path) -> dict[str, Tensor]:
    def read(name: str) -> npt.NDArray[Any]:
        with np.load(path, allow_pickle=False) as found:
            values: npt.NDArray[Any] = found[name]
        return values

    tensors = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as stream:
                    shape, dtype = _header(stream)
                name = member.removesuffix(".npy")
                tensors[name] = Tensor(dtype, shape, lambda name=name: read(name))  # type: ignore[misc]
    return tensors


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of an array in NumPy's format."""
    read_header: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in read_header:
        return (), f"an array of NumPy's format {version}"
    shape, _, dtype = read_header[version](stream)
    return shape, str(dtype.name)


def _unreadable() -> npt.NDArray[Any]:
    raise AssertionError("only tensors of floats are read")
