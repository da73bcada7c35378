"""Which rows a study's prompt sets are: as a stage renders them now, or as the last capture wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from store.errors import MissingDataError

if TYPE_CHECKING:
    from jobs.context import Context


class KnownRows:
    """The rows of one study, for `Context.prompt_rows`."""

    def __init__(self, context: Context):
        self.context = context

    @cached_property
    def _memberships(self) -> dict[tuple[str, str | None], dict[str, list[str]]]:
        """(prompt set, responses) -> prompt id -> row keys, as the last capture of this study wrote them."""
        table = self.context.results.read("memberships", filters=[("study", "=", self.context.study.name)])
        model = self.context.recalled_model().fingerprint
        found: dict[tuple[str, str | None], dict[str, list[str]]] = {}
        for record in table.to_pylist():
            if record["model"] == model:
                rows = found.setdefault((record["prompt_set"], record["responses"]), {})
                rows.setdefault(record["prompt_id"], []).append(record["row_key"])
        return found

    @cached_property
    def _generation_of(self) -> dict[str, str]:
        """Row key -> the generation that its response came from, as the last capture of this study wrote them."""
        table = self.context.results.read("rows", columns=["row_key", "generation_key"], part=self.context.study.name)
        return {row["row_key"]: row["generation_key"] for row in table.to_pylist() if row["generation_key"]}

    def of(self, name: str, responses: str | None) -> Mapping[str, list[str]]:
        """Return prompt id -> row keys of one prompt set: as rendered now, or as the last capture wrote them.

        Raises:
            MissingDataError: if the rows that were captured are of other responses than those asked for now.
        """
        if self.context.inputs is not None:
            return self.context.inputs.rows_of(name, responses)
        if responses is not None:
            stamp = self._stamps.get((name, responses))
            if stamp is not None and stamp != self.context.feed(responses).stamp(name):
                raise MissingDataError(
                    f"the responses of {responses!r} to {name!r} have changed since the capture\n  "
                    f"{self.context.remedy('capture')}",
                    "capture",
                )
        return self._memberships.get((name, responses), {})

    def require_texts(self, name: str, responses: str) -> None:
        """Check that the responses to a prompt set that the study asks for now are all there.

        Raises:
            MissingDataError: if not.
        """
        left, stage = self.context.feed(responses).lacking(name)
        if left:
            raise MissingDataError(
                f"{left} answers of {responses!r} to {name!r} are not generated yet\n  {self.context.remedy('replay')}",
                stage,
            )

    def generation(self, row_key: str) -> str | None:
        if self.context.inputs is not None:
            return self.context.inputs.generation_of(row_key)
        return self._generation_of.get(row_key)

    @cached_property
    def _stamps(self) -> dict[tuple[str, str], str]:
        """(prompt set, condition) -> which responses to it the last capture of this study read."""
        commit = self.context.results.current("memberships", self.context.study.name)
        stamps = [] if commit is None else commit.provenance.get("responses", [])
        return {(name, condition): stamp for name, condition, stamp in stamps}
