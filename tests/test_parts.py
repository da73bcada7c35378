"""Where turns of a prompt lie in its tokens, and interventions at them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from slow_reference import Step, condition, random_rows, tiny
from tiny_models import tiny_tokenizer

from pipeline.chat import prompt_row
from pipeline.models import LoadedModel
from pipeline.parts import parts_of
from pipeline.replay import Job, ReplayEngine
from store.conditions import check_token_ranges, operations_for
from store.errors import ModelError
from store.model_ref import ModelRef
from store.prompts import Message, Prompt
from store.sites import Site
from store.study import Decoding
from store.study_interventions import TokenScope

REF = ModelRef(source="./tiny")
SITE = Site("resid_post", 1)
CHAT = Prompt(
    (
        Message("system", "Be brief."),
        Message("user", "user"),
        Message("assistant", "Yes, user."),
        Message("user", " Go on "),
    )
)


def shown(prompt: Prompt, tokenizer: Any, ref: ModelRef = REF) -> list[tuple[str, str]]:
    ids = prompt_row(prompt, tokenizer, ref, "m").token_ids
    parts = parts_of(prompt, tokenizer, ref)
    assert [end for _, _, end in parts] == [begin for _, begin, _ in parts[1:]] + [len(ids)]
    return [(role, tokenizer.decode(ids[begin:end])) for role, begin, end in parts]


def test_turns_and_template_make_up_a_real_prompt(smollm2: LoadedModel) -> None:
    # "user" is what the template calls the turn as well.
    assert shown(CHAT, smollm2.tokenizer) == [
        ("template", "<|im_start|>system\n"),
        ("system", "Be brief."),
        ("template", "<|im_end|>\n<|im_start|>user\n"),
        ("user", "user"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "Yes, user."),
        ("template", "<|im_end|>\n<|im_start|>user\n"),
        ("user", " Go on "),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
    ]
    told = shown(Prompt.of("Hi"), smollm2.tokenizer, REF.model_copy(update={"system_prompt": "Be kind."}))
    assert told[1] == ("system", "Be kind.")


def test_a_template_that_strips_a_message_is_followed_and_one_that_alters_it_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    turn = "{% for m in messages %}[{{ m.role }}]{{ m.content CHANGE }}{% endfor %}[go]"
    tokenizer.chat_template = turn.replace("CHANGE", "| trim")
    assert [role for role, _, _ in parts_of(CHAT, tokenizer, REF)].count("user") == 2
    tokenizer.chat_template = turn.replace("CHANGE", "| upper")
    with pytest.raises(ModelError, match=r"does not show the system message of prompt .* as it is"):
        parts_of(CHAT, tokenizer, REF)


def test_a_scope_by_parts_acts_on_those_tokens_alone() -> None:
    (row,) = random_rows([(9, 0)])
    row = replace(
        row, parts=(("template", 0, 2), ("system", 2, 4), ("template", 4, 5), ("user", 5, 8), ("template", 8, 9))
    )
    v = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    scopes = {"user": {"parts": ["user"]}, "own": {"parts": ["template"], "prompt": {"from": 1}, "response": "all"}}
    expected = {"user": 3, "own": 1 + 1 + 1 + 2}  # the last text token is not read
    named = {key: condition(key, [Step("add", SITE, v, TokenScope.model_validate(s))]) for key, s in scopes.items()}
    for how in ({}, {"lean": False}):
        engine = ReplayEngine(tiny("llama"), Decoding(max_new_tokens=3), **how)
        engine.stop_ids = frozenset()
        outputs = engine.run([Job(row, named[key]) for key in named])
        assert [o.effects[0].n_tokens for o in outputs] == list(expected.values())
    assert replace(row, parts=None).key == row.key, "where parts lie is not in the key"


def test_parts_that_a_prompt_does_not_have_are_refused() -> None:
    (row,) = random_rows([(9, 0)])
    v = torch.ones(1, 48)
    asked = condition("c", [Step("add", SITE, v, TokenScope.model_validate({"parts": ["system"]}))])
    with pytest.raises(ValueError, match="where system tokens lie in the prompt is not known"):
        operations_for(asked, row)
    with pytest.raises(ValueError, match="condition 'c': the prompt has no system tokens from 0 to 9"):
        check_token_ranges(asked, replace(row, parts=(("user", 0, 9),)))
