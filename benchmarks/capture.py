"""Rows per second of a capture at resid_post of every layer, beside plain transformers loops and published tools.

    python benchmarks/capture.py                       # the last prompt token; three system prompts in turn
    python benchmarks/capture.py --rows template       # no system prompt: rows share the chat template's start only
    python benchmarks/capture.py --rows responses      # four responses per prompt; their mean as well
    python benchmarks/capture.py --peers .venv-peers/bin/python      # see `make benchmark-peers`

The plain loops ask transformers for all hidden states and keep what is wanted; the batched one pads on the left and is
right for every row. The last layer is left out of the comparison: there, hidden_states is after the final norm. "bare
forward" runs all tokens of all rows through the base model in batches of equal length, without padding, and keeps
nothing: what a capture costs at least if nothing is shared. All methods take turns on one core; the table has medians.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import paths  # noqa: F401
import torch
import transformers
from common import parser, plan_of, prepare
from peers import PUBLISHED, Peer
from torch import Tensor

from pipeline.batching import pad
from pipeline.capture import BATCH_BOUND, CaptureEngine
from pipeline.chat import prompt_row
from pipeline.models import LoadedModel, model_folder
from store.prompts import Message, Prompt
from store.rows import Row

BATCH = 8
ANSWERS = (
    "No.",
    "Yes, of course. Tell me a little more about what you have in mind, and I will do my best.",
    "That depends on where you live and on what you want to do with it.",
    "I would rather not say. There are better people to ask, and they will be able to tell you what it takes, what it "
    "costs and what may go wrong on the way.",
)


def rows_of(kind: str, model: LoadedModel, rows: list[Row], prompts: int) -> tuple[list[Row], tuple[str, ...]]:
    """Return rows and the positions to capture."""
    if kind == "systems":
        return rows, ("prompt_end",)
    texts = []
    for name in ("harmful", "harmless"):
        lines = (Path(__file__).parent.parent / "prompts" / f"{name}.jsonl").read_text().splitlines()
        texts += [json.loads(line)["prompt"] for line in lines[: (prompts + 1) // 2]]

    def row(text: str, answer: str | None) -> Row:
        prompt = Prompt((Message("user", text),), answer)
        found: Row = prompt_row(prompt, model.tokenizer, model.ref, model.fingerprint, with_response=answer is not None)
        return found

    if kind == "template":
        return [row(text, None) for text in texts[:prompts]], ("prompt_end",)
    return [row(text, answer) for text in texts[: prompts // 4] for answer in ANSWERS], ("prompt_end", "response_avg")


@torch.inference_mode()
def plain(model: LoadedModel, rows: list[Row], positions: tuple[str, ...], batch: int) -> Tensor:
    """Return hidden_states[1:] at the positions, [row, layer, position, d_model]."""
    found = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        padded = pad(
            [row.token_ids[: row.spans.response_end] for row in some],
            side="left",
            pad_id=model.tokenizer.pad_token_id,
            device=model.device,
        )
        states = model.model(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            position_ids=padded.position_ids,
            output_hidden_states=True,
        ).hidden_states
        for index, row in enumerate(some):
            ranges = [row.spans.token_range(position) for position in positions]
            first = padded.starts[index]
            layers = [
                torch.stack([state[index, first + a : first + b].mean(0) for a, b in ranges]) for state in states[1:]
            ]
            found.append(torch.stack(layers))
    return torch.stack(found)


@torch.inference_mode()
def bare(model: LoadedModel, rows: list[Row], budget: int) -> None:
    """Run every token of every row through the base model: equal lengths together, no padding, nothing kept."""
    sequences = sorted((row.token_ids[: row.spans.response_end] for row in rows), key=len)
    for length, group in groupby(sequences, key=len):
        same = list(group)
        step = max(1, budget // length)
        for start in range(0, len(same), step):
            model.architecture.base(input_ids=torch.tensor(same[start : start + step]), use_cache=False)


class Published:
    """A published tool, see capture_peers.py."""

    def __init__(self, stack: ExitStack, python: str, name: str, model: LoadedModel, rows: list[Row], threads: int):
        ids = [row.token_ids[: row.spans.response_end] for row in rows]
        asked = {"ids": ids, "texts": [model.tokenizer.decode(tokens) for tokens in ids]}
        self._peer = Peer(stack, python, "capture_peers.py", asked, name, model_folder(model.ref), threads, BATCH)
        self.version = self._peer.version

    def __call__(self) -> Tensor:
        self._peer.work()
        return torch.from_numpy(np.load(self._peer.folder / "answer.npy"))  # [row, layer, d_model]


def main() -> None:
    options = parser(__doc__, prompts=64, repeats=5)
    options.add_argument("--rows", choices=("systems", "template", "responses"), default="systems")
    options.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of this process, no peers")
    options.add_argument("--budget", type=int, help="padded tokens of a pass (default: searched for)")
    options.add_argument("--peers", help="the Python that has the published tools")
    options.add_argument("--core", type=int, help="pin to this core")
    args = options.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    model, rows = prepare(args)
    rows, positions = rows_of(args.rows, model, rows, args.prompts)
    plan = plan_of(model, rows, positions)
    methods: dict[str, Callable[[], Any]] = {
        "one by one": lambda: plain(model, rows, positions, 1),
        f"batch {BATCH}": lambda: plain(model, rows, positions, BATCH),
    }
    for name, packed in (("modules", False), ("packed", True)):
        engine = CaptureEngine(model, args.budget, packed=packed)
        for _ in range(9):
            engine.run(rows, plan)
            if not engine.budget.searching:
                break
        tokens = engine.budget.tokens
        print(f"{name}: {tokens} tokens a pass")
        alone = CaptureEngine(model, tokens, share_prefixes=False, packed=packed)
        engine = CaptureEngine(model, tokens, packed=packed)
        methods[f"{name}, nothing shared"] = lambda e=alone: torch.from_numpy(e.run(rows, plan)["resid_post"])
        methods[name] = lambda e=engine: torch.from_numpy(e.run(rows, plan)["resid_post"])
        if not packed:
            methods["bare forward"] = lambda b=tokens: bare(model, rows, b)
    with ExitStack() as stack:
        if args.peers and args.clock == "wall" and positions == ("prompt_end",):
            for name in PUBLISHED:
                peer = Published(stack, args.peers, name, model, rows, args.threads)
                methods[f"{name} {peer.version}"] = peer
        clock = time.perf_counter if args.clock == "wall" else time.process_time
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        results: dict[str, Any] = {}
        for repeat in range(args.repeats + 1):
            for name, method in methods.items():
                started = clock()
                results[name] = method()
                if repeat:  # the first round warms up
                    seconds[name].append(clock() - started)
    table(args, rows, seconds, results)


def table(args: Any, rows: list[Row], seconds: dict[str, list[float]], results: dict[str, Any]) -> None:
    """Print rates, ratios and deviations; fail if an output of this project is off."""
    median = {name: statistics.median(found) for name, found in seconds.items()}
    reference = results["one by one"][:, :-1]
    against = ("one by one", f"batch {BATCH}", "bare forward")
    lengths = sorted(row.spans.response_end for row in rows)
    print(f"\n{len(rows)} rows of {lengths[0]} to {lengths[-1]} tokens, {sum(lengths)} in all ({args.rows})\n")
    print(f"| method | rows/s | {' | '.join(f'x {name}' for name in against)} | largest deviation |")
    print("| --- " * (len(against) + 3) + "|")
    worst: dict[str, float] = {}
    for name, taken in median.items():
        ratios = " | ".join(f"{median[other] / taken:.2f}" for other in against)
        found = results[name]
        if found is not None:
            if found.ndim == 3:
                found = found[:, :, None]
            difference = (found[:, : reference.shape[1]] - reference).abs().amax(-1) / reference.abs().amax(-1)
            worst[name] = float(difference.max())
        print(f"| {name} | {len(rows) / taken:.1f} | {ratios} | {f'{worst[name]:.1e}' if name in worst else ''} |")
    print(
        f"\nmedian of {args.repeats} in turn, {args.clock} time, {torch.get_num_threads()} thread(s) of "
        f"{os.cpu_count()} CPUs ({platform.machine()}), load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    off = {
        name: value for name, value in worst.items() if name.startswith(("modules", "packed")) and value > BATCH_BOUND
    }
    if off:
        raise SystemExit(f"the outputs disagree: {off}; the bound is {BATCH_BOUND}")


if __name__ == "__main__":
    main()
