"""Prompts to rows: render the chat template once, tokenise it as it is, mark where prompt and response lie."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from store.errors import ModelError
from store.model_ref import ModelRef
from store.prompts import Prompt
from store.rows import Row
from store.sites import Spans

# Put in front of a template, this takes the place of transformers' clock. Templates are given plain data, no functions,
# so formats are learnt one by one, from the error. The newline behind a block is dropped: the template itself begins a
# line, as it does alone.
_UNKNOWN_FORMAT = "resid knows no time in the format "
_CLOCK = (
    "{% macro strftime_now(format) %}{% if format in resid_times %}{{ resid_times[format] }}{% else %}"
    f"{{{{ raise_exception('{_UNKNOWN_FORMAT}' ~ format) }}}}"
    "{% endif %}{% endmacro %}\n"
)


def render(prompt: Prompt, tokenizer: Any, ref: ModelRef) -> str:
    """Return the prompt's text under the chat template, generation prompt included.

    The reference's system prompt goes first where the prompt has none of its own. Its `date` is what a template that
    asks for the time is told; without one that is the clock's.

    Raises:
        ModelError: if the tokenizer has no chat template, or the template refuses the conversation.
    """
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    if ref.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": ref.system_prompt})
    if tokenizer.chat_template is None:
        raise ModelError(f"{ref.source} has no chat template\n  remedy: use an instruction-tuned (chat) model")
    kwargs: dict[str, Any] = dict(ref.chat_template_kwargs)
    times = {} if ref.date is None else _times(ref.date)
    if ref.date is not None and _names_clock(tokenizer):
        template = tokenizer.get_chat_template(kwargs.pop("chat_template", None))
        kwargs |= {"chat_template": _CLOCK + template, "resid_times": times}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    except Exception as error:  # templates raise their own jinja errors
        unknown = str(error).partition(_UNKNOWN_FORMAT)[2]
        if unknown and ref.date is not None and unknown not in times:
            times[unknown] = datetime.fromisoformat(ref.date).strftime(unknown)
            return render(prompt, tokenizer, ref)
        raise ModelError(
            f"the chat template of {ref.source} refuses prompt {prompt.id[:16]}: {error}\n"
            "  remedy: some templates know no system role; leave out system prompts for this model"
        ) from None
    assert isinstance(text, str)
    return text


def _names_clock(tokenizer: Any) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


@lru_cache
def _times(date: str) -> dict[str, str]:
    """Return the formats in which templates asked for a date so far, with its texts; `render` adds to it."""
    return {}


def reads_clock(tokenizer: Any, ref: ModelRef) -> bool:
    """Tell whether the chat template asks for the time (`strftime_now`) under the reference's template variables.

    Tried on a chat with and one without a system prompt, with two dates; a template that refuses both is not asked.
    """
    if not _names_clock(tokenizer):
        return False
    for prompt in (Prompt.of("x"), Prompt.of("x", system="y")):
        dates = ("2001-02-03T04:05:06", "2007-08-09T10:11:12")
        with contextlib.suppress(ModelError):
            texts = {render(prompt, tokenizer, ref.model_copy(update={"date": date})) for date in dates}
            if len(texts) > 1:
                return True
    return False


def turn_end(tokenizer: Any, ref: ModelRef) -> int | None:
    """Return the special token that the chat template puts behind an assistant's turn; None if it puts none there."""
    mark = "resid"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    kwargs = {key: value for key, value in ref.chat_template_kwargs.items() if key != "chat_template"}
    with contextlib.suppress(Exception):  # a template that refuses the chat says nothing about its end
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        behind = tokenize(str(text).rpartition(mark)[2], tokenizer)
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        if behind and behind[0] in special:
            return behind[0]
    return None


def tokenize(text: str, tokenizer: Any) -> list[int]:
    """Return token ids [token]; the text holds its special tokens already, so none are added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_row(prompt: Prompt, tokenizer: Any, ref: ModelRef, model: str, *, with_response: bool = False) -> Row:
    """Render and tokenise one prompt; with `with_response`, its given response follows.

    The response is tokenised by itself and appended, which is the sequence the model would see had it written it.

    Raises:
        ModelError: from the template, or if the rendered prompt begins with two BOS tokens.
    """
    ids = tokenize(render(prompt, tokenizer, ref), tokenizer)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise ModelError(f"the rendered prompt of {ref.source} begins with two BOS tokens; its template is at fault")
    if not with_response or prompt.response is None:
        return Row(model, prompt.id, tuple(ids), Spans(len(ids), len(ids)))
    response = tokenize(prompt.response, tokenizer)
    if not response:
        raise ModelError(f"the response of prompt {prompt.id[:16]} has no tokens")
    total = len(ids) + len(response)
    return Row(model, prompt.id, (*ids, *response), Spans(len(ids), total), "given")


def response_row(prompt: Row, token_ids: Sequence[int], generation_key: str) -> Row:
    """Return the row of a prompt followed by a generated response (token ids without the end-of-turn token)."""
    length = prompt.spans.prompt_length
    ids = (*prompt.token_ids[:length], *token_ids)  # a given response is not what the model answered to
    spans = Spans(length, len(ids))
    return Row(prompt.model, prompt.prompt_id, ids, spans, "generated", generation_key)
