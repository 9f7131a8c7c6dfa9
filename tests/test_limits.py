"""Limits of the machine and of hostile files: open files, memory, rows that nobody wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from lance.file import LanceFileWriter

import lance_artifact as la
from conftest import LINUX, content, encoded, vectors
from test_process import python

ROWS, DIM = 3000, 8


def test_few_open_files_are_fewer_buckets(write: Callable[..., Any], tmp_path: Path) -> None:
    """512 partitions with 64 open files: the index is built; buckets that do not fit are refused at once."""
    write(vectors(ROWS, DIM))
    script = """
import resource, sys
import lance, lance_artifact as la
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
ds = lance.dataset(f"{sys.argv[1]}/vectors.lance")
try:
    la.PartitionArtifactBuilder(f"{sys.argv[1]}/a", num_partitions=512, pq_code_width=2, num_buckets=256)
except la.InvalidInputError as error:
    assert "num_buckets: got 256" in str(error) and "ulimit -n" in str(error), error
la.create_index(ds, "vector", num_partitions=512, num_sub_vectors=2, sample_rate=4, backend="cpu", artifact_uri=f"{sys.argv[1]}/a")
print(la.Artifact.open(f"{sys.argv[1]}/a").manifest["num_buckets"], ds.stats.index_stats("vector_idx")["num_indexed_rows"])
"""
    done = python(script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    buckets, rows = map(int, done.stdout.split())
    assert 0 < buckets < 50 and rows == ROWS


def test_no_open_files_are_an_error_before_training(write: Callable[..., Any], tmp_path: Path) -> None:
    write(vectors(ROWS, DIM))
    script = """
import os, resource, sys
import lance, lance_artifact as la
ds = lance.dataset(f"{sys.argv[1]}/vectors.lance")
ds.count_rows()
few = len(os.listdir("/dev/fd")) + 20
resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
stages = []
try:
    la.create_index(ds, "vector", num_partitions=4, num_sub_vectors=2, sample_rate=16, backend="cpu", progress=stages.append)
except la.StorageError as error:
    print(error)
assert not stages, stages
"""
    done = python(script, str(tmp_path))
    assert done.returncode == 0 and "ulimit -n" in done.stdout, (done.stdout, done.stderr)


@LINUX
def test_small_builds_reserve_little(write: Callable[..., Any], tmp_path: Path) -> None:
    """The default of 1 GiB is what may be used; a few rows are built where it could not be had."""
    write(vectors(ROWS, DIM))
    script = """
import resource, sys
import lance, lance_artifact as la
ds = lance.dataset(f"{sys.argv[1]}/vectors.lance")
la.train(ds, "vector", num_partitions=4, num_sub_vectors=2, sample_rate=16, backend="cpu")  # starts the threads
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), used + (400 << 20)))
la.create_index(ds, "vector", num_partitions=4, num_sub_vectors=2, sample_rate=16, backend="cpu", artifact_uri=f"{sys.argv[1]}/a")
print("done")
"""
    done = python(script, str(tmp_path))
    assert done.returncode == 0 and done.stdout == "done\n", (done.stdout, done.stderr)


def test_more_rows_than_expected_are_taken(tmp_path: Path) -> None:
    table = encoded(300_000, 16, 8)
    options: dict[str, Any] = {"num_partitions": 16, "pq_code_width": 8, "memory_limit": 16 << 20}
    with la.PartitionArtifactBuilder(tmp_path / "a", **options, expected_rows=100) as made:
        for start in range(0, 300_000, 7_000):
            made.append_batch(table.slice(start, 7_000))
    with la.PartitionArtifactBuilder(tmp_path / "b", **options) as same:
        same.append_batch(table)
    assert made.artifact.verify().ok and content(made.artifact) == content(same.artifact)


PEAK = """
import sys
import lance_artifact as la
artifact = la.Artifact.open(sys.argv[1])

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))

