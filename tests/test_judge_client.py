"""The client of model judges against a real server that fails in every way that one can."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from judge_server import JudgeServer, failure, grade, judge_server

from pipeline import judge_client
from pipeline.judge_client import EndpointDownError, Failure, JudgeClient, Request


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as running:
        yield running


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def request(text: str = "x") -> Request:
    return Request("chat/completions", {"model": "m", "messages": [{"role": "user", "content": text}]})


def asked(server: JudgeServer, n: int = 1, **options: Any) -> tuple[list[Any], list[float]]:
    """Ask n times; return replies and the pauses that were made (but not slept)."""
    pauses: list[float] = []
    with JudgeClient(server.url, "s3cret", sleep=pauses.append, **options) as client:
        return list(client.post_all([request(str(i)) for i in range(n)])), pauses


def said(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def test_replies_come_in_the_order_of_the_requests(server: JudgeServer) -> None:
    def answer(body: dict[str, Any], number: int) -> Any:
        text = body["messages"][-1]["content"]
        time.sleep(0.02 * (5 - int(text) % 5))
        return grade(text)

    server.answer = answer
    replies, pauses = asked(server, 12, concurrency=4)
    assert [said(reply) for reply in replies] == [str(i) for i in range(12)]
    assert pauses == []
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert server.headers[0]["authorization"] == "Bearer s3cret"


def test_no_key_is_sent_where_there_is_none(server: JudgeServer) -> None:
    with JudgeClient(server.url + "/", None) as client:
        client.post(request())
    assert "authorization" not in server.headers[0]
    assert server.headers[0]["path"] == "/v1/chat/completions"


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_open_than_allowed(server: JudgeServer, concurrency: int) -> None:
    server.delay = 0.05
    asked(server, 9, concurrency=concurrency)
    assert server.most_at_once == concurrency


@pytest.mark.parametrize(
    "bad",
    [failure(429), failure(500), failure(502, "<html>"), failure(503), failure(408), (200, {}, b"not JSON"), None],
    ids=["429", "500", "502", "503", "408", "garbage", "hang-up"],
)
def test_what_passes_is_tried_again_with_growing_pauses(server: JudgeServer, bad: Any) -> None:
    server.answer = lambda body, number: bad if number < 3 else grade(7)
    [reply], pauses = asked(server, retries=3)
    assert said(reply) == "7"
    assert len(pauses) == 3
    for attempt, pause in enumerate(pauses):
        assert 0.5 * 2**attempt <= pause <= 1.5 * 2**attempt


def test_tries_are_bounded_and_the_last_problem_is_told(server: JudgeServer) -> None:
    server.answer = lambda body, number: failure(500, f"broken {number}")
    [reply], pauses = asked(server, retries=2)
    assert reply == Failure("HTTP 500: broken 2")
    assert (len(server.bodies), len(pauses)) == (3, 2)


def test_a_server_that_says_when_is_given_the_time(server: JudgeServer) -> None:
    server.answer = lambda body, number: failure(429, Retry_After="17") if number == 0 else grade(1)
    assert asked(server)[1] == [17.0]
    server.answer = lambda body, number: (
        failure(429, Retry_After=formatdate(time.time() + 30)) if number == 2 else grade(1)
    )
    assert 25 < asked(server)[1][0] <= 30
    server.answer = lambda body, number: failure(429, Retry_After="9999") if number == 4 else grade(1)
    assert asked(server)[1] == [judge_client.LONGEST_PAUSE]
    server.answer = lambda body, number: failure(429, Retry_After="soon") if number == 6 else grade(1)
    assert asked(server)[1][0] <= 1.5


def test_a_reply_that_takes_too_long_is_given_up(server: JudgeServer) -> None:
    server.delay = 1.0
    start = time.monotonic()
    [reply], _ = asked(server, timeout=0.1, retries=1)
    assert reply == Failure("no reply in time")
    assert time.monotonic() - start < 0.9


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_wrong_fails_alone_and_at_once(server: JudgeServer, status: int) -> None:
    server.answer = lambda body, number: (
        failure(status, "too long") if body["messages"][0]["content"] == "1" else grade(5)
    )
    replies, pauses = asked(server, 3)
    assert replies[1] == Failure(f"HTTP {status}: too long", rejected=True)
    assert [said(replies[0]), said(replies[2])] == ["5", "5"]
    assert pauses == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_wrong_with_all_stops_everything_and_hides_the_key(server: JudgeServer, status: int) -> None:
    server.answer = lambda body, number: failure(status, "your key s3cret is no good")
    with pytest.raises(EndpointDownError, match=rf"HTTP {status}: your key \*\*\* is no good") as caught:
        asked(server, 50, concurrency=2)
    assert "remedy" in str(caught.value)
    assert len(server.bodies) <= 4


def test_nobody_there_stops_after_a_row_of_failures(server: JudgeServer) -> None:
    server.answer = lambda body, number: failure(500)
    with pytest.raises(EndpointDownError, match="10 requests in a row failed"):
        asked(server, 100, retries=1, concurrency=1)
    assert len(server.bodies) == judge_client.GIVE_UP_AFTER * 2
    with JudgeClient("http://127.0.0.1:1/v1", None, retries=0) as client:
        assert isinstance(client.post(request()), Failure)


def test_one_success_ends_a_row_of_failures(server: JudgeServer) -> None:
    server.answer = lambda body, number: grade(1) if number % 9 == 8 else failure(500)
    replies, _ = asked(server, 40, retries=0, concurrency=1)
    assert sum(isinstance(reply, Failure) for reply in replies) == 36


def test_a_rate_limit_spaces_requests_out(server: JudgeServer) -> None:
    with JudgeClient(server.url, None, requests_per_minute=1200, concurrency=4) as client:
        list(client.post_all([request() for _ in range(6)]))
    assert server.times[-1] - server.times[0] >= 5 * 0.05 * 0.9


def test_who_stops_reading_ends_the_pauses(server: JudgeServer) -> None:
    server.answer = lambda body, number: failure(500) if number else grade(1)
    start = time.monotonic()
    with JudgeClient(server.url, None, retries=8, concurrency=1) as client:
        replies = client.post_all([request(), request()])
        next(replies)
        replies.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 5
