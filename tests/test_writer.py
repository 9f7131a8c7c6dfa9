"""The writer: every input form, any batching, refusals that change nothing, aborts that leave nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import arro3.core
import nanoarrow
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lance_artifact as la
from conftest import content, encoded, leftovers

K, WIDTH = 7, 6


def builder(path: Path, **options: Any) -> la.PartitionArtifactBuilder:
    defaults: dict[str, Any] = {"num_partitions": K, "pq_code_width": WIDTH}
    return la.PartitionArtifactBuilder(str(path), **{**defaults, **options})


def expected(table: pa.Table) -> list[dict[int, bytes]]:
    parts: list[dict[int, bytes]] = [{} for _ in range(K)]
    codes = table["__pq_code"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)
    for i, p, c in zip(table["_rowid"].to_pylist(), table["__ivf_part_id"].to_pylist(), codes, strict=True):
        parts[p][i] = c.tobytes()
    return parts


FORMS = {
    "pyarrow table": lambda t: t,
    "pyarrow batch": lambda t: t.combine_chunks().to_batches()[0],
    "pyarrow reader": lambda t: t.to_reader(max_chunksize=17),
    "chunked table": lambda t: pa.concat_tables([t.slice(0, 13), t.slice(13, 0), t.slice(13)]),
    "sliced batch": lambda t: pa.concat_tables([t.slice(0, 3), t]).combine_chunks().to_batches()[0].slice(3),
    "polars": lambda t: pl.from_arrow(t),
    "arro3": lambda t: arro3.core.Table.from_arrow(t),
    "nanoarrow": lambda t: nanoarrow.ArrayStream(t),
    "other order, short names": lambda t: t.select(["__pq_code", "_rowid", "__ivf_part_id"]).rename_columns(
        ["pq_code", "row_id", "part_id"]
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_arrow_form(form: str, tmp_path: Path) -> None:
    table = encoded(200, K, WIDTH)
    with builder(tmp_path / "a") as made:
        assert made.append_batch(FORMS[form](table)) == 200
    assert content(made.artifact) == expected(table)
    assert made.artifact.verify().ok


def bad(**columns: Any) -> pa.Table:
    table = encoded(10, K, WIDTH)
    for name, value in columns.items():
        place = table.schema.get_field_index(name)
        table = (
            table.drop_columns([name])
            if value is None
            else (table.append_column(name, value) if place < 0 else table.set_column(place, name, value))
        )
    return table


REFUSED = {
    "missing column": (lambda: bad(_rowid=None), "missing"),
    "extra column": (lambda: bad(score=pa.array(range(10))), "unexpected column"),
    "signed row ids": (lambda: bad(_rowid=pa.array(range(10), pa.int64())), "Int64"),
    "dictionary": (
        lambda: bad(__ivf_part_id=pa.array([1] * 10, pa.uint32()).dictionary_encode()),
        "ictionary",
    ),
    "null row id": (lambda: bad(_rowid=pa.array([None, *range(9)], pa.uint64())), "nulls"),
    "partition out of range": (
        lambda: bad(__ivf_part_id=pa.array([0] * 9 + [K], pa.uint32())),
        "less than num_partitions",
    ),
    "other width": (
        lambda: bad(__pq_code=pa.FixedSizeListArray.from_arrays(pa.array([0] * 50, pa.uint8()), 5)),
        r"\[6\]",
    ),
    "null byte": (
        lambda: bad(
            __pq_code=pa.FixedSizeListArray.from_arrays(pa.array([None] + [0] * 59, pa.uint8()), WIDTH)
        ),
        "null bytes",
    ),
    "null code": (
        lambda: bad(__pq_code=pa.array([None, *[[0] * WIDTH] * 9], pa.list_(pa.uint8(), WIDTH))),
        "nulls",
    ),
    "strings": (lambda: bad(__pq_code=pa.array(["x"] * 10)), "fixed_size_list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_batch_changes_nothing(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    table = encoded(50, K, WIDTH)
    with builder(tmp_path / "a") as made:
        made.append_batch(table.slice(0, 20))
        with pytest.raises(la.InvalidInputError, match=message):
            made.append_batch(make())
        assert made.num_rows == 20
        made.append_batch(table.slice(20))
    assert content(made.artifact) == expected(table)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(0, 400), max_size=6),
    order=st.randoms(use_true_random=False),
    buckets=st.integers(1, K),
    rows=st.integers(0, 400),
)
def test_content_depends_only_on_the_rows(
    cuts: list[int], order: Any, buckets: int, rows: int, tmp_path: Path
) -> None:
    table = encoded(rows, K, WIDTH)
    pieces = [
        table.slice(a, b - a) for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), rows], strict=True) if b > a
    ]
    order.shuffle(pieces)
    with builder(tmp_path / uuid.uuid4().hex, num_buckets=buckets) as made:
        for piece in pieces:
            made.append_batch(piece)
    artifact = made.artifact
    assert content(artifact) == expected(table)
    assert artifact.partition_sizes() == [len(p) for p in expected(table)]
    assert artifact.manifest["rows"] == {"seen": rows, "written": rows, "dropped": {}}
    assert artifact.verify().ok


def test_rows_keep_arrival_order_over_many_flushes(tmp_path: Path) -> None:
    # The smallest limit that is allowed, so that this many rows take several stages.
    with pytest.raises(la.InvalidInputError, match="at least") as refused:
        builder(tmp_path / "a", memory_limit=1)
    limit = int(str(refused.value).split("at least ")[1].split(" ")[0])
    rows = 400_000
    table = encoded(rows, K, WIDTH)
    # Partitions share buckets, so that the rows of two flushes of one partition do not become one range.
    with builder(tmp_path / "a", memory_limit=limit, num_buckets=2) as made:
        assert made.memory_limit == limit
        for start in range(0, rows, 7001):
            made.append_batch(table.slice(start, 7001))
    artifact = made.artifact
    assert min(artifact.partition_range_counts()) > 1, "expected several flushes"
    assert artifact.verify().ok
    for partition in range(K):
        ids = artifact.read_partition(partition).read_all()["_rowid"].to_numpy()
        assert np.all(np.diff(ids.astype(np.int64)) > 0)
    assert sum(artifact.partition_sizes()) == rows


def test_threads_append_at_once(tmp_path: Path) -> None:
    tables = [encoded(5000, K, WIDTH, seed=n, first=n * 5000) for n in range(8)]
    with builder(tmp_path / "a") as made:
        threads = [threading.Thread(target=made.append_batch, args=(t,)) for t in tables]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert content(made.artifact) == expected(pa.concat_tables(tables))
    assert made.artifact.verify().ok


def test_nothing_is_an_artifact_before_finish(tmp_path: Path) -> None:
    made = builder(tmp_path / "a")
    made.append_batch(encoded(100, K, WIDTH))
    with pytest.raises(la.InvalidInputError, match="not finished"):
        _ = made.artifact
    with pytest.raises(la.ArtifactNotFoundError):
        la.Artifact.open(str(tmp_path / "a"))
    made.finish()
    with pytest.raises(la.InvalidInputError, match="finished"):
        made.append_batch(encoded(1, K, WIDTH))
    assert la.Artifact.open(str(tmp_path / "a")).num_rows == 100


@pytest.mark.parametrize("how", ["abort", "exception", "drop"])
def test_an_unfinished_build_leaves_nothing(how: str, tmp_path: Path) -> None:
    made = builder(tmp_path / "a")
    made.append_batch(encoded(300_000, K, WIDTH))
    if how == "abort":
        made.abort()
        made.abort()
        with pytest.raises(la.InvalidInputError, match="aborted"):
            made.append_batch(encoded(1, K, WIDTH))
    elif how == "exception":
        with pytest.raises(ZeroDivisionError), made:
            _ = 1 / 0
    del made
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "a").exists()


def test_abort_leaves_other_files_alone(tmp_path: Path) -> None:
    made = builder(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    made.append_batch(encoded(10, K, WIDTH))
    made.abort()
    assert leftovers(tmp_path) == ["a/notes.txt"]
    # A build that begins when it is there is refused, and changes nothing either.
    with pytest.raises(la.InvalidInputError, match=r"notes\.txt.*new or empty folder"):
        builder(tmp_path / "a")
    assert leftovers(tmp_path) == ["a/notes.txt"]


def test_an_artifact_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    first, second = encoded(50, K, WIDTH, seed=1), encoded(70, K, WIDTH, seed=2)
    with builder(tmp_path / "a") as made:
        made.append_batch(first)
    with pytest.raises(la.ArtifactExistsError, match="overwrite"):
        builder(tmp_path / "a")
    failed = builder(tmp_path / "a", overwrite=True)
    failed.append_batch(second)
    failed.abort()
    assert content(la.Artifact.open(str(tmp_path / "a"))) == expected(first)
    with builder(tmp_path / "a", overwrite=True) as made:
        made.append_batch(second)
        assert content(la.Artifact.open(str(tmp_path / "a"))) == expected(first)
    assert content(la.Artifact.open(str(tmp_path / "a"))) == expected(second)
    files = leftovers(tmp_path / "a")
    assert len(files) == 1 + len({p % K for p in range(K) if expected(second)[p]}), files


def test_a_killed_build_can_be_run_again(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, signal
from conftest import encoded
import lance_artifact as la
b = la.PartitionArtifactBuilder({str(tmp_path / "a")!r}, num_partitions={K}, pq_code_width={WIDTH}, memory_limit=32 << 20)
for n in range(30):
    b.append_batch(encoded(200_000, {K}, {WIDTH}, seed=n, first=n * 200_000))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert leftovers(tmp_path), "the build was killed before it wrote anything"
    with pytest.raises(la.ArtifactNotFoundError):
        la.Artifact.open(str(tmp_path / "a"))
    table = encoded(100, K, WIDTH)
    with builder(tmp_path / "a") as made:
        made.append_batch(table)
    assert content(made.artifact) == expected(table)
    assert not [f for f in leftovers(tmp_path) if ".lance-artifact-" in f]


def test_a_failed_write_is_a_typed_error_and_stays_one(tmp_path: Path) -> None:
    made = builder(tmp_path / "a")
    (tmp_path / "a" / "partitions").write_text("a file where the folder must be")
    made.append_batch(encoded(10, K, WIDTH))
    with pytest.raises(la.StorageError):
        made.finish()
    with pytest.raises(la.StorageError, match="earlier write failed"):
        made.append_batch(encoded(10, K, WIDTH))
    made.abort()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_partitions": None}, "either model, or both"),
        ({"num_partitions": 0}, "num_partitions"),
        ({"pq_code_width": 0}, "pq_code_width"),
        ({"num_buckets": 0}, "num_buckets"),
        ({"num_buckets": K + 1}, "num_buckets"),
        ({"memory_limit": 1000}, "memory_limit"),
        ({"source": {"column": 3}}, "source"),
    ],
)
def test_options_are_checked_first(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(la.InvalidInputError, match=message):
        builder(tmp_path / "a", **options)
    assert leftovers(tmp_path) == []


def test_counts_must_add_up(tmp_path: Path) -> None:
    made = builder(tmp_path / "a")
    made.append_batch(encoded(10, K, WIDTH))
    with pytest.raises(la.InvalidInputError, match="13 rows seen"):
        made.finish(rows_seen=13, rows_dropped={"null": 2})
    artifact = made.finish(rows_seen=12, rows_dropped={"null": 2})
    assert artifact.manifest["rows"] == {"seen": 12, "written": 10, "dropped": {"null": 2}}


def test_memory_stays_below_the_limit(tmp_path: Path) -> None:
    """Peak of a process that writes, above what it held before: under the limit and a margin, and flat."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, pyarrow as pa, threading, time
