"""An index's life beside stock's: build, append one percent and extend, ten such deltas and merge.

    benches/life.py [--rows 4000000] [--dim 128] [--partitions 1024] [--sub-vectors 16] [--memory-limit 268435456]

Both begin with the same table and the same index of ours, files shared by hard links. Each step is a process of its own. Recall is that of
`lance_artifact.evaluate`, with the same queries throughout, at nprobes=16 and refine_factor=10.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

import lance_artifact as la
from _common import Peak, dispatch, in_process, report, row, settle

NAME, DELTAS = "vector_idx", 10
SEARCH: dict[str, Any] = {"nprobes": [16], "refine_factors": [10]}


def table(rows: int, dim: int, seed: int) -> pa.Table:
    """Vectors around 4,096 centers, the same ones for every seed."""
    centers = np.random.default_rng(0).standard_normal((4096, dim), dtype=np.float32)
    rng = np.random.default_rng(seed)
    array = rng.standard_normal((rows, dim), dtype=np.float32)
    array += 2 * centers[rng.integers(0, len(centers), rows)]
    return pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), dim)})


def write(path: str, rows: int, dim: int, part: int = 500_000) -> dict[str, Any]:
    for at in range(0, rows, part):
        lance.write_dataset(table(min(part, rows - at), dim, 1 + at), path, mode="append" if at else "create")
    return {}


def append(path: str, rows: int, dim: int, seed: int) -> dict[str, Any]:
    lance.write_dataset(table(rows, dim, 10**9 + seed), path, mode="append")
    return {}


def build(path: str, **options: Any) -> dict[str, Any]:
    with Peak() as peak:
        la.create_index(path, "vector", backend="cpu", **options)
    return {"seconds": peak.seconds, "bytes": peak.bytes}


def extend(path: str, **options: Any) -> dict[str, Any]:
    with Peak() as peak:
        done = la.extend_index(path, NAME, backend="cpu", **options)
    return {"seconds": peak.seconds, "bytes": peak.bytes, "said": str(done)}


def merge(path: str, **options: Any) -> dict[str, Any]:
    with Peak() as peak:
        done = la.merge_segments(path, NAME, **options)
    return {"seconds": peak.seconds, "bytes": peak.bytes, "said": str(done)}


def optimize(path: str, **options: Any) -> dict[str, Any]:
    ds = lance.dataset(path)
    with Peak() as peak:
        ds.optimize.optimize_indices(**options)
    return {"seconds": peak.seconds, "bytes": peak.bytes}


def recall(path: str, queries: str, seed: int = 0) -> dict[str, Any]:
    found = la.evaluate(path, NAME, np.load(queries), **SEARCH).settings[0]
    return {"recall": found.recall, "rows": found.rows_scanned, "latency": found.latency_ms}


def copied(path: Path, name: str) -> str:
    """The same dataset elsewhere: its files are never changed, only added to."""
    target = path.with_name(name)
    shutil.copytree(path, target, copy_function=os.link)
    return str(target)


def measure(
    rows: int, dim: int, partitions: int, sub_vectors: int, memory_limit: int | None, folder: Path
) -> list[dict[str, Any]]:
    def run(job: str, **arguments: Any) -> dict[str, Any]:
        settle()
        found = in_process(__file__, job, **arguments)
        shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
        print(f"{job:9} {Path(arguments.get('path', '')).name:7} {shown}", flush=True)
        return found

    ours, one = str(folder / "ours"), rows // 100
    queries = str(folder / "queries.npy")
    np.save(queries, np.stack(table(200, dim, 77)["vector"].to_numpy(zero_copy_only=False)))
    run("write", path=ours, rows=rows, dim=dim)
    options = {"num_partitions": partitions, "num_sub_vectors": sub_vectors, "sample_rate": 64}
    built = run("build", path=ours, memory_limit=memory_limit, **options)
    before = run("recall", path=ours, queries=queries)
    run("append", path=ours, rows=one, dim=dim, seed=0)
    delta, default = copied(Path(ours), "delta"), copied(Path(ours), "default")
    extended = run("extend", path=ours, memory_limit=memory_limit)
    stock_delta = run("optimize", path=delta, num_indices_to_merge=0)
    stock_default = run("optimize", path=default)
    after_one = run("recall", path=ours, queries=queries)
    stock_one = run("recall", path=delta, queries=queries)
    for copy in (delta, default):
        shutil.rmtree(copy)
    for seed in range(1, DELTAS):
        run("append", path=ours, rows=one, dim=dim, seed=seed)
        run("extend", path=ours, memory_limit=memory_limit)
    after_ten = run("recall", path=ours, queries=queries)
    stock = copied(Path(ours), "stock")
    merged = run("merge", path=ours, memory_limit=memory_limit)
    stock_merged = run("optimize", path=stock, num_indices_to_merge=DELTAS + 1)
    after_merge = run("recall", path=ours, queries=queries)
    stock_after = run("recall", path=stock, queries=queries)
    shutil.rmtree(stock)
    run("build", path=ours, memory_limit=memory_limit, replace=True, **options)
    fresh = run("recall", path=ours, queries=queries)
    mib = 2**20
    return [
        row("extend by 1 %: time, of the build's", extended["seconds"], built["seconds"], extended["seconds"] / built["seconds"], "s"),
        row("extend by 1 %: time, stock default optimize", extended["seconds"], stock_default["seconds"], stock_default["seconds"] / extended["seconds"], "s"),
        row("extend by 1 %: time, stock optimize to a delta", extended["seconds"], stock_delta["seconds"], stock_delta["seconds"] / extended["seconds"], "s"),
        row("extend by 1 %: memory, stock to a delta", extended["bytes"] / mib, stock_delta["bytes"] / mib, extended["bytes"] / stock_delta["bytes"], "MiB"),
        row("merge 11 segments: time", merged["seconds"], stock_merged["seconds"], stock_merged["seconds"] / merged["seconds"], "s"),
        row("merge 11 segments: memory", merged["bytes"] / mib, stock_merged["bytes"] / mib, merged["bytes"] / stock_merged["bytes"], "MiB"),
        row("recall after the build, and of a fresh one at the end", before["recall"], fresh["recall"], before["recall"] / fresh["recall"], "recall@10"),
        row("recall after one delta", after_one["recall"], stock_one["recall"], after_one["recall"] / stock_one["recall"], "recall@10"),
        row("recall after ten deltas, fresh build", after_ten["recall"], fresh["recall"], after_ten["recall"] / fresh["recall"], "recall@10"),
        row("recall after the merge, stock's", after_merge["recall"], stock_after["recall"], after_merge["recall"] / stock_after["recall"], "recall@10"),
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--partitions", type=int, default=1024)
    parser.add_argument("--sub-vectors", type=int, default=16)
    parser.add_argument("--memory-limit", type=int)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="life-") as folder:
        rows = measure(
            args.rows, args.dim, args.partitions, args.sub_vectors, args.memory_limit, Path(folder)
        )
    report(rows, Path("bench-life.json"))


if __name__ == "__main__":
    dispatch(
        {
            "write": write,
            "append": append,
            "build": build,
            "extend": extend,
            "merge": merge,
            "optimize": optimize,
            "recall": recall,
        },
        main,
    )
