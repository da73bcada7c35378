"""Blocks of work on a Ray cluster, on a Ray of one's own, or in this process: the one door to Ray.

`Cluster.run_blocks` is for work that holds a model; `Cluster.map` for stateless work on CPUs. The parts behind it:
`cluster_connect` (where Ray runs), `cluster_scheduler` (the loop), `cluster_ledger` (what became of each block),
`cluster_worker` (the process that holds the model). Importing this module loads neither Ray nor torch.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.cluster_ledger import BlockFailure, Ledger, RunReport, run_inline
from pipeline.cluster_worker import Block, Host, Outcome, Worker, call, overlaps, worker_environment
from store.errors import ResourceError
from store.ray_settings import RaySettings

if TYPE_CHECKING:
    from pipeline.cluster_connect import Connection

__all__ = ["Block", "BlockFailure", "Cluster", "RunReport", "Worker"]


class Cluster:
    """Where blocks run. A context manager; nothing is started or connected before there is work.

    On leaving it, its workers are gone and a Ray that it started has stopped. A connection to Ray that this process
    had already is used and left as it is.
    """

    def __init__(self, settings: RaySettings):
        self.settings = settings
        self._connection: Connection | None = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, and stop it if it was started here. A later run connects anew."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @property
    def at_hand(self) -> bool:
        """Whether work would go to a Ray that runs already, or that the study names; ``auto`` need not start one."""
        if self.settings.address != "auto":
            return self.settings.address != "off"
        if self._connection is not None or os.environ.get("RAY_ADDRESS"):
            return True
        from pipeline import cluster_connect

        return cluster_connect.connected()

    def run_blocks(
        self,
        factory: Callable[..., Worker],
        kwargs: Mapping[str, Any],
        blocks: Sequence[Block],
        *,
        on_done: Callable[[Block, Any], None] | None = None,
    ) -> RunReport:
        """Run every block on one of several workers, each built once by ``factory(**kwargs)``.

        A block whose worker raises, dies or exceeds the deadline is tried again elsewhere, ``max_attempts`` times in
        all, then set aside: the others go on, and the report names it. Errors that would come again (`NonFiniteError`,
        `StudyError`, `MismatchError`, `ModelError`) set it aside at once. A worker may die after it committed a block
        and before it could say so: that block runs again, so commits must be idempotent.

        Args:
            factory: importable by name on the workers, as are the classes of kwargs, blocks and results.
            on_done: called here, in order of completion, with a block and what its run returned.

        Raises:
            ResidError: what ``factory`` raised, with its type and without a second try.
            Exception: what else ``factory`` raised max_attempts times in a row.
            ResourceError: if no Ray answers, or no node of the cluster can ever hold a worker.
            ValueError: if two blocks have one id.
        """
        settings = self.settings
        ledger = Ledger(blocks, settings.max_attempts, on_done)
        if not blocks:
            return ledger.report(0)
        if settings.address == "off":
            return run_inline(ledger, factory, kwargs, settings.max_attempts)
        self._connect()
        import ray

        from pipeline.cluster_scheduler import IN_FLIGHT, Scheduler

        nodes = ray.nodes()
        demand = worker_demand(settings, nodes)
        room = require_room(nodes, demand, "a worker needs", "lower cpus_per_worker or gpus_per_worker")
        workers = room if settings.workers == "auto" else settings.workers
        host = ray.remote(Host).options(
            num_cpus=demand["CPU"],
            num_gpus=demand.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=IN_FLIGHT if overlaps(factory) else 1,
            **self._runtime_env(),
        )
        with _ray_errors():
            return Scheduler(
                ledger,
                spawn=host.remote,
                packed=_pack((factory, dict(kwargs))),
                environment=worker_environment(settings.cpus_per_worker) | settings.env_vars,
                slots=min(workers, len(blocks)),
                max_attempts=settings.max_attempts,
                block_timeout=settings.block_timeout,
            ).run()

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], *, num_cpus: int = 1) -> list[Any]:
        """Return ``[function(item) for item in items]``, computed in parallel on CPUs.

        ``function`` is importable by name on the workers. A task whose process dies runs again, ``max_attempts`` times
        in all; one that raises does not.

        Raises:
            Exception: what ``function`` raised, with its type.
            ResourceError: if a task's process died on every attempt, or no node has ``num_cpus`` CPUs.
        """
        if not items:
            return []
        if self.settings.address == "off":
            return [function(item) for item in items]
        self._connect()
        import ray

        room = require_room(ray.nodes(), {"CPU": num_cpus}, "a task needs", "ask for fewer CPUs per task")
        task = ray.remote(call).options(
            num_cpus=num_cpus,
            max_retries=self.settings.max_attempts - 1,
            retry_exceptions=False,
            **self._runtime_env(),
        )
        environment = worker_environment(num_cpus) | self.settings.env_vars
        results: list[Any] = [None] * len(items)
        waiting = iter(enumerate(items))
        running: dict[Any, int] = {}
        with _ray_errors():
            packed = ray.put(_pack(function))
            # Few tasks in flight instead of all: after an error or Ctrl-C they run out by themselves. Cancelling them
            # can crash the driver: Ray 2.60 aborts when a task ends while it is being cancelled.
            while True:
                for index, item in itertools.islice(waiting, 2 * room - len(running)):
                    running[task.remote(packed, item, environment)] = index
                if not running:
                    return results
                for reference in ray.wait(list(running), num_returns=1)[0]:
                    index = running.pop(reference)
                    results[index] = self._result(reference, index)

    def _result(self, reference: Any, index: int) -> Any:
        import ray
        from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

        from pipeline.cluster_scheduler import brief

        try:
            outcome: Outcome = ray.get(reference)
        except RayTaskError as error:  # the item did not unpickle over there, or the result did not pickle
            raise RuntimeError(f"item {index}: {error}") from None
        except (WorkerCrashedError, OutOfMemoryError) as error:
            raise ResourceError(
                f"item {index}: its process died on each of {self.settings.max_attempts} attempts: {brief(error)}\n"
                "  remedy: often it is memory; give each task more CPUs, so that fewer run at once"
            ) from None
        if outcome.error is not None:
            raise outcome.exception()
        return outcome.value

    def _connect(self) -> None:
        if self._connection is not None:
            return
        from pipeline import cluster_connect  # sets the environment that Ray reads when it is imported

        address = self.settings.address
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS") or "local"
        if cluster_connect.connected():
            return
        self._connection = cluster_connect.start_local() if address == "local" else cluster_connect.join(address)

    def _runtime_env(self) -> dict[str, Any]:
        """Variables of the study must be there before the process starts (LD_LIBRARY_PATH, say)."""
        return {"runtime_env": {"env_vars": dict(self.settings.env_vars)}} if self.settings.env_vars else {}


def worker_demand(settings: RaySettings, nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what one worker asks of its node: GPUs only where the cluster has any, else it would wait for ever."""
    demand: dict[str, float] = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker and any(node["Alive"] and node["Resources"].get("GPU") for node in nodes):
        demand["GPU"] = settings.gpus_per_worker
    return demand


def require_room(nodes: Sequence[Mapping[str, Any]], demand: Mapping[str, float], who: str, remedy: str) -> int:
    """Return how many copies of ``demand`` fit on the nodes of the cluster, each copy on one node.

    Raises:
        ResourceError: if none fits on any node, however long one waits; it says what the cluster has.
    """
    present = [node["Resources"] for node in nodes if node["Alive"]]
    # Rounding first: 0.3 / 0.1 is less than 3.
    room: int = sum(
        min(math.floor(round(node.get(name, 0) / amount, 6)) for name, amount in demand.items()) for node in present
    )
    if not room:
        need = " and ".join(f"{amount:g} {name}" for name, amount in demand.items())
        has = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in present)
        raise ResourceError(
            f"{who} {need} on one node, and no node of this Ray cluster has that\n  nodes: {has or 'none'}"
            f"\n  remedy: {remedy}, or add a larger node"
        )
    return room


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Name the remedy when the cluster itself goes away."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise ResourceError(
            f"the Ray cluster failed: {error}\n  remedy: run the same command again; committed blocks are kept"
        ) from error


def _pack(value: object) -> bytes:
    from ray import cloudpickle

    packed: bytes = cloudpickle.dumps(value)
    return packed
