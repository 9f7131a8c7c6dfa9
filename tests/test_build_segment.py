"""Segments for pylance's own ways to commit and merge them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lance_artifact as la
from conftest import differences, stored, stored_in, vectors
from test_extend import DIM, ROWS, K, M, segments
from test_merge import check_searches, live


def shards(ds: Any, folder: Path, metric: str = "l2", num_bits: int = 8) -> list[la.Artifact]:
    model = la.train(
        ds,
        "vector",
        metric=metric,
        num_partitions=K,
        num_sub_vectors=M,
        num_bits=num_bits,
        max_iters=5,
        backend="cpu",
    )
    return [
        la.build_artifact(ds, "vector", model, folder / str(n), fragment_ids=ids, backend="cpu")
        for n, ids in enumerate(([0], [1, 2]))
    ]


@pytest.mark.parametrize("index_type", ["IVF_PQ", "IVF_HNSW_PQ"])
def test_pylance_commits_them(write: Callable[..., Any], tmp_path: Path, index_type: str) -> None:
    ds = write(vectors(ROWS, DIM))
    parts = shards(ds, tmp_path)
    found = [la.build_segment(ds, "vector", part, index_type=index_type) for part in parts]
    assert [set(index.fragment_ids) for index in found] == [{0}, {1, 2}]
    assert ds.describe_indices() == [] and {index.name for index in found} == {"vector_idx"}
    ds.commit_existing_index_segments("mine", "vector", found)
    assert segments(ds, "mine").keys() == {index.uuid for index in found}
    assert ds.describe_indices()[0].index_type == index_type
    check_searches(ds)


@pytest.mark.parametrize("index_type", ["IVF_PQ", "IVF_HNSW_PQ"])
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_pylance_merges_them(
    write: Callable[..., Any], tmp_path: Path, metric: str, num_bits: int, index_type: str
) -> None:
    ds = write(vectors(ROWS, DIM))
    parts = shards(ds, tmp_path, metric, num_bits)
    found = [
        la.build_segment(ds, "vector", part, index_type=index_type, skip_transpose=True) for part in parts
    ]
    merged = ds.merge_existing_index_segments(found)
    ds.commit_existing_index_segments("theirs", "vector", [merged])
    la.finalize(ds, "vector", parts, name="ours")
    _, ids, codes = differences(stored(ds, "ours"), stored(ds, "theirs"))
    assert (ids, codes) == (0, 0)
    check_searches(ds, metric)


@pytest.mark.parametrize("index_type", ["IVF_PQ", "IVF_HNSW_PQ"])
def test_row_by_row_segments_are_searched_and_merged_by_us_too(
    write: Callable[..., Any], tmp_path: Path, index_type: str
) -> None:
    ds = write(vectors(ROWS, DIM))
    parts = shards(ds, tmp_path)
    # The least memory: partitions go in slices.
    found = [
        la.build_segment(ds, "vector", part, index_type=index_type, skip_transpose=True) for part in parts
    ]
    ds.commit_existing_index_segments("rows", "vector", found)
    check_searches(ds)
    la.merge_segments(ds, "rows")
    la.finalize(ds, "vector", parts, name="ours")
    assert stored(ds, "rows") == stored(ds, "ours")


def test_large_partitions_row_by_row(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(200_000, DIM))
    model = la.train(ds, "vector", num_partitions=2, num_sub_vectors=16, sample_rate=64, backend="cpu")
    part = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
    ds.commit_existing_index_segments(
        "rows", "vector", [la.build_segment(ds, "vector", part, skip_transpose=True, memory_limit=20 << 20)]
    )
    la.finalize(ds, "vector", part, name="ours")
    uuid = next(iter(segments(ds, "rows")))
    ds.delete("id = 0")
    la.merge_segments(ds, "rows")
    assert next(iter(segments(ds, "rows"))) != uuid
    ours = stored_in(ds, "ours", next(iter(segments(ds, "ours"))))
    there = set(ds.to_table(columns=[], with_row_id=True)["_rowid"].to_pylist())
    assert stored(ds, "rows") == [{i: c for i, c in rows.items() if i in there} for rows in ours]


def test_what_is_refused(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    parts = shards(ds, tmp_path)
    with pytest.raises(la.ArtifactMismatchError, match="fragment 0 is in two artifacts"):
        la.build_segment(ds, "vector", [parts[0], *shards(ds, tmp_path / "again")])
    assert live(ds, []) == [{} for _ in range(K)]
