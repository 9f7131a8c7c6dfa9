"""Vended credentials that end while a build goes on: they are renewed where the user's handle gets them."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import pyarrow as pa
import pytest
from lance.namespace import DescribeTableResponse
from lance_namespace import LanceNamespace

import lance_artifact as la
from conftest import column, vectors
from lance_artifact._ray_options import opened
from lance_artifact._renewed import Answers, Vended, open_dataset
from test_object_store import client, s3  # noqa: F401

K, M, DIM, ROWS = 4, 4, 16, 2000
LIFETIME = 1.5


class Gate:
    """In front of the object store: lets pass what is signed with a key that is still valid."""

    def __init__(self, endpoint: str) -> None:
        self.ends: dict[str, float] = {}
        self.refused = 0
        gate, (host, port) = self, endpoint.removeprefix("http://").split(":")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                if self.path == "/issue":
                    self.answer(200, [], json.dumps(gate.issue()).encode())
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                key = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
                if key is None or gate.ends.get(key[1], 0) < time.time():
                    gate.refused += 1
                    self.answer(403, [], b"<Error><Code>ExpiredToken</Code></Error>")
                    return
                connection = http.client.HTTPConnection(host, int(port))
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                dropped = ("content-length", "transfer-encoding", "connection")
                kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped]
                self.answer(answer.status, kept, answer.read(), answer.getheader("Content-Length"))
                connection.close()

            def answer(
                self, status: int, headers: list[tuple[str, str]], body: bytes, length: Any = None
            ) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header(
                    "Content-Length", length if self.command == "HEAD" and length else str(len(body))
                )
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def issue(self) -> dict[str, str]:
        """Options with a key of their own, which lasts a little longer than they say."""
        key = f"key{len(self.ends)}"
        self.ends[key] = time.time() + 2 * LIFETIME
        return {
            "aws_access_key_id": key,
            "aws_secret_access_key": "secret",
            "aws_region": "us-east-1",
            "aws_endpoint": self.endpoint,
            "allow_http": "true",
            "client_max_retries": "0",
            "expires_at_millis": str(int((time.time() + LIFETIME) * 1000)),
            "refresh_offset_millis": "0",
        }


class Asking:
    """A callable that gives options with a new key, from any process."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def __call__(self) -> dict[str, str]:
        given: dict[str, str] = json.loads(urllib.request.urlopen(f"{self.endpoint}/issue").read())
        return given

    issue = __call__


class Vending(LanceNamespace):
    def __init__(self, gate: Gate | Asking, location: str) -> None:
        self.gate, self.location = gate, location

    def namespace_id(self) -> str:
        return f"vending {self.gate.endpoint}"

    def describe_table(self, request: Any) -> DescribeTableResponse:
        return DescribeTableResponse(location=self.location, storage_options=self.gate.issue())


@pytest.fixture
def gate(s3: dict[str, str]) -> Iterator[Gate]:  # noqa: F811
    made = Gate(s3["aws_endpoint"])
    yield made
    made.server.shutdown()
    made.server.server_close()


def slowly(step: Any) -> None:
    """Credentials end in each stage."""
    if step.event == "start" and step.stage in ("train_ivf", "shuffle", "merge_partitions"):
        time.sleep(2.2 * LIFETIME)


@pytest.mark.parametrize(
    "artifact", [None, "s3://vectors/vended-artifact"], ids=["local artifact", "artifact in the store"]
)
def test_a_build_outlives_its_credentials(artifact: str | None, gate: Gate, s3: dict[str, str]) -> None:  # noqa: F811
    where = f"s3://vectors/vended-{'remote' if artifact else 'local'}.lance"
    array = vectors(ROWS, DIM)
    lance.write_dataset(
        pa.table({"id": pa.array(range(ROWS)), "vector": column(array)}), where, storage_options=s3, max_rows_per_file=700
    )  # fmt: skip
    ds = lance.dataset(namespace_client=Vending(gate, where), table_id=["t"])
    la.create_index(
        ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=7, max_iters=2, backend="cpu", progress=slowly,
        artifact_uri=artifact,
    )  # fmt: skip
    assert len(gate.ends) >= 3, "they were renewed"
    assert ds.stats.index_stats("vector_idx")["num_indexed_rows"] == ROWS
    if artifact:
        assert la.Artifact.open(artifact, s3).verify().ok
    assert client(s3).list_multipart_uploads(Bucket="vectors").get("Uploads", []) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_dataset_by_its_path_outlives_what_a_callable_gave(
    gate: Gate,
    s3: dict[str, str],  # noqa: F811
    resume: bool,
) -> None:
    where = f"s3://vectors/asked-{resume}.lance"
    lance.write_dataset(
        pa.table({"vector": column(vectors(ROWS, DIM))}), where, storage_options=s3, max_rows_per_file=700
    )
    built = la.create_index(
        where,
        "vector",
        num_partitions=K,
        num_sub_vectors=M,
        sample_rate=7,
        max_iters=2,
        backend="cpu",
        progress=slowly,
        storage_options=gate.issue,
        **({"artifact_uri": f"{where}-run", "resume": True, "num_shards": 2} if resume else {}),
    )
    assert len(gate.ends) >= 3, "they were renewed"
    assert built.stats.index_stats("vector_idx")["num_indexed_rows"] == ROWS


