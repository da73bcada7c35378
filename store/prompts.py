"""Prompts and prompt sets: read from files or the hub, deduplicated, split by content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

from store.errors import StudyError
from store.fingerprint import fingerprint
from store.prompt_files import Records, read_records
from store.study import Columns, PromptSource, Split
from store.study_types import Scalar
from store.yaml_file import nearest, where

Role = Literal["system", "user", "assistant", "tool"]


# Parts of a message that chat templates show and resid does not read: without them it is another conversation.
_NOT_RENDERED = ("tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Message:
    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"unknown role {self.role!r}; known: system, user, assistant, tool")
        if not isinstance(self.content, str):
            raise ValueError(f"a message's content is text, not {type(self.content).__name__}")
        try:
            self.content.encode()
        except UnicodeEncodeError:
            raise ValueError("a message holds half of a surrogate pair, which is no character") from None


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the model's turn, and optionally the given response to it."""

    messages: tuple[Message, ...]
    response: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].role == "assistant":
            raise ValueError("a prompt ends with a turn that the assistant is to answer")
        if not any(message.content.strip() for message in self.messages if message.role != "system"):
            raise ValueError("the prompt is empty")

    @cached_property
    def id(self) -> str:
        """SHA-256 over the messages and the given response; tags are not part of it."""
        return self._hash(self.response)

    @cached_property
    def conversation(self) -> str:
        """SHA-256 over the messages alone: prompts that differ only in their response share it."""
        return self._hash(None)

    @cached_property
    def likeness(self) -> str:
        """SHA-256 over the messages, each text without the space at its ends.

        Most chat templates strip that space, so prompts of one likeness ("hello", "hello ") are one row to a model.
        """
        turns = [[message.role, message.content.strip()] for message in self.messages]
        return fingerprint({"messages": turns})

    def _hash(self, response: str | None) -> str:
        turns = [[message.role, message.content] for message in self.messages]
        return fingerprint({"messages": turns, "response": response})

    @property
    def text(self) -> str:
        """The last turn's text."""
        return self.messages[-1].content

    @classmethod
    def of(cls, text: str, *, system: str | None = None, response: str | None = None, tags: Any = None) -> Prompt:
        head = (Message("system", system),) if system else ()
        return cls((*head, Message("user", text)), response, tags or {})


@dataclass(frozen=True)
class PromptSet:
    """A named, ordered set of distinct prompts."""

    name: str
    prompts: tuple[Prompt, ...]
    duplicates: int = 0  # rows of the source that repeated an earlier prompt and were dropped
    excluded: int = 0  # prompts that were dropped because a set named by `exclude` has them
    asked: int | None = None  # of a part by count: how many prompts it was to have at most

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(prompt.id for prompt in self.prompts)


def _hub_records(source: PromptSource, file: Path | None, key: str) -> Records:
    at = where(file, f"{key}.dataset")
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise StudyError(
            f"the hub data set {source.dataset!r} needs the package datasets",
            file=at,
            key=f"{key}.dataset",
            remedy="pip install 'resid[hub]'",
        ) from None
    try:
        data = datasets.load_dataset(
            source.dataset, source.dataset_config, split=source.dataset_split, revision=source.dataset_revision
        )
    except Exception as error:  # any of the hub's many: network, authentication, name, split
        remedy = "check the name, split and network, or download the file and give its path"
        raise StudyError(
            f"cannot load {source.dataset!r}: {error}", file=at, key=f"{key}.dataset", remedy=remedy
        ) from None
    origin = f"{source.dataset}[{source.dataset_split}]"
    return [(f"{origin} row {number}", dict(record)) for number, record in enumerate(data, 1)]


def _matches(cell: Any, value: Scalar, is_text: bool) -> bool:
    """Whether a cell has a value that `where` asks for.

    In JSON and Parquet it must be equal and of the same kind (1 and 1.0 are numbers; 1, true and "1" differ). Cells of
    CSV are text (`is_text`): there a number matches the text of an equal number, true and false match these words in
    any case, null matches an empty cell, and text matches itself.
    """
    if is_text and not isinstance(value, str):
        text = str(cell).strip()
        if value is None:
            return text == ""
        if isinstance(value, bool):
            return text.lower() == str(value).lower()
        try:
            return float(text) == value
        except ValueError:
            return False
    if isinstance(value, bool) != isinstance(cell, bool):
        return False
    return bool(cell == value)


