"""The paper's trait files, read as they are, and the prompt sets that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from store.prompts import Prompt, PromptSet
from store.study import TraitSource
from store.yaml_file import fault, read_yaml, validation_error


def _spoken(texts: list[str]) -> list[str]:
    for index, text in enumerate(texts):
        if not text.strip():
            raise fault(f"number {index + 1} is empty", "write its text, or remove the line")
    return texts


Texts = Annotated[list[str], Field(min_length=1), AfterValidator(_spoken)]


class Instructions(BaseModel):
    """System prompts that bring the trait out (positive) or suppress it (negative)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    positive: Texts
    negative: Texts


class Scoring(BaseModel):
    """Judge scores (0 to 100) from which an answer counts: at least the trait and the coherence threshold."""

    model_config = ConfigDict(extra="allow", frozen=True)

    trait_threshold: float = Field(default=50, ge=0, le=100)
    coherence_threshold: float = Field(default=50, ge=0, le=100)


class Trait(BaseModel):
    """A trait in the format of arXiv:2606.26161. Keys that resid does not use are allowed: the files are published."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    description: str = ""
    instructions: Instructions
    questions: Texts
    scoring: Scoring = Scoring()


def load_trait(path: str | Path) -> Trait:
    """Read a trait file.

    Raises:
        StudyError: naming the line and key of the first fault.
    """
    file = Path(path)
    data, node = read_yaml(file, "trait file")
    try:
        return Trait.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, Trait, node, "prompts/README.md") from None


def trait_prompt_sets(name: str, source: TraitSource) -> dict[str, PromptSet]:
    """Return ``<name>.positive`` and ``<name>.negative``: every instruction (system prompt) with every question.

    Tags: trait, side, instruction and question (indices from 0 in the file). Repeated pairs are dropped and counted.
    """
    trait = load_trait(source.path)
    sets = {}
    for side, instructions in (("positive", trait.instructions.positive), ("negative", trait.instructions.negative)):
        prompts: dict[str, Prompt] = {}
        duplicates = 0
        for i, instruction in enumerate(instructions[: source.instructions]):
            for q, question in enumerate(trait.questions[: source.questions]):
                tags = {"trait": trait.name, "side": side, "instruction": str(i), "question": str(q)}
                prompt = Prompt.of(question, system=instruction, tags=tags)
                duplicates += prompt.id in prompts
                prompts.setdefault(prompt.id, prompt)
        sets[f"{name}.{side}"] = PromptSet(f"{name}.{side}", tuple(prompts.values()), duplicates)
    return sets
