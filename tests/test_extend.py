"""An index grows with its table: new rows are encoded with its own model, and are another segment of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from commits import before_commit, folders
from conftest import column, differences, stored, stored_in, vectors
from lance_artifact import _extend, _fit

K, M, DIM, ROWS, NEW = 8, 4, 16, 3000, 500


def append(ds: Any, array: np.ndarray, first: int = ROWS) -> Any:
    table = pa.table({"id": pa.array(range(first, first + len(array))), "vector": column(array)})
    return lance.write_dataset(table, ds.uri, mode="append")


def build(ds: Any, stock: bool = False, name: str = "vector_idx", **options: Any) -> Any:
    options = {"num_partitions": K, "num_sub_vectors": M, "max_iters": 5, **options}
    if stock:
        return ds.create_index("vector", options.pop("index_type", "IVF_PQ"), name=name, **options)
    return la.create_index(
        ds, "vector", options.pop("index_type", "IVF_PQ"), name=name, backend="cpu", **options
    )


def segments(ds: Any, name: str = "vector_idx") -> dict[str, set[int]]:
    index = next(i for i in ds.describe_indices() if i.name == name)
    return {str(s.uuid): set(s.fragment_ids) for s in index.segments}


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_new_rows_get_the_codes_that_stock_gives_them(
    write: Callable[..., Any], dtype: str, metric: str, num_bits: int, stock: bool
) -> None:
    ds = write(vectors(ROWS, DIM, dtype))
    build(ds, stock, metric=metric, num_bits=num_bits)
    (old,) = segments(ds)
    append(ds, vectors(NEW, DIM, dtype, seed=1))
    done = la.extend_index(ds, "vector_idx", backend="cpu")
    now = segments(ds)
    assert done.segment is not None and now.keys() == {old, done.segment}
    assert now[done.segment] == set(done.fragment_ids) and (done.num_rows, done.num_segments) == (NEW, 2)
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    theirs = ds.create_index_uncommitted(
        "vector",
        "IVF_PQ",
        "theirs",
        metric=metric,
        num_partitions=K,
        num_sub_vectors=M,
        num_bits=num_bits,
        ivf_centroids=model.ivf_centroids,
        pq_codebook=model.pq_codebook,
        fragment_ids=list(done.fragment_ids),
    )
    ds.commit_existing_index_segments("theirs", "vector", [theirs])
    ours = stored_in(ds, "vector_idx", done.segment)
    _, ids, codes = differences(ours, stored(ds, "theirs"))
    # With a model that is given, as when it optimizes, stock picks worse codewords for dot than where it has just trained it.
    assert ids == 0 and (codes == 0 or metric == "dot")
    rows = ds.to_table(columns=["vector"], filter=f"id >= {ROWS}", with_row_id=True)
    if metric == "cosine":  # whose vectors would have to be normalised first
        return
    _, code = la.CpuEncoder(model).encode(rows["vector"].combine_chunks())
    expected = {i: bytes(c) for i, c in zip(rows["_rowid"].to_pylist(), code.to_pylist(), strict=True)}
    assert {i: c for partition in ours for i, c in partition.items()} == expected


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_searches_find_new_rows_in_an_index_with_graphs(write: Callable[..., Any], metric: str) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds, index_type="IVF_HNSW_PQ", metric=metric, m=12, ef_construction=77)
    new = vectors(NEW, DIM, seed=1)
    append(ds, new)
    done = la.extend_index(ds.uri, "vector_idx", backend="cpu")
    assert done.num_rows == NEW
    ds = lance.dataset(ds.uri)
    index = ds.describe_indices()[0]
    graph = index.details["hnsw"]
    assert (graph["max_connections"], graph["construction_ef"]) == (12, 77)
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0
    found = ds.to_table(
        nearest={"column": "vector", "q": new[7], "k": 1, "nprobes": K, "refine_factor": 50}, fast_search=True
    )
    best = new @ new[7] if metric == "dot" else None
    if best is None:
        assert found["id"].to_pylist() == [ROWS + 7]
    else:
        assert found.num_rows == 1


def test_nothing_to_do_and_what_there_is_to_do(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    before = ds.version
    done = la.extend_index(ds, "vector_idx")
    assert done.segment is None and done.num_rows == 0 and ds.version == before
    assert "nothing was done" in str(done)
    append(ds, vectors(NEW, DIM, seed=1))
    append(ds, vectors(NEW, DIM, seed=2), first=ROWS + NEW)
    ds.checkout_latest()
    first, second = [f.fragment_id for f in ds.get_fragments()][-2:]
    with pytest.raises(la.InvalidInputError, match="covered by index 'vector_idx' already"):
        la.extend_index(ds, "vector_idx", fragment_ids=[0, second])
    done = la.extend_index(ds, "vector_idx", fragment_ids=[second])
    assert done.fragment_ids == (second,)
    done = la.extend_index(ds, "vector_idx")
    assert done.fragment_ids == (first,) and done.num_segments == 3
    assert "500 rows of 1 fragments indexed; 3 segments" in str(done)


def test_updated_and_dropped_rows(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM), enable_stable_row_ids=True)
    build(ds)
    changed = pa.table({"id": pa.array(range(100)), "vector": column(vectors(100, DIM, seed=4))})
    ds.merge_insert("id").when_matched_update_all().execute(changed)
    nulls = pa.FixedSizeListArray.from_arrays(pa.array(np.full(3 * DIM, np.nan, dtype=np.float32)), DIM)
    lance.write_dataset(
        pa.table({"id": pa.array([9000, 9001, 9002]), "vector": nulls}), ds.uri, mode="append"
    )
    done = la.extend_index(ds, "vector_idx")
    assert done.num_rows == 100 and sum(done.rows_dropped.values()) == 3
    assert "3 dropped" in str(done)
    query = vectors(100, DIM, seed=4)[5]
    found = ds.to_table(
        nearest={"column": "vector", "q": query, "k": 1, "nprobes": K, "refine_factor": 50}, fast_search=True
    )
    assert found["id"].to_pylist() == [5]


def test_after_a_deferred_compaction(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    ds.delete("id < 100")
    ds.optimize.compact_files(target_rows_per_fragment=10_000, defer_index_remap=True)
    append(ds, vectors(NEW, DIM, seed=1))
    done = la.extend_index(ds, "vector_idx")
    assert done.num_rows == NEW and len(done.fragment_ids) == 1
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0


@pytest.mark.parametrize("who", ["ours", "stock", "compaction"])
def test_somebody_was_first(write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    append(ds, vectors(NEW, DIM, seed=1))
    append(ds, vectors(NEW, DIM, seed=2), first=ROWS + NEW)

    def meanwhile() -> None:
        other = lance.dataset(ds.uri)
        if who == "ours":
            la.extend_index(other, "vector_idx")
        elif who == "stock":
            other.optimize.optimize_indices(num_indices_to_merge=0)
        else:
            other.optimize.compact_files(target_rows_per_fragment=10_000)

    before_commit(monkeypatch, meanwhile, _extend)
    with pytest.raises(la.CommitConflictError, match=r"covers fragments|rewritten"):
        la.extend_index(ds, "vector_idx")
    ds = lance.dataset(ds.uri)
    assert folders(ds) >= set(segments(ds))
    # Nothing of ours is left that is not committed; what a compaction replaced is Lance's.
    extra = folders(ds) - set(segments(ds))
    assert len(extra) <= (who == "compaction")
    la.extend_index(ds, "vector_idx")
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0


def test_what_cannot_be_extended(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    ds.create_scalar_index("id", "BTREE", name="ids")
    ds.create_index("vector", "IVF_FLAT", name="flat", num_partitions=4)
    with pytest.raises(la.InvalidInputError, match="'none' does not exist"):
        la.extend_index(ds, "none")
    for name in ("ids", "flat"):
        with pytest.raises(la.InvalidInputError, match="expected one of"):
            la.extend_index(ds, name)
        with pytest.raises(la.InvalidInputError, match="expected one of"):
            la.merge_segments(ds, name)


def test_an_artifact_may_be_kept(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    append(ds, vectors(NEW, DIM, seed=1))
    done = la.extend_index(ds, "vector_idx", artifact_uri=tmp_path / "kept", memory_limit=64 << 20)
    kept = la.Artifact.open(tmp_path / "kept")
    assert kept.num_rows == NEW and tuple(kept.manifest["source"]["fragment_ids"]) == done.fragment_ids


def test_an_index_of_another_model_comes_meanwhile(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    append(ds, vectors(NEW, DIM, seed=1))
    old, then = list(range(3)), []

    def meanwhile() -> None:
        build(lance.dataset(ds.uri), replace=True, fragment_ids=old, seed=9)
        then.append(folders(ds))

    before_commit(monkeypatch, meanwhile, _extend)
    with pytest.raises(la.CommitConflictError, match=r"changed while .* of another model"):
        la.extend_index(ds, "vector_idx", backend="cpu")
    assert list(segments(lance.dataset(ds.uri)).values()) == [set(old)]
    # All but ours.
    assert len(then[0] - folders(ds)) == 1 and folders(ds) <= then[0]
    assert la.extend_index(ds, "vector_idx", backend="cpu").num_rows == NEW


def test_a_segment_of_another_model_is_not_put_beside(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    append(ds, vectors(NEW, DIM, seed=1))
    ds.checkout_latest()
    fragment = [ds.get_fragments()[-1].fragment_id]
    other = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, seed=5, max_iters=5, backend="cpu")
    artifact = la.build_artifact(ds, "vector", other, tmp_path / "a", fragment_ids=fragment, backend="cpu")
    before = folders(ds)
    with pytest.raises(la.ArtifactMismatchError, match="of another model"):
        la.finalize(ds, "vector", artifact, mode="append")
    with pytest.raises(la.InvalidInputError, match="would not be replaced"):
        la.finalize(ds, "vector", artifact, replace=True)
    assert folders(ds) == before


def test_modes(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, max_iters=5, backend="cpu")
    parts = [
        la.build_artifact(ds, "vector", model, tmp_path / str(i), fragment_ids=[i], backend="cpu")
        for i in range(3)
    ]
    la.finalize(ds, "vector", parts[0], mode="append")
    with pytest.raises(la.IndexExistsError):
        la.finalize(ds, "vector", parts[1], mode="create")
    la.finalize(ds, "vector", parts[1], mode="append")
    la.finalize(ds, "vector", parts[2], mode="append")
    assert sorted(map(sorted, segments(ds).values())) == [[0], [1], [2]]
    with pytest.raises(la.CommitConflictError, match="covers fragments \\[1\\] already"):
        la.finalize(ds, "vector", parts[1], mode="append")
    la.finalize(ds, "vector", parts, mode="replace")
    assert list(segments(ds).values()) == [{0, 1, 2}]
    with pytest.raises(la.InvalidInputError, match="beside replace=True"):
        la.finalize(ds, "vector", parts, mode="append", replace=True)
    with pytest.raises(la.InvalidInputError, match='expected "create", "replace" or "append"'):
        la.finalize(ds, "vector", parts, mode="add")


def test_how_well_the_model_fits(write: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    append(ds, vectors(NEW, DIM, seed=0))
    done = la.extend_index(ds, "vector_idx")
    assert done.fit is not None and 0.8 < done.fit.ratio < 1.5 and done.fit.rebuild is None
    assert "the model fits the new rows" in str(done)
    append(ds, 20 + 5 * vectors(NEW, DIM, seed=8), first=4000)
    with caplog.at_level(logging.WARNING, "lance_artifact"):
        done = la.extend_index(ds, "vector_idx")
    assert done.fit is not None and done.fit.ratio > 5 and "times worse" in str(done.fit.rebuild)
    assert "a new index pays" in caplog.text
    append(ds, vectors(NEW, DIM, seed=0), first=5000)
    assert la.extend_index(ds, "vector_idx", measure_fit=False).fit is None


@pytest.mark.parametrize("num_bits", [4, 8])
def test_what_codes_stand_for_is_what_lance_measures_by(write: Callable[..., Any], num_bits: int) -> None:
    array = vectors(ROWS, DIM)
    ds = write(array)
    build(ds, num_bits=num_bits)
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    part_id, codes = la.CpuEncoder(model).encode(column(array))
    centroids = model.ivf_centroids.flatten().to_numpy().reshape(K, DIM)
    stand_for = centroids[np.asarray(part_id)] + _fit.decoded(model, codes)
    query = vectors(1, DIM, seed=9)[0]
    found = ds.to_table(nearest={"column": "vector", "q": query, "k": 50, "nprobes": K})
    expected = np.square(stand_for[found["id"].to_numpy()] - query).sum(axis=1)
    # Lance rounds tables of 4-bit codes to eight bits.
    np.testing.assert_allclose(found["_distance"].to_numpy(), expected, rtol=1e-4 if num_bits == 8 else 0.05)
