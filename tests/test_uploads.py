"""Uploads in parts: their sizes, and that none is forgotten."""

from __future__ import annotations

import gc
import http.server
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lance_artifact as la
from conftest import encoded
from test_object_store import client, keys, s3  # noqa: F401
from test_process import python


def uploads(options: dict[str, str]) -> list[str]:
    """Uploads that are open, for which a store asks money."""
    return [u["Key"] for u in client(options).list_multipart_uploads(Bucket="vectors").get("Uploads", [])]


def started(options: dict[str, str], name: str) -> la.PartitionArtifactBuilder:
    """A builder with several uploads of several parts in progress."""
    made = la.PartitionArtifactBuilder(
        f"s3://vectors/{name}", num_partitions=4, pq_code_width=64, memory_limit=64 << 20, num_buckets=2, storage_options=options
    )  # fmt: skip
    for n in range(8):
        made.append_batch(encoded(100_000, 4, 64, first=n * 100_000))
    return made


@pytest.fixture
def store(s3: dict[str, str]) -> Iterator[dict[str, str]]:  # noqa: F811
    assert uploads(s3) == []
    yield s3
    assert uploads(s3) == []


def test_an_abort_waits_for_those_of_its_uploads(store: dict[str, str]) -> None:
    made = started(store, "aborted")
    assert uploads(store)
    made.abort()
    assert uploads(store) == [] and keys(store, "aborted") == []


def test_a_dropped_builder_leaves_no_upload(store: dict[str, str]) -> None:
    made = started(store, "dropped")
    assert uploads(store)
    del made
    gc.collect()
    assert uploads(store) == [] and keys(store, "dropped") == []


def test_an_exception_leaves_no_upload(store: dict[str, str]) -> None:
    with pytest.raises(ZeroDivisionError), started(store, "left"):
        assert uploads(store)
        raise ZeroDivisionError
    assert uploads(store) == [] and keys(store, "left") == []


def test_the_end_of_the_interpreter_leaves_no_upload(store: dict[str, str]) -> None:
    script = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_uploads import started, uploads
options = json.loads(sys.argv[1])
kept = started(options, "ended")
assert uploads(options)
"""
    done = python(script, json.dumps(store))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert uploads(store) == [] and keys(store, "ended") == []


class Failing(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a store, and fails the third part of every upload."""

    target = ""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if "partNumber=3" in self.path:
            self.answer(500, b"")
            return
        if self.command == "DELETE":
            time.sleep(0.5)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        # Without a type urllib says that it is a form, and the store drops it.
        headers.setdefault("Content-type", "application/octet-stream")
        request = urllib.request.Request(self.target + self.path, body or None, headers, method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                self.answer(answer.status, answer.read(), answer.headers)
        except urllib.error.HTTPError as error:
            self.answer(error.code, error.read(), error.headers)

    def answer(self, status: int, body: bytes, headers: Any = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            if key.lower() in ("etag", "last-modified", "content-type"):
                self.send_header(key, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward


def test_a_failed_upload_is_aborted(store: dict[str, str]) -> None:
    handler = type("Handler", (Failing,), {"target": store["aws_endpoint"]})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        options = {
            **store,
            "aws_endpoint": f"http://127.0.0.1:{server.server_address[1]}",
            "client_max_retries": "0",
        }
        made = la.PartitionArtifactBuilder(
            "s3://vectors/failed",
            num_partitions=1,
            pq_code_width=64,
            memory_limit=64 << 20,
            storage_options=options,
        )
        with pytest.raises(la.StorageError, match="failed"):
            for n in range(20):
                made.append_batch(encoded(50_000, 1, 64, first=n * 50_000))
            made.finish()
        # Before anybody aborts the builder: the error does not wait for it, so it may come a little later.
        deadline = time.monotonic() + 30
        while uploads(store) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert uploads(store) == []
        made.abort()
        assert keys(store, "failed") == []
    finally:
        server.shutdown()
        server.server_close()


def test_what_cannot_end_well_is_refused_at_the_start(store: dict[str, str]) -> None:
    """A file has 10,000 parts at most: memory for two of a size that will do, or an error that says how much it takes."""
    options: dict[str, Any] = {"num_partitions": 1024, "pq_code_width": 64, "storage_options": store}
    with pytest.raises(
        la.InvalidInputError, match="100000000000 rows in uploads of at most 10000 parts"
    ) as error:
        la.PartitionArtifactBuilder(
            "s3://vectors/x", **options, memory_limit=1 << 30, expected_rows=100_000_000_000
        )
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert keys(store, "x") == []
    la.PartitionArtifactBuilder(
        "s3://vectors/x", **options, memory_limit=needed, expected_rows=100_000_000_000
    ).abort()
    la.PartitionArtifactBuilder(
        "s3://vectors/x", **options, memory_limit=1 << 30, expected_rows=10_000_000
    ).abort()


def test_parts_are_of_one_size(store: dict[str, str]) -> None:
    """As some stores want them; without expected rows as large as an eighth of the limit allows."""
    with la.PartitionArtifactBuilder(
        "s3://vectors/parts", num_partitions=1, pq_code_width=64, memory_limit=64 << 20, storage_options=store
    ) as made:
        for n in range(8):
            made.append_batch(encoded(50_000, 1, 64, first=n * 50_000))
    key = "parts/partitions/bucket-00000.lance"
    sizes = []
    for number in range(1, 100):
        part = client(store).head_object(Bucket="vectors", Key=key, PartNumber=number)
        sizes.append(part["ContentLength"])
        if number == part["PartsCount"]:
            break
    assert len(sizes) > 3 and set(sizes[:-1]) == {8 << 20} and sizes[-1] <= 8 << 20
