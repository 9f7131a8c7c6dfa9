"""The oracle: with the same model, an index built through an artifact equals the one stock pylance builds itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from lance.file import LanceFileReader

import lance_artifact as la
from conftest import column, differences, segment, stored, vectors

K, M, DIM, ROWS = 12, 8, 32, 6000


def train(ds: Any, name: str = "vector", **options: Any) -> la.IvfPqModel:
    defaults = {
        "num_partitions": K,
        "num_sub_vectors": M,
        "sample_rate": 16,
        "max_iters": 8,
        "backend": "cpu",
    }
    return la.train(ds, name, **{**defaults, **options})


def build_both(
    ds: Any, model: la.IvfPqModel, tmp_path: Any, name: str = "vector", **options: Any
) -> tuple[Any, Any]:
    artifact = la.build_artifact(ds, name, model, tmp_path / "artifact", backend="cpu")
    la.finalize(ds, name, artifact, name="ours", **options)
    ds.create_index(
        name,
        options.get("index_type", "IVF_PQ"),
        name="stock",
        metric=model.metric,
        num_partitions=model.num_partitions,
        num_sub_vectors=model.num_sub_vectors,
        num_bits=model.num_bits,
        ivf_centroids=model.ivf_centroids,
        pq_codebook=model.pq_codebook,
    )
    return stored(ds, "ours"), stored(ds, "stock")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_same_rows_and_codes_as_stock(metric: str, dtype: str, bits: int, write: Any, tmp_path: Any) -> None:
    ds = write(vectors(ROWS, DIM, dtype))
    model = train(ds, metric=metric, num_bits=bits)
    assert (model.metric, model.dtype, model.num_bits) == (metric, dtype, bits)
    ours, stock = build_both(ds, model, tmp_path)
    partitions, ids, codes = differences(ours, stock)
    print(f"{metric:7} {dtype} {bits} bits: {partitions} partitions, {ids} row ids and {codes} codes differ")
    assert (partitions, ids, codes) == (K, 0, 0)
    assert sum(map(len, ours)) == ROWS


@pytest.mark.parametrize("version", ["2.0", "2.1", "2.2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_segment_files_say_what_stock_says(version: str, bits: int, write: Any, tmp_path: Any) -> None:
    """The finalizer writes IVF_PQ segments without Lance's builder: everything but the rows' order is to be the same."""
    array = vectors(ROWS, DIM)
    array[: ROWS // 2] = array[0]  # some partitions stay empty
    ds = write(array, data_storage_version=version)
    model = train(ds, num_bits=bits)
    assert differences(*build_both(ds, model, tmp_path))[1:] == (0, 0)
    ours, stock = (Path(ds.uri, "_indices", segment(ds, name).uuid) for name in ("ours", "stock"))
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in stock.iterdir())
    for name in ("index.idx", "auxiliary.idx"):
        readers = [LanceFileReader(str(folder / name)) for folder in (ours, stock)]
        files = [r.metadata() for r in readers]
        assert files[0].schema == files[1].schema
        said = [dict(f.schema.metadata) for f in files]
        assert said[0] == said[1]
        for key in ("num_rows", "major_version", "minor_version"):
            assert getattr(files[0], key) == getattr(files[1], key)
        assert [len(f.global_buffers) for f in files] == [len(files[1].global_buffers)] * 2
        for index in range(1, len(files[0].global_buffers)):
            ours_, stock_ = (bytes(r.read_global_buffer(index)) for r in readers)
            # The last number beside the centroids is the sum of distances, which stock knows from its own encoding.
            end = -8 if name == "index.idx" else None
            assert (len(ours_), ours_[:end]) == (len(stock_), stock_[:end])
        assert len(files[0].columns) == len(files[1].columns)


@pytest.mark.parametrize("memory_limit", [None, 14 << 20])
@pytest.mark.parametrize("version", ["legacy", "2.0", "2.1", "2.2"])
def test_segments_of_several_windows(version: str, memory_limit: int | None, tmp_path: Any) -> None:
    """Partitions larger than what the finalizer prepares at once, and than what it may hold, and empty ones between them."""
    rows, width = 200_000, 64
    rng = np.random.default_rng(4)
    ds = lance.write_dataset(
        pa.table({"vector": column(rng.standard_normal((rows, width)).astype("f4"))}),
        str(tmp_path / "many.lance"), max_rows_per_file=70_000, data_storage_version=version,
    )  # fmt: skip
    parts = rng.choice([1, 2, 2, 2, 4, 5, 6, 7, 7, 7], rows).astype("u4")
    codes = rng.integers(0, 256, (rows, width), dtype=np.uint8)
    ids = ds.to_table(columns=[], with_row_id=True)["_rowid"].to_numpy()
    model = la.IvfPqModel(
        rng.standard_normal((10, width)).astype("f4"), rng.standard_normal((width, 256, 1)).astype("f4")
    )
    with la.PartitionArtifactBuilder(
        tmp_path / "artifact", model, source=la.describe_source(ds, "vector")
    ) as builder:
        for start in range(0, rows, 30_000):
            now = slice(start, start + 30_000)
            flat = pa.FixedSizeListArray.from_arrays(pa.array(codes[now].reshape(-1)), width)
            builder.append_batch(
                pa.record_batch(
                    [pa.array(ids[now]), pa.array(parts[now]), flat], ["_rowid", "__ivf_part_id", "__pq_code"]
                )
            )
    la.finalize(ds, "vector", builder.artifact, memory_limit=memory_limit)
    found = stored(ds, "vector_idx")
    assert [len(p) for p in found] == np.bincount(parts, minlength=10).tolist()
    for partition, there in enumerate(found):
        rows_ = np.flatnonzero(parts == partition)
        assert there == {int(ids[row]): codes[row].tobytes() for row in rows_}
    query = rng.standard_normal(width).astype("f4")
    nearest = {"column": "vector", "q": query, "k": 5, "nprobes": 10, "refine_factor": 2}
    assert ds.to_table(nearest=nearest).num_rows == 5


def test_every_vector_lance_indexes_and_no_other(write: Any, tmp_path: Any) -> None:
    array = vectors(ROWS, DIM)
    array[10], array[11, 3], array[12, 5], array[13] = 0, np.nan, np.inf, 1e-30
    values = column(array)
    mask = np.zeros(ROWS, bool)
    mask[[20, 21]] = True
    values = pa.FixedSizeListArray.from_arrays(values.flatten(), DIM, mask=pa.array(mask))
    ds = write(values)
    ds.delete("id in (100, 101, 4000)")
    for metric, dropped in (
        ("l2", {"null": 2, "non_finite": 2, "zero_norm": 0}),
        ("dot", {"null": 2, "non_finite": 2, "zero_norm": 0}),
        ("cosine", {"null": 2, "non_finite": 2, "zero_norm": 2}),
    ):
        model = train(ds, metric=metric)
        artifact = la.build_artifact(ds, "vector", model, tmp_path / metric, backend="cpu")
        rows = artifact.manifest["rows"]
        assert rows["dropped"] == dropped
        assert rows["seen"] == ROWS - 3
        assert rows["written"] == artifact.num_rows == ROWS - 3 - sum(dropped.values())
        la.finalize(ds, "vector", artifact, name="ours", replace=True)
        ds.create_index(
            "vector", "IVF_PQ", name="stock", metric=metric, num_partitions=K, num_sub_vectors=M,
            ivf_centroids=model.ivf_centroids, pq_codebook=model.pq_codebook, replace=True,
        )  # fmt: skip
        assert differences(stored(ds, "ours"), stored(ds, "stock")) == (K, 0, 0)


@pytest.mark.parametrize("stable", [False, True])
def test_row_ids_of_either_kind(stable: bool, write: Any, tmp_path: Any) -> None:
    ds = write(vectors(ROWS, DIM), enable_stable_row_ids=stable)
    assert ds.has_stable_row_ids == stable
    ds.delete("id < 50")
    ds.update({"id": "id + 100000"}, where="id >= 5900")
    ours, stock = build_both(ds, train(ds), tmp_path)
    assert differences(ours, stock) == (K, 0, 0)
    query = ds.to_table(columns=["vector"], limit=1)["vector"][0].values.to_numpy()
    found = ds.to_table(nearest={"column": "vector", "q": query, "k": 5, "nprobes": K})
    assert found.num_rows == 5


def test_nested_column(tmp_path: Any) -> None:
    inner = column(vectors(ROWS, DIM))
    struct = pa.StructArray.from_arrays([inner, pa.array(range(ROWS))], ["b", "n"])
    ds = lance.write_dataset(pa.table({"a": struct}), str(tmp_path / "nested.lance"), max_rows_per_file=2500)
    ours, stock = build_both(ds, train(ds, "a.b"), tmp_path, "a.b")
    assert differences(ours, stock) == (K, 0, 0)
    la.finalize(ds, "a.b", str(tmp_path / "artifact"), name="ours", replace=True)
    assert differences(stored(ds, "ours"), stock) == (K, 0, 0)


def test_hnsw_from_the_same_artifact(write: Any, tmp_path: Any) -> None:
    array = vectors(ROWS, DIM)
    ds = write(array)
    ours, stock = build_both(ds, train(ds), tmp_path, index_type="IVF_HNSW_PQ")
    assert differences(ours, stock) == (K, 0, 0)
    assert {i.name: i.index_type for i in ds.describe_indices()} == {
        "ours": "IVF_HNSW_PQ",
        "stock": "IVF_HNSW_PQ",
    }
    assert recall(ds, array, "l2") > 0.9


def recall(ds: Any, array: np.ndarray, metric: str, k: int = 10) -> float:
    hits = 0
    for query in array[:50]:
        truth = ds.to_table(
            nearest={"column": "vector", "q": query, "k": k, "use_index": False, "metric": metric}
        )
        found = ds.to_table(
            nearest={"column": "vector", "q": query, "k": k, "nprobes": K, "refine_factor": 10}
        )
        hits += len(set(truth["id"].to_pylist()) & set(found["id"].to_pylist()))
    return hits / (50 * k)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_recall_against_brute_force(metric: str, write: Any) -> None:
    array = vectors(ROWS, DIM)
    ds = write(array)
    la.create_index(
        ds, "vector", metric=metric, num_partitions=K, num_sub_vectors=M, sample_rate=32, backend="cpu"
    )
    assert recall(ds, array, metric) > 0.9


def test_workers_encode_fragments_and_one_finalizes(write: Any, tmp_path: Any) -> None:
    ds = write(vectors(ROWS, DIM))
    model = train(ds)
    whole = la.build_artifact(ds, "vector", model, tmp_path / "whole", backend="cpu")
    shards = [
        la.build_artifact(
            ds,
            "vector",
            model,
            tmp_path / f"shard-{f.fragment_id}",
            backend="cpu",
            fragment_ids=[f.fragment_id],
        )
        for f in ds.get_fragments()
    ]
    assert len(shards) >= 3
    la.finalize(ds, "vector", whole, name="ours")
    la.finalize(
        ds, "vector", [str(tmp_path / f"shard-{f.fragment_id}") for f in ds.get_fragments()], name="stock"
    )
    assert differences(stored(ds, "ours"), stored(ds, "stock")) == (K, 0, 0)


def test_some_fragments_only(write: Any, tmp_path: Any) -> None:
    ds = write(vectors(ROWS, DIM))
    model = train(ds)
    artifact = la.build_artifact(
        ds, "vector", model, tmp_path / "artifact", backend="cpu", fragment_ids=[0, 2]
    )
    la.finalize(ds, "vector", artifact, fragment_ids=[2, 0])
    assert set(segment(ds, "vector_idx").fragment_ids) == {0, 2}
    assert {i >> 32 for part in stored(ds, "vector_idx") for i in part} == {0, 2}


def test_large_models_are_assigned_exactly(
    write: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From K * dim = 1,000,000 stock assigns by an approximate graph; ours stays exact.
    rng = np.random.default_rng(1)
    dim, k = 512, 2000
    array = rng.standard_normal((3000, dim)).astype("float32")
    ds = write(array)
    centroids = array[:k] + rng.standard_normal((k, dim)).astype("float32") * 0.1
    codebook = rng.standard_normal((8, 16, dim // 8)).astype("float32")
    la.create_index(
        ds,
        "vector",
        name="ours",
        num_partitions=k,
        num_sub_vectors=8,
        ivf_centroids=centroids,
        pq_codebook=codebook,
        backend="cpu",
    )
    partition = {i: p for p, part in enumerate(stored(ds, "ours")) for i in part}
    distances = ((array**2).sum(1)[:, None] - 2 * array @ centroids.T) + (centroids**2).sum(1)[None]
    row_ids = ds.to_table(columns=[], with_row_id=True)["_rowid"].to_pylist()
    chosen = np.array([partition[i] for i in row_ids])
    best = distances.min(1)
    assert np.all(distances[np.arange(len(array)), chosen] <= best + 1e-2)


def test_the_index_lives_on_like_any_other(write: Any, tmp_path: Any) -> None:
    array = vectors(ROWS, DIM)
    ds = write(array)
    la.create_index(ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=16, backend="cpu")
    more = vectors(500, DIM, seed=9)
    ds = lance.write_dataset(
        pa.table({"id": pa.array(range(ROWS, ROWS + 500)), "vector": column(more)}), ds.uri, mode="append"
    )
    ds.optimize.optimize_indices()
    ds.optimize.compact_files()
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0
    found = ds.to_table(nearest={"column": "vector", "q": more[3], "k": 1, "nprobes": K, "refine_factor": 10})
    assert found["id"].to_pylist() == [ROWS + 3]
