"""What LanceDB itself does, and so what must not be otherwise through us."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, create_autospec

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lancedb.index import IvfPq

import lance_artifact as la
from conftest import accelerate, column, vectors
from lance_artifact import _lancedb_calls, _pylance
from lance_artifact.backends.cpu import CpuBackend

SHAPE: dict[str, Any] = {"num_partitions": 4, "num_sub_vectors": 4}


def rows(count: int = 2000) -> pa.Table:
    return pa.table({"id": pa.array(range(count)), "vector": column(vectors(count, 16))})


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    accelerate(monkeypatch, CpuBackend())
    return lancedb.connect(str(tmp_path / "db")).create_table("t", rows())


COMMITS: dict[str, Callable[[Any, Path], Any]] = {
    "config": lambda t, _: t.create_index("vector", config=IvfPq(accelerator="cuvs", **SHAPE)),
    "legacy": lambda t, _: t.create_index("l2", accelerator="cuvs", **SHAPE),
    "create_index": lambda t, _: la.create_index(t, "vector", name="new", backend="cpu", **SHAPE),
    "without rows": lambda t, _: la.create_index(
        t, "vector", name="new", backend="cpu", train=False, **SHAPE
    ),
    "a run": lambda t, at: la.create_index(
        t, "vector", name="new", backend="cpu", artifact_uri=at / "other", resume=True, **SHAPE
    ),
    "extend_index": lambda t, _: la.extend_index(t, "made_idx", backend="cpu"),
    "merge_segments": lambda t, _: la.merge_segments(t, "made_idx"),
    "finalize": lambda t, at: la.finalize(t, "vector", at / "a", name="new"),
    "resume_run": lambda t, at: la.resume_run(at / "run", t, backend="cpu"),
    "Run.finalize": lambda t, at: la.Run.open(at / "run").finalize(t),
}


def with_all_it_takes(table: Any, at: Path) -> None:
    """An index, an artifact and a run, of a version that is not the latest."""
    la.create_index(table, "vector", name="made_idx", backend="cpu", **SHAPE)
    model = la.train(table, "vector", backend="cpu", **SHAPE)
    la.build_artifact(table, "vector", model, at / "a", backend="cpu")
    la.Run.create(la.plan(table, "vector", name="of_run", backend="cpu", **SHAPE), at / "run")
    table.add(rows(100))


@pytest.mark.parametrize("call", COMMITS)
def test_a_table_at_a_version_of_its_own_is_not_indexed(call: str, table: Any, tmp_path: Path) -> None:
    """LanceDB changes nothing there, and its handle stays where it is."""
    with_all_it_takes(table, tmp_path)
    latest = table.version
    for version in (latest - 1, latest):
        table.checkout(version)
        with pytest.raises(ValueError, match="specific version is checked out"):
            table.create_index("vector", config=IvfPq(**SHAPE))
        with pytest.raises(la.InvalidInputError, match=f"version {version}.*checkout_latest"):
            COMMITS[call](table, tmp_path)
        assert table.version == version
        assert not (tmp_path / "other").exists()
    table.checkout_latest()
    assert table.version == latest
    # What there is to do is done: of one segment there is nothing to merge, and the run is not encoded.
    if call not in ("merge_segments", "Run.finalize"):
        COMMITS[call](table, tmp_path)
        assert table.version > latest


def test_what_only_reads_reads_the_version_that_the_table_is_at(table: Any, tmp_path: Path) -> None:
    with_all_it_takes(table, tmp_path)
    version = table.version - 1
    table.checkout(version)
    model = la.train(table, "vector", backend="cpu", **SHAPE)
    artifact = la.build_artifact(table, "vector", model, tmp_path / "b", backend="cpu")
    assert artifact.num_rows == 2000
    assert la.plan(table, "vector", backend="cpu", **SHAPE).num_rows == 2000
    assert la.evaluate(table, "made_idx", num_queries=5)
    assert la.Run.open(tmp_path / "run").train(table, backend="cpu")
    assert table.version == version
    with pytest.raises(ValueError, match="specific version is checked out"):
        table.delete("true")


def test_tags_branches_and_asynchronous_tables_at_a_version(table: Any, tmp_path: Path) -> None:
    config = IvfPq(accelerator="cuvs", **SHAPE)
    table.add(rows(100))
    table.tags.create("first", 1)
    table.checkout("first")
    with pytest.raises(la.InvalidInputError, match="version 1"):
        table.create_index("vector", config=config)

    async def main() -> None:
        other = await (await lancedb.connect_async(str(tmp_path / "db"))).open_table("t")
        await other.checkout(1)
        with pytest.raises(la.InvalidInputError, match="version 1"):
            await other.create_index("vector", config=config)
        with pytest.raises(la.InvalidInputError, match="version 1"):
            la.create_index(other, "vector", backend="cpu", **SHAPE)
        assert await other.version() == 1
        await other.checkout_latest()
        await other.create_index("vector", config=config)
        assert len(list(await other.list_indices())) == 1

    asyncio.run(main())


def test_a_table_that_is_behind_is_at_no_version_of_its_own(table: Any, tmp_path: Path) -> None:
    """Another handle has written; this one was not told to stay."""
    lancedb.connect(str(tmp_path / "db")).open_table("t").add(rows(100))
    assert table.version == 1
    table.create_index("vector", config=IvfPq(accelerator="cuvs", **SHAPE))
    assert table.version == 3


def test_accelerators_of_others_are_lancedbs_to_judge(table: Any) -> None:
    """Also two of them, which differ."""

    def both() -> None:
        table.create_index("vector", config=IvfPq(accelerator="mps", **SHAPE), accelerator="cuda")

    errors = []
    for switch in (la.unregister, la.register):
        switch()
        with pytest.raises(Exception) as caught:
            both()
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    with pytest.raises(la.InvalidInputError, match="one of them"):
        table.create_index("vector", config=IvfPq(accelerator="mps"), accelerator="cuvs")
    with pytest.raises(la.InvalidInputError, match="one of them"):
        table.create_index("vector", config=IvfPq(accelerator="cuvs"), accelerator="mps")


def said_at(call: Callable[[], Any]) -> list[tuple[str, int]]:
    """Where deprecations are said to come from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [(w.filename, w.lineno) for w in caught if w.category is DeprecationWarning]


