"""Figures of a report as SVG text: numbers in, drawings out. Nothing here asks for data.

An SVG from here stands on its own inside a page: no fonts, scripts or references to elsewhere, ids that start with the
figure's name, and text that stays text. Colours are those of Okabe & Ito (2008), which colour-blind readers can tell
apart, without yellow; beyond seven lines the dashes change.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
DASHES: tuple[Any, ...] = ("-", (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (7, 2)))
CONTROL: Any = (0, (3.5, 1.8))  # how controls are dashed, whatever their colour
WIDTH = 9.6  # inches; the page scales a figure down where it is narrower
LABEL = 46  # characters of a name in a figure; tables hold the whole of it
GREY = "#666666"

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "resid",  # the same numbers give the same bytes
    "text.parse_math": False,  # a name with two $ is no formula
    "text.usetex": False,
}


@dataclass(frozen=True)
class Rate:
    """A share of texts with its interval; ``None`` where nothing is scored."""

    label: str
    n: int  # texts asked for
    n_scored: int
    n_hits: int
    rate: float | None
    low: float | None
    high: float | None
    depth: int = 0  # 0, or how many controls deep: a control of a control is 2


@dataclass(frozen=True)
class Line:
    """One curve. `style` chooses colour (and beyond seven, dashes): curves of equal style and label are one."""

    label: str
    x: Sequence[float]  # [point]
    y: Sequence[float]  # [point]; NaN leaves a gap
    style: int
    low: Sequence[float] | None = None  # [point], of a band around the curve
    high: Sequence[float] | None = None
    control: bool = False
    markers: bool = False
    marked: int | None = None  # index of a point to mark with a ring


@dataclass(frozen=True)
class Panel:
    """One set of axes with curves."""

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    y_limits: tuple[float, float] | None = None
    level: float | None = None  # a thin horizontal line: zero, chance
    level_label: str = ""
    shade: tuple[float, float] | None = None  # a grey horizontal band
    log: bool = False
    whole_x: bool = True  # ticks at whole numbers only (layers, tokens)
    references: Sequence[tuple[str, float]] = ()  # named dotted horizontal lines


def rate_dots(name: str, panels: Sequence[tuple[str, Sequence[Rate]]], x_label: str, hits: str) -> str:
    """Draw rates as dots with whiskers, a row per label, panels side by side.

    Args:
        name: of the figure; ids in the SVG start with it.
        panels: (title, rates); every panel has the same labels in the same order.
        x_label: what the rate is, with its unit.
        hits: what is counted, for the figure's description.

    Returns:
        The SVG element. Next to each row stand the counts, and how many texts have no score.

    Raises:
        ValueError: if there is nothing to draw or the panels' labels differ.
    """
    labels = [rate.label for rate in panels[0][1]] if panels else []
    if not labels or any([rate.label for rate in rates] != labels for _, rates in panels):
        raise ValueError("rate_dots needs panels with the same labels, at least one")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _figure(rows * (0.25 * len(labels) + 0.85)) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for i, axes in enumerate(grid.flat):
            if i < len(panels):
                _dots(axes, *panels[i], x_label)
            else:
                axes.set_axis_off()
            if i + columns >= len(panels):
                axes.tick_params(labelbottom=True)
        grid[0, 0].set_yticks(
            range(len(labels)), ["\u2514 " * bool(rate.depth) + clip(rate.label) for rate in panels[0][1]]
        )
        grid[0, 0].set_ylim(len(labels) - 0.4, -0.6)
        return _svg(figure, name, f"{hits}: {x_label} for {', '.join(title for title, _ in panels)}")


def _dots(axes: Axes, title: str, rates: Sequence[Rate], x_label: str) -> None:
    axes.set_title(clip(title, 34))
    axes.set_xlabel(x_label)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for row, rate in enumerate(rates):
        colour = GREY if rate.depth else COLOURS[0]
        axes.axhline(row, color="#f0f0f0", linewidth=0.7, zorder=0)
        if rate.rate is not None and rate.low is not None and rate.high is not None:
            axes.plot([rate.low, rate.high], [row, row], color=colour, linewidth=1.4, solid_capstyle="butt")
            face = "white" if rate.depth else colour
            axes.plot(rate.rate, row, "o", markersize=5, color=colour, markerfacecolor=face, clip_on=False, zorder=3)
        counts = f"{rate.n_hits}/{rate.n_scored}" if rate.n_scored else "not scored"
        unscored = rate.n - rate.n_scored
        if rate.n_scored and unscored:
            counts += f"  ({unscored} unscored)"
        beside = axes.get_yaxis_transform()  # x in panel widths, y in rows
        axes.text(1.03, row, counts, transform=beside, va="center", fontsize=7.5, color="#444444")


def line_panels(name: str, panels: Sequence[Panel], about: str, height: float = 2.6, share_y: bool = False) -> str:
    """Draw curves, up to three panels in a row, with one legend for all below them.

    Args:
        name: of the figure; ids in the SVG start with it.
        panels: what to draw.
        about: the figure's description, for readers who cannot see it.
        height: of one panel, inches.
        share_y: whether all panels have one y axis.

    Raises:
        ValueError: if there is no panel or none has a curve.
    """
    if not any(panel.lines for panel in panels):
        raise ValueError("line_panels needs at least one curve")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    handles = _handles(panels)
    longest = max(len(label) for label, _ in handles)
    per_row = max(1, int((WIDTH - 0.3) / (0.075 * longest + 0.6)))
    legend_rows = math.ceil(len(handles) / per_row)
    with _figure(rows * (height + 0.35) + 0.19 * legend_rows + 0.2) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
        for i, axes in enumerate(grid.flat):
            if i < len(panels):
                _curves(axes, panels[i], with_y_label=not share_y or i % columns == 0)
            else:
                axes.set_axis_off()
        figure.legend(
            [handle for _, handle in handles],
            [label for label, _ in handles],
            loc="outside lower left",
            ncols=per_row,
            handlelength=2.6,
            columnspacing=1.4,
        )
        return _svg(figure, name, about)


def _curves(axes: Axes, panel: Panel, with_y_label: bool) -> None:
    axes.set_title(clip(panel.title, 40))
    axes.set_xlabel(panel.x_label)
    if with_y_label:
        axes.set_ylabel(panel.y_label)
    axes.grid(axis="y")
    if panel.whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if panel.shade is not None:
        axes.axhspan(*panel.shade, color="#eeeeee", linewidth=0, zorder=0)
    if panel.level is not None:
        axes.axhline(panel.level, color="#888888", linewidth=0.9, zorder=1)
    for _, value in panel.references:
        axes.axhline(value, color="#222222", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    for line in panel.lines:
        colour, dashes = _look(line)
        x, y = np.asarray(line.x, dtype=np.float64), np.asarray(line.y, dtype=np.float64)
        if line.low is not None and line.high is not None:
            axes.fill_between(x, _array(line.low), _array(line.high), color=colour, alpha=0.13, linewidth=0)
        # A curve of one point would be invisible.
        marker = "o" if line.markers or np.isfinite(y).sum() < 2 else None
        axes.plot(x, y, color=colour, linestyle=dashes, marker=marker, markersize=4)
        if line.marked is not None:
            axes.plot(x[line.marked], y[line.marked], "o", markersize=8, markerfacecolor="none", color=colour)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if panel.y_limits is not None:
        axes.set_ylim(*panel.y_limits)


def _handles(panels: Sequence[Panel]) -> list[tuple[str, Line2D]]:
    found: dict[tuple[object, ...], tuple[str, Line2D]] = {}
    for panel in panels:
        for line in panel.lines:
            colour, dashes = _look(line)
            marker = "o" if line.markers else None
            handle = Line2D([], [], color=colour, linestyle=dashes, marker=marker, markersize=4)
            found.setdefault((line.label, line.style, line.control), (clip(line.label), handle))
        for label, _ in panel.references:
            handle = Line2D([], [], color="#222222", linewidth=1, linestyle=(0, (1, 2)))
            found.setdefault(("reference", label), (clip(label), handle))
        if panel.level_label:
            handle = Line2D([], [], color="#888888", linewidth=0.9)
            found.setdefault(("level", panel.level_label), (panel.level_label, handle))
    return list(found.values())


def _look(line: Line) -> tuple[str, Any]:
    dashes = CONTROL if line.control else DASHES[line.style // len(COLOURS) % len(DASHES)]
    return COLOURS[line.style % len(COLOURS)], dashes


def heatmap(name: str, labels: Sequence[str], values: npt.NDArray[np.float64], title: str, about: str) -> str:
    """Draw a square matrix of values in [-1, 1] with its numbers; NaN stays white.

    Args:
        name: of the figure; ids in the SVG start with it.
        labels: of rows and columns.  # [item]
        values: [item, item].
        title: above the matrix.
        about: the figure's description, for readers who cannot see it.

    Raises:
        ValueError: if the shapes do not fit.
    """
    n = len(labels)
    if n == 0 or values.shape != (n, n):
        raise ValueError(f"heatmap needs a square matrix for its {n} labels, got the shape {values.shape}")
    names = [clip(label, 30) for label in labels]
    across = 0.075 * max(map(len, names)) + 0.2
    # The cells shrink before the figure grows wider than the page.
    cell = min(0.52, (WIDTH - across - 0.9) / n)
    with _figure(n * cell + across + 0.5, min(WIDTH, n * cell + across + 1.1)) as figure:
        axes = figure.subplots()
        mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap="RdBu_r", vmin=-1, vmax=1, edgecolor="white")
        axes.set_aspect("equal")
        axes.invert_yaxis()
        centres = np.arange(n) + 0.5
        size = min(8.0, 56 * cell)  # points: a line of text fits a cell
        axes.set_xticks(centres, names, rotation=90, fontsize=size)
        axes.set_yticks(centres, names, fontsize=size)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(title)
        _colour_bar(figure, axes, mesh)
        if cell >= 0.36:
            for i, j in np.argwhere(np.isfinite(values)):
                colour = "white" if abs(values[i, j]) > 0.62 else "#222222"
                text = f"{values[i, j]:.2f}".replace("-", "\u2212")
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7, color=colour)
        return _svg(figure, name, about)


def _colour_bar(figure: Figure, axes: Axes, mesh: QuadMesh) -> None:
    bar = figure.colorbar(mesh, ax=axes, label="cosine (no unit)", shrink=0.8)
    # As an image, which many colours become by default, the page's policy would keep it from being shown.
    assert bar.solids is not None
    bar.solids.set_rasterized(False)
    bar.solids.set_edgecolor("face")


def clip(text: str, length: int = LABEL) -> str:
    """Shorten a name in its middle, where names of conditions differ least, and drop what XML cannot hold."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    if len(text) <= length:
        return text
    tail = length // 2
    return f"{text[: length - 1 - tail]}\u2026{text[-tail:]}"


def _array(values: Sequence[float]) -> npt.NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


@contextmanager
def _figure(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """Yield an empty figure under this module's style; pyplot and its global state stay out of it."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        # Text is kept as text: a reader's browser has the glyphs that the measuring font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, name: str, about: str) -> str:
    """Return a figure as an SVG element for use inside HTML: no namespaces, no metadata, ids of its own."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    root = ElementTree.fromstring(stream.getvalue())
    for element in root.iter():
        element.tag = _local(str(element.tag))
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id":
                value = f"{name}-{value}"
            elif _local(key) == "href" and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            element.attrib[_local(key)] = value.replace("url(#", f"url(#{name}-")
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.attrib.pop("version", None)
    root.attrib |= {"role": "img", "class": "figure", "style": f"max-width:{width * 4 / 3:.0f}px"}
    description = ElementTree.Element("title")
    description.text = clip(about, 400)
    root.insert(0, description)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
