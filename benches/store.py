"""A build whose table, artifact and index are on an object store that is far away, beside stock pylance on the same one.

    benches/store.py [--rows 200000] [--dim 128] [--partitions 256] [--sample-rate 64] [--latency 0.02] [--bandwidth 200e6]

The store is moto's server behind one that makes each answer wait and shares out a bandwidth, and that counts by stage: requests, bytes read and
written, how often a byte of the table was read, and how many reads and writes were on their way at once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import _common
from gpu import block
from slow_store import Request, SlowStore

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from local_s3 import BUCKET, s3_server

TABLE = f"s3://{BUCKET}/t.lance"
OBJECT = 4 << 20


def prepare(rows: int, dim: int, storage_options: dict[str, str]) -> dict[str, Any]:
    import lance

    column = pa.FixedSizeListArray.from_arrays(pa.array(block(0, rows, dim, "float32").reshape(-1)), dim)
    table = pa.table({"id": pa.array(np.arange(rows)), "vector": column})
    # The server copies a whole object for each read of a range of it, so objects are small.
    lance.write_dataset(table, TABLE, storage_options=storage_options, max_rows_per_file=OBJECT // (4 * dim))
    return {}


def build(who: str, shape: dict[str, int], storage_options: dict[str, str]) -> dict[str, Any]:
    import lance

    import lance_artifact as la

    ds = lance.dataset(TABLE, storage_options=storage_options)
    stages: list[tuple[str, float]] = [("open", time.time())]

    def progress(step: Any) -> None:
        if step.event == "start":
            stages.append((step.stage, time.time()))

    began = time.perf_counter()
    if who == "stock":
        ds.create_index("vector", "IVF_PQ", replace=True, **shape)
    else:
        options: dict[str, Any] = {"backend": "cpu", "replace": True, "progress": progress, **shape}
        if who == "artifact on the store":
            options |= {"artifact_uri": f"s3://{BUCKET}/artifact", "storage_options": storage_options}
        la.create_index(ds, "vector", **options)
    return {"seconds": time.perf_counter() - began, "stages": stages}


def at_once(requests: list[Request]) -> int:
    """Most of them that were on their way together."""
    ends = sorted([(r.began, 1) for r in requests] + [(r.ended, -1) for r in requests])
    return int(max(np.cumsum([step for _, step in ends]), default=0))


def times_read(requests: list[Request]) -> float:
    """Bytes read of the table's files over how many of them are different ones."""
    ranges = defaultdict(list)
    for r in requests:
        if r.method == "GET" and "/t.lance/data/" in r.path and r.first is not None:
            ranges[r.path].append((r.first, r.first + r.received))
    read = different = 0
    for of_file in ranges.values():
        end = 0
        for first, last in sorted(of_file):
            read += last - first
            different += max(0, last - max(first, end))
            end = max(end, last)
    return read / different if different else 0.0


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--partitions", type=int, default=256)
    parser.add_argument("--sample-rate", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--bandwidth", type=float, default=200e6)
    a = parser.parse_args(arguments)
    shape = {
        "num_partitions": a.partitions,
        "num_sub_vectors": a.dim // 8,
        "sample_rate": a.sample_rate,
        "max_iters": 20,
    }
    print(f"{_common.machine()}\n{_common.versions()}\n", file=sys.stderr)
    print(
        f"{a.rows:,} x {a.dim} float32, K={a.partitions}; {a.latency * 1e3:g} ms, {a.bandwidth / 1e6:g} MB/s\n"
    )
    print(
        "| | stage | seconds | requests | read, MB | a byte of the table, times | reads at once | written, MB | writes at once |"
    )
    print("|---" * 9 + "|")
    with (
        tempfile.TemporaryDirectory(prefix="store-") as folder,
        Path(folder, "log").open("wb") as log,
        s3_server(log) as options,
    ):
        port = int(options["aws_endpoint"].rsplit(":", 1)[1])
        _common.in_process(__file__, "prepare", rows=a.rows, dim=a.dim, storage_options=options)
        for who in ("artifact on the store", "artifact on the disk", "stock"):
            with SlowStore(port, a.latency, a.bandwidth) as store:
                slow = {**options, "aws_endpoint": f"http://127.0.0.1:{store.port}"}
                found = _common.in_process(__file__, "build", who=who, shape=shape, storage_options=slow)
            ends = [began for _, began in found["stages"][1:]] + [float("inf")]
            spans = [(stage, began, end) for (stage, began), end in zip(found["stages"], ends, strict=True)]
            spans[0] = (spans[0][0], 0.0, spans[0][2])
            last = max(r.ended for r in store.requests)
            for stage, began, end in [*spans, ("all", 0.0, float("inf"))]:
                of = [r for r in store.requests if began <= r.began < end]
                reads, writes = (
                    [r for r in of if r.method == "GET"],
                    [r for r in of if r.method in ("PUT", "POST")],
                )
                seconds = (
                    found["seconds"] if stage == "all" else min(end, last) - max(began, found["stages"][0][1])
                )
                read, written = sum(r.received for r in of) / 1e6, sum(r.sent for r in writes) / 1e6
                print(
                    f"| {who} | {stage} | {seconds:.2f} | {len(of)} | {read:.1f} | {times_read(of):.2f} | {at_once(reads)} | {written:.1f} | {at_once(writes)} |",
                    flush=True,
                )


if __name__ == "__main__":
    _common.dispatch({"prepare": prepare, "build": build}, main)
