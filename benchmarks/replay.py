"""Generated tokens per second under eight conditions, beside transformers' generate with hooks.

    python benchmarks/replay.py

The peers run one condition at a time: one prompt after the other, or batches of 8 and 32 prompts (or those that
`--methods "batch 48"` names) padded on the left.
The slow ones run on a part of the prompts (the table says how many texts) and are compared by rate. Tokens are counted
up to the end of each text; greedy texts are compared one by one with the engine's. The engine runs as it is by default,
with less or nothing shared, with drafts, with packed weights, and through transformers' own modules (`--methods`
chooses). ``--methods drafts --batch-rows 8`` says what drafts are worth where few rows run; the table has every
engine's passes and drafts.

``--vllm PYTHON`` adds vLLM without interventions on as many requests, run by the Python of an environment that has it
(.venv-vllm/bin/python after `make test-vllm`), in a process of its own; its texts are compared with the baseline's.

``--peers PYTHON`` adds published tools that generate with a direction added, under that condition only, in batches of
32, each in a process of its own in the environment that `make benchmark-peers` makes.

A second table says what interventions cost: the same rows and the same number of tokens, nothing shared, with all
operations and with none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import paths  # noqa: F401
import torch
from common import alternate, parser, plan_of, prepare, report
from peers import PUBLISHED, Peer

from pipeline.batching import pad
from pipeline.capture import CaptureEngine
from pipeline.models import LoadedModel, model_folder
from pipeline.replay import Job, ReplayEngine, stop_token_ids
from store.conditions import Condition, Operation, orthonormal_basis
from store.rows import Row
from store.sites import Site
from store.study import ConditionSpec, Decoding

NOTHING_SHARED: dict[str, Any] = {"share_prefill": False, "share_decoding": False, "share_drafts": False}

Texts = dict[tuple[str, str], list[int]]  # (row key, condition) -> token ids


def conditions_of(model: LoadedModel, rows: list[Row]) -> list[Condition]:
    """Eight conditions of directions between the two kinds of prompts (rows alternate between them)."""
    n = model.architecture.n_layers
    plan = plan_of(model, rows)
    values = CaptureEngine(model).run(rows, plan)["resid_post"][:, :, 0].astype(np.float64)  # [row, layer, d_model]
    v = values[::2].mean(0) - values[1::2].mean(0)
    random = np.random.default_rng(0).standard_normal(v.shape)
    random *= np.linalg.norm(v, axis=1, keepdims=True) / np.linalg.norm(random, axis=1, keepdims=True)

    def unit(vector: Any) -> Any:
        return vector / np.linalg.norm(vector)

    def add(layer: int, vector: Any, tokens: Any = "all") -> Operation:
        return Operation("add", Site("resid_post", layer), vector[None].astype(np.float32), tokens)

    def remove(layer: int, *vectors: Any) -> Operation:
        basis = orthonormal_basis([unit(vector) for vector in vectors]).astype(np.float32)
        return Operation("project_out", Site("resid_post", layer), basis, "all")

    early, middle, late = n // 4, n // 2, 4 * n // 5
    stated: dict[str, list[Operation]] = {
        "baseline": [],
        "add early": [add(early, v[early])],
        "add middle": [add(middle, -v[middle])],
        "add late": [add(late, v[late])],
        "window": [remove(layer, v[layer]) for layer in range(middle, n)],
        "subspace": [remove(middle, v[middle], random[middle])],
        "random": [add(early, random[early]), remove(late, random[late])],
        "response only": [add(middle, v[middle], "response")],
    }
    return [
        Condition(name, name, None, None, (), ConditionSpec(), name, tuple(operations))
        for name, operations in stated.items()
    ]


@contextmanager
def hooked(model: LoadedModel, condition: Condition) -> Iterator[None]:
    """Apply a condition to whole batches by forward hooks on the blocks, as scripts around generate do."""

    def hook_of(operation: Operation) -> Any:
        vectors = torch.from_numpy(operation.vectors)

        def hook(module: Any, args: Any, h: torch.Tensor) -> torch.Tensor:
            if operation.tokens == "response" and h.shape[1] > 1:
                return h
            return h + vectors[0] if operation.kind == "add" else h - (h @ vectors.T) @ vectors

        return hook

    with ExitStack() as stack:
        for operation in condition.operations:
            block = model.architecture.blocks[operation.site.layer]
            stack.callback(block.register_forward_hook(hook_of(operation)).remove)
        yield


def with_generate(
    model: LoadedModel, rows: list[Row], conditions: list[Condition], batch: int, max_new_tokens: int
) -> tuple[int, Texts]:
    """Generate condition by condition with transformers' generate at one batch size."""
    texts: Texts = {}
    stop = stop_token_ids(model)
    for condition in conditions:
        for start in range(0, len(rows), batch):
            chosen = rows[start : start + batch]
            padded = pad([r.token_ids for r in chosen], side="left", pad_id=model.tokenizer.pad_token_id, device="cpu")
            with hooked(model, condition), torch.inference_mode():
                out = model.model.generate(
                    padded.input_ids,
                    attention_mask=padded.attention_mask,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=sorted(stop),
                    pad_token_id=model.tokenizer.pad_token_id,
                )
            for row, ids in zip(chosen, out[:, padded.input_ids.shape[1] :].tolist(), strict=True):
                texts[row.key, condition.key] = up_to_stop(ids, stop)
    return sum(map(len, texts.values())), texts


