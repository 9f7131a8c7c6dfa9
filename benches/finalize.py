"""The finalizer alone: an artifact on the local disk -> the files of an index segment. `just bench finalize [rows]`.

Against writing the same index from memory, through Lance's own file writer (prepared batches, as they are in the index) and as
plain bytes. Counts what is read and how busy the cores are. Each run is a process of its own, interleaved; medians.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import _common
import handover


def prepare(folder: str, rows: int) -> dict[str, Any]:
    import lance_artifact as la

    handover.prepare(folder, rows)
    ds, batches, centroids, codebook = handover.load(folder, rows)
    model = la.IvfPqModel(centroids, codebook)
    source = la.describe_source(ds, "vector")
    with la.PartitionArtifactBuilder(f"{folder}/artifact", model, source=source) as builder:
        for batch in batches:
            builder.append_batch(batch)
    build(folder, "segment")
    return {}


def build(folder: str, name: str) -> dict[str, Any]:
    """Build a segment, and move it to `name`."""
    import lance

    import lance_artifact as la
    from lance_artifact import _lance_artifact as core
    from lance_artifact._dataset import Handle

    handle = Handle.of(lance.dataset(f"{folder}/base.lance"))
    segment_uuid = str(uuid.uuid4())
    before = os.times()
    with _common.Peak() as peak:
        artifact = la.Artifact.open(f"{folder}/artifact")
        segment = core.build_segment(handle.core, "vector", [artifact], segment_uuid)
    after = os.times()
    busy = (after.user - before.user + after.system - before.system) / peak.seconds
    shutil.rmtree(f"{folder}/{name}", ignore_errors=True)
    shutil.move(f"{folder}/base.lance/_indices/{segment_uuid}", f"{folder}/{name}")
    return {"seconds": peak.seconds, "bytes": peak.bytes, "read": segment.bytes_read, "cores": busy}


def ours(folder: str) -> dict[str, Any]:
    return build(folder, "ours")


def lance_writer(folder: str) -> dict[str, Any]:
    """Lance's file writer, given the index's own batches, one for each partition, from memory."""
    from lance.file import LanceFileReader, LanceFileWriter

    reader = LanceFileReader(f"{folder}/segment/auxiliary.idx")
    table = reader.read_all(batch_size=4096).to_table().combine_chunks()
    batches = table.to_batches(max_chunksize=4096)
    began = time.perf_counter()
    with LanceFileWriter(f"{folder}/written.idx", table.schema, version="2.1") as writer:
        for batch in batches:
            writer.write_batch(batch)
    return {"seconds": time.perf_counter() - began}


def plain(folder: str) -> dict[str, Any]:
    """The bytes of the index as they are, by the system alone."""
    content = Path(f"{folder}/segment/auxiliary.idx").read_bytes()
    began = time.perf_counter()
    with Path(f"{folder}/plain").open("wb", buffering=0) as file:
        for start in range(0, len(content), 1 << 20):
            file.write(memoryview(content)[start : start + (1 << 20)])
    return {"seconds": time.perf_counter() - began}


def measure(rows: int, runs: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "lance_writer": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="finalize-") as folder:
        _common.in_process(__file__, "prepare", folder=folder, rows=rows)
        for _ in range(runs):
            for who, results in found.items():
                for left in ("ours", "written.idx", "plain"):
                    path = Path(folder, left)
                    shutil.rmtree(path, ignore_errors=True)
                    path.unlink(missing_ok=True)
                _common.settle()
                results.append(_common.in_process(__file__, who, folder=folder))
    seconds = {who: statistics.median(r["seconds"] for r in each) for who, each in found.items()}
    recorded = rows * (8 + handover.SUB_VECTORS)
    last = found["ours"][-1]
    print(
        f"\nfinalizer alone: {rows:,} rows, K={handover.PARTITIONS}, M={handover.SUB_VECTORS}, {runs} runs, interleaved\n"
    )
    print("| | seconds | runs |\n|---|---|---|")
    for who, each in found.items():
        runs_ = ", ".join(f"{r['seconds']:.2f}" for r in each)
        print(f"| {who} | {seconds[who]:.2f} | {runs_} |")
    print(
        f"\n{last['read'] / 2**20:.1f} MiB read for {recorded / 2**20:.1f} MiB of row ids and codes, headers included; "
        f"{last['cores']:.1f} cores busy; peak memory {last['bytes'] / 2**20:.0f} MiB"
    )
    what = f"finalizer alone, {rows:,} rows"
    return [
        _common.row(f"{what}, within 1.3 times writing the same from memory", seconds["ours"], seconds["lance_writer"],
                    seconds["ours"] / seconds["lance_writer"], "s", seconds["plain"]),
        _common.row(f"{what}, each recorded byte read once", last["read"] / 2**20, recorded / 2**20, last["read"] / recorded, "MiB"),
        _common.row(f"{what}, cores busy", last["cores"], float(os.cpu_count() or 1), last["cores"] / (os.cpu_count() or 1), "cores"),
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    (rows,) = _common.counts(arguments, "ROWS") or [handover.ROWS]
    print(f"{_common.machine()}\n{_common.versions()}")
    _common.report(measure(rows, 5), Path("finalize.json"))


if __name__ == "__main__":
    jobs = {"prepare": prepare, "ours": ours, "lance_writer": lance_writer, "plain": plain}
    _common.dispatch(jobs, main)
