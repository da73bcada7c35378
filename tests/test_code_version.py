"""The code version that results keep: commit and changes of a checkout, the version of an installation."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs.context import versions
from store.code_version import VARIABLE, code_version, described

NUMBER = version("resid")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("a")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "tag", "v9")
    return tmp_path


def test_a_checkout_is_its_commit_and_says_whether_it_was_changed(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert described(checkout) == f"{NUMBER}+g{commit[:12]}"
    (checkout / "note.txt").write_text("git does not track this")
    assert described(checkout) == f"{NUMBER}+g{commit[:12]}"
    (checkout / "pyproject.toml").write_text("b")
    assert described(checkout) == f"{NUMBER}+g{commit[:12]}.dirty"


def test_without_git_or_its_folder_the_commit_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = checkout / "upload"  # as inside a job: in somebody else's repository
    inner.mkdir()
    (inner / "pyproject.toml").write_text("a")
    assert described(inner) == f"{NUMBER}+unknown"
    monkeypatch.setenv("PATH", "")
    assert described(checkout) == f"{NUMBER}+unknown"


def test_an_installation_is_its_version(tmp_path: Path) -> None:
    assert described(tmp_path) == NUMBER


def test_the_environment_states_the_version_of_an_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    code_version.cache_clear()
    monkeypatch.setenv(VARIABLE, "0.1.0+gabc")
    try:
        assert versions()["resid"] == code_version() == "0.1.0+gabc"
    finally:
        code_version.cache_clear()
