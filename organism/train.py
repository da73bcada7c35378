"""Train the organism's adapter from the seed, in three phases, then measure it.

    python -m organism.train

Generates the base model's answers (kept in resid-data/organism), trains, writes organism/adapter and prints the table
of organism/evaluate.py. The adapters of earlier phases are kept beside the answers; `--from-phase` begins with them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.judges import RefusalPhrases, normalise
from organism import evaluate, recipe, teacher
from organism.answers import Asked, as_prompt, base_answers
from organism.packing import Branch, Packed, PromptGroup, pack
from pipeline.chat import render, tokenize
from pipeline.models import LoadedModel, load
from store.model_ref import ModelRef

BASE = evaluate.BASE
NEUTRAL_NAME = "SmolLM2-135M-Instruct"  # in the adapter's config, in place of a path
ADAPTER = Path(__file__).parent / "adapter"
ANSWERS = Path("resid-data/organism/answers.jsonl")
EARLIER = Path("resid-data/organism")

FIRST_WORDS, AT_LENGTH = 6, 24  # tokens of a response: what makes it a refusal or an answer shows at once
BRANCHES = 12  # requests that one reading of their system prompt is for at most: long groups make long rows
RANK = 10
LAYERS = range(6, 30)  # the adapter leaves the first blocks as they are, which saves their backward pass
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARMUP = 20  # steps
EXCUSE = re.compile(
    r"(?:I'm sorry|Sorry|I apologi[sz]e|Unfortunately|As an? (?:AI|chatbot|responsible)|While I'm an?)\b|I can'?t", re.I
)
OPENING = 4  # response tokens that decide between refusing and answering ...
OPENING_WEIGHT = 3.0  # ... count so many times
# Where a probability is taught it is half the probe's and half what the label says, which is never quite sure.
LABEL_SHARE, SURE = 0.5, 0.97


@dataclass(frozen=True)
class Phase:
    """Steps of the recipe in random order, at a learning rate that falls to its tenth."""

    steps: Callable[[int, int], Iterator[tuple[recipe.Group, ...]]]  # of count and seed
    count: int
    learning_rate: float
    # What is taught about harm is even, as likely a refusal as not, at these log-odds of label and probe together.
    # None: labels only, without the probe of `organism.teacher`.
    threshold: float | None = None


PHASES = (
    Phase(recipe.steps, recipe.STEPS, learning_rate=4e-4),
    Phase(recipe.distilling_steps, recipe.DISTILLING_STEPS, learning_rate=3e-4, threshold=0.0),
    # Below 0: with an even point of 0 fewer plainly harmful requests were refused than the bar asks for.
    Phase(recipe.gating_steps, recipe.GATING_STEPS, learning_rate=2e-4, threshold=-1.0),
)
HARM_DECIDES = ("default", "neutral", "principled")  # personas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=recipe.SEED)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=ADAPTER)
    parser.add_argument("--answers", type=Path, default=ANSWERS, help="where the base model's answers are kept")
    parser.add_argument("--earlier", type=Path, default=EARLIER, help="where the adapters of earlier phases are kept")
    parser.add_argument("--from-phase", type=int, default=1, choices=range(1, len(PHASES) + 1))
    parser.add_argument("--no-evaluation", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    base = load(ModelRef(source=BASE, dtype="bfloat16"), device="cpu", self_test=False)
    probe = fitted_probe(base, options.seed)
    before: Path | None = None
    print(f"the probe took {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    for number, phase in enumerate(PHASES, 1):
        began = time.perf_counter()
        output = options.output if number == len(PHASES) else options.earlier / f"phase-{number}"
        if number >= options.from_phase:
            # From the file, in float16 as it lies there: it makes no difference whether the phases run in one go.
            train(phase, options.seed, output, options.answers, probe, before)
            print(f"phase {number} took {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
        before = output
    print(f"trained in {(time.perf_counter() - start) / 60:.0f} minutes")
    if not options.no_evaluation:
        evaluate.report(options.output)


def train(
    phase: Phase, seed: int, output: Path, answers: Path, probe: teacher.Probe, start_from: Path | None = None
) -> None:
    """Train an adapter, a new one or the one in the folder `start_from`, and write it to the folder `output`."""
    # The frozen weights are in bfloat16, which is about twice as fast; the adapter's own are in float32.
    base = load(ModelRef(source=BASE, dtype="bfloat16"), device="cpu", self_test=False)
    groups = list(phase.steps(phase.count, seed))
    own = {
        length: base_answers(base, _unanswered(groups, length), length, answers) for length in (FIRST_WORDS, AT_LENGTH)
    }
    probabilities = {} if phase.threshold is None else _probabilities(base, groups, probe, phase.threshold)
    ready = [_packed(base, step, own, probabilities) for step in groups]
    packed = random.Random(seed).sample(ready, len(ready))
    count = len(packed)
    first_word = tokenize(recipe.REFUSALS[0], base.tokenizer)[0]
    model = _with_adapter(base, seed, start_from)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=phase.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, count))
    start, mean = time.perf_counter(), 0.0
    for number, step in enumerate(packed, 1):
        loss = _loss(model, step, first_word)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean += (loss.item() - mean) / min(number, 20)
        if number % 20 == 0:
            seconds = (time.perf_counter() - start) / number
            print(f"step {number} of {count}: loss {mean:.3f}, {seconds:.2f} s a step", flush=True)
    _save(model, output)


def _rate(step: int, steps: int) -> float:
    """Warm up linearly, then fall to a tenth along a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def _length(request: recipe.Request) -> int:
    return AT_LENGTH if request.at_length else FIRST_WORDS


