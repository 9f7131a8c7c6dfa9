"""Datasets of known content and the oracle: what an index really holds, read from its files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la


def vectors(rows: int, dim: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Clustered vectors: k-means has something to find, and ties are rare."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((32, dim)) * 3
    return (centers[rng.integers(0, 32, rows)] + rng.standard_normal((rows, dim))).astype(dtype)


def column(array: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Any]:
    """Write a dataset with a column ``vector`` in three or so fragments."""

    def make(array: Any, name: str = "vectors.lance", **options: Any) -> Any:
        values = array if isinstance(array, pa.Array) else column(array)
        table = pa.table({"id": pa.array(range(len(values))), "vector": values})
        options.setdefault("max_rows_per_file", max(1, len(values) // 3))
        return lance.write_dataset(table, str(tmp_path / name), **options)

    return make


def segment(ds: Any, name: str) -> Any:
    """The only segment of an index."""
    found = [s for i in ds.describe_indices() if i.name == name for s in i.segments]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


def stored(ds: Any, name: str) -> list[dict[int, bytes]]:
    """For each partition of an index: row id to code, read from ``auxiliary.idx`` without Lance's search."""
    uuid = segment(ds, name).uuid
    statistics = ds.stats.index_stats(name)["indices"][0]
    sizes = [p["size"] for p in statistics["partitions"]]
    path = Path(ds.uri) / "_indices" / uuid / "auxiliary.idx"
    from lance.file import LanceFileReader

    table = LanceFileReader(str(path)).read_all().to_table()
    row_ids = table["_rowid"].to_numpy()
    codes = table["__pq_code"].combine_chunks()
    width = codes.type.list_size
    flat = codes.flatten().to_numpy().reshape(-1)
    content, at = [], 0
    for size in sizes:
        # Codes of a partition are stored transposed: [byte][row].
        block = flat[at * width : (at + size) * width].reshape(width, size).T
        ids = row_ids[at : at + size]
        assert len(set(ids.tolist())) == size, "a row id is stored twice"
        content.append({int(i): block[n].tobytes() for n, i in enumerate(ids)})
        at += size
    assert at == len(row_ids)
    return content


def differences(ours: list[dict[int, bytes]], theirs: list[dict[int, bytes]]) -> tuple[int, int, int]:
    """Partitions compared, row ids that differ, codes that differ."""
    assert len(ours) == len(theirs)
    ids = sum(len(a.keys() ^ b.keys()) for a, b in zip(ours, theirs, strict=True))
    codes = sum(a[i] != b[i] for a, b in zip(ours, theirs, strict=True) for i in a.keys() & b.keys())
    return len(ours), ids, codes


def encoded(rows: int, partitions: int, width: int, seed: int = 0, first: int = 0) -> pa.Table:
    """An encoded batch of distinct row ids, random partitions and random codes."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "_rowid": pa.array(np.arange(first, first + rows, dtype=np.uint64)),
            "__ivf_part_id": pa.array(rng.integers(0, partitions, rows, dtype=np.uint32)),
            "__pq_code": pa.FixedSizeListArray.from_arrays(
                pa.array(rng.integers(0, 256, rows * width, dtype=np.uint8)), width
            ),
        }
    )


def content(artifact: la.Artifact) -> list[dict[int, bytes]]:
    """For each partition of an artifact: row id to code, in order."""
    result = []
    for partition in range(artifact.num_partitions):
        table = artifact.read_partition(partition).read_all()
        codes = table["__pq_code"].combine_chunks() if table.num_rows else []
        result.append({i: bytes(c.as_py()) for i, c in zip(table["_rowid"].to_pylist(), codes, strict=True)})
    return result


def leftovers(root: Path) -> list[str]:
    """Every file below a folder, if it exists."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) if root.exists() else []
