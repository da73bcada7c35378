"""The direction section of a study file: methods and what each is computed from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from store.sites import Component
from store.study_traits import Keep
from store.study_types import Names, Position, Strict
from store.yaml_file import fault, nearest


class DifferenceOfMeans(Strict):
    """Mean of `positive` minus mean of `negative`, at every captured layer (Marks & Tegmark 2023; arXiv:2310.06824)."""

    method: Literal["difference_of_means"] = "difference_of_means"
    positive: Names
    negative: Names
    component: Component = "resid_post"
    position: Position = "prompt_end"
    responses: str | None = None
    keep: Keep | None = None

    @field_validator("positive", "negative", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Difference(Strict):
    """One direction minus another, layer by layer."""

    method: Literal["difference"]
    minuend: str
    subtrahend: str


class Orthogonalised(Strict):
    """A direction without its components in the span of others, layer by layer."""

    method: Literal["orthogonalised"]
    direction: str
    orthogonal_to: Names


class Random(Strict):
    """Seeded isotropic directions with the norm of another direction at each layer: a control."""

    method: Literal["random"]
    seed: int = Field(ge=0)
    match_norm: str


class RandomMatched(Strict):
    """Seeded random directions, orthogonal to another at each layer, along which the rows of some prompt sets have the
    same mean squared projection: a control for projecting that one out (`analysis.energy`)."""

    method: Literal["random_matched"]
    seed: int = Field(ge=0)
    match_energy: str
    prompts: Names
    position: Position = "prompt_end"
    responses: str | None = None
    keep: Keep | None = None

    @field_validator("prompts", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


_METHODS: dict[str, type[Strict]] = {
    "difference_of_means": DifferenceOfMeans,
    "difference": Difference,
    "orthogonalised": Orthogonalised,
    "random": Random,
    "random_matched": RandomMatched,
}


def _method(value: Any) -> Any:
    if isinstance(value, Strict):
        return value
    if not isinstance(value, dict):
        raise fault("a direction is a mapping of keys", "write {positive: ..., negative: ...}")
    method = value.get("method", "difference_of_means")
    if not isinstance(method, str) or method not in _METHODS:
        raise fault(f"unknown method {method!r}", nearest(str(method), _METHODS))
    if "method" not in value:
        for name, record in _METHODS.items():
            required = {key for key, field in record.model_fields.items() if field.is_required()} - {"method"}
            if name != "difference_of_means" and required <= set(value):
                raise fault("the key 'method' is missing", f"add method: {name}")
    return value


DirectionSpec = Annotated[
    Annotated[DifferenceOfMeans, Tag("difference_of_means")]
    | Annotated[Difference, Tag("difference")]
    | Annotated[Orthogonalised, Tag("orthogonalised")]
    | Annotated[Random, Tag("random")]
    | Annotated[RandomMatched, Tag("random_matched")],
    Discriminator(
        lambda value: (
            value.get("method", "difference_of_means") if isinstance(value, dict) else getattr(value, "method", None)
        )
    ),
    BeforeValidator(_method),
]


def references(spec: object) -> list[tuple[str, str]]:
    """Return (key, name) of the directions that a direction is computed from."""
    if isinstance(spec, Difference):
        return [("minuend", spec.minuend), ("subtrahend", spec.subtrahend)]
    if isinstance(spec, Orthogonalised):
        return [("direction", spec.direction), *(("orthogonal_to", name) for name in spec.orthogonal_to)]
    if isinstance(spec, Random):
        return [("match_norm", spec.match_norm)]
    if isinstance(spec, RandomMatched):
        return [("match_energy", spec.match_energy)]
    return []
