"""The loop that keeps workers busy on a Ray cluster, and survives the loss of any of them.

Workers are plain actors that Ray neither restarts nor retries, so this loop alone decides what runs again: the oldest
block in flight on a lost worker is charged with the loss, its other block is not. Blocks commit their own output; the
loop sees metadata only. What the driver forgets when it dies, the committed blocks remember.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.cluster_ledger import Ledger, RunReport, Task
from pipeline.cluster_worker import Outcome, breaks_process
from store.errors import ResidError, ResourceError

IN_FLIGHT = 2  # blocks per worker: one runs, the next is there when it ends; or one is written, one computed
POLL = 1.0  # seconds between looks at the deadlines
PATIENCE = 60.0  # seconds without room in the cluster before the log says so
DEAD_WORKER = 10.0  # seconds for Ray to resolve the calls of a worker that is gone
LONGEST_CAUSE = 500  # characters

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Actor:
    handle: Any
    preparing: Any  # the reference of the first call, until the process runs
    building: Any  # ... of the construction, until the worker is there
    flights: deque[tuple[Any, Task]] = field(default_factory=deque)
    since: float | None = None  # when its oldest call began; None while it waits for room or for work

    def references(self) -> list[Any]:
        pending = [reference for reference in (self.preparing or self.building,) if reference is not None]
        return pending + [reference for reference, _ in self.flights]


class Scheduler:
    """One run. Use once, by `run`."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        spawn: Callable[[], Any],
        packed: bytes,
        environment: Mapping[str, str],
        slots: int,
        max_attempts: int,
        block_timeout: float,
    ):
        self._ledger = ledger
        self._spawn, self._packed, self._environment = spawn, packed, dict(environment)
        self._slots, self._timeout = slots, block_timeout
        # Each slot may try its share: eight workers that fail together once are no eight failures in a row.
        self._build_limit, self._build_failures = max_attempts * slots, 0
        self._actors: list[_Actor] = []
        self._lost = 0
        self._impatient_at: float | None = time.monotonic() + PATIENCE

    def run(self) -> RunReport:
        """Run every block of the ledger to its end.

        Raises:
            ResidError: what the construction of a worker raised, with its type; nothing is retried.
            Exception: what constructions raised again and again; `ResourceError` if their processes died.
        """
        try:
            while self._ledger.queue or any(actor.flights for actor in self._actors):
                self._grow()
                self._feed()
                self._collect()
                self._enforce_deadlines()
                self._complain()
            return self._ledger.report(self._lost)
        finally:
            for actor in self._actors:
                ray.kill(actor.handle)

    def _grow(self) -> None:
        """Start workers for blocks that no starting worker will take."""
        starting = sum(actor.building is not None for actor in self._actors)
        while len(self._actors) < self._slots and starting < len(self._ledger.queue):
            handle = self._spawn()
            preparing = handle.prepare.remote(self._environment)
            self._actors.append(_Actor(handle, preparing, handle.build.remote(self._packed)))
            starting += 1

    def _feed(self) -> None:
        """Hand out blocks: one to every idle worker, a second one only while there are plenty."""
        ready = [actor for actor in self._actors if actor.building is None]
        for depth in range(IN_FLIGHT):
            for actor in ready:
                enough = len(self._ledger.queue) > (len(self._actors) if depth else 0)
                if enough and len(actor.flights) == depth:
                    task = self._ledger.queue.popleft()
                    if not actor.flights:
                        actor.since = time.monotonic()
                    actor.flights.append((actor.handle.run.remote(task.block), task))

    def _collect(self) -> None:
        """Wait for one answer and enter it."""
        owners = {reference: actor for actor in self._actors for reference in actor.references()}
        for reference in ray.wait(list(owners), num_returns=1, timeout=POLL)[0]:
            actor = owners[reference]
            try:
                answer = _answer(reference)
            except RayError as error:
                self._lose(actor, f"its worker died: {brief(error)}")
                return
            if reference == actor.preparing:  # equal, not identical: Ray Client returns copies
                actor.preparing, actor.since, self._impatient_at = None, time.monotonic(), None
            elif reference == actor.building:
                self._enter_build(actor, answer)
            else:
                self._enter_block(actor, reference, answer)

    def _enter_build(self, actor: _Actor, outcome: Outcome) -> None:
        if outcome.error is None:
            actor.building, actor.since, self._build_failures = None, None, 0
        else:
            self._drop(actor)
            self._count_build_failure(outcome.exception())

    def _enter_block(self, actor: _Actor, reference: Any, outcome: Outcome) -> None:
        task = next(task for candidate, task in actor.flights if candidate == reference)
        actor.flights.remove((reference, task))
        actor.since = time.monotonic() if actor.flights else None
        error = self._ledger.settle(task, outcome)
        if error is not None and breaks_process(error):
            logger.warning("replacing a worker that cannot go on: %s", error)
            self._lose(actor, str(error), blame=False)

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for actor in list(self._actors):
            if actor.since is None or now - actor.since <= self._timeout:
                continue
            if not ray.wait(actor.references(), num_returns=1, timeout=0)[0]:  # else its answer is on the way
                self._lose(actor, f"its worker was killed: no answer in {self._timeout:g} seconds (block_timeout)")

    def _lose(self, actor: _Actor, cause: str, *, blame: bool = True) -> None:
        """Drop a worker, enter what it had answered before, and give its blocks to others."""
        self._lost += 1
        self._drop(actor)
        if actor.building is not None:
            problem = f"a worker was lost while it was built; {cause}"
            remedy = "see the cause; often the model needs more memory than one worker has"
            self._count_build_failure(ResourceError(f"{problem}\n  remedy: {remedy}"), at_once=False)
            return
        logger.warning("lost a worker: %s", cause)
        unreached = []
        for reference, task in actor.flights:
            try:
                self._ledger.settle(task, _answer(reference, timeout=DEAD_WORKER))
            except RayError:
                if blame:
                    self._ledger.charge(task, cause)
                    blame = False
                else:
                    unreached.append(task)
        for task in reversed(unreached):
            self._ledger.give_back(task)

    def _drop(self, actor: _Actor) -> None:
        self._actors.remove(actor)
        ray.kill(actor.handle)

    def _count_build_failure(self, error: Exception, *, at_once: bool = True) -> None:
        self._build_failures += 1
        if (at_once and isinstance(error, ResidError)) or self._build_failures >= self._build_limit:
            raise error
        logger.warning("building a worker failed, trying again: %s", error)

    def _complain(self) -> None:
        if self._impatient_at is not None and time.monotonic() > self._impatient_at:
            self._impatient_at = None
            logger.warning("no worker could start for %g seconds: waiting for room in the Ray cluster", PATIENCE)


def _answer(reference: Any, timeout: float | None = None) -> Any:
    """Return the answer of a call. An error of the call itself (a block that does not unpickle over there, say) becomes
    an outcome; only the loss of the process is raised, as RayError."""
    try:
        return ray.get(reference, timeout=timeout)
    except RayTaskError as error:
        return Outcome.of(RuntimeError(str(error)))


def brief(error: RayError) -> str:
    """Return what Ray says of a death, without its lists of ids, common causes and memory statistics."""
    lines = str(error).partition("Some common causes")[0].splitlines()
    text = " ".join(line.strip() for line in lines if not line.startswith("\t") or "pid:" in line).strip()
    return text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + " ..."
