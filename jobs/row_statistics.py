"""Numbers that interventions take from captured rows: the mean or a percentile of h . v over prompt sets."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from jobs.context import Context
from store.errors import MissingDataError
from store.layers import resolve_layers
from store.sites import Site
from store.study_file import captures_of
from store.study_interventions import RowsStatistic


class RowStatistics:
    """Reads them from the activation store, block by block; what was read once is not read again."""

    def __init__(self, context: Context, *, predict: bool = False):
        """With `predict`, zeros stand in for rows that the study captures and has not captured yet, for planning."""
        self.context, self.predict = context, predict
        self._known: dict[tuple[str, Site, bytes], npt.NDArray[np.float64]] = {}

    def __call__(self, what: RowsStatistic, site: Site, vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the statistic of h . v at a site for each of `vectors` [rank, d_model]: [rank].

        Raises:
            MissingDataError: if a row is not known or not captured there.
        """
        known = (what.model_dump_json(), site, hashlib.sha256(np.ascontiguousarray(vectors).tobytes()).digest())
        if known not in self._known:
            try:
                along = self._along(what, site, vectors)
            except MissingDataError:
                if not self.predict or not self._will_be_captured(what, site):
                    raise
                return np.zeros(len(vectors))
            if what.percentile is None:
                self._known[known] = along.mean(axis=0)
            else:
                self._known[known] = np.percentile(along, what.percentile, axis=0)
        return self._known[known]

    def _will_be_captured(self, what: RowsStatistic, site: Site) -> bool:
        study, n_layers = self.context.study, self.context.recalled_model().n_layers
        return all(
            any(
                site.layer in resolve_layers(entry.layers, n_layers)
                for entry in captures_of(study, name, site.component, what.position, None)
            )
            for name in what.sets
        )

    def _along(self, what: RowsStatistic, site: Site, vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        keys = sorted(self.context.row_keys(what.sets, None))  # one order for the same rows
        model = self.context.store.model(self.context.recalled_model().fingerprint)
        chosen = model.select(keys, site.component, what.position, [site.layer])
        along = np.empty((len(keys), len(vectors)))
        for block in chosen.blocks():
            along[block.rows] = block.values[:, 0].astype(np.float64) @ vectors.T
        return along
