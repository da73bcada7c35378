"""Sink tokens: a few tokens, usually the first, whose norm is far beyond that of all others.

Sun et al. 2024, "Massive Activations in Large Language Models" (arXiv:2402.17762), find them at fixed positions, with
values that hardly depend on the text. A projection at all tokens acts mostly on them. Here a token is a sink at a site
if its norm exceeds `SINK_TIMES` times the median norm there of the self-test's tokens. That bound belongs to the model
alone: it does not depend on the batch, on what else the row holds, or on how far it was read, so it holds for a token
that is just being generated, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from store.sites import Site
from store.study_interventions import SINK_TIMES


class SinkToken(BaseModel):
    """A token of the self-test's rows whose norm after some blocks is far beyond the median (`pipeline.sinks`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: int
    token: int  # its position
    layers: tuple[int, ...]  # after which blocks
    norm: float  # where it exceeds the median most
    times_median: float
    largest_at: int  # that layer


def typical(before: Mapping[Site, Sequence[Tensor]]) -> dict[Site, float]:
    """Return the median norm of tokens at each site; values are [token, d_model] by row."""
    return {
        site: torch.linalg.vector_norm(torch.cat(list(values)).float(), dim=-1).median().item()
        for site, values in before.items()
    }


def sink_tokens(before: Mapping[Site, Sequence[Tensor]], n_layers: int) -> tuple[SinkToken, ...]:
    """Return the tokens whose norm after some block is far beyond the median there."""
    norms_of = typical(before)
    found: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
    for layer in range(n_layers):
        site = Site("resid_post", layer)
        for row, values in enumerate(before[site]):
            norms = torch.linalg.vector_norm(values.float(), dim=-1)
            for token in (norms > SINK_TIMES * norms_of[site]).nonzero().flatten().tolist():
                norm = norms[token].item()
                found.setdefault((row, token), []).append((norm / norms_of[site], norm, layer))
    return tuple(
        SinkToken(
            row=row,
            token=token,
            layers=tuple(layer for _, _, layer in seen),
            norm=max(seen)[1],
            times_median=max(seen)[0],
            largest_at=max(seen)[2],
        )
        for (row, token), seen in sorted(found.items())
    )
