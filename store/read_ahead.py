"""What is read next is announced to the system or fetched from object storage before its turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from store.readers import OpenShard

if TYPE_CHECKING:
    from store.selection import Part

AHEAD = 16  # chunks of about 4 MiB that are announced to the system before their turn
FETCHERS = 4  # threads of one reader of object storage
REQUEST = 2 * 2**20  # bytes that one of them fetches at a time, one chunk at least
# Of a whole process, as they are stored: on their way through HTTP and zarr-python they lie in memory some six times.
IN_FLIGHT = 8 * 2**20

Step = tuple["Part", int]  # a part and an index into its layers


class Budget:
    """Bytes that several readers share. Each may hold one request whatever others hold, so none waits for another."""

    def __init__(self, most: int):
        self._most, self.used = most, 0
        self._lock = threading.Lock()

    def take(self, nbytes: int, even_so: bool) -> bool:
        """Take `nbytes` if they are left, or `even_so`; return whether they were taken."""
        with self._lock:
            if not even_so and self.used + nbytes > self._most:
                return False
            self.used += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes


_in_flight = Budget(IN_FLIGHT)


def announced(component: str, steps: Sequence[Step]) -> Iterator[tuple[Part, int, OpenShard]]:
    """Yield every step with its opened shard on local disk, `AHEAD` steps after it was announced to the system."""

    def announce(part: Part, index: int) -> None:
        part.generation.reader.will_need(component, part.block, [part.stored_at[index]])

    for step in steps[:AHEAD]:
        announce(*step)
    at = 0
    while at < len(steps):
        part = steps[at][0]
        with part.generation.open_block(component, part.block) as opened:
            while at < len(steps) and steps[at][0] is part:
                if at + AHEAD < len(steps):
                    announce(*steps[at + AHEAD])
                yield part, steps[at][1], opened
                at += 1


def fetched(component: str, steps: Iterable[Step]) -> Iterator[tuple[Part, int, OpenShard]]:
    """Yield every step with its chunk in memory; the next ones are on their way, within the process's `IN_FLIGHT`."""

    def fetch(part: Part, indices: list[int]) -> npt.NDArray[Any]:
        with part.generation.open_block(component, part.block) as opened:
            return opened.read([part.stored_at[index] for index in indices])

    waiting = deque(_requests(steps))
    running: deque[tuple[Part, list[int], int, Future[npt.NDArray[Any]]]] = deque()
    remote = any(not part.generation.location.is_local for part, _, _ in waiting)
    most = FETCHERS if remote else 1
    with ThreadPoolExecutor(most) as threads, closing(_Held()) as held:

        def send(even_so: bool) -> None:
            while waiting and len(running) < most and held.take(waiting[0][2], even_so and not running):
                part, indices, nbytes = waiting.popleft()
                running.append((part, indices, nbytes, threads.submit(fetch, part, indices)))

        while waiting or running:
            send(even_so=True)
            part, indices, nbytes, future = running.popleft()
            found = InMemory(future.result(), {part.stored_at[index]: i for i, index in enumerate(indices)})
            send(even_so=False)
            for index in indices:
                yield part, index, found
            del found, future
            held.give_back(nbytes)


def _requests(steps: Iterable[Step]) -> Iterator[tuple[Part, list[int], int]]:
    """Join the steps of a block to what is fetched at a time: part, indices of its layers, bytes.

    Object storage takes its time for each request, a disk does not.
    """
    part: Part | None = None
    indices: list[int] = []
    chunk = 0
    for following, index in steps:
        full = (len(indices) + 1) * chunk > REQUEST or following.generation.location.is_local
        if part is not None and (following is not part or full):
            yield part, indices, len(indices) * chunk
            indices = []
        if following is not part:
            part, chunk = following, following.generation.plan.shard_shape.chunk_bytes
        indices.append(index)
    if part is not None:
        yield part, indices, len(indices) * chunk


class _Held:
    """What one reader holds of the budget; given back when it ends, however it ends."""

    def __init__(self) -> None:
        self._nbytes = 0

    def take(self, nbytes: int, even_so: bool) -> bool:
        taken = _in_flight.take(nbytes, even_so)
        self._nbytes += nbytes * taken
        return taken

    def give_back(self, nbytes: int) -> None:
        self._nbytes -= nbytes
        _in_flight.give_back(nbytes)

    def close(self) -> None:
        self.give_back(self._nbytes)


class InMemory:
    """Chunks of one block that are in memory already."""

    def __init__(self, values: npt.NDArray[Any], at: dict[int, int]):
        self._values, self._at = values, at

    def read(self, layers: Sequence[int], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        if out is None:
            out = np.empty((len(layers), *self._values.shape[1:]), self._values.dtype)
        for into, layer in zip(out, layers, strict=True):
            into[...] = self._values[self._at[layer]][: len(into)]
        return out