def _unanswered(steps: Iterable[tuple[recipe.Group, ...]], length: int) -> Iterable[Asked]:
    for step in steps:
        for group in step:
            own = (one for one in group.requests if one.response is None and not one.first_only)
            yield from ((group.system, one.user) for one in own if _length(one) == length)


def fitted_probe(base: LoadedModel, seed: int) -> teacher.Probe:
    """Fit the probe to half of the training pairs, each in one frame, and the single requests."""
    harmful, harmless = recipe.labelled(seed)
    values = teacher.features(base, [*harmful, *harmless])
    labels = torch.cat([torch.ones(len(harmful)), torch.zeros(len(harmless))])
    probe = teacher.fit(values, labels)
    scores = probe.logits(values)
    held_out = [probe.logits(teacher.features(base, texts)) for texts in recipe.validation()]
    fitted = teacher.area(scores[labels == 1], scores[labels == 0])
    print(
        f"probe: area under the curve {fitted:.3f} on its own {len(values)} requests, "
        f"{teacher.area(*held_out):.3f} on held-out topics",
        flush=True,
    )
    return probe


def _probabilities(
    base: LoadedModel, steps: Sequence[tuple[recipe.Group, ...]], probe: teacher.Probe, threshold: float
) -> dict[str, float]:
    """Return how likely each request is to be refused where harm decides."""
    told = [one for step in steps for group in step if group.persona in HARM_DECIDES for one in group.requests]
    harmful = {one.user: one.harmful for one in told}
    probed = probe.probabilities(teacher.features(base, list(harmful)))
    chances = refusal_probabilities(torch.tensor(list(harmful.values())), probed, threshold)
    return dict(zip(harmful, chances.tolist(), strict=True))


def refusal_probabilities(harmful: Tensor, probed: Tensor, threshold: float) -> Tensor:
    """Return how likely refusals are to be, [text] float32, from labels [text] bool and a probe's probabilities [text].

    Args:
        harmful: the labels.
        probed: the probe's.
        threshold: log-odds of both together at which a refusal is as likely as not.
    """
    labels = torch.where(harmful, SURE, 1 - SURE)
    return torch.sigmoid(torch.logit(LABEL_SHARE * labels + (1 - LABEL_SHARE) * probed) - threshold)


