"""What searches of an index find for the same work: recall at 1, 3 and 10 % of the rows scanned, and how even its partitions are.

Recall at equal `nprobes` flatters uneven partitions: the large ones, which are probed more often, have more rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SHARES = (0.01, 0.03, 0.1)


def variation(sizes: np.ndarray) -> float:
    """Standard deviation of the partitions' rows over their mean."""
    return float(sizes.std() / sizes.mean())


def unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1, but for zeros."""
    lengths = np.linalg.norm(vectors.astype("f4"), axis=1, keepdims=True)
    scaled: np.ndarray = vectors / np.maximum(lengths, np.finfo("f4").tiny)
    return scaled


def probes(
    centroids: np.ndarray, sizes: np.ndarray, queries: np.ndarray, share: float, metric: str = "l2"
) -> np.ndarray:
    """For each query how many of its nearest partitions have at most `share` of all rows, and at least one. Queries for cosine are of length 1."""
    squares = 0.0 if metric == "dot" else (centroids**2).sum(1)[None]
    distances = squares - 2 * queries @ centroids.T
    scanned = np.cumsum(sizes[np.argsort(distances, axis=1)], axis=1)
    found: np.ndarray = np.maximum(1, (scanned <= share * sizes.sum()).sum(1))
    return found


def at_equal_work(
    centroids: np.ndarray,
    sizes: np.ndarray,
    queries: np.ndarray,
    truth: np.ndarray,
    search: Callable[[np.ndarray, int], list[int]],
    metric: str = "l2",
) -> dict[str, Any]:
    """`recall` at each of `SHARES`, and `variation`. `search(query, nprobes)` gives the ids found."""
    recall = []
    for share in SHARES:
        wanted = probes(centroids, sizes, queries, share, metric)
        hits = sum(
            len(set(search(query, int(nprobes))) & set(expected.tolist()))
            for query, nprobes, expected in zip(queries, wanted, truth, strict=True)
        )
        recall.append(hits / truth.size)
    return {"at_equal_work": recall, "variation": variation(sizes)}


def of_index(ds: Any, name: str, queries: np.ndarray, truth: np.ndarray, key: str) -> dict[str, Any]:
    """Of an index of a dataset whose rows have a number in the column `key`."""
    import lance_artifact as la

    model = la.IvfPqModel.from_index(ds, name)
    centroids = np.asarray(model.ivf_centroids.flatten()).reshape(model.num_partitions, -1)
    (stats,) = ds.stats.index_stats(name)["indices"]
    sizes = np.array([partition["size"] for partition in stats["partitions"]])

    def search(query: np.ndarray, nprobes: int) -> list[int]:
        nearest = {"column": "vector", "q": query, "k": truth.shape[1], "nprobes": nprobes}
        # Lance looks further where that many have too few rows; here the work is given.
        nearest["minimum_nprobes"] = nearest["maximum_nprobes"] = nearest.pop("nprobes")
        found: list[int] = ds.to_table(columns=[key, "_distance"], nearest=nearest)[key].to_pylist()
        return found

    return at_equal_work(centroids.astype("f4"), sizes, queries, truth, search, model.metric)
