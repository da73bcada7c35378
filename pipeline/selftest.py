"""The site self-test: proves on a loaded model that its sites are what their names say. Run whenever a model is loaded.

Three passes over two short rows of unequal length: padded right, padded left, and padded right with a vector added at
every site. All is read through `pipeline.hooks.on_sites`; bounds follow from the rounding of the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline.architecture import Architecture
from pipeline.hooks import SiteFunction, on_sites
from pipeline.sinks import SinkToken, sink_tokens
from store.errors import ModelError
from store.sites import COMPONENTS, Site

TEXTS = ("The tide was out, so they walked to the island and back before dark.", "Nobody answered the door on Sunday.")
LENGTHS = (12, 7)  # tokens; longer than the sliding windows of the tests, unequal so that one row is padded
SEED = 0
WRITE_SIZE = 0.25  # size of the added vector's elements, relative to a typical element of the stream at that layer

# Largest relative L2 difference of a token's values between left and right padding. Padding moves a token within the
# attention product, so its sums are rounded differently and later blocks amplify that; a wrong mask or wrong positions
# change values by their own size.
PADDING_BOUND = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


class Check(BaseModel):
    """One law, the worst deviation from it that was measured, and what is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    law: str
    measured: float
    allowed: Literal["at most", "at least"] = "at most"
    bound: float
    worst_at: str
    values: int  # how many comparisons (site x row x token, or rendered texts)

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound if self.allowed == "at most" else self.measured >= self.bound


