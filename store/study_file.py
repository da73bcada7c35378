"""Read a study file: YAML with line numbers, types, then everything that can be checked without a model."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from store.conditions import decoding_of, directions_used
from store.model_ref import is_local
from store.sites import RESPONSE_POSITIONS
from store.study import CaptureEntry, Study
from store.study_checks import Complaints, check_choices, check_claims, check_comparisons
from store.study_choices import without_idle_candidates
from store.study_directions import RandomMatched, Reading, component_in, reads, references
from store.study_interventions import Add, Clamp, MatchNorm, directions_of, statistic_of
from store.study_names import families, with_plain_names
from store.study_traits import SIDES, parse_trait_set, trait_set_name
from store.yaml_file import KeyPath, file_of, read_with_base, validation_error

DOCUMENTATION = "studies/demo.yaml"


class _Checker(Complaints):
    """Cross-references of a study."""

    def __init__(self, study: Study, node: yaml.Node, family_of: Mapping[str, str]):
        super().__init__(study, node)
        self.family_of = family_of
        traits = {each for name, source in study.traits.items() for each in source.set_names(name)}
        parts = {f"{n}@{p}" for n, source in study.prompts.items() if source.split for p in source.split.parts}
        self.prompt_sets = set(study.prompts) | parts | traits
        self.single = self.expanded()
        # Every single condition with the prompt sets that it replays.
        self.conditions = {
            item.name: item.spec.prompts or study.replay.prompts for item in self.single if study.replay is not None
        }

    def fail(self, problem: str, path: KeyPath, remedy: str) -> typing.NoReturn:
        # The file has the family, not its members.
        if len(path) > 1 and path[0] == "directions" and path[1] in self.family_of:
            path = (path[0], self.family_of[str(path[1])], *path[2:])
        super().fail(problem, path, remedy)

    def prompts(self, names: Iterable[str], path: KeyPath) -> None:
        for name in names:
            self.known("prompt set", name, self.prompt_sets, path)

    def responses(self, condition: str | None, path: KeyPath, key: str = "responses") -> None:
        """Check that `responses` (or another key) names what generates them: one condition, and no whole sweep."""
        if condition is None or condition in self.conditions:
            return
        here = (*path, key)
        steps = [name for name in self.conditions if name.startswith(f"{condition}[")]
        if steps:
            self.fail(f"the condition {condition!r} is a sweep", here, f"name one of {', '.join(steps)}")
        self.known("replay condition", condition, self.conditions, here)

    def files(self) -> None:
        """Check that what the study names by path is there; the paths are absolute by now."""
        sources: list[tuple[KeyPath, str | None]] = [
            *((("prompts", name, "path"), source.path) for name, source in self.study.prompts.items()),
            *((("traits", name, "path"), source.path) for name, source in self.study.traits.items()),
        ]
        for path, text in sources:
            if text is not None and not Path(text).is_file():
                what = "is a folder" if Path(text).is_dir() else "does not exist"
                remedy = f"check it; relative paths start at {self.folder(path)}"
                self.fail(f"the file {text} {what}", path, remedy)
        for key in ("source", "adapter"):
            text = getattr(self.study.model, key)
            if text is not None and is_local(text) and not Path(text).exists():
                remedy = f"check it; paths that start with . are relative to {self.folder(('model', key))}"
                self.fail(f"there is no file or folder {text}", ("model", key), remedy)

    def excluded(self) -> None:
        """Check that the sets whose prompts another leaves out are there: sets of files, or parts of them."""
        for name, source in self.study.prompts.items():
            known = [*self.study.prompts]
            known += [f"{each}@{part}" for each, s in self.study.prompts.items() if s.split for part in s.split.parts]
            for other in source.exclude:
                self.known("prompt set", other, known, ("prompts", name, "exclude"))

    def folder(self, path: KeyPath) -> Path:
        """Return where relative paths of a key start: the folder of the file that holds it."""
        return file_of(self.node, path).absolute().parent

    def traits(self) -> None:
        for name, source in self.study.traits.items():
            if source.answers is not None:
                path: KeyPath = ("traits", name)
                self.responses(source.answers, path, "answers")
                self.replayed(source.answers, (trait_set_name(name, "model", side) for side in SIDES), path, "answers")

    def kept(self, keep: str | None, names: Iterable[str], responses: str | None, path: KeyPath) -> None:
        """Check that answers can be kept: they are a trait's, and generated."""
        here = (*path, "keep")
        for name in names if keep else ():
            part = parse_trait_set(name)
            if part is None:
                self.fail(f"{name!r} is no prompt set of a trait: it has no answers to keep", here, "delete keep")
            source = self.study.traits[part.trait]
            if part.family == "user" and source.keep == "all":
                remedy = f"set traits.{part.trait}.keep: trait"
                self.fail(f"{name!r} was made of all answers, and holds no others to choose from", here, remedy)
            if part.family == "model" and responses is None:
                self.fail("there are no answers to keep", here, "set `responses:` to the replay condition that answers")

    def capture(self) -> None:
        for index, entry in enumerate(self.study.capture):
            path: KeyPath = ("capture", index)
            self.prompts(entry.prompts, (*path, "prompts"))
            self.responses(entry.responses, path)
            self.kept(entry.keep, entry.prompts, entry.responses, path)
            if entry.responses is not None:
                self.replayed(entry.responses, entry.prompts, path)
                continue
            needing = [position for position in entry.positions if position in RESPONSE_POSITIONS]
            for name in entry.prompts if needing else []:
                source = self.study.prompts.get(name.partition("@")[0])
                if source is None or not (source.columns.response or source.columns.messages):
                    self.fail(
                        f"position {needing[0]} needs responses, and the prompt set {name!r} has none",
                        (*path, "positions"),
                        "set `responses:` to a replay condition, or name a response column of the prompt file",
                    )

    def replayed(self, condition: str, prompts: Iterable[str], path: KeyPath, key: str = "responses") -> None:
        """Check that a condition generates responses to those prompts."""
        replayed = self.conditions[condition]
        for name in prompts:
            if name not in replayed and name.partition("@")[0] not in replayed:
                self.fail(
                    f"condition {condition!r} does not replay the prompt set {name!r}",
                    (*path, key),
                    f"add it to replay.conditions.{condition.partition('[')[0]}.prompts",
                )

    def captured(
        self,
        names: Iterable[str],
        component: str,
        position: str,
        responses: str | None,
        keep: str | None,
        path: KeyPath,
    ) -> None:
        """Check that some capture entry holds what a direction or projection reads."""
        for name in names:
            if not any(captures_of(self.study, name, component, position, responses, keep)):
                if keep is None and any(captures_of(self.study, name, component, position, responses, "trait")):
                    problem = f"only the answers to {name!r} that count are captured"
                    self.fail(problem, path, "add `keep: trait` here, or capture an entry without it")
                suffix = f" with responses {responses!r}" if responses else ""
                self.fail(
                    f"nothing captures {component} at {position} of {name!r}{suffix}",
                    path,
                    "add it to an entry of `capture:`",
                )

    def directions(self) -> None:
        specs = self.study.directions
        for name, spec in specs.items():
            path: KeyPath = ("directions", name)
            named = references(spec)
            for key, other in named:
                self.known("direction", other, specs, (*path, key))
            for i, (key, other) in enumerate(named):
                if other in [earlier for _, earlier in named[:i]]:
                    self.fail(f"{other!r} is taken from itself: nothing is left", (*path, key), "name another one")
            sides = reads(spec)
            if isinstance(spec, Reading | RandomMatched):
                self.responses(spec.responses, path)
                for side, names in sides:
                    self.prompts(names, (*path, side))
                    self.kept(spec.keep, names, spec.responses, path)
            for side, names in sides[1:]:
                for shared in [other for other in names if other in sides[0][1]]:
                    self.fail(f"{shared!r} is on both sides", (*path, side), "name it on one side")
        for name in specs:
            self.acyclic(name, ())
        for name, spec in specs.items():
            if isinstance(spec, Reading | RandomMatched):
                source = (component_of(self.study, name), spec.position, spec.responses, spec.keep)
                for side, names in reads(spec):
                    self.captured(names, *source, ("directions", name, side))
        for name, spec in specs.items():
            components = {component_of(self.study, other): key for key, other in references(spec)}
            if len(components) > 1:
                problem = f"it mixes directions at {' and '.join(sorted(components))}"
                self.fail(problem, ("directions", name, max(components.values())), "read them at one component")

    def acyclic(self, name: str, trail: tuple[str, ...]) -> None:
        """Follow what a direction is computed from: others, or texts generated under conditions that use others."""
        if name in trail:
            loop = " -> ".join((*trail[trail.index(name) :], name))
            self.fail(f"directions depend on each other: {loop}", ("directions", name), "break the loop")
        spec = self.study.directions[name]
        needed = [other for _, other in references(spec)]
        if isinstance(spec, Reading | RandomMatched):
            sets = [each for _, names in reads(spec) for each in names]
            turns = [part.trait for n in sets if (part := parse_trait_set(n)) is not None]
            conditions = {spec.responses, *(self.study.traits[trait].answers for trait in turns)} - {None}
            used = {used for one in self.single if one.name in conditions for used in directions_used(one.spec)}
            needed += sorted(used & set(self.study.directions))
        for other in needed:
            self.acyclic(other, (*trail, name))

    def geometry(self) -> None:
        geometry, specs = self.study.geometry, self.study.directions
        named: list[tuple[KeyPath, Iterable[str]]] = [
            (("cosines",), [] if geometry.cosines == "all" else geometry.cosines),
            *((("alignment", i, "pair"), item.pair) for i, item in enumerate(geometry.alignment)),
            *((("explained_variance", n, "directions"), s.directions) for n, s in geometry.explained_variance.items()),
        ]
        if geometry.cosine_nulls is not None:
            named.append((("cosine_nulls", "directions"), geometry.cosine_nulls.directions))
        for at, names in named:
            for name in [] if names == "all" else names:
                self.known("direction", name, specs, ("geometry", *at))
        for analysis, spec in geometry.separability.items():
            here: KeyPath = ("geometry", "separability", analysis)
            self.responses(spec.responses, here)
            sides = [("positive", spec.positive), ("negative", spec.negative)]
            for side, sets in sides:
                self.prompts(sets, (*here, side))
                self.kept(spec.keep, sets, spec.responses, here)
            for name in list(specs) if spec.directions == "all" else spec.directions:
                self.known("direction", name, specs, (*here, "directions"))
                read = (component_of(self.study, name), spec.position, spec.responses, spec.keep)
                for side, sets in sides:
                    self.captured(sets, *read, (*here, side))
        for index, projection in enumerate(geometry.projections):
            path: KeyPath = ("geometry", "projections", index)
            self.prompts(projection.prompts, (*path, "prompts"))
            self.responses(projection.responses, path)
            self.kept(projection.keep, projection.prompts, projection.responses, path)
            for name in list(specs) if projection.directions == "all" else projection.directions:
                self.known("direction", name, specs, (*path, "directions"))
                component = component_of(self.study, name)
                here = (*path, "prompts")
                source = (component, projection.position, projection.responses, projection.keep)
                self.captured(projection.prompts, *source, here)

    def replay(self) -> None:
        if self.study.replay is None:
            return
        replay, specs = self.study.replay, self.study.directions
        self.prompts(replay.prompts, ("replay", "prompts"))
        for item in self.single:
            name, condition = item.base, item.spec
            path: KeyPath = ("replay", "conditions", name)
            self.prompts(condition.prompts or [], (*path, "prompts"))
            seeds = condition.seeds or []
            if len(set(seeds)) < len(seeds):
                self.fail("a seed is named twice", (*path, "seeds"), "name each one once")
            if len(seeds) > 1 and decoding_of(replay, condition).greedy:
                problem = "greedy decoding gives the same text for every seed"
                self.fail(problem, (*path, "seeds"), "set the condition's decoding.temperature above 0, or keep one")
            if condition.control_of is not None:
                known = [*replay.conditions, *self.conditions]
                self.known("condition", condition.control_of, known, (*path, "control_of"))
                if condition.control_of.partition("[")[0] == name:
                    self.fail("a condition is no control of itself", (*path, "control_of"), "name another condition")
            for index, intervention in enumerate(condition.interventions):
                here: KeyPath = (*path, "interventions", index)
                if (taken := statistic_of(intervention)) is not None:
                    from_rows = "projection" if isinstance(intervention, Clamp) else "to"
                    self.prompts(taken.sets, (*here, from_rows, "of" if taken.mean is None else "mean"))
                if isinstance(intervention, Add):
                    self.known("direction", intervention.add, specs, (*here, "add"))
                    if isinstance(intervention.norm, MatchNorm):
                        self.known("direction", intervention.norm.match, specs, (*here, "norm", "match"))
                else:
                    key = "clamp" if isinstance(intervention, Clamp) else "project_out"
                    for direction in directions_of(intervention):
                        self.known("direction", direction, specs, (*here, key))
        if replay.monitor is not None:
            for direction in replay.monitor.directions:
                self.known("direction", direction, specs, ("replay", "monitor", "directions"))
            for name in replay.monitor.conditions or []:
                known = [*replay.conditions, *self.conditions]
                self.known("condition", name, known, ("replay", "monitor", "conditions"))


