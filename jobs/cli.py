"""The ``resid`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs.stage import STAGES, add_study_arguments, guarded, run_one
from store.code_version import code_version
from store.location import Location
from store.study_file import load_study

EPILOG = (
    "A study file says everything; studies/demo.yaml documents its keys. Exit codes: 0 complete; 3 complete but for "
    "what is listed as set aside (table failures); 1 stopped, with the remedy; 130 interrupted."
)


class _Version(argparse.Action):
    """Print the version; only then is git asked for the commit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"resid {code_version()}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    from jobs import check_model, report, reproduce, results, sql, store, traits, verify

    parser = argparse.ArgumentParser(
        prog="resid", description="Residual-stream directions in chat models.", epilog=EPILOG
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version, with the commit of a checkout")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    helps = {
        "capture": "run the model over the prompts and commit what the store lacks",
        "directions": "compute directions from the cache",
        "geometry": "cosines of directions, projections of rows",
        "replay": "generate text under interventions",
        "score": "label the texts with the study's judges",
        "compare": "compare conditions prompt by prompt, as the study plans",
    }
    for stage in STAGES:
        add_study_arguments(commands.add_parser(stage, help=helps[stage]))
    add_study_arguments(commands.add_parser("run", help="all stages, until the study is complete"))
    add_study_arguments(commands.add_parser("plan", help="what each stage would do; loads no weights"))
    report.add_arguments(commands.add_parser("report", help="write the results as a page with plots"))
    claims = commands.add_parser("reproduce", help="write what the study shows of each claim into a document")
    reproduce.add_arguments(claims)
    ask = commands.add_parser("sql", help="ask the results in SQL")
    ask.add_argument("--study", metavar="FILE", help="ask the results of this study")
    ask.add_argument("--results", metavar="URL", help="result tables: a folder or an fsspec URL")
    ask.add_argument("--store", metavar="URL", help="activation store, for the functions that read activations")
    sql.add_arguments(ask)
    verify.add_arguments(commands.add_parser("verify", help="check every committed byte"))
    traits.add_arguments(commands.add_parser("traits", help="check trait files, and list what is wrong"))
    store.add_arguments(commands.add_parser("store", help="the activation store: ls, verify, gc, export, import"))
    check_model.add_arguments(
        commands.add_parser("check-model", help="test a model: its sites, its texts in other batches")
    )
    results.add_arguments(commands.add_parser("results", help="the result tables: ls, verify, gc"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``resid``."""
    arguments = build_parser().parse_args(argv)
    sys.exit(guarded(lambda: _dispatch(arguments)))


def _dispatch(arguments: argparse.Namespace) -> int:
    from jobs import check_model, plan, report, reproduce, results, run, sql, store, traits, verify
    from jobs.freshness import tell_stale

    command: str = arguments.command
    if command in STAGES:
        return run_one(command, arguments)
    if command == "sql":
        study = load_study(arguments.study) if arguments.study else None
        if study is not None:
            tell_stale(study, arguments.results)
        places = [Location.of(verify.place(what, getattr(arguments, what), study)) for what in ("results", "store")]
        return sql.run_arguments(arguments, *places)
    handlers = {"run": run.run, "plan": plan.run, "report": report.run, "verify": verify.run, "store": store.run}
    handlers |= {"traits": traits.run, "reproduce": reproduce.run, "results": results.run}
    handlers |= {"check-model": check_model.run}
    return int(handlers[command](arguments) or 0)


if __name__ == "__main__":
    main()
