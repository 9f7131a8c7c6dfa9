"""Centroids alone, as `IndicesBuilder.train_ivf` asks for them: of as few vectors as stock needs, of any dimension."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
from lance.indices import IndicesBuilder

import lance_artifact as la
from conftest import Gpu, accelerate, column, leftovers, vectors
from lance_artifact.backends.cpu import CpuBackend
from lance_artifact.backends.cuvs import CuvsBackend

METRICS = ["l2", "cosine", "dot"]


def trained(ds: Any, partitions: int, **options: Any) -> np.ndarray:
    made = IndicesBuilder(ds, "vector").train_ivf(partitions, accelerator="cuvs", **options)
    assert made.distance_type == options.get("distance_type", "l2")
    assert made.centroids.type.value_type == ds.schema.field("vector").type.value_type
    return np.stack(made.centroids.to_numpy(zero_copy_only=False))


@pytest.fixture(params=["cpu", "gpu"])
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    backend: Any = CpuBackend()
    if request.param == "gpu":
        request.getfixturevalue("double")
        backend = CuvsBackend()
    accelerate(monkeypatch, backend)
    return backend


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("rows", "dimension", "partitions", "rate"), [(100, 15, 4, 16), (14, 16, 2, 7), (8, 1, 4, 2)]
)
def test_few_vectors_of_any_dimension(
    rows: int,
    dimension: int,
    partitions: int,
    rate: int,
    metric: str,
    accelerator: Any,
    write: Callable[..., Any],
) -> None:
    if metric != "l2" and dimension == 1:
        pytest.skip("of one dimension there are two directions")
    ds = write(vectors(rows, dimension))
    stock = IndicesBuilder(ds, "vector").train_ivf(partitions, distance_type=metric, sample_rate=rate)
    found = trained(ds, partitions, distance_type=metric, sample_rate=rate)
    assert found.shape == (len(stock.centroids), dimension) and np.isfinite(found).all()
    # As little as in a clustering that is none is not far from any vector.
    array = vectors(rows, dimension)
    array = array / np.linalg.norm(array, axis=1, keepdims=True) if metric == "cosine" else array
    if metric != "dot":
        left = ((array[:, None] - found[None]) ** 2).sum(2).min(1).mean()
        assert left < ((array - array.mean(0)) ** 2).sum(1).mean()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_they_have_the_type_of_the_column(dtype: str, accelerator: Any, write: Callable[..., Any]) -> None:
    assert trained(write(vectors(60, 9, dtype)), 3, sample_rate=20).dtype == dtype


def test_they_are_good(accelerator: Any, write: Callable[..., Any]) -> None:
    array = vectors(4000, 16)
    ds = write(array)
    found = trained(ds, 32, sample_rate=64)
    stock = np.stack(
        IndicesBuilder(ds, "vector").train_ivf(32, sample_rate=64).centroids.to_numpy(zero_copy_only=False)
    )
    ours, theirs = (((array[:, None] - c[None]) ** 2).sum(2).min(1).mean() for c in (found, stock))
    assert ours < 1.5 * theirs


def test_what_does_not_fit_is_refused(accelerator: Any, write: Callable[..., Any], tmp_path: Path) -> None:
    array = vectors(40, 8)
    array[:37] = np.nan
    ds = write(array)
    before = leftovers(tmp_path)
    with pytest.raises(la.InvalidInputError, match=r"3 usable vectors, expected at least .*4"):
        trained(ds, 4, sample_rate=4)
    with pytest.raises(la.InvalidTypeError, match="num_sub_vectors"):
        trained(ds, 1, sample_rate=4, num_sub_vectors=2)
    with pytest.raises(la.InvalidInputError, match="max_iters"):
        trained(ds, 1, sample_rate=4, max_iters=0)
    assert leftovers(tmp_path) == before


def test_a_sample_that_memory_does_not_hold(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accelerate(monkeypatch, CpuBackend())
    ds = write(vectors(60_000, 256))
    made = IndicesBuilder(ds, "vector").train_ivf(
        16, accelerator="cuvs", sample_rate=3000, memory_limit=64 << 20, max_iters=4
    )
    assert len(made.centroids) == 16 and "which come in parts" in caplog.text


def test_on_a_device_that_holds_a_part(
    double: Gpu, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Any]
) -> None:
    accelerate(monkeypatch, CuvsBackend(device_memory_limit=1 << 20))
    assert trained(write(vectors(8000, 32)), 16, sample_rate=400).shape == (16, 32)


def test_fragments_and_seed(accelerator: Any, tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"vector": column(vectors(300, 8))})
    ds = lance.write_dataset(table, str(tmp_path / "d.lance"), max_rows_per_file=100)
    found = trained(ds, 2, sample_rate=8, fragment_ids=[1], seed=3)
    assert (found == trained(ds, 2, sample_rate=8, fragment_ids=[1], seed=3)).all()
