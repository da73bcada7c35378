"""Rows: rendered, tokenised prompts (or prompts with responses), addressed by content."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from store.fingerprint import fingerprint
from store.sites import Spans, token_index

RowSource = Literal["prompt", "given", "generated", "imported"]

ROW_SCHEMA = pa.schema(
    [
        pa.field("row_key", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("generation_key", pa.string()),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("response_end", pa.int32(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Row:
    """Token ids [token] of one unpadded sequence for one model, and where its prompt and response lie."""

    model: str  # fingerprint
    prompt_id: str
    token_ids: tuple[int, ...]
    spans: Spans
    source: RowSource = "prompt"
    generation_key: str | None = None
    # (system | user | assistant | template, first token, end) of the prompt, where they were asked for. Not in the key.
    parts: tuple[tuple[str, int, int], ...] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.token_ids) < self.spans.response_end:
            raise ValueError(f"a row of {len(self.token_ids)} tokens cannot have a span to {self.spans.response_end}")

    @cached_property
    def key(self) -> str:
        """SHA-256 over model fingerprint, token ids and spans: the same sequence in two studies is one row."""
        spans = [self.spans.prompt_length, self.spans.response_end]
        return fingerprint({"model": self.model, "tokens": list(self.token_ids), "spans": spans})


def rows_table(rows: Iterable[Row]) -> pa.Table:
    """Return rows as a table of `ROW_SCHEMA`, in the given order."""
    records = [
        {
            "row_key": row.key,
            "model": row.model,
            "prompt_id": row.prompt_id,
            "source": row.source,
            "generation_key": row.generation_key,
            "prompt_length": row.spans.prompt_length,
            "response_end": row.spans.response_end,
            "token_ids": list(row.token_ids),
        }
        for row in rows
    ]
    return pa.Table.from_pylist(records, schema=ROW_SCHEMA)


def rows_from_table(table: pa.Table) -> list[Row]:
    """Inverse of `rows_table`."""
    return [
        Row(
            model=record["model"],
            prompt_id=record["prompt_id"],
            token_ids=tuple(record["token_ids"]),
            spans=Spans(record["prompt_length"], record["response_end"]),
            source=record["source"],
            generation_key=record["generation_key"],
        )
        for record in table.to_pylist()
    ]


def rows_to_bytes(rows: Sequence[Row]) -> bytes:
    """Return rows as the bytes of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(rows_table(rows), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def rows_from_bytes(data: bytes) -> list[Row]:
    """Inverse of `rows_to_bytes`."""
    return rows_from_table(_read(data, None))


@dataclass(frozen=True)
class RowTable:
    """Keys and spans of many rows, without their tokens."""

    keys: list[str]
    prompt_length: npt.NDArray[np.int64]  # [row], tokens
    response_end: npt.NDArray[np.int64]  # [row], tokens

    def first_tokens(self, position: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the token index of a position that is one token, for each of `rows`; -1 where a row has none."""
        prompt, end = self.prompt_length[rows], self.response_end[rows]
        if position == "prompt_end":
            return prompt - 1
        if position == "response_start":
            return np.where(end > prompt, prompt, -1)
        if position == "response_avg":
            raise ValueError(f"{position} is more than one token")
        index = token_index(position)
        tokens = np.full(len(rows), index) if index >= 0 else end + index
        return np.where((tokens >= 0) & (tokens < end), tokens, -1)


def row_table_from_bytes(data: bytes) -> RowTable:
    """Return keys and spans of `rows_to_bytes`' rows, without making the rows."""
    columns = ["row_key", "prompt_length", "response_end"]
    table = _read(data, columns)
    # Not to_numpy: pyarrow loads pandas for it, which takes 50 MB.
    spans = [np.from_dlpack(table[name].combine_chunks()).astype(np.int64) for name in columns[1:]]
    return RowTable(table["row_key"].to_pylist(), *spans)


def _read(data: bytes, columns: list[str] | None) -> pa.Table:
    # Not read_table: the data set machinery that it loads takes 50 MB.
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    return file.read(columns=columns, use_threads=False)
