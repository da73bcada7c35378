"""Selections written as files that other programs read: npz, safetensors, Parquet, a Hugging Face data set.

Rows come in the order in which they are stored, block by block, so memory stays at a few blocks; row keys, and prompts
where the store knows them, say which is which. float32 holds every storage dtype exactly; "stored" keeps the 16-bit
types where the format has them. A file appears under its name when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import MismatchError, ResourceError
from store.faults import faults
from store.location import PARTIAL
from store.selection import Dtype, Selection

FORMATS = ("npz", "safetensors", "parquet", "hf")
MOST_HEADER = 100_000_000  # bytes that readers of safetensors accept
ROW_GROUP_BYTES = 16 << 20

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ARROW = {"float32": pa.float32(), "float16": pa.float16()}


@dataclass(frozen=True)
class Export:
    """A selection about to be written.

    Args:
        prompts: row key -> (prompt id, text), as far as known.
    """

    selection: Selection
    prompts: Mapping[str, tuple[str, str | None]]
    dtype: Dtype = "float32"

    @cached_property
    def ordered(self) -> Selection:
        return self.selection.in_stored_order()

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """[row or token, layer, d_model]."""
        return len(self.ordered), len(self.ordered.layers), self.ordered.d_model

    @cached_property
    def value_dtype(self) -> np.dtype[Any]:
        return self.ordered.dtype_of(self.dtype)

    @property
    def about(self) -> dict[str, Any]:
        """What the numbers are, for the file's metadata."""
        selection = self.ordered
        return {
            "component": selection.component,
            "layers": list(selection.layers),
            "position": selection.position,
            "dims": ["row" if selection.offsets is None else "token", "layer", "d_model"],
            "model": selection.parts[0].generation.plan.model,
            "captures": sorted({part.generation.id for part in selection.parts}),
            "resid": version("resid"),
        }

    @property
    def rows(self) -> dict[str, list[str | None]]:
        """Columns about the rows: row_key, prompt_id, text."""
        known = [self.prompts.get(key, (None, None)) for key in self.ordered.row_keys]
        return {
            "row_key": list(self.ordered.row_keys),
            "prompt_id": [prompt_id for prompt_id, _ in known],
            "text": [text for _, text in known],
        }

    def steps(self) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """Yield first row, last row + 1, values [row or token, layer, d_model] in C order: about a block at a time."""
        ordered = self.ordered
        n = len(ordered.row_keys)
        if ordered.offsets is None:
            step = max(len(part.into) for part in ordered.parts)
        else:
            starts = ordered.offsets[:-1]
            step = max(int(np.isin(starts, part.into).sum()) for part in ordered.parts)
        for start in range(0, n, step):
            stop = min(start + step, n)
            part = ordered.isel(slice(start, stop))
            part.layer_axis = True
            yield start, stop, np.ascontiguousarray(part.to_numpy(self.dtype))


def export(what: Export, format: str, output: Path, *, overwrite: bool = False) -> None:
    """Write a selection.

    Args:
        output: a file, or for "hf" a folder.

    Raises:
        MismatchError: if the output exists, or the format lacks the dtype.
        ResourceError: if the disk is full, or the place cannot be written.
        DamageError: if bytes are not those that were committed.
    """
    if format not in FORMATS:
        raise MismatchError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if what.value_dtype.name == "bfloat16" and format != "safetensors":
        raise MismatchError(f"{format} has no bfloat16\n  remedy: --dtype float32 (exact), or --format safetensors")
    if output.exists() and not overwrite:
        raise MismatchError(f"{output} exists\n  remedy: name another --output, or add --force")
    writers: dict[str, Callable[[Export, Path], None]] = {
        "npz": _npz,
        "safetensors": _safetensors,
        "parquet": _parquet,
        "hf": _hugging_face,
    }
    temporary = output.with_name(f"{output.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    with faults(str(output), "writing it"):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            writers[format](what, temporary)
            if output.is_dir():
                shutil.rmtree(output)
            os.replace(temporary, output)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _npz(what: Export, path: Path) -> None:
    """Arrays: activations, layers, offsets (all tokens), row_key, prompt_id, text, and `about` as JSON."""
    arrays: dict[str, npt.NDArray[Any]] = {"layers": np.array(what.ordered.layers)}
    if what.ordered.offsets is not None:
        arrays["offsets"] = what.ordered.offsets
    for name, column in what.rows.items():
        arrays[name] = np.array([value or "" for value in column])
    arrays["about"] = np.array(json.dumps(what.about))
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        with archive.open("activations.npy", "w", force_zip64=True) as stream:
            header = {"descr": what.value_dtype.str, "fortran_order": False, "shape": what.shape}
            np.lib.format.write_array_header_2_0(stream, header)
            for _, _, values in what.steps():
                stream.write(values.reshape(-1).view(np.uint8).data)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def _safetensors(what: Export, path: Path) -> None:
    """Tensors: activations, and offsets of all tokens; the header has `about`, and row_key, prompt_id, text as JSON."""
    size = int(np.prod(what.shape)) * what.value_dtype.itemsize
    kind = _SAFETENSORS[what.value_dtype.name]
    header: dict[str, Any] = {
        "__metadata__": {"about": json.dumps(what.about), **{k: json.dumps(v) for k, v in what.rows.items()}},
        "activations": {"dtype": kind, "shape": list(what.shape), "data_offsets": [0, size]},
    }
    offsets = what.ordered.offsets
    if offsets is not None:
        place = [size, size + offsets.nbytes]
        header["offsets"] = {"dtype": "I64", "shape": [len(offsets)], "data_offsets": place}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > MOST_HEADER:
        raise ResourceError(
            f"{path.name}: keys and texts of {len(what.ordered.row_keys):,} rows do not fit a safetensors header\n"
            "  remedy: --format parquet, or fewer rows a file"
        )
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(head)) + head)
        for _, _, values in what.steps():
            stream.write(values.reshape(-1).view(np.uint8).data)
        if offsets is not None:
            stream.write(offsets.astype("<i8").tobytes())


