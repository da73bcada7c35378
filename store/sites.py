"""Sites and positions: where in the model, and at which token, an activation is read or written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Component = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
COMPONENTS: tuple[Component, ...] = get_args(Component)

RESPONSE_POSITIONS = ("response_start", "response_avg")
NAMED_POSITIONS = ("prompt_end", *RESPONSE_POSITIONS)
ALL_TOKENS = "all_tokens"  # what a capture may ask for: every token of prompt and response, each on its own
_TOKEN = re.compile(r"token:(0|-?[1-9][0-9]*)")  # one spelling per index


@dataclass(frozen=True, order=True)
class Site:
    """A named place in the residual stream.

    ``resid_pre.L`` is the input of block L, ``resid_post.L`` its output; ``attn_out.L`` and ``mlp_out.L`` are what
    the attention and the MLP of block L add to the stream (after a post-norm and a residual multiplier, where the
    architecture has them). ``resid_pre.L`` equals ``resid_post.(L-1)``. The output of the final norm is no site.
    """

    component: Component
    layer: int

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            raise ValueError(f"unknown site component {self.component!r}; known: {', '.join(COMPONENTS)}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"a site's layer is an integer >= 0, not {self.layer!r}")

    def __str__(self) -> str:
        return f"{self.component}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read ``resid_post.14``.

        Raises:
            ValueError: if the text is not a component, a dot and a layer.
        """
        component, _, layer = text.partition(".")
        if component not in COMPONENTS or re.fullmatch(r"0|[1-9][0-9]*", layer) is None:
            raise ValueError(f"{text!r} is no site; write <component>.<layer>, for example resid_post.14")
        return cls(component, int(layer))


def check_position(text: str) -> str:
    """Return ``text`` if it names a position: prompt_end, response_start, response_avg or ``token:<index>``.

    ``token:<index>`` counts tokens of the whole row from 0; negative indices count from its end.

    Raises:
        ValueError: otherwise.
    """
    if text in NAMED_POSITIONS or _TOKEN.fullmatch(text):
        return text
    raise ValueError(f"unknown position {text!r}; known: {', '.join(NAMED_POSITIONS)}, token:<index>")


def token_index(position: str) -> int:
    """Return the index of ``token:<index>``.

    Raises:
        ValueError: for any other position.
    """
    match = _TOKEN.fullmatch(position)
    if match is None:
        raise ValueError(f"unknown position {position!r}")
    return int(match[1])


@dataclass(frozen=True)
class Spans:
    """Which tokens of a row are prompt and response: half-open ranges over token indices of the unpadded row.

    The prompt starts at 0 and includes the generation prompt. The response excludes its end-of-turn token.
    ``response_end == prompt_length`` means that the row has no response.
    """

    prompt_length: int
    response_end: int

    def __post_init__(self) -> None:
        if not 0 < self.prompt_length <= self.response_end:
            raise ValueError(f"need 0 < prompt_length <= response_end, got {self.prompt_length}, {self.response_end}")

    @property
    def has_response(self) -> bool:
        return self.response_end > self.prompt_length

    def token_range(self, position: str) -> tuple[int, int]:
        """Return the half-open range of tokens of a position: one token; of response_avg, those that it averages over;
        of all_tokens, every one.

        Raises:
            ValueError: if the row has no such position (a response position without a response, or an index
                outside the row).
        """
        if position == "prompt_end":
            return self.prompt_length - 1, self.prompt_length
        if position == ALL_TOKENS:
            return 0, self.response_end
        if position in RESPONSE_POSITIONS:
            if not self.has_response:
                raise ValueError(f"position {position} needs a response, and this row has none")
            end = self.prompt_length + 1 if position == "response_start" else self.response_end
            return self.prompt_length, end
        index = token_index(position)
        start = index + self.response_end if index < 0 else index
        if not 0 <= start < self.response_end:
            raise ValueError(f"position {position} is outside a row of {self.response_end} tokens")
        return start, start + 1
