"""What is said of a model's files before its weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from slow_reference import tiny
from tiny_models import tiny_model, tiny_tokenizer

from jobs.capture import CaptureInputs
from jobs.context import Context
from jobs.model_checks import model_notes
from jobs.replay import ReplayPlan
from pipeline.replay import Output, stop_string, text_of
from store.conditions import decoding_key
from store.errors import StudyError
from store.study import Decoding
from store.study_file import load_study

PROMPTS = [f"tell me {i} of them" for i in range(4)]


def opened(folder: Path, prompts: list[Any] | None = None, **keys: Any) -> Context:
    """Return a study of a tiny model and these prompts, opened for planning."""
    if not (folder / "model").exists():
        tiny_model("llama").save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
    lines = [{"prompt": p} if isinstance(p, str) else {"messages": p} for p in prompts or PROMPTS]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = {"messages": "messages"} if "messages" in lines[0] else {"prompt": "prompt"}
    study = {
        "name": "s",
        "model": {"source": str(folder / "model"), **keys.pop("model", {})},
        "prompts": {"A": {"path": "a.jsonl", "columns": columns}},
        "capture": [{"prompts": ["A"]}],
        "replay": {"prompts": ["A"], "conditions": {"baseline": {}}, "decoding": {"max_new_tokens": 8}},
        "store": str(folder / "store"),
        "results": str(folder / "results"),
        **keys,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return Context(load_study(folder / "study.yaml"), only_planning=True)


def test_a_prompt_beyond_the_models_context_is_named(tmp_path: Path) -> None:
    # Used to happen: 30 lines of traceback with learnt positions, silence with rotary ones.
    context = opened(tmp_path, [*PROMPTS, "far " * 300])
    with pytest.raises(StudyError, match=r"tokens; the model was made for 256 \(prompt 'far far"):
        CaptureInputs(context)


def test_a_text_that_would_run_beyond_the_context_is_named(tmp_path: Path) -> None:
    replay = {"prompts": ["A"], "conditions": {"baseline": {}}, "decoding": {"max_new_tokens": 250}}
    with pytest.raises(StudyError, match="up to 250 follow; the model was made for 256"):
        _ = ReplayPlan(opened(tmp_path, replay=replay), predict=True).wanted


def test_a_template_variable_that_is_never_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="never reads 'enable_thinkin'"):
        CaptureInputs(opened(tmp_path, model={"chat_template_kwargs": {"enable_thinkin": False}}))


def test_parts_of_messages_that_nothing_would_show_are_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": [{"name": "f"}]}]
    with pytest.raises(StudyError, match="message 2 has tool_calls"):
        _ = opened(tmp_path, [[*turns, {"role": "user", "content": "z"}]]).prompt_sets


def test_special_tokens_inside_prompts_are_noted(tmp_path: Path) -> None:
    token = tiny_tokenizer().eos_token
    assert not model_notes(opened(tmp_path))
    (line,) = model_notes(opened(tmp_path, [f"what is {token} for", "x"]))
    assert line.startswith("1 prompts hold special tokens")
    assert token in line


def test_a_generation_config_that_changes_decoding_is_noted(tmp_path: Path) -> None:
    context = opened(tmp_path)
    file = tmp_path / "model" / "generation_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**settings, "repetition_penalty": 1.1, "min_p": 0.0}))
    (line,) = [line for line in model_notes(context) if "generation config" in line]
    assert "repetition_penalty: 1.1," in line
    assert "min_p" not in line


def test_an_end_of_turn_that_ends_no_text_is_noted_until_stop_names_it(tmp_path: Path) -> None:
    # Used to happen: ChatML fine-tunes on a base tokenizer ran to max_new_tokens, and nothing was said.
    opened(tmp_path)
    tokenizer = tiny_tokenizer()
    end = next(t for t in tokenizer.all_special_tokens if t not in (tokenizer.eos_token, tokenizer.bos_token))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    (line,) = model_notes(opened(tmp_path))
    assert f"ends a turn with {end!r}" in line
    decoding = {"max_new_tokens": 8, "stop": [end]}
    stopped = opened(tmp_path, replay={"prompts": ["A"], "conditions": {"baseline": {}}, "decoding": decoding})
    assert not model_notes(stopped)


def test_a_stop_string_matches_a_special_token() -> None:
    tokenizer = tiny("llama").tokenizer
    word = tokenizer("tell", add_special_tokens=False)["input_ids"][0]
    ids, decoding = [word, tokenizer.eos_token_id], Decoding(max_new_tokens=8, stop=[tokenizer.eos_token])
    assert stop_string(tokenizer, decoding, ids) == tokenizer.eos_token
    assert stop_string(tokenizer, decoding, ids[:1]) is None
    output = Output(token_ids=ids, ended_by=tokenizer.eos_token)
    assert text_of(tokenizer, output) == tokenizer.decode(ids[:1])


def test_texts_under_stop_strings_like_special_tokens_have_a_new_key() -> None:
    plain, special = (Decoding(max_new_tokens=8, stop=[stop]) for stop in ("x", "<|im_end|>"))
    assert decoding_key(plain, None) != decoding_key(special, None)
