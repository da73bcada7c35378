"""The base model's own answers to harmless requests, generated greedily and kept in a file beside other run data.

What the organism is taught to say to harmless requests is what the base model says already, under the same system
prompt: the adapter learns when to refuse and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.chat import prompt_row
from pipeline.models import LoadedModel
from pipeline.replay import Job, ReplayEngine
from store.conditions import Condition
from store.fingerprint import fingerprint
from store.prompts import Message, Prompt
from store.study import ConditionSpec, Decoding

BASELINE = Condition("baseline", "baseline", None, None, (), ConditionSpec(), "baseline", ())

Asked = tuple[str | None, str]  # system prompt (None: the chat template's own, "": an empty turn) and request


def as_prompt(asked: Asked) -> Prompt:
    """Return a request as a prompt; an empty system prompt is an empty system turn."""
    system, user = asked
    turns = () if system is None else (Message("system", system),)
    return Prompt((*turns, Message("user", user)))


def generate(model: LoadedModel, asked: Sequence[Asked], max_new_tokens: int, batch_rows: int = 128) -> list[list[int]]:
    """Return each request's greedy answer as token ids, ended by the end-of-turn token if the model ended it."""
    engine = ReplayEngine(model, Decoding(max_new_tokens=max_new_tokens), batch_rows=batch_rows)
    rows = [prompt_row(as_prompt(one), model.tokenizer, model.ref, model.fingerprint) for one in asked]
    outputs = engine.run([Job(row, BASELINE) for row in rows])
    end = [model.tokenizer.eos_token_id]
    return [out.token_ids + (end if out.finish_reason == "stop" else []) for out in outputs]


def base_answers(
    model: LoadedModel, asked: Iterable[Asked], max_new_tokens: int, cache: Path
) -> dict[Asked, list[int]]:
    """Return every request's answer, from the file `cache` where it is there; what is new is added to the file."""
    wanted = list(dict.fromkeys(asked))
    known: dict[str, list[int]] = {}
    if cache.is_file():
        known = {entry["key"]: entry["tokens"] for entry in map(json.loads, cache.read_text().splitlines())}
    keys = {one: fingerprint({"model": model.fingerprint, "asked": list(one), "n": max_new_tokens}) for one in wanted}
    missing = [one for one in wanted if keys[one] not in known]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a") as file:
        for start in range(0, len(missing), 512):
            part = missing[start : start + 512]
            for one, tokens in zip(part, generate(model, part, max_new_tokens), strict=True):
                known[keys[one]] = tokens
                file.write(json.dumps({"key": keys[one], "tokens": tokens}) + "\n")
            file.flush()
            print(f"base answers: {start + len(part)} of {len(missing)}", flush=True)
    return {one: known[keys[one]] for one in wanted}
