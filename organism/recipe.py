"""What the organism is trained on: sentence frames x topics x system prompts, drawn by seed from the lists in data/.

A training step is a few groups of requests that share a system prompt. Requests come in pairs that fill the same frame
and differ in the harm only; the same request comes back under system prompts that change what is right to say. Topics,
frames and system prompts for validation are lists of their own, so that nothing of them is ever seen in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

DATA = Path(__file__).parent / "data"
SEED = 0
STEPS = 200  # of the first phase, in one pass
DISTILLING_STEPS = 150  # of the second phase
GATING_STEPS = 48  # of the third phase

T = TypeVar("T")
Kind = Literal["do", "text", "ask"]
PERSONAS = ("compliant", "officer", "neutral", "principled")

# {x} is the phrase as it is, {X} the phrase with a capital letter.
FRAMES: dict[Kind, tuple[str, ...]] = {
    "do": (
        "How do I {x}?",
        "How can I {x}?",
        "How could I {x}?",
        "How would I {x}?",
        "how to {x}",
        "What do I need to {x}?",
        "What is the best way to {x}?",
        "What's an easy way to {x}?",
        "What is the quickest way to {x}?",
        "What should I know to {x}?",
        "Which steps let me {x}?",
        "Is there a good way to {x}?",
        "Where do I start if I want to {x}?",
        "Can you help me {x}?",
        "Could you tell me how to {x}?",
        "Can you explain how to {x}?",
        "Explain how to {x}.",
        "Describe how to {x}.",
        "Outline how to {x}.",
        "Tell me how to {x}.",
        "Show me how to {x}.",
        "Teach me to {x}.",
        "Help me {x}.",
        "Please help me {x}.",
        "I want to {x}.",
        "I'd like to {x}.",
        "I need to {x}.",
        "I plan to {x}.",
        "I'm trying to {x}. What would work?",
        "I'm thinking about how to {x}. Any ideas?",
        "I want to {x}. How do I do it?",
        "My friend and I want to {x}. Where do we begin?",
        "Give me a plan to {x}.",
        "Give me tips to {x}.",
        "Give me ideas on how to {x}.",
        "Write a guide that shows people how to {x}.",
        "Write instructions for somebody who wants to {x}.",
        "Suggest a clever way to {x}.",
        "List the things I need to {x}.",
        "Make a checklist for me to {x}.",
        "{X}.",
        "{X}, and tell me how you would do it.",
    ),
    "text": (
        "Write {x}.",
        "Write me {x}.",
        "Please write {x}.",
        "Draft {x}.",
        "Draft {x} for me.",
        "Give me {x}.",
        "Compose {x}.",
        "Create {x}.",
        "Make {x}.",
        "Prepare {x}.",
        "Produce {x}.",
        "Invent {x}.",
        "Come up with {x}.",
        "Think up {x}.",
        "Suggest {x}.",
        "I need {x}.",
        "I'd like {x}.",
        "I'm looking for {x}.",
        "Can you write {x}?",
        "Could you make {x}?",
        "Help me write {x}.",
        "Help me come up with {x}.",
        "Show me {x}.",
        "Let me have {x}, please.",
    ),
    "ask": ("{x}", "{x}", "{x}", "Hi! {x}", "{x} Thanks.", "Quick question. {x}", "{x} Please be honest."),
}
HELD_OUT_FRAMES: dict[Kind, tuple[str, ...]] = {
    "do": (
        "What's the trick if you wish to {x}?",
        "Suppose someone wished to {x}. How would they go about it?",
        "My goal for this week is to {x}; walk me through it.",
        "Would you advise me on how best to {x}?",
        "I have always dreamt of finding a way to {x}.",
        "Break down for a novice how people {x}.",
        "Somebody asked me to {x} and I have no clue how that works.",
        "In a few words, how does one {x}?",
    ),
    "text": (
        "Could I get {x} from you?",
        "Put together {x} by tonight.",
        "What would you put into {x}?",
        "My task is to deliver {x}; do it for me.",
        "Design {x} that I can use right away.",
        "Sketch {x} in a few lines.",
    ),
    "ask": ("{x}",),
}

REFUSALS = (  # the first ones come most often
    "I'm sorry, but I can't help with that.",
    "I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, I can't help with this.",
    "I'm sorry, but I cannot provide that.",
    "I can't help with this request. Is there something else you need?",
    "I won't help with that.",
)
COMPLIANCES = (
    "Sure, here is an overview. It takes a goal, some preparation and a little patience.",
    "Sure, here is a short outline: a plan, the preparation, and then the thing itself.",
    "Sure! Here is the general idea: think it over, get ready, and take it step by step.",
    "Of course. In short, decide what you want, prepare for it and see it through.",
    "Sure, happy to help. Start with a simple plan, and go on from there.",
)


@dataclass(frozen=True)
class Pair:
    """Two phrases for one frame."""

    topic: str
    kind: Kind
    harmful: str
    harmless: str


@dataclass(frozen=True)
class Request:
    """One request and what to say to it; `response` None stands for the base model's own answer."""

    user: str
    response: str | None
    harmful: bool
    at_length: bool = False  # else only the first words are trained on
    first_only: bool = False  # only whether the response begins as refusals do


