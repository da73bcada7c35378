"""The report's sections on how directions lie to each other across layers, beside chance, and what they separate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from analysis import page
from analysis.page import Html
from jobs.report_source import Record, Source, as_number
from jobs.report_sql import ALIGNMENTS, COSINE_NULLS, EXPLAINED_VARIANCE, SEPARABILITY

if TYPE_CHECKING:
    from analysis.plots import Line

PAIRS = 6  # pairs of directions drawn beside their nulls
RANKS = 3  # components drawn by layer
CURVES = 7  # directions in one figure
UNTIL = 0.05  # p-values counted as small


def alignments(source: Source) -> list[Html]:
    import numpy as np

    from analysis.layer_plots import layer_heatmap

    sql = source.sql(ALIGNMENTS)
    body: list[Html] = []
    for number, (key, group) in enumerate(
        groupby(
            in_order(source, source.ask(sql), "direction_a", "direction_b"),
            key=lambda r: (r["direction_a"], r["direction_b"]),
        )
    ):
        records = list(group)
        rows, columns = (sorted({record[f"layer_{side}"] for record in records}) for side in "ab")
        values = np.full((len(rows), len(columns)), np.nan)
        for record in records:
            values[rows.index(record["layer_a"]), columns.index(record["layer_b"])] = record["cosine"]
        labels = [f"{name} at {records[0][f'component_{side}']}, layer" for name, side in zip(key, "ab", strict=True)]
        about = f"cosine of {key[0]} at each layer with {key[1]} at each layer"
        body.append(
            page.figure(layer_heatmap(f"alignment-{number}", rows, columns, values, labels[0], labels[1], about))
        )
    if not body:
        return [_missing(source, "alignments", "alignment: [{pair: [one, other]}]")]
    return [
        *body,
        page.note("Each direction against itself shows where it turns: cosines far from the diagonal."),
        page.sql(sql),
    ]


def nulls(source: Source) -> list[Html]:
    from analysis.plots import Line, Panel, clip, line_panels

    sql = source.sql(COSINE_NULLS)
    pairs: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in in_order(source, source.ask(sql), "direction_a", "direction_b"):
        key = (record["direction_a"], record["direction_b"], record["component"])
        pairs.setdefault(key, {}).setdefault(record["null"], []).append(record)
    if not pairs:
        return [_missing(source, "cosines beside chance", "cosine_nulls: {directions: all}")]
    panels, rows = [], []
    for (a, b, component), by_null in pairs.items():
        first = by_null["random"]
        lines = [Line("cosine", [r["layer"] for r in first], [r["cosine"] for r in first], 0)]
        row: list[object] = [f"{a} \u00b7 {b}", component, len(first)]
        for style, (null, label) in enumerate(
            (("random", "random directions"), ("permuted_labels", "permuted labels"))
        ):
            records = by_null.get(null, [])
            small = sum(record["p_holm"] < UNTIL for record in records)
            row.append(f"{small} of {len(records)}" if records else None)
            if records:
                curves = ([r[column] for r in records] for column in ("layer", "q500", "q025", "q975"))
                x, middle, low, high = curves
                lines.append(
                    Line(f"{label}: median, 95% of {records[0]['draws']}", x, middle, 1 + style, low, high, True)
                )
        rows.append(row)
        panels.append(
            Panel(f"{clip(a, 15)} \u00b7 {clip(b, 15)}", lines, "layer", "cosine (no unit)", (-1.03, 1.03), level=0.0)
        )
    about = f"cosine by layer beside two nulls, for {len(panels[:PAIRS])} pairs of directions"
    body: list[Html] = [page.figure(line_panels("nulls", panels[:PAIRS], about, share_y=True))]
    if len(panels) > PAIRS:
        body.append(page.note(f"Drawn: the first {PAIRS} of {len(panels)} pairs. The table has all."))
    text = "Activations vary in few dimensions, so random directions are a lenient null; permuted labels keep how rows "
    text += (
        "vary. Directions of the same rows have their labels permuted alike. p-values are adjusted over the pairs of a "
    )
    body.append(page.note(text + "layer (Holm), not over layers."))
    small = f"#layers with p < {UNTIL:g},"
    heads = ["pair", "component", "#layers", f"{small} random", f"{small} permuted labels"]
    return [*body, page.table(heads, rows), page.sql(sql)]


def explained_variance(source: Source) -> list[Html]:
    from analysis.plots import Line, Panel, line_panels

    sql = source.sql(EXPLAINED_VARIANCE)
    body: list[Html] = []
    notes: list[Html] = []
    for number, (key, group) in enumerate(groupby(source.ask(sql), key=lambda r: (r["analysis"], r["component"]))):
        records = list(group)
        by_layer = []
        for rank in range(1, RANKS + 1):
            mine = [record for record in records if record["rank"] == rank]
            if mine:
                by_layer.append(_band(f"PC{rank}, 95% interval", "layer", mine, "share", "low", "high", rank - 1))
        layers = sorted({record["layer"] for record in records})
        middle = layers[len(layers) // 2]
        mine = [record for record in records if record["layer"] == middle]
        sums = ("cumulative", "cumulative_low", "cumulative_high")
        cumulative = _band("first components together, 95% interval", "rank", mine, *sums, RANKS)
        single = Line("one component", [r["rank"] for r in mine], [r["share"] for r in mine], RANKS + 1, markers=True)
        label, limits = "share of variance (no unit)", (-0.03, 1.03)
        panels = [Panel(f"{key[0]} at {key[1]}", by_layer, "layer", label, limits)]
        panels.append(Panel(f"at {key[1]}.{middle}", [cumulative, single], "component", label, limits))
        about = f"explained variance of {key[0]}, by layer and by component"
        body.append(page.figure(line_panels(f"explained-{number}", panels, about, height=3.0)))
        kept = sorted({record["n_kept"] for record in records})
        dropped = sorted({name for record in records for name in json.loads(record["duplicates"])})
        counts = str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
        text = f"{key[0]}: {counts} of {mine[0]['n_directions']} directions"
        text += f", {mine[0]['resamples']} bootstrap samples of directions. "
        text += f"Near-duplicates dropped at some layer: {', '.join(dropped)}. " if dropped else ""
        lift = mine[0]["bootstrap_mean"] - mine[0]["share"]
        text += (
            f"Samples repeat directions, which lifts the share of PC1 by {lift:.3f} at layer {middle}; the intervals "
        )
        notes.append(page.note(text + "are corrected for that."))
    if not body:
        return [_missing(source, "explained variance", "explained_variance: {all: {directions: all}}")]
    return [*body, *notes, page.sql(sql)]


def separability(source: Source) -> list[Html]:
    from analysis.plots import Panel, line_panels

    sql = source.sql(SEPARABILITY)
    records_of_all = in_order(source, source.ask(sql), "direction", first=("analysis", "position"))
    drawn_by_chance = {record["direction"] for record in source.directions if record["method"].startswith("random")}
    body: list[Html] = []
    rows = []
    for number, (key, group) in enumerate(groupby(records_of_all, key=lambda r: (r["analysis"], r["position"]))):
        curves: dict[str, list[Record]] = {}
        for record in group:
            curves.setdefault(record["direction"], []).append(record)
        aucs, primes = [], []
        for style, (name, records) in enumerate(curves.items()):
            label = name if records[0]["held_out"] else f"{name} (not held out)"
            if style < CURVES:
                control = name in drawn_by_chance
                aucs.append(_band(label, "layer", records, "auc", "auc_low", "auc_high", style, control))
                varying = [record for record in records if record["d_prime_low"] is not None]
                if varying:
                    primes.append(
                        _band(label, "layer", varying, "d_prime", "d_prime_low", "d_prime_high", style, control)
                    )
            middle = records[len(records) // 2]
            counts = (middle["n_positive"], middle["n_negative"], middle["n_training"])
            interval = f"{as_number(middle['auc_low'], 3)} to {as_number(middle['auc_high'], 3)}"
            rows.append([key[0], name, *counts, middle["layer"], as_number(middle["auc"], 3), interval])
        panels = [Panel(f"{key[0]}, rows at {key[1]}", aucs, "layer", "AUC (no unit)", (-0.03, 1.03), level=0.5)]
        if primes:
            panels.append(Panel("d\u2032", primes, "layer", "d\u2032 (standard deviations)", level=0.0))
        about = f"how well directions separate the sides of {key[0]}, by layer"
        body.append(page.figure(line_panels(f"separability-{number}", panels, about, height=3.0)))
    if not body:
        remedy = "separability: {name: {positive: harmful@test, negative: harmless@test}}"
        return [_missing(source, "separability with intervals", remedy)]
    text = "AUC: how often a positive row lies above a negative one. Bands: 95% bootstrap over prompt texts; dashed: "
    text += "random directions, whose intervals are in SQL. A direction is held out if it was computed from none of "
    text += "these prompts. The table shows the middle layer, chosen without looking."
    heads = ["analysis", "direction", "#n positive", "#n negative", "#prompts it was computed from", "#layer", "#AUC"]
    return [
        *body,
        page.note(text),
        page.table([*heads, "#95% interval"], rows),
        page.sql(sql),
    ]


def in_order(source: Source, records: list[Record], *columns: str, first: Sequence[str] = ()) -> list[Record]:
    """Sort records so that directions come in the study's order."""
    order = {name: i for i, name in enumerate(dict.fromkeys(record["direction"] for record in source.directions))}

    def place(record: Record) -> list[object]:
        return [*(record[column] for column in first), *(order.get(record[column], len(order)) for column in columns)]

    return sorted(records, key=place)


def _band(
    label: str,
    along: str,
    records: Sequence[Record],
    y: str,
    low: str,
    high: str,
    style: int,
    control: bool = False,
) -> Line:
    from analysis.plots import Line

    x, values, lows, highs = ([record[column] for record in records] for column in (along, y, low, high))
    if control:
        return Line(label, x, values, style, control=True)
    return Line(label, x, values, style, lows, highs)


def _missing(source: Source, what: str, key: str) -> Html:
    remedy = f"write {key} under geometry, then {source.remedy('geometry')}"
    return page.missing(f"No {what}: the study asks for none, or they wait. Remedy: {remedy}")