class Receipt(BaseModel):
    """What the self-test measured on one model; `model_dump(mode="json")` of it goes into manifests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    n_layers: int
    d_model: int
    dtype: str
    device: str
    attention: str | None
    row_lengths: tuple[int, ...]
    checks: tuple[Check, ...]
    sinks: tuple[SinkToken, ...] = ()
    torch: str
    transformers: str


def self_test(model: Any, architecture: Architecture, tokenizer: Any = None) -> Receipt:
    """Check every site of ``model`` and return the measurements.

    The laws, at every layer, row and real token: block L+1 reads what block L returned; transformers' own record of
    the hidden states agrees; ``resid_pre + attn_out + mlp_out == resid_post``; left and right padding agree; a vector
    added at a site is there when the site is read again, and the rest of the model goes on with it; the final norm is
    not part of the last ``resid_post``; a rendered chat holds its BOS once.

    Raises:
        ModelError: naming the first check that failed, the site, row and token, and the measured number.
    """
    rows = trial_rows(model, tokenizer)
    right = run_rows(model, architecture, rows, "right")
    left = run_rows(model, architecture, rows, "left")
    written = run_rows(model, architecture, rows, "right", _vectors(architecture, right))

    checks = [_finite(right, "right padding"), _finite(left, "left padding"), _finite(written, "an added vector")]
    checks += [_order(architecture, right), *_stream(architecture, right, "clean")]
    checks += _recorded(architecture, right) + _paddings(right, left)
    checks += [_writes(architecture, written), *_stream(architecture, written, "written")]
    checks += _final_norm(architecture, written) + _bos(tokenizer)

    for check in checks:
        if not check.passed:
            raise ModelError(
                f"site self-test of this {architecture.family} model ({right.dtype}) failed: {check.name} at "
                f"{check.worst_at}: measured {check.measured:.3g}, allowed is {check.allowed} {check.bound:.3g}. "
                f"The law: {check.law}. Nothing that was read from this model could be trusted; use another version of "
                "transformers or of the model, or attn_implementation: eager"
            )
    return Receipt(
        family=architecture.family,
        n_layers=architecture.n_layers,
        d_model=architecture.d_model,
        dtype=str(right.dtype).removeprefix("torch."),
        device=str(model.device),
        attention=getattr(model.config, "_attn_implementation", None),
        row_lengths=tuple(len(row) for row in rows),
        checks=tuple(checks),
        sinks=sink_tokens(right.before, architecture.n_layers),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


@dataclass
class _Run:
    """Values of one forward pass by site and row, without padding: [token, d_model], on the CPU, dtype unchanged."""

    dtype: torch.dtype
    calls: list[Site] = field(default_factory=list)
    before: dict[Site, list[Tensor]] = field(default_factory=dict)  # as the model computed them
    after: dict[Site, list[Tensor]] = field(default_factory=dict)  # as the model goes on with them
    added: dict[Site, Tensor] = field(default_factory=dict)  # [d_model]
    recorded: list[list[Tensor]] = field(default_factory=list)  # transformers' hidden_states
    output: list[Tensor] = field(default_factory=list)  # of the base model, after the final norm
    renormed: list[Tensor] = field(default_factory=list)  # the final norm of the last resid_post


@torch.inference_mode()
def run_rows(
    model: Any, architecture: Architecture, rows: list[list[int]], side: str, added: dict[Site, Tensor] | None = None
) -> _Run:
    """Run ``rows`` padded on ``side``, adding ``added[site]`` ([d_model], float32, CPU) at each site."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    spans = [slice(0, len(row)) if side == "right" else slice(length - len(row), length) for row in rows]
    for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[index, span] = torch.tensor(row)
        mask[index, span] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def split(hidden: Tensor) -> list[Tensor]:
        on_cpu = hidden.detach().to("cpu", copy=True)
        return [on_cpu[index, span] for index, span in enumerate(spans)]

    run = _Run(dtype=model.dtype)
    last = Site("resid_post", architecture.n_layers - 1)
    norm_input: list[Tensor] = []

    def before(site: Site) -> SiteFunction:
        def read_and_write(hidden: Tensor) -> Tensor | None:
            run.calls.append(site)
            run.before[site] = split(hidden)
            if added is None:
                return None
            run.added[site] = added[site].to(hidden.dtype)
            return hidden + run.added[site].to(hidden.device)

        return read_and_write

    def after(site: Site) -> SiteFunction:
        def read(hidden: Tensor) -> None:
            run.after[site] = split(hidden)
            if site == last:
                norm_input.append(hidden)

        return read

    sites = [Site(component, layer) for layer in range(architecture.n_layers) for component in COMPONENTS]
    with (
        on_sites(architecture, {site: before(site) for site in sites}),
        on_sites(architecture, {site: after(site) for site in sites}),
    ):
        output = architecture.base(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=positions.to(model.device),
            use_cache=False,
            output_hidden_states=added is None,
        )
    run.output = split(output.last_hidden_state)
    run.recorded = [split(hidden) for hidden in getattr(output, "hidden_states", None) or ()]
    if architecture.final_norm is not None:
        run.renormed = split(architecture.final_norm(norm_input[-1]))
    for site in sites:
        if site not in run.before or site not in run.after:
            raise ModelError(
                f"site self-test of this {architecture.family} model failed: the module of {site} did not run in a "
                "forward pass, so it can be neither read nor written; the model is not supported"
            )
    return run


def trial_rows(model: Any, tokenizer: Any) -> list[list[int]]:
    """Two rows of token ids of unequal length: plain text, or random ids where there is no tokenizer for it."""
    vocabulary = len(model.get_input_embeddings().weight)
    if tokenizer is not None:
        rows = [tokenizer(text).input_ids[:length] for text, length in zip(TEXTS, LENGTHS, strict=True)]
        largest = max(max(row, default=0) for row in rows)
        if largest >= vocabulary:
            raise ModelError(
                f"the tokenizer gives token id {largest}, and the model knows ids up to {vocabulary - 1}: "
                "tokenizer and weights do not belong together"
            )
        if len(rows[0]) > len(rows[1]) > 1:
            return rows
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def _vectors(architecture: Architecture, clean: _Run) -> dict[Site, Tensor]:
    """For each site a vector of random signs, sized by a typical element of the stream behind that block."""
    generator = torch.Generator().manual_seed(SEED)
    vectors = {}
    for site in clean.after:
        stream = torch.cat(clean.after[Site("resid_post", site.layer)]).float()
        # The median: single elements and first tokens may be a thousand times larger than the rest.
        size = WRITE_SIZE * stream.square().mean(-1).sqrt().median()
        signs = torch.randint(2, (architecture.d_model,), generator=generator) * 2.0 - 1.0
        vectors[site] = size * signs
    return vectors