def _prompt(record: Mapping[str, Any], columns: Columns, at: str) -> Prompt:
    tags = {tag: str(record[tag]) for tag in columns.tags if record.get(tag) is not None}
    try:
        if columns.messages is not None:
            turns = record[columns.messages]
            if isinstance(turns, str):
                turns = json.loads(turns)
            if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
                raise ValueError(f'messages are a list such as [{{"role": "user", "content": "..."}}], not {turns!r}')
            for turn in turns:
                if not {"role", "content"} <= set(turn):
                    raise ValueError(f"a message has role and content, not {', '.join(map(str, turn)) or 'nothing'}")
            for number, turn in enumerate(turns, start=1):
                for name in _NOT_RENDERED:
                    if turn.get(name):
                        raise ValueError(
                            f"message {number} has {name}, which would be left out of the prompt; put what the model "
                            "is to read into content, or delete it"
                        )
            messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
            response = None
            if messages and messages[-1].role == "assistant":
                messages, response = messages[:-1], messages[-1].content
            return Prompt(messages, response, tags)
        assert columns.prompt is not None
        cells = {key: record[name] for key in ("prompt", "system", "response") if (name := getattr(columns, key))}
        for name, value in cells.items():
            if not isinstance(value, str) and not (value is None and name != "prompt"):
                raise ValueError(f"the {name} is not text but {value!r}")
        if "response" in cells and not cells["response"]:
            raise ValueError("the response is empty")
        return Prompt.of(cells["prompt"], system=cells.get("system"), response=cells.get("response"), tags=tags)
    except ValueError as error:
        raise StudyError(f"bad row: {error}", file=at, remedy="correct or remove the row") from None


def _order(ids: Iterable[str], seed: int) -> list[str]:
    """Return ids in a seeded random order that depends on content only, never on file order."""
    return sorted(ids, key=lambda item: hashlib.sha256(f"{seed}:{item}".encode()).digest())


def load_prompt_sets(sources: Mapping[str, PromptSource], file: Path | None = None) -> dict[str, PromptSet]:
    """Read all prompt sets of a study, each followed by its parts; `file` is the study file, for error messages.

    Raises:
        StudyError: as `load_prompt_set` and `split_prompt_set`, or if sets exclude each other in a circle.
    """
    sets: dict[str, PromptSet] = {}

    def add(name: str, trail: tuple[str, ...]) -> None:
        if name in sets:
            return
        source, key = sources[name], f"prompts.{name}.exclude"
        if name in trail:
            loop = " -> ".join((*trail[trail.index(name) :], name))
            raise StudyError(
                f"prompt sets exclude each other: {loop}", file=where(file, key), key=key, remedy="break the loop"
            )
        others: set[str] = set()
        for other in source.exclude:
            add(other.partition("@")[0], (*trail, name))
            others |= {prompt.likeness for prompt in sets[other].prompts}
        sets[name] = load_prompt_set(name, source, file, others)
        if source.split is not None:
            sets.update(split_prompt_set(sets[name], source.split, file))

    for name in sources:
        add(name, ())
    return {
        each: sets[each] for name in sources for each in sets if each == name or each.startswith(f"{name}@")
    }  # in the file's order


def load_prompt_set(
    name: str, source: PromptSource, file: Path | None = None, excluded: Collection[str] = ()
) -> PromptSet:
    """Read one prompt set of a study; `file` is the study file, for error messages.

    Rows that repeat an earlier prompt are dropped and counted, and so are prompts whose `Prompt.likeness` is among
    `excluded`; then `shuffle_seed` and `limit` choose.

    Raises:
        StudyError: for an unreadable file or row, a missing column, or an empty set.
    """
    key = f"prompts.{name}"
    records = read_records(Path(source.path)) if source.path else _hub_records(source, file, key)
    origin = source.path or f"{source.dataset}[{source.dataset_split}]"
    known = dict.fromkeys(column for _, record in records for column in record)
    if records:
        for column in source.where:
            if column not in known:
                _no_column(column, known, origin, file, f"{key}.where.{column}")
    is_text = origin.lower().endswith((".csv", ".tsv"))
    prompts: dict[str, Prompt] = {}
    duplicates = 0
    for at, record in records:
        if not all(_matches(record.get(column), value, is_text) for column, value in source.where.items()):
            continue
        for option in ("prompt", "messages", "system", "response", "tags"):
            named = getattr(source.columns, option)
            for column in named if isinstance(named, list) else [named]:
                # A tag may be absent where a row has none; what makes the prompt may not.
                if column is not None and column not in (known if option == "tags" else record):
                    _no_column(column, record, at, file, f"{key}.columns.{option}")
        prompt = _prompt(record, source.columns, at)
        duplicates += prompt.id in prompts
        prompts.setdefault(prompt.id, prompt)
    allowed = [item for item, prompt in prompts.items() if prompt.likeness not in excluded]
    ids = allowed if source.shuffle_seed is None else _order(allowed, source.shuffle_seed)
    chosen = tuple(prompts[item] for item in ids[: source.limit])
    if not chosen:
        problem = f"the prompt set is empty: {origin} has no rows"
        remedy = "check the file"
        if records:
            wanted = ", ".join(f"{column}: {value!r}" for column, value in source.where.items())
            problem, remedy = f"the prompt set is empty: no row of {origin} has {{{wanted}}}", "check `where`"
        if prompts:
            problem = (
                f"the prompt set is empty: {', '.join(source.exclude)} hold all {len(prompts)} prompts of {origin}"
            )
            remedy = "check `exclude`"
        raise StudyError(problem, file=where(file, key), key=key, remedy=remedy)
    return PromptSet(name, chosen, duplicates, len(prompts) - len(allowed))