def test_a_deprecation_is_said_of_the_line_that_calls(table: Any) -> None:
    """Whoever is warned has to find it, and by default Python shows only those of the program's own lines."""
    line = inspect.currentframe().f_lineno + 2  # type: ignore[union-attr]
    calls: tuple[Callable[[], Any], ...] = (
        lambda: table.create_index("l2", **SHAPE),
        lambda: table.to_lance().create_index("vector", "IVF_PQ", index_cache_size=3, replace=True, **SHAPE),
        lambda: table.to_lance().create_index(
            "vector", "IVF_PQ", index_cache_size=3, replace=True, accelerator="cuvs", **SHAPE
        ),
    )
    found = [said_at(call) for call in calls]
    # What the others committed is not seen by the table's own handle.
    table.checkout_latest()
    la.unregister()
    try:
        stock = [said_at(call) for call in calls[:2]]
    finally:
        la.register()
    assert found[:2] == stock and found[0] == [(__file__, line)]
    assert [where for where, _ in found[2]] == [__file__]


def test_a_deprecation_of_a_coroutine_too() -> None:
    async def create_index(self: Any, column: str) -> str:
        warnings.warn("old", DeprecationWarning, stacklevel=2)
        return column

    wrapped = _lancedb_calls._of_async_table(create_index)

    async def caller() -> None:
        assert await wrapped(None, "c") == "c"

    assert [where for where, _ in said_at(lambda: asyncio.run(caller()))] == [__file__]


def test_coroutine_functions_are_seen_to_be_some() -> None:
    for owner in (lancedb.table.AsyncTable, lancedb.table.LanceTable):
        for name in ("create_index", "create_index_async"):
            function = vars(owner)[name]
            original = _pylance.replaced_by(function)
            assert original is not None
            assert inspect.iscoroutinefunction(function) == inspect.iscoroutinefunction(original), name
    mocked = create_autospec(lancedb.table.AsyncTable, instance=True)
    assert isinstance(mocked.create_index_async, AsyncMock)


def rates(table: Any) -> list[tuple[str | None, ...]]:
    """Of centroids and codebook, as the segments say them."""
    details = [index.details["runtime_hints"] for index in table.to_lance().describe_indices()]
    return [tuple(each.get(f"lance.{of}.sample_rate") for of in ("ivf", "pq")) for each in details]


