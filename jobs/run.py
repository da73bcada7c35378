"""The whole study: every stage in turn, again as long as one makes work for another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs.context import Context, StageReport
from jobs.judging import missing_keys, study_judges
from jobs.progress import Progress
from jobs.stage import (
    STAGES,
    add_study_arguments,
    describe,
    exit_code,
    guarded,
    require_complete,
    run_stage,
    study_from,
)
from jobs.summary import print_summary
from pipeline.cluster import Cluster
from store.errors import MissingDataError


def run_all(context: Context, cluster: Cluster, progress: Progress) -> list[StageReport]:
    """Run all stages until none has anything left that it can do.

    Directions read at response positions need generated text, which comes from replay, which may itself use
    directions: a round through all stages does what it can, and the next round what this one made possible.

    Returns:
        One report per stage: sums over the rounds, and what still waits after the last.
    """
    totals = {stage: StageReport(stage) for stage in STAGES}
    while True:
        progressed = waits = False
        for stage in STAGES:
            try:
                report = run_stage(stage, context, cluster, progress)
            except MissingDataError as error:
                report = StageReport(stage, waiting=[str(error)])
            total = totals[stage]
            total.cached = report.cached if total.done == 0 else total.cached
            total.done += report.done
            total.unit, total.waiting, total.notes = report.unit, report.waiting, report.notes
            total.set_aside = report.set_aside
            total.failed += [line for line in report.failed if line not in total.failed]
            progressed |= report.done > 0
            waits |= bool(report.waiting)
            if report.done:
                progress.say(next(describe(report)))
        if not (progressed and waits) or any(total.failed for total in totals.values()):
            break
    return list(totals.values())


def run(arguments: argparse.Namespace) -> int:
    """Run a study with parsed arguments and print its result table.

    Raises:
        BlocksFailedError: if blocks were set aside.
        MissingDataError: if something still waits in the end.
    """
    study = study_from(arguments)
    progress = Progress(arguments.quiet)
    context = Context(study)
    for name in missing_keys(study_judges(study)):
        progress.say(f"note: {name} is not set; texts that a judge has to score with it will wait")
    with Cluster(study.ray) as cluster:
        reports = run_all(context, cluster, progress)
    for report in reports:
        for line in describe(report):
            print(line)
    require_complete(reports)
    waiting = [line for report in reports for line in report.waiting]
    if waiting:
        raise MissingDataError("the study is not complete:\n  " + "\n  ".join(waiting))
    print_summary(context)
    return exit_code(reports)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m jobs.run``."""
    parser = argparse.ArgumentParser(prog="python -m jobs.run", description=__doc__)
    add_study_arguments(parser)
    arguments = parser.parse_args(argv)
    sys.exit(guarded(lambda: run(arguments)))


if __name__ == "__main__":
    main()
