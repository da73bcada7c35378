"""YAML files that people write: read with line numbers, and checked against records so that every complaint helps.

The scalars are those of YAML 1.2, where `off`, `no` and dates are text and `1e-3` is a number. A study file may build
on another one (`store.yaml_base`).
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from store.errors import StudyError
from store.yaml_base import BASE, merged, merged_nodes

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that refuses a repeated key, of which YAML would silently keep the last."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TAG = "tag:yaml.org,2002:"
_DIGITS = list("-+0123456789")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+)$")
_FLOAT = re.compile(
    r"([-+]?((0|[1-9][0-9_]*)?\.[0-9]+|(0|[1-9][0-9_]*)\.?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver(f"{_TAG}bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, _DIGITS)
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, [*_DIGITS, "."])


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        merges = key_node.tag == f"{_TAG}merge"  # <<: *anchor
        key = "<<" if merges else loader.construct_object(key_node, deep=True)
        mark = key_node.start_mark
        if isinstance(key, (list, dict)):
            raise yaml.constructor.ConstructorError(None, None, "a key is text, not a list or mapping", mark)
        if key in seen:
            problem = f"the key {key!r} occurs twice (first on line {seen[key]})"
            raise yaml.constructor.ConstructorError(None, None, problem, mark)
        seen[key] = mark.line + 1
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path, what: str) -> tuple[dict[str, Any], yaml.Node]:
    """Return a YAML file's mapping and its node tree (for line numbers).

    Raises:
        StudyError: if the file is missing, is no YAML, repeats a key or holds no mapping; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(f"cannot read the {what}: {error.strerror}", file=str(path), remedy="check the path") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise StudyError(
            f"the {what} is not UTF-8: {error}", file=f"{path}:{line}", remedy="save it as UTF-8"
        ) from None
    try:
        node = _composed(text, path)
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise _yaml_error(error, text, path) from None
    if not isinstance(data, dict) or node is None:
        raise StudyError(f"the {what} holds no mapping of keys", file=str(path), remedy="write `key: value` lines")
    return data, node


def read_with_base(path: Path, what: str, trail: tuple[Path, ...] = ()) -> tuple[dict[str, Any], yaml.Node]:
    """Return what `read_yaml` does, on top of the file that the key ``base`` names, and so on down.

    Args:
        path: the file; its base is relative to it.
        what: what the file is, for messages.
        trail: the files that build on this one.

    Raises:
        StudyError: as `read_yaml`; or if a file builds on itself, or its base cannot be read.
    """
    data, node = read_yaml(path, what)
    if BASE not in data:
        return data, node
    name = data.pop(BASE)
    at = place_of(node, (BASE,))
    if not isinstance(name, str) or not name:
        raise StudyError("base is the path of one file", file=at, key=BASE, remedy="write base: other.yaml")
    file = path.parent / name
    here = path.resolve()
    if file.resolve() in (*trail, here):
        loop = " -> ".join(item.name for item in (*trail, here, file.resolve()))
        raise StudyError(f"a file cannot build on itself: {loop}", file=at, key=BASE, remedy="name another file")
    if not file.is_file():
        remedy = f"check it; it is relative to {path.absolute().parent}"
        raise StudyError(f"the file {name} does not exist", file=at, key=BASE, remedy=remedy)
    below, below_node = read_with_base(file, what, (*trail, here))
    assert isinstance(node, yaml.MappingNode)
    assert isinstance(below_node, yaml.MappingNode)
    node.value = [(key, value) for key, value in node.value if key.value != BASE]
    return merged(below, data), merged_nodes(below_node, node)


def _composed(text: str, path: Path) -> yaml.Node | None:
    """Return the node tree of a text, each node's mark with the file's path."""
    loader = _Loader(text)
    loader.name = str(path)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


def _yaml_error(error: Exception, text: str, path: Path) -> StudyError:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        problem, remedy = f"the character {chr(error.character)!r} is not allowed", "remove it"
    else:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 0
        parts = (getattr(error, "context", None), getattr(error, "problem", None))
        problem = ", ".join(part for part in parts if part) or str(error)
        remedy = "indent with spaces, not tabs" if r"'\t'" in problem else "correct that line"
    return StudyError(f"not valid YAML: {problem}", file=f"{path}:{line}" if line else str(path), remedy=remedy)


