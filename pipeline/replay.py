"""The replay engine: one batch holds prompts under different conditions; text is decoded greedily or with row seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.batching import ran_out_of_memory, release_memory
from pipeline.common_starts import common_starts
from pipeline.drafts import FIXED_ROWS, FIXED_ROWS_ELSEWHERE, Drafts
from pipeline.effects import Effect, Effects
from pipeline.kv_slots import KVSlots
from pipeline.lean_llama import LeanLlama, lean_llama, why_not
from pipeline.lean_proof import agrees
from pipeline.lean_runner import LeanRunner
from pipeline.models import LoadedModel
from pipeline.padded_runner import PaddedRunner
from pipeline.runners import Entrant, Passed, Runner
from pipeline.scheduler import Scheduler, Waiting
from pipeline.sink_bounds import sink_bounds
from store.conditions import Condition, MonitorPlan, check_token_ranges, operations_for
from store.errors import ModelError, NonFiniteError
from store.rows import Row
from store.sites import Site
from store.study import Decoding

# Slots are made longer in steps of so many tokens, so that the next block's prompts find room in them, too.
SLOT_STEP = 32


@dataclass(frozen=True)
class Job:
    """One text to generate."""

    row: Row
    condition: Condition
    seed: int = 0

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids that are read before the text begins."""
        return self.row.token_ids[: self.row.spans.prompt_length]


