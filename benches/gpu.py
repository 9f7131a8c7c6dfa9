"""A GPU against its own limits and against stock pylance on the same machine: stages, end to end, recall.

`just bench gpu [--rows N] [--dim D] [--partitions K] [--sub-vectors M] [--folder DIR] [--parts stages,ours,stock,torch]`

Stages: the scan alone, the copy to the device alone, the encoder alone, all overlapped into an artifact, the finalizer.
End to end: `create_index(backend="cuvs")`, stock pylance on all cores, and pylance's `accelerator="cuda"` where PyTorch has
a GPU. Prints a table, and writes it to gpu.json. The dataset is kept in the folder, so that parts can run one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import _common
import quality

PARTS = ("stages", "ours", "stock", "torch")
BLOCK = 50_000
NEIGHBOURS = 10


def block(seed: int, rows: int, dimension: int, dtype: str) -> np.ndarray:
    """Clusters with a few directions of their own and noise, as embeddings have; a fixed seed a block."""
    shared = np.random.default_rng(7)
    centers = shared.standard_normal((1000, dimension), dtype=np.float32)
    directions = shared.standard_normal((16, dimension), dtype=np.float32)
    rng = np.random.default_rng(1000 + seed)
    vectors = centers[rng.integers(0, len(centers), rows)]
    vectors += rng.standard_normal((rows, 16), dtype=np.float32) @ directions * 0.3
    vectors += rng.standard_normal((rows, dimension), dtype=np.float32) * 0.3
    return vectors.astype(dtype)


def dataset(folder: Path, a: argparse.Namespace) -> Any:
    import lance

    path = folder / f"vectors-{a.rows}-{a.dim}-{a.dtype}.lance"
    if not path.exists():
        schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.from_numpy_dtype(a.dtype), a.dim))])

        def one(number: int) -> pa.RecordBatch:
            rows = min(BLOCK, a.rows - number * BLOCK)
            values = pa.array(block(number, rows, a.dim, a.dtype).reshape(-1))
            ids = pa.array(np.arange(number * BLOCK, number * BLOCK + rows))
            return pa.record_batch([ids, pa.FixedSizeListArray.from_arrays(values, a.dim)], schema=schema)

        with ThreadPoolExecutor(8) as pool:
            numbers = range(-(-a.rows // BLOCK))
            # A few ahead: all at once would hold the dataset in memory.
            batches = (b for i in range(0, len(numbers), 8) for b in pool.map(one, numbers[i : i + 8]))
            reader = pa.RecordBatchReader.from_batches(schema, batches)
            lance.write_dataset(reader, str(path), max_rows_per_file=1 << 18)
    return lance.dataset(str(path))


def stages(ds: Any, a: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Each stage alone and all together, medians of `runs`."""
    import lance_artifact as la
    from lance_artifact._dataset import Handle
    from lance_artifact._encode import encode_on_devices
    from lance_artifact._lance_artifact import _CudaDevice, measure_copy
    from lance_artifact.backends import resolve_backend
    from lance_artifact.backends._cuvs_calls import Cuvs

    backend = resolve_backend("cuvs")
    began = time.perf_counter()
    model = la.train(ds, "vector", metric=a.metric, num_partitions=a.partitions, num_sub_vectors=a.sub_vectors,
                     sample_rate=a.sample_rate, max_iters=a.max_iters, backend=backend)  # fmt: skip
    training = time.perf_counter() - began
    source = Handle.of(ds).vectors("vector")
    encoder = backend.encoder(model)
    row_bytes = a.dim * np.dtype(encoder.input_dtype).itemsize
    limits: dict[str, list[float]] = {"scan": [], "copy": [], "transform": []}
    whole: list[tuple[float, float, dict[str, Any]]] = []
    rates: list[float] = []
    for run in range(a.runs + 1):
        target = folder / "artifact"
        shutil.rmtree(target, ignore_errors=True)
        began = time.perf_counter()
        with la.PartitionArtifactBuilder(target, model, source=la.describe_source(ds, "vector")) as builder:
            _, _, reports = encode_on_devices(encoder, model, source, builder, a.batch_rows, None)
            encoded = time.perf_counter() - began
        done = time.perf_counter() - began
        batch = reports[0]["batch_rows"]
        rate, _ = measure_copy(0, size=min(batch * row_bytes, 1 << 28))
        _, scanning = source.drain()
        # The encoder on a batch that is there already.
        library = Cuvs()
        vectors = np.ascontiguousarray(block(0, batch, a.dim, encoder.input_dtype))
        with _CudaDevice(0), contextlib.closing(encoder.open(0, 0)) as session:
            inputs = library.to_device(vectors)
            outputs = (
                library.empty((batch,), np.uint32),
                library.empty((batch, model.pq_code_width), np.uint8),
            )
            session.encode(inputs, *outputs)
            session.finish()
            repeats = 5
            began = time.perf_counter()
            for _ in range(repeats):
                session.encode(inputs, *outputs)
            session.finish()
            transforming = (time.perf_counter() - began) / repeats * a.rows / batch
            del inputs, outputs
        if run == 0:
            continue  # caches, pools and the page cache warm up
        rates.append(rate)
        limits["scan"].append(scanning)
        limits["copy"].append(a.rows * row_bytes / rate)
        limits["transform"].append(transforming)
        whole.append((encoded, done, reports[0]))
    shutil.rmtree(folder / "indexed.lance", ignore_errors=True)
    shutil.copytree(ds.uri, folder / "indexed.lance")
    began = time.perf_counter()
    la.finalize(str(folder / "indexed.lance"), "vector", str(folder / "artifact"))
    finalizing = time.perf_counter() - began
    medians = {name: statistics.median(found) for name, found in limits.items()}
    encoding, slowest = statistics.median(w[0] for w in whole), max(medians.values())
    report = sorted(whole, key=lambda w: w[0])[len(whole) // 2][2]
    copied = a.rows * row_bytes / report["copy_seconds"] if report["copy_seconds"] else 0.0
    print("\n| stage | seconds |\n|---|---|")
    for name, seconds in (
        ("train", training), ("scan only", medians["scan"]), ("copy to the device only", medians["copy"]),
        ("transform only", medians["transform"]), ("scan, copy, transform and write, overlapped", encoding),
        ("close and publish the artifact", statistics.median(w[1] - w[0] for w in whole)), ("finalize", finalizing),
    ):  # fmt: skip
        print(f"| {name} | {seconds:.2f} |")
    print("\none run's pipeline:", json.dumps(report))
    return [
        _common.row("encode stage, at most 1.25 times the slowest single stage", encoding, slowest, encoding / slowest, "s", slowest),
        _common.row("copies to the device, at least 0.8 of the pinned bandwidth", copied / 1e9, statistics.median(rates) / 1e9,
                    copied / statistics.median(rates), "GB/s", statistics.median(rates) / 1e9),
    ]  # fmt: skip


def found_by(ds: Any, a: argparse.Namespace) -> dict[str, Any]:
    """Recall at 10, of 100 queries that are not in the dataset: with 20 partitions searched, and with 1, 3 and 10 % of the rows."""
    queries = block(-1, 100, a.dim, "float32")
    unit = (lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)) if a.metric == "cosine" else (lambda v: v)
    best: list[tuple[np.ndarray, np.ndarray]] = []
    for number in range(-(-a.rows // BLOCK)):
        vectors = unit(block(number, min(BLOCK, a.rows - number * BLOCK), a.dim, a.dtype).astype(np.float32))
        scores = unit(queries) @ vectors.T
        if a.metric != "dot":
            scores = 2 * scores - (vectors**2).sum(1)
        top = np.argpartition(-scores, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        best.append((np.take_along_axis(scores, top, 1), top + number * BLOCK))
    scores, ids = (np.concatenate(part, 1) for part in zip(*best, strict=True))
    truth = np.take_along_axis(ids, np.argsort(-scores, axis=1)[:, :NEIGHBOURS], 1)
    hits = 0
    for query, expected in zip(queries, truth, strict=True):
        nearest = {"column": "vector", "q": query.astype(a.dtype), "k": NEIGHBOURS, "nprobes": 20}
        found = ds.to_table(columns=["id", "_distance"], nearest=nearest)["id"].to_pylist()
        hits += len(set(found) & set(expected.tolist()))
    return {"recall": hits / truth.size, **quality.of_index(ds, "vector_idx", unit(queries), truth, "id")}


def end_to_end(ds: Any, a: argparse.Namespace, folder: Path, who: str) -> dict[str, Any]:
    import lance

    import lance_artifact as la

    target = folder / f"{who}.lance"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ds.uri, target)
    copy = lance.dataset(str(target))
    shape = {"metric": a.metric, "num_partitions": a.partitions, "num_sub_vectors": a.sub_vectors}
    training = {"sample_rate": a.sample_rate, "max_iters": a.max_iters}
    began = time.perf_counter()
    if who == "ours":
        la.create_index(copy, "vector", backend="cuvs", **shape, **training)
    elif who == "stock":
        copy.create_index("vector", "IVF_PQ", **shape, **training)
    else:
        copy.create_index("vector", "IVF_PQ", accelerator="cuda", **shape, **training)
    seconds = time.perf_counter() - began
    result = {"seconds": seconds, **found_by(lance.dataset(str(target)), a)}
    shutil.rmtree(target, ignore_errors=True)
    shares = ", ".join(
        f"{recall:.4f} in {share:.0%} of the rows"
        for share, recall in zip(quality.SHARES, result["at_equal_work"], strict=True)
    )
    print(
        f"{who}: {seconds:.1f} s, recall@{NEIGHBOURS} {result['recall']:.4f} in 20 partitions, {shares}, variation {result['variation']:.2f}"
    )
    return result


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--dtype", default="float32", choices=["float16", "float32", "float64"])
    parser.add_argument("--metric", default="l2", choices=["l2", "cosine", "dot"])
    parser.add_argument("--partitions", type=int, default=4096)
    parser.add_argument("--sub-vectors", type=int, default=96)
    parser.add_argument("--sample-rate", type=int, default=256)
    parser.add_argument("--max-iters", type=int, default=50)
    parser.add_argument("--batch-rows", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="kept; default a temporary one")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    a = parser.parse_args(arguments)
    parts = a.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts: got {a.parts}, expected some of {','.join(PARTS)}")
    from lance_artifact.backends import available_backends

    found = available_backends()["cuvs"]
    if not found.ok:
        sys.exit("; ".join(found.missing))
    device = found.details["devices"][0]
    machine = f"{_common.machine()}; {device['name']}, CUDA driver {found.details['cuda_driver']}"
    versions = {**_common.versions(), "cuvs": found.details["cuvs"]}
    print(
        f"{machine}\n{versions}\n{a.rows:,} x {a.dim} {a.dtype}, {a.metric}, K={a.partitions}, M={a.sub_vectors}"
    )
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = a.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-")))
        folder.mkdir(parents=True, exist_ok=True)
        ds = dataset(folder, a)
        if "stages" in parts:
            rows += stages(ds, a, folder)
        # Of builds of the same kind, which may have run before.
        shape = (a.rows, a.dim, a.dtype, a.metric, a.partitions, a.sub_vectors, a.sample_rate, a.max_iters)
        kept = folder / f"results-{'-'.join(map(str, shape))}.json"
        results = json.loads(kept.read_text()) if kept.exists() else {}
        for who in ("ours", "stock", "torch"):
            if who in parts and (who != "torch" or importlib.util.find_spec("torch") is not None):
                results[who] = end_to_end(ds, a, folder, who)
                kept.write_text(json.dumps(results))
        for who, what in (("stock", "stock pylance on the CPU"), ("torch", "pylance's accelerator='cuda'")):
            if who in results and "ours" in results:
                ours, theirs = results["ours"], results[who]
                at_least = ", at least 5 times as fast" if who == "stock" else ""
                rows.append(_common.row(f"end to end against {what}{at_least}", ours["seconds"], theirs["seconds"],
                                        theirs["seconds"] / ours["seconds"], "s"))  # fmt: skip
                rows.append(_common.row(f"recall@10 beside {what}, at most 0.01 lower", ours["recall"], theirs["recall"],
                                        ours["recall"] - theirs["recall"], "difference"))  # fmt: skip
                for share, mine, other in zip(
                    quality.SHARES, ours["at_equal_work"], theirs["at_equal_work"], strict=True
                ):
                    rows.append(_common.row(f"recall@10 at {share:.0%} of the rows scanned, beside {what}, no worse", mine, other,
                                            mine - other, "difference"))  # fmt: skip
    for row in rows:
        row.update(machine=machine, versions=versions)
    _common.report(rows, a.json)


if __name__ == "__main__":
    main(sys.argv[1:])
