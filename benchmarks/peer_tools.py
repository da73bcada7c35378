"""What `capture_peers.py` and `replay_peers.py` share: a published tool is loaded, asked and answers here.

Runs in the environment of those tools and imports nothing of this project; `peers.py` is its other end.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Asked = dict[str, Any]  # what asked.json says
Tool = Callable[[Any, Any, Asked], Callable[[], Any]]  # of model, tokenizer and what is asked: does the work once


def padded_batches(ids: list[list[int]], pad: int | None, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and masks, [row, token] each, padded on the left: the last column is every row's last token."""
    for start in range(0, len(ids), size):
        some = ids[start : start + size]
        width = max(map(len, some))
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in some])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
        yield tokens, mask


def bridged(model: Any, tokenizer: Any) -> Any:
    """Return the model as transformer-lens wraps one that is loaded."""
    from transformer_lens.model_bridge import TransformerBridge

    checkpoint = model.config._name_or_path
    return TransformerBridge.boot_transformers(
        checkpoint, device="cpu", dtype=torch.float32, tokenizer=tokenizer, hf_model=model
    )


def serve(tools: dict[str, Tool], write: Callable[[Path, Any], None]) -> None:
    """Load the tool that the command line names, work on every line of standard input, have the answer written.

    The command line is: folder, tool, checkpoint, threads, rows of a batch.
    """
    folder, name, checkpoint, threads, batch = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    asked = json.loads((Path(folder) / "asked.json").read_text())
    run = tools[name](model, tokenizer, asked | {"batch": int(batch)})
    print("@", importlib.metadata.version(name), flush=True)
    for _ in sys.stdin:
        with torch.inference_mode():
            answer = run()
        write(Path(folder), answer)
        print("@ done", flush=True)