def up_to_stop(ids: list[int], stop: Collection[int]) -> list[int]:
    """Return the tokens before the first that ends a text."""
    return ids[: next((i for i, token in enumerate(ids) if token in stop), None)]


def with_engine(engine: ReplayEngine, rows: list[Row], conditions: list[Condition]) -> tuple[int, Texts]:
    """Generate all conditions together with the ReplayEngine."""
    jobs = [Job(row, condition) for row in rows for condition in conditions]
    outputs = engine.run(jobs)
    texts = {(j.row.key, j.condition.key): output.token_ids for j, output in zip(jobs, outputs, strict=True)}
    return sum(map(len, texts.values())), texts


class Vllm:
    """vLLM, see replay_vllm.py: the prompts once per condition, without interventions."""

    def __init__(
        self,
        stack: ExitStack,
        python: str,
        model: LoadedModel,
        rows: list[Row],
        conditions: list[Condition],
        args: argparse.Namespace,
    ):
        self._keys = [(row.key, condition.key) for row in rows for condition in conditions]
        self._stop = stop_token_ids(model)
        ids = {row.key: list(row.token_ids[: row.spans.prompt_length]) for row in rows}
        asked = {
            "rows": [(ids[row], condition) for row, condition in self._keys],
            "tokens": args.max_new_tokens,
            "stop": sorted(self._stop),
        }
        folder = model_folder(model.ref)
        self._peer = Peer(stack, python, "replay_vllm.py", asked, folder, args.threads, args.batch_rows)
        self.version = self._peer.version

    def __call__(self) -> tuple[int, Texts]:
        self._peer.work()
        found = json.loads((self._peer.folder / "answer.json").read_text())
        texts = {key: [t for t in ids if t not in self._stop] for key, ids in zip(self._keys, found, strict=True)}
        return sum(map(len, texts.values())), {key: ids for key, ids in texts.items() if key[1] == "baseline"}


class Published:
    """A published tool, see replay_peers.py: one condition, which adds a vector, in batches of 32."""

    def __init__(
        self,
        stack: ExitStack,
        python: str,
        name: str,
        model: LoadedModel,
        rows: list[Row],
        condition: Condition,
        args: argparse.Namespace,
    ):
        self._keys = [(row.key, condition.key) for row in rows]
        self._stop = stop_token_ids(model)
        (add,) = condition.operations
        asked = {
            "ids": [row.token_ids[: row.spans.prompt_length] for row in rows],
            "layer": add.site.layer,
            "vector": add.vectors[0].tolist(),
            "tokens": args.max_new_tokens,
            "stop": sorted(self._stop),
        }
        folder = model_folder(model.ref)
        self._peer = Peer(stack, python, "replay_peers.py", asked, name, folder, args.threads, 32)
        self.version = self._peer.version

    def __call__(self) -> tuple[int, Texts]:
        self._peer.work()
        found = json.loads((self._peer.folder / "answer.json").read_text())
        texts = {key: up_to_stop(ids, self._stop) for key, ids in zip(self._keys, found, strict=True)}
        return sum(map(len, texts.values())), texts


