"""What the README tells people to type works as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import build_parser
from store.activations import ActivationStore, CaptureRequest
from store.rows import Row
from store.sites import Spans

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every ``resid`` command of the README and the Makefile, alternatives written out, comments cut off."""
    found: list[str] = []
    text = (README + (ROOT / "Makefile").read_text(encoding="utf-8")).replace("\\\n", " ")
    for match in re.finditer(r"^(?:\$ |\t@)?(?:\.venv/bin/|\$\(BIN\)/)?resid ((?:[^\n]|\n {6})+)", text, re.MULTILINE):
        line = (
            re.sub(r"\s{2,}#.*|\s{6,}# .*", "", match[1])
            .replace("$(DEMO)", "demo.yaml")
            .replace("$(PAPER)", "paper.yaml")
        )
        first, _, rest = line.partition(" ")
        found += [f"{name} {rest}" for name in first.split("|")]
    return found


def test_every_command_of_the_readme_is_one_that_resid_takes() -> None:
    lines = commands()
    assert {line.split()[0] for line in lines} >= {"plan", "run", "capture", "replay", "sql", "report", "verify"}
    for line in lines:
        build_parser().parse_args(shlex.split(line))


def test_every_file_that_the_readme_links_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    identity = {"fingerprint": "f" * 64, "n_layers": 30, "d_model": 8, "dtype": "float32", "family": "llama"}
    model = ActivationStore.open("resid-data/store").add_model(identity)
    rows = tuple(Row("f" * 64, f"prompt{i}", (1, 2, i), Spans(3, 3)) for i in range(4))
    model.memberships.write(
        "demo",
        "studies/demo.yaml",
        [
            {"prompt_set": "harmful@train", "responses": None, "prompt_id": row.prompt_id, "row_key": row.key}
            for row in rows
        ],
    )
    request = CaptureRequest(rows, ("resid_post",), tuple(range(30)), ("prompt_end",), "float32")
    _, blocks = model.assign([request])
    for block in blocks:
        [found] = [one for one in model.generations() if one.id == block.generation]
        start, stop = found.plan.block_range(block.block)
        found.write_block(block.block, {"resid_post": np.ones((stop - start, 30, 1, 8), dtype=np.float32)})
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    activations = scope["activations"]
    assert activations.to_numpy().shape == (4, 8)  # type: ignore[attr-defined]