def _parquet(what: Export, path: Path) -> None:
    """One row per row (token) and layer: row_key, prompt_id, text, token_index, layer, activation FixedSizeList."""
    count = what.shape[1]
    kind = _ARROW[what.value_dtype.name]
    offsets = what.ordered.offsets
    ragged = offsets is not None
    fields = [
        pa.field("row_key", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string()),
        pa.field("text", pa.string()),
        *([pa.field("token_index", pa.int32(), nullable=False)] if ragged else []),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("activation", pa.list_(kind, what.shape[2]), nullable=False),
    ]
    schema = pa.schema(fields, metadata={"resid": json.dumps(what.about), "huggingface": _features(what, ragged)})
    group = max(1, ROW_GROUP_BYTES // (what.shape[2] * what.value_dtype.itemsize))
    rows = {name: np.array(values, dtype=object) for name, values in what.rows.items()}
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for start, stop, values in what.steps():
            lengths = np.ones(stop - start, np.int64)
            if offsets is not None:
                lengths = np.diff(offsets[start : stop + 1])
            each = np.repeat(np.arange(start, stop), lengths)
            columns: list[Any] = [pa.array(np.repeat(rows[name][each], count), pa.string()) for name in rows]
            if ragged:
                index = np.concatenate([np.arange(length) for length in lengths])
                columns.append(pa.array(np.repeat(index, count), pa.int32()))
            columns.append(pa.array(np.tile(np.array(what.ordered.layers), len(each)), pa.int32()))
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind), what.shape[2]))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=group)


def _features(what: Export, ragged: bool) -> str:
    """Return what the `datasets` library is to make of the columns."""
    text, number = {"dtype": "string", "_type": "Value"}, {"dtype": "int32", "_type": "Value"}
    value = {"dtype": what.value_dtype.name, "_type": "Value"}
    features = {
        "row_key": text,
        "prompt_id": text,
        "text": text,
        **({"token_index": number} if ragged else {}),
        "layer": number,
        "activation": {"feature": value, "length": what.shape[2], "_type": "List"},
    }
    return json.dumps({"info": {"features": features}})


def _hugging_face(what: Export, path: Path) -> None:
    """A folder for ``datasets.load_dataset``: data/train-00000-of-00001.parquet and a card."""
    (path / "data").mkdir(parents=True)
    _parquet(what, path / "data" / "train-00000-of-00001.parquet")
    about = what.about
    layers = ", ".join(str(layer) for layer in about["layers"])
    (path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: data/train-*.parquet\n---\n\n"
        f"# Activations: {about['component']} at {about['position']}\n\n"
        f"{len(what.ordered.row_keys)} rows, layers {layers}, d_model {what.shape[2]}, {what.value_dtype.name}. One "
        "record per row and layer; `layer` counts from 0, and `resid_post` is the output of that block.\n\n"
        f"Model fingerprint `{about['model']}`, captures {', '.join(about['captures'])}, resid {about['resid']}.\n",
        encoding="utf-8",
    )