def test_a_run_opens_its_dataset_with_what_a_callable_gives(
    gate: Gate,
    s3: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    where = "s3://vectors/asked-run.lance"
    ds = lance.write_dataset(pa.table({"vector": column(vectors(ROWS, DIM))}), where, storage_options=s3)
    planned = la.plan(
        ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=7, backend="cpu", calibrate=False
    )
    la.Run.create(planned, tmp_path / "run")
    la.resume_run(tmp_path / "run", dataset_storage_options=gate.issue, backend="cpu", progress=slowly)
    assert len(gate.ends) >= 3, "they were renewed"
    assert la.clean_run(tmp_path / "run", dataset_storage_options=gate.issue, dry_run=True) == []


@pytest.mark.parametrize("answer", [3, None, {"aws_secret_access_key": 3, "aws_session_token": "a-secret"}])
def test_a_callable_that_gives_no_options_any_more_says_so(
    gate: Gate,
    s3: dict[str, str],  # noqa: F811
    answer: Any,
) -> None:
    where = "s3://vectors/asked-no-more.lance"
    lance.write_dataset(
        pa.table({"vector": column(vectors(9, DIM))}), where, storage_options=s3, mode="overwrite"
    )
    answers = [gate.issue()]
    opened = open_dataset(where, lambda: answers.pop() if answers else answer)
    assert opened.count_rows() == 9
    time.sleep(2.2 * LIFETIME)
    with pytest.raises(OSError, match=r"the callable gave a .*, expected a dict of strings") as error:
        opened.latest_storage_options()
    assert "a-secret" not in str(error.value)
    if answer is not None:
        with pytest.raises(la.InvalidTypeError, match=r"the callable gave a .*, expected a dict of strings"):
            open_dataset(where, lambda: answer)


def test_a_callable_whose_connection_breaks_is_a_failure_of_storage(tmp_path: Path) -> None:
    """Another try may mend it, where an argument that cannot be used stays one."""
    where = str(tmp_path / "t.lance")
    ds = lance.write_dataset(pa.table({"vector": column(vectors(ROWS, DIM))}), where)
    planned = la.plan(
        ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=7, backend="cpu", calibrate=False
    )

    pickling = SimpleNamespace(cloudpickle=SimpleNamespace(dumps=lambda _: b""))

    def raising(error: Exception) -> Any:
        def ask() -> dict[str, str]:
            raise error

        return ask

    for error, expected in (
        (ConnectionResetError("reset by peer"), la.StorageError),
        (ValueError("no such role"), la.InvalidInputError),
    ):
        run = la.Run.create(planned, tmp_path / "run", dataset_storage_options=raising(error))
        with pytest.raises(expected, match=f"cannot be opened: {error}"):
            run.opened()
        with pytest.raises(expected, match=f"cannot be opened: {error}"):
            opened(pickling, where, raising(error))
    with pytest.raises(la.StorageError, match="reset by peer"):
        Answers(raising(ConnectionResetError("reset by peer")))()
    with pytest.raises(la.InvalidInputError):
        Answers(raising(la.InvalidInputError("no")))()


class Refusing:
    """A client of a namespace, which gives one answer, or an error that is its own."""

    class Error(Exception):
        pass

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def describe_table(self, _: Any) -> Any:
        if self.answer is None:
            raise self.Error("503")
        return DescribeTableResponse(location="s3://b/t", storage_options=self.answer)


def test_a_namespace_that_does_not_answer_is_a_failure_of_storage() -> None:
    with pytest.raises(la.StorageError, match="503"):
        Vended(Refusing(), ["t"], {})()


def test_an_answer_without_an_end_has_none() -> None:
    """Nor that of the options that were before it, by which it would be asked for ever."""
    ended = {"expires_at_millis": "1", "aws_access_key_id": "old", "region": "there"}
    found = Vended(Refusing({"aws_access_key_id": "new"}), ["t"], ended)()
    assert found == {"aws_access_key_id": "new", "region": "there"}
    found = Vended(Refusing({"expires_at_millis": "2"}), ["t"], ended)()
    assert found["expires_at_millis"] == "2"