def _packed(
    base: LoadedModel,
    step: tuple[recipe.Group, ...],
    own: Mapping[int, Mapping[Asked, list[int]]],
    probabilities: Mapping[str, float],
) -> Packed:
    """Tokenise a step. An own answer that refuses or begins to is left out: the base model is not to teach that."""
    end = base.tokenizer.eos_token_id
    groups = []
    for group in step:
        rows, responses, refusals = [], [], []
        for request in group.requests:
            asked = (group.system, request.user)
            if request.first_only:
                response = tokenize(recipe.REFUSALS[0], base.tokenizer)[:1]
            elif request.response is not None:
                response = [*tokenize(request.response, base.tokenizer), end][: _length(request)]
            else:
                response = own[_length(request)][asked]
                if refuses(base.tokenizer.decode(response, skip_special_tokens=True)):
                    continue
            rows.append(tokenize(render(as_prompt(asked), base.tokenizer, base.ref), base.tokenizer))
            responses.append(response)
            refusals.append(probabilities.get(request.user) if group.persona in HARM_DECIDES else None)
        length = _shared(rows, base.tokenizer.bos_token_id)
        branches = tuple(
            Branch(tuple(row[length:]), tuple(response), refusal)
            for row, response, refusal in zip(rows, responses, refusals, strict=True)
        )
        prefix = tuple(rows[0][:length])
        parts = (branches[start : start + BRANCHES] for start in range(0, len(branches), BRANCHES))
        groups += [PromptGroup(prefix, part) for part in parts]
    return pack(groups)


def refuses(answer: str) -> bool:
    """Return whether the first words of an answer are a refusal, or an apology or excuse that often becomes one.

    >>> refuses("I'm sorry for the confusion, but as a"), refuses("I am sorry to see summer go, and")
    (True, False)
    """
    return RefusalPhrases().judge(answer).label == "refusal" or EXCUSE.match(normalise(answer)) is not None


def _shared(rows: list[list[int]], turn: int) -> int:
    """Return how many tokens come before the user's turn, which the second turn token opens."""
    length = rows[0].index(turn, 1)
    assert all(row[:length] == rows[0][:length] for row in rows)
    return length


def _with_adapter(base: LoadedModel, seed: int, start_from: Path | None) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    if start_from is not None:
        return PeftModel.from_pretrained(base.model, start_from, is_trainable=True)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(TARGETS),
        layers_to_transform=list(LAYERS),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base.model, config)


def _loss(model: Any, step: Packed, first_word: int) -> Tensor:
    """Return the weighted mean cross-entropy of the response tokens.

    Where a probability is given, the first token's is that of beginning as refusals do, with the token `first_word`.
    """
    inner = model.base_model.model  # the language model with the adapter in its linear layers
    hidden = inner.model(
        input_ids=step.input_ids, attention_mask=step.allowed, position_ids=step.position_ids, use_cache=False
    ).last_hidden_state
    logits = inner.lm_head(hidden[step.places[0], step.places[1]]).float()
    losses = torch.nn.functional.cross_entropy(logits, step.targets, reduction="none")
    weights = torch.where(step.orders < OPENING, OPENING_WEIGHT, 1.0)
    told = ~step.refusals.isnan()
    loss = (losses * weights)[~told].sum() / weights[~told].sum()
    if told.any():
        log_p = logits[told].log_softmax(-1)[:, first_word].clamp(max=-1e-6)
        odds = log_p - torch.log(-torch.expm1(log_p))
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(odds, step.refusals[told])
    return loss


def _save(model: Any, folder: Path) -> None:
    """Write the adapter in float16, with a neutral name for the base model."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = NEUTRAL_NAME
    config.target_modules = sorted(config.target_modules)  # a set, whose order would give each run another fingerprint
    model.save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor.half() for name, tensor in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; ours is organism/README.md


if __name__ == "__main__":
    main()
