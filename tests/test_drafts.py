"""Drafts change how many passes texts take, and no text: right, wrong and mixed ones, on tiny models and on SmolLM2."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from slow_reference import Step, condition, gap, random_rows, teacher_forced, tiny
from test_replay import (
    LENGTHS,
    NEAR_TIE,
    SAMPLED,
    engine,
    jobs_of,
    post,
    real_programs,
    real_rows,
    scoped_programs,
    texts,
    tiny_programs,
)
from tiny_models import LAYERS, VOCAB
from torch import Tensor

from pipeline import replay, scheduler
from pipeline.kv_slots import KVSlots
from pipeline.lean_llama import LeanLlama
from pipeline.lean_runner import LeanRunner
from pipeline.models import LoadedModel
from pipeline.replay import Job, Output, ReplayEngine, stop_token_ids
from pipeline.runners import Entrant, Passed
from store.conditions import MonitorPlan
from store.sites import COMPONENTS, Site
from store.study import Decoding
from store.study_interventions import TokenRange

UNITS = np.eye(2, 48, dtype=np.float32)
MONITOR = MonitorPlan(("a", "b"), ("a", "b"), {site: UNITS for site in (post(0), post(2), Site("attn_out", 1))})
Guess = Callable[[int, int], Sequence[int]]  # row, number of tokens that it has said -> drafts


class Proposer:
    """Proposes what a test wants, and writes down what rows say, end tokens too."""

    def __init__(self, guess: Guess, max_new_tokens: int):
        self.guess, self.max_new_tokens = guess, max_new_tokens
        self.proposed = self.accepted = 0
        self.heard: dict[int, list[int]] = {}

    def begin(self, row: int, prompt: Sequence[int]) -> None:
        self.heard[row] = []

    def said(self, row: int, tokens: Sequence[int]) -> None:
        self.heard[row] += tokens
        self.accepted += len(tokens) - 1

    def end(self, row: int) -> None:
        pass

    def propose(self, rows: Sequence[int], *, more: bool) -> list[tuple[int, ...]]:
        found = []
        for row in rows:
            n = len(self.heard[row])
            found.append(tuple(self.guess(row, n)[: self.max_new_tokens - n - 1]))
        self.proposed += sum(map(len, found))
        return found


def with_proposer(chosen: ReplayEngine, guess: Guess) -> Proposer:
    """Let an engine draft what `guess` says."""
    proposer: Any = Proposer(guess, chosen.decoding.max_new_tokens)
    chosen._drafts = lambda jobs: proposer  # type: ignore[method-assign]
    return proposer  # type: ignore[no-any-return]


def without_drafts(model: LoadedModel, jobs: Sequence[Job], n: int = 12, **kwargs: Any) -> tuple[list[Output], Any]:
    """Return outputs without drafts, and the tokens that each row chose, end tokens too."""
    chosen = engine(model, n, **kwargs)
    proposer = with_proposer(chosen, lambda row, n: ())
    outputs = chosen.run(jobs)
    assert proposer.proposed == 0
    return outputs, proposer.heard


def mixed(heard: dict[int, list[int]], seed: int = 0) -> Guess:
    """Guess some of a row's own tokens right and some wrong, many, few or none; always the same at a token."""

    def guess(row: int, n: int) -> list[int]:
        rng = np.random.default_rng((seed, row, n))
        own = [*heard[row][n:], *rng.integers(6, VOCAB, 4).tolist()][: rng.integers(0, 8)]
        return [token if rng.random() < 0.8 else int(rng.integers(6, VOCAB)) for token in own]

    return guess


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count passes of the packed path: one number, how many there were."""
    count, forward = [0], LeanRunner._forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LeanRunner, "_forward", counted)
    return count


def assert_same(found: Sequence[Output], expected: Sequence[Output]) -> None:
    assert texts(found) == texts(expected)
    for a, b in zip(found, expected, strict=True):
        assert len(a.monitored) == len(b.monitored)
        assert a.ended_by == b.ended_by
        if a.monitored:
            np.testing.assert_allclose(np.stack(a.monitored), np.stack(b.monitored), rtol=1e-3, atol=1e-2)


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("batch_rows", [5, 100])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_right_and_wrong_drafts_change_no_text(
    family: str, batch_rows: int, shared: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "ENTER_SHARE", 0.0)
    model, (prefill, decode) = tiny(family), shared
    jobs = jobs_of(random_rows(LENGTHS), {**tiny_programs(), **scoped_programs(COMPONENTS)})
    how: dict[str, Any] = {"monitor": MONITOR, "share_prefill": prefill, "share_decoding": decode}
    expected, heard = without_drafts(model, jobs, batch_rows=100, **how)
    chosen = engine(model, 12, batch_rows=batch_rows, **how)
    proposer = with_proposer(chosen, mixed(heard))
    assert_same(chosen.run(jobs), expected)
    assert 0.2 * proposer.proposed < proposer.accepted < 0.9 * proposer.proposed
    assert chosen.n_drafted == proposer.proposed
    assert chosen.n_accepted == proposer.accepted


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_wrong_drafts_change_nothing_and_right_ones_save_passes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs, n = tiny(family), jobs_of(random_rows(LENGTHS), tiny_programs()), 17
    counts, found = passes_of(monkeypatch), dict[str, int]()
    expected, heard = without_drafts(model, jobs, n, stop=frozenset(), batch_rows=40)
    found["none"], counts[0] = counts[0], 0
    guesses: dict[str, Guess] = {
        "wrong": lambda row, n: [(token + 1) % VOCAB for token in heard[row][n : n + 5]],
        "right": lambda row, n: heard[row][n : n + 5],
    }
    for name, guess in guesses.items():
        chosen = engine(model, n, frozenset(), batch_rows=40)
        proposer = with_proposer(chosen, guess)
        counts[0] = 0
        assert_same(chosen.run(jobs), expected)
        found[name] = counts[0]
        assert proposer.accepted == (proposer.proposed if name == "right" else 0)
        assert proposer.proposed > 0
    # The first token is the prefill's; six tokens a pass are five drafts and the one behind them.
    assert found["wrong"] == found["none"] == found["right"] - 3 + 16


@pytest.mark.parametrize("batch_rows", [4, 12])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_drafts_of_siblings_change_no_text(family: str, batch_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "FIXED_ROWS", {"cpu": 1e4})  # whatever there is to draft pays
    model, n = tiny(family), 20
    weak = {f"weak {i}": [Step("add", post(i % LAYERS), torch.full((1, 48), 0.01 * i))] for i in range(1, 4)}
    jobs = jobs_of(random_rows(LENGTHS), {**weak, **tiny_programs()})
    expected, _ = without_drafts(model, jobs, n, batch_rows=60, monitor=MONITOR)
    counts = passes_of(monkeypatch)
    off = engine(model, n, batch_rows=batch_rows, monitor=MONITOR)
    assert not off.share_drafts  # on a CPU they are asked for
    assert_same(off.run(jobs), expected)
    assert off.n_drafted == 0
    without, counts[0] = counts[0], 0
    on = engine(model, n, batch_rows=batch_rows, monitor=MONITOR, share_drafts=True)
    assert_same(on.run(jobs), expected)
    print(f"{on.n_accepted} of {on.n_drafted} accepted; {counts[0]} passes instead of {without}")
    assert on.n_accepted > 0
    assert counts[0] <= without


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 8])
def test_drafts_never_run_past_the_last_token_that_is_wanted(max_new_tokens: int) -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())
    expected, heard = without_drafts(model, jobs, max_new_tokens, stop=frozenset())
    chosen = engine(model, max_new_tokens, frozenset())
    with_proposer(chosen, mixed(heard))
    found = chosen.run(jobs)
    assert_same(found, expected)
    assert {(len(output.token_ids), output.finish_reason) for output in found} == {(max_new_tokens, "length")}


def test_a_stop_string_inside_drafts_ends_the_text_there() -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())
    free = engine(model, 10, frozenset())
    plain = [free.text(output) for output in free.run(jobs)]
    stops = list(dict.fromkeys([plain[0][3:5], plain[4][5], plain[-1][1]]))
    how: dict[str, Any] = {"stop": frozenset(), "decoding": Decoding(max_new_tokens=10, stop=stops), "monitor": MONITOR}
    expected, _ = without_drafts(model, jobs, **how)
    _, heard = without_drafts(model, jobs, 10, stop=frozenset())  # what rows would say if nothing stopped them
    chosen = engine(model, **how)
    proposer = with_proposer(chosen, lambda row, n: heard[row][n : n + 6])
    assert_same(chosen.run(jobs), expected)
    assert proposer.accepted > 0
    assert any(output.ended_by for output in expected)


def test_a_baseline_row_beside_strongly_steered_rows_says_the_same() -> None:
    model, rows, n = tiny("llama"), random_rows([(6, 0)] * 6), 12
    strong = [Step("add", Site(c, layer), torch.full((1, 48), 1e3)) for c in COMPONENTS for layer in range(LAYERS)]
    seen = []
    for others in ([], strong):
        jobs = [Job(row, condition(f"{i % 2}", others if i % 2 else [])) for i, row in enumerate(rows)]
        _, heard = without_drafts(model, jobs, n, stop=frozenset())
        chosen = engine(model, n, frozenset(), monitor=MONITOR, batch_rows=6)
        proposer = with_proposer(chosen, mixed(heard))
        seen.append(chosen.run(jobs))
        assert proposer.accepted > 0
    assert_same(seen[0][::2], seen[1][::2])
    assert texts(seen[0][1::2]) != texts(seen[1][1::2])


def test_sampled_decoding_drafts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "FIXED_ROWS", {"cpu": 1e9})
    jobs = jobs_of(random_rows(LENGTHS), tiny_programs())
    found = {}
    for share in (True, False):
        chosen = engine(tiny("llama"), decoding=SAMPLED, batch_rows=5, share_drafts=share)
        found[share] = texts(chosen.run(jobs))
        assert chosen.n_drafted == 0
    assert found[True] == found[False]


def test_the_padded_path_drafts_nothing() -> None:
    chosen = engine(tiny("llama"), 12, lean=False, batch_rows=5, share_drafts=True)
    chosen.run(jobs_of(random_rows(LENGTHS), tiny_programs()))
    assert chosen.n_drafted == 0


def test_a_draft_that_overflows_is_dropped() -> None:
    # Its keys are masked for the row's own token, but 0 x NaN is NaN.
    inner, bad = copy.deepcopy(tiny("llama").model), VOCAB - 1
    inner.get_input_embeddings().weight.data[bad] = torch.inf
    model = dataclasses.replace(tiny("llama"), model=inner)
    jobs = jobs_of(random_rows(LENGTHS), tiny_programs())
    expected, heard = without_drafts(model, jobs, stop=frozenset({bad}))
    chosen = engine(model, 12, frozenset({bad}), lean=True)
    proposer = with_proposer(chosen, lambda row, n: [*heard[row][n : n + n % 3], bad] if n % 2 else heard[row][n:][:3])
    assert_same(chosen.run(jobs), expected)
    assert proposer.accepted > 0


def test_rows_that_begin_again_after_memory_ran_out_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "FIXED_ROWS", {"cpu": 1e4})
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())
    expected, _ = without_drafts(model, jobs, batch_rows=28)
    block, passes = LeanLlama.block, [0]
    chosen = engine(model, 12, batch_rows=28, share_drafts=True)

    def limited(self: Any, layer: int, h: Tensor, *args: Any) -> Tensor:
        passes[0] += layer == 0
        if passes[0] == 8:
            raise torch.OutOfMemoryError("CUDA")
        return block(self, layer, h, *args)

    monkeypatch.setattr(LeanLlama, "block", limited)
    assert_same(chosen.run(jobs), expected)
    assert chosen.batch_rows < 28
    assert chosen.n_accepted > 0


def test_equal_histories_mean_equal_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows accepted: those that are computed together have read the same."""
    read: list[tuple[int, ...]] = []  # by row
    last: list[tuple[int, ...]] = []  # drafts of the last pass
    shared = [0]
    enter, verify, step, accept, keep = (
        getattr(LeanRunner, name) for name in ("enter", "verify", "step", "accept", "keep")
    )

    def check(runner: Any) -> None:
        assert runner._positions == [len(tokens) for tokens in read]
        for history, tokens in zip(runner._histories, read, strict=True):
            alike = [t for h, t in zip(runner._histories, read, strict=True) if h == history]
            assert alike == [tokens] * len(alike)
            shared[0] += len(alike) > 1

    def entered(self: Any, entrants: Sequence[Entrant]) -> Passed:
        passed = enter(self, entrants)
        read.extend(entrant.prompt for entrant in entrants)
        check(self)
        return passed  # type: ignore[no-any-return]

    def stepped(self: Any, tokens: Tensor) -> Passed:
        passed = step(self, tokens)
        read[:] = [(*before, token) for before, token in zip(read, tokens.tolist(), strict=True)]
        check(self)
        return passed  # type: ignore[no-any-return]

    def verified(self: Any, tokens: Tensor, proposed: Sequence[tuple[int, ...]]) -> Passed:
        passed = verify(self, tokens, proposed)
        read[:] = [(*before, token) for before, token in zip(read, tokens.tolist(), strict=True)]
        last[:] = proposed
        check(self)
        return passed  # type: ignore[no-any-return]

    def accepted(self: Any, n: Sequence[int]) -> None:
        accept(self, n)
        read[:] = [(*before, *row[:k]) for before, row, k in zip(read, last, n, strict=True)]
        check(self)

    def kept(self: Any, order: Sequence[int]) -> None:
        keep(self, order)
        read[:] = [read[old] for old in order]
        check(self)

    model = tiny("llama")
    late = {f"late {i}": [Step("add", post(LAYERS - 1), torch.full((1, 48), 0.1 * i))] for i in range(4)}
    jobs = jobs_of(random_rows(LENGTHS), {**tiny_programs(), **late})
    expected, heard = without_drafts(model, jobs, batch_rows=44)
    for name, wrapped in zip(
        ("enter", "verify", "step", "accept", "keep"), (entered, verified, stepped, accepted, kept), strict=True
    ):
        monkeypatch.setattr(LeanRunner, name, wrapped)
    for seed in range(3):
        read.clear()
        chosen = engine(model, 12, batch_rows=30)
        with_proposer(chosen, mixed(heard, seed))
        assert_same(chosen.run(jobs), expected)
    assert shared[0] > 100


