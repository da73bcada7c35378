"""Selections written as files that other programs read: npz, safetensors, Parquet, a Hugging Face data set.

Rows come in the order in which they are stored, block by block, so memory stays at a few blocks; row keys, and prompts
where the store knows them, say which is which. float32 holds every storage dtype exactly; "stored" keeps the 16-bit
types where the format has them. A file appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import MismatchError, ResidError, ResourceError
from store.export_steps import Export as Export  # part of this module's interface
from store.faults import faults
from store.files import PARTIAL, sync_folder, writing
from store.selection import Dtype

FORMATS = ("npz", "safetensors", "parquet", "hf")
MOST_HEADER = 100_000_000  # bytes that readers of safetensors accept
SHARD_BYTES = 500_000_000  # of a Hugging Face data set: what its hub recommends at most

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ARROW = {"float32": pa.float32(), "float16": pa.float16()}
_ENTRIES = {"README.md", "data"}  # of a folder that `export` made


def default_dtype(format: str) -> Dtype:
    """Return the dtype that a format gets unless asked otherwise: the stored one where the format has them all."""
    return "stored" if format == "safetensors" else "float32"


def export(what: Export, format: str, output: Path, *, overwrite: bool = False) -> None:
    """Write a selection.

    Args:
        output: a file, or for "hf" a folder.
        overwrite: replace a file, or a folder that is such an export; anything else is refused all the same.

    Raises:
        MismatchError: if the output exists, or the format lacks the dtype.
        ResourceError: if the disk is full, or the place cannot be written.
        DamageError: if bytes are not those that were committed.
    """
    if format not in FORMATS:
        raise ResidError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if what.value_dtype.name == "bfloat16" and format != "safetensors":
        raise MismatchError(f"{format} has no bfloat16\n  remedy: --dtype float32 (exact), or --format safetensors")
    _check_output(output, format, overwrite)
    if format == "hf":
        _write_folder(what, output)
        return
    files: dict[str, Callable[[Export, BinaryIO], None]] = {
        "npz": _npz,
        "safetensors": _safetensors,
        "parquet": lambda what, stream: _parquet(what, lambda: stream),
    }
    with writing(output.absolute(), first_wins=False) as stream:
        files[format](what, stream)


def _check_output(output: Path, format: str, overwrite: bool) -> None:
    if not (output.exists() or output.is_symlink()):
        return
    if output.is_dir() != (format == "hf"):
        kind = "a folder" if output.is_dir() else "no folder"
        raise MismatchError(f"{output} exists and is {kind}\n  remedy: name another --output")
    if format == "hf" and not set(os.listdir(output)) <= _ENTRIES:
        # Never remove what somebody else put there.
        raise MismatchError(f"{output} exists and holds other files than an export\n  remedy: name another --output")
    if not overwrite:
        raise MismatchError(f"{output} exists\n  remedy: name another --output, or add --force")


# -- npz -----------------------------------------------------------------------------------------------------------


def _npz(what: Export, stream: BinaryIO) -> None:
    """Arrays: activations, layers, row_key, offsets (all tokens); as JSON: about, prompt_id, text."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "layers": np.array(what.ordered.layers),
        "row_key": np.array(what.ordered.row_keys),
        # One string: an array of strings has room for the longest text in each row.
        "prompt_id": np.array(json.dumps(what.rows["prompt_id"])),
        "text": np.array(json.dumps(what.rows["text"])),
        "about": np.array(json.dumps(what.about)),
    }
    if what.ordered.offsets is not None:
        arrays["offsets"] = what.ordered.offsets
    with zipfile.ZipFile(stream, "w", allowZip64=True) as archive:
        with archive.open("activations.npy", "w", force_zip64=True) as member:
            header = {"descr": what.value_dtype.str, "fortran_order": False, "shape": what.shape}
            np.lib.format.write_array_header_2_0(member, header)
            for _, values in what.steps():
                member.write(values.reshape(-1).view(np.uint8).data)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


# -- safetensors -----------------------------------------------------------------------------------------------------


def _safetensors(what: Export, stream: BinaryIO) -> None:
    """Tensors: activations, and offsets of all tokens. Header: about, row_key, prompt_id, text, each as JSON."""
    size = int(np.prod(what.shape)) * what.value_dtype.itemsize
    header: dict[str, Any] = {
        "__metadata__": {"about": json.dumps(what.about), **{k: json.dumps(v) for k, v in what.rows.items()}}
    }
    offsets, begin = what.ordered.offsets, 0
    if offsets is not None:
        # First, so that they lie at a multiple of eight bytes, as readers need it.
        begin = offsets.nbytes
        header["offsets"] = {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [0, begin]}
    header["activations"] = {
        "dtype": _SAFETENSORS[what.value_dtype.name],
        "shape": list(what.shape),
        "data_offsets": [begin, begin + size],
    }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > MOST_HEADER:
        raise ResourceError(
            f"keys and texts of {len(what.ordered.row_keys):,} rows do not fit a safetensors header\n"
            "  remedy: --format parquet, or fewer rows a file"
        )
    stream.write(struct.pack("<Q", len(head)) + head)
    if offsets is not None:
        stream.write(offsets.astype("<i8").tobytes())
    for _, values in what.steps():
        stream.write(values.reshape(-1).view(np.uint8).data)


