"""A CPU build end to end, `create_index(backend="cpu")`, against stock pylance's and faiss's, with recall@10 and memory.

`just bench build [--rows N --dim D --partitions K --sub-vectors M --runs N --skip faiss]`
`just bench build --vectors patches|text [--metric l2|cosine|dot --dtype f2|f4|f8 --index-type IVF_HNSW_PQ]`

The same vectors, K, M, sample_rate and max_iters; each run is a process of its own with a seed of its own, interleaved. faiss twice: with as
many iterations, and with its own defaults for them; it takes float32, L2 and IVF_PQ only. Recall at equal `nprobes`, and at equal shares of
the rows scanned. Without a shape: those of the goals. Real vectors: see real.py. Prints a table and writes build.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import _common
import quality
import real
from gpu import block

# rows, dimension, partitions, sub-vectors, times as fast as stock, and as faiss
SHAPES = (
    (300_000, 768, 512, 96, 12.0, 15.0),
    (1_000_000, 128, 1024, 16, 8.0, 2.0),
    (1_050_000, 128, 4096, 16, 6.0, 2.0),
)
# Seconds from which on a run of faiss is not repeated.
SLOW = 60
BLOCK, QUERIES, NEIGHBOURS, PROBES, ITERATIONS = 50_000, 200, 10, 20, 50


def vectors(rows: int, dim: int) -> np.ndarray:
    return np.concatenate(
        [block(n, min(BLOCK, rows - n * BLOCK), dim, "float32") for n in range(-(-rows // BLOCK))]
    )


def write(folder: str, array: np.ndarray) -> None:
    import lance

    column = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
    table = pa.table({"id": pa.array(np.arange(len(array))), "vector": column})
    lance.write_dataset(table, f"{folder}/vectors.lance", max_rows_per_file=100_000)


def prepare(folder: str, what: str, rows: int, dim: int, metric: str, dtype: str) -> dict[str, Any]:
    """Vectors on disk, and queries that are none of them with their nearest rows."""
    if what == "made":
        array, queries = vectors(rows, dim), block(-1, QUERIES, dim, "float32")
    else:
        array = real.SETS[what]()
        queries, array = array[:QUERIES], array[QUERIES:]
    write(folder, array.astype(dtype))
    if metric == "cosine":
        array, queries = quality.unit(array), quality.unit(queries)
    squares = 0 if metric == "dot" else (array**2).sum(1)
    truth = []
    for query in queries:
        distances = squares - 2 * array @ query
        nearest = np.argpartition(distances, NEIGHBOURS)[:NEIGHBOURS]
        truth.append(nearest[np.argsort(distances[nearest])])
    np.savez(f"{folder}/queries.npz", queries=queries, truth=np.array(truth))
    return {"rows": len(array), "dim": array.shape[1]}


def recall(folder: str, search: Any) -> float:
    saved = np.load(f"{folder}/queries.npz")
    hits = sum(
        len(set(search(query)) & set(expected.tolist()))
        for query, expected in zip(saved["queries"], saved["truth"], strict=True)
    )
    return hits / saved["truth"].size


def build(folder: str, shape: dict[str, Any], seed: int, who: str) -> dict[str, Any]:
    import lance

    import lance_artifact as la

    shutil.rmtree(f"{folder}/{who}.lance", ignore_errors=True)
    shutil.copytree(f"{folder}/vectors.lance", f"{folder}/{who}.lance")
    ds = lance.dataset(f"{folder}/{who}.lance")
    stages: dict[str, float] = {}

    def progress(step: Any) -> None:
        now = time.perf_counter()
        stages[step.stage] = now if step.event == "start" else stages[step.stage]
        if step.event == "complete":
            stages[step.stage] = now - stages[step.stage]

    with _common.Peak() as peak:
        if who == "ours":
            la.create_index(ds, "vector", backend="cpu", seed=seed, progress=progress, **shape)
        else:
            ds.create_index("vector", **shape)
    ds = lance.dataset(f"{folder}/{who}.lance")

    def search(query: np.ndarray) -> list[int]:
        nearest = {"column": "vector", "q": query, "k": NEIGHBOURS, "nprobes": PROBES}
        found: list[int] = ds.to_table(columns=["id", "_distance"], nearest=nearest)["id"].to_pylist()
        return found

    saved = np.load(f"{folder}/queries.npz")
    return {
        "seconds": peak.seconds, "bytes": peak.bytes, "recall": recall(folder, search), "stages": stages,
        **quality.of_index(ds, "vector_idx", saved["queries"], saved["truth"], "id"),
    }  # fmt: skip


def ours(folder: str, shape: dict[str, Any], seed: int) -> dict[str, Any]:
    return build(folder, shape, seed, "ours")


def stock(folder: str, shape: dict[str, Any], seed: int) -> dict[str, Any]:
    return build(folder, shape, seed, "stock")


def faiss(folder: str, shape: dict[str, Any], seed: int) -> dict[str, Any]:
    return of_faiss(folder, shape, seed, ITERATIONS)


def faiss_default(folder: str, shape: dict[str, Any], seed: int) -> dict[str, Any]:
    return of_faiss(folder, shape, seed, None)


def of_faiss(folder: str, shape: dict[str, Any], seed: int, iterations: int | None) -> dict[str, Any]:
    """With as many iterations, or its own defaults for them: 10 for the centroids and 25 for the codewords."""
    import faiss as library
    import lance

    column = lance.dataset(f"{folder}/vectors.lance").to_table(columns=["vector"])["vector"].combine_chunks()
    array = column.flatten().to_numpy().reshape(len(column), -1)
    dim, k = array.shape[1], shape["num_partitions"]
    with _common.Peak() as peak:
        index = library.IndexIVFPQ(library.IndexFlatL2(dim), dim, k, shape["num_sub_vectors"], 8)
        if iterations is not None:
            index.cp.niter = index.pq.cp.niter = iterations
        index.cp.seed = index.pq.cp.seed = seed + 1
        # As many training vectors as the others take.
        index.cp.max_points_per_centroid = index.pq.cp.max_points_per_centroid = 256
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(array), min(len(array), 256 * max(k, 256)), replace=False)
        index.train(np.ascontiguousarray(array[chosen]))
        index.add(array)

    def search(query: np.ndarray, nprobes: int = PROBES) -> list[int]:
        index.nprobe = nprobes
        found: list[int] = index.search(query[None], NEIGHBOURS)[1][0].tolist()
        return found

    saved = np.load(f"{folder}/queries.npz")
    sizes = np.array([index.invlists.list_size(n) for n in range(k)])
    centroids = index.quantizer.reconstruct_n(0, k)
    return {
        "seconds": peak.seconds, "bytes": peak.bytes, "stages": {}, "recall": recall(folder, search),
        **quality.at_equal_work(centroids, sizes, saved["queries"], saved["truth"], search),
    }  # fmt: skip


def measure(
    rows: int,
    dim: int,
    k: int,
    m: int,
    goal: float | None,
    of_faiss: float | None,
    runs: int,
    who: list[str],
    what: str = "made",
    metric: str = "l2",
    dtype: str = "f4",
    index_type: str = "IVF_PQ",
) -> list[dict[str, Any]]:
    shape = {
        "index_type": index_type, "metric": metric, "num_partitions": k, "num_sub_vectors": m,
        "sample_rate": 256, "max_iters": ITERATIONS,
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in who}
    with tempfile.TemporaryDirectory(prefix="build-") as folder:
        made = _common.in_process(
            __file__, "prepare", folder=folder, what=what, rows=rows, dim=dim, metric=metric, dtype=dtype
        )
        rows, dim = made["rows"], made["dim"]
        for run in range(runs):
            for name in who:
                # Whose runs differ by a few per cent, and take most of the hours.
                if name.startswith("faiss") and found[name] and found[name][0]["seconds"] > SLOW:
                    continue
                found[name].append(_common.in_process(__file__, name, folder=folder, shape=shape, seed=run))
    of = f"{rows:,} x {dim}, K={k}, M={m}"
    if (what, metric, dtype, index_type) != ("made", "l2", "f4", "IVF_PQ"):
        of += f" ({what}, {metric}, {np.dtype(dtype)}, {index_type})"
    print(
        f"\n{of}, {runs} runs, interleaved (of a faiss that takes over {SLOW} s one); recall@{NEIGHBOURS} at nprobes={PROBES}\n"
    )
    shares = " | ".join(f"at {share:.0%} of the rows" for share in quality.SHARES)
    print(
        f"| | seconds | times as fast | recall@10 (each run) | {shares} | variation of the partitions | peak memory, MiB | stages, s |"
    )
    print("|---" * (7 + len(quality.SHARES)) + "|")
    medians = {name: statistics.median(r["seconds"] for r in each) for name, each in found.items()}
    for name, each in found.items():
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in each[-1]["stages"].items())
        recalls = ", ".join(f"{r['recall']:.3f}" for r in each)
        memory = statistics.median(r["bytes"] for r in each) / 2**20
        work = " | ".join(f"{value:.3f}" for value in np.mean([r["at_equal_work"] for r in each], axis=0))
        uneven = statistics.mean(r["variation"] for r in each)
        print(
            f"| {name} | {medians[name]:.2f} | {medians[name] / medians['ours']:.2f} | {recalls} | {work} | {uneven:.2f} | {memory:.0f} | {stages} |"
        )
    # Every row against every centroid, and every sub-vector against every codeword, once.
    limit = 2 * rows * dim * (k + 256) / multiplications()
    rows_out = []
    for peer, times in (("stock", goal), ("faiss", of_faiss), ("faiss_default", None)):
        if peer not in found:
            continue
        what = f"CPU build against {peer}, {of}"
        pair = ("ours", peer)
        found_by = {name: statistics.mean(r["recall"] for r in found[name]) for name in pair}
        work = {name: np.mean([r["at_equal_work"] for r in found[name]], axis=0).tolist() for name in pair}
        uneven = {name: statistics.mean(r["variation"] for r in found[name]) for name in pair}
        memory = {name: statistics.median(r["bytes"] for r in found[name]) / 2**20 for name in pair}
        at_least = f", at least {times:g} times as fast" if times else ""
        rows_out += [
            _common.row(what + at_least, medians["ours"], medians[peer], medians[peer] / medians["ours"], "s", limit),
            _common.row(f"recall@{NEIGHBOURS}, {what}, at most 0.01 lower", found_by["ours"], found_by[peer],
                        found_by["ours"] - found_by[peer], "difference"),
            *(_common.row(f"recall@{NEIGHBOURS} at {share:.0%} of the rows scanned, {what}, no worse", work["ours"][i],
                          work[peer][i], work["ours"][i] - work[peer][i], "difference")
              for i, share in enumerate(quality.SHARES)),
            _common.row(f"variation of the partitions, {what}, at most as much", uneven["ours"], uneven[peer],
                        uneven["ours"] / uneven[peer], "deviation / mean"),
            _common.row(f"peak memory, {what}" + (", at most half" if peer == "stock" else ""), memory["ours"], memory[peer],
                        memory["ours"] / memory[peer], "MiB"),
        ]  # fmt: skip
    return rows_out


def multiplications() -> float:
    """Operations a second of numpy's matrix product, the most this machine does."""
    a = np.ones((2048, 2048), np.float32)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def peers(skip: list[str]) -> list[str]:
    """Ours first; faiss where it is installed, and what it builds is asked for."""
    there = ["stock"] + (["faiss", "faiss_default"] if importlib.util.find_spec("faiss") else [])
    return ["ours", *(name for name in there if name not in skip)]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--partitions", type=int, default=256)
    parser.add_argument("--sub-vectors", type=int, default=16)
    parser.add_argument("--vectors", default="made", choices=["made", *real.SETS])
    parser.add_argument("--metric", default="l2", choices=["l2", "cosine", "dot"])
    parser.add_argument("--dtype", default="f4", choices=["f2", "f4", "f8"])
    parser.add_argument("--index-type", default="IVF_PQ", choices=["IVF_PQ", "IVF_HNSW_PQ"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip", action="append", default=[], choices=["stock", "faiss", "faiss_default"])
    parser.add_argument("--json", type=Path, default=Path("build.json"))
    a = parser.parse_args(arguments)
    kind = {"what": a.vectors, "metric": a.metric, "dtype": a.dtype, "index_type": a.index_type}
    other = (a.metric, a.dtype, a.index_type) != ("l2", "f4", "IVF_PQ")
    who = peers([*a.skip, *(["faiss", "faiss_default"] if other else [])])
    one = a.rows or a.vectors != "made"
    shapes = [(a.rows or 0, a.dim, a.partitions, a.sub_vectors, None, None)] if one else list(SHAPES)
    print(f"{_common.machine()}\n{_common.versions()}")
    results = []
    for shape in shapes:
        results += measure(*shape, a.runs, who, **kind)
    _common.report(results, a.json)


if __name__ == "__main__":
    _common.dispatch(
        {"prepare": prepare, "ours": ours, "stock": stock, "faiss": faiss, "faiss_default": faiss_default},
        main,
    )
