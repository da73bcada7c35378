"""``resid traits``: check a folder of trait files, and list what is wrong in each."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from analysis.trait_judges import TraitRules
from store.errors import ResidError, StudyError
from store.traits import Trait, load_trait

SUFFIXES = (".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("places", nargs="+", metavar="PLACE", help="a trait file, or a folder of them (searched whole)")
    parser.add_argument("--quiet", action="store_true", help="only what is wrong")


def trait_files(places: Iterable[str]) -> list[Path]:
    """Return the trait files at places, folders searched whole, in order.

    Raises:
        StudyError: for a place that is not there, or a folder without any.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            if not inside:
                raise StudyError(
                    "the folder holds no .yaml file", file=str(place), remedy="name the folder of the traits"
                )
            found += inside
        elif place.exists():
            found.append(place)
        else:
            raise StudyError("there is no such file or folder", file=str(place), remedy="check the path")
    return list(dict.fromkeys(found))


def check(files: Iterable[Path]) -> tuple[dict[Path, Trait], list[StudyError]]:
    """Read trait files; return those that are right, and what is wrong with the others.

    Two files that name the same trait are both right, each by itself; see `remarks`.
    """
    traits: dict[Path, Trait] = {}
    problems: list[StudyError] = []
    for file in files:
        try:
            traits[file] = load_trait(file)
        except StudyError as error:
            problems.append(error)
    return traits, problems


def remarks(traits: dict[Path, Trait]) -> list[str]:
    """Return what is no mistake and still worth knowing, a line each."""
    found = []
    first: dict[str, Path] = {}
    for file, trait in traits.items():
        other = first.setdefault(trait.name, file)
        if other is not file:
            found.append(f"{file}: the trait {trait.name!r} is also in {other}")
        sides = (trait.instructions.positive, trait.instructions.negative)
        shared = set(sides[0]) & set(sides[1])
        if shared:
            found.append(f"{file}: {len(shared)} instruction(s) are on both sides, such as {min(shared)[:60]!r}")
        for what, texts in (("instruction", [*sides[0], *sides[1]]), ("question", trait.questions)):
            repeated = len(texts) - len(set(texts)) - (len(shared) if what == "instruction" else 0)
            if repeated > 0:
                found.append(f"{file}: {repeated} {what}(s) repeat another one; each is used once")
        if not trait.description.strip():
            found.append(f"{file}: there is no description; a model judge will be told the trait's name alone")
    return found


def run(arguments: argparse.Namespace) -> int:
    """Check trait files with parsed arguments.

    Raises:
        ResidError: if one is broken, after all have been listed.
    """
    files = trait_files(arguments.places)
    traits, problems = check(files)
    if not arguments.quiet:
        for file, trait in traits.items():
            try:
                rule = TraitRules().bind(trait).rule
            except ValueError:
                rule = None
            sides = f"{len(trait.instructions.positive)}+{len(trait.instructions.negative)} instructions"
            by_rule = f"rule judge: {rule}" if rule else "needs a model judge, or phrases"
            print(f"{file}: {trait.name}: {sides}, {len(trait.questions)} questions; {by_rule}")
        for line in remarks(traits):
            print(f"note: {line}")
    for problem in problems:
        print(f"WRONG: {problem}")
    if problems:
        raise ResidError(f"{len(problems)} of {len(files)} trait files are wrong")
    print(f"{len(files)} trait files are right")
    return 0
