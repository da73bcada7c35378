"""The interventions of a study file: what they do, at which sites, on which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from store.layers import LayerNumber, Layers
from store.references import Reference
from store.sites import Component
from store.study_types import Listed, Position, Strict
from store.yaml_file import fault, nearest


class MatchNorm(Strict):
    """Rescale to the raw norm of another direction at the same layer."""

    match: str


class TokenRange(Strict):
    """Tokens from one index up to another that is left out.

    Directly under `tokens`, indices count in the prompt, negative ones from its end, and a range without `to` goes on
    through the response. Under `prompt` a range ends with the prompt; under `response` it counts response tokens.
    """

    first: int = Field(default=0, alias="from")
    end: int | None = Field(default=None, alias="to", description="default: no end")

    @model_validator(mode="after")
    def _holds_tokens(self) -> TokenRange:
        same_side = self.end is not None and (self.first < 0) == (self.end < 0)
        if self.end is not None and ((same_side and self.end <= self.first) or self.end == 0):
            raise fault(
                f"no token lies from {self.first} up to {self.end}",
                "`to` is the first token that is left out; leave it out for no end",
            )
        return self

    def span(self, prompt_length: int) -> tuple[int, int]:
        """Return the part of the range that lies in a prompt of so many tokens, half-open, counted from its start.

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


Part = Literal["system", "user", "assistant", "template"]
Sink = Literal["with", "without", "only"]
# A sink token's norm exceeds so many times the site's typical one (`pipeline.sinks`). Part of condition keys.
SINK_TIMES = 10.0
SINK_RULE = f"norm > {SINK_TIMES:g} x median of the self-test's tokens"


class TokenScope(Strict):
    """Tokens of the prompt and of the response, by turns of the prompt, with or without sink tokens.

    Each key narrows the scope. Where neither `prompt` nor `response` is given, `parts` means the prompt alone and
    `sink` means both.
    """

    prompt: Literal["all"] | TokenRange | None = None
    response: Literal["all"] | TokenRange | None = None
    parts: list[Part] | None = Field(default=None, description="turns of the prompt, or the template's own tokens")
    sink: Sink = "with"

    @model_validator(mode="after")
    def _holds_tokens(self) -> TokenScope:
        if self.parts == []:
            raise fault("`parts` names no part", "write parts: [system, user], or leave it out")
        if self.parts and len(set(self.parts)) < len(self.parts):
            raise fault("`parts` names a part twice", "name each part once")
        if self.parts and self.response is not None and self.prompt is None:
            raise fault("`parts` are of the prompt, and only `response` is given", "add prompt: all, or drop `parts`")
        if isinstance(self.response, TokenRange) and (self.response.first < 0 or (self.response.end or 0) < 0):
            raise fault("response tokens count from its start", "use numbers from 0; its end is not known beforehand")
        return self


Bounds = tuple[int, int | None]


@dataclass(frozen=True)
class Region:
    """What any spelling of `tokens` means: a range of the prompt, a range of the response, turns, and sink tokens."""

    prompt: Bounds | None  # half-open; negative numbers count from the prompt's end
    response: Bounds | None  # half-open, from the response's start
    parts: tuple[Part, ...] = ()  # () stands for the whole prompt
    sink: Sink = "with"
    spans_in_prompt: tuple[tuple[int, int], ...] | None = None  # of one row, once its parts are known

    def spans(self, prompt_length: int) -> tuple[Bounds, ...]:
        """Return which positions of a row the region holds: ascending, half-open; None is the row's end.

        Raises:
            ValueError: if the range is not in the prompt, or the region's parts have not been looked up in the row.
        """
        found: list[Bounds] = []
        if self.parts and self.spans_in_prompt is None:
            raise ValueError(f"where {', '.join(self.parts)} tokens lie in this prompt is not known")
        if self.prompt is not None:
            if self.spans_in_prompt is not None:
                found += self.spans_in_prompt
            elif self.prompt == (0, None):
                found.append((0, prompt_length))
            else:
                found.append(self.in_prompt(prompt_length))
        if self.response is not None:
            first, end = self.response
            begin = prompt_length + first
            if found and found[-1][1] == begin:
                begin = found.pop()[0]
            found.append((begin, None if end is None else prompt_length + end))
        return tuple(span for span in found if span[1] is None or span[0] < span[1])

    def in_prompt(self, prompt_length: int) -> tuple[int, int]:
        """Return the range of the prompt, parts left out of account.

        Raises:
            ValueError: if it is empty there or reaches beyond the prompt.
        """
        assert self.prompt is not None
        return TokenRange.model_validate({"from": self.prompt[0], "to": self.prompt[1]}).span(prompt_length)

    @property
    def counted(self) -> bool:
        """Whether it depends on the prompt's own length or turns which of its tokens are meant."""
        return self.prompt is not None and (self.prompt != (0, None) or bool(self.parts))

    @property
    def bounded(self) -> bool:
        """Whether response tokens are treated differently by where they stand."""
        return self.response is not None and self.response != (0, None)

    @property
    def identity(self) -> object:
        """What stands for the region in condition keys; spellings of one region agree.

        Regions that a study could state before there were sink tokens and parts keep the record of then.
        """
        if not self.parts and self.sink == "with":
            if (self.prompt, self.response) in _PLAIN:
                return _PLAIN[self.prompt, self.response]
            if self.response is None and self.prompt is not None:
                return {"first": self.prompt[0], "end": self.prompt[1]}
        record: dict[str, object] = {"prompt": self.prompt, "response": self.response}
        if self.parts:
            record["parts"] = sorted(self.parts)
        if self.sink != "with":
            record["sink"] = {"which": self.sink, "rule": SINK_RULE}
        return record


