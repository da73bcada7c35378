"""Memory that is used again once nobody holds an array over it: fresh pages cost as much as a copy into them."""

from __future__ import annotations

import sys
import threading
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt


def _references_of_an_unused_array() -> int:
    """Count as `Pool.take` does: how many references a loop and a call hold differs between versions of Python."""
    for base in [np.empty(1, dtype=np.uint8)]:
        return sys.getrefcount(base)
    raise AssertionError


_UNUSED = _references_of_an_unused_array()


class Pool(threading.local):
    """Hands out arrays, each thread its own. One that is still held, also through a view, is never handed out again."""

    def __init__(self, most: int = 4):
        self._most = most
        self._held: list[npt.NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an array of any content, C order."""
        size = prod(shape) * dtype.itemsize
        for base in self._held:
            # NumPy's views all refer to the array that owns the memory.
            if base.nbytes >= size and sys.getrefcount(base) == _UNUSED:
                return base[:size].view(dtype).reshape(shape)
        base = np.empty(size, dtype=np.uint8)
        self._held = [base, *self._held[: self._most - 1]]
        return base[:size].view(dtype).reshape(shape)