def _worst(deviations: Iterable[tuple[Site | str, int, Tensor]]) -> tuple[float, str, int]:
    """The largest of (site, row, [token] deviations), where it is, and how many there were. NaN counts as infinite."""
    worst, where, count = 0.0, "no site", 0
    for site, row, tokens in deviations:
        tokens = tokens.nan_to_num(nan=float("inf"))
        count += tokens.numel()
        value, token = tokens.max(0)
        if value.item() > worst:
            worst, where = value.item(), f"{site}, row {row}, token {int(token)}"
    return worst, where, count


def _elementwise(error: Tensor, size: Tensor) -> Tensor:
    """[token, d_model] twice to [token]: the largest |error| / size of a token's elements; 0 / 0 is 0."""
    return torch.where(error == 0, 0.0, error.abs() / size).amax(-1)


def _relative(a: Tensor, b: Tensor) -> Tensor:
    """[token, d_model] twice to [token]: the L2 difference relative to the larger of the two norms."""
    difference = torch.linalg.vector_norm(a.double() - b.double(), dim=-1)
    size = torch.maximum(a.double().norm(dim=-1), b.double().norm(dim=-1))
    return torch.where(difference == 0, 0.0, difference / size)


def _check(name: str, law: str, bound: float, deviations: Iterable[tuple[Site | str, int, Tensor]]) -> Check:
    measured, where, values = _worst(deviations)
    # JSON has no infinity; the largest float fails every bound as well.
    measured = min(measured, torch.finfo(torch.float64).max)
    return Check(name=name, law=law, measured=measured, bound=bound, worst_at=where, values=values)


def _finite(run: _Run, what: str) -> Check:
    return _check(
        f"finite values with {what}",
        f"no activation is NaN or infinite in {run.dtype} (float16 overflows where bfloat16 and float32 do not)",
        0.0,
        (
            (s, row, (~v.isfinite()).any(-1).double())
            for s, values in run.before.items()
            for row, v in enumerate(values)
        ),
    )


def _order(architecture: Architecture, run: _Run) -> Check:
    # Sums cannot tell attention from MLP; the order in which a block calls them does.
    order = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    deviations = []
    for layer in range(architecture.n_layers):
        called = tuple(site.component for site in run.calls if site.layer == layer)
        deviations.append((Site("resid_pre", layer), 0, torch.tensor([float(called != order)])))
    return _check("order of calls", "a block calls its attention and then its MLP, each once", 0.0, deviations)


def _stream(architecture: Architecture, run: _Run, what: str) -> list[Check]:
    """What a block is given and what its parts add make up what it returns, and the next block is given just that."""
    layers = range(architecture.n_layers)

    def steps() -> Iterable[tuple[Site, int, Tensor]]:
        for layer in layers[:-1]:
            pairs = zip(run.after[Site("resid_post", layer)], run.before[Site("resid_pre", layer + 1)], strict=True)
            for row, (out, given) in enumerate(pairs):
                yield Site("resid_post", layer), row, _relative(out, given)

    def sums() -> Iterable[tuple[Site, int, Tensor]]:
        for layer in layers:
            parts = [run.after[Site(component, layer)] for component in ("resid_pre", "attn_out", "mlp_out")]
            for row, (pre, attention, mlp, post) in enumerate(
                zip(*parts, run.before[Site("resid_post", layer)], strict=True)
            ):
                terms = torch.stack([pre.double(), attention.double(), mlp.double()])
                yield Site("resid_post", layer), row, _elementwise(terms.sum(0) - post.double(), terms.abs().sum(0))

    # Two additions round twice, in any order: at most 2 * eps/2 * (1 + eps) of the sum of sizes. Twice that is allowed.
    return [
        _check(f"{what}: next block", "resid_pre.(L+1) is resid_post.L", 0.0, steps()),
        _check(
            f"{what}: sum of a block",
            "resid_pre + attn_out + mlp_out is resid_post, by element and relative to the sum of their sizes",
            2 * torch.finfo(run.dtype).eps,
            sums(),
        ),
    ]


