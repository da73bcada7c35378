"""``resid check-model``: load a study's model, test its sites, and measure whether its texts depend on their batch."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from jobs.context import Context, table_of
from jobs.stage import add_study_arguments, study_from
from store.errors import StudyError
from store.fingerprint import short
from store.location import Location
from store.results import ResultStore

N_PROMPTS = 6
MOST_TOKENS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``resid check-model``."""
    add_study_arguments(parser)
    parser.add_argument("--prompts", type=int, default=N_PROMPTS, metavar="N", help="prompts to generate from")
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, metavar="N", help="the most tokens of a text")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure, keep the receipt with the results, and print it.

    Raises:
        StudyError: if the study replays nothing.
        ModelError: if the model cannot be loaded or fails the site self-test.
    """
    from pipeline.chat import prompt_row
    from pipeline.exactness import agreements
    from pipeline.models import load

    study = study_from(arguments)
    if study.replay is None:
        raise StudyError("the study replays nothing", file=str(study.file), key="replay", remedy="add `replay:`")
    context = Context(study)
    prompts = [prompt for _, prompt in context.prompts_of(study.replay.prompts)][: arguments.prompts]
    model = load(study.model)
    rows = [prompt_row(p, model.tokenizer, study.model, model.fingerprint, with_response=False) for p in prompts]
    decoding = study.replay.decoding.model_copy(update={"stop": []})
    decoding = decoding.model_copy(update={"max_new_tokens": min(decoding.max_new_tokens, arguments.tokens)})
    records = [
        {
            "model": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device.type),
            "way": one.way,
            "n_texts": one.n_texts,
            "n_equal": one.n_equal,
            "first_difference": one.first_difference,
            "max_new_tokens": decoding.max_new_tokens,
        }
        for one in agreements(model, rows, decoding)
    ]
    context.results.replace("exactness", short(model.fingerprint), table_of("exactness", records))
    if arguments.json:
        print(json.dumps(records, indent=1))
        return 0
    table = Table(title=f"{study.model.source}: texts equal to those of all rows at once", title_justify="left")
    for name in ("way to run", "texts", "equal", "first difference at token (median)"):
        table.add_column(name, justify="left" if name == "way to run" else "right")
    for one in records:
        first = "-" if one["first_difference"] is None else f"{one['first_difference']:g}"
        table.add_row(str(one["way"]), str(one["n_texts"]), str(one["n_equal"]), first)
    Console(width=None if Console().is_terminal else 120, highlight=False).print(table)
    print(noise_floor(context.results.location, model.fingerprint))
    return 0


def noise_floor(results: Location, model: str) -> str:
    """Say in a sentence how many texts of a model depended on their batch, for whoever compares two conditions."""
    table = ResultStore(results).read("exactness", filters=[("model", "=", model)])
    records = table.to_pylist()
    if not records:
        return "Noise floor: not measured. `resid check-model --study FILE` says how many texts depend on their batch."
    worst = min(records, key=lambda record: record["n_equal"] / record["n_texts"])
    differ, n = worst["n_texts"] - worst["n_equal"], worst["n_texts"]
    where = f"{worst['dtype']} on {worst['device']}"
    if not differ:
        return f"Noise floor: 0 of {n} texts depended on their batch ({where})."
    return (
        f"Noise floor: {differ} of {n} texts ({differ / n:.0%}) differed from those of all rows at once when run "
        f"{worst['way']} ({where}). A smaller difference between conditions may be that alone."
    )
