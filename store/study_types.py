"""What the records of a study file are made of: their base, names, lists of names, positions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from store.sites import ALL_TOKENS, NAMED_POSITIONS, check_position
from store.yaml_file import fault, nearest

Scalar = str | int | float | bool | None
JudgeOption = Scalar | list[Scalar]
EngineName = Literal["resid", "vllm"]


class Strict(BaseModel):
    """A frozen record that refuses keys it does not know, values of another kind ("3" or true for 3), and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _name(text: str) -> str:
    if re.fullmatch(r"\w[\w.+-]*", text) is None:
        raise fault(f"{text!r} cannot be a name", "use letters, digits and _ . + -")
    return text


def _set_name(text: str) -> str:
    # A dot and an @ mark the sides of a trait and the parts of a split.
    if "." in text or "@" in text:
        raise fault(f"the name {text!r} holds a dot or @, which mark traits' sides and splits' parts", "rename it")
    return _name(text)


def _study_name(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text) is None:  # it names files
        raise fault(f"{text!r} cannot name a study", "use letters, digits and _ . -, a letter or digit first")
    return text


def distinct(names: list[str]) -> list[str]:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise fault(f"{name!r} is named twice", "name it once")
    return names


def distinct_seeds(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise fault("a seed is named twice", "name each one once")
    return seeds


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _position(text: str) -> str:
    try:
        return check_position(text)
    except ValueError:
        raise fault(f"unknown position {text!r}", nearest(text, [*NAMED_POSITIONS, "token:<index>"])) from None


Name = Annotated[str, AfterValidator(_name)]
StudyName = Annotated[str, AfterValidator(_study_name)]
SetName = Annotated[str, AfterValidator(_set_name)]
Names = Annotated[list[str], Field(min_length=1), AfterValidator(distinct)]
Listed = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(distinct)]  # or one text
Position = Annotated[str, AfterValidator(_position)]
CapturePosition = Annotated[str, AfterValidator(lambda text: text if text == ALL_TOKENS else _position(text))]
