"""The activation store: all captured activations of all models, found by row key.

``<store>/<model>/<generation>/`` holds one capture each (`store.generation`). A study that adds rows, layers or
positions adds a generation with just these; reading goes by row key over all of them, so which capture produced a row,
and in what order, never matters.
"""

from __future__ import annotations

import difflib
import json
import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
import zarr
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from store.errors import MismatchError, MissingDataError
from store.finding import CAPTURE
from store.fingerprint import short
from store.generation import FORMAT_VERSION, format_mismatch
from store.location import Location
from store.model_store import BlockRef as BlockRef  # these are part of this module's interface
from store.model_store import CaptureWork as CaptureWork
from store.model_store import ModelStore as ModelStore
from store.model_store import read_json
from store.needs import CaptureRequest as CaptureRequest
from store.selection import Selection
from store.sites import ALL_TOKENS, COMPONENTS, NAMED_POSITIONS, Site, check_position


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
            raise MissingDataError(f"{self.location} holds nothing of model {short(fingerprint)}\n  remedy: {CAPTURE}")
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
        found = [each for each in every if model is None or model in _names(each) or _is_prefix(model, each)]
        if len(found) == 1:
            return found[0]
        listed = "".join(
            f"\n  {short(each.fingerprint)}  {', '.join((*_names(each)[:1], each.manifest['dtype']))}"
            for each in found or every
        )
        if found:
            raise MismatchError(f"{self.location} holds {len(found)} such models; say which by fingerprint:{listed}")
        if every:
            meant = _meant(str(model), [name for each in every for name in _names(each)])
            raise MissingDataError(
                f"{self.location} holds no model {model!r}{meant}; it holds:{listed}\n"
                f"  remedy: name one of these, or {CAPTURE} --store {self.location}"
            )
        raise MissingDataError(f"{self.location} holds no activations\n  remedy: {CAPTURE} --store {self.location}")

    def select(
        self,
        *,
        prompts: str | Iterable[str] | None = None,
        rows: str | Iterable[str] | None = None,
        model: str | None = None,
        study: str | None = None,
        responses: str | None = None,
        site: str = "resid_post",
        layer: SupportsIndex | Iterable[SupportsIndex] | None = None,
        position: str = "prompt_end",
    ) -> Selection:
        """Find activations, to be read lazily: ``select(prompts="harmful@train", layer=14).to_numpy()``.

        Args:
            prompts: a prompt set of a captured study, or several; rows come in prompt order.
            rows: row keys instead; without either, every row that is captured there, at all of the layers asked for.
            model: see `find_model`.
            study: whose prompt sets, where studies have different ones of one name.
            responses: the condition that generated the responses; None for prompts (with given responses).
            site: ``resid_post``, or with its layer ``resid_post.14``.
            layer: a number (the result has no layer axis), several, or None for all.
            position: prompt_end, response_start, response_avg, ``token:<index>`` or all_tokens.

        Raises:
            MissingDataError: if something is not there, with the command that would capture or import it.
            MismatchError: if model or prompt set is ambiguous.
            ValueError: if site or position is none, the model has no such layer, or arguments exclude each other.
        """
        if prompts is not None and rows is not None:
            raise ValueError("give prompts or rows, not both")
        if prompts is None and (study is not None or responses is not None):
            raise ValueError("study and responses say which prompt sets are meant: give prompts, too")
        if "." in site:
            if layer is not None:
                raise ValueError(f"site {site!r} names its layer: leave out layer={layer!r}")
            parsed = Site.parse(site)
            site, layer = parsed.component, parsed.layer
        if site not in COMPONENTS:
            meant = _meant(site, COMPONENTS)
            known = f"known: {', '.join(COMPONENTS)}, also with a layer: resid_post.14"
            raise ValueError(f"unknown site {site!r}{meant}; {known}")
        _check_position(position)
        store = self.find_model(model)
        layers, alone = _layers(layer, store)
        wanted = f"layers: {'all' if layers is None else layers}"
        asks = f"components: [{site}], positions: [{position}], {wanted}"
        remedy = store.remedy(asks)
        if prompts is not None:
            found = store.memberships.find([prompts] if isinstance(prompts, str) else prompts, study, responses)
            keys = found.keys
            remedy = store.remedy(asks, found.study_file)
        elif rows is not None:
            keys = (rows,) if isinstance(rows, str) else tuple(rows)
        else:
            keys = store.committed_rows(site, position, layers)
            if not keys:
                at = "" if layers is None else f" at all of the layers {layers}"
                raise MissingDataError(f"{store.location} holds no {site} at {position}{at}\n  remedy: {remedy}")
        selection = store.select(keys, site, position, layers, remedy)
        selection.layer_axis = not alone
        return selection

    def preview(self, manifest: dict[str, Any]) -> ModelStore:
        """Return one model's part as `add_model` would, without writing anything."""
        store = ModelStore(self.location / short(manifest["fingerprint"]), manifest)
        return self.model(manifest["fingerprint"]) if (store.location / "model.json").exists() else store

    def add_model(self, manifest: dict[str, Any]) -> ModelStore:
        """Register a model (keys: fingerprint, dtype, n_layers, d_model, ...); the first manifest of a model stays.

        Raises:
            ResourceError: if the store cannot be written, or is on object storage that ignores conditional puts.
        """
        self.location.require_first_wins()
        self.location.make_folder()
        (self.location / "resid.json").create(json.dumps({"format_version": FORMAT_VERSION}).encode())
        store = ModelStore(self.location / short(manifest["fingerprint"]))
        store.location.make_folder()
        group: dict[str, Buffer] = {}
        zarr.open_group(MemoryStore(group), mode="w", zarr_format=3)
        # Not by zarr-python: a full disk is to be an error with a remedy.
        (store.location / "zarr.json").create(bytes(group["zarr.json"].to_bytes()))
        (store.location / "model.json").create(json.dumps(manifest, indent=1, sort_keys=True).encode())
        return self.model(manifest["fingerprint"])


