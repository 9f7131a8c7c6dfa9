"""Functions of pylance and LanceDB that others wrap as well, over ours or under them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from lance.indices import IndicesBuilder

import lance_artifact as la
from commits import ROWS, written
from conftest import accelerate, column, segment, vectors
from lance_artifact import _pylance
from lance_artifact.backends.cpu import CpuBackend

lancedb = pytest.importorskip("lancedb")

from lancedb.index import IvfPq  # noqa: E402

WRAPPED = (
    (lance.LanceDataset, "create_index"),
    (lance.LanceDataset, "create_index_uncommitted"),
    (IndicesBuilder, "prepare_global_ivf_pq"),
    (IndicesBuilder, "train_ivf"),
    (lancedb.table.LanceTable, "create_index"),
    (lancedb.table.AsyncTable, "create_index"),
)
SHAPE: dict[str, Any] = {"num_partitions": 4, "num_sub_vectors": 4}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Each function is pylance's or LanceDB's own between the tests, and ours again after them."""
    la.unregister()
    stock = {each: vars(each[0])[each[1]] for each in WRAPPED}
    la.register()
    yield
    for (owner, name), function in stock.items():
        setattr(owner, name, function)
    la.register()


@pytest.fixture
def ds(tmp_path: Path) -> Any:
    return written(tmp_path / "t.lance", stable=False)


def traced(owner: Any, name: str, calls: list[str]) -> Any:
    """Somebody's wrapper of what is there, as such wrappers are written."""
    wrapped = vars(owner)[name]

    @functools.wraps(wrapped)
    def trace(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return wrapped(self, *args, **kwargs)

    setattr(owner, name, trace)
    return trace


def raised(call: Any) -> BaseException:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(("owner", "name"), WRAPPED, ids=lambda each: getattr(each, "__name__", each))
def test_a_strangers_wrapper_stays(owner: Any, name: str) -> None:
    ours = vars(owner)[name]
    stranger = traced(owner, name, [])
    la.unregister()
    la.unregister()
    assert vars(owner)[name] is stranger
    # Registered again, ours under it is at work again, and none comes on top of it.
    la.register()
    la.register()
    assert vars(owner)[name] is stranger
    # The stranger takes it back: ours can go then.
    setattr(owner, name, ours)
    la.unregister()
    assert vars(owner)[name] is not ours and not hasattr(vars(owner)[name], _pylance.MARK)


def test_a_strangers_wrapper_goes_on_to_what_pylance_does(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate(monkeypatch, CpuBackend())
    builder = IndicesBuilder(ds, "vector")
    asks = (
        lambda: ds.create_index("vector", "IVF_PQ", accelerator="cuvs", **SHAPE),
        lambda: ds.create_index("vector", "IVF_PQ", precomputed_partition_artifact_uri=3, accelerator="gpu"),
        lambda: ds.create_index_uncommitted(
            "vector", "IVF_PQ", accelerator="cuvs", fragment_ids=[0], **SHAPE
        ),
        lambda: builder.prepare_global_ivf_pq(4, 4, accelerator="cuvs", sample_rate=64),
        lambda: builder.train_ivf(4, accelerator="cuvs", sample_rate=64),
    )
    la.unregister()
    stock = [raised(ask) for ask in asks]
    la.register()
    calls: list[str] = []
    for owner, name in WRAPPED[:4]:
        traced(owner, name, calls)
    la.unregister()
    ours = [raised(ask) for ask in asks]
    assert set(calls) == {name for _, name in WRAPPED[:4]}
    before = len(calls)
    assert [(type(e), str(e)) for e in ours] == [(type(e), str(e)) for e in stock]
    ds.create_index("vector", "IVF_PQ", name="by_stock", num_bits=4, **SHAPE)
    assert segment(ds, "by_stock")
    la.register()
    ds.create_index("vector", "IVF_PQ", accelerator="cuvs", sample_rate=8, **SHAPE)
    assert len(calls) == before + 2 and len(ds.describe_indices()) == 2


def test_a_strangers_wrapper_goes_on_to_what_lancedb_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate(monkeypatch, CpuBackend())
    table = lancedb.connect(str(tmp_path)).create_table("t", pa.table({"vector": column(vectors(ROWS, 16))}))
    config = IvfPq(num_partitions=4, num_sub_vectors=4)

    def built_here() -> bool:
        # Releases of LanceDB without the argument refuse it.
        with suppress(TypeError):
            table.create_index("vector", config=config, accelerator="cuvs")
        return any(
            "lance_artifact.backend" in index.details.get("runtime_hints", {})
            for index in table.to_lance().describe_indices()
        )

    calls: list[str] = []
    traced(*WRAPPED[4], calls)
    la.unregister()
    assert not built_here()
    table.create_index("vector", config=config)
    la.register()
    assert built_here() and calls == ["create_index"] * 3


def test_an_index_without_rows_is_pylances_own(ds: Any, tmp_path: Path) -> None:
    """Also where a stranger builds all indexes by this package: it would come back to itself."""
    empty = lance.write_dataset(ds.schema.empty_table(), str(tmp_path / "empty.lance"))
    wrapped = lance.LanceDataset.create_index

    @functools.wraps(wrapped)
    def through_us(self: Any, *args: Any, **kwargs: Any) -> Any:
        return la.create_index(self, *args, backend="cpu", **kwargs)

    lance.LanceDataset.create_index = through_us
    empty.create_index("vector", "IVF_PQ", train=False, **SHAPE)
    assert len(empty.describe_indices()) == 1


def test_an_uncommitted_segment_of_an_artifact_is_not_trained_anew(ds: Any, tmp_path: Path) -> None:
    """pylance takes any keyword there, and would train and encode as if there were no artifact."""
    call = functools.partial(ds.create_index_uncommitted, "vector", "IVF_PQ", fragment_ids=[0], **SHAPE)
    with pytest.raises(la.InvalidInputError, match="build_segment"):
        call(precomputed_partition_artifact_uri=str(tmp_path / "none"))
    with pytest.raises(la.InvalidTypeError, match="did you mean"):
        call(precomputed_partition_artefact_uri=str(tmp_path / "none"), precomputed_artifact_uri="x")
    assert call(precomputed_partition_artifact_uri=None).fragment_ids == {0}


def test_an_uncommitted_segment_is_of_what_was_asked_for(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = la.train(ds, "vector", backend="cpu", **SHAPE)
    given = {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook}
    call = functools.partial(ds.create_index_uncommitted, "vector", "IVF_PQ", fragment_ids=[0], **given)
    accelerate(monkeypatch, CpuBackend())
    for wrong in ({"num_partitions": 7}, {"num_bits": 4}, {"rabitq_model": "junk"}):
        wrong = {"num_sub_vectors": 4, **wrong}
        with pytest.raises((ValueError, RuntimeError)):
            call(**wrong)
        with pytest.raises(la.InvalidInputError, match=list(wrong)[-1]):
            call(accelerator="cuvs", **wrong)
    assert call(accelerator="cuvs", **SHAPE).fragment_ids == {0}
