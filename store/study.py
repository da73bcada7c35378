"""The study file: what one study captures, computes, replays and judges.

`studies/demo.yaml` documents every key by example; here are their types. Reading and cross-checking a file is the
business of `store.study_file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from store.layers import LayerNumber, Layers
from store.model_ref import ModelRef
from store.ray_settings import RaySettings
from store.sites import Component
from store.study_directions import Difference as Difference
from store.study_directions import DifferenceOfMeans as DifferenceOfMeans
from store.study_directions import DirectionSpec as DirectionSpec
from store.study_directions import Orthogonalised as Orthogonalised
from store.study_directions import Random as Random
from store.study_geometry import Geometry as Geometry
from store.study_geometry import ProjectionsSpec as ProjectionsSpec
from store.study_types import CapturePosition, Name, Names, Scalar, SetName, Strict, StudyName, distinct_seeds
from store.yaml_file import fault, nearest


class Columns(Strict):
    """Which columns of a file hold what. Give `prompt` or `messages`."""

    prompt: str | None = None
    messages: str | None = None
    system: str | None = None
    response: str | None = None
    tags: list[str] = []

    @model_validator(mode="after")
    def _one_source(self) -> Columns:
        if (self.prompt is None) == (self.messages is None):
            raise fault("give exactly one of prompt and messages", "name the column of the prompts' text or of chats")
        if self.messages is not None and (self.system or self.response):
            raise fault("messages already hold the system prompt and the response", "delete system and response")
        return self


class Split(Strict):
    """Named disjoint parts, drawn by seed from the content of the prompts (so file order does not matter)."""

    seed: int = 0
    parts: dict[SetName, int | float]

    @field_validator("parts")
    @classmethod
    def _sizes(cls, parts: dict[str, int | float]) -> dict[str, int | float]:
        if not parts:
            raise fault("no part is named", "write {train: 0.8, test: 0.2}, or delete split")
        for name, size in parts.items():
            if size <= 0 or (isinstance(size, float) and size > 1):
                remedy = "a size is a count (an integer above 0) or a fraction (above 0, at most 1.0)"
                raise fault(f"the part {name!r} cannot have the size {size}", remedy)
        if sum(size for size in parts.values() if isinstance(size, float)) > 1 + 1e-9:
            raise fault("the fractions add up to more than 1: parts would overlap", "make them add up to at most 1")
        return parts


class PromptSource(Strict):
    """Where a prompt set comes from: a JSONL, JSON, CSV or Parquet file, or a hub data set.

    `where` keeps the rows whose columns have these values; `store.prompts` says what that means for CSV's text.
    """

    path: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_revision: str | None = None
    columns: Columns = Columns(prompt="prompt")
    where: dict[str, Scalar] = {}
    limit: int | None = Field(default=None, ge=1)
    shuffle_seed: int | None = None
    split: Split | None = None

    @model_validator(mode="after")
    def _one_source(self) -> PromptSource:
        if (self.path is None) == (self.dataset is None):
            raise fault("give exactly one of path and dataset", "path: a file; dataset: a data set of the hub")
        for key in ("dataset_config", "dataset_split", "dataset_revision"):
            if self.path is not None and key in self.model_fields_set:
                raise fault(f"{key} is of a hub data set, and this set is a file", f"delete {key}")
        return self


class TraitSource(Strict):
    """A trait file; it adds the prompt sets ``<name>.positive`` and ``<name>.negative``.

    Each set is every instruction (as the system prompt) with every question (as the user's turn).
    """

    path: str
    instructions: int | None = Field(default=None, ge=1, description="use only the first so many of each side")
    questions: int | None = Field(default=None, ge=1, description="use only the first so many")


class CaptureEntry(Strict):
    """What to read of which prompts."""

    prompts: Names
    components: list[Component] = Field(default=["resid_post"], min_length=1)
    layers: Layers = "all"
    positions: list[CapturePosition] = Field(default=["prompt_end"], min_length=1)
    responses: str | None = Field(default=None, description="capture with the text generated under this condition")
    dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"

    @field_validator("components", "positions")
    @classmethod
    def _once(cls, values: list[str]) -> list[str]:
        return list(dict.fromkeys(values))


class MatchNorm(Strict):
    """Rescale to the raw norm of another direction at the same layer."""

    match: str


Tokens = Literal["all", "prompt", "response"]


class Add(Strict):
    """``h + coefficient * v`` at the given sites.

    `tokens: response` begins with the forward pass that reads the first response token; the first response token
    itself is predicted from the last prompt token, which belongs to the prompt.
    """

    add: str
    layers: Layers
    component: Component = "resid_post"
    coefficient: float | list[float] = 1.0
    norm: Literal["natural", "unit"] | MatchNorm = "natural"
    tokens: Tokens = "all"
    from_layer: LayerNumber | None = Field(default=None, description="use this layer's vector everywhere")

    @field_validator("coefficient")
    @classmethod
    def _some(cls, value: float | list[float]) -> float | list[float]:
        if value == []:
            raise fault("a sweep needs at least one coefficient", "write [1, 2], or a single number")
        if isinstance(value, list) and len(set(value)) < len(value):
            raise fault("the sweep names a coefficient twice", "name each one once")
        return value


class ProjectOut(Strict):
    """``h - (h . v_hat) v_hat`` at the given sites; with several directions, of the subspace that they span."""

    refused: ClassVar[dict[str, str]] = {
        "coefficient": "project_out takes no coefficient: it removes the component whole",
        "norm": "project_out takes no norm: it removes the component whole",
    }

    project_out: Names
    layers: Layers
    component: Component = "resid_post"
    tokens: Tokens = "all"
    from_layer: LayerNumber | None = None

    @field_validator("project_out", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


_KINDS = ("add", "project_out")


def _kind(value: Any) -> Any:
    if not isinstance(value, Strict):
        if not isinstance(value, dict):
            raise fault(
                "an intervention is a mapping of keys", "write {add: a_direction, layers: [10], coefficient: 1}"
            )
        named = [kind for kind in _KINDS if kind in value]
        if len(named) == 2:
            raise fault("an intervention cannot both add and project_out", "write two interventions; order counts")
        if not named:
            guess = next(
                (hint for key in value if "mean" in (hint := nearest(str(key), _KINDS))), "write add: or project_out:"
            )
            raise fault("an intervention needs the key add or project_out", guess)
    return value


InterventionSpec = Annotated[
    Annotated[Add, Tag("add")] | Annotated[ProjectOut, Tag("project_out")],
    Discriminator(
        lambda value: next(
            (kind for kind in _KINDS if (kind in value if isinstance(value, dict) else hasattr(value, kind))), None
        )
    ),
    BeforeValidator(_kind),
]


class ConditionSpec(Strict):
    """A named list of interventions, applied in order; none is the baseline."""

    interventions: list[InterventionSpec] = []
    control_of: str | None = None
    prompts: Names | None = Field(default=None, description="replay these instead of replay.prompts")


class Decoding(Strict):
    """How text is generated. Greedy unless `temperature` is above 0."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)

    @field_validator("top_p")
    @classmethod
    def _of_sampling(cls, top_p: float, info: ValidationInfo) -> float:
        if top_p < 1.0 and info.data.get("temperature") == 0.0:
            raise fault("greedy decoding has no top_p", "set temperature above 0, or delete top_p")
        return top_p

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class Monitor(Strict):
    """Projections h . v_hat recorded for every generated token, after the condition's interventions at that site."""

    directions: Names
    layers: Layers = "all"
    component: Component = "resid_post"


class Replay(Strict):
    prompts: Names
    conditions: dict[Name, ConditionSpec] = Field(min_length=1)
    decoding: Decoding = Decoding()
    seeds: list[int] = Field(default=[0], min_length=1)
    monitor: Monitor | None = None
    batch_rows: int = Field(default=32, ge=1, description="rows (prompt x condition) decoded together")
    block_rows: int = Field(default=64, ge=1, description="rows committed together")

    @field_validator("seeds")
    @classmethod
    def _useful(cls, seeds: list[int], info: ValidationInfo) -> list[int]:
        distinct_seeds(seeds)
        decoding = info.data.get("decoding")
        if len(seeds) > 1 and decoding is not None and decoding.greedy:
            remedy = "set replay.decoding.temperature above 0, or keep one seed"
            raise fault("greedy decoding gives the same text for every seed", remedy)
        return seeds


class Study(Strict):
    """One study. Paths of inputs are relative to the study file, `store` and `results` to the working directory."""

    name: StudyName
    description: str = ""
    model: ModelRef
    prompts: dict[SetName, PromptSource] = {}
    traits: dict[SetName, TraitSource] = {}
    allow_overlap: bool = Field(default=False, description="let parts of different name share prompts")
    capture: list[CaptureEntry] = []
    directions: dict[Name, DirectionSpec] = {}
    geometry: Geometry = Geometry()
    replay: Replay | None = None
    judges: dict[str, dict[str, Scalar]] = {"refusal_phrases": {}, "degenerate": {}}
    token_budget: int | None = Field(
        default=None, ge=1, description="tokens (padding included) in one capture batch; default: by device"
    )
    block_rows: int | None = Field(default=None, ge=1, description="rows in one capture block; default: by size")
    compression: Literal["none", "zstd"] = Field(default="none", description="of new captures; zstd on object storage")
    store: str = Field(default="resid-data/store", min_length=1)
    results: str = Field(default="resid-data/results", min_length=1)
    ray: RaySettings = RaySettings()
    _file: Path = PrivateAttr(default=Path("."))

    @property
    def file(self) -> Path:
        """The file that the study was read from; ``.`` if from none."""
        return self._file

    def read_from(self, file: Path) -> Study:
        """Return the same study with the file that it was read from."""
        study = self.model_copy()
        study._file = file
        return study
