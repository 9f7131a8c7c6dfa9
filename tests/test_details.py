"""What an index says of itself is what stock's says, and what optimize_indices makes of it is what it makes of stock's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, segment, vectors

M, DIM, ROWS = 4, 16, 4096

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"num_partitions": 8},
    "default": {},
    "target size": {"target_partition_size": 300},
    "target size and partitions": {"target_partition_size": 300, "num_partitions": 5},
    "training": {"num_partitions": 8, "sample_rate": 40, "max_iters": 7},
    "cosine": {"num_partitions": 8, "metric": "cosine"},
    "dot": {"num_partitions": 8, "metric": "dot"},
    "four bits": {"num_partitions": 8, "num_bits": 4},
    "hnsw": {"num_partitions": 4, "index_type": "IVF_HNSW_PQ", "m": 8, "ef_construction": 60},
}


def of_stock(details: dict[str, Any]) -> dict[str, Any]:
    hints = {k: v for k, v in details["runtime_hints"].items() if not k.startswith("lance_artifact.")}
    return {**details, "runtime_hints": hints}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [False, True], ids=["create_index", "finalize"])
def test_details_are_stocks(way: str, steps: bool, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    options = {"num_sub_vectors": M, **WAYS[way]}
    index_type = options.pop("index_type", "IVF_PQ")
    training = {k: v for k, v in options.items() if k not in ("m", "ef_construction")}
    ds.create_index("vector", index_type, name="stock", **options)
    if steps:
        model = la.train(ds, "vector", backend="cpu", **training)
        artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
        # Read again, by whoever finalizes.
        hnsw = {k: v for k, v in options.items() if k in ("m", "ef_construction")}
        la.finalize(ds, "vector", artifact.uri, name="ours", index_type=index_type, **hnsw)
    else:
        la.create_index(ds, "vector", index_type, name="ours", backend="cpu", **options)
    by_name = {i.name: i for i in ds.describe_indices()}
    ours, stock = by_name["ours"], by_name["stock"]
    assert of_stock(ours.details) == of_stock(stock.details)
    assert (ours.type_url, ours.index_type, ours.num_rows_indexed) == (stock.type_url, stock.index_type, ROWS)
    assert segment(ds, "ours").index_version == segment(ds, "stock").index_version
    statistics = {n: ds.stats.index_stats(n) for n in ("ours", "stock")}
    assert statistics["ours"].keys() == statistics["stock"].keys()
    parts = [s["indices"][0] for s in statistics.values()]
    assert parts[0].keys() == parts[1].keys()
    for part in parts:
        # Of the first partition's graph.
        for key in ("level_offsets", "entry_point"):
            part["sub_index"].pop(key, None)
    for key in ("index_type", "metric_type", "num_partitions", "sub_index", "index_file_version"):
        assert parts[0][key] == parts[1][key], key
    # Another training: near, not equal.
    assert parts[0]["loss"] == pytest.approx(parts[1]["loss"], rel=0.2)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_loss_is_stocks(metric: str, dtype: str, write: Any) -> None:
    ds = write(vectors(ROWS, DIM, dtype))
    model = la.train(
        ds, "vector", metric=metric, num_partitions=8, num_sub_vectors=M, sample_rate=32, backend="cpu"
    )
    given = {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook}
    options = {"metric": metric, "num_partitions": 8, "num_sub_vectors": M, **given}
    ds.create_index("vector", "IVF_PQ", name="stock", **options)
    la.create_index(ds, "vector", name="ours", backend="cpu", **options)
    ours, stock = (ds.stats.index_stats(n)["indices"][0]["loss"] for n in ("ours", "stock"))
    assert ours == pytest.approx(stock, rel=5e-3 if dtype == "float16" else 1e-4)
    details = [of_stock(i.details) for i in ds.describe_indices()]
    assert details[0] == details[1]


@pytest.mark.parametrize("retrain", [False, True])
def test_optimize_treats_it_as_stocks(retrain: bool, write: Any) -> None:
    """20,000 rows come to 4,096 in partitions of about 300: they do not end in one partition."""
    partitions = {}
    for name in ("stock", "ours"):
        ds = write(vectors(ROWS, DIM), name=f"{name}.lance")
        options = {"num_sub_vectors": M, "target_partition_size": 300}
        if name == "stock":
            ds.create_index("vector", "IVF_PQ", **options)
        else:
            la.create_index(ds, "vector", backend="cpu", **options)
        more = pa.table({"id": pa.array(range(20_000)), "vector": column(vectors(20_000, DIM, seed=5))})
        ds = lance.write_dataset(more, ds.uri, mode="append")
        ds.optimize.optimize_indices(**({"retrain": True} if retrain else {}))
        statistics = ds.stats.index_stats("vector_idx")
        assert statistics["num_unindexed_rows"] == 0
        partitions[name] = statistics["indices"][0]["num_partitions"]
    assert partitions["stock"] > 5
    assert partitions["ours"] == pytest.approx(partitions["stock"], rel=0.5), partitions


def test_a_models_training_travels(write: Any, tmp_path: Path) -> None:
    import pickle

    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", num_partitions=4, num_sub_vectors=M, sample_rate=64, max_iters=3, target_partition_size=9, backend="cpu")  # fmt: skip
    recorded = {"target_partition_size": 9, "sample_rate": 64, "max_iters": 3}
    assert model.training == recorded
    assert pickle.loads(pickle.dumps(model)).training == recorded
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
    assert artifact.manifest["training"] == recorded and artifact.model.training == recorded
    bare = la.IvfPqModel(model.ivf_centroids, model.pq_codebook, num_sub_vectors=M)
    assert bare.training is None and bare == model
    assert bare.with_training(max_iters=5).training == {"max_iters": 5}
