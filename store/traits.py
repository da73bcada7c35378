"""The paper's trait files, read as they are, and the prompt sets that they describe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from store.prompts import Prompt, PromptSet
from store.study_traits import TraitSource
from store.yaml_file import fault, read_yaml, validation_error


def _spoken(text: str) -> str:
    if not text.strip():
        raise fault("it is empty", "write its text, or remove the line")
    return _characters(text)


def _characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise fault("it holds half of a surrogate pair, which is no character", "write the character") from None
    return text


def _named(text: str) -> str:
    if not text.strip():
        raise fault("the name is empty", "name the trait")
    return _characters(text)


def _or(default: Any) -> BeforeValidator:
    """Take a key without a value (``scoring:`` and nothing behind it) as one that is not there."""
    return BeforeValidator(lambda value: default() if value is None else value)


Spoken = Annotated[str, AfterValidator(_spoken)]
Texts = Annotated[list[Spoken], Field(min_length=1)]


class Instructions(BaseModel):
    """System prompts that bring the trait out (positive) or suppress it (negative)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    positive: Texts
    negative: Texts


class Phrases(BaseModel):
    """Words and phrases by which the rule judge tells the trait (positive) from its opposite (negative)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    positive: Texts
    negative: list[Spoken] = []


class Scoring(BaseModel):
    """Judge scores (0 to 100) from which an answer counts: at least the trait and the coherence threshold.

    `phrases` and `rule` are for the rule judge and resid's own; published files have neither.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    trait_threshold: float = Field(default=50, ge=0, le=100, allow_inf_nan=False)
    coherence_threshold: float = Field(default=50, ge=0, le=100, allow_inf_nan=False)
    phrases: Phrases | None = None
    rule: Literal["complies", "refuses", "phrases"] | None = None


class Trait(BaseModel):
    """A trait in the format of arXiv:2606.26161. Keys that resid does not use are allowed: the files are published."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[str, AfterValidator(_named)]
    description: Annotated[str, _or(str), AfterValidator(_characters)] = ""
    instructions: Instructions
    questions: Texts
    scoring: Annotated[Scoring, _or(Scoring)] = Scoring()


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


@dataclass(frozen=True)
class Answer:
    """One text that the model gave to a prompt of a trait."""

    prompt: Prompt
    seed: int
    key: str  # generation key
    text: str


def user_prompt_set(name: str, answers: Iterable[Answer], excluded: Sequence[str] = ()) -> PromptSet:
    """Return a side of the user persona: each answer, word for word, as the user's turn.

    As in the authors' source (github.com/violazhong/i-and-thou-vector, commit 3df5956, index.md, step 2): the answers
    of the model persona that count are passed as user prompts, with the standard system prompt instead of the persona's
    and the same chat template, and the model's replies to them are captured without any further filter. So the prompts
    have no system turn of their own (a study's ``model.system_prompt`` is put first, as everywhere), ``prompt_end`` is
    the last token of the rendered prompt, and ``response_start`` and ``response_avg`` are of the model's *reply*.

    A text given several times is one prompt, and counted; so are, under `excluded`, texts of the other side, which
    cannot tell the sides apart. (The source lets each count as often as it was given.)

    Tags: those of the question's prompt, family ``user``, seed, ``answer`` (its generation key), and ``asked`` (the
    question's text).
    """
    prompts: dict[str, Prompt] = {}
    given = 0
    for answer in answers:
        tags = {
            **answer.prompt.tags,
            "family": "user",
            "seed": str(answer.seed),
            "answer": answer.key,
            "asked": answer.prompt.text,
        }
        if answer.text.strip():
            given += 1
            if answer.text not in excluded:
                prompt = Prompt.of(answer.text, tags=tags)
                prompts.setdefault(prompt.id, prompt)
    return PromptSet(name, tuple(prompts.values()), given - len(prompts))