FORMS: dict[str, Callable[[Any, int], Any]] = {
    "config": lambda t, n: t.create_index("vector", config=IvfPq(accelerator="cuvs", sample_rate=n, **SHAPE)),
    "legacy": lambda t, n: t.create_index("l2", accelerator="cuvs", sample_rate=n, **SHAPE),
}


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("form", FORMS)
def test_sample_rate_is_of_the_centroids(
    form: str, metric: str, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A codebook of few vectors costs recall; LanceDB trains its own on as many as ever."""
    asked: list[tuple[Any, int]] = []

    class Seen(CpuBackend):
        def train(self, sample: Any, params: Any, progress: Any = None) -> Any:
            asked.append((params, len(sample)))
            return super().train(sample, params, progress)

    accelerate(monkeypatch, Seen())
    if form == "config":
        config = IvfPq(sample_rate=2, distance_type=metric, **SHAPE)
        table.create_index("vector", config=config)
        stock = rates(table)
        table.create_index("vector", config=config, accelerator="cuvs")
        assert rates(table) == stock == [("2", "256")]
    else:
        table.create_index(metric, accelerator="cuvs", sample_rate=2, **SHAPE)
        assert rates(table) == [("2", "256")]
    (of_centroids, _), (of_codebook, vectors_) = asked
    assert (of_centroids.sample_rate, of_centroids.ivf_centroids) == (2, None)
    assert of_codebook.sample_rate == 256 and of_codebook.num_sub_vectors == 4 and vectors_ == 2000
    assert len(of_codebook.ivf_centroids) == 4
    del asked[:]
    FORMS[form](table, 256)
    assert [params.sample_rate for params, _ in asked] == [256] and rates(table) == [("256", "256")]
    del asked[:]
    # Ours and pylance's are of both.
    la.create_index(table, "vector", backend=Seen(), replace=True, sample_rate=2, **SHAPE)
    assert [params.sample_rate for params, _ in asked] == [2] and rates(table) == [("2", "2")]


def test_the_rates_are_said_of_later_segments_too(table: Any) -> None:
    FORMS["config"](table, 2)
    table.add(rows(300))
    la.extend_index(table, "vector_idx", backend="cpu")
    assert rates(table) == [("2", "256")]
    la.merge_segments(table, "vector_idx")
    assert rates(table) == [("2", "256")]


def test_a_low_rate_costs_no_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate(monkeypatch, CpuBackend())
    data = vectors(8000, 32)
    table = lancedb.connect(str(tmp_path)).create_table("t", pa.table({"vector": column(data)}))
    shape = {"num_partitions": 4, "num_sub_vectors": 16}

    def errors(rate: int) -> float:
        table.create_index("vector", config=IvfPq(accelerator="cuvs", sample_rate=rate, **shape))
        model = la.IvfPqModel.from_index(table.to_lance(), "vector_idx")
        codebook = np.asarray(model.pq_codebook.flatten()).reshape(16, 256, 2)
        centroids = np.asarray(model.ivf_centroids.flatten()).reshape(4, 32)
        nearest = ((data[:, None] - centroids) ** 2).sum(2).argmin(1)
        parts = (data - centroids[nearest]).reshape(-1, 16, 2)
        lost = sum(((parts[:, m, None] - codebook[m]) ** 2).sum(2).min(1).mean() for m in range(16))
        # Of what the centroids leave, which are worse with fewer vectors, as was asked.
        return float(lost / (parts**2).sum((1, 2)).mean())

    assert errors(1) < 1.1 * errors(256)


def test_where_there_is_one_rate_it_is_the_larger(table: Any) -> None:
    """An index without rows, which is trained when there are vectors: pylance keeps one."""
    for rate, kept in ((2, "256"), (300, "300")):
        config = IvfPq(accelerator="cuvs", sample_rate=rate, **SHAPE)
        table.create_index("vector", config=config, train=False)
        assert rates(table) == [(kept, kept)]


def test_a_table_that_does_not_say_whether_it_is_checked_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that fails, or a release that says it in other words: taken for one that follows, it would be moved."""
    table = lancedb.connect(str(tmp_path)).create_table("t", pa.table({"vector": column(vectors(1000, 16))}))

    def fails(*_: Any) -> None:
        raise RuntimeError("connection reset")

    monkeypatch.setattr(type(table), "drop_index", fails)
    with pytest.raises(la.StorageError, match=r"'t' does not say.*connection reset"):
        la.create_index(table, "vector", num_partitions=4, num_sub_vectors=4, backend="cpu")
    assert table.list_indices() == []
