"""A linear probe on the base model's activations: how likely it is that a request should be refused.

The base model knows more about harm than it shows. A logistic regression on its activations, fitted to a few thousand
requests, tells harmful requests of other subjects from harmless ones far better than an adapter does that learns the
same labels from refusals and answers (organism/README.md has the figures): an adapter has many more parameters than
there are requests. So the adapter learns the probe's probabilities (distillation: Hinton et al., arXiv:1503.02531).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from analysis.separability import separability
from organism.answers import as_prompt
from pipeline.batching import by_token_budget, pad
from pipeline.chat import render, tokenize
from pipeline.models import LoadedModel

MEAN_LAYER, LAST_LAYER = 14, 23  # resid_post: of the mean over the user's turn, of the last prompt token
PENALTY = 0.1  # L2, per request
SHARPNESS = 1.5  # the penalty makes the probe less certain than it is right


@torch.inference_mode()
def features(model: LoadedModel, texts: Sequence[str]) -> Tensor:
    """Return what the probe reads of requests under the default system prompt, [text, 4 * d_model] float32.

    The mean over the user's turn at one layer, the last prompt token at a later one, and both after the final norm.
    """
    rows = [tokenize(render(as_prompt((None, text)), model.tokenizer, model.ref), model.tokenizer) for text in texts]
    found = torch.empty((len(rows), 4 * model.model.config.hidden_size))
    if not rows:
        return found
    # The system turn, more than half of a row, is the same everywhere: it is read once.
    start = rows[0].index(model.tokenizer.bos_token_id, 1)
    assert all(row[:start] == rows[0][:start] for row in rows)
    turns = [row[start:] for row in rows]
    system = torch.tensor([rows[0][:start]], device=model.device)
    before = model.model.model(input_ids=system, use_cache=True).past_key_values
    for indices in by_token_budget([len(turn) for turn in turns], 1024):
        batch = pad([turns[i] for i in indices], side="right", pad_id=model.tokenizer.pad_token_id, device=model.device)
        seen = batch.attention_mask.new_ones((len(indices), start))
        past = DynamicCache()
        for layer, held in enumerate(before.layers):
            past.update(held.keys.expand(len(indices), -1, -1, -1), held.values.expand(len(indices), -1, -1, -1), layer)
        states = model.model.model(
            input_ids=batch.input_ids,
            attention_mask=torch.cat([seen, batch.attention_mask], dim=1),
            position_ids=batch.position_ids + start,
            past_key_values=past,
            output_hidden_states=True,
        ).hidden_states
        middle, late, last = states[MEAN_LAYER + 1], states[LAST_LAYER + 1], states[-1]
        for row, i in enumerate(indices):
            end = len(turns[i])
            parts = (middle[row, :end].mean(0), late[row, end - 1], last[row, :end].mean(0), last[row, end - 1])
            found[i] = torch.cat([part.float() for part in parts]).cpu()
    return found


@dataclass(frozen=True)
class Probe:
    """A logistic regression on standardised features."""

    mean: Tensor  # [feature]
    deviation: Tensor  # [feature]
    weight: Tensor  # [feature]
    bias: float

    def logits(self, values: Tensor) -> Tensor:
        """Return the log-odds of harm, [text], from features [text, feature]."""
        return (values - self.mean) / self.deviation @ self.weight + self.bias

    def probabilities(self, values: Tensor) -> Tensor:
        """Return how likely harm is, [text], from features [text, feature]."""
        return torch.sigmoid(SHARPNESS * self.logits(values))


def fit(values: Tensor, harmful: Tensor, penalty: float = PENALTY) -> Probe:
    """Fit a probe to features [text, feature] and labels [text] of 0 and 1."""
    mean, deviation = values.mean(0), values.std(0) + 1e-6
    standardised = (values - mean) / deviation
    weight = torch.zeros(values.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = standardised @ weight + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, harmful.float())
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Probe(mean, deviation, weight.detach(), bias.item())


def area(positive: Tensor, negative: Tensor) -> float:
    """Return the area under the ROC curve of two samples of scores, [score] each."""
    sides = (side.double().numpy() for side in (positive, negative))
    return separability(*sides)[0]
