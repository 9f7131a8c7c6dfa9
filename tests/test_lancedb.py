"""LanceDB as its users call it: sync and async tables, every form of create_index, recipes of the documentation."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lancedb.index import HnswPq, IvfFlat, IvfPq

import lance_artifact as la
from conftest import accelerate, column, vectors
from lance_artifact import _lancedb, _lancedb_calls
from lance_artifact.backends.cpu import CpuBackend

ROWS, DIM, K, M = 2000, 16, 4, 2
DATA = vectors(ROWS, DIM)
SHAPE: dict[str, Any] = {"num_partitions": K, "num_sub_vectors": M}


@dataclass
class IvfPqOfALaterRelease(IvfPq):
    rotation: str = "none"


# By the name of the class it is known what it configures.
Turned = IvfPqOfALaterRelease
Turned.__name__ = "IvfPq"


def rows() -> pa.Table:
    return pa.table({"id": pa.array(range(ROWS)), "vector": column(DATA)})


@pytest.fixture
def table(tmp_path: Path) -> Any:
    return lancedb.connect(str(tmp_path / "db")).create_table("t", rows())


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def indexes(table: Any) -> list[tuple[str, str]]:
    """As the table's own handle sees them, which nobody has refreshed."""
    return [(index.name, index.index_type) for index in table.list_indices()]


def uses_the_index(table: Any) -> None:
    plan = table.search(DATA[7]).limit(5).nprobes(K).refine_factor(20).explain_plan(verbose=True)
    assert "ANN" in plan, plan
    assert table.search(DATA[7]).limit(5).nprobes(K).refine_factor(20).to_list()[0]["id"] == 7


def test_the_tables_own_handle_sees_the_index(table: Any, tmp_path: Path) -> None:
    la.create_index(table, "vector", backend="cpu", **SHAPE)
    assert indexes(table) == [("vector_idx", "IvfPq")]
    uses_the_index(table)
    model = la.train(table, "vector", backend="cpu", **SHAPE)
    artifact = la.build_artifact(table, "vector", model, tmp_path / "a", backend="cpu")
    la.finalize(table, "vector", artifact, name="second")
    assert len(indexes(table)) == 2
    table.add(rows().slice(0, 100))
    assert la.extend_index(table, "vector_idx").num_rows == 100
    assert table.index_stats("vector_idx").num_unindexed_rows == 0
    la.merge_segments(table, "vector_idx")
    assert table.index_stats("vector_idx").num_indices == 1
    la.create_index(
        table, "vector", backend="cpu", artifact_uri=tmp_path / "run", resume=True, name="third", **SHAPE
    )
    assert len(indexes(table)) == 3


