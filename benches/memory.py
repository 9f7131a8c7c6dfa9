"""Peak memory of the writer at growing row counts under one limit. `just bench memory`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from typing import Any

import numpy as np
import pyarrow as pa

import _common

LIMIT, WIDTH, PARTITIONS, BATCH = 256 << 20, 64, 1024, 65_536


def write(rows: int, folder: str) -> dict[str, Any]:
    import lance_artifact as la

    rng = np.random.default_rng(0)
    codes = pa.FixedSizeListArray.from_arrays(
        pa.array(rng.integers(0, 256, BATCH * WIDTH, dtype=np.uint8)), WIDTH
    )
    parts = pa.array(rng.integers(0, PARTITIONS, BATCH, dtype=np.uint32))
    target = f"{folder}/a"
    with _common.Peak() as peak:
        with la.PartitionArtifactBuilder(
            target, num_partitions=PARTITIONS, pq_code_width=WIDTH, memory_limit=LIMIT
        ) as builder:
            for start in range(0, rows, BATCH):
                ids = pa.array(np.arange(start, start + BATCH, dtype=np.uint64))
                builder.append_batch(
                    pa.record_batch([ids, parts, codes], ["_rowid", "__ivf_part_id", "__pq_code"])
                )
        artifact = builder.artifact
    return {
        "bytes": peak.bytes,
        "seconds": peak.seconds,
        "ranges": sum(artifact.partition_range_counts()),
        "rows": artifact.num_rows,
    }


def main(arguments: list[str]) -> None:
    counts = [n << 20 for n in _common.counts(arguments, "MILLIONS_OF_ROWS") or [1, 4, 16]]
    print(
        f"{_common.machine()}\n{_common.versions()}\nmemory_limit {LIMIT >> 20} MiB, codes of {WIDTH} bytes, K={PARTITIONS}",
        file=sys.stderr,
    )
    print("| rows | peak above the start, MiB | limit, MiB | seconds | ranges |\n|---|---|---|---|---|")
    for rows in counts:
        folder = tempfile.mkdtemp(prefix="memory-")
        try:
            result = _common.in_process(__file__, "write", rows=rows, folder=folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(
            f"| {result['rows']:,} | {result['bytes'] / 2**20:.0f} | {LIMIT >> 20} | {result['seconds']:.2f} | {result['ranges']:,} |"
        )


if __name__ == "__main__":
    _common.dispatch({"write": write}, main)
