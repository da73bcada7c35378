"""``resid report``: one study's committed results as one HTML page of plots, tables, texts and the SQL behind them.

The page needs nothing but itself: no network, no scripts. A part whose data is not there says so, and what makes it.
Everything comes from SQL over the results, so a page takes seconds and no model library is imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from analysis import page
from analysis.page import Html, Section
from jobs import report_geometry, report_replay, report_structure
from jobs.context import data_location
from jobs.freshness import tell_stale
from jobs.report_source import Source, chosen_model, named_study
from jobs.verify import place
from store.location import Location
from store.sql import connect
from store.study_file import load_study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--study", metavar="FILE", help="the study file (YAML)")
    which.add_argument("--study-name", metavar="NAME", help="a study by name, without its file")
    parser.add_argument("--results", metavar="URL", help="result tables: a folder or an fsspec URL")
    parser.add_argument("--model", metavar="FINGERPRINT", help="its beginning, where a study has results of several")
    parser.add_argument("--output", metavar="FILE", help="file or URL; default: reports/<study>.html in the results")


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print where it is.

    Raises:
        MissingDataError: if the results hold nothing of the study.
        MismatchError: if they hold several models of it and none is chosen.
        StudyError: if the study file is wrong.
    """
    study = load_study(arguments.study) if arguments.study else None
    results = data_location(place("results", arguments.results, study), "results")
    connection = connect(results)
    try:
        name = study.name if study is not None else named_study(connection, results, arguments.study_name)
        source = Source(
            connection, results, name, chosen_model(connection, results, name, arguments.model, study), study
        )
        stale = [] if study is None else tell_stale(study, arguments.results)
        content = report_page(source, stale)
    finally:
        connection.close()
    if arguments.output:
        target = Location.of(arguments.output)
    else:
        target = results / "reports" / f"{name}.html" if results.is_local else Location.of(f"{name}.html")
    target.write(content.encode())
    print(f"report: {target}")
    return 0


def report_page(source: Source, stale: Sequence[str] = ()) -> str:
    """Return the whole page. `stale` says which results are of an older version of the study; it stands on top."""
    parts: list[tuple[str, str, Callable[[Source], list[Html]]]] = [
        ("refusals", "Refusal rates", report_replay.refusals),
        ("sweeps", "Coefficient sweeps", report_replay.sweeps),
        ("cosines", "Cosines of directions", report_geometry.cosines),
        ("alignments", "Alignment of directions across layers", report_structure.alignments),
        ("nulls", "Cosines beside chance", report_structure.nulls),
        ("explained_variance", "Explained variance of directions", report_structure.explained_variance),
        ("directions", "Norms and stability of directions", report_geometry.stability),
        ("projections", "Projections of prompts", report_geometry.projections),
        ("separability", "Separability with intervals", report_structure.separability),
        ("monitored", "Projections while generating", report_replay.monitored),
        ("texts", "Texts side by side", report_replay.texts),
    ]
    sections = [Section(anchor, title, make(source)) for anchor, title, make in parts]
    warnings = [page.paragraph(line, "warning") for line in stale]
    return page.render(f"Study {source.name}", [*warnings, *report_replay.head(source)], sections)
