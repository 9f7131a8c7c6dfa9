"""Datasets and artifacts in S3, against a local server."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import boto3
import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, content, encoded, vectors

K, M, DIM, ROWS = 8, 4, 16, 3000


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        options = {
            "aws_access_key_id": "key",
            "aws_secret_access_key": "very-secret",
            "aws_region": "us-east-1",
            "aws_endpoint": f"http://127.0.0.1:{port}",
            "allow_http": "true",
        }
        client(options).create_bucket(Bucket="vectors")
        yield options
    finally:
        server.kill()
        server.wait()


def client(options: dict[str, str]) -> Any:
    return boto3.client(
        "s3", endpoint_url=options["aws_endpoint"], region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="very-secret"
    )  # fmt: skip


def keys(options: dict[str, str], prefix: str) -> list[str]:
    found = client(options).list_objects_v2(Bucket="vectors", Prefix=prefix)
    return sorted(o["Key"] for o in found.get("Contents", []))


def test_dataset_and_artifact_in_s3(s3: dict[str, str]) -> None:
    array = vectors(ROWS, DIM)
    table = pa.table({"id": pa.array(range(ROWS)), "vector": column(array)})
    lance.write_dataset(table, "s3://vectors/t.lance", storage_options=s3, max_rows_per_file=1000)
    ds = lance.dataset("s3://vectors/t.lance", storage_options=s3)
    model = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=8, backend="cpu")
    artifact = la.build_artifact(ds, "vector", model, "s3://vectors/a", backend="cpu", storage_options=s3)
    assert artifact.num_rows == ROWS and artifact.verify().ok
    assert "secret" not in repr(artifact.manifest) + repr(artifact)
    la.finalize(ds, "vector", "s3://vectors/a", storage_options=s3)
    found = ds.to_table(
        nearest={"column": "vector", "q": array[5], "k": 1, "nprobes": K, "refine_factor": 20}
    )
    assert found["id"].to_pylist() == [5]


def test_multipart_uploads_and_their_memory(s3: dict[str, str]) -> None:
    """A bucket file of several parts; buckets bounded by what their upload buffers take."""
    width, rows = 64, 300_000
    made = la.PartitionArtifactBuilder(
        "s3://vectors/big",
        num_partitions=1000,
        pq_code_width=width,
        memory_limit=128 << 20,
        storage_options=s3,
    )
    assert made.num_buckets == 3
    with pytest.raises(la.InvalidInputError, match="lower num_buckets"):
        la.PartitionArtifactBuilder(
            "s3://vectors/x",
            num_partitions=1000,
            pq_code_width=width,
            memory_limit=128 << 20,
            num_buckets=256,
            storage_options=s3,
        )
    table = encoded(rows, 1000, width)
    with made:
        for start in range(0, rows, 50_000):
            made.append_batch(table.slice(start, 50_000))
    artifact = made.artifact
    assert artifact.verify().ok
    assert all(f["size_bytes"] > 5 << 20 for f in artifact.manifest["files"].values())
    expected = dict(
        zip(
            table["_rowid"].to_pylist(),
            np.array(table["__pq_code"].combine_chunks().flatten()).reshape(-1, width),
            strict=True,
        )
    )
    got = {i: c for part in content(artifact) for i, c in part.items()}
    assert all(got[i] == c.tobytes() for i, c in expected.items()) and len(got) == rows


def test_an_abort_leaves_no_object_and_no_upload(s3: dict[str, str]) -> None:
    made = la.PartitionArtifactBuilder(
        "s3://vectors/gone", num_partitions=8, pq_code_width=64, memory_limit=64 << 20, storage_options=s3
    )
    for n in range(10):
        made.append_batch(encoded(100_000, 8, 64, first=n * 100_000))
    made.abort()
    assert keys(s3, "gone") == []
    for _ in range(50):
        uploads = client(s3).list_multipart_uploads(Bucket="vectors").get("Uploads", [])
        if not uploads:
            break
        time.sleep(0.1)
    assert uploads == []


def test_publishing_is_put_if_absent(s3: dict[str, str]) -> None:
    both = [
        la.PartitionArtifactBuilder(
            "s3://vectors/race", num_partitions=8, pq_code_width=4, storage_options=s3
        )
        for _ in range(2)
    ]
    for n, made in enumerate(both):
        made.append_batch(encoded(100, 8, 4, first=n * 100))
    both[0].finish()
    with pytest.raises(la.ArtifactExistsError):
        both[1].finish()
    both[1].abort()
    assert la.Artifact.open("s3://vectors/race", s3).verify().ok


def test_errors_name_the_place_and_keep_the_secret(s3: dict[str, str]) -> None:
    with pytest.raises(la.ArtifactNotFoundError, match="s3://vectors/nowhere"):
        la.Artifact.open("s3://vectors/nowhere", s3)
    wrong = {
        **s3,
        "aws_endpoint": "http://127.0.0.1:9",
        "client_max_retries": "0",
        "client_retry_timeout": "1",
    }
    with pytest.raises(la.StorageError, match="s3://vectors/a") as caught:
        la.Artifact.open("s3://vectors/a", wrong)
    assert "very-secret" not in str(caught.value)
