"""How many tokens go into one forward pass: measured on the first passes, remembered per model and device.

Passes that are too small waste the weights that they read; on a CPU those that are too large fall out of its caches.
The search runs while real work is done: it alternates between the budget in use and its neighbour, twice or half as
large, compares their best rates, and goes on in that direction while it pays. What a row's values are does not depend
on it beyond the bound of `pipeline.capture`, so a measurement that load has spoilt costs time and nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from pipeline.models import LoadedModel
from store.fingerprint import fingerprint, short

# Padded tokens of a pass: where the search begins, and its ends.
CPU_TOKENS, DEVICE_TOKENS = 512, 8192
LEAST = {"cpu": 128}
MOST = {"cpu": 4096}
SAMPLES = 3  # full passes of each of two budgets that are compared
WORTH = 1.03  # times the rate: a budget replaces its neighbour if it is this much faster


class TokenBudget:
    """The budget of one engine: fixed, or searched for from the first pass on.

    Args:
        fixed: no search; out of memory still lowers it.
        file: where the result is kept, and found by the next engine. Nothing fails if it cannot be read or written.
    """

    def __init__(self, device: torch.device, fixed: int | None = None, file: Path | None = None):
        self._file = file if fixed is None else None
        remembered = _read(self._file)
        default = CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS
        self._current = fixed or remembered or default
        self._least, self._most = LEAST.get(device.type, 1024), MOST.get(device.type, 131072)
        self._next: Callable[[int], int] | None = None
        self._rates: dict[int, list[float]] = {}  # budget -> real tokens per second of full passes
        self._turned = False
        if fixed is None and remembered is None:
            self._next = _double

    @property
    def searching(self) -> bool:
        return self._next is not None

    @property
    def tokens(self) -> int:
        """Padded tokens that the next pass may have."""
        rival = self._rival
        if rival is None or len(self._sampled(self._current)) <= len(self._sampled(rival)):
            return self._current
        return rival

    def passed(self, budget: int, padded: int, real: int, seconds: float) -> None:
        """Note a pass of `real` tokens, `padded` with padding, that was cut for `budget`."""
        # Half as large a budget would have done for a smaller pass, so it says nothing about this one.
        if self._next is None or 2 * padded <= budget:
            return
        self._rates.setdefault(budget, []).append(real / seconds)
        rival = self._rival
        if rival is None:
            return
        rates = [max(self._sampled(b)) if len(self._sampled(b)) >= SAMPLES else 0.0 for b in (self._current, rival)]
        if not all(rates):
            return
        if rates[1] > WORTH * rates[0]:
            self._current, self._turned = rival, True  # the way back is known to be slower
        else:
            self._turn()
        while self._next is not None and self._rival is None:
            self._turn()

    def failed(self, padded: int) -> None:
        """Note a pass of so many padded tokens that ran out of memory: half as many from now on, and no more."""
        self._most = self._current = max(1, min(self.tokens, padded) // 2)
        self._turned = True
        self._turn()

    @property
    def _rival(self) -> int | None:
        if self._next is None:
            return None
        rival = self._next(self._current)
        return rival if self._least <= rival <= self._most else None

    def _sampled(self, budget: int) -> list[float]:
        return self._rates.get(budget, [])

    def _turn(self) -> None:
        """Look at smaller budgets if nothing is known of them yet, else end the search."""
        self._next, self._turned = (None if self._turned else _halve), True
        if self._next is None:
            _write(self._file, self._current, self._rates)


def _double(budget: int) -> int:
    return 2 * budget


def _halve(budget: int) -> int:
    return budget // 2


def budget_file(folder: Path, model: LoadedModel, path: str) -> Path:
    """Return where the budget of a model on this device is kept.

    Args:
        path: the name of the code that runs the passes.
    """
    device = model.device
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    what = {"model": model.fingerprint, "device": f"{device.type} {name}", "threads": torch.get_num_threads(),
            "path": path, "torch": torch.__version__}  # fmt: skip
    return folder / "token_budgets" / f"{short(fingerprint(what))}.json"


def _read(file: Path | None) -> int | None:
    if file is None:
        return None
    with suppress(OSError, ValueError, TypeError, KeyError):
        tokens = int(json.loads(file.read_text())["tokens"])
        return tokens if tokens > 0 else None
    return None


def _write(file: Path | None, tokens: int, rates: dict[int, list[float]]) -> None:
    if file is None:
        return
    record = {"tokens": tokens, "tokens_per_second": {str(b): round(max(r), 1) for b, r in sorted(rates.items())}}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".partial")
        with os.fdopen(descriptor, "w") as stream:
            json.dump(record, stream)
        os.replace(temporary, file)
