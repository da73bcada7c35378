"""The study file: what one study captures, computes, replays and judges.

`studies/demo.yaml` documents every key by example; here are their types. `store.study_file` reads and checks a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from store.layers import Layers
from store.model_ref import ModelRef
from store.ray_settings import RaySettings
from store.references import Value
from store.sites import Component
from store.study_directions import Difference as Difference  # part of this module's interface, as those below
from store.study_directions import DifferenceOfMeans as DifferenceOfMeans
from store.study_directions import DirectionSpec as DirectionSpec
from store.study_directions import Orthogonalised as Orthogonalised
from store.study_directions import Random as Random
from store.study_directions import RandomMatched as RandomMatched
from store.study_geometry import Geometry as Geometry
from store.study_geometry import ProjectionsSpec as ProjectionsSpec
from store.study_interventions import InterventionSpec
from store.study_select import Claim, Comparison, Selection
from store.study_traits import Keep, TraitSource
from store.study_types import (
    CapturePosition,
    EngineName,
    JudgeOption,
    Name,
    Names,
    Scalar,
    SetName,
    Strict,
    StudyName,
    distinct,
    distinct_seeds,
)
from store.yaml_file import fault


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
    """Named disjoint parts: fractions, or counts that are at most reached. `store.prompts.split_prompt_set` draws them
    prompt by prompt, so that neither the file's order nor other prompts decide where a prompt belongs."""

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
        if sum(size for size in parts.values() if isinstance(size, float)) > 1 - 1e-9 and any(
            isinstance(size, int) for size in parts.values()
        ):
            raise fault("the fractions add up to 1 and leave nothing for the counts", "make them add up to less")
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
    exclude: Annotated[list[str], AfterValidator(distinct)] = Field(
        default=[], description="without the prompts of these sets or parts; before limit and split"
    )
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


class CaptureEntry(Strict):
    """What to read of which prompts."""

    prompts: Names
    components: list[Component] = Field(default=["resid_post"], min_length=1)
    layers: Layers = "all"
    positions: list[CapturePosition] = Field(default=["prompt_end"], min_length=1)
    responses: str | None = Field(default=None, description="capture with the text generated under this condition")
    keep: Keep | None = Field(default=None, description="trait: of a trait's answers, only those that count")
    dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"

    @field_validator("components", "positions")
    @classmethod
    def _once(cls, values: list[str]) -> list[str]:
        return list(dict.fromkeys(values))


class Decoding(Strict):
    """How text is generated. Greedy unless `temperature` is above 0."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    stop: list[str] = Field(default=[], description="a text ends in front of the first of these, which is left out")

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise fault("an empty string would end every text at once", "delete it")
        return distinct(stop)

    @field_validator("top_p")
    @classmethod
    def _of_sampling(cls, top_p: float, info: ValidationInfo) -> float:
        if top_p < 1.0 and info.data.get("temperature") == 0.0:
            raise fault("greedy decoding has no top_p", "set temperature above 0, or delete top_p")
        return top_p

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class ConditionSpec(Strict):
    """A list of interventions, in order; none is the baseline. `each`: one per combination of values of `$name`."""

    interventions: list[InterventionSpec] = []
    control_of: str | None = None
    each: dict[Name, Annotated[list[Value], Field(min_length=1)]] = {}
    prompts: Names | None = Field(default=None, description="replay these instead of replay.prompts")
    decoding: Decoding | None = Field(default=None, description="instead of replay.decoding")
    seeds: list[int] | None = Field(default=None, min_length=1, description="instead of replay.seeds")


class Monitor(Strict):
    """Projections h . v_hat recorded for every generated token, after the condition's interventions at that site."""

    directions: Names
    layers: Layers = "all"
    component: Component = "resid_post"
    conditions: Names | None = Field(default=None, description="record under these only")


class Replay(Strict):
    prompts: Names
    conditions: dict[Name, ConditionSpec] = Field(min_length=1)
    decoding: Decoding = Decoding()
    seeds: list[int] = Field(default=[0], min_length=1)
    monitor: Monitor | None = None
    engine: EngineName = Field(default="resid", description="what generates: the built-in engine, or vLLM (an extra)")
    batch_rows: int = Field(default=128, ge=1, description="rows (prompt x condition) decoded together")
    block_rows: int = Field(default=256, ge=1, description="rows committed together")

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
    select: dict[Name, Selection] = {}
    comparisons: dict[Name, Comparison] = {}
    claims: dict[Name, Claim] = {}
    judges: dict[str, dict[str, JudgeOption]] = {"refusal_phrases": {}, "degenerate": {}}
    token_budget: int | None = Field(
        default=None, ge=1, description="tokens (padding included) in one capture batch; default: measured"
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
