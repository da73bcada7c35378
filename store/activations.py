"""The activation store: all captured activations of all models, found by row key.

``<store>/<model>/<generation>/`` holds one capture each (`store.generation`). A study that adds rows, layers or
positions adds a generation with just these; reading goes by row key over all of them, so which capture produced a row,
and in what order, never matters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import zarr

from store.errors import MismatchError, MissingDataError
from store.finding import CAPTURE
from store.fingerprint import short
from store.generation import FORMAT_VERSION, format_mismatch
from store.layout import zarr_store
from store.location import Location
from store.model_store import BlockRef as BlockRef  # these are part of this module's interface
from store.model_store import CaptureWork as CaptureWork
from store.model_store import ModelStore as ModelStore
from store.model_store import read_json
from store.needs import CaptureRequest as CaptureRequest
from store.selection import Selection
from store.sites import ALL_TOKENS, COMPONENTS, Site, check_position


class ActivationStore:
    """A store on local disk or object storage."""

    def __init__(self, location: Location):
        self.location = location

    @classmethod
    def open(cls, url: str | Location) -> ActivationStore:
        """Open a store that may still be empty.

        Raises:
            MismatchError: if it was written in a newer format, or is a file.
            DamageError: if its resid.json is not one.
        """
        store = cls(url if isinstance(url, Location) else Location.of(url))
        if store.location.is_local and store.location.path.is_file():
            raise MismatchError(f"{store.location} is a file, not a store\n  remedy: name a folder")
        marker = store.location / "resid.json"
        if marker.exists():
            version = read_json(marker, ("format_version",))["format_version"]
            if version != FORMAT_VERSION:
                raise format_mismatch(store.location, version)
        return store

    def models(self) -> list[ModelStore]:
        return [
            ModelStore(self.location / name)
            for name in self.location.list()
            if not name.endswith(".json") and (self.location / name / "model.json").exists()
        ]

    def model(self, fingerprint: str) -> ModelStore:
        """Return one model's part.

        Raises:
            MissingDataError: if nothing was captured for it.
        """
        store = ModelStore(self.location / short(fingerprint))
        if not (store.location / "model.json").exists():
            raise MissingDataError(
                f"{self.location} holds nothing of model {short(fingerprint)}\n  remedy: resid capture --study <study>"
            )
        if store.fingerprint != fingerprint:
            raise MismatchError(f"{store.location} belongs to model {store.fingerprint}, not {fingerprint}")
        return store

    def find_model(self, model: str | None = None) -> ModelStore:
        """Return a model by the name that its studies give it (hub id, path), or by the beginning of its fingerprint.

        Args:
            model: None for the only one.

        Raises:
            MissingDataError: if there is none.
            MismatchError: if several models go by that name.
        """
        every = self.models()
        found = [
            each
            for each in every
            if model is None
            or each.fingerprint.startswith(model)
            or model in (name := str(each.manifest.get("ref", {}).get("source")), name.rpartition("/")[2])
        ]
        if len(found) == 1:
            return found[0]
        listed = "".join(
            f"\n  {short(each.fingerprint)}  {each.manifest.get('ref', {}).get('source')}, {each.manifest['dtype']}"
            for each in found or every
        )
        if found:
            raise MismatchError(f"{self.location} holds {len(found)} such models; say which by fingerprint:{listed}")
        if every:
            raise MissingDataError(f"{self.location} holds no model {model!r}; it holds:{listed}")
        raise MissingDataError(f"{self.location} holds no activations\n  remedy: {CAPTURE} --store {self.location}")

    def select(
        self,
        *,
        prompts: str | Sequence[str] | None = None,
        rows: Iterable[str] | None = None,
        model: str | None = None,
        study: str | None = None,
        responses: str | None = None,
        site: str = "resid_post",
        layer: int | Sequence[int] | None = None,
        position: str = "prompt_end",
    ) -> Selection:
        """Find activations, to be read lazily: ``select(prompts="harmful@train", layer=14).to_numpy()``.

        Args:
            prompts: a prompt set of a captured study, or several; rows come in prompt order.
            rows: row keys instead; without either, every row that is captured there.
            model: see `find_model`.
            study: whose prompt sets, where studies have different ones of one name.
            responses: the condition that generated the responses; None for prompts (with given responses).
            site: ``resid_post``, or with its layer ``resid_post.14``.
            layer: a number (the result has no layer axis), several, or None for all.
            position: prompt_end, response_start, response_avg, ``token:<index>`` or all_tokens.

        Raises:
            MissingDataError: if something is not captured, with the command that would capture it.
            MismatchError: if model or prompt set is ambiguous.
            ValueError: if site or position is none.
        """
        if prompts is not None and rows is not None:
            raise ValueError("give prompts or rows, not both")
        if "." in site:
            if layer is not None:
                raise ValueError(f"site {site!r} names its layer: leave out layer={layer!r}")
            parsed = Site.parse(site)
            site, layer = parsed.component, parsed.layer
        if site not in COMPONENTS:
            raise ValueError(f"unknown site {site!r}; known: {', '.join(COMPONENTS)}, also with a layer: resid_post.14")
        if position != ALL_TOKENS:
            check_position(position)
        store = self.find_model(model)
        layers = [layer] if isinstance(layer, int) else layer
        remedy = CAPTURE
        if prompts is not None:
            found = store.memberships.find([prompts] if isinstance(prompts, str) else prompts, study, responses)
            keys = found.keys
            if found.study_file is not None:
                remedy = CAPTURE.replace("<study>", found.study_file)
        else:
            keys = tuple(rows) if rows is not None else store.committed_rows(site, position)
        wanted = f"layers: {'all' if layers is None else list(layers)}"
        asks = f"its `capture` has to ask for components: [{site}], positions: [{position}], {wanted}"
        selection = store.select(keys, site, position, layers, f"{remedy} ({asks})")
        selection.layer_axis = not isinstance(layer, int)
        return selection

    def preview(self, manifest: dict[str, Any]) -> ModelStore:
        """Return one model's part as `add_model` would, without writing anything."""
        store = ModelStore(self.location / short(manifest["fingerprint"]), manifest)
        return self.model(manifest["fingerprint"]) if (store.location / "model.json").exists() else store

    def add_model(self, manifest: dict[str, Any]) -> ModelStore:
        """Register a model (keys: fingerprint, dtype, n_layers, d_model, ...); the first manifest of a model stays."""
        self.location.make_folder()
        (self.location / "resid.json").create(json.dumps({"format_version": FORMAT_VERSION}).encode())
        store = ModelStore(self.location / short(manifest["fingerprint"]))
        store.location.make_folder()
        zarr.open_group(zarr_store(store.location, read_only=False), mode="a", zarr_format=3)
        (store.location / "model.json").create(json.dumps(manifest, indent=1, sort_keys=True).encode())
        return self.model(manifest["fingerprint"])
