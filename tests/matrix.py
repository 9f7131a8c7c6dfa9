"""Build, commit, search, append, extend, merge and optimize with the pylance, and the LanceDB, that are installed here.

    python tests/matrix.py

prints one JSON object: versions, and for each step "ok" or what happened. `scripts/matrix` runs it for each supported release.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ROWS, NEW, DIM, K, M = 6000, 600, 16, 8, 8


def vectors(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)


def table(values: np.ndarray, first: int = 0) -> Any:
    import pyarrow as pa

    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), DIM)
    return pa.table({"id": pa.array(range(first, first + len(values))), "vector": column})


def recall(ds: Any, values: np.ndarray, metric: str) -> float:
    found = 0
    queries = values[:: len(values) // 20][:20]
    for query in queries:
        if metric == "l2":
            distances = ((values - query) ** 2).sum(axis=1)
        else:
            norms = np.linalg.norm(values, axis=1) * np.linalg.norm(query) if metric == "cosine" else 1.0
            distances = -(values @ query) / norms
        exact = set(np.argsort(distances, kind="stable")[:10].tolist())
        nearest = {"column": "vector", "q": query, "k": 10, "nprobes": K, "refine_factor": 10}
        got = ds.to_table(columns=["id"], nearest=nearest)["id"].to_pylist()
        found += len(exact & set(got))
    return found / (10 * len(queries))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(root: Path) -> dict[str, str]:
    results: dict[str, str] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        try:
            value = work()
            results[name] = "ok"
            return value
        except BaseException as error:
            if "-v" in sys.argv:
                traceback.print_exc()
            results[name] = f"{type(error).__name__}: {str(error)[:300]}"
            return None

    def imported() -> Any:
        import lance_artifact

        return lance_artifact

    la = step("import", imported)
    if la is None:
        return results
    import lance

    first, new = vectors(ROWS, 1), vectors(NEW, 2)
    both = np.concatenate([first, new])
    shape = {"num_partitions": K, "num_sub_vectors": M, "backend": "cpu"}

    def searched(ds: Any, values: np.ndarray, metric: str) -> None:
        got = recall(ds, values, metric)
        if got < 0.95:
            raise AssertionError(f"recall {got}")

    for metric in ("l2", "cosine", "dot"):
        place = str(root / metric)

        def build(metric: str = metric, place: str = place) -> Any:
            ds = lance.write_dataset(table(first), place, max_rows_per_file=2000)
            la.create_index(ds, "vector", metric=metric, **shape)
            return ds

        ds = step(f"build {metric}", build)
        if ds is None:
            continue
        step(f"search {metric}", lambda ds=ds, metric=metric: searched(ds, first, metric))

        def append(ds: Any = ds, place: str = place) -> None:
            lance.write_dataset(table(new, ROWS), place, mode="append")
            ds.checkout_latest()
            assert la.extend_index(ds, "vector_idx", backend="cpu").num_rows == NEW

        step(f"extend {metric}", append)
        step(f"search extended {metric}", lambda ds=ds, metric=metric: searched(ds, both, metric))
        step(f"merge {metric}", lambda ds=ds: la.merge_segments(ds, "vector_idx"))
        step(f"search merged {metric}", lambda ds=ds, metric=metric: searched(ds, both, metric))

        def optimize(ds: Any = ds, place: str = place, metric: str = metric) -> None:
            more = vectors(NEW, 3)
            lance.write_dataset(table(more, ROWS + NEW), place, mode="append")
            ds.checkout_latest()
            ds.optimize.optimize_indices()
            unindexed = ds.stats.index_stats("vector_idx")["num_unindexed_rows"]
            assert unindexed == 0, unindexed
            every = np.concatenate([both, more])
            if metric != "dot":
                searched(ds, every, metric)
                return
            # Of dot pylance itself picks worse codewords for what it adds: as many are found as in an index of its own.
            stock = lance.write_dataset(table(both), str(root / "stock dot"))
            stock.create_index("vector", "IVF_PQ", metric="dot", num_partitions=K, num_sub_vectors=M)
            lance.write_dataset(table(more, ROWS + NEW), stock.uri, mode="append")
            stock.checkout_latest()
            stock.optimize.optimize_indices()
            theirs, ours = recall(stock, every, metric), recall(ds, every, metric)
            assert ours > theirs - 0.1, (ours, theirs)

        step(f"optimize {metric}", optimize)

    def graphs() -> None:
        ds = lance.write_dataset(table(first), str(root / "graphs"))
        la.create_index(ds, "vector", "IVF_HNSW_PQ", **{**shape, "num_partitions": 2})
        searched(ds, first, "l2")

    step("graphs", graphs)

    def run_folder() -> None:
        ds = lance.write_dataset(table(first), str(root / "resumed"), max_rows_per_file=2000)
        la.create_index(ds, "vector", artifact_uri=root / "run", resume=True, num_shards=2, **shape)
        searched(ds, first, "l2")

    step("run", run_folder)

    def artifact() -> None:
        ds = lance.write_dataset(table(first), str(root / "artifact"))
        model = la.train(ds, "vector", metric="cosine", **shape)
        la.build_artifact(ds, "vector", model, root / "a", backend="cpu")
        ds.create_index(
            "vector", "IVF_PQ", metric="cosine", precomputed_partition_artifact_uri=str(root / "a")
        )
        searched(ds, first, "cosine")

    step("pylance's call", artifact)

    def stock_extended() -> None:
        ds = lance.write_dataset(table(first), str(root / "stock"))
        ds.create_index("vector", "IVF_PQ", num_partitions=K, num_sub_vectors=M)
        lance.write_dataset(table(new, ROWS), str(root / "stock"), mode="append")
        ds.checkout_latest()
        la.extend_index(ds, "vector_idx", backend="cpu")
        searched(ds, both, "l2")
        la.merge_segments(ds, "vector_idx")
        searched(ds, both, "l2")

    step("extend and merge pylance's index", stock_extended)

    def segments() -> None:
        ds = lance.write_dataset(table(first), str(root / "segments"), max_rows_per_file=2000)
        model = la.train(ds, "vector", **shape)
        parts = []
        for fragment in ds.get_fragments():
            ids = [fragment.fragment_id]
            made = la.build_artifact(
                ds, "vector", model, root / f"s{ids[0]}", fragment_ids=ids, backend="cpu"
            )
            parts.append(la.build_segment(ds, "vector", made, skip_transpose=True))
        merged = ds.merge_existing_index_segments(parts)
        ds.commit_existing_index_segments("vector_idx", "vector", [merged])
        searched(ds, first, "l2")

    step("segments for pylance's merger", segments)
    if installed("lancedb"):

        def lancedb_table() -> None:
            import lancedb

            opened = lancedb.connect(str(root / "db")).create_table("t", table(first))
            la.create_index(opened, "vector", **shape)
            assert [i.name for i in opened.list_indices()] == ["vector_idx"]
            found = opened.search(first[7]).limit(1).nprobes(K).refine_factor(10).to_list()
            assert found[0]["id"] == 7
            opened.add(table(new, ROWS))
            opened.optimize()
            assert opened.index_stats("vector_idx").num_unindexed_rows == 0

        step("LanceDB", lancedb_table)
    return results


def main() -> int:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder))
    versions = {name: installed(name) for name in ("pylance", "lancedb", "pyarrow")}
    print(json.dumps({"versions": versions, "steps": results}))
    return 0 if all(result == "ok" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
