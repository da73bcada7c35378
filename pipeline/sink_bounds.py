"""The norm beyond which a token is a sink at a site, measured once for each model (`pipeline.sinks` says why)."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from pipeline.models import LoadedModel
from pipeline.selftest import run_rows, trial_rows
from pipeline.sinks import typical
from store.sites import Site
from store.study_interventions import SINK_TIMES

_BOUNDS: WeakKeyDictionary[LoadedModel, Mapping[Site, float]] = WeakKeyDictionary()


def sink_bounds(model: LoadedModel) -> Mapping[Site, float]:
    """Return for each site of a model the norm beyond which a token is a sink there.

    They are rounded to three digits, so that the last bits of a machine's arithmetic do not move them.
    """
    if model not in _BOUNDS:
        rows = trial_rows(model.model, model.tokenizer)
        norms = typical(run_rows(model.model, model.architecture, rows, "right").before)
        _BOUNDS[model] = {site: float(f"{SINK_TIMES * norm:.3g}") for site, norm in norms.items()}
    return _BOUNDS[model]
