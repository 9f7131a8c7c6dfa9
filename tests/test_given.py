"""A model of the caller's: what is asked for beside it is what it has, or is refused. Defaults ask for nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import lance_artifact as la
from conftest import accelerate, leftovers, vectors
from lance_artifact import ray as driver
from lance_artifact._uncommitted import create_index_uncommitted
from lance_artifact.backends.cpu import CpuBackend

ROWS, DIM, K, M = 600, 16, 4, 4
OTHERWISE = ({"num_bits": 8}, {"num_partitions": 7}, {"num_sub_vectors": 2})


@pytest.fixture
def ds(write: Callable[..., Any]) -> Any:
    return write(vectors(ROWS, DIM))


@pytest.fixture
def model(ds: Any) -> la.IvfPqModel:
    return la.train(
        ds, "vector", num_partitions=K, num_sub_vectors=M, num_bits=4, sample_rate=8, backend="cpu"
    )


@pytest.fixture
def given(model: la.IvfPqModel) -> dict[str, Any]:
    # An array of three dimensions tells the number of sub-vectors.
    codebook = model.pq_codebook.flatten().to_numpy().reshape(M, 16, DIM // M)
    return {"ivf_centroids": model.ivf_centroids, "pq_codebook": codebook}


def bits(ds: Any, name: str) -> int:
    (found,) = [i for i in ds.describe_indices() if i.name == name]
    return int(found.details["compression"]["num_bits"])


@pytest.mark.parametrize("other", OTHERWISE, ids=lambda other: next(iter(other)))
@pytest.mark.parametrize("door", ["create_index", "run", "pylance", "create_index_uncommitted"])
def test_another_shape_than_the_codebooks_is_refused(
    door: str,
    other: dict[str, Any],
    ds: Any,
    given: dict[str, Any],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerate(monkeypatch, CpuBackend())
    before = leftovers(tmp_path)
    with pytest.raises(la.InvalidInputError) as caught:
        if door == "create_index":
            la.create_index(ds, "vector", backend="cpu", **{**given, **other})
        elif door == "run":
            la.create_index(
                ds,
                "vector",
                backend="cpu",
                resume=True,
                artifact_uri=tmp_path / "run",
                **{**given, **other},
            )
        elif door == "pylance":
            ds.create_index("vector", "IVF_PQ", accelerator="cuvs", **{**given, **other})
        else:
            ds.create_index_uncommitted(
                "vector", "IVF_PQ", accelerator="cuvs", fragment_ids=[0], **{**given, **other}
            )
    ((what, value),) = other.items()
    assert what in str(caught.value) and str(value) in str(caught.value)
    assert leftovers(tmp_path) == before


@pytest.mark.parametrize("other", OTHERWISE, ids=lambda other: next(iter(other)))
def test_another_shape_than_the_models_is_not_planned(
    other: dict[str, Any], ds: Any, model: la.IvfPqModel
) -> None:
    ((what, value),) = other.items()
    with pytest.raises(la.InvalidInputError, match=f"{what}.*{value}"):
        la.plan(ds, "vector", model=model, backend="cpu", calibrate=False, **other)
    if what == "num_partitions":
        with pytest.raises(la.InvalidInputError, match=f"{what}.*{value}"):
            la.plan(ds, "vector", ivf_centroids=model.ivf_centroids, backend="cpu", calibrate=False, **other)


def test_what_is_left_out_is_the_codebooks(
    ds: Any, model: la.IvfPqModel, given: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate(monkeypatch, CpuBackend())
    for name, more in (("plain", {}), ("named", {"num_bits": 4}), ("none", {"num_bits": None})):
        la.create_index(ds, "vector", name=name, backend="cpu", **given, **more)
        assert bits(ds, name) == 4
        made = la.plan(ds, "vector", name="x", model=model, backend="cpu", calibrate=False, **more)
        assert (made.num_bits, made.num_sub_vectors, made.num_partitions) == (4, M, K)
        part = ds.create_index_uncommitted(
            "vector", "IVF_PQ", accelerator="cuvs", fragment_ids=[0], **given, **more
        )
        assert part.fragment_ids == {0}
    # Of a run too, whichever way the same is said.
    run = {"artifact_uri": tmp_path / "run", "resume": True, "name": "run", "backend": "cpu"}
    version = la.create_index(ds, "vector", **run, **given).version
    assert la.create_index(ds, "vector", num_bits=4, **run, **given).version == version
    assert bits(ds, "run") == 4


def test_without_a_codebook_eight_bits_are_the_default(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    la.create_index(ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=8, backend="cpu")
    assert bits(ds, "vector_idx") == 8
    assert la.plan(ds, "vector", name="x", num_sub_vectors=M, backend="cpu", calibrate=False).num_bits == 8
    empty = la.create_index(ds, "vector", name="empty", num_sub_vectors=M, train=False, backend="cpu")
    assert bits(empty, "empty") == 8


@pytest.mark.parametrize(
    "function", [la.create_index, la.plan, create_index_uncommitted, driver.create_index]
)
def test_no_default_is_a_number_of_bits(function: Any) -> None:
    """An 8 that was asked for could not be told from one that was not."""
    assert inspect.signature(function).parameters["num_bits"].default is None
