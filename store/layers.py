"""How a study names layers: absolute numbers, fractions of depth, ranges, all, or by reference (`store.references`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from store.references import is_reference
from store.yaml_file import fault

_REMEDY = "write all, [10, 20], [0.5] (a fraction of depth), or {from: 14, to: -1}"


def _layer_number(value: Any) -> Any:
    """Keep integers and fractions apart: pydantic's smart mode would read True as 1 and '3' as 3."""
    if is_reference(value):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fault(
            f"{value!r} is no layer", "write an integer (negative ones count from the last) or a fraction such as 0.66"
        )
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise fault(
            f"{value} is no fraction of depth (0.0 is the first layer, 1.0 the last)",
            "write an integer for an absolute layer",
        )
    return value


LayerValue = int | float | str  # a text is a reference
LayerNumber = Annotated[LayerValue, BeforeValidator(_layer_number)]


class LayerRange(BaseModel):
    """An inclusive range of layers, written ``{from: 14, to: -1, step: 2}``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    start: LayerNumber = Field(alias="from")
    stop: LayerNumber = Field(alias="to")
    step: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _forwards(self) -> LayerRange:
        if isinstance(self.start, str) or isinstance(self.stop, str):
            return self
        # Of ends that count in different ways only the model's depth tells; `resolve_layers` checks these.
        alike = type(self.start) is type(self.stop) and (self.start < 0) == (self.stop < 0)
        if alike and self.stop < self.start:
            raise fault(f"the range from {self.start} to {self.stop} is empty", "swap its ends")
        return self


def _layers(value: Any) -> Any:
    if is_reference(value) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return [value]
    if not (value == "all" or isinstance(value, (list, dict, LayerRange))):
        raise fault(f"{value!r} names no layers", _REMEDY)
    if value == []:
        raise fault("the list of layers is empty", _REMEDY)
    return value


LayersValue = Literal["all"] | list[LayerValue] | LayerRange
Layers = Annotated[Literal["all"] | list[LayerNumber] | LayerRange, BeforeValidator(_layers)]


def resolve_layer(layer: LayerValue, n_layers: int) -> int:
    """Return the absolute layer in [0, n_layers).

    A fraction f of depth is layer round(f * (n_layers - 1)); halves round up, so that neighbouring model sizes agree.

    Raises:
        ValueError: if the model has no such layer; the message gives the valid range. Or for a reference.
    """
    if isinstance(layer, str):
        raise ValueError(f"the layer {layer} is not chosen yet")
    if isinstance(layer, float):
        if not 0.0 <= layer <= 1.0:
            raise ValueError(f"{layer} is no fraction of depth")
        return int(layer * (n_layers - 1) + 0.5)
    absolute = layer + n_layers if layer < 0 else layer
    if not 0 <= absolute < n_layers:
        valid = f"0 to {n_layers - 1}, or -{n_layers} to -1 from the last"
        raise ValueError(f"layer {layer} does not exist: the model has {n_layers} layers, {valid}")
    return absolute


def resolve_layers(layers: LayersValue, n_layers: int) -> list[int]:
    """Return the absolute layers that a study's ``layers:`` names, in its order, without repetition.

    Raises:
        ValueError: if the model lacks one of them or the range is empty.
    """
    if layers == "all":
        return list(range(n_layers))
    if isinstance(layers, LayerRange):
        start, stop = resolve_layer(layers.start, n_layers), resolve_layer(layers.stop, n_layers)
        if stop < start:
            raise ValueError(f"the range from {layers.start} to {layers.stop} is empty in a model of {n_layers} layers")
        return list(range(start, stop + 1, layers.step))
    if not layers:
        raise ValueError("the list of layers is empty")
    return list(dict.fromkeys(resolve_layer(layer, n_layers) for layer in layers))


def spell_ranges(numbers: Iterable[int]) -> str:
    """Spell numbers as ranges, sorted: 0-3, 7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
