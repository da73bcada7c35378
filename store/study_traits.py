"""The traits of a study file: which personas, of whom, and which of the model's answers count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from store.study_types import Strict, distinct
from store.yaml_file import fault

Family = Literal["model", "user"]
Side = Literal["positive", "negative"]
SIDES: tuple[Side, Side] = ("positive", "negative")
Keep = Literal["trait"]  # keep the answers whose trait and coherence scores say that they count
Threshold = Annotated[float | None, Field(ge=0, le=100)]


class TraitJudges(Strict):
    """The judges whose scores decide; needed only where the study has several of a kind for this trait."""

    trait: str | None = None
    coherence: str | None = None


class TraitSource(Strict):
    """A trait file, and the prompt sets that it adds.

    The *model persona* gives ``<name>.positive`` and ``<name>.negative``: every instruction (as the system prompt) with
    every question (as the user's turn). The *user persona* gives ``<name>.user.positive`` and ``<name>.user.negative``:
    the answers that the model gave to them under the condition `answers`, word for word, as the user's turn.
    """

    path: str
    instructions: int | None = Field(default=None, ge=1, description="use only the first so many of each side")
    questions: int | None = Field(default=None, ge=1, description="use only the first so many")
    families: Annotated[list[Family], Field(min_length=1), AfterValidator(distinct)] = ["model"]
    answers: str | None = Field(default=None, description="user: the replay condition whose answers are the turns")
    keep: Literal["trait", "all"] = Field(default="trait", description="user: which answers become turns")
    trait_threshold: Threshold = Field(default=None, description="instead of the trait file's")
    coherence_threshold: Threshold = Field(default=None, description="instead of the trait file's")
    judges: TraitJudges = TraitJudges()
    unscored: Literal["wait", "drop"] = Field(default="wait", description="what a judge's failure does to an answer")

    @model_validator(mode="after")
    def _families(self) -> TraitSource:
        if "model" not in self.families:
            raise fault("the user persona is made of the model persona's answers", "write [model, user]")
        if "user" in self.families and self.answers is None:
            raise fault("the user persona needs the key answers", "name the replay condition that answers the trait")
        for key in ("answers", "keep"):
            if "user" not in self.families and key in self.model_fields_set:
                raise fault(f"{key} is of the user persona, which is not asked for", "add user to families")
        return self

    def set_names(self, name: str) -> list[str]:
        """Return the prompt sets of a trait of that name."""
        return [trait_set_name(name, family, side) for family in self.families for side in SIDES]


@dataclass(frozen=True)
class TraitSet:
    """What the name of a trait's prompt set says."""

    trait: str
    family: Family
    side: Side


def trait_set_name(trait: str, family: Family, side: Side) -> str:
    return f"{trait}.{side}" if family == "model" else f"{trait}.user.{side}"


def parse_trait_set(name: str) -> TraitSet | None:
    """Read the name of a trait's prompt set; None for one of another kind (names of sets hold no dots)."""
    trait, *rest = name.split(".")
    for side in SIDES:
        if rest == [side]:
            return TraitSet(trait, "model", side)
        if rest == ["user", side]:
            return TraitSet(trait, "user", side)
    return None