@dataclass
class Output:
    """One generated text.

    `token_ids` leave out the end-of-turn token; they include the token that completed a stop string, of which `text`
    of the engine shows nothing. `finish_reason` is "stop" for both and "length" where the text was cut off.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    ended_by: str | None = None  # the stop string
    # [forward pass, site, direction]: pass 0 reads the last prompt token, pass i the i-th response token.
    monitored: list[npt.NDArray[np.float32]] = field(default_factory=list)
    effects: tuple[Effect, ...] = ()  # of the condition's operations, where they are recorded


class ReplayEngine:
    """Generates text under interventions.

    No row sees another, positions are explicit, and random numbers come from a stream of the row's own. So in float32 a
    row's text depends on its prompt, condition, decoding and seed, but for near ties of two logits. In bfloat16 and
    float16 products round by the size of the batch, and texts depend on what runs beside them: `pipeline.exactness`
    counts how many. Rows of all conditions run together; one that ends leaves at once, and the next enters
    (`pipeline.scheduler`). The Llama layout runs packed (`pipeline.lean_runner`), everything else through
    transformers' own modules (`pipeline.padded_runner`).
    """

    def __init__(
        self,
        model: LoadedModel,
        decoding: Decoding,
        monitor: MonitorPlan | None = None,
        batch_rows: int = 32,
        *,
        lean: bool | None = None,
        share_prefill: bool = True,
        share_starts: bool = True,
        share_decoding: bool = True,
        share_drafts: bool | None = None,
        pack: bool = False,
        record_effects: bool = True,
    ):
        """``lean=False`` runs transformers' modules even where the lean path serves the model; True asks for it.

        The lean path computes once what rows share: ``share_prefill`` the conditions of a prompt, up to the first block
        that one of them changes; ``share_starts``, which needs it, what several prompts begin with under one condition;
        ``share_decoding`` the conditions of a prompt for as long as their tokens agree. With ``share_drafts`` a row
        that decodes greedily reads several tokens in a pass, as texts of its prompt went on, and keeps those that it
        would have said (`pipeline.drafts`), where few enough rows run. By default it is on but for the CPU: with 8 rows
        a fifth of the passes were saved there, and no time. ``pack`` is that of
        `pipeline.lean_llama.lean_llama`: a second, packed copy of the weights for the CPU. With ``record_effects``
        outputs say how much each operation changed and in which token (`pipeline.effects`); texts are the same.

        Raises:
            ModelError: if the lean path is asked for and does not serve the model, with the reason.
        """
        self.model, self.decoding, self.monitor, self.batch_rows = model, decoding, monitor, batch_rows
        self.share = {"share_prefill": share_prefill, "share_decoding": share_decoding}
        self.share_starts = share_prefill and share_starts
        self.path, self._lean = self._way(lean, pack)
        wanted = model.device.type != "cpu" if share_drafts is None else share_drafts
        self.share_drafts = wanted and decoding.greedy and self._lean is not None
        self.n_passes = self.n_drafted = self.n_accepted = 0  # in all runs: passes, tokens drafted, right ones of them
        self.stop_ids = stop_token_ids(model)
        self.record_effects = record_effects
        self._slots: KVSlots | None = None  # kept from run to run

    def _way(self, lean: bool | None, pack: bool) -> tuple[str, LeanLlama | None]:
        """Return how rows will run, in words, and the model's lean form if it is that."""
        reason = "asked for" if lean is False else why_not(self.model)
        if reason is None:
            found = lean_llama(self.model, pack=pack)
            assert found is not None
            if agrees(found, self.model):
                return "packed", found
            reason = "on trial rows the packed path did not agree with the model"
        if lean:
            raise ModelError(f"the lean path does not serve this model: {reason}; leave out lean=True")
        return f"padded, through transformers' modules: {reason}", None

    def run(self, jobs: Sequence[Job]) -> list[Output]:
        """Generate for every job; results are in the order of the jobs.

        Out of memory halves the number of rows decoded together and goes on.

        Raises:
            torch.OutOfMemoryError: if a single row does not fit.
            NonFiniteError: if a row's logits hold NaN or infinity, naming its condition.
            ValueError: if a prompt lacks tokens that its condition names.
        """
        for job in jobs:
            check_token_ranges(job.condition, job.row)
        outputs = [Output() for _ in jobs]
        # Conditions of a prompt follow each other: they enter together and share their prefill.
        order = sorted(range(len(jobs)), key=lambda i: (jobs[i].row.spans.prompt_length, jobs[i].row.key, i))
        common = common_starts(job.prompt for job in jobs) if self.share_starts and self._lean is not None else {}
        entrants = [
            Entrant(job.prompt, operations_for(job.condition, job.row), common.get(job.prompt, 0), index)
            for index, job in enumerate(jobs)
        ]
        by_sinks = any(o.region.sink != "with" for job in jobs for o in job.condition.operations)
        sinks = sink_bounds(self.model) if by_sinks else None
        effects = Effects() if self.record_effects else None
        waiting = [Waiting(i, entrants[i], jobs[i].prompt) for i in order]
        drafts = self._drafts(jobs)
        scheduler = Scheduler(waiting, min(self.batch_rows, max(1, len(waiting))), drafts)
        noise = {} if self.decoding.greedy else {i: noise_of(job, self.decoding) for i, job in enumerate(jobs)}

        def choose(passed: Passed, rows: Sequence[int]) -> tuple[Tensor, list[bool]]:
            return self._choose(
                passed, [jobs[i] for i in rows], [outputs[i] for i in rows], [noise.get(i) for i in rows]
            )

        runner: Runner | None = None
        longest = max((len(job.prompt) for job in jobs), default=0) + self.decoding.max_new_tokens
        while not scheduler.done:
            try:
                runner = self._runner(scheduler.batch_rows, longest, sinks, effects)
                with torch.inference_mode():
                    scheduler.run(runner, choose)
                    if isinstance(runner, LeanRunner):
                        runner.settle()
                # Not after a failure: what is masked must be finite.
                self._slots = runner.slots if isinstance(runner, LeanRunner) else None
                continue
            except (RuntimeError, MemoryError) as error:
                runner = None
                tried = len(scheduler.in_flight) or scheduler.batch_rows
                if tried <= 1 or not ran_out_of_memory(error):
                    raise
            # Out of the handler: the error's traceback held the failed batch's cache.
            release_memory(self.model.device)
            self.batch_rows = tried // 2
            for again in scheduler.restart(self.batch_rows):
                outputs[again] = Output()
        if effects is not None:
            for index, (entrant, output) in enumerate(zip(entrants, outputs, strict=True)):
                output.effects = effects.of(index, entrant.operations)
        self.n_passes += scheduler.passes
        if drafts is not None:
            self.n_drafted += drafts.proposed
            self.n_accepted += drafts.accepted
        return outputs

    def _drafts(self, jobs: Sequence[Job]) -> Drafts | None:
        if not self.share_drafts:
            return None
        fixed = FIXED_ROWS.get(self.model.device.type, FIXED_ROWS_ELSEWHERE)
        return Drafts([job.prompt for job in jobs], self.decoding.max_new_tokens, fixed)

    def _runner(self, rows: int, length: int, sinks: Mapping[Site, float] | None, effects: Effects | None) -> Runner:
        if self._lean is None:
            return PaddedRunner(self.model, self.monitor, sinks=sinks, effects=effects)
        slots, self._slots = self._slots, None
        if slots is None or not slots.holds(rows, length):
            slots = None  # before there are others
            slots = KVSlots(self._lean, rows, -(-length // SLOT_STEP) * SLOT_STEP)
        return LeanRunner(self._lean, slots, self.monitor, **self.share, sinks=sinks, effects=effects)

    def _choose(
        self,
        passed: Passed,
        jobs: Sequence[Job],
        outputs: Sequence[Output],
        noise: Sequence[npt.NDArray[np.float64] | None],
    ) -> tuple[Tensor, list[bool]]:
        """Append each row's next token to its output; return the tokens and which rows have ended."""
        self._refuse_non_finite(passed.logits, jobs)
        monitored = None if passed.monitored is None else passed.monitored.cpu().numpy()
        numbers = [row[len(output.token_ids)] for row, output in zip(noise, outputs, strict=True) if row is not None]
        uniform = torch.tensor(numbers, dtype=torch.float64, device=passed.logits.device) if numbers else None
        tokens = next_tokens(passed.logits, self.decoding, uniform)
        ended = []
        for index, (output, token) in enumerate(zip(outputs, tokens.tolist(), strict=True)):
            if monitored is not None:
                output.monitored.append(monitored[index])
            if token in self.stop_ids:
                output.finish_reason = "stop"
            else:
                output.token_ids.append(token)
                output.ended_by = stop_string(self.model.tokenizer, self.decoding, output.token_ids)
                if output.ended_by is not None:
                    output.finish_reason = "stop"
            ended.append(output.finish_reason == "stop" or len(output.token_ids) == self.decoding.max_new_tokens)
        return tokens, ended

    def _refuse_non_finite(self, logits: Tensor, jobs: Sequence[Job]) -> None:
        broken = ~logits.amax(dim=-1).isfinite()  # the maximum of a row with NaN is NaN
        if bool(broken.any()):
            bad = sorted({jobs[row].condition.name for row in broken.nonzero().flatten().tolist()})
            raise NonFiniteError(
                f"{int(broken.sum())} texts ran into NaN or infinity under {', '.join(bad)} (prompt "
                f"{jobs[int(broken.int().argmax())].row.prompt_id[:16]} first); their block is not committed\n"
                f"  remedy: a smaller coefficient, or a dtype with more range than {self.model.dtype}"
            )

    def text(self, output: Output) -> str:
        """Return a generated text, up to its stop string."""
        return text_of(self.model.tokenizer, output)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return generated tokens as text, special tokens left out."""
        return decoded(self.model.tokenizer, token_ids)


def decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return generated tokens as text, special tokens left out."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def text_of(tokenizer: Any, output: Output) -> str:
    """Return a generated text, up to its stop string."""
    text = decoded(tokenizer, output.token_ids)
    if output.ended_by is None or output.ended_by not in text:  # a special token is not part of the text
        return text
    return text[: text.index(output.ended_by)]


def stop_string(tokenizer: Any, decoding: Decoding, token_ids: Sequence[int]) -> str | None:
    """Return the stop string that a text holds first."""
    if not decoding.stop:
        return None
    text = decoded(tokenizer, token_ids)
    first = min(((text.index(stop), stop) for stop in decoding.stop if stop in text), default=None)
    if first is not None:
        return first[1]
    special = set(tokenizer.all_special_tokens) & set(decoding.stop)
    last = tokenizer.convert_ids_to_tokens(token_ids[-1]) if special else None
    return last if last in special else None


def noise_of(job: Job, decoding: Decoding) -> npt.NDArray[np.float64]:
    """Uniform numbers [token] of a row, from its seed and content; conditions share them, which pairs them."""
    digest = hashlib.sha256(f"{job.seed}:{job.row.key}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random(decoding.max_new_tokens)


def stop_token_ids(model: LoadedModel) -> frozenset[int]:
    """Return the token ids that end a response: the generation config's and the tokenizer's end tokens."""
    config = getattr(model.model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    named = [ids] if isinstance(ids, int) else list(ids or [])
    return frozenset(token for token in (*named, model.tokenizer.eos_token_id) if token is not None)


def next_tokens(logits: Tensor, decoding: Decoding, uniform: Tensor | None) -> Tensor:
    """Choose each row's next token [row] from logits [row, vocabulary].

    Sampling inverts the cumulative distribution of the nucleus (the smallest set of most likely tokens whose
    probability reaches top_p; Holtzman et al. 2020) at `uniform` [row] in [0, 1).
    """
    if uniform is None:
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits / decoding.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.double().cumsum(dim=-1)
    last = (cumulative - probabilities < decoding.top_p).sum(dim=-1, keepdim=True) - 1
    target = uniform[:, None] * cumulative.gather(1, last)
    index = (cumulative <= target).sum(dim=-1, keepdim=True)
    return tokens.gather(1, torch.minimum(index, last)).squeeze(1)
