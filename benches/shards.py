"""Time, memory and requests of `finalize` for the same rows in more and more artifacts, on the local disk and on a local S3 server.

    benches/shards.py [--shards 1 10 100 1000] [--rows 2000000] [--s3-rows 200000]

Each finalizer is a process of its own. The server is moto's, which answers some hundred requests a second: on it requests are what is
measured, and seconds are the server's.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import _common

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from local_s3 import BUCKET, s3_server

PARTITIONS, DIMENSION, WIDTH = 1024, 16, 16


def prepare(folder: str, rows: int, shards: int, storage_options: dict[str, str] | None) -> dict[str, Any]:
    """A table of as many fragments as shards, and the shards."""
    import lance

    import lance_artifact as la

    rng = np.random.default_rng(1)
    each = rows // shards
    codebook = rng.standard_normal((256, DIMENSION)).astype(np.float16)
    centroids = rng.standard_normal((PARTITIONS, DIMENSION)).astype(np.float16)
    model = la.IvfPqModel(centroids, codebook, num_sub_vectors=WIDTH)
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(rows * DIMENSION, np.float16)), DIMENSION)
    table = pa.table({"vector": values})
    ds = lance.write_dataset(
        table, f"{folder}/t", storage_options=storage_options, max_rows_per_file=each, max_rows_per_group=each
    )
    for fragment in ds.get_fragments():
        number, count = fragment.fragment_id, fragment.count_rows()
        codes = pa.FixedSizeListArray.from_arrays(
            pa.array(rng.integers(0, 256, count * WIDTH, dtype=np.uint8)), WIDTH
        )
        ids = np.arange(count, dtype=np.uint64) + (np.uint64(number) << np.uint64(32))
        parts = rng.integers(0, PARTITIONS, count, dtype=np.uint32)
        with la.PartitionArtifactBuilder(
            f"{folder}/shards/{number:05}",
            model,
            source=la.describe_source(ds, "vector", fragment_ids=[number]),
            storage_options=storage_options,
            sync=False,
            expected_rows=count,
        ) as builder:
            builder.append_batch(
                pa.record_batch(
                    [pa.array(ids), pa.array(parts), codes], ["_rowid", "__ivf_part_id", "__pq_code"]
                )
            )
    return {"shards": len(ds.get_fragments())}


def finalize(folder: str, shards: int, storage_options: dict[str, str] | None) -> dict[str, Any]:
    import lance

    import lance_artifact as la

    uris = [f"{folder}/shards/{number:05}" for number in range(shards)]
    ds = lance.dataset(f"{folder}/t", storage_options=storage_options)
    with _common.Peak() as peak:
        la.finalize(ds, "vector", uris, storage_options=storage_options)
    return {"seconds": peak.seconds, "bytes": peak.bytes}


def requests(log: Path, start: int) -> Counter[str]:
    """By method, of what the server has logged since."""
    return Counter(re.findall(r'"(GET|PUT|HEAD|POST|DELETE) ', log.read_text()[start:]))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", nargs="+", type=int, default=[1, 10, 100, 1000])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--s3-rows", type=int, default=200_000)
    args = parser.parse_args(arguments)
    print(f"{_common.machine()}\n{_common.versions()}\n", file=sys.stderr)
    print(
        "| where | rows | shards | seconds | peak above the start, MiB | requests |\n|---|---|---|---|---|---|"
    )
    for shards in args.shards:
        folder = tempfile.mkdtemp(prefix="shards-")
        try:
            _common.in_process(
                __file__, "prepare", folder=folder, rows=args.rows, shards=shards, storage_options=None
            )
            result = _common.in_process(
                __file__, "finalize", folder=folder, shards=shards, storage_options=None
            )
            print(
                f"| disk | {args.rows:,} | {shards} | {result['seconds']:.2f} | {result['bytes'] / 2**20:.0f} | |",
                flush=True,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="shards-") as temporary:
        for shards in args.shards:
            log = Path(temporary, f"log-{shards}")
            with log.open("wb") as errors, s3_server(errors) as options:
                place = {"folder": f"s3://{BUCKET}/x", "shards": shards, "storage_options": options}
                _common.in_process(__file__, "prepare", rows=args.s3_rows, **place)
                start = len(log.read_text())
                result = _common.in_process(__file__, "finalize", **place)
                counted = requests(log, start)
                of_methods = ", ".join(f"{number} {method}" for method, number in sorted(counted.items()))
                print(
                    f"| S3 | {args.s3_rows:,} | {shards} | {result['seconds']:.2f} | {result['bytes'] / 2**20:.0f} | "
                    f"{sum(counted.values())}: {of_methods} |",
                    flush=True,
                )


if __name__ == "__main__":
    _common.dispatch({"prepare": prepare, "finalize": finalize}, main)
