"""How a study names directions: one record per method, what each is computed from, and families of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from store.sites import Component
from store.study_traits import Keep
from store.study_types import Listed, Names, Position, Strict, distinct_seeds
from store.yaml_file import fault, nearest


class DifferenceOfMeans(Strict):
    """Mean of `positive` minus mean of `negative`, at every captured layer (Marks & Tegmark 2023; arXiv:2310.06824)."""

    method: Literal["difference_of_means"] = "difference_of_means"
    positive: Listed
    negative: Listed
    component: Component = "resid_post"
    position: Position = "prompt_end"
    responses: str | None = None
    keep: Keep | None = None


class _Family(Strict):
    """Several components by one spec: ``k`` of them, or just the one with an ``index`` (from 1) under its own name."""

    k: int = Field(default=1, ge=1)
    index: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.index is not None and self.k != 1:
            raise fault("k and index exclude each other", "k: 3 gives NAME.1 to NAME.3; index: 1 gives NAME alone")
        return self


class PrincipalComponents(_Family):
    """Orthonormal directions of the contrast of two sides: NAME.1 to NAME.k; see `analysis.components`."""

    method: Literal["principal_components"]
    positive: Listed
    negative: Listed
    contrast: Literal["to_mean", "paired"] = "to_mean"
    centred: bool = False
    component: Component = "resid_post"
    position: Position = "prompt_end"
    responses: str | None = None
    keep: Keep | None = None


class PrincipalDirections(_Family):
    """Orthonormal principal components of a list of directions, layer by layer; see `analysis.components`."""

    method: Literal["principal_directions"]
    directions: Listed
    centred: bool = True
    scale: Literal["natural", "unit"] = "natural"
    duplicate_cosine: float | None = Field(default=None, gt=0, le=1)


class AssistantAxis(Strict):
    """Mean of default answers minus the centroid of role-play answers (Lu et al. 2026; arXiv:2601.10387).

    A role is a prompt set of `roles`, or with `by` all of their prompts that have one value of that tag.
    """

    method: Literal["assistant_axis"]
    default: Listed
    roles: Listed
    by: str | None = None
    default_weighting: Literal["rows", "sets"] = "rows"
    role_weighting: Literal["roles", "rows"] = "roles"
    component: Component = "resid_post"
    position: Position = "response_avg"
    responses: str | None = None
    keep: Keep | None = None


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


class _Seeded(Strict):
    """A random draw: one ``seed``, or several ``seeds`` that give NAME.<seed> each."""

    seed: int | None = Field(default=None, ge=0)
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int] | None) -> list[int] | None:
        return seeds if seeds is None else distinct_seeds(seeds)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.seed is None) == (self.seeds is None):
            raise fault("give exactly one of seed and seeds", "write seed: 7, or seeds: [7, 13] for NAME.7 and NAME.13")
        return self


class Random(_Seeded):
    """Seeded isotropic directions with the norm of another direction at each layer: a control."""

    method: Literal["random"]
    match_norm: str
    draw: Literal["layer", "shared"] = Field(default="layer", description="shared: one unit vector at all layers")


class RandomMatched(_Seeded):
    """Seeded random directions, orthogonal to another at each layer, along which the rows of some prompt sets have the
    same mean squared projection: a control for projecting that one out (`analysis.energy`)."""

    method: Literal["random_matched"]
    match_energy: str
    prompts: Listed
    position: Position = "prompt_end"
    responses: str | None = None
    keep: Keep | None = None


Reading = DifferenceOfMeans | PrincipalComponents | AssistantAxis  # from cached rows alone
Derived = Difference | Orthogonalised | Random | PrincipalDirections  # from other directions alone

_METHODS: dict[str, type[Strict]] = {
    "difference_of_means": DifferenceOfMeans,
    "principal_components": PrincipalComponents,
    "principal_directions": PrincipalDirections,
    "assistant_axis": AssistantAxis,
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
            if required <= set(value) and not required <= set(DifferenceOfMeans.model_fields):
                raise fault("the key 'method' is missing", f"add method: {name}")
    return value


DirectionSpec = Annotated[
    Annotated[DifferenceOfMeans, Tag("difference_of_means")]
    | Annotated[PrincipalComponents, Tag("principal_components")]
    | Annotated[PrincipalDirections, Tag("principal_directions")]
    | Annotated[AssistantAxis, Tag("assistant_axis")]
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
    if isinstance(spec, PrincipalDirections):
        return [("directions", name) for name in spec.directions]
    if isinstance(spec, Random):
        return [("match_norm", spec.match_norm)]
    if isinstance(spec, RandomMatched):
        return [("match_energy", spec.match_energy)]
    return []


def reads(spec: object) -> list[tuple[str, list[str]]]:
    """Return (key, prompt sets) of the cached rows that a direction is computed from."""
    if isinstance(spec, (DifferenceOfMeans, PrincipalComponents)):
        return [("positive", spec.positive), ("negative", spec.negative)]
    if isinstance(spec, AssistantAxis):
        return [("default", spec.default), ("roles", spec.roles)]
    if isinstance(spec, RandomMatched):
        return [("prompts", spec.prompts)]
    return []


def component_in(specs: Mapping[str, DirectionSpec], name: str) -> Component:
    """Return the site component at which a direction is read."""
    spec = specs[name]
    while not isinstance(spec, Reading):
        spec = specs[references(spec)[0][1]]
    return spec.component


def ancestors(specs: Mapping[str, DirectionSpec], name: str) -> Iterator[DirectionSpec]:
    """Yield the specs that a direction is computed from, itself first; some perhaps more than once."""
    yield specs[name]
    for _, other in references(specs[name]):
        yield from ancestors(specs, other)
