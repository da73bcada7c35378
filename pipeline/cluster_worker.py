"""What both ends of a remote call share: the worker that holds the model, and the envelope its answers travel in.

Errors travel as values. So they keep their type (Ray would wrap them in a class of its own), and only the loss of a
process shows up as an error of Ray. This module imports neither Ray nor torch: `Host.prepare` sets the environment
before anything that reads it is loaded.
"""

from __future__ import annotations

import os
import pickle
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from store.errors import MismatchError, ModelError, NonFiniteError, ResidError, StudyError

# Trying again gives the same.
DETERMINISTIC = (MismatchError, ModelError, NonFiniteError, StudyError)

# Where models, caches and credentials are. The environment of the submitting shell does not reach workers by itself.
PASSED_ON = ("AWS_", "AZURE_STORAGE_", "FSSPEC_", "GOOGLE_", "HF_", "RESID_", "TRANSFORMERS_")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Block(Protocol):
    """A unit of work: small, picklable, its id unique within a run."""

    @property
    def id(self) -> str: ...


class Worker(Protocol):
    """Lives in an importable module, holds what is expensive to load, and takes one block after another."""

    def run(self, block: Any) -> Any:
        """Do the block, commit its output, and return small metadata (data never goes through the driver)."""
        ...


class OverlappingWorker(Worker, Protocol):
    """A worker that can write one block while it computes the next: `run` is ``compute(block)()``."""

    def compute(self, block: Any) -> Callable[[], Any]:
        """Do the block; return what commits its output and returns what `run` does, to be called once on any thread."""
        ...


def overlaps(factory: Callable[..., Worker]) -> bool:
    """Whether a factory makes workers that write one block while they compute the next."""
    return hasattr(factory, "compute")


def worker_environment(cpus: int) -> dict[str, str]:
    """Return the variables for a worker with ``cpus`` CPUs: what is passed on from here, and one thread per CPU."""
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    return passed_on | dict.fromkeys(_THREADS, str(cpus))


@dataclass(frozen=True)
class Outcome:
    """The value of a call, or the error that ended it."""

    value: Any = None
    error: bytes | None = None  # the pickled exception
    cause: str = ""  # for people: type and message, and for unexpected errors the traceback

    @classmethod
    def of(cls, error: Exception) -> Outcome:
        """Pack an exception; one that does not survive pickling becomes a RuntimeError with the same text."""
        cause = f"{type(error).__name__}: {error}"
        if not isinstance(error, ResidError):
            cause += "\n" + "".join(traceback.format_exception(error)).rstrip()
        try:
            packed = pickle.dumps(error)
            pickle.loads(packed)
        except Exception:
            packed = pickle.dumps(RuntimeError(cause))
        return cls(error=packed, cause=cause)

    def exception(self) -> Exception:
        """Return the error of a failed call, with the worker's traceback as a note."""
        if self.error is None:
            raise ValueError("this call did not fail")
        try:
            error: Exception = pickle.loads(self.error)
        except Exception:  # its class is not importable here
            return RuntimeError(self.cause)
        if not isinstance(error, ResidError):
            error.add_note(f"in a worker: {self.cause}")
        return error


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call ``function`` and return what came of it."""
    try:
        return Outcome(function(*args, **kwargs))
    except Exception as error:
        return Outcome.of(error)


def breaks_process(error: Exception) -> bool:
    """Whether an error leaves its process unusable: after a CUDA fault every later call in the process fails too."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


class Host:
    """The actor: builds one worker and hands it blocks.

    A worker that overlaps is called from two threads: a block's answer goes out when it is committed, and the next
    block is computed meanwhile. It never gets further ahead: of the two blocks in flight one is written, one computed.
    """

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._prepared = threading.Event()
        self._computing, self._writing = threading.Lock(), threading.Lock()

    def prepare(self, environment: Mapping[str, str]) -> int:
        """Set environment variables; return the process id. They come by call and not by Ray's runtime environment,
        which writes its values (keys to object storage among them) to log files, and costs a second per worker."""
        os.environ.update(environment)
        self._prepared.set()
        return os.getpid()

    def build(self, packed: bytes) -> Outcome:
        """Build the worker from a pickled ``(factory, kwargs)``: importing the factory's module is part of it."""
        self._prepared.wait()
        return attempt(self._build, packed)

    def run(self, block: Any) -> Outcome:
        worker: Any = self._worker
        if worker is None:
            raise RuntimeError("run before build")
        if not overlaps(type(worker)):
            return attempt(worker.run, block)
        with self._computing:
            computed = attempt(worker.compute, block)
        if computed.error is not None:
            return computed
        with self._writing:
            return attempt(computed.value)

    def _build(self, packed: bytes) -> None:
        factory, kwargs = pickle.loads(packed)
        self._worker = factory(**kwargs)


def call(packed: bytes, item: Any, environment: Mapping[str, str]) -> Outcome:
    """Apply a pickled function to one item; the task behind `Cluster.map`."""
    os.environ.update(environment)
    return attempt(lambda: pickle.loads(packed)(item))
