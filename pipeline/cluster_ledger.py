"""Which blocks wait, which are done and which are set aside; and the run of them without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.cluster_worker import DETERMINISTIC, Block, Outcome, Worker, attempt, overlaps
from store.errors import ResidError


@dataclass(frozen=True)
class BlockFailure:
    """A block that was set aside, after how many attempts, and what the last one said."""

    block_id: str
    attempts: int
    cause: str


@dataclass(frozen=True)
class RunReport:
    """What became of the blocks of one run; ``lost_workers`` counts processes that died or had to be killed."""

    done: int
    failed: tuple[BlockFailure, ...]
    lost_workers: int


@dataclass(frozen=True)
class Task:
    block: Block
    attempt: int  # from 1


class Ledger:
    """The blocks of one run. Every block ends in ``done`` or in ``failed``."""

    def __init__(self, blocks: Sequence[Block], max_attempts: int, on_done: Callable[[Block, Any], None] | None):
        repeated = len(blocks) - len({block.id for block in blocks})
        if repeated:
            raise ValueError(f"{repeated} of {len(blocks)} blocks repeat another block's id; ids must be unique")
        self.queue = deque(Task(block, 1) for block in blocks)
        self.done = 0
        self.failed: list[BlockFailure] = []
        self._max_attempts = max_attempts
        self._on_done = on_done

    def settle(self, task: Task, outcome: Outcome) -> Exception | None:
        """Enter the answer for a block; return the error that it was, if it was one."""
        if outcome.error is None:
            self.done += 1
            if self._on_done is not None:
                self._on_done(task.block, outcome.value)
            return None
        error = outcome.exception()
        self.charge(task, outcome.cause, final=isinstance(error, DETERMINISTIC))
        return error

    def charge(self, task: Task, cause: str, *, final: bool = False) -> None:
        """Enter a failed attempt: try again after all waiting blocks, or set the block aside."""
        if final or task.attempt >= self._max_attempts:
            self.failed.append(BlockFailure(task.block.id, task.attempt, cause))
        else:
            self.queue.append(Task(task.block, task.attempt + 1))

    def give_back(self, task: Task) -> None:
        """Put a block that its worker never came to at the head of the queue, its attempts as they were."""
        self.queue.appendleft(task)

    def report(self, lost_workers: int) -> RunReport:
        return RunReport(self.done, tuple(self.failed), lost_workers)


def run_inline(
    ledger: Ledger, factory: Callable[..., Worker], kwargs: Mapping[str, Any], max_attempts: int
) -> RunReport:
    """Run all blocks in this process. A hang has no deadline here, and a crash takes the caller with it.

    A worker that overlaps writes on a thread of its own while the next block is computed, and is at most one ahead.
    """
    worker: Any = _build_inline(factory, kwargs, max_attempts)
    if not overlaps(type(worker)):
        while ledger.queue:
            task = ledger.queue.popleft()
            ledger.settle(task, attempt(worker.run, task.block))
        return ledger.report(0)
    writing: tuple[Task, Future[Outcome]] | None = None  # the block before, on its way to the store
    with ThreadPoolExecutor(1, "write") as writer:
        while ledger.queue or writing is not None:
            computed = None
            if ledger.queue:
                task = ledger.queue.popleft()
                computed = attempt(worker.compute, task.block)
            if writing is not None:
                (before, future), writing = writing, None
                ledger.settle(before, future.result())
            if computed is not None and computed.error is None:
                writing = task, writer.submit(attempt, computed.value)
            elif computed is not None:
                ledger.settle(task, computed)
    return ledger.report(0)


def _build_inline(factory: Callable[..., Worker], kwargs: Mapping[str, Any], max_attempts: int) -> Worker:
    for _ in range(max_attempts - 1):
        try:
            return factory(**kwargs)
        except ResidError:
            raise
        except Exception:
            continue
    return factory(**kwargs)