# -- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(what: Export, next_file: Callable[[], Any], most_bytes: int | None = None) -> None:
    """One record per row (token) and layer: row_key, prompt_id, text, token_index, layer, activation (a fixed list).

    Args:
        next_file: opens a file, or names the next one.
        most_bytes: of values in a file; None for one file.
    """
    ordered = what.ordered
    layers, d_model = np.array(ordered.layers), ordered.d_model
    schema = _schema(what)
    rows: Mapping[str, npt.NDArray[Any]] = {k: np.array(v, dtype=object) for k, v in what.rows.items()}
    writer: pq.ParquetWriter | None = None
    written = 0
    try:
        for start, values in what.steps():
            if writer is not None and most_bytes is not None and written + values.nbytes > most_bytes:
                writer.close()
                writer = None
            if writer is None:
                writer = pq.ParquetWriter(next_file(), schema, compression="zstd", write_page_checksum=True)
                written = 0
            written += values.nbytes
            entries = np.arange(start, start + len(values))
            of_row, token = what.rows_of(entries)
            columns: list[Any] = [pa.array(np.repeat(rows[name][of_row], len(layers)), pa.string()) for name in rows]
            if ordered.offsets is not None:
                columns.append(pa.array(np.repeat(token, len(layers)), pa.int32()))
            columns.append(pa.array(np.tile(layers, len(values)), pa.int32()))
            flat = pa.array(values.reshape(-1), _ARROW[what.value_dtype.name])
            columns.append(pa.FixedSizeListArray.from_arrays(flat, d_model))
            # A step is a row group.
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(entries) * len(layers))
    finally:
        if writer is not None:
            writer.close()


def _schema(what: Export) -> pa.Schema:
    kind = _ARROW[what.value_dtype.name]
    ragged = what.ordered.offsets is not None
    fields = [
        pa.field("row_key", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string()),
        pa.field("text", pa.string()),
        *([pa.field("token_index", pa.int32(), nullable=False)] if ragged else []),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("activation", pa.list_(kind, what.shape[2]), nullable=False),
    ]
    return pa.schema(fields, metadata={"resid": json.dumps(what.about), "huggingface": _features(what, ragged)})


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


# -- Hugging Face ----------------------------------------------------------------------------------------------------


def _write_folder(what: Export, output: Path) -> None:
    """Write a folder for ``datasets.load_dataset``: data/train-00000-of-00001.parquet, ... and a card."""
    output = output.absolute()
    temporary = output.with_name(f"{output.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    replaced = output.with_name(f"{output.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    with faults(str(output), "writing it"):
        try:
            (temporary / "data").mkdir(parents=True)
            _hugging_face(what, temporary)
            if output.exists():
                output.rename(replaced)
            temporary.rename(output)
            sync_folder(output.parent)
        finally:
            for folder in (temporary, replaced):
                shutil.rmtree(folder, ignore_errors=True)


def _hugging_face(what: Export, folder: Path) -> None:
    data = folder / "data"
    files: list[Path] = []

    def next_file() -> Path:
        files.append(data / f"train-{len(files):05d}.parquet")
        return files[-1]

    _parquet(what, next_file, SHARD_BYTES)
    (folder / "README.md").write_text(_card(what), encoding="utf-8")
    for path in (*files, folder / "README.md"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    for number, path in enumerate(files):
        path.rename(data / f"train-{number:05d}-of-{len(files):05d}.parquet")
    sync_folder(data)
    sync_folder(folder)


def _card(what: Export) -> str:
    about = what.about
    unit = "row" if what.ordered.offsets is None else "token"
    layers = ", ".join(str(layer) for layer in about["layers"])
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: data/train-*.parquet\n---\n\n"
        f"# Activations: {about['component']} at {about['position']}\n\n"
        f"{len(what.ordered.row_keys)} rows, layers {layers}, d_model {what.shape[2]}, {what.value_dtype.name}. One "
        f"record per {unit} and layer; `layer` counts from 0, and `resid_post` is the output of that block.\n\n"
        f"Model {about['model_name'] or 'unknown'}, fingerprint `{about['model']}`; captures "
        f"{', '.join(about['captures'])}; resid {about['resid']}.\n"
    )