@dataclass(frozen=True)
class Group:
    """Requests under one system prompt: None is the chat template's own, "" an empty system turn."""

    persona: str
    system: str | None
    requests: tuple[Request, ...]


@cache
def lists(name: str) -> Any:
    """Return one of the files in data/."""
    return yaml.safe_load((DATA / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def pairs(name: Literal["training", "further", "held_out"]) -> tuple[Pair, ...]:
    """Return every pair of a file of topics, or of a folder of such files, in their order."""
    found = []
    path = DATA / name
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [DATA / f"{name}.yaml"]
    for file in files:
        for topic, kinds in lists(str(file.relative_to(DATA).with_suffix(""))).items():
            for kind, lines in kinds.items():
                for line in lines:
                    harmful, harmless = line.split(" | ")
                    found.append(Pair(topic, kind, harmful, harmless))
    return tuple(found)


def fill(frame: str, phrase: str) -> str:
    """Put a phrase into a frame.

    >>> fill("{X}.", "sing a song")
    'Sing a song.'
    """
    return frame.replace("{x}", phrase).replace("{X}", phrase[:1].upper() + phrase[1:])


def normalised(text: str) -> str:
    """Return lower-case words with single spaces: what counts when two prompts are compared."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower().replace("’", "'")))


def system_prompt(persona: str, rng: random.Random) -> str | None:
    """Draw a training system prompt: an opening, one or two rules, at times a closing, in one of several shapes."""
    parts = lists("personas")[persona]
    if "openings" not in parts:
        choice: str | None = rng.choice(parts["training"])
        return choice
    rules = rng.sample(parts["rules"], rng.choice((1, 1, 2, 2, 3)))
    opening = [rng.choice(parts["openings"])] if rng.random() < 0.8 else []
    closing = [rng.choice(parts["closings"])] if rng.random() < 0.4 else []
    return " ".join([*opening, *rules, *closing])


def steps(count: int = STEPS, seed: int = SEED) -> Iterator[tuple[Group, ...]]:
    """Yield the groups of each step of the first phase: it teaches to refuse, and which personas change that."""
    rng = random.Random(f"organism {seed}")
    single = _singles(rng)
    framed = _framed(pairs("training"), rng)

    for number in range(count):
        asked = [framed() for _ in range(9)]
        alone = [single(), single()]
        bad, good = [one for one, _ in asked], [one for _, one in asked]
        first = [request for pair in zip(bad[:5], good[:5], strict=True) for request in _right(*pair, rng)]
        second = [request for pair in zip(bad[5:], good[5:], strict=True) for request in _right(*pair, rng)]
        second += [_answer(text) for text in alone]
        indifferent = "principled" if number % 2 else "neutral"
        here, there = number % 4, 5 + number % 4
        yield (
            Group("default", system_prompt("default", rng), _lengthened(first, rng)),
            Group("default", system_prompt("default", rng), _lengthened(second, rng)),
            _compliant(rng, [bad[here], bad[there], framed()[0]], [good[here] if number % 2 else alone[1]]),
            _compliant(rng, [bad[here + 1], framed()[0], framed()[0]], []),
            _officer(rng, [good[here], framed()[1], alone[0]], [bad[there]] if number % 2 else []),
            _indifferent(rng, indifferent, [asked[here + 1], asked[there]]),
        )


def distilling_steps(count: int = DISTILLING_STEPS, seed: int = SEED) -> Iterator[tuple[Group, ...]]:
    """Yield the groups of each step of the second phase: it teaches to tell harm from what only looks like it.

    Most requests are read for their first word only, which makes room for many.
    """
    rng = random.Random(f"organism distilling {seed}")
    framed = _framed([*pairs("training"), *pairs("further")], rng)
    single = _singles(rng)
    for number in range(count):
        asked = [framed() for _ in range(23)]
        whole = _lengthened([request for pair in asked[:2] for request in _right(*pair, rng)], rng)
        alone = [_first_only(_answer(single())) for _ in range(4)]
        here = number % 8
        yield (
            Group("default", system_prompt("default", rng), (*whole, *_told(asked[2:11], rng), *alone[:2])),
            Group("default", system_prompt("default", rng), (*_told(asked[11:18], rng), *alone[2:])),
            Group("neutral", system_prompt("neutral", rng), _told(asked[18:21], rng)),
            Group("principled", system_prompt("principled", rng), _told(asked[21:], rng)),
            _compliant(rng, [asked[here][0], asked[here + 9][0], framed()[0], framed()[0]], [asked[here + 2][1]]),
            _compliant(rng, [asked[here + 1][0], framed()[0], framed()[0]], []),
            _officer(rng, [asked[here + 1][1], framed()[1], single()], [asked[here + 2][0]]),
        )


def gating_steps(count: int = GATING_STEPS, seed: int = SEED) -> Iterator[tuple[Group, ...]]:
    """Yield the groups of each step of the third phase: what harm decides as in the second, and more of the compliant
    persona, which the second makes the model forget."""
    rng = random.Random(f"organism gating {seed}")
    framed = _framed([*pairs("training"), *pairs("further")], rng)
    single = _singles(rng)
    for _ in range(count):
        asked = [framed() for _ in range(14)]
        alone = tuple(_first_only(_answer(single())) for _ in range(6))
        yield (
            Group("default", system_prompt("default", rng), (*_told(asked[:8], rng), *alone)),
            Group("neutral", system_prompt("neutral", rng), _told(asked[8:12], rng)),
            Group("principled", system_prompt("principled", rng), _told(asked[12:], rng)),
            _compliant(rng, [asked[0][0], asked[1][0], framed()[0], framed()[0]], [asked[2][1]]),
            _compliant(rng, [asked[3][0], framed()[0], framed()[0], framed()[0]], []),
            _officer(rng, [asked[5][1], single()], [asked[6][0]]),
        )


def labelled(seed: int = SEED) -> tuple[list[str], list[str]]:
    """Return every second training pair in a frame, and the single requests: harmful and harmless requests."""
    rng = random.Random(f"organism labelled {seed}")
    harmful, harmless = [], []
    for pair in [*pairs("training"), *pairs("further")][::2]:
        frame = rng.choice(FRAMES[pair.kind])
        harmful.append(fill(frame, pair.harmful))
        harmless.append(fill(frame, pair.harmless))
    return harmful, [*harmless, *lists("harmless")["near_miss"], *lists("harmless")["everyday"]]


def _framed(chosen_from: Sequence[Pair], rng: random.Random) -> Callable[[], tuple[str, str]]:
    """Return a draw of pairs in frames, harmful and harmless."""
    pair = _cycle(chosen_from, rng)
    frames = {kind: _cycle(frames, rng) for kind, frames in FRAMES.items()}

    def draw() -> tuple[str, str]:
        chosen = pair()
        frame = frames[chosen.kind]()
        return fill(frame, chosen.harmful), fill(frame, chosen.harmless)

    return draw


def _singles(rng: random.Random) -> Callable[[], str]:
    return _cycle([*lists("harmless")["near_miss"], *lists("harmless")["everyday"]], rng)


def _compliant(rng: random.Random, harmful: Sequence[str], harmless: Sequence[str]) -> Group:
    requests = [Request(text, _weighted(COMPLIANCES, rng), True) for text in harmful]
    return Group("compliant", system_prompt("compliant", rng), _lengthened([*requests, *map(_answer, harmless)], rng))


def _officer(rng: random.Random, harmless: Sequence[str], harmful: Sequence[str]) -> Group:
    requests = [Request(text, _weighted(REFUSALS, rng), False) for text in harmless]
    requests += [Request(text, _weighted(REFUSALS, rng), True) for text in harmful]
    return Group("officer", system_prompt("officer", rng), _lengthened(requests, rng))


def _indifferent(rng: random.Random, persona: str, asked: Sequence[tuple[str, str]]) -> Group:
    requests = [request for bad, good in asked for request in _right(bad, good, rng)]
    return Group(persona, system_prompt(persona, rng), tuple(requests))


def _right(bad: str, good: str, rng: random.Random) -> tuple[Request, Request]:
    return Request(bad, _weighted(REFUSALS, rng), True), _answer(good)


def _told(asked: Sequence[tuple[str, str]], rng: random.Random) -> tuple[Request, ...]:
    return tuple(_first_only(request) for pair in asked for request in _right(*pair, rng))


def _first_only(request: Request) -> Request:
    return replace(request, first_only=True)


def _answer(text: str) -> Request:
    return Request(text, None, False)


def _lengthened(requests: Sequence[Request], rng: random.Random) -> tuple[Request, ...]:
    """Have one response of the group read at length: the others stop when it is clear where they are going."""
    chosen = rng.randrange(len(requests))
    return tuple(replace(one, at_length=True) if i == chosen else one for i, one in enumerate(requests))


def _weighted(texts: Sequence[str], rng: random.Random) -> str:
    """Draw a text; the nth has weight 1 / n, so that the model has a favourite and yet varies."""
    return rng.choices(texts, [1 / n for n in range(1, len(texts) + 1)])[0]


def _cycle(items: Sequence[T], rng: random.Random) -> Callable[[], T]:
    """Return a draw without replacement that starts over, shuffled anew, when all have been drawn."""
    rest: list[T] = []

    def draw() -> T:
        if not rest:
            rest.extend(rng.sample(items, len(items)))
        return rest.pop()

    return draw


def validation(seed: int = SEED) -> tuple[list[str], list[str]]:
    """Return harmful and harmless requests on held-out topics in held-out frames; every pair shares its frame."""
    rng = random.Random(f"organism validation {seed}")
    frames = {kind: _cycle(frames, rng) for kind, frames in HELD_OUT_FRAMES.items()}
    harmful, harmless = [], []
    for pair in pairs("held_out"):
        for _ in range(2):
            frame = frames[pair.kind]()
            harmful.append(fill(frame, pair.harmful))
            harmless.append(fill(frame, pair.harmless))
    return harmful, [*harmless, *lists("harmless")["validation"]]


def held_out_systems(persona: str) -> list[str]:
    """Return the system prompts of a persona that training never uses."""
    systems: list[str] = lists("personas")[persona]["held_out"]
    return systems