def test_real_texts_are_the_same_with_drafts(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, n_tokens = real_rows(smollm2, 4), 24
    programs = real_programs(smollm2, rows)
    programs["weak"] = [Step("add", post(8), 0.2 * programs["add early"][0].raw)]
    v = programs["add early"][0].raw
    programs["clamp"] = [Step("clamp", post(20), v, "response", value=-20.0)]
    programs["range"] = [Step("add", post(10), v, TokenRange.model_validate({"from": -4}))]
    jobs, stop = jobs_of(rows[1:3], programs), sorted(stop_token_ids(smollm2))
    monitor = MonitorPlan(("a",), ("a",), {post(20): (v / v.norm()).numpy()})
    counts, found, passes = passes_of(monkeypatch), dict[bool, list[Output]](), dict[bool, int]()
    for share in (True, False):
        counts[0] = 0
        chosen = ReplayEngine(smollm2, Decoding(max_new_tokens=n_tokens), monitor, batch_rows=6, share_drafts=share)
        found[share], passes[share] = chosen.run(jobs), counts[0]
        print(f"drafts {share}: {chosen.n_accepted} of {chosen.n_drafted} accepted, {counts[0]} passes")
        assert (chosen.n_accepted > 0) == share
    assert passes[True] < passes[False]
    ties = 0
    for job, output, reference in zip(jobs, found[True], found[False], strict=True):
        if texts([output]) == texts([reference]):
            np.testing.assert_allclose(np.stack(output.monitored), np.stack(reference.monitored), rtol=1e-3, atol=1e-2)
            continue
        # They may part only at two tokens that are as good as equal in one unbatched pass over what they share.
        ours, theirs = [*output.token_ids, stop[0]], [*reference.token_ids, stop[0]]
        same = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        prompt = job.row.token_ids
        shared = (*prompt, *theirs[:same])
        logits, _ = teacher_forced(smollm2.model, shared, programs[job.condition.name], len(prompt))
        for token in ours[same], theirs[same]:
            assert gap(logits[-1], token) < NEAR_TIE, f"{job.condition.name}, token {same}"
        ties += 1
    print(f"{ties} near ties in {len(jobs)}")
    assert ties <= 1


def test_cleared_places_hold_zeros() -> None:
    chosen = engine(tiny("llama"), lean=True)
    assert chosen._lean is not None
    slots = KVSlots(chosen._lean, 2, 4)
    for held in (*slots._keys, *slots._values):
        held.fill_(torch.nan)
    slots.clear(torch.tensor([1, 6]))
    for held in (*slots._keys, *slots._values):
        assert held[[1, 6]].eq(0).all()
        assert held[[0, 2, 3, 4, 5, 7]].isnan().all()
