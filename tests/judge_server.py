"""A real HTTP server on loopback that speaks the chat completions API, and misbehaves as it is told to."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


def grade(value: object, *, logprobs: dict[str, float] | None = None) -> Reply:
    """A sound reply that says `value`."""
    choice: dict[str, Any] = {"finish_reason": "stop", "message": {"role": "assistant", "content": str(value)}}
    if logprobs is not None:
        top = [{"token": token, "logprob": math.log(p)} for token, p in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": str(value), "logprob": -0.1, "top_logprobs": top}]}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def failure(status: int, text: str = "no", **headers: str) -> Reply:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, text.encode()


@dataclass
class JudgeServer:
    """What the server was asked, and how it answers: `answer` gets the request's body and its number from 0."""

    url: str
    answer: Callable[[dict[str, Any], int], Reply | None] = lambda body, number: grade(80)
    delay: float = 0.0  # seconds before an answer
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0

    def texts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """Serve until the block ends."""
    lock = threading.Lock()
    at_once = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal at_once
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.headers.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
                state.times.append(time.monotonic())
                at_once += 1
                state.most_at_once = max(state.most_at_once, at_once)
            try:
                time.sleep(state.delay)
                reply = state.answer(body, number)
            finally:
                with lock:
                    at_once -= 1
            if reply is None:  # hang up without a word
                self.close_connection = True
                return
            status, headers, content = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients that do not wait are part of the test

    server = Server(("127.0.0.1", 0), Handler)
    state = JudgeServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
