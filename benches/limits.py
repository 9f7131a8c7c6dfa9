"""Peak memory under `memory_limit`, each case in a process of its own that the system ends at 25 % more. `just bench limits`.

    benches/limits.py [--cases build train large merge shards write ranges] [--limits 256 1024 4096] [--scale 1.0]

The hard limit is a control group (version 1) where one can be made, which counts what the process takes after its imports, files that the
system keeps in memory included (those it gives back when it must); elsewhere RLIMIT_DATA. Exit code 1 if a case did not end well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import _common

MARGIN = 1.25
GROUPS = Path("/sys/fs/cgroup/memory")


def confine(limit: int) -> Path | None:
    """From here on the system ends this process where it takes more than `limit` bytes. The control group, if there is one."""
    group = GROUPS / f"lance-artifact-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        return group
    except OSError:
        data = next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if "VmData" in line
        )
        resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + limit, data * 1024 + limit))
        return None


def measured(limit: int, work: Callable[[], Any]) -> dict[str, Any]:
    group = confine(int(limit * MARGIN))
    with _common.Peak() as peak:
        result = work()
    del result
    if group:
        (GROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
    return {"bytes": peak.bytes, "seconds": peak.seconds}


def vectors(uri: str, rows: int, dimension: int, dtype: Any = np.float32) -> None:
    """A table of random vectors around some centers, of which few are in memory at a time."""
    import lance

    rng = np.random.default_rng(0)
    centers = rng.standard_normal((256, dimension)).astype(dtype)
    step = max(1, (64 << 20) // (dimension * np.dtype(dtype).itemsize))
    field = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), dimension)

    def batches() -> Any:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            values = centers[rng.integers(0, len(centers), count)]
            values = values + rng.standard_normal(values.shape, dtype=np.float32).astype(dtype) * dtype(0.3)
            yield pa.record_batch(
                [pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dimension)], ["vector"]
            )

    schema = pa.schema([pa.field("vector", field)])
    lance.write_dataset(
        pa.RecordBatchReader.from_batches(schema, batches()), uri, max_rows_per_file=max(1, rows // 8)
    )


def constant(uri: str, rows: int, fragments: int) -> None:
    """A table of as many rows as are wanted, whose vectors are small."""
    import lance

    each = rows // fragments
    field = pa.list_(pa.float16(), 16)

    def batches() -> Any:
        for start in range(0, rows, 1 << 20):
            count = min(1 << 20, rows - start)
            yield pa.record_batch(
                [pa.FixedSizeListArray.from_arrays(pa.array(np.ones(count * 16, np.float16)), 16)], ["vector"]
            )

    schema = pa.schema([pa.field("vector", field)])
    lance.write_dataset(
        pa.RecordBatchReader.from_batches(schema, batches()),
        uri,
        max_rows_per_file=each,
        max_rows_per_group=min(each, 1 << 20),
    )


def model(num_partitions: int, dimension: int, num_sub_vectors: int, dtype: Any) -> Any:
    import lance_artifact as la

    rng = np.random.default_rng(1)
    centroids = rng.standard_normal((num_partitions, dimension)).astype(dtype)
    codebook = rng.standard_normal((256, dimension)).astype(dtype)
    return la.IvfPqModel(centroids, codebook, "l2", num_sub_vectors=num_sub_vectors)


def encoded(row_ids: Any, part_ids: Any, width: int, rng: Any) -> Any:
    codes = pa.FixedSizeListArray.from_arrays(
        pa.array(rng.integers(0, 256, len(row_ids) * width, dtype=np.uint8)), width
    )
    return pa.record_batch(
        [pa.array(row_ids), pa.array(part_ids), codes], ["_rowid", "__ivf_part_id", "__pq_code"]
    )


# What is prepared, in a process of its own, and what is measured.


def prepare_build(folder: str, scale: float) -> None:
    vectors(f"{folder}/t", int(1_000_000 * scale), 768)


def build(folder: str, limit: int, scale: float) -> Any:
    import lance

    import lance_artifact as la

    parameters = {"num_partitions": 1024, "num_sub_vectors": 96, "backend": "cpu"}
    return measured(
        limit,
        lambda: la.create_index(
            lance.dataset(f"{folder}/t"), "vector", replace=True, memory_limit=limit, **parameters
        ),
    )


def prepare_train(folder: str, scale: float) -> None:
    vectors(f"{folder}/t", int(4_000_000 * scale), 128)


def train(folder: str, limit: int, scale: float) -> Any:
    import lance

    import lance_artifact as la

    parameters = {"num_partitions": int(16_384 * min(1.0, scale)), "num_sub_vectors": 16, "backend": "cpu"}
    return measured(
        limit, lambda: la.train(lance.dataset(f"{folder}/t"), "vector", memory_limit=limit, **parameters)
    )


WIDTH = 16


def skewed(folder: str, rows: int, artifacts: int, partitions: int = 16) -> Any:
    """A table of four fragments, encoded into some artifacts: of 16 partitions, three of four rows in partition 3."""
    import lance

    import lance_artifact as la

    constant(f"{folder}/t", rows, 4)
    ds = lance.dataset(f"{folder}/t")
    rng = np.random.default_rng(2)
    shared = model(partitions, 16, WIDTH, np.float16)
    fragments = ds.get_fragments()
    for part in range(artifacts):
        mine = fragments[part * 4 // artifacts : (part + 1) * 4 // artifacts]
        source = la.describe_source(ds, "vector", fragment_ids=[f.fragment_id for f in mine])
        with la.PartitionArtifactBuilder(f"{folder}/a{part}", shared, source=source) as builder:
            for fragment in mine:
                for start in range(0, fragment.count_rows(), 1 << 20):
                    count = min(1 << 20, fragment.count_rows() - start)
                    ids = np.arange(start, start + count, dtype=np.uint64) + (
                        np.uint64(fragment.fragment_id) << np.uint64(32)
                    )
                    parts = rng.integers(0, partitions, count)
                    if partitions == 16:
                        parts = np.where(rng.random(count) < 0.75, 3, parts)
                    builder.append_batch(encoded(ids, parts.astype(np.uint32), WIDTH, rng))
    return ds


def prepare_large(folder: str, scale: float) -> None:
    """2 GB of row ids and codes in one partition."""
    skewed(folder, int(112_000_000 * scale), 1)


def prepare_merge(folder: str, scale: float) -> None:
    """The same in two segments, with rows that were deleted since."""
    import lance_artifact as la

    ds = skewed(folder, int(112_000_000 * scale), 2)
    for part in range(2):
        la.finalize(ds, "vector", f"{folder}/a{part}", mode="append")
    ds.delete("_rowid % 50 = 7")


def prepare_sparse(folder: str, scale: float) -> None:
    """Two segments of many partitions, of which one row in a thousand is left."""
    import lance_artifact as la

    ds = skewed(folder, int(64_000_000 * scale), 2, partitions=4096)
    for part in range(2):
        la.finalize(ds, "vector", f"{folder}/a{part}", mode="append")
    ds.delete("_rowid % 1000 != 7")


def prepare_nulls(folder: str, scale: float) -> None:
    """A table of which one fragment has vectors, and the others have none."""
    import lance

    import lance_artifact as la

    rows, usable = int(64_000_000 * scale), 1000
    field = pa.list_(pa.float16(), 16)
    table = pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(usable * 16, "f2")), 16)})
    ds = lance.write_dataset(table, f"{folder}/t")
    nulls = pa.record_batch([pa.nulls(1 << 20, field)], ["vector"])
    batches = (nulls.slice(0, min(1 << 20, rows - start)) for start in range(0, rows, 1 << 20))
    reader = pa.RecordBatchReader.from_batches(nulls.schema, batches)
    ds = lance.write_dataset(reader, f"{folder}/t", mode="append", max_rows_per_file=max(1, rows // 2))
    rng, shared = np.random.default_rng(5), model(16, 16, WIDTH, np.float16)
    with la.PartitionArtifactBuilder(
        f"{folder}/a0", shared, source=la.describe_source(ds, "vector")
    ) as builder:
        builder.append_batch(
            encoded(np.arange(usable, dtype=np.uint64), np.zeros(usable, np.uint32), WIDTH, rng)
        )
        builder.finish(rows_dropped={"null": rows})


def merge(folder: str, limit: int, scale: float) -> Any:
    import lance_artifact as la

    # What is merged is gone: each limit has a copy, whose files are the same ones.
    copy = f"{folder}/copy-{limit}"
    shutil.copytree(f"{folder}/t", copy, copy_function=os.link)
    return measured(limit, lambda: la.merge_segments(copy, "vector_idx", memory_limit=limit))


def large(folder: str, limit: int, scale: float) -> Any:
    import lance

    import lance_artifact as la

    return measured(
        limit,
        lambda: la.finalize(
            lance.dataset(f"{folder}/t"), "vector", f"{folder}/a0", replace=True, memory_limit=limit
        ),
    )


def prepare_shards(folder: str, scale: float, shards: int = 1000) -> None:
    import lance

    import lance_artifact as la

    count = max(1, int(shards * scale))
    constant(f"{folder}/t", count * 20_000, count)
    ds = lance.dataset(f"{folder}/t")
    rng = np.random.default_rng(3)
    trained = model(4096, 16, WIDTH, np.float16)
    for fragment in ds.get_fragments():
        rows = fragment.count_rows()
        source = la.describe_source(ds, "vector", fragment_ids=[fragment.fragment_id])
        target = f"{folder}/shards/{fragment.fragment_id:05}"
        with la.PartitionArtifactBuilder(
            target, trained, source=source, sync=False, expected_rows=rows
        ) as builder:
            ids = np.arange(rows, dtype=np.uint64) + (np.uint64(fragment.fragment_id) << np.uint64(32))
            builder.append_batch(encoded(ids, rng.integers(0, 4096, rows, dtype=np.uint32), WIDTH, rng))


def shards(folder: str, limit: int, scale: float) -> Any:
    import lance

    import lance_artifact as la

    uris = sorted(str(path) for path in Path(folder, "shards").iterdir())
    return measured(
        limit,
        lambda: la.finalize(lance.dataset(f"{folder}/t"), "vector", uris, replace=True, memory_limit=limit),
    )


def written(folder: str, limit: int, rows: int, partitions: int, width: int) -> Any:
    import lance_artifact as la

    rng = np.random.default_rng(4)
    step = 1 << 18
    batch = encoded(
        np.arange(step, dtype=np.uint64), rng.integers(0, partitions, step, dtype=np.uint32), width, rng
    )

    def work() -> Any:
        with la.PartitionArtifactBuilder(
            f"{folder}/a", num_partitions=partitions, pq_code_width=width, memory_limit=limit, overwrite=True
        ) as builder:
            for start in range(0, rows, step):
                ids = pa.array(np.arange(start, start + step, dtype=np.uint64))
                builder.append_batch(batch.set_column(0, "_rowid", ids))

    return measured(limit, work)


def nothing(folder: str, scale: float) -> None:
    """Rows are made while they are written."""


def write(folder: str, limit: int, scale: float) -> Any:
    return written(folder, limit, int(64_000_000 * scale), 1024, 64)


def ranges(folder: str, limit: int, scale: float) -> Any:
    return written(folder, limit, int(1_000_000_000 * scale), 65_536, 1)


CASES: dict[str, tuple[Callable[[str, float], None], Callable[[str, int, float], Any], str]] = {
    "build": (prepare_build, build, "CPU build, 1 M x 768"),
    "train": (prepare_train, train, "training, K=16,384 on 4 M x 128"),
    "large": (prepare_large, large, "finalize, one partition of 2 GB"),
    "merge": (prepare_merge, merge, "merge two segments, one partition of 2 GB"),
    "sparse": (prepare_sparse, merge, "merge two segments, one row in 1,000 left"),
    "nulls": (prepare_nulls, large, "finalize, 64 M rows without a vector"),
    "shards": (prepare_shards, shards, "finalize, 1,000 shards of 20,000 rows"),
    "write": (nothing, write, "writer, 64 M rows"),
    "ranges": (nothing, ranges, "writer, 1 G rows, K=65,536"),
}


def in_process(job: str, case: str, **arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--job", job, "--cases", case, "--arguments", json.dumps(arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "LANCE_LOG": "error"}, check=False
    )
    if done.returncode:
        return {"failed": done.returncode}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def rows(case: str, limits: list[int], scale: float, folder: str) -> list[str]:
    """Prepare a case and measure it with each limit, in MiB; each is printed as a row. Those that did not end well."""
    failed = []
    name = CASES[case][2] + (f" (times {scale:g})" if scale != 1 else "")
    prepared = in_process("prepare", case, folder=folder, scale=scale)
    if "failed" in prepared:
        print(f"| {name} | all | preparing it ended with {prepared['failed']} | |", flush=True)
        return [f"{case}, preparing it: ended with {prepared['failed']}"]
    for limit in limits:
        result = in_process("measure", case, folder=folder, limit=limit << 20, scale=scale)
        if "failed" in result:
            print(f"| {name} | {limit} | ended with {result['failed']} | |", flush=True)
            failed.append(f"{case}, {limit} MiB: ended with {result['failed']}")
        else:
            print(
                f"| {name} | {limit} | {result['bytes'] / 2**20:.0f} | {result['seconds']:.2f} |", flush=True
            )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--limits", nargs="+", type=int, default=[256, 1024, 4096], help="MiB")
    parser.add_argument("--scale", type=float, default=1.0, help="of the rows")
    parser.add_argument("--job", choices=["prepare", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        prepare, measure, _ = CASES[args.cases[0]]
        given = json.loads(args.arguments)
        result = prepare(**given) if args.job == "prepare" else measure(**given)
        print(json.dumps(result or {}))
        return 0
    print(f"{_common.machine()}\n{_common.versions()}\n", file=sys.stderr)
    print("| case | limit, MiB | peak above the start, MiB | seconds |\n|---|---|---|---|")
    failed = []
    for case in args.cases:
        folder = tempfile.mkdtemp(prefix="limits-")
        try:
            failed += rows(case, args.limits, args.scale, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    for each in failed:
        print(f"FAILED: {each}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
