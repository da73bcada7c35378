"""A published tool in a process of its own, run by the Python of another environment, beside ours in each round."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# The tools that .venv-peers has (`make benchmark-peers`).
PUBLISHED = ("steering-vectors", "nnsight", "transformer-lens", "repeng")


class Peer:
    """One of this folder's scripts, which imports nothing of this project.

    It finds what it is asked in asked.json of a folder, says "@ " and its version when it has loaded its model, works
    on every line of its input, leaves the answer in the folder and says "@ done". Other lines of its do not count.
    """

    def __init__(self, stack: ExitStack, python: str, script: str, asked: Any, *arguments: object):
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (self.folder / "asked.json").write_text(json.dumps(asked))
        command = [python, Path(__file__).parent / script, self.folder, *arguments]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._name = f"{script} {' '.join(map(str, arguments))}"
        self._process = stack.enter_context(
            subprocess.Popen(
                [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        )
        stack.callback(self._process.kill)
        self.version = self._said()

    def work(self) -> None:
        """Have it answer once."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._said()

    def _said(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@ "):
                return line[2:].strip()
        raise SystemExit(f"{self._name} ended with exit code {self._process.wait()}; its message is above")
