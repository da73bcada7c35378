"""What a study chooses by measuring (`select:`), compares (`comparisons:`) and claims (`claims:`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from store.references import Value
from store.study_types import Name, Names, Strict
from store.yaml_file import fault

Outcome = Literal["refusal", "degenerate", "other"]  # other: neither of the two
Rate = Annotated[float, Field(ge=0.0, le=1.0)]
OneOrMore = Annotated[Names, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Bound(Strict):
    """What a candidate must keep to: a rate of an outcome, or how far it may move from the rate under `against`."""

    outcome: Outcome
    prompts: OneOrMore
    at_most: Rate | None = None
    change_at_most: Rate | None = Field(default=None, description="in both directions")
    rise_at_most: Rate | None = Field(default=None, description="it may fall as far as it will")

    @model_validator(mode="after")
    def _one_bound(self) -> Bound:
        given = [one for one in (self.at_most, self.change_at_most, self.rise_at_most) if one is not None]
        if len(given) != 1:
            raise fault("give exactly one of at_most, change_at_most and rise_at_most", "write at_most: 0.1, say")
        return self


class Selection(Strict):
    """A choice among the conditions that one entry of replay.conditions stands for.

    The candidate with the lowest (or highest) rate of `outcome` on `prompts` wins, among those whose rate is at least
    `change_at_least` below (above) that under `against` and which keep to `keep`; of equals the first in the study's
    order. Its variables are then `$<choice>.<variable>`. `given` states them instead, and nothing is measured.
    """

    of: Name | None = None
    against: str = "baseline"
    prompts: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    outcome: Outcome = "refusal"
    want: Literal["lowest", "highest"] = "lowest"
    change_at_least: Rate = 0.0
    keep: list[Bound] = []
    judge: str | None = Field(default=None, description="of refusals, where the study has several")
    otherwise: dict[Name, Value] | None = Field(default=None, description="if no candidate passes; recorded as such")
    given: dict[Name, Value] | None = None

    @model_validator(mode="after")
    def _something_to_choose(self) -> Selection:
        if self.given is None and (self.of is None or not self.prompts):
            raise fault("a choice needs candidates and prompts", "write of: a_condition_with_each, prompts: a_set@val")
        if self.given == {}:
            raise fault("given states no value", "write {layer: 20, coefficient: 3}, say")
        return self

    @property
    def sets(self) -> tuple[str, ...]:
        """The prompt sets that the choice is measured on, each once."""
        return tuple(dict.fromkeys([*self.prompts, *(name for keep in self.keep for name in keep.prompts)]))

    def rule(self) -> dict[str, Any]:
        """Return what decides, for the record."""
        return self.model_dump(mode="json", exclude={"given"})


class Comparison(Strict):
    """Conditions against one other on the same prompts, pair by pair.

    A name before its sweep or `each` stands for all of it: one comparison per combination of variables, those of
    `pool` left out, whose conditions count as repetitions of a prompt. `second` is the one that agrees with `first` in
    the variables that both have. All comparisons of a family are corrected together (Holm, Benjamini and Hochberg).

    `among` names random conditions, at least 20: how far `first` is from `second` is then ranked among how far each of
    them is, and that rank's p-value is reported and corrected instead of the paired test's.
    """

    first: OneOrMore
    second: str
    prompts: OneOrMore
    outcome: Outcome = "refusal"
    family: Name = "main"
    pool: list[str] = ["seed"]
    among: str | None = Field(default=None, description="random conditions that the effect is ranked among")
    judge: str | None = Field(default=None, description="of refusals, where the study has several")


class Claim(Strict):
    """Something that a paper says, and the rule by which this study's results show it or not, stated beforehand."""

    paper: str = Field(min_length=1, description="what it says, in words")
    comparisons: OneOrMore | None = Field(default=None, description="the rows that decide")
    query: str | None = Field(default=None, description="SQL, another table that belongs to it")
    rule: str = Field(min_length=1, description="when the results show it, in words")
    shown: str = Field(min_length=1, description="the rule as SQL: one boolean; $study is the study's name")
