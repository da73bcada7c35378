"""References in a study file: ``$name`` is a value of a condition's ``each``, ``$choice.name`` one that was chosen.

A text that is a reference and nothing else becomes the value, whatever its type: ``coefficient: $persona.coefficient``.
Layers may count from it: ``$persona.layer + 2``. Inside a longer text the value is spelled out: ``random_$seed``, and
with braces where letters follow: ``${trait}.positive``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

from store.yaml_file import fault

Value = int | float | str
Values = Mapping[str, Value]

_NAME = r"(?:\$\{(\w+(?:\.\w+)?)\}|\$(\w+(?:\.\w+)?))"
_INSIDE = re.compile(_NAME)
_WHOLE = re.compile(_NAME + r"(?:\s*([+-])\s*(\d+))?")


def is_reference(value: object) -> bool:
    """Whether a value is one reference, with an offset perhaps, and nothing else."""
    return isinstance(value, str) and _WHOLE.fullmatch(value.strip()) is not None


def _whole(value: str) -> str:
    if not is_reference(value):
        raise fault(f"it must be a number, not {value!r}", "write a number, or a reference such as $persona.layer")
    return value


Reference = Annotated[str, AfterValidator(_whole)]


def names_in(value: Any) -> set[str]:
    """Return the names that a value refers to, at any depth."""
    if isinstance(value, str):
        return {braced or plain for braced, plain in _INSIDE.findall(value)}
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return {name for item in items for name in names_in(item)}


def filled(value: Any, values: Values) -> Any:
    """Return a value with its references replaced, at any depth; those to other names stay.

    Raises:
        ValueError: for an offset from what is no integer.
    """
    if isinstance(value, str):
        return _filled_text(value, values)
    if isinstance(value, Mapping):
        return {key: filled(item, values) for key, item in value.items()}
    return [filled(item, values) for item in value] if isinstance(value, list | tuple) else value


def _filled_text(text: str, values: Values) -> Value:
    match = _WHOLE.fullmatch(text.strip())
    if match is None:
        return _INSIDE.sub(lambda found: spelt(values.get(found[1] or found[2], found[0])), text)
    name = match[1] or match[2]
    if name not in values:
        return text
    value = values[name]
    if match[3] is None:
        return value
    if not isinstance(value, int):
        raise ValueError(f"{text} counts from a layer's number, and ${name} is {value}")
    offset = int(match[4])
    layer = value + offset if match[3] == "+" else value - offset
    if layer < 0 <= value:
        raise ValueError(f"{text} is layer {layer}, below the first")
    return layer


def spelt(value: Value) -> str:
    """Spell a value shortly, but never two of them alike."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return text if float(text) == value else repr(value)
