"""Arguments of wrong types: errors of ours that name the argument, before anything is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lance_artifact as la
from conftest import accelerate, column, leftovers, vectors
from lance_artifact import _build_artifact, _create_index, _finalize
from lance_artifact._checked import CHECKS

K, M, DIM, ROWS = 4, 4, 16, 600
TRAIN: dict[str, Any] = {
    "num_partitions": K,
    "num_sub_vectors": M,
    "sample_rate": 8,
    "max_iters": 2,
    "backend": "cpu",
}


class Hostile:
    """Everything that is asked of it fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no array")

    def __iter__(self) -> Any:
        raise RuntimeError("no iteration")

    __str__ = __repr__


ARRAY = np.arange(6.0).reshape(2, 3)
NOT_TEXT: list[Any] = [3, 1.5, b"name", None, ARRAY, [], {}, object(), True]
BAD_TEXT: list[Any] = ["", "a\0b", "\0", "a\ud800b", "\udcff"]
NOT_WHOLE: list[Any] = [
    "4",
    2.5,
    float("nan"),
    float("inf"),
    True,
    [4],
    ARRAY,
    np.array(4),
    object(),
    4j,
    -1,
    10**30,
    10**400,
    np.bool_(True),
]
NOT_FLAG: list[Any] = [1, 0, "yes", ARRAY, [], object()]
NOT_NUMBERS: list[Any] = [
    3,
    "12",
    b"12",
    [],
    [None],
    [1.5],
    ["1"],
    [-1],
    [2**40],
    [True],
    {0: 1},
    ARRAY,
    object(),
    [[0]],
    10**30,
]
NOT_OPTIONS: list[Any] = [
    3,
    "a=b",
    [("a", "b")],
    {1: "b"},
    {"a": 1},
    {"a": None},
    {"a": True},
    {"": "b"},
    {"a\0": "b"},
    {"a": "\ud800"},
    ARRAY,
]
NOT_MODEL: list[Any] = [3, "model", {}, ARRAY, object()]
NOT_MATRIX: list[Any] = [
    3,
    "x",
    [[1, 2], [3]],
    object(),
    {},
    np.zeros(4),
    np.zeros((2, 0), "f4"),
    np.zeros((K, DIM), "i8"),
    np.array([["a"]]),
    [None],
    Hostile(),
]

WRONG: dict[str, list[Any]] = {
    "column": [*NOT_TEXT, *BAD_TEXT, ["a", "b"], ["\0"], [3]],
    "name": [3, b"name", ARRAY, [], True, object(), *BAD_TEXT],
    "index_type": [*NOT_TEXT, *BAD_TEXT, "IVF_FLAT"],
    "metric": [*NOT_TEXT, *BAD_TEXT],
    "backend": [*NOT_TEXT, *BAD_TEXT],
    "artifact_uri": [3, 1.5, b"uri", ARRAY, [], True, object(), *BAD_TEXT],
    # A float is rounded down, as by pylance.
    "num_partitions": [value for value in NOT_WHOLE if not (isinstance(value, float) and value == 2.5)],
    "num_sub_vectors": NOT_WHOLE,
    "num_bits": [*NOT_WHOLE, None],
    "sample_rate": [*NOT_WHOLE, None],
    "max_iters": [*NOT_WHOLE, None],
    "seed": [*NOT_WHOLE, None],
    "target_partition_size": NOT_WHOLE,
    "m": [*NOT_WHOLE, None],
    "ef_construction": [*NOT_WHOLE, None],
    "max_level": [*NOT_WHOLE, None, 0, 65],
    "memory_limit": NOT_WHOLE,
    "num_buckets": NOT_WHOLE,
    "batch_rows": NOT_WHOLE,
    "replace": [*NOT_FLAG, None],
    "overwrite": [*NOT_FLAG, None],
    "sync": [*NOT_FLAG, None],
    "keep_artifact": NOT_FLAG,
    "append": [*NOT_FLAG, None],
    "train": [*NOT_FLAG, None],
    "skip_transpose": [*NOT_FLAG, None],
    "progress_callback": [1, "yes", ARRAY, [], object(), True],
    "accelerator": [3, 1.5, b"cuvs", ARRAY, [], True, object(), *BAD_TEXT, "cuda", "CUVS"],
    "index_uuid": [3, "x", b"x", ARRAY, [], *BAD_TEXT],
    "ivf_centroids_file": [3, 1.5, ARRAY, [], True, object(), *BAD_TEXT, "/nowhere/at/all.npy"],
    "progress": [1, "yes", ARRAY, [], object()],
    "fragment_ids": NOT_NUMBERS,
    "devices": NOT_NUMBERS,
    "storage_options": NOT_OPTIONS,
    "ivf_centroids": NOT_MATRIX,
    "pq_codebook": NOT_MATRIX,
    "backend_name": [3, b"x", ARRAY, *BAD_TEXT],
}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("wrong")
    table = pa.table({"id": pa.array(range(ROWS)), "vector": column(vectors(ROWS, DIM))})
    ds = lance.write_dataset(table, str(root / "d.lance"), max_rows_per_file=200)
    model = la.train(ds, "vector", **TRAIN)
    artifact = la.build_artifact(ds, "vector", model, root / "a", backend="cpu")
    return {"ds": ds, "model": model, "artifact": artifact, "root": root}


