"""Segments of an index put together: what stock would make of them, without the rows that are gone."""

from __future__ import annotations

import datetime
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
from lance_artifact import _merge
from test_extend import DIM, NEW, ROWS, K, M, append, build, segments


def grown(write: Callable[..., Any], dtype: str = "float32", stock: bool = False, **options: Any) -> Any:
    """An index of three segments."""
    storage = {
        key: options.pop(key) for key in ("enable_stable_row_ids", "data_storage_version") if key in options
    }
    ds = write(vectors(ROWS, DIM, dtype), **storage)
    build(ds, stock, **options)
    for seed in (1, 2):
        append(ds, vectors(NEW, DIM, dtype, seed), first=ROWS + seed * NEW)
        if stock:
            lance.dataset(ds.uri).optimize.optimize_indices(num_indices_to_merge=0)
        else:
            la.extend_index(ds.uri, "vector_idx", backend="cpu", measure_fit=False)
    ds.checkout_latest()
    assert len(segments(ds)) == 3
    return ds


def live(ds: Any, parts: list[list[dict[int, bytes]]]) -> list[dict[int, bytes]]:
    """Partitions of several segments together, of the rows that are there."""
    there = set(ds.to_table(columns=[], with_row_id=True)["_rowid"].to_pylist())
    merged: list[dict[int, bytes]] = [{} for _ in range(K)]
    for content in parts:
        for partition, rows in enumerate(content):
            merged[partition].update({i: code for i, code in rows.items() if i in there})
    return merged


