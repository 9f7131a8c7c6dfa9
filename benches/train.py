"""Training centroids alone, against stock pylance, faiss and SuperKMeans: time, and what searches find with them.

`just bench train [--vectors patches|text --rows N --dim D --partitions K --runs N --faiss-iterations N --skip faiss]`

The same vectors and sample_rate=256. Ours and stock draw their samples from the table, which is part of their time; the others get one in
memory. SuperKMeans has its own defaults (two levels, float32). faiss compares every vector of the sample with every centroid in each iteration: give a few, and multiply. Centroids are judged
alike: mean squared distance, variation of the partitions' rows, and the share of the ten nearest rows of 200 queries whose partitions are
among those with 1, 3 and 10 % of the rows. Prints a table and writes train.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import _common
import build
import quality
import real

ROWS, DIM, PARTITIONS, RATE, ITERATIONS = 4_200_000, 128, 16_384, 256, 50
JUDGED, AT_ONCE = 1_000_000, 100_000


def ours(folder: str, k: int, seed: int) -> dict[str, Any]:
    import lance

    import lance_artifact as la
    from lance_artifact._dataset import Handle
    from lance_artifact._lance_artifact import train_on_cpu

    ds = lance.dataset(f"{folder}/vectors.lance")
    stages: dict[str, float] = {}

    def progress(event: str, stage: str, *_: Any) -> None:
        if event == "complete":
            stages[stage] = time.perf_counter()

    with _common.Peak() as peak:
        began = time.perf_counter()
        sample = Handle.of(ds).vectors("vector").sample(RATE * k, "l2", seed)
        # The least that there is of the rest: only what comes before it is counted.
        model = train_on_cpu(
            sample, "l2", num_partitions=k, num_sub_vectors=2, num_bits=4, sample_rate=RATE,
            max_iters=ITERATIONS, seed=seed, progress=progress,
        )  # fmt: skip
    assert isinstance(model, la.IvfPqModel)
    save(folder, "ours", np.asarray(model.ivf_centroids.flatten()))
    return {"seconds": stages["train_ivf"] - began, "bytes": peak.bytes}


def stock(folder: str, k: int, seed: int) -> dict[str, Any]:
    import lance
    from lance.indices import IndicesBuilder

    ds = lance.dataset(f"{folder}/vectors.lance")
    with _common.Peak() as peak:
        model = IndicesBuilder(ds, "vector").train_ivf(
            num_partitions=k, sample_rate=RATE, max_iters=ITERATIONS
        )
    save(folder, "stock", np.asarray(model.centroids.flatten()))
    return {"seconds": peak.seconds, "bytes": peak.bytes}


def faiss(folder: str, k: int, seed: int, iterations: int) -> dict[str, Any]:
    import faiss as library
    import lance

    from lance_artifact._dataset import Handle

    ds = lance.dataset(f"{folder}/vectors.lance")
    sample = Handle.of(ds).vectors("vector").sample(RATE * k, "l2", seed)
    array = np.asarray(sample.flatten()).reshape(len(sample), -1)
    with _common.Peak() as peak:
        clustering = library.Kmeans(
            array.shape[1], k, niter=iterations, max_points_per_centroid=RATE, seed=seed + 1
        )
        clustering.train(array)
    save(folder, "faiss", clustering.centroids)
    return {"seconds": peak.seconds, "bytes": peak.bytes}


def superkmeans(folder: str, k: int, seed: int) -> dict[str, Any]:
    import lance
    from superkmeans import SuperKMeans

    from lance_artifact._dataset import Handle

    ds = lance.dataset(f"{folder}/vectors.lance")
    sample = Handle.of(ds).vectors("vector").sample(RATE * k, "l2", seed)
    array = np.asarray(sample.flatten()).reshape(len(sample), -1)
    with _common.Peak() as peak:
        centroids = SuperKMeans(n_clusters=k, dimensionality=array.shape[1], seed=seed + 1).train(array)
    save(folder, "superkmeans", centroids)
    return {"seconds": peak.seconds, "bytes": peak.bytes}


def save(folder: str, who: str, centroids: np.ndarray) -> None:
    np.save(f"{folder}/{who}.npy", centroids.astype("f4"))


def judge(folder: str, who: str, k: int) -> dict[str, Any]:
    """Partitions of a part of the rows tell how large all are."""
    import lance

    import lance_artifact as la

    ds = lance.dataset(f"{folder}/vectors.lance")
    saved, centroids = np.load(f"{folder}/queries.npz"), np.load(f"{folder}/{who}.npy").reshape(k, -1)
    dim = centroids.shape[1]
    book = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(16 * dim, "f4")), dim)
    given = pa.FixedSizeListArray.from_arrays(pa.array(centroids.reshape(-1)), dim)
    encoder = la.CpuEncoder(la.IvfPqModel(given, book, "l2", num_sub_vectors=2))

    def assigned(rows: np.ndarray) -> tuple[np.ndarray, float]:
        vectors = ds.take(rows, columns=["vector"])["vector"].combine_chunks()
        part_ids = np.asarray(encoder.encode(vectors)[0])
        array = np.asarray(vectors.flatten()).reshape(len(rows), -1)
        return part_ids, float(((array - centroids[part_ids]) ** 2).sum())

    rows = ds.count_rows()
    step = max(1, rows // JUDGED)
    sizes, loss = np.zeros(k), 0.0
    for start in range(0, rows, step * AT_ONCE):
        some = np.arange(start, min(rows, start + step * AT_ONCE), step)
        part_ids, distances = assigned(some)
        sizes += np.bincount(part_ids, minlength=k)
        loss += distances
    truth, queries = saved["truth"], saved["queries"]
    homes = assigned(np.unique(truth))[0][np.searchsorted(np.unique(truth), truth)]
    order = np.argsort((centroids**2).sum(1)[None] - 2 * queries @ centroids.T, axis=1)
    ranks = np.argsort(order, axis=1)
    found = [
        float((np.take_along_axis(ranks, homes, 1) < quality.probes(centroids, sizes, queries, share)[:, None]).mean())
        for share in quality.SHARES
    ]  # fmt: skip
    return {"loss": loss / sizes.sum(), "variation": quality.variation(sizes), "found": found}


def measure(
    rows: int, dim: int, k: int, runs: int, iterations: int, who: list[str], what: str = "made"
) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in who}
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        made = _common.in_process(
            __file__, "prepare", folder=folder, what=what, rows=rows, dim=dim, metric="l2", dtype="f4"
        )
        rows, dim = made["rows"], made["dim"]
        for run in range(runs):
            for name in who:
                if name == "faiss" and run:
                    continue
                more = {"iterations": iterations} if name == "faiss" else {}
                found[name].append(
                    _common.in_process(__file__, name, folder=folder, k=k, seed=run, **more)
                    | _common.in_process(__file__, "judge", folder=folder, who=name, k=k)
                )
    of = f"{rows:,} x {dim}, K={k}" + (f" ({what})" if what != "made" else "")
    print(f"\n{of}, float32, L2, sample_rate={RATE}, {runs} runs, interleaved\n")
    shares = " | ".join(f"found in {share:.0%} of the rows" for share in quality.SHARES)
    print(
        f"| | seconds (each run) | times as fast | mean squared distance | variation | {shares} | peak memory, MiB |"
    )
    print("|---" * (6 + len(quality.SHARES)) + "|")
    medians = {name: statistics.median(r["seconds"] for r in each) for name, each in found.items()}
    for name, each in found.items():
        last = each[-1]
        times = ", ".join(f"{r['seconds']:.1f}" for r in each)
        work = " | ".join(f"{value:.3f}" for value in np.mean([r["found"] for r in each], axis=0))
        named = f"{name}, {iterations} iterations" if name == "faiss" else name
        print(
            f"| {named} | {times} | {medians[name] / medians['ours']:.2f} | {last['loss']:.4g} | {last['variation']:.2f} | {work} "
            f"| {last['bytes'] / 2**20:.0f} |"
        )
    rows_out = []
    goals = {
        "stock": "at least 4 times as fast",
        "faiss": f"at least 5 times as fast as {iterations} iterations",
    }
    for peer, goal in (goals | {"superkmeans": "as it is"}).items():
        if peer in found:
            against = f"training against {peer}, {of}"
            last = {
                name: np.mean([r["found"] for r in found[name]], axis=0).tolist() for name in ("ours", peer)
            }
            rows_out += [
                _common.row(f"{against}, {goal}", medians["ours"], medians[peer], medians[peer] / medians["ours"], "s"),
                _common.row(f"found in 10 % of the rows, {against}, at most 0.005 less", last["ours"][2], last[peer][2],
                            last["ours"][2] - last[peer][2], "difference"),
            ]  # fmt: skip
    return rows_out


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", default="made", choices=["made", *real.SETS])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--partitions", type=int, default=PARTITIONS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--faiss-iterations", type=int, default=10)
    parser.add_argument("--skip", action="append", default=[], choices=["stock", "faiss", "superkmeans"])
    parser.add_argument("--json", type=Path, default=Path("train.json"))
    a = parser.parse_args(arguments)
    there = ["ours", "stock", *(name for name in ("faiss", "superkmeans") if importlib.util.find_spec(name))]
    who = [name for name in there if name not in a.skip]
    print(f"{_common.machine()}\n{_common.versions()}")
    _common.report(measure(a.rows, a.dim, a.partitions, a.runs, a.faiss_iterations, who, a.vectors), a.json)


if __name__ == "__main__":
    _common.dispatch(
        {
            "prepare": build.prepare, "ours": ours, "stock": stock, "faiss": faiss, "superkmeans": superkmeans,
            "judge": judge,
        },
        main,
    )  # fmt: skip
