"""SQL functions over activations: they read the store while a query runs, and hand DuckDB numbers.

=============================================  =====================================================================
``activation(row_key, 'resid_post.14')``       one row's activation as FLOAT[]; ``position :=`` other than prompt_end
``direction('refusal', 14)``                   a direction's vector as FLOAT[]; ``study :=`` where several have one
``project('harmful@test', 'refusal', 14)``     a table: every row of a prompt set projected on a direction at a layer
``dot(a, b)``, ``cos(a, b)``                   of two lists, in double precision; ``cos(x)`` stays the cosine
=============================================  =====================================================================

`project` streams the layer from the store block by block: memory does not grow with the activations, only with the two
numbers that are kept of each row. `activation` reads the rows that DuckDB hands over together, 2,048 at most, and each
chunk that they are in once.

Models do not mix: `project` reads the rows of the direction's model, and a statement that reads activations of one
model with `activation` may use `direction` for no other. A vector out of the view ``directions`` is an ordinary column
beside ``model``: there the join has to say which.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import FunctionNullHandling, PythonUDFType

from store.activations import ActivationStore
from store.directions import Direction, directions_from_table
from store.errors import MismatchError, MissingDataError
from store.finding import CAPTURE, select
from store.fingerprint import short
from store.generation import Generation
from store.location import Location
from store.memberships import PromptRows
from store.model_store import ModelStore
from store.results import ResultStore
from store.selection import Selection
from store.sites import ALL_TOKENS, Site, check_position

FUNCTIONS: dict[str, str] = {
    "activation(row_key, site)": "one row's activation, FLOAT[]; position := 'prompt_end'",
    "direction(name, layer)": "a direction's vector, FLOAT[]; study := NULL",
    "project(prompt_set, name, layer)": "table: projection and norm of each row; position, study, responses := NULL",
    "dot(a, b)": "inner product of two lists, in double precision",
    "cos(a, b)": "cosine of the angle between two lists",
}

_PROJECTED = pa.struct(
    [
        ("row_key", pa.string()),
        ("prompt_id", pa.string()),
        ("direction", pa.string()),
        ("component", pa.string()),
        ("layer", pa.int32()),
        ("position", pa.string()),
        ("model", pa.string()),
        ("projection", pa.float64()),
        ("norm", pa.float64()),
    ]
)
_SQL_PROJECTED = (
    "STRUCT(row_key VARCHAR, prompt_id VARCHAR, direction VARCHAR, component VARCHAR, layer INTEGER, position VARCHAR, "
    "model VARCHAR, projection DOUBLE, norm DOUBLE)[]"
)

# A value that is looked at twice is a lambda's parameter: what a macro names twice, DuckDB computes twice.
# current_query_id() tells the calls of one statement from those of the next.
_MACROS = """
CREATE MACRO dot(a, b) AS list_inner_product(a::DOUBLE[], b::DOUBLE[]);
CREATE MACRO cos(x) AS system.main.cos(x),
    (a, b) AS list_transform([list_cosine_similarity(a::DOUBLE[], b::DOUBLE[])], lambda similarity: CASE
        WHEN isnan(similarity) THEN error('cos(a, b): a vector of zeros, or with NaN, has no direction')
        ELSE similarity END)[1];
CREATE MACRO activation(row_key, site, position := 'prompt_end') AS
    resid_activation(row_key, site, position, current_query_id()::BIGINT);
CREATE MACRO direction(name, layer, study := NULL) AS
    resid_direction(name, layer, study, current_query_id()::BIGINT);
CREATE MACRO project(prompt_set, name, layer, position := NULL, study := NULL, responses := NULL) AS TABLE
    SELECT prompt_set AS prompt_set, unnest(resid_project(prompt_set, name, layer, position, study, responses,
        current_query_id()::BIGINT), recursive := true);
