"""A prompt becomes one row: rendered once, tokenised as it is, with prompt and response marked."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer

from pipeline.chat import prompt_row, reads_clock, render, response_row, tokenize
from store.errors import ModelError
from store.fingerprint import canonical
from store.model_ref import ModelRef
from store.prompts import Message, Prompt
from store.rows import Row
from store.sites import Spans

BOS, EOS, SYSTEM, USER, ASSISTANT = 1, 2, 3, 4, 5


def ref(**changes: Any) -> ModelRef:
    return ModelRef(source="org/model", **changes)


def prompt(text: str = "Hi", system: str | None = None, response: str | None = None) -> Prompt:
    messages = (Message("user", text),)
    return Prompt((Message("system", system), *messages) if system is not None else messages, response)


def test_a_prompt_is_rendered_with_the_generation_prompt_and_ends_in_it() -> None:
    assert render(prompt(), tiny_tokenizer(), ref()) == "<s><|user|>Hi</s><|assistant|>"
    row = prompt_row(prompt(), tiny_tokenizer(), ref(), "m")
    assert row.token_ids[:2] == (BOS, USER)
    assert row.token_ids[-1] == ASSISTANT
    assert row.spans == Spans(len(row.token_ids), len(row.token_ids))
    assert not row.spans.has_response


def test_bos_occurs_once_where_tokenising_the_rendered_text_again_doubles_it() -> None:
    # Used to happen: the rendered template was tokenised with special tokens and began with two BOS.
    class AddsBos:
        """A tokenizer that puts BOS first, as Llama's does, unless told not to."""

        def __init__(self) -> None:
            self.inner = tiny_tokenizer()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = self.inner(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [BOS, *ids] if add_special_tokens else ids}

    tokenizer = AddsBos()
    assert tokenizer(render(prompt(), tokenizer, ref()))["input_ids"][:2] == [BOS, BOS]
    assert prompt_row(prompt(), tokenizer, ref(), "m").token_ids.count(BOS) == 1


def test_a_template_that_doubles_bos_itself_is_refused() -> None:
    tokenizer = tiny_tokenizer("{{ bos_token }}" + CHAT_TEMPLATE)
    with pytest.raises(ModelError, match="two BOS"):
        prompt_row(prompt(), tokenizer, ref(), "m")


def test_the_system_prompt_goes_first_only_where_the_prompt_has_none() -> None:
    tokenizer, with_system = tiny_tokenizer(), ref(system_prompt="Be kind")
    assert "<|system|>Be kind</s><|user|>Hi" in render(prompt(), tokenizer, with_system)
    own = render(prompt(system="Be terse"), tokenizer, with_system)
    assert "<|system|>Be terse</s>" in own
    assert "Be kind" not in own
    assert "<|system|></s>" in render(prompt(), tokenizer, ref(system_prompt=""))
    assert "<|system|>" not in render(prompt(), tokenizer, ref())


def test_turns_before_the_last_are_kept_in_order() -> None:
    messages = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    text = render(Prompt(messages), tiny_tokenizer(), ref(system_prompt="s"))
    assert text == "<s><|system|>s</s><|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>"


def test_template_variables_reach_the_template() -> None:
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE + "{% if thinking is defined and not thinking %}<quiet>{% endif %}")
    assert render(prompt(), tokenizer, ref(chat_template_kwargs={"thinking": False})).endswith("<quiet>")
    assert not render(prompt(), tokenizer, ref()).endswith("<quiet>")


CLOCK = "{{ bos_token }}<|system|>Today {{ strftime_now('%d %b %Y, %H:%M:%S %%') }}{{ eos_token }}"
CLOCK_TEMPLATE = CLOCK + CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
# As in Llama 3.2: a template variable states the date.
DATE_STRING = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"


def test_a_template_that_reads_the_clock_is_told_the_date_of_the_reference() -> None:
    tokenizer = tiny_tokenizer(CLOCK_TEMPLATE)
    text = "<s><|system|>Today 30 Nov 2026, 14:05:00 %</s><|user|>Hi</s><|assistant|>"
    assert render(prompt(), tokenizer, ref(date="2026-11-30T14:05")) == text
    assert "Today 29 Nov 2026, 00:00:00 %" in render(prompt(), tokenizer, ref(date="2026-11-29"))
    assert str(datetime.now().year) in render(prompt(), tokenizer, ref())


@pytest.mark.parametrize("start", ["\n  ", "  ", "", "{%- if true %}\n{%- endif %}\n"])
def test_a_date_changes_nothing_else_of_what_a_template_renders(start: str) -> None:
    inside = (
        "{% macro today(f) %}{{ strftime_now(f) if strftime_now is defined }}{% endmacro %}{{ today('%Y' ~ '-%m') }}"
    )
    tokenizer = tiny_tokenizer(start + inside + CHAT_TEMPLATE)
    now = datetime.now()
    assert render(prompt(), tokenizer, ref(date=now.isoformat())) == render(prompt(), tokenizer, ref())
    plain = tiny_tokenizer(start + CHAT_TEMPLATE)
    assert render(prompt(), plain, ref(date="2026-11-30")) == render(prompt(), plain, ref())


