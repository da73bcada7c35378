"""The interventions of a study file: what they do, at which sites, on which tokens."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from store.layers import LayerNumber, Layers
from store.references import Reference
from store.sites import Component
from store.study_types import Listed, Strict
from store.yaml_file import fault, nearest


class MatchNorm(Strict):
    """Rescale to the raw norm of another direction at the same layer."""

    match: str


class TokenRange(Strict):
    """Prompt tokens from one index up to another that is left out; negative ones count from the prompt's end."""

    first: int = Field(default=0, alias="from")
    end: int | None = Field(default=None, alias="to", description="default: the prompt's end")

    @model_validator(mode="after")
    def _holds_tokens(self) -> TokenRange:
        same_side = self.end is not None and (self.first < 0) == (self.end < 0)
        if self.end is not None and ((same_side and self.end <= self.first) or self.end == 0):
            raise fault(
                f"no token lies from {self.first} up to {self.end}",
                "`to` is the first token that is left out; leave it out for the prompt's end",
            )
        return self

    def span(self, prompt_length: int) -> tuple[int, int]:
        """Return the range in a prompt of so many tokens, half-open, counted from its start.

        Raises:
            ValueError: if it is empty there or reaches beyond the prompt.
        """
        first = self.first + prompt_length if self.first < 0 else self.first
        end = prompt_length if self.end is None else self.end + prompt_length if self.end < 0 else self.end
        if not 0 <= first < end <= prompt_length:
            raise ValueError(f"tokens {self} are not in a prompt of {prompt_length} tokens")
        return first, end

    def __str__(self) -> str:
        return f"from {self.first} to {'the end' if self.end is None else self.end}"


def _tokens(value: Any) -> Any:
    if isinstance(value, str) and value not in _SCOPES:
        raise fault(f"unknown tokens {value!r}", nearest(value, _SCOPES))
    return value


_SCOPES = ("all", "prompt", "response")
Scope = Literal["all", "prompt", "response"]
Tokens = Annotated[
    Annotated[Scope, Tag("scope")] | Annotated[TokenRange, Tag("range")],
    Discriminator(lambda value: "scope" if isinstance(value, str) else "range"),
    BeforeValidator(_tokens),
]


class Add(Strict):
    """``h + coefficient * v`` at the given sites.

    `tokens: response` begins with the forward pass that reads the first response token; the first response token
    itself is predicted from the last prompt token, which belongs to the prompt.
    """

    add: str
    layers: Layers
    component: Component = "resid_post"
    coefficient: float | list[float] | Reference = 1.0
    norm: Literal["natural", "unit"] | MatchNorm = "natural"
    tokens: Tokens = "all"
    from_layer: LayerNumber | None = Field(default=None, description="use this layer's vector everywhere")
    from_offset: int = Field(default=0, description="use the vector of the layer so many above (below: negative)")

    @field_validator("coefficient")
    @classmethod
    def _some(cls, value: float | list[float] | str) -> float | list[float] | str:
        if value == []:
            raise fault("a sweep needs at least one coefficient", "write [1, 2], or a single number")
        if isinstance(value, list) and len(set(value)) < len(value):
            raise fault("the sweep names a coefficient twice", "name each one once")
        return value


class ProjectOut(Strict):
    """``h - (h . v_hat) v_hat`` at the given sites; with several directions, of the subspace that they span."""

    refused: ClassVar[dict[str, str]] = {
        "coefficient": "project_out takes no coefficient: it removes the component whole",
        "norm": "project_out takes no norm: it removes the component whole",
    }

    project_out: Listed
    layers: Layers
    component: Component = "resid_post"
    tokens: Tokens = "all"
    from_layer: LayerNumber | None = None
    from_offset: int = 0


class Clamp(Strict):
    """``h + (projection - h . v_hat) v_hat``: every token gets the same projection along the unit vector."""

    refused: ClassVar[dict[str, str]] = {
        "coefficient": "clamp takes no coefficient: `projection` says what h . v_hat becomes",
        "norm": "clamp takes no norm: `projection` is in units of the stream, along the unit vector",
    }

    clamp: str
    projection: float = Field(description="what h . v_hat becomes")
    layers: Layers
    component: Component = "resid_post"
    tokens: Tokens = "all"
    from_layer: LayerNumber | None = None
    from_offset: int = 0


_KINDS = ("add", "project_out", "clamp")


def _kind(value: Any) -> Any:
    if not isinstance(value, Strict):
        if not isinstance(value, dict):
            raise fault(
                "an intervention is a mapping of keys", "write {add: a_direction, layers: [10], coefficient: 1}"
            )
        named = [kind for kind in _KINDS if kind in value]
        if len(named) > 1:
            raise fault(f"an intervention cannot both {' and '.join(named)}", "write two interventions; order counts")
        if not named:
            guess = next(
                (hint for key in value if "mean" in (hint := nearest(str(key), _KINDS))),
                "write add:, project_out: or clamp:",
            )
            raise fault("an intervention needs the key add, project_out or clamp", guess)
    return value


InterventionSpec = Annotated[
    Annotated[Add, Tag("add")] | Annotated[ProjectOut, Tag("project_out")] | Annotated[Clamp, Tag("clamp")],
    Discriminator(
        lambda value: next(
            (kind for kind in _KINDS if (kind in value if isinstance(value, dict) else hasattr(value, kind))), None
        )
    ),
    BeforeValidator(_kind),
]


def directions_of(item: Add | ProjectOut | Clamp) -> list[str]:
    """Return the names of the directions that an intervention acts along, without what only gives a norm."""
    if isinstance(item, Add):
        return [item.add]
    return [item.clamp] if isinstance(item, Clamp) else list(item.project_out)
