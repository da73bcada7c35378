"""Carries requests to an HTTP endpoint and brings replies back: bounded retries, concurrency, rate limit. No torch.

What fails for a reason that goes away (429, 5xx, a timeout, a broken connection, a reply that is no JSON) is tried
again with growing pauses, at least as long as the server asks for; what is wrong with this request alone (400, 413,
422) fails at once; what is wrong with all of them (401, 403, 404) stops everything, as does a row of requests that all
fail.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from store.errors import ResidError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
# So many requests that fail one after the other, each on every attempt: nobody is there.
GIVE_UP_AFTER = 10
_ALL = {401, 403, 404, 405}


class EndpointDownError(ResidError):
    """The endpoint refuses everything, or is not there. Remedy: mend it and run the same command again."""


@dataclass(frozen=True)
class Failure:
    """Why one request brought nothing."""

    problem: str
    rejected: bool = False  # by the server as wrong (4xx): the same request will fail again


@dataclass(frozen=True)
class Request:
    """One POST: path below the base URL, and JSON body."""

    path: str
    body: dict[str, Any]


class JudgeClient:
    """A client of one endpoint. Thread-safe; close it after use (or use it with ``with``)."""

    def __init__(
        self,
        base_url: str,
        key: str | None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 8,
        requests_per_minute: int | None = None,
        sleep: Callable[[float], object] | None = None,
    ):
        try:
            import httpx
        except ImportError:
            raise ResidError("a model judge needs the package httpx\n  remedy: pip install 'resid[judges]'") from None
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=concurrency)
        self._httpx = httpx
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits)
        self.base_url, self.retries, self.concurrency = base_url.rstrip("/"), retries, concurrency
        self._stop = threading.Event()  # ends pauses at once
        self._secret, self._sleep = key, sleep or self._stop.wait
        self._gap = 60.0 / requests_per_minute if requests_per_minute else 0.0  # seconds between requests
        self._next, self._lock = 0.0, threading.Lock()
        self._failed_in_a_row, self._down = 0, ""

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def post_all(self, requests: Iterable[Request]) -> Iterator[Any | Failure]:
        """Yield the JSON of each reply, or why there is none, in the order of the requests.

        Raises:
            EndpointDownError: if the endpoint refuses everything or is not there; before it, the results of the
                requests that were answered are yielded, as far as they come first.
        """
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            futures = [pool.submit(self.post, request) for request in requests]
            try:
                for future in futures:
                    yield future.result()
            finally:
                if not all(future.done() for future in futures):  # whoever reads has stopped
                    self._stop.set()
                    for future in futures:
                        future.cancel()

    def post(self, request: Request) -> Any | Failure:
        """Send one request, again where that may help.

        Raises:
            EndpointDownError: see `post_all`.
        """
        failure = Failure("it was never sent")
        for attempt in range(self.retries + 1):
            if self._down:
                raise EndpointDownError(self._down)
            if self._stop.is_set():
                break
            self._wait_for_turn()
            pause: float | None = None
            try:
                reply = self._client.post(f"{self.base_url}/{request.path}", json=request.body)
            except self._httpx.TimeoutException:
                failure = Failure("no reply in time")
            except self._httpx.HTTPError as error:
                failure = Failure(self._hidden(f"{type(error).__name__}: {error}"))
            else:
                if reply.status_code == 200:
                    try:
                        answer = reply.json()
                    except ValueError:
                        failure = Failure(self._hidden(f"the reply is no JSON: {reply.text[:80]!r}"))
                    else:
                        self._failed_in_a_row = 0
                        return answer
                else:
                    failure = Failure(self._hidden(f"HTTP {reply.status_code}: {reply.text[:200]}".strip()))
                    if reply.status_code in _ALL:
                        self._fall(failure.problem)
                    if reply.status_code not in (408, 409, 425, 429) and reply.status_code < 500:
                        return Failure(failure.problem, rejected=True)
                    pause = _asked_pause(reply.headers.get("retry-after"))
            if attempt < self.retries:
                self._sleep(_pause(attempt, request, pause))
        with self._lock:
            self._failed_in_a_row += 1
            lost = self._failed_in_a_row >= GIVE_UP_AFTER
        if lost:
            self._fall(
                f"{GIVE_UP_AFTER} requests in a row failed on every attempt, the last one with: {failure.problem}"
            )
        return failure

    def _fall(self, problem: str) -> None:
        self._down = (
            f"the judge at {self.base_url} does not serve: {problem}\n"
            "  remedy: check base_url, model and key, or wait; the same command goes on with what is left"
        )
        raise EndpointDownError(self._down)

    def _wait_for_turn(self) -> None:
        if not self._gap:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            self._sleep(turn - now)

    def _hidden(self, text: str) -> str:
        """Servers quote keys that they refuse; they are not to be stored."""
        return text.replace(self._secret, "***") if self._secret else text


def _asked_pause(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _pause(attempt: int, request: Request, asked: float | None) -> float:
    """Return the seconds before the next attempt: doubling, spread by the request's content, at most a minute."""
    digest = hashlib.sha256(repr((attempt, request.body)).encode("utf-8", "replace")).digest()
    spread = 0.5 + int.from_bytes(digest[:4], "big") / 2**32  # 0.5 to 1.5
    pause = FIRST_PAUSE * 2**attempt * spread
    return float(min(max(pause, asked or 0.0), LONGEST_PAUSE))
