"""What a study asks of its model that the model's files already refuse or change, said before weights are loaded."""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import Any

from jobs.context import Context
from store.errors import StudyError
from store.rows import Row
from store.yaml_file import where

# Settings of a generation config that change greedy or sampled decoding beyond what `decoding:` says -> no effect.
_NO_EFFECT: dict[str, object] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
}


def context_length(context: Context) -> int | None:
    """Return how many tokens the model was made for; None where its config does not say."""
    from pipeline.models import load_config

    length = getattr(load_config(context.study.model).get_text_config(), "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def check_length(context: Context, row: Row, text: str, limit: int | None, new_tokens: int, key: str) -> None:
    """Refuse a row that with the text to generate is longer than the model was made for.

    Beyond learnt positions (GPT-2) a forward pass fails; beyond rotary ones it goes on, and the values mean little.

    Raises:
        StudyError: naming the prompt and both lengths.
    """
    length = len(row.token_ids) if not new_tokens else row.spans.prompt_length + new_tokens
    if limit is None or length <= limit:
        return
    what = f"{length} tokens" if not new_tokens else f"{row.spans.prompt_length} tokens, and up to {new_tokens} follow"
    raise StudyError(
        f"a prompt has {what}; the model was made for {limit} (prompt {text[:60]!r})",
        file=where(context.study.file, key),
        key=key,
        remedy="leave the prompt out, lower max_new_tokens, or use a model with room for it",
    )


def check_template_variables(context: Context) -> None:
    """Refuse variables for the chat template that the template never reads: transformers passes them in silence.

    Raises:
        StudyError: naming the variable and the nearest that the template reads.
    """
    given = context.study.model.chat_template_kwargs
    template = context.tokenizer.chat_template
    if not given or not isinstance(template, str):
        return
    known = _variables(template)
    for name in given:
        if name not in known and name != "chat_template":
            near = difflib.get_close_matches(name, known, n=1)
            key = f"model.chat_template_kwargs.{name}"
            raise StudyError(
                f"the chat template never reads {name!r}",
                file=where(context.study.file, key),
                key=key,
                remedy=f"did you mean {near[0]}?" if near else f"it reads {', '.join(sorted(known)) or 'none'}",
            )


@lru_cache
def _variables(template: str) -> frozenset[str]:
    """Return the variables that a chat template reads, without what transformers always gives it."""
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _generation_extension()])
    always = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
    return frozenset(meta.find_undeclared_variables(environment.parse(template))) - always


def _generation_extension() -> Any:
    """Return an extension that knows `{% generation %}`, which transformers adds to Jinja."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def model_notes(context: Context) -> list[str]:
    """Return what is worth a look: special tokens in prompts, settings that are not applied, turns without an end."""
    return [line for line in (_special_tokens(context), _generation_config(context), _turn_end(context)) if line]


def _special_tokens(context: Context) -> str | None:
    special = {token for token in context.tokenizer.all_special_tokens if len(token) > 2}
    holding = {
        prompt.id: sorted(token for token in special if any(token in message.content for message in prompt.messages))
        for prompt in context.prompts_by_id.values()
    }
    holding = {prompt: tokens for prompt, tokens in holding.items() if tokens}
    if not holding:
        return None
    first, tokens = next(iter(holding.items()))
    return (
        f"{len(holding)} prompts hold special tokens in their own text, which the model reads as such: "
        f"{', '.join(tokens)} in {context.prompts_by_id[first].text[:60]!r}"
    )


def _generation_config(context: Context) -> str | None:
    from pipeline.models import generation_settings

    settings = generation_settings(context.study.model)
    changed = {name: settings[name] for name in _NO_EFFECT if settings.get(name) not in (None, _NO_EFFECT[name])}
    if not changed:
        return None
    named = ", ".join(f"{name}: {value}" for name, value in changed.items())
    return f"the model's generation config sets {named}, which transformers' generate applies and resid does not"


def _turn_end(context: Context) -> str | None:
    """Say if the token that ends an assistant's turn in the chat template does not end a text."""
    from pipeline.chat import turn_end
    from pipeline.models import generation_settings

    if context.study.replay is None:
        return None
    token = turn_end(context.tokenizer, context.study.model)
    if token is None:
        return None
    ids = generation_settings(context.study.model).get("eos_token_id")
    ending = {*([ids] if isinstance(ids, int) else list(ids or [])), context.tokenizer.eos_token_id}
    name = context.tokenizer.convert_ids_to_tokens(token)
    if token in ending or name in context.study.replay.decoding.stop:
        return None
    return (
        f"the chat template ends a turn with {name!r}, which ends no text here: texts run on to max_new_tokens; write "
        f"replay.decoding.stop: [{name!r}], or correct eos_token_id in the model's generation_config.json"
    )
