"""The CPU encoder: candidates that are equally near, and input that no index holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, differences, stored, vectors

K, M, DIM, ROWS = 4, 4, 16, 600


def both(ds: Any, centroids: np.ndarray, codebook: np.ndarray, metric: str = "l2") -> tuple[Any, Any]:
    options = {
        "metric": metric,
        "num_partitions": len(centroids),
        "num_sub_vectors": len(codebook),
        "num_bits": 8 if codebook.shape[1] == 256 else 4,
        "ivf_centroids": pa.FixedSizeListArray.from_arrays(
            pa.array(centroids.reshape(-1)), centroids.shape[1]
        ),
        "pq_codebook": pa.FixedSizeListArray.from_arrays(pa.array(codebook.reshape(-1)), centroids.shape[1]),
    }
    la.create_index(ds, "vector", name="ours", backend="cpu", **options)
    ds.create_index("vector", "IVF_PQ", name="stock", **options)
    return stored(ds, "ours"), stored(ds, "stock")


def test_centroids_that_float32_cannot_tell_apart(write: Any) -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal((ROWS, 8)) * 0.1
    array[:, 0] += np.where(np.arange(ROWS) % 2 == 0, 1e8, 1e8 + 2)
    centroids = np.zeros((2, 8))
    centroids[:, 0] = (1e8, 1e8 + 2)
    assert np.float32(1e8) == np.float32(1e8 + 2)
    ours, stock = both(write(array), centroids, rng.standard_normal((2, 256, 4)))
    assert [len(p) for p in stock] == [300, 300]
    assert differences(ours, stock) == (2, 0, 0)


def test_codewords_that_float32_cannot_tell_apart(write: Any) -> None:
    rng = np.random.default_rng(0)
    array = np.zeros((ROWS, 4))
    array[:, 0] = np.where(np.arange(ROWS) % 2 == 0, 1e8, 1e8 + 2)
    codebook = np.full((2, 16, 2), -1e9) - np.arange(16)[None, :, None] * 1e6
    codebook[0, 3], codebook[0, 7] = (1e8, 0), (1e8 + 2, 0)
    codebook[1, 5] = 0
    ours, stock = both(write(array), np.zeros((1, 4)), codebook)
    assert len({code for part in stock for code in part.values()}) == 2
    assert differences(ours, stock) == (1, 0, 0)
    del rng


@pytest.mark.parametrize(("offset", "spread"), [(1e8, 2000), (1e6, 10), (1e4, 1), (0, 1)])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_codewords_far_from_zero(metric: str, offset: float, spread: float, write: Any) -> None:
    """Float32 moves both by a part of their lengths, which can be more than what is between two codewords."""
    rng = np.random.default_rng(2)
    array = offset + rng.uniform(0, spread, (3000, 4))
    centroids = np.zeros((1, 4))
    ours, stock = both(write(array), centroids, offset + rng.uniform(0, spread, (2, 256, 2)), metric)
    assert differences(ours, stock) == (1, 0, 0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_vectors_right_between_centroids(metric: str, dtype: str, write: Any) -> None:
    """Distances that are equal, or would be without rounding: whom Lance takes is right."""
    rng = np.random.default_rng(1)
    base = rng.integers(-8, 8, (40, DIM)).astype(dtype)
    centroids = np.concatenate([base, base[:5], -base[:5]])  # some are there twice
    pairs = rng.integers(0, 40, (ROWS, 2))
    array = ((base[pairs[:, 0]].astype("f8") + base[pairs[:, 1]].astype("f8")) / 2).astype(dtype)
    codebook = rng.integers(-4, 4, (M, 256, DIM // M)).astype(dtype)
    ours, stock = both(write(array), centroids, codebook, metric)
    assert differences(ours, stock) == (50, 0, 0)


@pytest.mark.parametrize("what", ["null", "null element", "nan", "infinite"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_what_no_index_holds_is_refused(what: str, metric: str, write: Any) -> None:
    array = vectors(ROWS, DIM)
    if metric == "cosine":
        array /= np.linalg.norm(array, axis=1, keepdims=True)
    model = la.train(write(array), "vector", metric=metric, num_partitions=K, num_sub_vectors=M, sample_rate=2, num_bits=4, backend="cpu")  # fmt: skip
    encoder = la.CpuEncoder(model)
    part_id, pq_code = encoder.encode(column(array))
    assert len(part_id) == len(pq_code) == ROWS
    if what == "nan":
        array[7, 3] = np.nan
    if what == "infinite":
        array[7, 3] = np.inf
    flat = pa.array(array.reshape(-1))
    mask = None
    if what == "null":
        mask = pa.array(np.arange(ROWS) == 7)
    if what == "null element":
        flat = pa.array(array.reshape(-1), mask=np.arange(ROWS * DIM) == 100)
    with pytest.raises(la.InvalidInputError, match="prepared_vectors"):
        encoder.encode(pa.FixedSizeListArray.from_arrays(flat, DIM, mask=mask))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_vectors_for_cosine_are_of_unit_norm(dtype: str, write: Any) -> None:
    ds = write(vectors(ROWS, DIM, dtype))
    model = la.train(ds, "vector", metric="cosine", num_partitions=K, num_sub_vectors=M, sample_rate=2, num_bits=4, backend="cpu")  # fmt: skip
    encoder = la.CpuEncoder(model)
    with pytest.raises(la.InvalidInputError, match="unit norm"):
        encoder.encode(ds.to_table()["vector"].combine_chunks())
    for batch in la.prepared_vectors(ds, "vector", metric="cosine"):
        encoder.encode(batch["vector"])
    with pytest.raises(la.InvalidInputError, match="norm 0"):
        encoder.encode(column(np.zeros((3, DIM), dtype)))


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_an_encoder_of_ones_own_sees_what_ours_sees(metric: str, write: Any, tmp_path: Path) -> None:
    array = vectors(ROWS, DIM)
    array[10], array[11, 3] = 0, np.nan
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(array.reshape(-1)), DIM, mask=pa.array(np.arange(ROWS) == 12)
    )
    ds = write(values)
    model = la.train(ds, "vector", metric=metric, num_partitions=K, num_sub_vectors=M, sample_rate=2, num_bits=4, backend="cpu")  # fmt: skip
    scan = la.prepared_vectors(ds, "vector", metric=metric)
    encoder = la.CpuEncoder(model)
    builder = la.PartitionArtifactBuilder(tmp_path / "own", model, source=scan.source)
    for batch in scan:
        assert batch.schema.names == ["_rowid", "vector"]
        part_id, pq_code = encoder.encode(batch["vector"])
        builder.append_batch(
            pa.record_batch([batch["_rowid"], part_id, pq_code], ["_rowid", "__ivf_part_id", "__pq_code"])
        )
    assert scan.dropped == {"null": 1, "non_finite": 1, "zero_norm": int(metric == "cosine")}
    assert scan.num_rows == ROWS
    artifact = builder.finish(rows_dropped=scan.dropped)
    la.finalize(ds, "vector", artifact, name="own")
    la.finalize(
        ds, "vector", la.build_artifact(ds, "vector", model, tmp_path / "ours", backend="cpu"), name="ours"
    )
    assert differences(stored(lance.dataset(ds.uri), "own"), stored(lance.dataset(ds.uri), "ours")) == (
        K,
        0,
        0,
    )


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_many_partitions_are_searched_as_few(metric: str, dtype: str, offset: float) -> None:
    """From 4,096 on most centroids are not looked at in full; the nearest is found all the same."""
    rows, dim, k = 6000, 40, 4500
    vectors_ = (vectors(rows, dim, seed=1) + offset).astype(dtype)
    centroids = (vectors(k, dim, seed=2) * 0.8 + offset).astype(dtype)
    centroids[100] = centroids[7]  # of equal ones the first
    vectors_[:k:9] = centroids[::9]
    if metric == "cosine":
        vectors_ = (
            vectors_.astype("float64") / np.linalg.norm(vectors_.astype("float64"), axis=1, keepdims=True)
        ).astype(dtype)
        centroids = (
            centroids.astype("float64") / np.linalg.norm(centroids.astype("float64"), axis=1, keepdims=True)
        ).astype(dtype)
    codebook = vectors(16 * 2, dim // 2, seed=3).reshape(2, 16, dim // 2).astype(dtype)
    encoder = la.CpuEncoder(la.IvfPqModel(centroids, codebook, metric))
    part_id, _ = encoder.encode(column(vectors_))
    x, c = vectors_.astype("float64"), centroids.astype("float64")
    distances = -(x @ c.T) if metric == "dot" else (x**2).sum(1)[:, None] - 2 * x @ c.T + (c**2).sum(1)[None]
    chosen = distances[np.arange(rows), np.asarray(part_id)]
    best = distances.min(axis=1)
    # What Lance's own arithmetic may take for equally near.
    blur = (4e-3 if dtype == "float16" else 1e-5) * (
        (c**2).sum(1).max() + 2 * np.linalg.norm(x, axis=1) * np.linalg.norm(c, axis=1).max() + 1
    )
    assert (chosen <= best + blur).all()
    second = np.partition(distances, 1, axis=1)[:, 1]
    clear = second - best > blur
    assert clear.mean() > 0.05 and (np.asarray(part_id)[clear] == distances.argmin(axis=1)[clear]).all()
    assert not (np.asarray(part_id) == 100).any()
