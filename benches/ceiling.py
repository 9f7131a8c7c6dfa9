"""How fast everything but the encoder of a GPU build is: `scripts/bench ceiling [--rows N] [--dim D] [--dtype f4] [--partitions K]`.

The pipeline with an encoder that does nothing, over the double of the driver, whose copies to the device do nothing either (a GPU's are
made by engines of its own). Needs no GPU. Says rows a second on these cores, seconds of a core a million rows, and what 16 such cores would do
by that; beside it the scan alone, and one core copying as many bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import _common

DOUBLE = Path(__file__).parent.parent / "tests/doubles/libcuda.c"
CORES = 16


class Null:
    """An encoder whose codes are whatever is there. On the double, whose device memory is the host's."""

    def __init__(self, dtype: str, partitions: int) -> None:
        self.devices, self.input_dtype, self.partitions = (0,), dtype, partitions
        self.seen: set[int] = set()

    def open(self, device: int, stream: int) -> Null:
        return self

    def encode(self, vectors: Any, part_id: Any, pq_code: Any) -> Any:
        pointer, rows = part_id.__cuda_array_interface__["data"][0], part_id.shape[0]
        if pointer not in self.seen:
            # Once for each slot, for as many rows as it will have: the writer refuses partitions that are not there.
            self.seen.add(pointer)
            labels = np.random.default_rng(pointer).integers(0, self.partitions, rows, dtype=np.uint32)
            ctypes.memmove(pointer, labels.tobytes(), 4 * rows)

    def close(self) -> None:
        pass


def dataset(folder: Path, a: argparse.Namespace) -> Any:
    import lance

    rng = np.random.default_rng(0)
    block = rng.standard_normal((50_000, a.dim), np.float32).astype(a.dtype)
    kind = pa.list_(pa.from_numpy_dtype(block.dtype), a.dim)
    values = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), a.dim)
    schema = pa.schema([("vector", kind)])
    batches = (
        pa.record_batch([values.slice(0, min(len(block), a.rows - start))], schema=schema)
        for start in range(0, a.rows, len(block))
    )
    return lance.write_dataset(
        pa.RecordBatchReader.from_batches(schema, batches),
        str(folder / "d"),
        max_rows_per_file=-(-a.rows // 4),
    )


def once(ds: Any, model: Any, fragments: list[int], folder: Path, a: argparse.Namespace) -> dict[str, Any]:
    """Encode some fragments: rows, seconds, seconds of all cores, and the same of the scan alone."""
    import lance_artifact as la
    from lance_artifact._dataset import Handle
    from lance_artifact._encode import encode_on_devices

    shutil.rmtree(folder / "a", ignore_errors=True)
    source = Handle.of(ds).vectors("vector", fragments)

    def cores() -> float:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        return spent.ru_utime + spent.ru_stime

    before = cores()
    rows, scanning = source.drain()
    scan_cores, before, began = cores() - before, cores(), time.perf_counter()
    encoder = Null("float16" if a.dtype == "f2" else "float32", a.partitions)
    described = la.describe_source(ds, "vector", fragments)
    with la.PartitionArtifactBuilder(folder / "a", model, source=described, sync=False) as builder:
        _, _, reports = encode_on_devices(encoder, model, source, builder, a.batch_rows, None)
        seconds, spent = time.perf_counter() - began, cores() - before
    return {
        "rows": rows,
        "seconds": seconds,
        "cores": spent,
        "scan": scanning,
        "scan_cores": scan_cores,
        "report": reports[0],
    }


def measure(a: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    import lance_artifact as la

    ctypes.CDLL("libcuda.so").fake_cuda_copies_in(0)
    ds = dataset(folder, a)
    rng = np.random.default_rng(1)
    width = a.sub_vectors
    model = la.IvfPqModel(rng.standard_normal((a.partitions, a.dim)).astype(a.dtype),
                          rng.standard_normal((width, 256, a.dim // width)).astype(a.dtype), a.metric)  # fmt: skip
    everything = [f.fragment_id for f in ds.get_fragments()]
    # What is taken once, such as page-locked memory, is in both: the difference is what rows cost.
    differences: dict[str, list[float]] = {key: [] for key in ("seconds", "cores", "scan", "scan_cores")}
    for run in range(a.runs + 1):
        few, all_rows = (once(ds, model, ids, folder, a) for ids in (everything[:1], everything))
        if run:  # the first fills caches
            for key, found in differences.items():
                found.append((all_rows[key] - few[key]) / (all_rows["rows"] - few["rows"]))
    print(json.dumps(all_rows["report"]))
    seconds, core, scan, scan_core = (statistics.median(found) for found in differences.values())
    source, target = (np.ones(1 << 28, np.uint8) for _ in range(2))
    began = time.perf_counter()
    np.copyto(target, source)
    copying = (time.perf_counter() - began) / source.nbytes * a.dim * np.dtype(a.dtype).itemsize
    what = f"{a.rows:,} x {a.dim} {a.dtype}, {a.metric}, K={a.partitions}"
    print(f"\n{what}: {1e-6 / seconds:.2f} M rows/s on {os.cpu_count()} cores; {core * 1e6:.2f} s of a core a million rows, the scan alone "
          f"{scan_core * 1e6:.2f} s, one copy of them {copying * 1e6:.2f} s; {CORES} such cores: {CORES / core / 1e6:.1f} M rows/s")  # fmt: skip
    return [
        _common.row(f"all but the encoder, {what}, on {CORES} cores by projection, at least 6 M rows/s", CORES / core / 1e6, 6.0,
                    CORES / core / 6e6, "M rows/s"),
        _common.row(f"all but the encoder, {what}, a million rows, beside the scan alone", seconds * 1e6, scan * 1e6, seconds / scan, "s"),
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--dtype", default="f4", choices=["f2", "f4", "f8"])
    parser.add_argument("--metric", default="l2", choices=["l2", "cosine", "dot"])
    parser.add_argument("--partitions", type=int, default=4096)
    parser.add_argument("--sub-vectors", type=int, default=96)
    parser.add_argument("--batch-rows", type=int)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("ceiling.json"))
    a = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ceiling-") as temporary:
        folder = Path(temporary)
        if "FAKE_CUDA_DEVICES" not in os.environ:
            # Whoever loads the driver from now on, in a process of its own, gets the double.
            command = [
                "cc",
                "-O2",
                "-shared",
                "-fPIC",
                "-pthread",
                "-Wl,-soname,libcuda.so",
                "-o",
                str(folder / "libcuda.so"),
                str(DOUBLE),
            ]
            subprocess.run(command, check=True)
            (folder / "libcuda.so.1").symlink_to("libcuda.so")
            paths = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
            environment = {
                **os.environ,
                "LD_LIBRARY_PATH": paths,
                "FAKE_CUDA_DEVICES": "1",
                "FAKE_CUDA_MEMORY": str(16 << 30),
            }
            sys.exit(subprocess.run([sys.executable, __file__, *arguments], env=environment).returncode)
        _common.report(measure(a, folder), a.json)


if __name__ == "__main__":
    main(sys.argv[1:])