before = peak()
{work}
print((peak() - before) // 1024)
"""


def hostile(folder: Path, rows: int, version: str, padding: int = 0) -> Path:
    """An artifact whose only file says that it has so many rows, in pages of a few bytes."""
    (folder / "partitions").mkdir(parents=True)
    path = "partitions/bucket-00000.lance"
    fields = [
        pa.field("_rowid", pa.uint64()),
        pa.field("__pq_code", pa.list_(pa.field("item", pa.uint8()), 64)),
    ]
    noise = [np.random.default_rng(0).bytes(padding)] if padding else []
    if padding:
        fields.append(pa.field("padding", pa.binary()))
    schema = pa.schema(fields)
    with LanceFileWriter(str(folder / path), schema, version=version) as writer:
        for start in range(0, rows, 1_000_000):
            step = min(1_000_000, rows - start)
            columns = [pa.nulls(step, field.type) for field in fields]
            if start == 0 and padding:
                columns[2] = pa.array(noise + [None] * (step - 1), pa.binary())
            writer.write_batch(pa.table(columns, schema=schema))
    ranges = [{"offset": 0, "num_rows": rows}]
    manifest = {
        "version": 1,
        "num_partitions": 1,
        "partitions": [{"path": path, "num_rows": rows, "ranges": ranges}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("version", ["2.0", "2.1", "2.2"])
def test_rows_that_a_file_cannot_hold_are_refused(version: str, tmp_path: Path) -> None:
    folder = hostile(tmp_path / "a", 10_000_000, version)
    with pytest.raises(la.CorruptArtifactError, match="claims 10000000 rows in"):
        la.Artifact.open(folder)


@LINUX
@pytest.mark.parametrize("work", ["artifact.read_partition(0)", "assert not artifact.verify().ok"])
def test_pages_of_a_few_bytes_do_not_exhaust_memory(work: str, tmp_path: Path) -> None:
    """Rows that a file of this size might have, 360 MB of them once they are decoded."""
    folder = hostile(tmp_path / "a", 5_000_000, "2.1", padding=1_000_000)
    checked = f"try:\n    {work}\nexcept la.CorruptArtifactError as error:\n    assert 'nulls' in str(error)"
    done = python(PEAK.format(work=checked), str(folder))
    assert done.returncode == 0 and int(done.stdout) < 100, (done.stdout, done.stderr)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with one partition of 96 MB."""
    folder = tmp_path_factory.mktemp("large") / "a"
    with la.PartitionArtifactBuilder(
        folder, num_partitions=1, pq_code_width=16, memory_limit=64 << 20
    ) as made:
        for n in range(4):
            made.append_batch(encoded(1_000_000, 1, 16, first=n * 1_000_000))
    return folder


@LINUX
@pytest.mark.parametrize(
    "work",
    [
        "rows = sum(batch.num_rows for batch in artifact.read_partition(0))\nassert rows == 4_000_000",
        "assert artifact.verify().ok",
    ],
)
def test_a_large_partition_is_read_a_few_mebibytes_at_a_time(work: str, large: Path) -> None:
    done = python(PEAK.format(work=work), str(large))
    assert done.returncode == 0 and int(done.stdout) < 60, (done.stdout, done.stderr)


def test_a_large_partition_is_checked_to_its_end(large: Path, tmp_path: Path) -> None:
    """What was changed is found: with the last rows at the latest."""
    artifact = la.Artifact.open(large)
    whole = artifact.read_partition(0).read_all()
    assert np.array_equal(whole["_rowid"].to_numpy(), np.arange(4_000_000))
    name = "partitions/bucket-00000.lance"
    damaged = tmp_path / "b"
    (damaged / "partitions").mkdir(parents=True)
    (damaged / "manifest.json").write_bytes((large / "manifest.json").read_bytes())
    content = bytearray((large / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    reader = la.Artifact.open(damaged).read_partition(0)
    assert reader.read_next_batch().num_rows > 0
    with pytest.raises(la.CorruptArtifactError, match="partition 0 has checksum"):
        reader.read_all()
    report = la.Artifact.open(damaged).verify()
    assert not report.ok and report.num_problems == 1, report.problems
