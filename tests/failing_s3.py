"""A server in front of an S3 server, at which any request can go wrong in any of the ways that a store and a network have."""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

# What becomes of a request. Without it, it is passed on.
HOWS = {
    "500": "fails",
    "503": "fails, as where a store wants its clients to slow down",
    "403": "is refused",
    "lost": "is passed on, and its answer is an error",
    "412": "is passed on, and its answer is that a condition did not hold",
    "twice": "is passed on twice, and the answer is the second",
    "late": "fails, and is passed on a second later",
    "slow": "is answered a second later",
    "hang": "is never answered",
    "drop": "the connection ends without an answer",
    "heard": "is passed on, and the connection ends without an answer",
    "cut": "the connection ends in the middle of the request",
    "short": "the connection ends in the middle of the answer",
}

_ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "lost": (500, "InternalError"),
    "late": (500, "InternalError"),
    "412": (412, "PreconditionFailed"),
}
_HANGS_FOR = 6.0


def error(code: str) -> bytes:
    return (
        f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made for a test</Message></Error>".encode()
    )


@contextmanager
def proxy(
    s3: dict[str, str], act: Callable[[str, str, dict[str, str]], str | None], bucket: str = "vectors"
) -> Iterator[dict[str, str]]:
    """Options for the server, which does to each request what `act(method, key, headers)` says: a name of `HOWS`, or None. The key has the
    query of the request behind it where there is one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def passed_on(
            self, body: bytes, asked: tuple[str, str, dict[str, str]] | None = None
        ) -> tuple[int, bytes, list[tuple[str, str]]]:
            command, path, headers = asked or (self.command, self.path, self.given)
            connection = http.client.HTTPConnection(urlsplit(s3["aws_endpoint"]).netloc)
            connection.request(command, path, body, headers)
            response = connection.getresponse()
            said = response.status, response.read(), response.getheaders()
            connection.close()
            return said

        def ends(self) -> None:
            self.close_connection = True

        def handle_any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            self.given = {
                k: v for k, v in self.headers.items() if k.lower() not in ("connection", "content-length")
            }
            parts = urlsplit(self.path)
            key = parts.path.removeprefix(f"/{bucket}/") + (f"?{parts.query}" if parts.query else "")
            how = act(self.command, key, self.given)
            if how == "cut":
                self.rfile.read(size // 2)
                return self.ends()
            body = self.rfile.read(size)
            if how == "drop":
                return self.ends()
            if how == "hang":
                stopped.wait(_HANGS_FOR)
                return self.ends()
            if how == "slow":
                stopped.wait(1)
            if how == "late":
                # By then the connection carries another request.
                asked = (self.command, self.path, self.given)
                threading.Timer(1, self.passed_on, [body, asked]).start()
            answer: tuple[int, bytes, list[tuple[str, str]]] = (500, b"", [])
            if how not in ("500", "503", "403", "late"):
                answer = self.passed_on(body)
            if how == "twice":
                answer = self.passed_on(body)
            if how == "heard":
                return self.ends()
            if how in _ERRORS:
                status, code = _ERRORS[how]
                answer = (status, error(code), [("Content-Type", "application/xml")])
            return self.answer(*answer, half=how == "short")

        def answer(self, status: int, body: bytes, headers: list[tuple[str, str]], half: bool) -> None:
            self.send_response(status)
            hop = ("connection", "transfer-encoding", "content-length", "date", "server")
            for name, value in headers:
                if name.lower() not in hop:
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if half else body)
            if half:
                self.ends()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Clients end in the middle, too: it is no news."""

    stopped = threading.Event()
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield {
                **s3,
                "aws_endpoint": f"http://127.0.0.1:{server.server_port}",
                "client_max_retries": "0",
                "client_retry_timeout": "5",
            }
        finally:
            stopped.set()
            server.shutdown()
            thread.join()
