"""What LanceDB itself does, and so what must not be otherwise through us."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest
from lancedb.index import IvfPq

import lance_artifact as la
from conftest import accelerate, column, vectors
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