def place_of(node: yaml.Node, path: KeyPath) -> str:
    """Return ``file:line`` of a key path, or of its deepest part that is there; lines count from 1."""
    mark = _mark(node, path)
    return f"{mark.name}:{mark.line + 1}"


def file_of(node: yaml.Node, path: KeyPath) -> Path:
    """Return the file that holds a key path: the one on top, or a base of it."""
    return Path(_mark(node, path).name)


def _mark(node: yaml.Node, path: KeyPath) -> Any:
    mark = node.start_mark
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if getattr(k, "value", None) == str(part)), None)
            if found is None:
                break
            mark, node = found[0].start_mark, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
        else:
            break
    return mark


def dotted(path: KeyPath) -> str:
    """Spell a key path as users do: ``replay.conditions.ko.interventions[0].layers``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def where(file: Path | None, key: str) -> str | None:
    """Return ``file:line`` of a dotted key path, for errors found long after the file was read.

    Without a file None; the file alone if it cannot be read any more.
    """
    if file is None or not file.is_file():
        return None if file is None or file == Path(".") else str(file)
    try:
        _, node = read_with_base(file, "file")
    except StudyError:
        return str(file)
    return place_of(node, _parse(key, node))


def _parse(key: str, node: yaml.Node) -> KeyPath:
    """Split a dotted key path. Names may hold dots, so the file's own keys decide where a part ends."""
    path: list[str | int] = []
    while key:
        if isinstance(node, yaml.MappingNode):
            keys = {str(k.value): v for k, v in node.value}
            fits = [name for name in keys if name and (key == name or key.startswith((f"{name}.", f"{name}[")))]
            if not fits:
                break
            name = max(fits, key=len)
            path.append(name)
            key, node = key[len(name) :].removeprefix("."), keys[name]
        elif isinstance(node, yaml.SequenceNode) and (match := re.match(r"\[(\d+)\]\.?", key)):
            index = int(match[1])
            if index >= len(node.value):
                break
            path.append(index)
            key, node = key[match.end() :], node.value[index]
        else:
            break
    return tuple(path)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a remedy that names the nearest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none is defined"


def fault(problem: str, remedy: str) -> PydanticCustomError:
    """Return what a validator raises to state its own remedy."""
    # Templated, so that braces in either text are left alone.
    return PydanticCustomError("fault", "{problem}", {"problem": problem, "remedy": remedy})


def validation_error(error: ValidationError, model: type[BaseModel], node: yaml.Node, documentation: str) -> StudyError:
    """Turn pydantic's complaints about a file into one StudyError with file, line, key path and remedy.

    A record may have a class variable `refused` (key -> reason) for keys that it lacks on purpose.
    """
    items = [(*_walk(model, item["loc"]), item) for item in error.errors(include_url=False)]

    # A union reports each alternative: the deepest complaint is about the one that was meant, and at the same depth one
    # about a value of the right kind. Of a misspelt key the spelling is the better complaint than the absence.
    def weight(entry: tuple[KeyPath, list[type[BaseModel]], ErrorDetails]) -> tuple[int, int]:
        path, _, item = entry
        kind = 1 if item["type"] in _KINDS else 2
        return len(path), {"extra_forbidden": 3, "missing": 0}.get(item["type"], kind)

    path, owners, item = max(items, key=weight)
    kind, problem, remedy = item["type"], str(item["msg"]).removeprefix("Value error, "), None
    if kind == "extra_forbidden":
        problem, remedy = _unknown_key(str(path[-1]), owners)
    elif kind == "missing":
        problem, remedy = f"the key {path[-1]!r} is missing", "add it"
    elif kind == "fault":
        problem, remedy = item["ctx"]["problem"], item["ctx"]["remedy"]
    elif kind in ("too_short", "string_too_short"):
        problem = "it is empty"
    elif kind in _SIZES:
        problem = f"it must be {_SIZES[kind].format(**item['ctx'])}, not {_shown(item['input'])}"
    elif kind in _KINDS:
        problem, remedy = _wrong_kind([other for place, _, other in items if place == path])
    elif not isinstance(item["input"], (dict, list)) and _shown(item["input"]) not in problem:
        problem += f" (it is {_shown(item['input'])})"
    remedy = remedy or f"correct the value; {documentation} documents every key"
    return StudyError(problem, file=place_of(node, path), key=dotted(path) or None, remedy=remedy)


