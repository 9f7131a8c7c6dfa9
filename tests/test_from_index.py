"""The model of a committed index, ours or stock's: what new rows of it are encoded with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, stored, vectors

K, M, DIM, ROWS = 8, 4, 16, 3000


@pytest.mark.parametrize("index_type", ["IVF_PQ", "IVF_HNSW_PQ"])
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_was_committed_comes_back(
    write: Callable[..., Any], dtype: str, metric: str, num_bits: int, index_type: str
) -> None:
    ds = write(vectors(ROWS, DIM, dtype))
    model = la.train(
        ds,
        "vector",
        metric=metric,
        num_partitions=K,
        num_sub_vectors=M,
        num_bits=num_bits,
        sample_rate=8,
        max_iters=5,
        target_partition_size=400,
        backend="cpu",
    )
    source = la.describe_source(ds, "vector")
    with la.PartitionArtifactBuilder(f"{ds.uri}-artifact", model, source=source) as builder:
        scan = la.prepared_vectors(ds, "vector", metric=metric)
        for batch in scan:
            part_id, code = la.CpuEncoder(model).encode(batch["vector"])
            builder.append_batch(
                pa.record_batch([batch["_rowid"], part_id, code], ["_rowid", "__ivf_part_id", "__pq_code"])
            )
    la.finalize(ds, "vector", builder.artifact, name="ours", index_type=index_type)
    found = la.IvfPqModel.from_index(ds, "ours")
    assert found == model and found.training == model.training
    assert (found.metric, found.dtype, found.num_bits) == (metric, dtype, num_bits)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_of_stocks_index_are_encoded_as_stock_did(
    write: Callable[..., Any], dtype: str, metric: str
) -> None:
    ds = write(vectors(ROWS, DIM, dtype))
    ds.create_index(
        "vector", "IVF_PQ", name="stock", metric=metric, num_partitions=K, num_sub_vectors=M, max_iters=5
    )
    model = la.IvfPqModel.from_index(ds.uri, "stock")
    assert (model.metric, model.num_partitions, model.num_sub_vectors) == (metric, K, M)
    artifact = la.build_artifact(ds, "vector", model, f"{ds.uri}-artifact", backend="cpu")
    la.finalize(ds, "vector", artifact, name="ours")
    assert stored(ds, "ours") == stored(ds, "stock")


def test_segments_of_one_model_and_of_two(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM))
    options = {"num_partitions": K, "num_sub_vectors": M, "max_iters": 5, "backend": "cpu"}
    la.create_index(ds, "vector", **options)
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    ds = lance.write_dataset(pa.table({"id": [0], "vector": column(vectors(1, DIM))}), ds.uri, mode="append")
    ds.optimize.optimize_indices(num_indices_to_merge=0)
    assert len(ds.describe_indices()[0].segments) == 2
    assert la.IvfPqModel.from_index(ds, "vector_idx") == model
    parts = [
        ds.create_index_uncommitted(
            "vector",
            "IVF_PQ",
            "other",
            num_partitions=K,
            num_sub_vectors=M,
            max_iters=2,
            fragment_ids=[f.fragment_id],
        )
        for f in ds.get_fragments()[:2]
    ]
    ds.commit_existing_index_segments("other", "vector", parts)
    with pytest.raises(la.ArtifactMismatchError, match="segments of different models"):
        la.IvfPqModel.from_index(ds, "other")


def test_an_index_without_a_codebook_is_refused(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM))
    ds.create_index("vector", "IVF_FLAT", name="flat", num_partitions=K)
    ds.create_scalar_index("id", "BTREE", name="scalar")
    with pytest.raises(la.InvalidInputError, match="expected PQ"):
        la.IvfPqModel.from_index(ds, "flat")
    with pytest.raises(la.InvalidInputError, match="no vector index"):
        la.IvfPqModel.from_index(ds, "scalar")
    with pytest.raises(la.InvalidInputError, match='index "none" does not exist'):
        la.IvfPqModel.from_index(ds, "none")
    with pytest.raises(la.InvalidInputError, match=r"name: got np.int64\(3\)"):
        la.IvfPqModel.from_index(ds, np.int64(3))
