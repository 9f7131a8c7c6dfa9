"""The rows that training draws: random, and beside each other only where that tells as much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import stored, vectors
from lance_artifact._dataset import Handle

DIM, ROWS, M = 16, 3000, 4


def test_a_sample_is_random_and_bounded(write: Any) -> None:
    ds = write(vectors(ROWS, DIM))
    source = Handle.of(ds).vectors("vector")
    sample = source.sample(100, "l2", 1)
    assert len(sample) == 100
    rows = {tuple(v) for v in np.array(sample.flatten()).reshape(-1, DIM)}
    everything = [tuple(v) for v in vectors(ROWS, DIM)]
    places = sorted(everything.index(r) for r in rows)
    assert len(rows) == 100 and places[0] < ROWS / 4 and places[-1] > ROWS * 3 / 4
    assert len(source.sample(10 * ROWS, "l2", 1)) == ROWS
    some = Handle.of(ds).vectors("vector", [1]).sample(50, "l2", 1)
    chosen = {tuple(v) for v in np.array(some.flatten()).reshape(-1, DIM)}
    assert all(1000 <= everything.index(r) < 2000 for r in chosen)


def test_a_mostly_null_column_is_sampled_and_indexed(write: Any) -> None:
    mask = np.arange(20000) % 10 != 0
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors(20000, DIM).reshape(-1)), DIM, mask=pa.array(mask)
    )
    ds = write(values)
    la.create_index(
        ds, "vector", num_partitions=4, num_sub_vectors=M, sample_rate=4, num_bits=4, backend="cpu"
    )
    assert sum(map(len, stored(ds, "vector_idx"))) == 2000


def test_a_very_sparse_column_is_sampled(write: Any) -> None:
    mask = np.arange(200_000) % 600 != 0
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(np.zeros(200_000 * 4, "f4") + np.repeat(np.arange(200_000, dtype="f4"), 4)),
        4,
        mask=pa.array(mask),
    )
    ds = write(values)
    model = la.train(
        ds, "vector", num_partitions=8, num_sub_vectors=2, num_bits=4, sample_rate=16, backend="cpu"
    )
    assert model.num_partitions == 8


def drawn(ds: Any, rows: int, seed: int, fragments: list[int] | None = None) -> np.ndarray:
    """The rows' numbers, which their last elements are."""
    sample = Handle.of(ds).vectors("vector", fragments).sample(rows, "l2", seed)
    return np.array(sample.flatten()).reshape(len(sample), -1)[:, -1].astype(int)


def numbered(values: np.ndarray) -> np.ndarray:
    # Small beside the others, so that it does not make neighbours alike.
    return np.concatenate([values * 1e6, np.arange(len(values), dtype="f4")[:, None]], axis=1)


@pytest.mark.parametrize("fragments", [None, [0, 2]])
def test_of_rows_in_no_order_runs_are_drawn(write: Any, fragments: list[int] | None) -> None:
    ds = write(numbered(vectors(210_000, 8)), max_rows_per_file=70_000)
    rows = drawn(ds, 16_400, 1, fragments)
    assert len(rows) == len(set(rows)) == 16_400
    if fragments is None:
        # 257 of them, of which the last in part.
        assert len({row // 64 for row in rows}) == 257
    else:
        assert {row // 70_000 for row in rows} == {0, 2}
    # But in random order: training takes the first of them.
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.1
    assert (drawn(ds, 16_400, 1, fragments) == rows).all()
    assert set(drawn(ds, 16_400, 2, fragments)) != set(rows)
    # Of a small sample they are short, or single rows.
    assert len({row // 64 for row in drawn(ds, 1500, 1)}) > 350
    assert len({row // 64 for row in drawn(ds, 500, 1)}) > 400


def test_of_rows_beside_those_like_them_single_ones_are_drawn(write: Any) -> None:
    rng = np.random.default_rng(5)
    for each, least in ((1000, 140), (40, 3400)):
        centers = rng.standard_normal((140_000 // each, 8), dtype=np.float32)
        values = np.repeat(centers, each, axis=0) + rng.standard_normal((140_000, 8), dtype=np.float32) * 0.2
        rows = drawn(write(numbered(values), f"{each}.lance"), 16_400, 1)
        found = len(set(rows // each))
        # As many of the clusters as single rows find. 257 runs of 64 would be of some 118 and some 600.
        assert found >= least, (each, found)


def test_rows_deleted_null_and_in_the_last_part_of_a_run(write: Any) -> None:
    values = numbered(vectors(20_011, 8))
    mask = np.arange(20_011) % 3 == 0
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 9, mask=pa.array(mask))
    ds = write(column)
    ds.delete("id >= 5000 and id < 9000")
    rows = drawn(ds, 1500, 3)
    assert len(set(rows)) == 1500
    assert not mask[rows].any() and not ((rows >= 5000) & (rows < 9000)).any()


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_centroids_go_to_the_means_of_more_vectors_than_fit(write: Any, metric: str, dtype: str) -> None:
    """From 300 vectors for 40 centroids to 6,000: read by scan (all of a table), or by runs of a large one."""
    rng = np.random.default_rng(3)
    many = rng.standard_normal((200, DIM))[rng.integers(0, 200, 60_000)] + rng.normal(0, 0.3, (60_000, DIM))
    many[::50] = np.nan
    # Beyond the squares of float32, which float64 columns may be.
    values = (many * (1e30 if dtype == "f8" else 1)).astype(dtype)
    source = Handle.of(write(values, max_rows_per_file=20_000)).vectors("vector")
    usable = values[np.isfinite(values).all(1)].astype("f8")
    usable /= np.linalg.norm(usable, axis=1)[:, None] if metric == "cosine" else np.abs(usable).max()

    def trained(rows: int, max_iters: int = 5) -> np.ndarray:
        made = source.train_centroids_in_parts(
            rows, 300, metric, num_partitions=40, sample_rate=100, max_iters=max_iters, seed=2, memory_limit=1 << 30
        )  # fmt: skip
        assert made.type == pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), DIM)
        return np.asarray(made.flatten()).astype("f8").reshape(-1, DIM)

    def loss(centroids: np.ndarray) -> float:
        if metric == "dot":
            assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=2e-3)
            return float(-(usable @ centroids.T).max(1).mean())
        if metric == "l2":
            centroids = centroids / np.abs(values[np.isfinite(values).all(1)].astype("f8")).max()
        squares = (usable**2).sum(1)[:, None] + (centroids**2).sum(1) - 2 * usable @ centroids.T
        return float(squares.min(1).mean())

    stays = loss(trained(60_000, max_iters=1))
    few = loss(trained(300))
    for rows in (60_000, 6_000):
        more = trained(rows)
        assert np.array_equal(more, trained(rows))
        assert loss(more) < few - 0.02 * abs(few) and loss(more) < stays, rows