def calls(there: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The public functions and arguments that are right."""
    ds, model = there["ds"], there["model"]
    return {
        "describe_source": (la.describe_source, {"dataset": ds, "column": "vector"}),
        "train": (la.train, {"dataset": ds, "column": "vector", **TRAIN}),
        "build_artifact": (la.build_artifact, {"dataset": ds, "column": "vector", "model": model, "artifact_uri": there["root"] / "b", "backend": "cpu"}),
        "finalize": (la.finalize, {"dataset": ds, "column": "vector", "artifacts": there["artifact"]}),
        "create_index": (la.create_index, {"dataset": ds, "column": "vector", **TRAIN}),
    }  # fmt: skip


FUNCTIONS = ("describe_source", "train", "build_artifact", "finalize", "create_index")


def parameters(name: str) -> set[str]:
    import inspect

    return set(inspect.signature(getattr(la, name)).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_in_the_table(name: str) -> None:
    elsewhere = {"metric", "index_type", "ivf_centroids", "pq_codebook", "pylance"}
    assert parameters(name) <= CHECKS.keys() | elsewhere


def refused(function: Any, arguments: dict[str, Any], what: str, value: Any) -> None:
    with pytest.raises(la.LanceArtifactError) as caught:
        function(**{**arguments, what: value})
    assert type(caught.value) is not la.LanceArtifactError
    assert len(str(caught.value)) < 2000
    if isinstance(caught.value, la.InvalidInputError):
        assert what.split("_")[-1].rstrip("s") in str(caught.value).lower(), (what, str(caught.value))


@pytest.mark.parametrize(("name", "what"), [(n, w) for n in FUNCTIONS for w in WRONG if w in parameters(n)])
def test_wrong_types(name: str, what: str, there: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments = calls(there)[name]
    if what == "ivf_centroids":
        arguments.pop("num_partitions", None)
    if what == "pq_codebook":
        arguments["ivf_centroids"] = there["model"].ivf_centroids
    version = there["ds"].latest_version
    files = leftovers(there["root"])
    for value in WRONG[what]:
        # finalize takes the metric of the artifact where none is named, and create_index the bits of the codebook.
        if not (value is None and (name, what) in (("finalize", "metric"), ("create_index", "num_bits"))):
            refused(function, arguments, what, value)
    assert there["ds"].latest_version == version
    assert leftovers(there["root"]) == files


@pytest.mark.parametrize(
    "value", [3, None, ARRAY, [], object(), b"x", "", "a\0b", "a\ud800b", "/nowhere/at/all.lance"]
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_datasets(
    name: str, value: Any, there: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, arguments = calls(there)[name]
    refused(function, arguments, "dataset", value)


def test_a_missing_dataset_is_what_pylance_raises(tmp_path: Path) -> None:
    missing = tmp_path / "missing.lance"
    with pytest.raises(Exception, match="not found") as stock:
        lance.dataset(str(missing))
    for given_as in (missing, str(missing)):
        with pytest.raises(la.InvalidInputError, match=r"missing\.lance") as ours:
            la.train(given_as, "vector", **TRAIN)
        assert isinstance(ours.value, type(stock.value))
    (tmp_path / "file").write_text("no dataset")
    with pytest.raises(la.LanceArtifactError, match="file"):
        la.create_index(tmp_path / "file", "vector", **TRAIN)


@pytest.mark.parametrize(
    "value",
    [3, None, ARRAY, object(), b"x", "", "a\0b", "a\ud800b", [], [None], [3], [b"x"], ["\0"], {"a": 1}, [[]]],
)
def test_wrong_artifacts(value: Any, there: dict[str, Any]) -> None:
    refused(la.finalize, calls(there)["finalize"][1], "artifacts", value)


@pytest.mark.parametrize("value", [*NOT_MODEL, None])
def test_wrong_models(value: Any, there: dict[str, Any]) -> None:
    refused(la.build_artifact, calls(there)["build_artifact"][1], "model", value)
    if value is not None:
        refused(la.finalize, calls(there)["finalize"][1], "model", value)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("precomputed_partition_artifact_uri", 3), ("precomputed_partition_artifact_uri", ""), ("precomputed_partition_artifact_uri", "a\0b"),
        ("precomputed_partition_artifact_uri", ARRAY), ("column", 3), ("column", ["a", "b"]), ("name", "\0"), ("name", 3), ("metric", 3), ("replace", "yes"),
        ("index_type", 3), ("num_partitions", ARRAY), ("num_partitions", "4"), ("num_sub_vectors", ARRAY), ("num_bits", ARRAY), ("m", "20"), ("ef_construction", ARRAY),
        ("fragment_ids", 3), ("storage_options", 3), ("storage_options", {"a": 1}), ("progress_callback", 3), ("ivf_centroids_file", ARRAY), ("train", ARRAY),
        ("target_partition_size", ARRAY), ("ivf_centroids", 3),
    ],
)  # fmt: skip
def test_pylances_own_call(what: str, value: Any, there: dict[str, Any]) -> None:
    arguments = {
        "column": "vector",
        "index_type": "IVF_PQ",
        "precomputed_partition_artifact_uri": there["artifact"].uri,
    }
    with pytest.raises(la.LanceArtifactError) as caught:
        there["ds"].create_index(**{**arguments, what: value})
    assert type(caught.value) is not la.LanceArtifactError
    assert there["ds"].latest_version == 1


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("num_partitions", ARRAY), ("num_sub_vectors", ARRAY), ("sample_rate", "8"), ("seed", 10**30), ("devices", 3), ("ivf_centroids_file", ARRAY), ("skip_transpose", ARRAY),
        ("name", "\ud800"), ("fragment_ids", 10**30), ("memory_limit", "1"), ("keep_artifact", 1),
    ],
)  # fmt: skip
def test_the_accelerators_call(
    what: str, value: Any, there: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lance_artifact.backends.cpu import CpuBackend

    accelerate(monkeypatch, CpuBackend())
    arguments = {
        "column": "vector",
        "index_type": "IVF_PQ",
        "accelerator": "cuvs",
        "num_partitions": K,
        "num_sub_vectors": M,
    }
    with pytest.raises(la.LanceArtifactError) as caught:
        there["ds"].create_index(**{**arguments, what: value})
    assert type(caught.value) is not la.LanceArtifactError
    assert there["ds"].latest_version == 1


def test_what_is_right_in_another_type_is_taken(
    there: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pylance takes it: numpy's numbers, whole floats, any iterable of fragments."""
    model = la.train(
        Path(there["ds"].uri), ["VECTOR"], metric="L2", num_partitions=np.int64(K), num_sub_vectors=float(M), sample_rate=np.uint8(8),
        max_iters=2, fragment_ids=np.array([0, 1]), backend="cpu", progress=None,
    )  # fmt: skip
    assert model == la.train(there["ds"], "vector", fragment_ids=(i for i in (0, 1)), **TRAIN)
    assert model == la.train(there["ds"], "vector", fragment_ids=pa.array([0, 1]), **TRAIN)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters()), st.binary(), st.just(ARRAY),
    st.lists(st.one_of(st.integers(), st.text(), st.none()), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.text(st.characters(categories=["Cs"]), min_size=1),
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FUNCTIONS), data=st.data())
def test_anything_at_all(
    name: str, data: st.DataObject, there: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is passed: it works, or the error is ours. Nothing is built, so that it is quick."""
    function, arguments = calls(there)[name]
    what = data.draw(st.sampled_from(sorted(parameters(name) - {"artifact_uri", "artifacts", "dataset"})))

    class Built(Exception):
        pass

    def built(*_: Any, **__: Any) -> Any:
        raise Built

    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="num_partitions is float")
        patched.setattr(_build_artifact, "open_builder", built)
        patched.setattr(_finalize.core, "build_segment", built)
        patched.setattr(_create_index, "commit_empty_index", built)
        try:
            function(**{**arguments, what: data.draw(anything)})
        except (la.LanceArtifactError, Built) as error:
            assert type(error) is not la.LanceArtifactError
    assert there["ds"].latest_version == 1


# The extension's own classes

ODD: list[Any] = [-1, 1.5, 10**30, True, "x", "a\0b", "\ud800", b"x", [], {}, [1], np.arange(6.0).reshape(2, 3), object()]  # fmt: skip


def not_a_flag(value: Any) -> Any:
    return 1 if isinstance(value, bool) else value


def constructors(folder: Path) -> dict[str, Callable[[Any], Any]]:
    centroids, codebook = np.zeros((2, 4), "f4"), np.zeros((2, 16, 2), "f4")
    model = la.IvfPqModel(centroids, codebook)
    count = iter(range(10_000))

    def made(**options: Any) -> la.PartitionArtifactBuilder:
        return la.PartitionArtifactBuilder(folder / str(next(count)), **options)

    def shape(**options: Any) -> None:
        made(**{"num_partitions": 2, "pq_code_width": 1, **options}).abort()

    with made(model=model) as builder:
        pass
    artifact = builder.artifact
    return {
        "metric": lambda v: la.IvfPqModel(centroids, codebook, v),
        "ivf_centroids": lambda v: la.IvfPqModel(v, codebook),
        "num_sub_vectors": lambda v: la.IvfPqModel(centroids, codebook, num_sub_vectors=v),
        "num_partitions": lambda v: shape(num_partitions=v),
        "pq_code_width": lambda v: shape(pq_code_width=v),
        "num_buckets": lambda v: shape(num_buckets=v),
        "memory_limit": lambda v: shape(memory_limit=v),
        "rows_seen": lambda v: made(model=model).finish(rows_seen=v),
        "rows_dropped": lambda v: made(model=model).finish(rows_dropped={"reason": v}),
        "rows_dropped itself": lambda v: made(model=model).finish(rows_dropped=[v]),
        "a reason": lambda v: made(model=model).finish(rows_dropped={"\ud800": 1, "x": v}),
        "rows_dropped in all": lambda v: made(model=model).finish(
            rows_dropped={"a": 2**64 - 1, "b": 1, "c": v}
        ),
        "source": lambda v: made(model=model, source={"version": v}),
        "source itself": lambda v: made(model=model, source=v),
        "model": lambda v: made(model=v, num_partitions=None, pq_code_width=None),
        "sync": lambda v: made(model=model, sync=not_a_flag(v)),
        "overwrite": lambda v: made(model=model, overwrite=not_a_flag(v)),
        "sample_rate": lambda v: model.with_training(sample_rate=v),
        "max_iters": lambda v: model.with_training(max_iters=v),
        "target_partition_size": lambda v: model.with_training(target_partition_size=v),
        "encoder": lambda v: la.CpuEncoder(v),
        "partition": lambda v: artifact.read_partition(v),
        "progress": lambda v: artifact.verify(v),
        "append_batch": lambda v: made(model=model).append_batch(v),
        "encode": lambda v: la.CpuEncoder(model).encode(v),
    }


@pytest.mark.parametrize("value", ODD, ids=[ascii(v)[:20] for v in ODD])
def test_the_extensions_own_arguments(value: Any, tmp_path: Path) -> None:
    for name, call in constructors(tmp_path).items():
        with pytest.raises((la.LanceArtifactError, IndexError)) as caught:
            call(value)
        assert str(caught.value), name
    for call in (
        la.Artifact.open,
        lambda v: la.PartitionArtifactBuilder(v, num_partitions=1, pq_code_width=1),
    ):
        if not isinstance(value, str) or value == "\ud800" or "\0" in value:
            # A type that is no path is a TypeError that says so, as everywhere in Python.
            with pytest.raises((la.LanceArtifactError, TypeError)) as caught:
                call(value)
            assert "uri" in str(caught.value)