_WHOLE: Bounds = (0, None)
_PLAIN: dict[tuple[Bounds | None, Bounds | None], str] = {
    (_WHOLE, _WHOLE): "all",
    (_WHOLE, None): "prompt",
    (None, _WHOLE): "response",
}
_NAMED: dict[str, Region] = {
    "all": Region(_WHOLE, _WHOLE),
    "prompt": Region(_WHOLE, None),
    "response": Region(None, _WHOLE),
    "all_but_sink": Region(_WHOLE, _WHOLE, sink="without"),
    "sink": Region(_WHOLE, _WHOLE, sink="only"),
}


def region_of(tokens: Scope | TokenRange | TokenScope | Region) -> Region:
    """Return what a spelling of `tokens` means."""
    match tokens:
        case Region():
            return tokens
        case str():
            return _NAMED[tokens]
        case TokenRange():
            return Region((tokens.first, tokens.end), _WHOLE if tokens.end is None else None)
    neither = tokens.prompt is None and tokens.response is None
    prompt = tokens.prompt or ("all" if neither else None)
    response = tokens.response or ("all" if neither and not tokens.parts else None)
    return Region(_bounds(prompt), _bounds(response), tuple(tokens.parts or ()), tokens.sink)


def _bounds(value: Literal["all"] | TokenRange | None) -> Bounds | None:
    if isinstance(value, TokenRange):
        return value.first, value.end
    return None if value is None else _WHOLE


def _tokens(value: Any) -> Any:
    if isinstance(value, str) and value not in _SCOPES:
        raise fault(f"unknown tokens {value!r}", nearest(value, _SCOPES))
    return value


def _form(value: Any) -> str:
    if isinstance(value, str):
        return "scope"
    if isinstance(value, TokenScope) or (isinstance(value, dict) and set(value) & set(TokenScope.model_fields)):
        return "parts"
    return "range"


_SCOPES = ("all", "prompt", "response", "all_but_sink", "sink")
Scope = Literal["all", "prompt", "response", "all_but_sink", "sink"]
Tokens = Annotated[
    Annotated[Scope, Tag("scope")] | Annotated[TokenRange, Tag("range")] | Annotated[TokenScope, Tag("parts")],
    Discriminator(_form),
    BeforeValidator(_tokens),
]


class RowsStatistic(Strict):
    """Mean or percentile of h . v_hat over captured rows, at the site where it is used: {mean: harmless@train}."""

    mean: Listed | None = Field(default=None, description="prompt sets")
    percentile: Annotated[float, Field(ge=0, le=100)] | None = None
    of: Listed | None = Field(default=None, description="prompt sets, of a percentile")
    position: Position = "prompt_end"

    @model_validator(mode="after")
    def _one(self) -> RowsStatistic:
        if (self.mean is None) == (self.percentile is None) or (self.percentile is None) != (self.of is None):
            raise fault(
                "rows are summed up by a mean or by a percentile",
                "write {mean: harmless@train} or {percentile: 95, of: harmless@train}",
            )
        return self

    @property
    def sets(self) -> list[str]:
        """The prompt sets whose rows are read."""
        return list(self.mean or self.of or ())


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
    to: RowsStatistic | None = Field(default=None, description="what the component becomes; default: 0")
    fraction: float = Field(default=1.0, ge=0, le=1, description="how much of the way: 0 leaves everything as it is")
    from_layer: LayerNumber | None = None
    from_offset: int = 0


Side = Literal["both", "at_most", "at_least"]


class Clamp(Strict):
    """``h + (projection - h . v_hat) v_hat``: every token gets the same projection along the unit vector."""

    refused: ClassVar[dict[str, str]] = {
        "coefficient": "clamp takes no coefficient: `projection` says what h . v_hat becomes",
        "norm": "clamp takes no norm: `projection` is in units of the stream, along the unit vector",
    }

    clamp: str
    projection: float | RowsStatistic = Field(description="what h . v_hat becomes")
    side: Side = Field(default="both", description="at_most: larger projections alone are changed; at_least: smaller")
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


def statistic_of(item: Add | ProjectOut | Clamp) -> RowsStatistic | None:
    """Return what an intervention takes from captured rows, beside its directions."""
    if isinstance(item, ProjectOut):
        return item.to
    return item.projection if isinstance(item, Clamp) and isinstance(item.projection, RowsStatistic) else None


def directions_of(item: Add | ProjectOut | Clamp) -> list[str]:
    """Return the names of the directions that an intervention acts along, without what only gives a norm."""
    if isinstance(item, Add):
        return [item.add]
    return [item.clamp] if isinstance(item, Clamp) else list(item.project_out)