def main() -> None:
    options = parser(__doc__, prompts=48, repeats=1)
    options.add_argument("--max-new-tokens", type=int, default=48, help="tokens per text (default 48)")
    options.add_argument("--batch-rows", type=int, default=192, help="rows that the engine decodes at once (192)")
    options.add_argument("--part", type=int, default=16, help="one prompt in so many runs one by one (default 16)")
    options.add_argument("--methods", nargs="+", help="these beside the engine (default: all); batches of any size")
    options.add_argument("--cpu-time", action="store_true", help="count CPU time, on a machine that does other things")
    options.add_argument("--no-costs", action="store_true", help="leave out what interventions cost")
    options.add_argument("--vllm", metavar="PYTHON", help="Python of an environment with vLLM, to run it as well")
    options.add_argument("--peers", metavar="PYTHON", help="Python that has the published tools, to run them as well")
    args = options.parse_args()
    if args.cpu_time and (args.vllm or args.peers):
        raise SystemExit("CPU time says nothing of peers, which run in other processes: leave out --cpu-time")
    if args.cpu_time:
        time.perf_counter = time.process_time
    model, rows = prepare(args)
    conditions, n = conditions_of(model, rows), args.max_new_tokens
    share = {1: max(1, len(rows) // args.part), 8: max(min(8, len(rows)), len(rows) // 4), 32: len(rows)}
    for size in filter(None, (re.fullmatch(r"batch ([1-9]\d*)", name) for name in args.methods or ())):
        share.setdefault(int(size[1]), len(rows))
    methods: dict[str, Any] = {
        ("one by one" if batch == 1 else f"batch {batch}"): lambda batch=batch, part=part: with_generate(
            model, rows[:part], conditions, batch, n
        )
        for batch, part in share.items()
    }
    engines: dict[str, dict[str, Any]] = {
        "engine": {},
        "starts not shared": {"share_starts": False},
        "decoding not shared": {"share_decoding": False},
        "drafts": {"share_drafts": True},
        "nothing shared": NOTHING_SHARED,
        "effects not recorded": {"record_effects": False},
        "packed weights": {"pack": True},
        "padded": {"lean": False},
    }
    if unknown := {*(args.methods or ())} - {*methods, *engines}:
        options.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join((*methods, *engines))}")
    made: dict[str, ReplayEngine] = {}
    for name, chosen in engines.items():
        if args.methods is not None and name not in {*args.methods, "engine"}:
            continue
        # One engine for all repetitions: as in a study, whose blocks follow each other.
        engine = ReplayEngine(model, Decoding(max_new_tokens=n), batch_rows=args.batch_rows, **chosen)
        made[name] = engine
        methods[name] = lambda engine=engine: with_engine(engine, rows, conditions)
    if args.methods is not None:
        methods = {name: method for name, method in methods.items() if name in {*args.methods, "engine"}}
    with_generate(model, rows[:2], conditions[:1], 2, 2)
    with_engine(ReplayEngine(model, Decoding(max_new_tokens=2)), rows[:2], conditions[:1])
    own = list(methods)
    with ExitStack() as stack:
        if args.vllm:
            vllm = Vllm(stack, args.vllm, model, rows, conditions, args)
            methods[f"vLLM {vllm.version}, no interventions"] = vllm
        if args.peers:
            added = next(condition for condition in conditions if condition.name == "add middle")
            for name in PUBLISHED:
                peer = Published(stack, args.peers, name, model, rows, added, args)
                methods[f"{name} {peer.version}"] = peer
        timed = alternate(methods, args.repeats)
    ours: Texts = timed["engine"].result
    agreement = {}
    for name, measured in timed.items():
        same = sum(ids == ours[key] for key, ids in measured.result.items())
        agreement[name] = f"{same} of {len(measured.result)} texts as the engine's"
        if name in made:
            passes, drafted, accepted = (
                count // args.repeats for count in (made[name].n_passes, made[name].n_drafted, made[name].n_accepted)
            )
            agreement[name] += f", {passes} passes, {accepted} of {drafted} drafts right"
    print(f"{len(rows)} prompts x {len(conditions)} conditions x {n} tokens, {args.batch_rows} rows in the engine")
    report(timed, "tokens", agreement, args.repeats, own)
    if args.no_costs:
        return
    bare = [dataclasses.replace(condition, operations=()) for condition in conditions]
    few = rows[: max(1, args.batch_rows // len(conditions))]
    engine = ReplayEngine(model, Decoding(max_new_tokens=n), batch_rows=args.batch_rows, **NOTHING_SHARED)
    engine.stop_ids = frozenset()  # texts run on to their full length: the same work with and without
    costs = {
        name: lambda some=some: with_engine(engine, few, some)
        for name, some in {"without interventions": bare, "with interventions": conditions}.items()
    }
    report(alternate(costs, max(args.repeats, 3)), "tokens", {}, max(args.repeats, 3))


if __name__ == "__main__":
    main()
