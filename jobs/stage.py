"""How a stage is run: alone by ``python -m jobs.<stage>`` or ``resid <stage>``, or in turn by ``resid run``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from jobs.context import Context, StageReport
from jobs.failures import INCOMPLETE
from jobs.judging import check_judges
from jobs.progress import Progress
from pipeline.cluster import Cluster
from store.errors import BlocksFailedError, ResidError, StudyError
from store.ray_settings import RaySettings
from store.study import Study
from store.study_file import load_study

STAGES = ("capture", "directions", "geometry", "replay", "score", "compare")
Item = TypeVar("Item")
Result = TypeVar("Result")


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every stage takes; they override the study file."""
    parser.add_argument("--study", required=True, metavar="FILE", help="the study file (YAML)")
    parser.add_argument("--store", metavar="URL", help="activation store: a folder or an fsspec URL")
    parser.add_argument("--results", metavar="URL", help="result tables: a folder or an fsspec URL")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="auto (default), local, off (in this process), or the address of a cluster"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="model workers at the same time")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def study_from(arguments: argparse.Namespace) -> Study:
    """Read the study that the arguments name, with their overrides.

    Raises:
        StudyError: if the study is wrong.
    """
    study = load_study(arguments.study)
    overrides = {key: value for key in ("store", "results") if (value := getattr(arguments, key)) is not None}
    ray = {"address": arguments.ray, "workers": arguments.workers}
    ray = {key: value for key, value in ray.items() if value is not None}
    try:
        settings = RaySettings.model_validate({**study.ray.model_dump(), **ray})
    except ValidationError as error:
        first = error.errors()[0]
        message = str(first["msg"]).removeprefix("Value error, ")
        flags = "/".join(f"--{'ray' if key == 'address' else key}" for key in first["loc"])
        raise StudyError(message, key=flags, remedy="see `resid run --help`") from None
    # Only `analysis` knows the judges; a typo in one is to be heard before the model runs, not after.
    check_judges(study)
    return study.model_copy(update={**overrides, "ray": settings})


def run_stage(stage: str, context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Run one stage and return what it did.

    Raises:
        ResourceError: before any work, if results are on object storage that cannot be written or replaces objects.
    """
    context.results.location.require_first_wins()
    module = importlib.import_module(f"jobs.{stage}")
    context.forget_answers()
    report = module.run(context, cluster, progress)
    assert isinstance(report, StageReport)
    return report


def describe(report: StageReport) -> Iterator[str]:
    """Yield the lines that tell a person what a stage did."""
    yield f"{report.stage}: {report.done} {report.unit} done, {report.cached} found"
    yield from (f"  waits: {line}" for line in report.waiting)
    yield from (f"  note: {line}" for line in report.notes)
    yield from (f"  set aside: {line}" for line in report.set_aside)
    yield from (f"  FAILED: {line}" for line in report.failed)


def require_complete(reports: Iterable[StageReport]) -> None:
    """Raise if blocks were set aside.

    Raises:
        BlocksFailedError: naming them; everything else is committed.
    """
    failed = [f"{report.stage}: {line}" for report in reports for line in report.failed]
    if failed:
        raise BlocksFailedError(
            f"{len(failed)} block(s) failed and were set aside; all others are committed\n  "
            + "\n  ".join(failed)
            + "\n  remedy: mend the cause and run the same command again: only these are redone"
        )


def exit_code(reports: Iterable[StageReport]) -> int:
    """Return 0 if all was done, 3 if all was done but for what was set aside."""
    return INCOMPLETE if any(report.set_aside for report in reports) else 0


def cpu_map(cluster: Cluster, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Apply a function on CPUs: as Ray tasks where a cluster is there, else here, with Dask's threads inside.

    A Ray started on this very machine only for seconds of CPU work would cost more than it brings, so `auto` does not
    start one; `--ray local` does.
    """
    if cluster.at_hand:
        yield from cluster.map(function, items)
    else:
        yield from map(function, items)


def main_for(stage: str, argv: Sequence[str] | None = None) -> None:
    """Entry point of one stage: parse arguments, run it, report, exit with 0, 3 or 1.

    3: all was done but for what was set aside. 1: it was stopped, or blocks failed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{stage}", description=f"Run the stage {stage} of a study.")
    add_study_arguments(parser)
    arguments = parser.parse_args(argv)
    sys.exit(guarded(lambda: run_one(stage, arguments)))


def run_one(stage: str, arguments: argparse.Namespace) -> int:
    """Run one stage with parsed arguments.

    Raises:
        StaleError: if it would work on what an older version of the study left; nothing is written then.
        BlocksFailedError: if blocks were set aside.
    """
    from jobs.freshness import require_fresh

    study = study_from(arguments)
    progress = Progress(arguments.quiet)
    context = Context(study)
    require_fresh(stage, context)
    with Cluster(study.ray) as cluster:
        report = run_stage(stage, context, cluster, progress)
    for line in describe(report):
        print(line)
    require_complete([report])
    return exit_code([report])


def guarded(action: Callable[[], Any]) -> int:
    """Run an action; turn resid's errors into a message and an exit code, without a traceback."""
    try:
        return int(action() or 0)
    except ResidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: whatever was finished is kept; run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing is left to say
        return 0