def check_searches(ds: Any, metric: str = "l2") -> None:
    """Searches by the index find what exact ones do, deleted rows not among it."""
    array = np.stack(ds.to_table(columns=["vector"])["vector"].to_numpy(zero_copy_only=False)).astype(
        np.float32
    )
    for query in array[:: len(array) // 7]:
        nearest = {"column": "vector", "q": query, "k": 10, "metric": metric}
        exact = ds.to_table(nearest={**nearest, "use_index": False})["id"].to_pylist()
        found = ds.to_table(nearest={**nearest, "nprobes": K, "refine_factor": 30}, fast_search=True)[
            "id"
        ].to_pylist()
        assert len(set(exact) & set(found)) >= 9


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_stock_makes_of_them(
    write: Callable[..., Any], dtype: str, metric: str, num_bits: int, stock: bool
) -> None:
    ds = grown(write, dtype, stock, metric=metric, num_bits=num_bits)
    ds.delete("id % 7 = 3")
    before = segments(ds)
    expected = live(ds, [stored_in(ds, "vector_idx", uuid) for uuid in before])
    theirs = lance.dataset(ds.uri).shallow_clone(f"{ds.uri}-stock", ds.version)
    theirs.optimize.optimize_indices(num_indices_to_merge=3)

    merge = la.merge_segments(ds, "vector_idx")
    assert segments(ds) == {merge.segment: set().union(*before.values())}
    assert set(merge.merged) == before.keys() and merge.num_segments == 1
    assert merge.num_rows == ds.count_rows() and merge.rows_missing == 0
    assert merge.rows_dropped == ROWS + 2 * NEW - ds.count_rows() > 0
    assert stored(ds, "vector_idx") == expected
    # Stock keeps the rows that are gone.
    _, ids, codes = differences(stored(ds, "vector_idx"), live(theirs, [stored(theirs, "vector_idx")]))
    assert (ids, codes) == (0, 0)
    if not (stock and metric == "dot"):  # of which stock's own codes are poor
        check_searches(ds, metric)


def test_stable_row_ids_of_rows_that_moved(write: Callable[..., Any]) -> None:
    ds = grown(write, enable_stable_row_ids=True)
    changed = pa.table({"id": pa.array(range(200)), "vector": column(vectors(200, DIM, seed=4))})
    ds.merge_insert("id").when_matched_update_all().execute(changed)
    la.extend_index(ds, "vector_idx", measure_fit=False)
    merge = la.merge_segments(ds, "vector_idx")
    # The same row id in two segments: the code of the row as it is now stays.
    assert (merge.rows_dropped, merge.num_rows) == (200, ROWS + 2 * NEW)
    check_searches(ds)
    rows = ds.to_table(columns=["vector"], filter="id < 200", with_row_id=True)
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    part_id, codes = la.CpuEncoder(model).encode(rows["vector"].combine_chunks())
    content = stored(ds, "vector_idx")
    for row_id, partition, code in zip(
        rows["_rowid"].to_pylist(), part_id.to_pylist(), codes.to_pylist(), strict=True
    ):
        assert content[partition][row_id] == bytes(code)


# Lance defers the remapping of addresses only.
@pytest.mark.parametrize(("stable", "deferred"), [(False, False), (False, True), (True, False)])
def test_compacted_tables(write: Callable[..., Any], stable: bool, deferred: bool) -> None:
    ds = grown(write, enable_stable_row_ids=stable)
    ds.delete("id % 3 = 1")
    ds.optimize.compact_files(target_rows_per_fragment=2500, defer_index_remap=deferred)
    append(ds, vectors(NEW, DIM, seed=7), first=10_000)
    la.extend_index(ds, "vector_idx", measure_fit=False)
    merge = la.merge_segments(ds, "vector_idx")
    assert merge.num_segments == 1 and merge.num_rows == ds.count_rows()
    content = stored(ds, "vector_idx")
    there = set(ds.to_table(columns=[], with_row_id=True)["_rowid"].to_pylist())
    assert {i for rows in content for i in rows} == there
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0
    check_searches(ds)


def test_graphs_are_built_anew(write: Callable[..., Any]) -> None:
    ds = grown(write, index_type="IVF_HNSW_PQ", m=12, ef_construction=77)
    ds.delete("id % 7 = 3")
    expected = ds.count_rows()
    merge = la.merge_segments(ds, "vector_idx")
    assert merge.num_rows == expected
    graph = ds.describe_indices()[0].details["hnsw"]
    assert (graph["max_connections"], graph["construction_ef"]) == (12, 77)
    check_searches(ds)


@pytest.mark.parametrize("version", ["legacy", "2.0", "2.1", "2.2"])
def test_files_of_every_format(write: Callable[..., Any], version: str) -> None:
    ds = grown(write, stock=True, data_storage_version=version)
    parts = [stored_in(ds, "vector_idx", uuid) for uuid in segments(ds)]
    la.merge_segments(ds, "vector_idx")
    assert stored(ds, "vector_idx") == live(ds, parts)


def test_the_newest_only_and_one_alone(write: Callable[..., Any]) -> None:
    ds = grown(write)
    oldest = next(uuid for uuid, fragments in segments(ds).items() if 0 in fragments)
    merge = la.merge_segments(ds, "vector_idx", num_indices_to_merge=2)
    assert merge.segment is not None and oldest not in merge.merged
    assert segments(ds).keys() == {oldest, merge.segment}
    assert la.merge_segments(ds, "vector_idx").num_segments == 1
    before, version = folders(ds), ds.version
    again = la.merge_segments(ds, "vector_idx")
    assert (
        again.segment is None
        and "nothing to merge" in str(again)
        and (folders(ds), ds.version) == (before, version)
    )
    ds.delete("id < 10")
    purged = la.merge_segments(ds, "vector_idx")
    assert (purged.rows_dropped, purged.num_rows) == (10, ROWS + 2 * NEW - 10)
    check_searches(ds)


def test_partitions_that_are_larger_than_the_memory(write: Callable[..., Any]) -> None:
    ds = write(vectors(200_000, DIM))
    build(ds, num_partitions=2, num_sub_vectors=16, sample_rate=64)
    append(ds, vectors(100_000, DIM, seed=1), first=200_000)
    la.extend_index(ds, "vector_idx", measure_fit=False)
    ds.delete("id % 5 = 0")
    parts = [stored_in(ds, "vector_idx", uuid) for uuid in segments(ds)]
    there = set(ds.to_table(columns=[], with_row_id=True)["_rowid"].to_pylist())
    expected = [{i: code for part in parts for i, code in part[p].items() if i in there} for p in range(2)]
    with pytest.raises(
        la.InvalidInputError, match="memory_limit: got 1048576 bytes, expected at least"
    ) as refused:
        la.merge_segments(ds, "vector_idx", memory_limit=1 << 20)
    least = int(str(refused.value).split("expected at least ")[1].split(":")[0])
    # A partition has 3.6 MB: it goes slice by slice.
    assert least < 24 << 20
    la.merge_segments(ds, "vector_idx", memory_limit=least)
    assert stored(ds, "vector_idx") == expected


def test_a_deleted_row_is_noticed_beside_one_without_a_vector(write: Callable[..., Any]) -> None:
    """As many rows are gone as were never in it: the segment has as many as its fragments."""
    array = vectors(ROWS, DIM)
    array[7] = np.nan
    ds = write(array)
    build(ds)
    ds.delete("id = 20")
    merge = la.merge_segments(ds, "vector_idx")
    assert (merge.num_rows, merge.rows_dropped, merge.rows_missing) == (ROWS - 2, 1, 1)
    assert merge.segment in segments(ds)
    again = la.merge_segments(ds, "vector_idx")
    assert (again.segment, again.num_rows, again.rows_missing) == (None, ROWS - 2, 1)


@pytest.mark.parametrize("one_in", [50, 5000])
@pytest.mark.parametrize("partitions", [2, 64])
def test_segments_of_which_little_is_left(partitions: int, one_in: int, write: Callable[..., Any]) -> None:
    """Most of what is stored is read, some at a time, and not kept."""
    ds = write(vectors(200_000, DIM))
    build(ds, num_partitions=partitions, num_sub_vectors=16, sample_rate=64)
    append(ds, vectors(20_000, DIM, seed=1), first=200_000)
    la.extend_index(ds, "vector_idx", measure_fit=False)
    ds.delete(f"id < 200000 AND id % {one_in} != 0")
    parts = [stored_in(ds, "vector_idx", uuid) for uuid in segments(ds)]
    there = set(ds.to_table(columns=[], with_row_id=True)["_rowid"].to_pylist())
    expected = [
        {i: code for part in parts for i, code in part[p].items() if i in there} for p in range(partitions)
    ]
    with pytest.raises(la.InvalidInputError, match="expected at least") as refused:
        la.merge_segments(ds, "vector_idx", memory_limit=1 << 20)
    least = int(str(refused.value).split("expected at least ")[1].split(":")[0])
    merge = la.merge_segments(ds, "vector_idx", memory_limit=least)
    assert (merge.num_rows, merge.rows_dropped) == (len(there), 220_000 - len(there))
    assert stored(ds, "vector_idx") == expected


@pytest.mark.skipif(not hasattr(lance.LanceOperation, "DataOverlay"), reason="this pylance has no overlays")
def test_rows_that_got_other_vectors_by_an_overlay(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance passes over their old codes as long as it knows that the segment is older."""
    # Not released yet: without this, datasets with overlays are refused.
    monkeypatch.setenv("LANCE_ENABLE_UNSTABLE_DATA_OVERLAY_FILES", "1")
    ds = grown(write)
    fragment = ds.get_fragments()[0].fragment_id
    (field,) = [f.id() for f in ds.lance_schema.fields() if f.name() == "vector"]
    name = "overlay.lance"
    with lance.file.LanceFileWriter(f"{ds.uri}/data/{name}") as file:
        file.write_batch(pa.table({"vector": column(-50 * vectors(2, DIM))}))
    data_file = lance.fragment.DataFile(name, [field], [0], 2, 1)
    overlay = lance.LanceOperation.DataOverlayFile(data_file, [3, 5])
    group = lance.LanceOperation.DataOverlayGroup(fragment, [overlay])
    ds = lance.LanceDataset.commit(ds, lance.LanceOperation.DataOverlay([group]), read_version=ds.version)
    said = "an overlay, and segment .* has their old codes"
    with pytest.raises(la.InvalidInputError, match=said):
        la.merge_segments(ds, "vector_idx")
    assert len(segments(ds)) == 3
    la.create_index(ds, "vector", replace=True, num_partitions=K, num_sub_vectors=M, backend="cpu")
    ds.checkout_latest()
    append(ds, vectors(NEW, DIM, seed=8), first=50_000)
    la.extend_index(ds, "vector_idx", measure_fit=False)
    assert la.merge_segments(ds, "vector_idx").num_segments == 1
    check_searches(ds)


def test_what_happens_meanwhile(write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ds = grown(write)

    def others() -> None:
        append(ds, vectors(NEW, DIM, seed=6), first=20_000)
        la.extend_index(ds.uri, "vector_idx", measure_fit=False)
        lance.dataset(ds.uri).delete("id < 5")

    before_commit(monkeypatch, others, _merge)
    merge = la.merge_segments(ds, "vector_idx")
    assert merge.segment in segments(ds) and len(segments(ds)) == merge.num_segments == 2
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0
    check_searches(ds)


def test_after_deletes_and_a_compaction_searches_return_all_that_they_are_asked_for(
    write: Callable[..., Any],
) -> None:
    """In a table of stable row ids entries of deleted rows take places among the nearest, by Lance, until they are gone."""
    x = vectors(ROWS, DIM)
    ds = write(x, enable_stable_row_ids=True)
    build(ds, False)
    nearest = np.argsort(((x - x[7]) ** 2).sum(axis=1))[:50]
    ds.delete(f"id in ({', '.join(map(str, nearest))})")
    ds.optimize.compact_files(materialize_deletions_threshold=0.0)
    done = la.merge_segments(ds, "vector_idx")
    assert done.rows_dropped == 50 and done.rows_missing == 0
    found = ds.to_table(nearest={"column": "vector", "q": x[7], "k": 10, "nprobes": K})
    assert found.num_rows == 10


def test_a_compaction_meanwhile_leaves_all_as_it_was(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = grown(write)
    before_commit(
        monkeypatch,
        lambda: lance.dataset(ds.uri).optimize.compact_files(target_rows_per_fragment=9000),
        _merge,
    )
    with pytest.raises(la.CommitConflictError, match="rewritten"):
        la.merge_segments(ds, "vector_idx")
    ds = lance.dataset(ds.uri)
    assert not list((Path(ds.uri) / "_indices").rglob(".lance-artifact-owner"))
    assert la.merge_segments(ds, "vector_idx").num_rows == ROWS + 2 * NEW


def test_another_merge_that_reaches_further_meanwhile(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were not indexed yet are in its segment; ours would take them their index."""
    ds = grown(write)
    append(ds, vectors(NEW, DIM, seed=6), first=20_000)

    def others() -> None:
        la.extend_index(ds.uri, "vector_idx", measure_fit=False)
        la.merge_segments(ds.uri, "vector_idx")
        then.append(folders(ds))

    then: list[set[str]] = []
    before_commit(monkeypatch, others, _merge)
    with pytest.raises(la.CommitConflictError, match=r"changed while .* also covers fragments \[5\]"):
        la.merge_segments(ds, "vector_idx")
    assert list(segments(lance.dataset(ds.uri)).values()) == [set(range(6))]
    # All but ours.
    assert len(then[0] - folders(ds)) == 1 and folders(ds) <= then[0]


def test_stock_goes_on_with_what_comes_out(write: Callable[..., Any]) -> None:
    ds = grown(write)
    la.merge_segments(ds, "vector_idx")
    append(ds, vectors(NEW, DIM, seed=6), first=20_000)
    ds.checkout_latest()
    ds.optimize.optimize_indices(num_indices_to_merge=1)
    ds.optimize.compact_files(target_rows_per_fragment=9000)
    ds.cleanup_old_versions(datetime.timedelta(0))
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0
    check_searches(ds)
    ds.delete("id % 2 = 0")
    la.merge_segments(ds, "vector_idx")
    check_searches(ds)


def test_a_clone_reads_its_segments_where_they_are(write: Callable[..., Any]) -> None:
    ds = grown(write)
    clone = lance.dataset(ds.uri).shallow_clone(f"{ds.uri}-clone", ds.version)
    expected = live(ds, [stored_in(ds, "vector_idx", uuid) for uuid in segments(ds)])
    la.merge_segments(clone, "vector_idx")
    assert stored(clone, "vector_idx") == expected
    check_searches(clone)


def test_segments_of_two_models_are_refused(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM))
    parts = [
        ds.create_index_uncommitted(
            "vector", "IVF_PQ", num_partitions=K, num_sub_vectors=M, max_iters=2, fragment_ids=ids
        )
        for ids in ([0], [1, 2])
    ]
    ds.commit_existing_index_segments("vector_idx", "vector", parts)
    for call in (la.merge_segments, la.extend_index):
        append(ds, vectors(10, DIM))
        with pytest.raises(la.ArtifactMismatchError, match="segments of different models"):
            call(ds, "vector_idx")