def component_of(study: Study, direction: str) -> str:
    """Return the site component at which a direction is read."""
    return component_in(study.directions, direction)


def captures_of(
    study: Study, prompt_set: str, component: str, position: str, responses: str | None, keep: str | None = None
) -> Iterator[CaptureEntry]:
    """Yield the capture entries that read a component and position of a prompt set: of all its answers, or with `keep`
    of those that count (an entry that captures all of them will do)."""
    part = parse_trait_set(prompt_set)
    if part is not None and part.family == "user":
        keep = "trait"  # its prompts are chosen already
    for entry in study.capture:
        named = prompt_set in entry.prompts or prompt_set.partition("@")[0] in entry.prompts
        named &= entry.keep in (None, keep)
        if named and component in entry.components and position in entry.positions and entry.responses == responses:
            yield entry


def load_study(path: str | Path) -> Study:
    """Read and check a study file; paths of inputs come back absolute.

    Raises:
        StudyError: for the first fault found, with file, line, key path and remedy.
    """
    file = Path(path)
    data, node = read_with_base(file, "study file")
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, Study, node, DOCUMENTATION) from None
    study = without_idle_candidates(_with_absolute_paths(study.read_from(file), node))
    family_of = {member: name for name, its in families(study.directions).items() for member in its}
    try:
        study = with_plain_names(study)
    except ValueError as error:
        here: KeyPath = ("directions", family_of.get(str(error), str(error)))
        _Checker(study, node, family_of).fail(f"two specs define the direction {str(error)!r}", here, "rename one")
    checker = _Checker(study, node, family_of)
    checker.files()
    checker.excluded()
    checker.traits()
    checker.capture()
    checker.replay()
    checker.directions()
    checker.geometry()
    for selection in study.select.values():
        checker.prompts(selection.sets, ("select",))
    check_choices(checker, checker.conditions)
    check_comparisons(checker, checker.conditions)
    check_claims(checker)
    return study


def _with_absolute_paths(study: Study, node: yaml.Node) -> Study:
    """Resolve the paths of inputs against the folder of the file that names them."""

    def absolute(path: KeyPath, text: str) -> str:
        return str((file_of(node, path).absolute().parent / os.path.expanduser(text)).resolve())

    def moved(section: str, sources: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: source
            if source.path is None
            else source.model_copy(update={"path": absolute((section, name, "path"), source.path)})
            for name, source in sources.items()
        }

    model = study.model
    local = {
        key: absolute(("model", key), value)
        for key in ("source", "adapter")
        if (value := getattr(model, key)) is not None and value.startswith(("./", "../", "~"))
    }
    return study.model_copy(
        update={
            "prompts": moved("prompts", study.prompts),
            "traits": moved("traits", study.traits),
            "model": model.model_copy(update=local),
        }
    )
