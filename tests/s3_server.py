"""A real S3 server on loopback, and a proxy in front of it that loses requests and answers as networks do.

Import the fixtures into a test module: `from s3_server import bucket as bucket, s3 as s3`. They configure everything
through environment variables, as users of any S3-compatible store do, so subprocesses inherit it.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    # Nothing of the user's own settings.
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1",
}


# -- the server, in its own process ------------------------------------------------------------------------------


class _OneAtATime:
    """Make of moto what S3 is: a request that came half is refused, and a conditional put is one step.

    moto looks whether a key exists and then writes it, in several threads.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length) if length else b""
        if len(body) < length:
            start_response("400 Bad Request", [("Content-Type", "application/xml")])
            return [b"<Error><Code>IncompleteBody</Code><Message>the body was cut</Message></Error>"]
        environ["wsgi.input"] = io.BytesIO(body)
        with self._lock:
            return list(self._application(environ, start_response))


def main() -> None:
    """Serve on a free port of loopback, print it, and end with the process that holds the other end of stdin."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, *_: object) -> None:
            pass

    application = _OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Run a server; yield its endpoint URL. Only this process is ended afterwards, by its id."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    # Kept from filling the pipe, and shown if the server does not start.
    said: list[bytes] = []
    reader = threading.Thread(target=lambda stream=process.stderr: said.extend(stream), daemon=True)
    reader.start()
    try:
        port = process.stdout.readline().strip()
        assert port, b"".join(said).decode()
        yield f"http://127.0.0.1:{int(port)}"
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()


# -- the proxy ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    kind: ``status`` answers `status` with the S3 error `code`; ``drop`` closes the connection; ``lose`` lets the
    request through and closes the connection in place of the answer; ``hang`` never answers; ``cut_request`` sends
    half of the body on and closes; ``cut_answer`` sends half of the answer's body and closes; ``no_condition`` takes
    If-None-Match out, as a server does that does not know it.
    """

    kind: str
    status: int = 503
    code: str = "ServiceUnavailable"


@dataclass
class FaultyProxy:
    """A proxy on loopback. `faults` are used up in order, by requests of `methods` whose path contains `path`."""

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    path: str = ""
    always: Fault | None = None  # when `faults` are used up
    seen: list[str] = field(default_factory=list)  # "PUT /bucket/key"
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.seen.append(f"{method} {path}")
            if method not in self.methods or self.path not in path:
                return None
            return self.faults.pop(0) if self.faults else self.always

    def use(self, patch: pytest.MonkeyPatch, **options: object) -> None:
        """Send this process's S3 requests through the proxy, with these settings of botocore."""
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": self.url, "config_kwargs": options})

    @contextlib.contextmanager
    def serving(self) -> Iterator[FaultyProxy]:
        """Serve until the end of the `with` block."""
        server = _ProxyServer(("127.0.0.1", 0), self)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            self.closing.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], proxy: FaultyProxy) -> None:
        super().__init__(address, _Handler)
        self.proxy = proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that gave up are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _ProxyServer

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.close_connection = True
        fault = proxy.take(self.command, self.path)
        match fault and fault.kind:
            case "hang":
                proxy.closing.wait()
            case "status":
                assert fault is not None
                text = f"<Error><Code>{fault.code}</Code><Message>{fault.code} of the test</Message></Error>".encode()
                self._answer(fault.status, [("Content-Type", "application/xml")], text, len(text))
            case "cut_request":
                self._forward(body, len(body) // 2)
            case "lose":
                self._forward(body, len(body))
            case "drop":
                pass
            case kind:
                if kind == "no_condition":
                    del self.headers["If-None-Match"]
                status, headers, content = self._forward(body, len(body))
                length = int(dict(headers).get("Content-Length", len(content)))
                sent = content[: len(content) // 2] if kind == "cut_answer" else content
                self._answer(status, headers, sent, length)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _forward(self, body: bytes, n_sent: int) -> tuple[int, list[tuple[str, str]], bytes]:
        host = urlsplit(self.server.proxy.endpoint)
        connection = http.client.HTTPConnection(host.hostname or "", host.port)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body[:n_sent])
            if n_sent < len(body):
                return 0, [], b""
            answer = connection.getresponse()
            headers = [
                (k.title(), v) for k, v in answer.getheaders() if k.lower() not in ("connection", "date", "server")
            ]
            return answer.status, headers, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers:
            if name != "Content-Length":
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


# -- fixtures ----------------------------------------------------------------------------------------------------


_endpoints: list[str] = []  # of this process's server, while it runs


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The endpoint URL of this session's server, set in the environment as well."""
    if _endpoints:
        # To pytest, every module that imports this has a fixture of its own. One server serves all: connections are
        # kept by their settings, and do not notice that the environment says something else.
        yield _endpoints[0]
        return
    with running() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        _endpoints.append(endpoint)
        yield endpoint
        _endpoints.clear()


@pytest.fixture
def bucket(s3: str) -> str:
    """The URL of a new, empty bucket."""
    name = f"test-{uuid.uuid4().hex[:16]}"
    connection = http.client.HTTPConnection(urlsplit(s3).netloc)
    connection.request(
        "PUT", f"/{name}", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=test/x/us-east-1/s3/aws4_request"}
    )
    assert connection.getresponse().status == 200
    connection.close()
    return f"s3://{name}"


@pytest.fixture
def faulty(s3: str, bucket: str) -> Iterator[FaultyProxy]:
    """A proxy in front of the server, not in use until `use` is called."""
    with FaultyProxy(s3).serving() as proxy:
        yield proxy


if __name__ == "__main__":
    main()