def test_whether_a_template_reads_the_clock_is_found_by_trying_it() -> None:
    assert reads_clock(tiny_tokenizer(CLOCK_TEMPLATE), ref())
    assert not reads_clock(tiny_tokenizer(), ref())
    pinned = tiny_tokenizer(DATE_STRING + "{{ date_string }}" + CHAT_TEMPLATE)
    assert reads_clock(pinned, ref())
    assert not reads_clock(pinned, ref(chat_template_kwargs={"date_string": "26 Jul 2024"}))
    only_default = "{% if messages[0].role != 'system' %}{{ strftime_now('%Y') }}{% endif %}" + CHAT_TEMPLATE
    assert reads_clock(tiny_tokenizer(only_default), ref())


def test_a_reference_without_a_date_is_recorded_as_before_there_was_one() -> None:
    assert "date" not in canonical(ref())  # type: ignore[operator]
    assert canonical(ref(date="2026-11-30"))["date"] == "2026-11-30"  # type: ignore[index]
    assert ModelRef.model_validate(ref(date="2026-11-30").model_dump()) == ref(date="2026-11-30")
    with pytest.raises(ValidationError, match="'yesterday' is not a date; write 2026-11-30"):
        ref(date="yesterday")


def test_a_template_that_refuses_the_system_role_says_so() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    with pytest.raises(ModelError, match=r"org/model refuses prompt \w{16}.*no system role\n.*remedy"):
        render(prompt(), tiny_tokenizer(refuses), ref(system_prompt="s"))
    assert render(prompt(), tiny_tokenizer(refuses), ref())


def test_a_model_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ModelError, match=r"org/model has no chat template\n.*instruction-tuned"):
        render(prompt(), tiny_tokenizer(None), ref())


def test_a_given_response_follows_the_prompt_and_is_its_own_span() -> None:
    tokenizer, given = tiny_tokenizer(), prompt(response="Hello you")
    alone = prompt_row(given, tokenizer, ref(), "m")
    row = prompt_row(given, tokenizer, ref(), "m", with_response=True)
    assert row.token_ids == (*alone.token_ids, *tokenize("Hello you", tokenizer))
    assert row.spans == Spans(len(alone.token_ids), len(row.token_ids))
    assert (row.source, alone.source) == ("given", "prompt")
    first, last = row.spans.token_range("response_start")[0], row.spans.token_range("response_avg")[1] - 1
    assert tokenizer.decode([row.token_ids[first], row.token_ids[last]]) == "Hu"
    assert row.token_ids[row.spans.token_range("prompt_end")[0]] == ASSISTANT
    assert EOS not in row.token_ids[first:]


def test_a_prompt_without_a_response_has_the_same_row_either_way() -> None:
    tokenizer = tiny_tokenizer()
    rows = [prompt_row(prompt(), tokenizer, ref(), "m", with_response=flag) for flag in (False, True)]
    assert rows[0] == rows[1]


def test_a_response_without_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="has no tokens"):
        prompt_row(prompt(response=""), tiny_tokenizer(), ref(), "m", with_response=True)


def test_a_generated_response_follows_the_prompt() -> None:
    before = prompt_row(prompt(), tiny_tokenizer(), ref(), "m")
    row = response_row(before, [40, 41, 42], "g")
    assert row.token_ids == (*before.token_ids, 40, 41, 42)
    assert row.spans == Spans(len(before.token_ids), len(before.token_ids) + 3)
    assert (row.source, row.generation_key, row.prompt_id) == ("generated", "g", before.prompt_id)
    assert not response_row(before, [], "g").spans.has_response


def test_a_generated_response_replaces_a_given_one() -> None:
    # Used to happen: the generated tokens were appended to the given response and the span covered both.
    given = prompt_row(prompt(response="Hello"), tiny_tokenizer(), ref(), "m", with_response=True)
    bare = prompt_row(prompt(response="Hello"), tiny_tokenizer(), ref(), "m")
    assert response_row(given, [40], "g") == response_row(bare, [40], "g")


def test_the_real_chat_template_opens_every_turn_once(smollm2: Any) -> None:
    row = prompt_row(prompt("What is a lake?", "Answer briefly."), smollm2.tokenizer, smollm2.ref, smollm2.fingerprint)
    text = smollm2.tokenizer.decode(list(row.token_ids))
    assert text == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nWhat is a lake?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert isinstance(row, Row)
    assert row.spans.token_range("prompt_end") == (len(row.token_ids) - 1, len(row.token_ids))
