"""What captures are asked for, merged row by row, and what is lacking of it, as boxes that a generation can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from store.dtypes import DTypeName
from store.rows import Row
from store.sites import ALL_TOKENS, Component

AVERAGE = "response_avg"  # the one position that is more than a token

# What some rows lack: components, layers, positions, storage dtype.
Box = tuple[tuple[Component, ...], tuple[int, ...], tuple[str, ...], DTypeName]


@dataclass(frozen=True)
class CaptureRequest:
    """Rows of one model and what is wanted of each of them."""

    rows: tuple[Row, ...]
    components: tuple[Component, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    dtype: DTypeName


@dataclass(frozen=True)
class Need:
    """What one row still lacks at one storage dtype."""

    row: Row
    dtype: DTypeName
    gaps: dict[tuple[Component, str], set[int]]  # (component, position) -> layers

    def take(self, components: Sequence[str], layers: Iterable[int], positions: Sequence[str]) -> bool:
        """Strike what a generation holds of the row; return whether that was anything.

        All tokens hold every position that is one token.
        """
        taken = False
        for (component, position), missing in self.gaps.items():
            there = position in positions or (ALL_TOKENS in positions and position != AVERAGE)
            if component in components and there and not missing.isdisjoint(layers):
                missing.difference_update(layers)
                taken = True
        return taken

    def boxes(self) -> Iterator[Box]:
        """Yield products of components, layers and positions that hold just what is lacking, each once."""
        lacking: dict[tuple[Component, tuple[int, ...], bool], list[str]] = {}
        for (component, position), gap in self.gaps.items():
            ragged = position == ALL_TOKENS  # they have a layout, hence a box, of their own
            missing = gap if ragged or position == AVERAGE else gap - self.gaps.get((component, ALL_TOKENS), set())
            if missing:
                lacking.setdefault((component, tuple(sorted(missing)), ragged), []).append(position)
        boxes: dict[tuple[tuple[int, ...], tuple[str, ...]], list[Component]] = {}
        for (component, layers, _), positions in lacking.items():
            boxes.setdefault((layers, tuple(positions)), []).append(component)
        for (layers, shared), components in boxes.items():
            yield tuple(components), layers, shared, self.dtype


def merge_requests(requests: Sequence[CaptureRequest], exact: Callable[[str], bool]) -> list[Need]:
    """Return what is wanted of each row; what is wanted twice occurs once, without loss if a request asks for that.

    Args:
        exact: tells whether a storage dtype holds the model's activations without loss.
    """
    lossless: dict[str, Need] = {}
    needs: dict[tuple[str, str], Need] = {}
    for request in sorted(requests, key=lambda request: not exact(request.dtype)):
        is_exact = exact(request.dtype)
        for row in request.rows:
            need = needs.setdefault((row.key, "" if is_exact else request.dtype), Need(row, request.dtype, {}))
            served: dict[tuple[Component, str], set[int]] = {}
            if is_exact:
                lossless[row.key] = need
            elif row.key in lossless:
                served = lossless[row.key].gaps
            for component in request.components:
                for position in request.positions:
                    wanted = set(request.layers) - served.get((component, position), set())
                    if position != AVERAGE:
                        wanted -= served.get((component, ALL_TOKENS), set())
                    need.gaps.setdefault((component, position), set()).update(wanted)
    return list(needs.values())
