"""A small dataset, and what others do to it while an index is committed."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from conftest import column, vectors
from lance_artifact import _finalize

K, M, DIM, ROWS = 4, 4, 16, 1500
BUILD: dict[str, Any] = {"num_partitions": K, "num_sub_vectors": M, "sample_rate": 5, "max_iters": 2, "backend": "cpu"}  # fmt: skip


def rows(count: int, seed: int, first: int = 0) -> pa.Table:
    return pa.table(
        {"id": pa.array(range(first, first + count)), "vector": column(vectors(count, DIM, seed=seed))}
    )


def cleanup(ds: Any, unverified: bool = False) -> None:
    lance.dataset(ds.uri).cleanup_old_versions(
        datetime.timedelta(0), delete_unverified=unverified, error_if_tagged_old_versions=False
    )


def append(ds: Any) -> None:
    lance.write_dataset(rows(50, 3, first=ROWS), ds.uri, mode="append")


def nearest(ds: Any, query: np.ndarray) -> int:
    found = ds.to_table(nearest={"column": "vector", "q": query, "k": 1, "nprobes": K, "refine_factor": 50})
    return int(found["id"][0].as_py())


def folders(ds: Any) -> set[str]:
    root = Path(ds.uri) / "_indices"
    return {p.name for p in root.iterdir()} if root.exists() else set()


def written(path: Path, stable: bool, seed: int = 0) -> Any:
    """Three fragments of 500 rows."""
    return lance.write_dataset(
        rows(ROWS, seed), str(path), max_rows_per_file=500, enable_stable_row_ids=stable
    )


def before_commit(monkeypatch: pytest.MonkeyPatch, what: Callable[[], Any], where: Any = _finalize) -> None:
    """Let something happen when the segment is built and not yet committed, once."""
    commit, done = where.commit_segment, []

    def wrapped(*arguments: Any) -> None:
        if not done:
            done.append(True)
            what()
        commit(*arguments)

    monkeypatch.setattr(where, "commit_segment", wrapped)


def at_the_commit(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[], Any] = lambda: None,
    after: Callable[[str], Any] = lambda uuid: None,
) -> None:
    """Let something happen between the last look at the dataset and Lance's commit, or right after that one, once."""
    committed = lance.LanceDataset.commit_existing_index_segments

    def wrapped(self: Any, name: str, column: str, segments: Any) -> Any:
        monkeypatch.setattr(lance.LanceDataset, "commit_existing_index_segments", committed)
        before()
        result = committed(self, name, column, segments)
        after(segments[0].uuid)
        return result

    monkeypatch.setattr(lance.LanceDataset, "commit_existing_index_segments", wrapped)