"""


def add_functions(connection: duckdb.DuckDBPyConnection, results: ResultStore, store: Location | None) -> None:
    """Give a connection the functions above. Nothing is opened before one of them is called.

    Args:
        store: where the activations are; None makes the functions that need them say so.
    """
    sources = _Sources(results, store)
    text, number = "VARCHAR", "BIGINT"

    def create(name: str, function: Callable[..., pa.Array], parameters: list[Any], result: str) -> None:
        # side_effects: or DuckDB would take what one query read for the answer of the next.
        connection.create_function(
            name,
            function,
            parameters,
            result,
            type=PythonUDFType.ARROW,
            null_handling=FunctionNullHandling.SPECIAL,
            side_effects=True,
        )

    create("resid_activation", sources.activations, [text, text, text, number], "FLOAT[]")
    create("resid_direction", sources.vectors, [text, number, text, number], "FLOAT[]")
    create("resid_project", sources.projections, [text, text, number, text, text, text, number], _SQL_PROJECTED)
    connection.execute(_MACROS)


class _Statement:
    """What one statement has found in the store, and of which models; the next one looks again."""

    def __init__(self, number: int):
        self.number = number
        self._lock = threading.Lock()
        self._rows: set[str] = set()  # models whose activations were read by row
        self._vectors: dict[str, str] = {}  # model -> a direction of it
        self._models: list[tuple[ModelStore, list[Generation]]] | None = None
        self._holders: dict[tuple[str, str, str], list[Generation]] = {}

    def select(
        self, store: ModelStore, keys: Iterable[str], component: str, position: str, layer: int, remedy: str
    ) -> Selection:
        """Find rows as `ModelStore.select` does; what the captures hold is read once a statement."""
        if position != ALL_TOKENS:
            check_position(position)
        count = store.manifest.get("n_layers")
        if count is not None and not 0 <= layer < count:
            raise MissingDataError(f"there is no layer {layer}: model {short(store.fingerprint)} has 0 to {count - 1}")
        at = (store.fingerprint, component, position)
        with self._lock:
            if at not in self._holders:
                self._holders[at] = store.holders(component, position)
        selection = select(self._holders[at], tuple(keys), component, position, [layer], remedy)
        if selection.offsets is not None:
            raise ValueError(f"{position} is many positions of each row: name one")
        return selection

    def by_model(self, store: ActivationStore, keys: Iterable[str]) -> list[tuple[ModelStore, list[str]]]:
        """Return which of the keys are each model's; a row belongs to one."""
        with self._lock:
            if self._models is None:
                self._models = [(model, model.generations()) for model in store.models()]
        left, found = dict.fromkeys(keys), []
        for model, generations in self._models:
            here = [key for key in left if any(key in generation.index for generation in generations)]
            if here:
                found.append((model, here))
                for key in here:
                    del left[key]
        if left:
            first = short(next(iter(left)))
            raise MissingDataError(f"row {first} is not in {store.location}\n  remedy: {CAPTURE}")
        return found

    def reads(self, model: str) -> None:
        """Note that it reads activations of a model by row."""
        with self._lock:
            self._rows.add(model)
            self._refuse_a_mixture()

    def uses(self, direction: Direction) -> None:
        """Note that it takes the vector of a direction."""
        with self._lock:
            self._vectors[direction.model] = direction.name
            self._refuse_a_mixture()

    def _refuse_a_mixture(self) -> None:
        if self._rows and self._vectors and len(self._rows | self._vectors.keys()) > 1:
            directions = ", ".join(f"{name!r} (model {short(model)})" for model, name in self._vectors.items())
            raise MismatchError(
                f"this statement reads activations of model {', '.join(sorted(map(short, self._rows)))} "
                f"with direction {directions}: models do not mix\n"
                "  remedy: keep to the rows of one model (WHERE model = ...) and its directions (study := ...), "
                "or take project(), which reads the rows of the direction's model"
            )