def _recorded(architecture: Architecture, run: _Run) -> list[Check]:
    if len(run.recorded) != architecture.n_layers + 1:
        return []
    sites = [Site("resid_pre", 0), *(Site("resid_post", layer) for layer in range(architecture.n_layers - 1))]
    deviations = (
        (site, row, _relative(ours, theirs))
        for site, recorded in zip(sites, run.recorded[:-1], strict=True)
        for row, (ours, theirs) in enumerate(zip(run.before[site], recorded, strict=True))
    )
    law = "hidden_states[0] is resid_pre.0 and hidden_states[L+1] is resid_post.L, in what transformers records itself"
    return [_check("transformers' hidden states", law, 0.0, deviations)]


def _paddings(right: _Run, left: _Run) -> list[Check]:
    # A mixture of experts may send a token elsewhere on a rounding difference. In 16 bits that happens, so there a row
    # is judged by its median token: a wrong mask or wrong positions change every token of the padded row.
    exact = torch.finfo(right.dtype).bits >= 32
    summary: Callable[[Tensor], Tensor] = (lambda v: v) if exact else (lambda v: v.median(0, keepdim=True).values)
    deviations = (
        (site, row, summary(_relative(a, b)))
        for site in right.before
        for row, (a, b) in enumerate(zip(right.before[site], left.before[site], strict=True))
    )
    law = f"left and right padding give the same values ({'every' if exact else 'median'} token, relative L2)"
    return [_check("padding sides", law, PADDING_BOUND[right.dtype], deviations)]


def _writes(architecture: Architecture, run: _Run) -> Check:
    def deviations() -> Iterable[tuple[Site, int, Tensor]]:
        for site, vector in run.added.items():
            for row, (old, new) in enumerate(zip(run.before[site], run.after[site], strict=True)):
                error = new.double() - old.double() - vector.double()
                yield site, row, _elementwise(error, old.double().abs() + vector.double().abs())

    law = "a vector added at a site is in what the site gives when read again: every row and token, by element"
    return _check("added vector", law, 2 * torch.finfo(run.dtype).eps, deviations())


def _final_norm(architecture: Architecture, run: _Run) -> list[Check]:
    if architecture.final_norm is None:
        return []
    last = Site("resid_post", architecture.n_layers - 1)
    same = _check(
        "final norm",
        "the model's output is the final norm of the last resid_post as it was written",
        4 * torch.finfo(run.dtype).eps,
        ((last, row, _relative(a, b)) for row, (a, b) in enumerate(zip(run.output, run.renormed, strict=True))),
    )
    different = torch.cat([_relative(a, b) for a, b in zip(run.output, run.after[last], strict=True)])
    return [
        same,
        Check(
            name="final norm is no site",
            law="the last resid_post is before the final norm, so it differs from the model's output",
            measured=different.max().item(),
            allowed="at least",
            bound=8 * torch.finfo(run.dtype).eps,
            worst_at=str(last),
            values=different.numel(),
        ),
    ]


def _bos(tokenizer: Any) -> list[Check]:
    """The tokenizer must not double a template's BOS. In ChatML-like templates BOS also opens every turn."""
    if tokenizer is None or not tokenizer.chat_template or tokenizer.bos_token_id is None:
        return []

    def rendered(*roles: str) -> tuple[str, list[int]]:
        messages = [{"role": role, "content": "Hello."} for role in roles]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, tokenizer(text, add_special_tokens=False).input_ids

    bos = tokenizer.bos_token_id
    text, ids = rendered("user")
    opens_turns = rendered("user", "assistant", "user")[1].count(bos) > ids.count(bos)
    leading = next((index for index, token in enumerate(ids) if token != bos), len(ids))
    measured, expected = (leading if opens_turns else ids.count(bos)), int(tokenizer.bos_token in text)
    return [
        Check(
            name="one BOS",
            law=f"a rendered chat holds BOS {'at its start ' if opens_turns else ''}{expected} time(s) once tokenised",
            measured=measured,
            allowed=allowed,
            bound=expected,
            worst_at=f"the chat {text[:60]!r}",
            values=1,
        )
        for allowed in (("at most", "at least") if not opens_turns else ("at most",))
    ]