def _unknown_key(key: str, owners: Sequence[type[BaseModel]]) -> tuple[str, str]:
    for owner in owners:
        refused: Mapping[str, str] = getattr(owner, "refused", {})
        if key in refused:
            return refused[key], "delete the key"
    known = {field.alias or name for owner in owners for name, field in owner.model_fields.items()}
    return f"unknown key {key!r}", nearest(key, known)


_KINDS = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "literal_error": "{expected}",
}
_SIZES = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
}


def _wrong_kind(alternatives: Sequence[ErrorDetails]) -> tuple[str, str | None]:
    """Return the problem of a value of a wrong kind, and the remedy if there is a special one."""
    kinds = {item["type"]: _KINDS[item["type"]].format(**item.get("ctx", {})) for item in alternatives}
    if "float_type" in kinds:
        kinds.pop("int_type", None)  # an integer is a number
    given = alternatives[0]["input"]
    problem = f"it must be {' or '.join(dict.fromkeys(kinds.values()))}, not {_shown(given)}"
    known = re.findall(r"'([^']*)'", kinds.get("literal_error", ""))
    if isinstance(given, str) and difflib.get_close_matches(given, known, n=1):
        return problem, nearest(given, known)
    if "list_type" in kinds and set(kinds) <= {"list_type", "literal_error"} and isinstance(given, (str, int, float)):
        return problem, f"write [{_shown(given) if isinstance(given, bool) else given}]"
    if set(kinds) == {"string_type"} and isinstance(given, (int, float)):
        return problem, f'write it in quotes: "{_shown(given)}"'
    if set(kinds) <= {"dict_type", "model_type"} and given is None:
        return problem, "write {} for one without keys"
    return problem, None


def _shown(value: object) -> str:
    """Spell a value as YAML does."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "a mapping" if isinstance(value, dict) else repr(value)


def _walk(model: type[BaseModel], location: Sequence[str | int]) -> tuple[KeyPath, list[type[BaseModel]]]:
    """Follow a pydantic location through the types.

    Returns:
        The key path in the file (without the labels that pydantic adds for alternatives and validators), and the
        records that may hold its last key.
    """
    current: list[Any] = [model]
    owners: list[type[BaseModel]] = []
    path: list[str | int] = []
    for part in location:
        if part == "[key]":
            break
        unions = [_members(annotation) for annotation in current]
        members = [member for union in unions for member in union]
        if any(len(union) > 1 for union in unions):  # the part is a label that says which alternative failed
            current = [member for label, member in members if label == part] or [member for _, member in members]
            continue
        current, owners, in_file = [], [], part
        for _, member in members:
            origin, arguments = typing.get_origin(member), typing.get_args(member)
            if isinstance(member, type) and issubclass(member, BaseModel):
                owners.append(member)
                fields = member.model_fields.items()
                current += [field.annotation for name, field in fields if part == (field.alias or name)]
            elif origin is dict:
                in_file = str(part)
                current.append(arguments[1])
            elif origin is list:
                current.append(arguments[0])
        path.append(in_file)
    return tuple(path), owners


def _members(annotation: Any, label: str | None = None) -> list[tuple[str | None, Any]]:
    """Return the alternatives of a type but None (one, unless it is a union), each with pydantic's label for it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        tags = [item.tag for item in arguments[1:] if isinstance(item, Tag)]
        return _members(arguments[0], tags[0] if tags else label)
    if origin is typing.Union or origin is types.UnionType:
        kinds = [argument for argument in arguments if argument is not type(None)]
        return [member for kind in kinds for member in _members(kind)]
    return [(label or getattr(annotation, "__name__", None), annotation)]
