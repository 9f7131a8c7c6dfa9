"""The hand-over at growing row counts, and at growing numbers of partitions: seconds, memory, open files, ranges, manifest.

`just bench scale [millions of rows ...]`. Costs are to grow with the rows, and to have no cliff at many partitions.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import _common
import handover

PARTITIONS, ROWS = (64, 256, 1024, 4096, 16_384, 65_536), 4_000_000


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class OpenFiles:
    """The most files this process had open during a block."""

    def __enter__(self) -> OpenFiles:
        self.start = self.most = open_files()
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self.most = max(self.most, open_files())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watch.join()


def run(folder: str, rows: int) -> dict[str, Any]:
    import lance_artifact as la

    ds, batches, centroids, codebook = handover.load(folder, rows)
    model = la.IvfPqModel(centroids, codebook)
    source = la.describe_source(ds, "vector")
    with _common.Peak() as peak, OpenFiles() as files:
        with (
            _common.Peak() as write,
            la.PartitionArtifactBuilder(f"{folder}/artifact", model, source=source, sync=False) as builder,
        ):
            for batch in batches:
                builder.append_batch(batch)
        with _common.Peak() as finalize:
            la.finalize(ds, "vector", builder.artifact)
    began = time.perf_counter()
    opened = la.Artifact.open(f"{folder}/artifact")
    open_seconds = time.perf_counter() - began
    manifest = Path(folder, "artifact", "manifest.json")
    began = time.perf_counter()
    json.loads(manifest.read_bytes())
    return {
        "seconds": peak.seconds, "write": write.seconds, "finalize": finalize.seconds, "bytes": peak.bytes,
        "files": files.most - files.start, "ranges": sum(opened.partition_range_counts()), "manifest": manifest.stat().st_size,
        "open": open_seconds, "parse": time.perf_counter() - began,
    }  # fmt: skip


def measure(shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """(rows, partitions) -> a line each."""
    print(f"\nthe hand-over, M={handover.SUB_VECTORS}, one run each, artifact not synced\n")
    print(
        "| rows | K | write, s | finalize and commit, s | us a thousand rows | peak memory, MiB | open files | ranges "
        "| manifest, KiB | open the artifact, ms | parse the manifest in Python, ms |\n|" + "---|" * 11
    )
    rows_out = []
    for rows, partitions in shapes:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            _common.in_process(handover.__file__, "prepare", folder=folder, rows=rows, partitions=partitions)
            _common.settle()
            r = _common.in_process(__file__, "run", folder=folder, rows=rows)
        each = r["seconds"] / rows * 1e9
        print(
            f"| {rows:,} | {partitions:,} | {r['write']:.2f} | {r['finalize']:.2f} | {each:.0f} | {r['bytes'] / 2**20:.0f} | {r['files']} "
            f"| {r['ranges']:,} | {r['manifest'] / 1024:.0f} | {r['open'] * 1e3:.1f} | {r['parse'] * 1e3:.1f} |",
            flush=True,
        )
        rows_out.append({"rows": rows, "partitions": partitions, "each": each})
    first = rows_out[0]
    against = f"against {first['rows']:,} rows, K={first['partitions']:,}"
    return [
        _common.row(f"time of a row of {r['rows']:,}, K={r['partitions']:,}, {against}", r["each"], first["each"],
                    r["each"] / first["each"], "us a thousand rows")
        for r in rows_out[1:]
    ]  # fmt: skip


def shapes(millions: list[int]) -> list[tuple[int, int]]:
    return [(n * 1_000_000, 1024) for n in millions] + [(ROWS, k) for k in PARTITIONS]


def main(arguments: list[str]) -> None:
    millions = _common.counts(arguments, "MILLIONS_OF_ROWS") or [1, 4, 16, 32]
    print(f"{_common.machine()}\n{_common.versions()}")
    measure(shapes(millions))


if __name__ == "__main__":
    _common.dispatch({"run": run}, main)
