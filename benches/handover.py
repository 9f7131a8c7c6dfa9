"""The hand-over: encoded Arrow batches in memory -> committed index, against stock pylance's generic-dataset hand-over.

Both get the same batches and the same model; each run is a process of its own, interleaved. `just bench handover [rows]`.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import _common

ROWS, PARTITIONS, SUB_VECTORS, DIMENSION, BATCH = 4_000_000, 1024, 64, 64, 65_536


def prepare(folder: str, rows: int, partitions: int = PARTITIONS) -> dict[str, Any]:
    """A dataset whose rows the codes stand for: the vectors are random, the codes too; nobody looks at their quality."""
    import lance

    rng = np.random.default_rng(0)
    block = rng.standard_normal((BATCH, DIMENSION)).astype(np.float16)
    schema = pa.schema([("vector", pa.list_(pa.float16(), DIMENSION))])

    def batches() -> Any:
        for start in range(0, rows, BATCH):
            values = block[: min(BATCH, rows - start)]
            yield pa.record_batch(
                [pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), DIMENSION)], schema=schema
            )

    reader = pa.RecordBatchReader.from_batches(schema, batches())
    ds = lance.write_dataset(reader, f"{folder}/base.lance", max_rows_per_file=1 << 20)
    np.savez(
        f"{folder}/model.npz",
        centroids=rng.standard_normal((partitions, DIMENSION)).astype(np.float16),
        codebook=rng.standard_normal((SUB_VECTORS, 256, DIMENSION // SUB_VECTORS)).astype(np.float16),
    )
    return {"rows": ds.count_rows()}


def load(folder: str, rows: int) -> tuple[Any, Any, list[pa.RecordBatch], Any]:
    """The dataset, the encoded batches in memory, the model."""
    import lance

    ds = lance.dataset(f"{folder}/base.lance")
    rng = np.random.default_rng(1)
    model = np.load(f"{folder}/model.npz")
    partitions = len(model["centroids"])
    row_ids = ds.to_table(columns=[], with_row_id=True)["_rowid"].combine_chunks()
    batches = []
    for start in range(0, rows, BATCH):
        ids = row_ids.slice(start, BATCH)
        codes = pa.array(rng.integers(0, 256, len(ids) * SUB_VECTORS, dtype=np.uint8))
        batches.append(
            pa.record_batch(
                [
                    ids,
                    pa.array(rng.integers(0, partitions, len(ids), dtype=np.uint32)),
                    pa.FixedSizeListArray.from_arrays(codes, SUB_VECTORS),
                ],
                ["_rowid", "__ivf_part_id", "__pq_code"],
            )
        )
    return ds, batches, model["centroids"], model["codebook"]


def ours(folder: str, rows: int, sync: bool = False) -> dict[str, Any]:
    """With sync, the artifact is on the disk before the index is begun; stock's buffers never are."""
    import lance_artifact as la

    ds, batches, centroids, codebook = load(folder, rows)
    model = la.IvfPqModel(centroids, codebook)
    with _common.Peak() as peak:
        with (
            _common.Peak() as write,
            la.PartitionArtifactBuilder(
                f"{folder}/artifact", model, source=la.describe_source(ds, "vector"), sync=sync
            ) as builder,
        ):
            for batch in batches:
                builder.append_batch(batch)
        with _common.Peak() as finalize:
            la.finalize(ds, "vector", builder.artifact)
    assert ds.stats.index_stats("vector_idx")["num_indexed_rows"] == rows
    return {"seconds": peak.seconds, "bytes": peak.bytes, "write": write.seconds, "then": finalize.seconds}


def durable(folder: str, rows: int) -> dict[str, Any]:
    return ours(folder, rows, sync=True)


def stock(folder: str, rows: int) -> dict[str, Any]:
    import lance

    ds, batches, centroids, codebook = load(folder, rows)
    named = [b.rename_columns(["row_id", "__ivf_part_id", "__pq_code"]) for b in batches]
    with _common.Peak() as peak:
        with _common.Peak() as write:
            lance.write_dataset(
                pa.RecordBatchReader.from_batches(named[0].schema, named), f"{folder}/buffers"
            )
        with _common.Peak() as create:
            ds.create_index(
                "vector",
                "IVF_PQ",
                num_partitions=PARTITIONS,
                num_sub_vectors=SUB_VECTORS,
                ivf_centroids=centroids,
                pq_codebook=codebook,
                precomputed_shuffle_buffers=["unused"],
                precomputed_shuffle_buffers_path=f"{folder}/buffers/data",
            )
    assert ds.stats.index_stats("vector_idx")["num_indexed_rows"] == rows
    return {"seconds": peak.seconds, "bytes": peak.bytes, "write": write.seconds, "then": create.seconds}


def measure(rows: int, runs: int) -> list[dict[str, Any]]:
    """Print a table, and return the goals' rows."""
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "durable": [], "stock": []}
    with tempfile.TemporaryDirectory(prefix="handover-") as folder:
        _common.in_process(__file__, "prepare", folder=folder, rows=rows)
        shutil.copytree(f"{folder}/base.lance", f"{folder}/clean.lance")
        for _ in range(runs):
            for who, found in results.items():
                shutil.rmtree(f"{folder}/base.lance")
                shutil.copytree(f"{folder}/clean.lance", f"{folder}/base.lance")
                _common.settle()
                found.append(_common.in_process(__file__, who, folder=folder, rows=rows))
                for left in ("artifact", "buffers"):
                    shutil.rmtree(f"{folder}/{left}", ignore_errors=True)
        _common.settle()
        limit = _common.write_seconds(folder, rows * (SUB_VECTORS + 8))
    medians = {w: {k: statistics.median(r[k] for r in f) for k in f[0]} for w, f in results.items()}
    print(f"\nhand-over of {rows:,} rows, K={PARTITIONS}, M={SUB_VECTORS}, {runs} runs, interleaved\n")
    print(
        "| | seconds | of which write | then build and commit | peak memory, MiB | runs |\n|---|---|---|---|---|---|"
    )
    for who, m in medians.items():
        each = ", ".join(f"{r['seconds']:.2f}" for r in results[who])
        print(
            f"| {who} | {m['seconds']:.2f} | {m['write']:.2f} | {m['then']:.2f} | {m['bytes'] / 2**20:.0f} | {each} |"
        )
    ours_, stock_ = medians["ours"], medians["stock"]
    what, durable_ = f"hand-over of {rows:,} rows", medians["durable"]
    mib = {who: m["bytes"] / 2**20 for who, m in medians.items()}
    return [
        _common.row(f"{what}, at least 5 times as fast", ours_["seconds"], stock_["seconds"],
                    stock_["seconds"] / ours_["seconds"], "s", limit),
        _common.row(f"{what}, artifact synced to the disk", durable_["seconds"], stock_["seconds"],
                    stock_["seconds"] / durable_["seconds"], "s", limit),
        _common.row(f"peak memory, {what}, at most half", mib["ours"], mib["stock"], mib["ours"] / mib["stock"], "MiB"),
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    (rows,) = _common.counts(arguments, "ROWS") or [ROWS]
    print(f"{_common.machine()}\n{_common.versions()}")
    _common.report(measure(rows, 3), Path("handover.json"))


if __name__ == "__main__":
    _common.dispatch({"prepare": prepare, "ours": ours, "durable": durable, "stock": stock}, main)