class _Sources:
    """What the functions read, opened when it is needed and kept for the life of the connection."""

    def __init__(self, results: ResultStore, store: Location | None):
        self._results, self._location = results, store
        self._lock, self._current = threading.Lock(), _Statement(-1)

    def _statement(self, numbers: Any) -> _Statement:
        """Return the statement that a batch belongs to, from its column of statement numbers."""
        with self._lock:
            if len(numbers) and self._current.number != numbers[0].as_py():
                self._current = _Statement(numbers[0].as_py())
            return self._current

    @cached_property
    def _store(self) -> ActivationStore:
        if self._location is None:
            raise MissingDataError("this connection knows no activation store\n  remedy: resid sql --store <store>")
        return ActivationStore.open(self._location)

    @cached_property
    def _directions(self) -> dict[tuple[str, str], Direction]:
        """(study, name) -> direction."""
        table = self._results.read("directions")
        found = {}
        for study in table["study"].unique().to_pylist():
            mine = table.filter(pc.equal(table["study"], study))
            found.update({(study, name): direction for name, direction in directions_from_table(mine).items()})
        return found

    # -- what DuckDB calls: a column a parameter, a column back -----------------------------------------------------

    def activations(self, row_keys: Any, sites: Any, positions: Any, numbers: Any) -> pa.Array:
        """Return the activation of each row, FLOAT[]; NULL where an argument is."""
        statement = self._statement(numbers)
        asked: dict[tuple[str, str], dict[str, list[int]]] = {}
        columns = (row_keys.to_pylist(), sites.to_pylist(), positions.to_pylist())
        for i, (key, site, position) in enumerate(zip(*columns, strict=True)):
            if key is not None and site is not None and position is not None:
                asked.setdefault((site, position), {}).setdefault(key, []).append(i)
        result: list[npt.NDArray[np.float32] | None] = [None] * len(columns[0])
        for (site, position), rows in asked.items():
            parsed = Site.parse(site)
            for store, here in statement.by_model(self._store, rows):
                remedy = store.remedy(f"{site} at {position}")
                statement.reads(store.fingerprint)
                selection = statement.select(store, here, parsed.component, position, parsed.layer, remedy)
                for (part, _), values in selection.chunks():
                    for row, vector in zip(part.into, values, strict=True):
                        kept = vector.copy()
                        for i in rows[here[row]]:
                            result[i] = kept
        return pa.array(result, type=pa.list_(pa.float32()))

    def vectors(self, names: Any, layers: Any, studies: Any, numbers: Any) -> pa.Array:
        """Return the vector of each direction at a layer, FLOAT[]; NULL where name or layer is."""
        statement = self._statement(numbers)
        found: dict[tuple[str, int, str | None], npt.NDArray[np.float64]] = {}
        result: list[npt.NDArray[np.float64] | None] = []
        for name, layer, study in zip(names.to_pylist(), layers.to_pylist(), studies.to_pylist(), strict=True):
            if name is None or layer is None:
                result.append(None)
                continue
            if (name, layer, study) not in found:
                direction = self._direction(name, study)
                statement.uses(direction)
                found[name, layer, study] = direction.at(layer)
            result.append(found[name, layer, study])
        return pa.array(result, type=pa.list_(pa.float32()))

    def projections(
        self, prompt_sets: Any, names: Any, layers: Any, positions: Any, studies: Any, responses: Any, numbers: Any
    ) -> pa.Array:
        """Return for each set of arguments all rows of the prompt set, projected."""
        statement = self._statement(numbers)
        columns = [column.to_pylist() for column in (prompt_sets, names, layers, positions, studies, responses)]
        calls = [self._project(statement, *call) for call in zip(*columns, strict=True)]
        return pa.concat_arrays(calls) if calls else pa.array([], pa.list_(_PROJECTED))

    def _project(
        self,
        statement: _Statement,
        prompts: str,
        name: str,
        layer: int,
        position: str | None,
        study: str | None,
        responses: str | None,
    ) -> pa.Array:
        if prompts is None or name is None or layer is None:
            raise ValueError("project(prompt_set, name, layer): none of these may be NULL")
        direction = self._direction(name, study)
        unit = direction.unit(layer)
        at = direction.position if position is None else position
        store, rows = self._rows(direction, prompts, study, responses)
        remedy = store.remedy(f"{direction.component}.{layer} of {prompts} at {at}", rows.study_file)
        selection = statement.select(store, rows.keys, direction.component, at, layer, remedy)
        projected, norms = np.empty(len(selection)), np.empty(len(selection))
        for (part, _), found in selection.chunks():
            values = found.astype(np.float64)
            projected[part.into] = values @ unit
            norms[part.into] = np.linalg.norm(values, axis=1)
        known = store.memberships.prompts([prompts])
        count = len(selection)
        arrays = [
            pa.array(selection.row_keys),
            pa.array([known[key][0] for key in selection.row_keys]),
            *(pa.repeat(text, count) for text in (name, direction.component)),
            pa.repeat(pa.scalar(layer, pa.int32()), count),
            *(pa.repeat(text, count) for text in (at, direction.model)),
            pa.array(projected),
            pa.array(norms),
        ]
        struct = pa.StructArray.from_arrays(arrays, fields=list(_PROJECTED))
        return pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), struct)

    # -- looking things up -----------------------------------------------------------------------------------------

    def _direction(self, name: str, study: str | None) -> Direction:
        known = self._directions
        found = {owner: each for (owner, its), each in known.items() if its == name and study in (None, owner)}
        if not found:
            near = difflib.get_close_matches(name, [its for _, its in known], n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(sorted({its for _, its in known})) or "none: run resid directions --study <study>"
            where = f" in study {study!r}" if study else ""
            raise MissingDataError(f"there is no direction {name!r}{where}{meant}\n  known: {listed}")
        first, *others = found.values()
        if any(other.key != first.key or other.digest != first.digest for other in others):
            raise MismatchError(
                f"direction {name!r} is another one in each of the studies {', '.join(sorted(found))}\n"
                f"  remedy: say which with study := '{sorted(found)[0]}'"
            )
        return first

    def _rows(
        self, direction: Direction, prompts: str, study: str | None, responses: str | None
    ) -> tuple[ModelStore, PromptRows]:
        """Return the rows of a prompt set that are of a direction's model, and where they are."""
        try:
            store = self._store.model(direction.model)
            captured = study if study in store.memberships.studies() else None
            return store, store.memberships.find([prompts], captured, responses)
        except MissingDataError as error:
            of = f"direction {direction.name!r} is of model {short(direction.model)}, and only that model's rows count"
            raise MissingDataError(f"{error}\n  {of}") from None
