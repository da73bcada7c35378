"""Which code of resid runs: the version of an installation, and of a checkout its commit and whether it was changed."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VARIABLE = "RESID_CODE_VERSION"
_ROOT = Path(__file__).resolve().parent.parent


@cache
def code_version() -> str:
    """Return ``0.1.0`` of an installation, ``0.1.0+g<commit>`` or ``0.1.0+g<commit>.dirty`` of a checkout.

    Dirty means that files which git tracks differ from the commit. Asked once a process: a file that changes later was
    not what was imported. Where a checkout was uploaded without its .git (``ray job submit``), or git is missing, it is
    ``0.1.0+unknown``, unless the environment variable RESID_CODE_VERSION says it. Drivers hand theirs to workers.
    """
    return os.environ.get(VARIABLE) or described(_ROOT)


def described(root: Path) -> str:
    """Return the version of the code in a folder; see `code_version`."""
    try:
        number = version("resid")
    except PackageNotFoundError:
        number = "0"
    if not (root / "pyproject.toml").exists():  # an installation holds the packages alone
        return number
    return f"{number}+{_commit(root) or 'unknown'}"


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None  # git would look in the folders above, which may be another repository
    # Without locks, so that another git of the same checkout is never in the way.
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run([*command, "--dirty=.dirty"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"g{done.stdout.strip()}" if done.stdout.strip() else None
