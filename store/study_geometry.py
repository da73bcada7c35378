"""What a study asks of the geometry of its directions and of cached rows along them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from store.layers import Layers
from store.study_traits import Keep
from store.study_types import Listed, Name, Names, Position, Strict, distinct
from store.yaml_file import fault


class ProjectionsSpec(Strict):
    """Projections of rows on directions: h . v_hat at every layer of the direction's component."""

    prompts: Names
    directions: Literal["all"] | Names = "all"
    position: Position = "prompt_end"
    responses: str | None = None
    keep: Keep | None = None


class AlignmentSpec(Strict):
    """Cosine of a direction at each layer with another, or itself, at each layer."""

    pair: Annotated[list[str], Field(min_length=2, max_length=2)]


class Resampled(Strict):
    """What is drawn at random: how often, and from which seed."""

    resamples: int = Field(default=1000, ge=100)
    seed: int = Field(default=0, ge=0)


class ExplainedVarianceSpec(Resampled):
    """PCA over many directions at each layer, with bootstrap intervals over the directions."""

    directions: Literal["all"] | Listed = "all"
    layers: Layers = "all"
    k: int = Field(default=10, ge=1)
    centred: bool = True
    scale: Literal["natural", "unit"] = "natural"
    duplicate_cosine: float | None = Field(default=None, gt=0, le=1)


class CosineNullsSpec(Resampled):
    """Cosines of all pairs beside those of random directions, and of directions from permuted labels.

    ``groups`` names a tag of the prompts: rows with one value of it are not independent and are exchanged together.
    """

    directions: Literal["all"] | Listed = "all"
    layers: Layers = "all"
    groups: str | None = None


class SeparabilitySpec(Resampled):
    """How well projections tell two sides apart: area under the ROC curve and d', with bootstrap intervals."""

    positive: Listed
    negative: Listed
    directions: Literal["all"] | Listed = "all"
    layers: Layers = "all"
    position: Position = "prompt_end"
    responses: str | None = None
    keep: Keep | None = None

    @model_validator(mode="after")
    def _two_sides(self) -> Self:
        for name in self.negative:
            if name in self.positive:
                raise fault(f"{name!r} is on both sides", "name it on one side")
        return self


class Geometry(Strict):
    cosines: Literal["all"] | Annotated[list[str], AfterValidator(distinct)] = "all"
    projections: list[ProjectionsSpec] = []
    alignment: list[AlignmentSpec] = []
    explained_variance: dict[Name, ExplainedVarianceSpec] = {}
    cosine_nulls: CosineNullsSpec | None = None
    separability: dict[Name, SeparabilitySpec] = {}
