"""Figures of layers against layers; like `analysis.plots`, whose figure and SVG they are made with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from analysis import plots


def layer_heatmap(
    name: str,
    rows: Sequence[int],
    columns: Sequence[int],
    values: npt.NDArray[np.float64],
    row_label: str,
    column_label: str,
    about: str,
) -> str:
    """Draw values in [-1, 1] of one direction's layers (rows, the first at the bottom) with another's; NaN stays white.

    Args:
        name: of the figure; ids in the SVG start with it.
        rows, columns: layers, ascending.
        values: [row, column].
        row_label, column_label: of the axes.
        about: the figure's description, for readers who cannot see it.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if not values.size or values.shape != (len(rows), len(columns)):
        raise ValueError(f"layer_heatmap needs {len(rows)} x {len(columns)} values, got the shape {values.shape}")
    with plots._figure(4.2, 5.2) as figure:
        axes = figure.subplots()
        mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap="RdBu_r", vmin=-1, vmax=1)
        for axis, layers in ((axes.xaxis, columns), (axes.yaxis, rows)):
            step = math.ceil(len(layers) / 10)
            axis.set_ticks(np.arange(0, len(layers), step) + 0.5, [str(layer) for layer in layers[::step]])
        axes.set_xlabel(plots.clip(column_label, 60))
        axes.set_ylabel(plots.clip(row_label, 60))
        axes.set_aspect("equal" if len(rows) == len(columns) else "auto")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        plots._colour_bar(figure, axes, mesh)
        return plots._svg(figure, name, about)
