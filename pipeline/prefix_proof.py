"""Whether a loaded model may read the keys and values of a common start from a pass of its own."""

from __future__ import annotations

import logging
import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pipeline.architecture import Architecture
from pipeline.models import LoadedModel
from pipeline.prefix_cache import PaddedPass
from pipeline.prefix_tree import Segment
from pipeline.selftest import PADDING_BOUND
from store.sites import Site

# Rotary scalings that take another set of frequencies once a sequence is longer than the model was first trained for.
_LENGTH_DEPENDENT = ("dynamic", "longrope")

_PROVED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

log = logging.getLogger("resid")


def shares_prefixes(model: LoadedModel) -> bool:
    """Return whether tokens behind a pass's keys and values are what they are in one whole pass.

    Tried once for each loaded model, on two short sequences of unequal start: models that keep more than keys and
    values per layer, or count positions in a way of their own, would fail it and are run without sharing.
    """
    if model.model not in _PROVED:
        deviation = _deviation(model)
        _PROVED[model.model] = deviation <= PADDING_BOUND[model.dtype]
        if not _PROVED[model.model]:
            log.warning("%s cannot share common starts of rows (deviation %.1e): every row is run whole",
                        model.architecture.family, deviation)  # fmt: skip
    return _PROVED[model.model]


def rotary_limit(architecture: Architecture) -> float:
    """Return the number of tokens beyond which a row's angles depend on its length; infinite for most models."""
    config: Any = getattr(architecture.base, "config", None)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    settings = [scaling, *(value for value in scaling.values() if isinstance(value, dict))]
    for setting in settings:
        if setting.get("rope_type", setting.get("type")) in _LENGTH_DEPENDENT:
            first = setting.get("original_max_position_embeddings")
            return float(first or getattr(config, "original_max_position_embeddings", None)
                         or config.max_position_embeddings)  # fmt: skip
    return math.inf


@torch.inference_mode()
def _deviation(model: LoadedModel) -> float:
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    heads = [_segment(torch.randint(vocabulary, (n,), generator=generator), None) for n in (9, 5)]
    tails = [
        _segment(torch.randint(vocabulary, (n,), generator=generator), head)
        for n, head in zip((4, 6), heads, strict=True)
    ]
    whole = [_segment(torch.tensor(head.tokens + tail.tokens), None) for head, tail in zip(heads, tails, strict=True)]
    past = _last(model, heads, None, keep=True)[1]
    behind = _last(model, tails, past, keep=False)[0]
    at_once = _last(model, whole, None, keep=False)[0]
    worst = 0.0
    for row, tail in enumerate(tails):
        n = len(tail.tokens)
        expected = at_once[row, tail.start : tail.start + n].double()
        difference = (behind[row, :n].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = max(worst, float(difference.nan_to_num(nan=math.inf).max()))
    return worst


def _segment(tokens: Tensor, parent: Segment | None) -> Segment:
    return Segment(tuple(tokens.tolist()), parent.stop if parent else 0, [], parent=parent)


def _last(model: LoadedModel, segments: list[Segment], past: Any, keep: bool) -> tuple[Tensor, Any]:
    """Return what the last block gives, [segment, token, d_model], and the pass's keys and values if they are kept."""
    last = model.architecture.n_layers - 1
    found: list[Tensor] = []
    one_pass = PaddedPass(model, segments, past, keep)
    one_pass.run({Site("resid_post", last): found.append}, last)
    return found[0], one_pass.past() if keep else None
