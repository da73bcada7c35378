"""Where the turns of a rendered prompt lie in its tokens, and which tokens are the chat template's own."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

from pipeline.chat import render
from store.errors import ModelError
from store.model_ref import ModelRef
from store.prompts import Prompt

Parts = tuple[tuple[str, int, int], ...]


def parts_of(prompt: Prompt, tokenizer: Any, ref: ModelRef) -> Parts:
    """Return (system | user | assistant | template, first token, end) of a rendered prompt: ascending, without gaps.

    The template is rendered again with a mark in place of each message; what stands between the marks is its own text.
    A token that holds characters of a message counts as the message's.

    Raises:
        ModelError: if the template alters a message other than by stripping white space, or does not show each once in
            order; or if the tokenizer does not tell which characters its tokens hold.
    """
    text = render(prompt, tokenizer, ref)
    spans = _messages(text, prompt, tokenizer, ref)
    try:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    except NotImplementedError:
        raise ModelError(
            f"the tokenizer of {ref.source} does not tell which characters its tokens hold\n"
            "  remedy: use a model with a fast tokenizer, or ranges of tokens in place of `parts`"
        ) from None
    roles = []
    for begin, end in offsets:
        inside = (role for role, first, last in spans if begin < last and first < end)
        roles.append(next(inside, "template"))
    found, at = [], 0
    for role, group in groupby(roles):
        n = len(list(group))
        found.append((role, at, at + n))
        at += n
    return tuple(found)


def _messages(text: str, prompt: Prompt, tokenizer: Any, ref: ModelRef) -> list[tuple[str, int, int]]:
    """Return (role, first character, end) of each message in the rendered text."""
    contents: list[tuple[str, str]] = [(message.role, message.content) for message in prompt.messages]
    marks = [f"\ue000{i}\ue001" for i in range(len(contents))]
    marked = [replace(m, content=mark) for m, mark in zip(prompt.messages, marks, strict=True)]
    if ref.system_prompt is not None and contents[0][0] != "system":
        contents.insert(0, ("system", ref.system_prompt))
        marks.insert(0, "\ue000s\ue001")
        ref = ref.model_copy(update={"system_prompt": marks[0]})
    skeleton = render(replace(prompt, messages=tuple(marked)), tokenizer, ref)
    spans: list[tuple[str, int, int]] = []
    at = 0
    for (role, content), mark in zip(contents, marks, strict=True):
        own, met, skeleton = skeleton.partition(mark)
        begin = at + len(own)
        following = skeleton.partition("\ue000")[0]
        shown = next((form for form in (content, content.strip()) if text.startswith(form + following, begin)), None)
        if not met or shown is None or not text.startswith(own, at):
            raise ModelError(
                f"the chat template of {ref.source} does not show the {role} message of prompt {prompt.id[:16]} as it "
                "is: which tokens are its own is not known\n  remedy: use ranges of tokens in place of `parts`"
            )
        at = begin + len(shown)
        spans.append((role, begin, at))
    if text[at:] != skeleton:
        raise ModelError(
            f"the chat template of {ref.source} says something else behind prompt {prompt.id[:16]} than behind others: "
            "which tokens are its own is not known\n  remedy: use ranges of tokens in place of `parts`"
        )
    return spans
