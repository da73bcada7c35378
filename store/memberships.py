"""Which rows the prompt sets of each study are, kept in the store, so that ``prompts="harmful@train"`` finds them.

One Parquet file a study, replaced whole by each of its captures. It names rows only: what is there of them is for the
commits to say.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from store.errors import DamageError, MismatchError, MissingDataError
from store.location import Location

FOLDER = "_sets"
SCHEMA = pa.schema(
    [
        pa.field("prompt_set", pa.string(), nullable=False),
        pa.field("responses", pa.string()),  # the condition that generated them; null: none, or given ones
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("row_key", pa.string(), nullable=False),
        pa.field("text", pa.string()),  # the prompt's last turn
    ]
)


@dataclass(frozen=True)
class PromptRows:
    """The rows of prompt sets, in prompt order, and the study file that says what is captured of them."""

    keys: tuple[str, ...]
    study_file: str | None


class Memberships:
    """The prompt sets of all studies over one model."""

    def __init__(self, model: Location, imported: bool = False):
        self.location = model / FOLDER
        # What writes the tables, for messages.
        self._written_by = "resid store import <file>" if imported else "resid capture --study <study>"

    def write(self, study: str, study_file: str | None, records: Sequence[Mapping[str, str | None]]) -> None:
        """Replace what a study's prompt sets hold; records have the columns of `SCHEMA`."""
        table = pa.Table.from_pylist([dict(record) for record in records], schema=SCHEMA)
        file = study_file or ""
        table = table.replace_schema_metadata({"study_file": file, "sha256": _content(table, file)})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self.location.make_folder()
        (self.location / f"{study}.parquet").write(sink.getvalue())

    def forget(self, study: str) -> None:
        """Remove a study's table; its next capture writes it again."""
        (self.location / f"{study}.parquet").remove()

    def studies(self) -> list[str]:
        """Return the names of the studies, sorted."""
        return [name.removesuffix(".parquet") for name in self.location.list() if name.endswith(".parquet")]

    def study_files(self) -> set[str]:
        """Return the study files that the studies were captured with, as far as they can be read."""
        files = set()
        for study in self.studies():
            with contextlib.suppress(DamageError):
                files.add(_study_file(self.table(study)))
        return files - {""}

    def table(self, study: str) -> pa.Table:
        """Return one study's table, in `SCHEMA`; its metadata has ``study_file``.

        Raises:
            DamageError: if the file cannot be read.
        """
        where = self.location / f"{study}.parquet"
        try:
            table = pq.read_table(io.BytesIO(where.read_bytes()), page_checksum_verification=True)
            if not table.schema.equals(SCHEMA):
                raise ValueError(f"its columns are {', '.join(table.schema.names)}")
            # Pages have checksums of their own; Parquet's footer, which says how many rows there are, has none.
            known = (table.schema.metadata or {}).get(b"sha256", b"")
            if known.decode() != _content(table, _study_file(table)):
                raise ValueError("its rows are not those that were written")
        except FileNotFoundError:
            raise MissingDataError(
                f"study {study!r} has captured nothing of this model\n  remedy: {self._written_by}"
            ) from None
        except (pa.ArrowException, ValueError, OSError) as error:
            raise DamageError(
                f"{where}: this file cannot be read ({error})\n"
                f"  remedy: remove it, then {self._written_by}, which writes it again"
            ) from None
        return table

    def find(self, names: Iterable[str], study: str | None = None, responses: str | None = None) -> PromptRows:
        """Return the distinct rows of prompt sets.

        Args:
            study: whose sets; None where all studies that have a set of that name agree on it.
            responses: the condition that generated the responses; None for the prompts themselves.

        Raises:
            MissingDataError: if no study, or not this one, has such a set.
            MismatchError: if studies disagree on it.
        """
        if study is not None and study not in self.studies():
            near = difflib.get_close_matches(study, self.studies(), n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(self.studies()) or "none"
            raise MissingDataError(f"no study {study!r} has captured this model{meant}\n  known: {known}")
        tables = {name: self.table(name) for name in ([study] if study is not None else self.studies())}
        keys: dict[str, None] = {}
        file: str | None = None
        for name in names:
            found = {owner: rows for owner, table in tables.items() if (rows := _rows(table, name, responses))}
            if not found:
                raise MissingDataError(self._unknown(name, tables, responses))
            owner, *others = found
            for other in others:
                if set(found[other]) != set(found[owner]):
                    raise MismatchError(
                        f"prompt set {name!r} has {len(found[owner])} rows in study {owner!r} and others "
                        f"({len(found[other])}) in {other!r}\n  remedy: say which with study={owner!r}"
                    )
            keys.update(dict.fromkeys(found[owner]))
            file = file or _study_file(tables[owner]) or None
        return PromptRows(tuple(keys), file)

    def prompts(self, names: Iterable[str] | None = None) -> dict[str, tuple[str, str | None]]:
        """Return row key -> (prompt id, text) of prompt sets (None: of all), in whichever studies they are."""
        found: dict[str, tuple[str, str | None]] = {}
        chosen = None if names is None else pa.array(list(names), pa.string())
        for study in self.studies():
            table = self.table(study)
            if chosen is not None:
                table = table.filter(pc.is_in(table["prompt_set"], value_set=chosen))
            keys, ids, texts = (table[name].to_pylist() for name in ("row_key", "prompt_id", "text"))
            found.update(zip(keys, zip(ids, texts, strict=True), strict=True))
        return found

    def _unknown(self, name: str, tables: Mapping[str, pa.Table], responses: str | None) -> str:
        known = sorted({each for table in tables.values() for each in table["prompt_set"].unique().to_pylist()})
        if name in known:
            conditions = {each for table in tables.values() for each in table["responses"].unique().to_pylist()}
            said = ", ".join(repr(each) for each in sorted(conditions - {None}))
            return (
                f"prompt set {name!r} has no rows "
                + (f"with responses of {responses!r}" if responses else "without generated responses")
                + (f"\n  remedy: choose responses= from {said}" if said else "")
            )
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        listed = f"known: {', '.join(known)}" if known else f"none is known yet; run {self._written_by}"
        return f"no captured study has a prompt set {name!r}{meant}\n  {listed}"


def _study_file(table: pa.Table) -> str:
    found: bytes = (table.schema.metadata or {}).get(b"study_file", b"")
    return found.decode()


def _content(table: pa.Table, study_file: str) -> str:
    """Return the SHA-256 of a table's rows and its study file."""
    columns = [column.to_pylist() for column in table.columns]
    return hashlib.sha256(json.dumps([study_file, columns]).encode()).hexdigest()


def _rows(table: pa.Table, name: str, responses: str | None) -> list[str]:
    wanted = pc.equal(table["prompt_set"], name)
    source = table["responses"]
    wanted = pc.and_(wanted, pc.is_null(source) if responses is None else pc.equal(source, responses))
    keys = table.filter(wanted)["row_key"].to_pylist()
    # An empty key stands for a generated response without tokens: there is nothing to read of it.
    return [key for key in dict.fromkeys(keys) if key]