import lance_artifact as la
from lance_artifact.demo import _PeakMemory
rows, batch, width, partitions = int(sys.argv[1]), 65536, 64, 1024
rng = np.random.default_rng(0)
codes = pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(0, 256, batch * width, dtype=np.uint8)), width)
parts = pa.array(rng.integers(0, partitions, batch, dtype=np.uint32))
with _PeakMemory() as memory:
    with la.PartitionArtifactBuilder(sys.argv[2], num_partitions=partitions, pq_code_width=width, memory_limit=128 << 20) as b:
        for start in range(0, rows, batch):
            ids = pa.array(np.arange(start, start + batch, dtype=np.uint64))
            b.append_batch(pa.table([ids, parts, codes], ["_rowid", "__ivf_part_id", "__pq_code"]))
print(memory.peak - memory.start)
"""
    peaks = {}
    for rows in (1 << 20, 1 << 22):
        out = subprocess.run(
            [sys.executable, "-c", script, str(rows), str(tmp_path / f"a{rows}")],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks[rows] = int(out.stdout)
    # The margin: what the runtime, the allocator and the interpreter add, stated in docs/ARCHITECTURE.md.
    assert max(peaks.values()) < (128 << 20) + (64 << 20), peaks
    assert peaks[1 << 22] < peaks[1 << 20] + (48 << 20), peaks


def test_an_artifact_in_memory(tmp_path: Path) -> None:
    table = encoded(100, K, WIDTH)
    with la.PartitionArtifactBuilder("memory://somewhere/a", num_partitions=K, pq_code_width=WIDTH) as made:
        made.append_batch(table)
    assert content(la.Artifact.open("memory://somewhere/a")) == expected(table)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_with_other_files_is_refused(overwrite: bool, tmp_path: Path) -> None:
    mine = [
        "a/metadata_mine.lance",
        "a/notes.txt",
        "a/partitions/bucket-00007.parquet",
        "a/partitions_old/bucket-00007.lance",
    ]
    if overwrite:
        with builder(tmp_path / "a") as made:
            made.append_batch(encoded(10, K, WIDTH))
    before = leftovers(tmp_path)
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(
        la.InvalidInputError, match=r"metadata_mine\.lance, notes\.txt, .*parquet, partitions_old/"
    ):
        builder(tmp_path / "a", overwrite=overwrite)
    assert leftovers(tmp_path) == sorted([*before, *mine])
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    if overwrite:
        assert la.Artifact.open(str(tmp_path / "a")).verify().ok


def test_two_writers_of_one_target(tmp_path: Path) -> None:
    """The first to finish wins, whichever began first; the other gets an error and spoils nothing."""
    for first in (0, 1):
        path = tmp_path / f"a{first}"
        both = [builder(path), builder(path)]
        tables = [encoded(300_000, K, WIDTH, seed=n, first=n * 300_000) for n in range(2)]
        for made, table in zip(both, tables, strict=True):
            made.append_batch(table)
        both[first].finish()
        with pytest.raises(la.ArtifactExistsError):
            both[1 - first].finish()
        both[1 - first].abort()
        artifact = la.Artifact.open(str(path))
        assert content(artifact) == expected(tables[first]) and artifact.verify().ok


def test_a_forked_child_leaves_the_parents_files(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os
from conftest import encoded
import lance_artifact as la
b = la.PartitionArtifactBuilder({str(tmp_path / "a")!r}, num_partitions={K}, pq_code_width={WIDTH}, memory_limit=16 << 20)
for n in range(10):
    b.append_batch(encoded(200_000, {K}, {WIDTH}, seed=n, first=n * 200_000))
child = os.fork()
if child == 0:
    try:
        la.Artifact.open("nowhere")
    except la.LanceArtifactError as error:
        assert "spawn" in str(error), error
    del b
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert b.finish().verify().ok
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_an_interrupt_while_finishing_is_answered(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, signal, threading, time
from conftest import encoded
import lance_artifact as la
try:
    with la.PartitionArtifactBuilder({str(tmp_path / "a")!r}, num_partitions={K}, pq_code_width=64, memory_limit=1 << 30) as b:
        b.append_batch(encoded(2_000_000, {K}, 64))
        threading.Timer(0.02, lambda: (globals().update(hit=time.monotonic()), os.kill(os.getpid(), signal.SIGINT))).start()
except KeyboardInterrupt:
    assert time.monotonic() - hit < 1.5, time.monotonic() - hit
    sys.exit(42)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 42
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """Writes fail in the middle of a file (the limit on file sizes stands for a full disk): a typed error, nothing left."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from conftest import encoded
import lance_artifact as la
tables = [encoded(200_000, {K}, {WIDTH}, seed=n, first=n * 200_000) for n in range(12)]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
made = la.PartitionArtifactBuilder(
    {str(tmp_path / "a")!r}, num_partitions={K}, pq_code_width={WIDTH}, memory_limit=16 << 20
)
try:
    for table in tables:
        made.append_batch(table)
    made.finish()
except la.StorageError as error:
    assert "bucket-" in str(error), error
    made.abort()
    sys.exit(42)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 42
    assert leftovers(tmp_path) == []