def _names(model: ModelStore) -> tuple[str, ...]:
    """Return what a study calls a model: its hub id or path, and the last part of that."""
    source = model.manifest.get("ref", {}).get("source")
    return (source, source.rstrip("/").rpartition("/")[2]) if source else ()


def _is_prefix(text: str, model: ModelStore) -> bool:
    return bool(text) and model.fingerprint.startswith(text)


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_position(position: str) -> None:
    if position == ALL_TOKENS:
        return
    try:
        check_position(position)
    except ValueError as error:
        known = (*NAMED_POSITIONS, ALL_TOKENS)
        raise ValueError(f"{error} (also {ALL_TOKENS}){_meant(position, known)}") from None


def _layers(layer: SupportsIndex | Iterable[SupportsIndex] | None, model: ModelStore) -> tuple[list[int] | None, bool]:
    """Return the layers asked for (None: all), and whether it was one, given as a number.

    Raises:
        ValueError: if that is none, or the model does not have it.
    """
    if layer is None:
        return None, False
    try:
        layers, alone = [_integer(layer)], True
    except TypeError:
        try:
            layers, alone = [_integer(each) for each in layer], False  # type: ignore[union-attr]
        except TypeError:
            wrong = f"layer is a number, several (a list, a range), or None for all, not {layer!r}"
            raise ValueError(wrong) from None
    if not layers:
        raise ValueError("no layers were asked for; leave out `layer` for all")
    count = model.manifest.get("n_layers")
    if outside := [each for each in layers if each < 0 or (count is not None and each >= count)]:
        has = "layers count from 0" if count is None else f"the model has the layers 0 to {count - 1}"
        raise ValueError(f"there is no layer {outside[0]}: {has}")
    return layers, alone


def _integer(value: Any) -> int:
    if isinstance(value, bool | np.bool_):  # Python takes True for 1: more likely part of a mask
        raise TypeError("a truth value is no layer")
    return operator.index(value)