FORMS: dict[str, tuple[Callable[[Any], Any], tuple[str, str]]] = {
    "config with accelerator": (
        lambda t: t.create_index(
            "vector", config=IvfPq(accelerator="cuvs", distance_type="cosine", **SHAPE), name="mine"
        ),
        ("mine", "IvfPq"),
    ),
    "accelerator beside config": (
        lambda t: t.create_index("vector", config=IvfPq(**SHAPE), accelerator="cuvs"),
        ("vector_idx", "IvfPq"),
    ),
    "hnsw": (
        lambda t: t.create_index(
            "vector", config=HnswPq(accelerator="cuvs", m=8, ef_construction=40, **SHAPE)
        ),
        ("vector_idx", "IvfHnswPq"),
    ),
    "legacy": (
        lambda t: t.create_index("l2", accelerator="cuvs", **SHAPE),
        ("vector_idx", "IvfPq"),
    ),
    "legacy, by position": (
        lambda t: t.create_index("cosine", K, M, "vector", True, "cuvs"),
        ("vector_idx", "IvfPq"),
    ),
    "nothing said": (
        lambda t: t.create_index("vector", config=IvfPq(accelerator="cuvs")),
        ("vector_idx", "IvfPq"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reaches_us(form: str, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call, expected = FORMS[form]
    with pytest.raises(la.BackendUnavailableError, match="cannot run here"):
        call(table)
    built: list[Any] = []

    class Seen(CpuBackend):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            built.append(args[1])
            return super().train(*args, **kwargs)

    accelerate(monkeypatch, Seen())
    assert call(table) is None
    assert indexes(table) == [expected] and len(built) == 1
    call(table)  # LanceDB replaces by default
    assert indexes(table) == [expected]
    table.create_index("vector", config=IvfPq(**SHAPE))
    table.create_index("l2", **SHAPE)
    assert len(built) == 2, "other calls stay LanceDB's"


def test_arguments_arrive(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those too that LanceDB itself does not pass on to pylance."""
    from lance_artifact import _lancedb_calls

    seen: dict[str, Any] = {}
    monkeypatch.setattr(_lancedb_calls, "create_index", lambda table, **given: seen.update(given))
    table.create_index(
        "vector",
        config=IvfPq(
            accelerator="cuvs",
            distance_type="dot",
            num_bits=4,
            max_iterations=7,
            sample_rate=33,
            target_partition_size=99,
        ),
        replace=False,
        name="n",
        train=False,
    )
    assert seen == {
        "column": "vector",
        "index_type": "IVF_PQ",
        "name": "n",
        "metric": "dot",
        "replace": False,
        "train": False,
        "accelerator": "cuvs",
        "num_bits": 4,
        "max_iters": 7,
        "sample_rate": 33,
        "target_partition_size": 99,
    }


@pytest.mark.parametrize("config", [IvfPq, HnswPq])
def test_each_field_of_a_configuration_is_carried_out_or_refused(
    config: type, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(_lancedb_calls, "create_index", lambda _, **given: asked.append(given))
    table.create_index("vector", config=config(accelerator="cuvs"))
    for field in fields(config):
        if field.name == "accelerator":
            continue
        other = "cosine" if field.name == "distance_type" else (field.default or 0) + 1
        table.create_index("vector", config=config(accelerator="cuvs", **{field.name: other}))
        assert asked[-1] != asked[0] and other in asked[-1].values(), field.name


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda t: t.create_index("vector", config=IvfFlat(), accelerator="cuvs"), "IvfFlat"),
        (lambda t: t.create_index("vector", accelerator="cuvs", **SHAPE), "first argument is the metric"),
        (lambda t: t.create_index("vector", config=IvfPq(accelerator="CUVS")), "expected 'cuvs'"),
        (
            lambda t: t.create_index("vector", config=IvfPq(accelerator="cuvs"), accelerator="cuda"),
            "one of them",
        ),
        (lambda t: t.create_index_async("vector", config=IvfPq(accelerator="cuvs")), "call create_index"),
        (lambda t: t.create_index("nope", config=IvfPq(accelerator="cuvs")), r"\['vector'\]"),
        # LanceDB would take no notice of what is beside the configuration.
        (
            lambda t: t.create_index(
                "vector", config=IvfPq(accelerator="cuvs"), num_partitions=2, num_bits=4
            ),
            "num_bits, num_partitions: not beside config",
        ),
        (
            lambda t: t.create_index("vector", config=Turned(accelerator="cuvs", rotation="opq")),
            "rotation='opq'",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    call: Callable[[Any], Any], match: str, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate(monkeypatch, CpuBackend())
    with pytest.raises(la.LanceArtifactError, match=match):
        call(table)
    assert indexes(table) == []


def test_remote_tables_and_tables_in_memory() -> None:
    from lancedb.remote.table import RemoteTable

    remote = object.__new__(RemoteTable)
    with pytest.raises(la.UnsupportedError, match="built by its server"):
        remote.create_index("vector", config=IvfPq(accelerator="cuvs"))
    with pytest.raises(la.UnsupportedError, match="built by its server"):
        remote.create_index("l2", accelerator="cuvs")
    with pytest.raises(la.UnsupportedError, match="remote table"):
        la.create_index(remote, "vector")
    memory = lancedb.connect("memory://").create_table("m", rows())
    with pytest.raises(la.UnsupportedError, match="in memory"):
        la.create_index(memory, "vector", backend="cpu", **SHAPE)


def test_asynchronous_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate(monkeypatch, CpuBackend())

    async def main() -> None:
        db = await lancedb.connect_async(str(tmp_path / "db"))

        async def seen(table: Any) -> list[tuple[str, str]]:
            return [(index.name, index.index_type) for index in await table.list_indices()]

        first = await db.create_table("first", rows())
        await first.create_index("vector", config=IvfPq(accelerator="cuvs", **SHAPE), name="mine")
        assert await seen(first) == [("mine", "IvfPq")]
        second = await db.create_table("second", rows())
        await second.create_index("vector", config=IvfPq(**SHAPE), accelerator="cuvs")
        assert await seen(second) == [("vector_idx", "IvfPq")]
        with pytest.raises(la.UnsupportedError, match="call create_index"):
            await second.create_index_async("vector", config=IvfPq(accelerator="cuvs"))
        third = await db.create_table("third", rows())
        await la.in_thread(la.create_index, third, "vector", backend="cpu", **SHAPE)
        assert await seen(third) == [("vector_idx", "IvfPq")]
        la.create_index(third, "vector", backend="cpu", name="blocking", **SHAPE)
        assert len(await seen(third)) == 2
        found = await (await third.search(DATA[3])).limit(1).nprobes(K).refine_factor(20).to_list()
        assert found[0]["id"] == 3
        await third.create_index("vector", config=IvfPq(**SHAPE), name="stock")
        assert len(await seen(third)) == 3

    asyncio.run(main())


def test_a_cancelled_task_leaves_nothing(tmp_path: Path) -> None:
    started = threading.Event()

    async def main() -> Any:
        db = await lancedb.connect_async(str(tmp_path / "db"))
        table = await db.create_table("t", rows())

        def progress(step: Any) -> None:
            started.set()
            # Slow enough to be cancelled on the way.
            threading.Event().wait(0.02)

        task = asyncio.ensure_future(
            la.in_thread(
                la.create_index, table, "vector", backend="cpu", artifact_uri=tmp_path / "a", progress=progress,
                num_partitions=64, num_sub_vectors=DIM, sample_rate=20, max_iters=500,
            )
        )  # fmt: skip
        while not started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await table.list_indices()

    assert list(asyncio.run(main())) == []
    assert not (tmp_path / "a").exists() or not any((tmp_path / "a").iterdir())


@pytest.mark.parametrize("first", ["lancedb", "lance_artifact"])
def test_whichever_is_imported_first(first: str, tmp_path: Path) -> None:
    """And neither imports the other."""
    lancedb.connect(str(tmp_path)).create_table("t", rows())
    script = f"""
import sys
import {first}
if "{first}" == "lance_artifact":
    assert "lancedb" not in sys.modules
import lancedb, lance_artifact as la
from lancedb.index import IvfPq
table = lancedb.connect({str(tmp_path)!r}).open_table("t")
for registered in (True, False, True):
    (la.register if registered else la.unregister)()
    try:
        table.create_index("vector", config=IvfPq(), accelerator="cuvs")
    except la.BackendUnavailableError:
        assert registered
    except TypeError as error:
        assert not registered, error
    else:
        assert not registered
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_a_table_and_a_path_are_opened_with_storage_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = lance.write_dataset(rows(), str(tmp_path / "d.lance"))
    opened: list[Any] = []
    real = lance.dataset
    monkeypatch.setattr(
        lance, "dataset", lambda uri, **k: (opened.append(k.get("storage_options")), real(uri, **k))[1]
    )
    la.create_index(str(ds.uri), "vector", backend="cpu", storage_options={"allow_http": "true"}, **SHAPE)
    la.create_index(
        ds.uri,
        "vector",
        backend="cpu",
        replace=True,
        storage_options=lambda: {"allow_http": "false"},
        **SHAPE,
    )
    assert opened[0] == {"allow_http": "true"} and {"allow_http": "false"} in opened
    assert np.isfinite(ds.version)


@pytest.mark.parametrize(
    ("dimension", "num_bits", "expected"), [(16, 8, 1), (24, 8, 3), (24, 4, 4), (32, 4, 2), (40, 4, 8)]
)
def test_the_default_sub_vectors_are_lancedbs(
    dimension: int, num_bits: int, expected: int, tmp_path: Path
) -> None:
    table = lancedb.connect(str(tmp_path)).create_table(
        "t", pa.table({"vector": column(vectors(600, dimension))})
    )
    la.create_index(table, "vector", num_partitions=2, num_bits=num_bits, backend="cpu")
    ours = table.to_lance().describe_indices()[0].details["compression"]
    assert ours == {"type": "pq", "num_bits": num_bits, "num_sub_vectors": expected}
    if dimension == 40:
        with pytest.raises(ValueError, match="must divide"):
            table.create_index("vector", config=IvfPq(num_partitions=2, num_bits=num_bits))
        return
    table.create_index("vector", config=IvfPq(num_partitions=2, num_bits=num_bits))
    assert table.to_lance().describe_indices()[0].details["compression"] == ours


@pytest.mark.parametrize("managed", [True, False])
def test_a_namespace_that_manages_versions(
    managed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that is committed beside it would be none that it knows."""
    accelerate(monkeypatch, CpuBackend())
    options = {"root": str(tmp_path), "manifest_enabled": "true"}
    if managed:
        options["table_version_tracking_enabled"] = "true"
    table = lancedb.connect_namespace("dir", options).create_table("t", rows(), namespace_path=[])
    config = IvfPq(accelerator="cuvs", **SHAPE)

    async def asynchronous() -> None:
        opened = await lancedb.connect_namespace_async("dir", options).open_table("t")
        await opened.create_index("vector", config=config)

    if managed:
        with pytest.raises(la.InvalidInputError, match="namespace manages the versions"):
            table.create_index("vector", config=config)
    with pytest.raises(la.UnsupportedError, match="asynchronous table of a namespace"):
        asyncio.run(asynchronous())
    assert lance.dataset(table.to_lance().uri).version == 1
    if not managed:
        table.create_index("vector", config=config)
        assert indexes(table)


def test_a_namespace_of_the_callers_says_whether_it_manages_versions() -> None:
    class Client:
        def __init__(self, said: Any) -> None:
            self.said = said

        def describe_table(self, request: Any) -> Any:
            assert request.id == ["a", "t"]
            if isinstance(self.said, Exception):
                raise self.said
            return SimpleNamespace(managed_versioning=self.said)

    class Opened:
        name, _namespace_path = "t", ["a"]

        def __init__(self, said: Any) -> None:
            self._namespace_client = Client(said)

        async def to_lance(self) -> None: ...

        async def checkout_latest(self) -> None: ...

    assert _lancedb.table_of(Opened(None)) and _lancedb.table_of(Opened(False))
    with pytest.raises(la.InvalidInputError, match="manages the versions"):
        _lancedb.table_of(Opened(True))
    with pytest.raises(la.StorageError, match="no answer"):
        _lancedb.table_of(Opened(ValueError("no answer")))
