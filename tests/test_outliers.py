"""A few vectors that are far from all others, as a broken pipeline makes them: what is trained serves the others all the same."""

from __future__ import annotations

import logging
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la

DIM, ROWS, PARTITIONS, M = 16, 5000, 16, 4


def blobs(dtype: str = "f4") -> np.ndarray:
    random = np.random.default_rng(7)
    centers = random.normal(size=(200, DIM))
    return (centers[random.integers(0, 200, ROWS)] + 0.05 * random.normal(size=(ROWS, DIM))).astype(dtype)


def put(write: Any, values: np.ndarray) -> Any:
    array = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), DIM)
    return write(array, mode="overwrite")


def loss(model: la.IvfPqModel, values: np.ndarray) -> float:
    """The mean squared distance of vectors to what their codes stand for."""
    values = values.astype("f8")
    centroids = np.array(model.ivf_centroids.flatten(), "f8").reshape(-1, DIM)
    codebook = np.array(model.pq_codebook.flatten(), "f8").reshape(M, -1, DIM // M)
    if model.metric == "dot":
        rest = values
    else:
        nearest = ((values[:, None] - centroids) ** 2).sum(2).argmin(1)
        rest = values - centroids[nearest]
    parts = rest.reshape(len(values), M, 1, DIM // M)
    return float(((parts - codebook[None]) ** 2).sum(3).min(2).sum(1).mean())


def train(ds: Any, metric: str, **options: Any) -> la.IvfPqModel:
    return la.train(
        ds,
        "vector",
        metric=metric,
        num_partitions=PARTITIONS,
        num_sub_vectors=M,
        sample_rate=400,
        backend="cpu",
        **options,
    )


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("far", [1e4, 1e8, 1e17])
def test_one_far_vector_makes_no_difference_to_the_others(
    write: Any, metric: str, far: float, dtype: str
) -> None:
    values = blobs(dtype)
    plain = loss(train(put(write, values), metric), values)
    values[1234] = far * np.where(np.arange(DIM) % 2, -1, 1)
    ordinary = np.delete(values, 1234, axis=0)
    assert loss(train(put(write, values), metric), ordinary) < plain * 1.1


@pytest.mark.parametrize(("dtype", "far"), [("f4", 1e20), ("f4", 3e38), ("f8", 1e30), ("f8", 1e300)])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_one_that_nothing_could_encode_is_refused_before_it_costs_anything(
    write: Any, metric: str, dtype: str, far: float
) -> None:
    values = blobs(dtype)
    values[77] = far
    ds = put(write, values)
    with pytest.raises(la.InvalidInputError, match="training: a vector of the sample has an element of"):
        la.create_index(
            ds, "vector", metric=metric, num_partitions=PARTITIONS, num_sub_vectors=M, backend="cpu"
        )
    assert not lance.dataset(ds.uri).describe_indices()


@pytest.mark.parametrize("count", [1, 5])
def test_of_dot_the_largest_are_found(write: Any, count: int) -> None:
    """They are the nearest to most queries: without codewords of their own no search would find them."""
    values = blobs()
    random = np.random.default_rng(3)
    places = random.choice(ROWS, count, replace=False)
    values[places] = 1e5 * random.normal(size=(count, DIM))
    ds = put(write, values)
    la.create_index(
        ds,
        "vector",
        metric="dot",
        num_partitions=PARTITIONS,
        num_sub_vectors=M,
        sample_rate=400,
        backend="cpu",
    )
    ds = lance.dataset(ds.uri)
    queries = random.normal(size=(50, DIM)).astype("f4")
    best = (values.astype("f8") @ queries.T.astype("f8")).argmax(0)
    hits = 0
    for query, row in zip(queries, best, strict=True):
        nearest = {"column": "vector", "q": query, "k": 10, "nprobes": PARTITIONS, "refine_factor": 10}
        hits += row in ds.to_table(columns=["id"], nearest=nearest)["id"].to_pylist()
    assert hits >= 48


def test_a_sample_in_parts_leaves_them_out_too(write: Any) -> None:
    values = blobs("f8")
    handle = put(write, values)

    def in_parts(ds: Any) -> np.ndarray:
        from lance_artifact._dataset import Handle

        source = Handle.of(ds).vectors("vector")
        found = source.train_centroids_in_parts(
            ROWS,
            1000,
            "l2",
            num_partitions=PARTITIONS,
            sample_rate=400,
            max_iters=20,
            seed=0,
            memory_limit=64 << 20,
        )
        return np.array(found.flatten()).reshape(-1, DIM)

    def spread(centroids: np.ndarray, rows: np.ndarray) -> float:
        return float(((rows[:, None] - centroids) ** 2).sum(2).min(1).mean())

    plain = spread(in_parts(handle), values)
    for place in (3, 1234, 2500, 4999):
        spoilt = values.copy()
        spoilt[place] = 1e20
        ordinary = np.delete(values, place, axis=0)
        assert spread(in_parts(put(write, spoilt)), ordinary) < plain * 1.1, place


def test_they_are_told_of_and_encoded(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    values = blobs()
    values[5] = 1e5
    ds = put(write, values)
    with caplog.at_level(logging.WARNING, "lance_artifact"):
        la.create_index(ds, "vector", num_partitions=PARTITIONS, num_sub_vectors=M, backend="cpu")
    told = [record.getMessage() for record in caplog.records]
    assert any("1 of 5000 vectors" in message and "left out" in message for message in told), told
    found = lance.dataset(ds.uri).to_table(
        nearest={"column": "vector", "q": values[5], "k": 1, "nprobes": PARTITIONS}, with_row_id=True
    )
    assert found["_rowid"].to_pylist() == [5]


def test_many_of_them_are_no_outliers(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One in ten: they are trained on, or a tenth of the table would have no codes that mean anything."""
    values = blobs()
    values[::10] *= 1e7
    with caplog.at_level(logging.WARNING, "lance_artifact"):
        model = train(put(write, values), "l2")
    large = values[::10]
    assert loss(model, large) < 0.2 * float((large.astype("f8") ** 2).sum(1).mean())
    assert any("500 of 5000 vectors" in record.getMessage() for record in caplog.records)


def test_a_sample_that_is_just_enough_is_kept(write: Any) -> None:
    values = blobs()[:256]
    values[3] = 1e20
    model = la.train(
        put(write, values), "vector", num_partitions=4, num_sub_vectors=M, sample_rate=1, backend="cpu"
    )
    assert model.num_partitions == 4
