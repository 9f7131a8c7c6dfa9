"""What `evaluate` says is what searches give."""

from __future__ import annotations

import json
import logging
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, stored, vectors
from lance_artifact import _evaluate, cli
from lance_artifact._dataset import Handle
from lance_artifact._exact import Exact
from test_extend import DIM, ROWS, K, M, append, build


@pytest.mark.parametrize("index_type", ["IVF_PQ", "IVF_HNSW_PQ"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_recall_is_that_of_searches(write: Callable[..., Any], metric: str, index_type: str) -> None:
    array = vectors(ROWS, DIM)
    ds = write(array)
    build(ds, metric=metric, index_type=index_type)
    ds.delete("id % 10 = 0")
    queries = vectors(20, DIM, seed=7)
    found = la.evaluate(ds, "vector_idx", queries, k=5, nprobes=[2, K], refine_factors=[None, 20])
    assert [(s.nprobes, s.refine_factor) for s in found.settings] == [(2, None), (K, None), (2, 20), (K, 20)]
    for setting in found.settings:
        hits = 0
        for query in queries:
            nearest = {"column": "vector", "q": query, "k": 5, "metric": metric}
            exact = ds.to_table(nearest={**nearest, "use_index": False})["id"].to_pylist()
            more = {"nprobes": setting.nprobes} | (
                {"refine_factor": setting.refine_factor} if setting.refine_factor else {}
            )
            hits += len(set(exact) & set(ds.to_table(nearest={**nearest, **more})["id"].to_pylist()))
        assert setting.recall == pytest.approx(hits / 100, abs=0.021)
        assert setting.latency_ms > 0
    assert found.settings[-1].recall > 0.9
    assert found.settings[1].rows_scanned == found.num_rows == ROWS
    assert 0 < found.settings[0].rows_scanned < ROWS


def test_no_row_without_a_direction_is_a_query(write: Callable[..., Any]) -> None:
    """A cosine index does not hold them, and a search with one finds nothing."""
    array = vectors(ROWS, DIM)
    array[: ROWS // 2] = 0
    ds = write(array)
    build(ds, metric="cosine")
    found = la.evaluate(ds, "vector_idx", num_queries=40, k=5, nprobes=[K], refine_factors=[20])
    assert found.settings[0].recall > 0.95


def test_vectors_that_are_large_beside_their_differences(write: Callable[..., Any]) -> None:
    array = (1000 + np.random.default_rng(0).standard_normal((ROWS, DIM)) / 10).astype(np.float32)
    ds = write(array)
    build(ds)
    queries = array[:20] + np.float32(0.01)
    found = la.evaluate(ds, "vector_idx", queries, k=5, nprobes=[K], refine_factors=[200])
    assert found.settings[0].recall > 0.95


def test_rows_that_are_as_near_as_the_last_are_as_good(write: Callable[..., Any]) -> None:
    """Of rows that are equal a search may give any, and it gives others than exact search does."""
    array = vectors(ROWS, DIM)
    array[::3], array[1 : ROWS // 2 : 3] = 3 * array[0], array[1]
    for metric in ("l2", "cosine", "dot"):
        ds = write(array, f"{metric}.lance")
        build(ds, metric=metric)
        queries = array[[0] * 5 + [1] * 5 * (metric != "dot")]
        for asked in (queries, None) if metric != "dot" else (queries,):
            found = la.evaluate(ds, "vector_idx", asked, num_queries=40, nprobes=[K], refine_factors=[20])
            assert found.settings[0].recall > 0.99, (metric, asked is None)


def test_a_tie_of_a_nested_column_whose_rows_are_of_several_lengths(tmp_path: Path) -> None:
    """For cosine they are as near; float32 tells them apart by its roundings."""
    array = vectors(ROWS, DIM)
    array[::2] = array[0] * np.linspace(0.1, 3, ROWS // 2, dtype=np.float32)[:, None]
    inner = pa.StructArray.from_arrays([column(array)], ["in ner"])
    ds = lance.write_dataset(pa.table({"outer": inner}), str(tmp_path / "t.lance"), max_rows_per_file=1000)
    la.create_index(ds, "outer.`in ner`", metric="cosine", num_partitions=K, num_sub_vectors=M, backend="cpu")
    (name,) = (i.name for i in ds.describe_indices())
    found = la.evaluate(ds, name, array[:1], k=100, nprobes=[K], refine_factors=[4])
    assert found.settings[0].recall == 1


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_a_row_that_is_further_away_or_comes_twice_is_no_hit(write: Callable[..., Any], metric: str) -> None:
    array = np.zeros((20, 4), np.float32)
    array[:, 0] = np.linspace(0, 1, 20)[::-1]
    array[3:9] = array[3]
    handle = Handle.of(write(array, max_rows_per_file=100))
    exact = Exact(handle, "vector", metric, handle.fragment_ids(), np.float32([[1, 0, 0, 0]]), 5)
    assert exact.wanted == 5 and exact.rows[0, :3].tolist() == [0, 1, 2]
    for given, hits in (
        ([0, 1, 2, 3, 4], 5),
        ([0, 1, 2, 8, 7], 5),
        # Ties stand in for ties, and for none of those that are nearer.
        ([3, 4, 5, 6, 7], 2),
        ([8, 7, 6, 5, 4], 2),
        ([1, 8, 7, 6, 5], 3),
        ([8, 8, 8, 8, 0], 2),
        ([9, 10, 0, 7, 19], 2),
        ([0, 1, 2, 3, 4, 5, 6, 7], 5),
        ([], 0),
    ):
        assert exact.hits(0, given) == hits, given


def test_a_row_that_is_long_makes_no_ties_of_others(write: Callable[..., Any]) -> None:
    """Of dot, what float32 does not tell is of the row compared, not of the longest."""
    array = np.zeros((20, 4), np.float32)
    array[:, 0] = np.linspace(0, 1, 20)[::-1]
    array[3:9] = array[3]
    array[19] = [-1e9, 0, 0, 0]
    handle = Handle.of(write(array, max_rows_per_file=100))
    exact = Exact(handle, "vector", "dot", handle.fragment_ids(), np.float32([[1, 0, 0, 0]]), 5)
    assert [exact.hits(0, given) for given in ([3, 4, 5, 6, 7], [0, 1, 2, 7, 8])] == [2, 5]


def test_groups_that_are_far_from_each_other(write: Callable[..., Any]) -> None:
    """Beside the way between them float32 would not see the distances within one."""
    random = np.random.default_rng(0)
    array = (random.standard_normal((ROWS, DIM)) / 100).astype(np.float32)
    array[::2] += 3000
    array[::2] = np.round(array[::2])
    array[::2, 0] += np.arange(ROWS // 2) * np.float32(0.01)
    handle = Handle.of(write(array))
    queries = np.concatenate([array[1:41:2], array[2:80:2]])
    exact = Exact(handle, "vector", "l2", handle.fragment_ids(), queries, 5)
    ids = handle.dataset.to_table(columns=["id"], with_row_id=True)["_rowid"].to_numpy()
    for number, query in enumerate(queries.astype(np.float64)):
        away = np.square(array.astype(np.float64) - query).sum(axis=1)
        assert exact.hits(number, ids[np.argsort(away)[:5]]) == 5
        assert max(away[np.isin(ids, exact.rows[number])]) <= np.sort(away)[4] * (1 + 1e-6)


def test_many_queries_keep_within_what_is_said(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = write(vectors(20_000, DIM))
    build(ds, num_partitions=2000, max_iters=1, sample_rate=2)
    monkeypatch.setattr(_evaluate, "_search", lambda *_: (1.0, 0.0))
    queries = vectors(4000, DIM, seed=3)
    tracemalloc.start()
    try:
        la.evaluate(ds, "vector_idx", queries, nprobes=[1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (160 << 20) + queries.size * 16 + len(queries) * 10 * 40


def test_rows_of_the_table_as_queries(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    append(ds, vectors(500, DIM, seed=1))
    la.extend_index(ds, "vector_idx", measure_fit=False)
    seen: list[Any] = []
    found = la.evaluate(ds, "vector_idx", num_queries=30, target_recall=0.9, progress=seen.append)
    assert (found.num_queries, found.num_segments, found.num_rows) == (30, 2, ROWS + 500)
    assert {p.stage for p in seen} == {"exact", "search"}
    by_factor = [s.recall for s in found.settings if s.refine_factor == 16]
    assert by_factor == sorted(by_factor) and by_factor[-1] > 0.95
    cheapest = found.cheapest(0.9)
    assert cheapest is not None and cheapest.recall >= 0.9 and found.cheapest(1.1) is None
    content = json.loads(found.to_json())
    assert content["cheapest"]["nprobes"] == cheapest.nprobes and len(content["settings"]) == len(
        found.settings
    )
    text = str(found)
    assert f"nprobes={cheapest.nprobes}" in text and "coefficient of variation" in text
    sizes = (
        [len(p) for p in stored(ds, "vector_idx")] if len(ds.describe_indices()[0].segments) == 1 else None
    )
    assert sizes is None and found.skew >= 1


def test_what_cannot_be_evaluated(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    for arguments, options, match in (
        (["none"], {}, "'none' does not exist"),
        (["vector_idx", np.zeros((3, 4))], {}, r"queries: got shape \(3, 4\)"),
        (["vector_idx", np.full((3, DIM), np.nan)], {}, "queries: got NaN"),
        (["vector_idx"], {"target_recall": 2.0}, "target_recall: got 2.0"),
        (["vector_idx"], {"nprobes": [0]}, "at least 1"),
        (["vector_idx"], {"k": 0}, "k: got 0"),
    ):
        with pytest.raises(la.InvalidInputError, match=match):
            la.evaluate(ds, *arguments, **options)
    build(ds, name="other")
    with pytest.raises(la.InvalidInputError, match=r"has other indexes too, \['other'\]"):
        la.evaluate(ds, "vector_idx")


def test_a_build_that_looks_at_what_it_made(
    write: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    ds = write(vectors(ROWS, DIM))
    with caplog.at_level(logging.INFO, "lance_artifact"):
        build(ds, verify=True)
    assert "with every partition probed" in caplog.text
    # Of rows that are equal any is right.
    same = vectors(ROWS, DIM)
    same[::2] = same[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build(write(same, "same.lance"), verify=True)
    monkeypatch.setattr(_evaluate, "SOUND", 1.1)
    with pytest.warns(UserWarning, match="its codes say little of the vectors"):
        build(ds, replace=True, verify=True, artifact_uri=tmp_path / "run", resume=True)


def test_the_command(write: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds)
    picture = tmp_path / "recall.png"
    command = [
        "evaluate",
        ds.uri,
        "vector_idx",
        "--num-queries",
        "20",
        "--target-recall",
        "0.9",
        "--plot",
        str(picture),
    ]
    assert cli.main(command) == 0
    assert "for a recall of 0.9: nprobes=" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cheapest"]["recall"] >= 0.9
    assert cli.main([*command[:-1], str(tmp_path / "recall.xyz")]) == 2
