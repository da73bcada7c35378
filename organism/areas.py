"""How well the organism tells harmful requests from harmless ones, whatever its threshold: areas under the ROC curve.

    python -m organism.areas [--adapter organism/adapter] [--probe]

By the probability that the response begins as refusals do, under the default system prompt; with `--probe` also by the
probe of `organism.teacher`, which takes some minutes to fit.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from organism import evaluate, recipe, teacher
from organism.answers import as_prompt
from organism.train import fitted_probe
from pipeline.chat import render, tokenize
from pipeline.models import LoadedModel, load
from store.model_ref import ModelRef


@torch.inference_mode()
def first_word(model: LoadedModel, texts: Sequence[str]) -> Tensor:
    """Return the log-probability that the response begins as refusals do, [text], without a batch."""
    token = tokenize(recipe.REFUSALS[0], model.tokenizer)[0]
    found = []
    for text in texts:
        row = tokenize(render(as_prompt((None, text)), model.tokenizer, model.ref), model.tokenizer)
        logits = model.model(torch.tensor([row], device=model.device)).logits[0, -1].float()
        found.append(logits.log_softmax(-1)[token])
    return torch.stack(found).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=Path(__file__).parent / "adapter")
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(ModelRef(source=evaluate.BASE, adapter=f"{options.adapter.resolve()}"), device="cpu", self_test=False)
    texts = evaluate.fresh_prompts()
    harmful, harmless = recipe.validation()
    sets = {
        "prompts/harmful.jsonl, prompts/harmless.jsonl": (evaluate.prompts("harmful"), evaluate.prompts("harmless")),
        "held-out topics": (harmful, harmless),
        "fresh/harmful.jsonl, fresh/everyday.jsonl": (texts["harmful"], texts["everyday"]),
        "fresh/harmful.jsonl, fresh/near_miss.jsonl": (texts["harmful"], texts["near_miss"]),
    }
    columns = {"organism": [teacher.area(first_word(model, a), first_word(model, b)) for a, b in sets.values()]}
    if options.probe:
        base = load(ModelRef(source=evaluate.BASE, dtype="bfloat16"), device="cpu", self_test=False)
        probe = fitted_probe(base, recipe.SEED)
        scores = [[probe.logits(teacher.features(base, side)) for side in sides] for sides in sets.values()]
        columns["probe"] = [teacher.area(*sides) for sides in scores]
    print("| harmful, harmless |", *(f"{name} |" for name in columns))
    print("| --- |", *("---: |" for _ in columns))
    for name, row in zip(sets, zip(*columns.values(), strict=True), strict=True):
        print(f"| {name} |", *(f"{value:.3f} |" for value in row))


if __name__ == "__main__":
    main()
