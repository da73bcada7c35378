"""The errors of resid, grouped by what the reader of the message has to do next.

Every message says what was wrong, where (file, key path, row or block) and what to do about it.
"""

from __future__ import annotations


class ResidError(Exception):
    """Base of every error that resid raises on purpose; the command line prints it without a traceback."""


class StudyError(ResidError):
    """The study file, or a file that it names, is wrong. Remedy: edit that file."""

    def __init__(self, problem: str, *, file: str | None = None, key: str | None = None, remedy: str | None = None):
        self.problem, self.file, self.key, self.remedy = problem, file, key, remedy
        where = ": ".join(part for part in (file, key) if part)
        super().__init__(f"{where}: {problem}" + (f"\n  remedy: {remedy}" if remedy else "") if where else problem)


class ModelError(ResidError):
    """The model cannot be loaded, is not supported, or failed its site self-test. Remedy: another model or version."""


class QueryError(ResidError):
    """A SQL query was refused or failed. Remedy: change the query."""


class MissingDataError(ResidError):
    """Something that an earlier stage writes is not there yet. Remedy: run the stage that the message names.

    `stage` is that stage, where it is known.
    """

    def __init__(self, message: str, stage: str | None = None):
        self.stage = stage
        super().__init__(message)


class StaleError(ResidError):
    """A stage was asked alone while what it reads comes from an older version of the study. Nothing was written.

    Remedy: run the stages that the message names, or the whole study.
    """


class MismatchError(ResidError):
    """Data of different fingerprints met. Nothing was mixed; the message says what differs."""


class UndefinedError(ResidError):
    """A direction, or one layer of it, does not exist: two sides are equal there, say. All others are computed.

    Remedy: what the message names.
    """


class DamageError(ResidError):
    """Committed bytes are missing or changed. Remedy: un-commit the named block and capture it again."""


class NonFiniteError(ResidError):
    """A model produced NaN or infinity. The message names the rows; their block was not committed."""


class ResourceError(ResidError):
    """Memory, disk or cluster resources ran out. Remedy: free some or ask for less, then run the same command."""


class BlocksFailedError(ResidError):
    """Some blocks failed on every attempt; all others are committed. Remedy: mend the causes and rerun."""
