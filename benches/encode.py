"""A given model, many partitions: encode to committed index, every centroid compared or the nearest groups', against stock pylance.

`just bench encode [--rows N --dim D --partitions K --sub-vectors M --runs N --rounds-of-stock N]`

The same vectors and the same model; each run is a process of its own, interleaved. Of 20,000 rows of each index it is looked up, by
brute force in float32 outside of all of them, whether they are with their nearest centroid. Without a shape: those of the goals.
Prints a table and writes encode.json.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import _common
import build

# rows, dimension, partitions, sub-vectors
SHAPES = ((1_000_000, 128, 16_384, 16), (1_000_000, 128, 65_536, 16), (1_000_000, 768, 16_384, 96))
CHECKED, AT_ONCE = 20_000, 500


def prepare(folder: str, rows: int, dim: int, k: int, m: int) -> dict[str, Any]:
    import lance

    import lance_artifact as la

    build.write(folder, build.vectors(rows, dim))
    ds = lance.dataset(f"{folder}/vectors.lance")
    with _common.Peak() as peak:
        model = la.train(
            ds,
            "vector",
            num_partitions=k,
            num_sub_vectors=m,
            sample_rate=min(256, max(8, rows // k)),
            backend="cpu",
        )
    np.savez(
        f"{folder}/model.npz",
        centroids=np.asarray(model.ivf_centroids.flatten()).reshape(k, dim),
        codebook=np.asarray(model.pq_codebook.flatten()).reshape(m, 256, dim // m),
    )
    return {"seconds": peak.seconds}


def index(folder: str, who: str) -> dict[str, Any]:
    import lance

    import lance_artifact as la

    shutil.rmtree(f"{folder}/{who}.lance", ignore_errors=True)
    shutil.copytree(f"{folder}/vectors.lance", f"{folder}/{who}.lance")
    ds = lance.dataset(f"{folder}/{who}.lance")
    saved = np.load(f"{folder}/model.npz")
    centroids, codebook = saved["centroids"], saved["codebook"]
    given: dict[str, Any] = {
        "num_partitions": len(centroids),
        "num_sub_vectors": len(codebook),
        "ivf_centroids": centroids,
        "pq_codebook": codebook,
    }
    with _common.Peak() as peak:
        if who == "stock":
            ds.create_index("vector", "IVF_PQ", **given)
        else:
            la.create_index(ds, "vector", backend="cpu", assign=who, **given)
    return {"seconds": peak.seconds, "bytes": peak.bytes, **missed(f"{folder}/{who}.lance", centroids)}


def missed(uri: str, centroids: np.ndarray) -> dict[str, Any]:
    """Of some rows of an index those that are not with their nearest centroid, beyond what float32 can tell."""
    import lance
    from lance.file import LanceFileReader

    ds = lance.dataset(uri)
    rows = np.sort(np.random.default_rng(3).choice(ds.count_rows(), CHECKED, replace=False))
    taken = ds.take(rows.tolist(), columns=["vector", "_rowid"])
    vectors = np.asarray(taken["vector"].combine_chunks().flatten()).reshape(CHECKED, -1)
    row_ids = np.asarray(taken["_rowid"])
    (stats,) = ds.stats.index_stats("vector_idx")["indices"]
    sizes = [partition["size"] for partition in stats["partitions"]]
    indexed = LanceFileReader(f"{uri}/_indices/{stats['uuid']}/auxiliary.idx").read_all().to_table()["_rowid"]
    order = np.argsort(np.asarray(indexed))
    partitions = np.repeat(np.arange(len(sizes)), sizes)[
        order[np.searchsorted(indexed, row_ids, sorter=order)]
    ]
    squares = (centroids.astype("f8") ** 2).sum(1)
    count = 0
    for start in range(0, CHECKED, AT_ONCE):
        some = vectors[start : start + AT_ONCE]
        distances = squares[None] - 2 * (some @ centroids.T).astype("f8")
        nearest = distances.min(1)
        found = distances[np.arange(len(some)), partitions[start : start + AT_ONCE]]
        count += int((found > nearest + 1e-5 * np.abs(squares).max()).sum())
    return {"missed": count / CHECKED}


def exact(folder: str) -> dict[str, Any]:
    return index(folder, "exact")


def fast(folder: str) -> dict[str, Any]:
    return index(folder, "fast")


def stock(folder: str) -> dict[str, Any]:
    return index(folder, "stock")


def measure(rows: int, dim: int, k: int, m: int, runs: int, of_stock: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {"exact": [], "fast": [], "stock": []}
    with tempfile.TemporaryDirectory(prefix="encode-") as folder:
        _common.in_process(__file__, "prepare", folder=folder, rows=rows, dim=dim, k=k, m=m)
        for run in range(runs):
            for name in found:
                if name != "stock" or run < of_stock:
                    found[name].append(_common.in_process(__file__, name, folder=folder))
    print(f"\n{rows:,} x {dim} float32, L2, K={k}, M={m}, given model, {runs} runs, interleaved\n")
    print(
        "| | seconds (each run) | times as fast as stock | not with their nearest centroid | peak memory, MiB |"
    )
    print("|---|---|---|---|---|")
    medians = {name: statistics.median(r["seconds"] for r in each) for name, each in found.items()}
    for name, each in found.items():
        times = ", ".join(f"{r['seconds']:.1f}" for r in each)
        memory = statistics.median(r["bytes"] for r in each) / 2**20
        print(
            f"| {name} | {times} | {medians['stock'] / medians[name]:.2f} | {each[-1]['missed']:.3%} | {memory:.0f} |"
        )
    rows_out = []
    for name in ("exact", "fast"):
        what = f"encode to committed index, assign={name!r}, {rows:,} x {dim}, K={k}, M={m}"
        rows_out += [
            _common.row(
                f"{what}, at least 3 times as fast",
                medians[name],
                medians["stock"],
                medians["stock"] / medians[name],
                "s",
            ),
            _common.row(
                f"rows not with their nearest centroid, {what}, at most 0.1 %",
                100 * found[name][-1]["missed"],
                100 * found["stock"][-1]["missed"],
                found[name][-1]["missed"] / max(found["stock"][-1]["missed"], 1e-9),
                "%",
            ),
        ]
    return rows_out


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--partitions", type=int, default=16_384)
    parser.add_argument("--sub-vectors", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds-of-stock", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("encode.json"))
    a = parser.parse_args(arguments)
    shapes = [(a.rows, a.dim, a.partitions, a.sub_vectors)] if a.rows else list(SHAPES)
    print(f"{_common.machine()}\n{_common.versions()}")
    results = []
    for shape in shapes:
        results += measure(*shape, a.runs, a.rounds_of_stock)
    _common.report(results, a.json)


if __name__ == "__main__":
    _common.dispatch({"prepare": prepare, "exact": exact, "fast": fast, "stock": stock}, main)