def _no_column(column: str, known: Iterable[str], at: str, file: Path | None, key: str) -> NoReturn:
    names = [str(name) for name in known]
    remedy = nearest(column, names)
    if not remedy.startswith("known"):
        remedy += f" columns: {', '.join(names)}"
    raise StudyError(f"there is no column {column!r} in {at}", file=where(file, key), key=key, remedy=remedy)


def split_prompt_set(whole: PromptSet, split: Split, file: Path | None = None) -> dict[str, PromptSet]:
    """Return the named disjoint parts ``<set>@<part>``; `file` is the study file, for error messages.

    Each prompt belongs to one part by itself: a draw that depends on its text, the seed and the parts' sizes alone
    gives it to a part with a chance in proportion to the part's size (weighted rendezvous hashing; Schindelhauer &
    Schomaker 2005). So no prompt goes from one part to another because others are added or removed, and prompts of one
    `Prompt.likeness` belong to the same part, also in sets that share seed and sizes.

    A part by fraction takes all that belong to it, so its size is near the fraction and not exactly it. A part by count
    takes the first so many in the order of the draw; where fewer belong to it, it is smaller (`PromptSet.asked`). To
    make that rare for small parts the weight of a count n is n + 2 sqrt(n). Counts share what fractions leave.

    Raises:
        StudyError: if the counts ask for more prompts than there are, or a part is empty.
    """
    counts = {part: size for part, size in split.parts.items() if isinstance(size, int)}
    key = f"prompts.{whole.name}.split.parts"
    if sum(counts.values()) > len(whole.prompts):
        raise StudyError(
            f"the parts need {sum(counts.values())} prompts and the set has {len(whole.prompts)}: they would overlap",
            file=where(file, key),
            key=key,
            remedy="ask for fewer, or raise the set's limit",
        )
    weights = _weights(split)
    members: dict[str | None, list[tuple[float, str, Prompt]]] = {part: [] for part in weights}
    for prompt in whole.prompts:
        draws = {part: _draw(split.seed, part, prompt.likeness) / weight for part, weight in weights.items()}
        part = min(draws, key=lambda name: draws[name])
        members[part].append((draws[part], prompt.id, prompt))
    parts: dict[str, PromptSet] = {}
    for part in split.parts:
        chosen = sorted(members[part], key=lambda item: item[:2])[: counts.get(part)]
        if not chosen:
            problem = f"the part {part!r} is empty: none of the {len(whole.prompts)} prompts falls to it"
            remedy = "give it a larger share, add prompts, or change split.seed"
            raise StudyError(problem, file=where(file, f"{key}.{part}"), key=f"{key}.{part}", remedy=remedy)
        name = f"{whole.name}@{part}"
        parts[name] = PromptSet(name, tuple(prompt for _, _, prompt in chosen), asked=counts.get(part))
    return parts


def _weights(split: Split) -> dict[str | None, float]:
    """Return each part's weight in the draw; None stands for belonging to no part."""
    fractions = {part: size for part, size in split.parts.items() if isinstance(size, float)}
    counts = {part: size + 2 * math.sqrt(size) for part, size in split.parts.items() if isinstance(size, int)}
    left = max(0.0, 1 - sum(fractions.values()))
    weights: dict[str | None, float] = dict(fractions.items())
    if counts:
        # Without fractions as they are, so that another size of one part moves no prompt between the others.
        unit = left / sum(counts.values()) if fractions else 1.0
        weights |= {part: unit * weight for part, weight in counts.items()}
    elif left > 1e-9:
        weights[None] = left
    return weights


def _draw(seed: int, part: str | None, likeness: str) -> float:
    """Return an exponentially distributed number that depends on the arguments alone."""
    digest = hashlib.sha256(f"{seed}:{part or ''}:{likeness}".encode()).digest()
    return -math.log((int.from_bytes(digest[:8], "big") + 1) / 2**64)
