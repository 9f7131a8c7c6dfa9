"""pylance's `create_index` beside ours: every argument, right and wrong, ends the same way, or in a difference that the documentation
states."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import accelerate, column, vectors
from lance_artifact.backends.cpu import CpuBackend

ROWS, DIM = 6000, 16
VECTORS = vectors(ROWS, DIM)
CENTROIDS = VECTORS[:8].copy()
CODEBOOK = vectors(512, 8, seed=4).reshape(2, 256, 8)
SHAPE: dict[str, Any] = {"num_partitions": 4, "num_sub_vectors": 2}
GIVEN: dict[str, Any] = {"num_partitions": 8, "num_sub_vectors": 2, "ivf_centroids": CENTROIDS}
ON: tuple[Any, ...] = ("vector", "IVF_PQ")
STATED = Path(__file__).parent.parent / "docs" / "pylance.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("same")
    values = {
        "vector": column(VECTORS),
        "other": column(VECTORS),
        "id": pa.array(range(ROWS)),
        "lists": pa.array(VECTORS.tolist(), pa.list_(pa.float32())),
        "bytes": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(ROWS * DIM, "i1")), DIM),
        "nulls": pa.FixedSizeListArray.from_arrays(
            pa.array(VECTORS.reshape(-1)), DIM, mask=pa.array([True] * ROWS)
        ),
    }
    lance.write_dataset(pa.table(values), str(folder / "base"), max_rows_per_file=2000)
    lance.write_dataset(pa.table({"vector": column(VECTORS[:200])}), str(folder / "few"))
    lance.write_dataset(pa.table({"vector": column(VECTORS[:0])}), str(folder / "none"))
    np.save(folder / "centroids.npy", CENTROIDS)
    return folder


def boom(_: Any) -> None:
    raise LookupError("stop")


# Name of the call: dataset, positional and named arguments; where ours ends otherwise, the words that docs/pylance.md has for it.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str | None]] = {
    "plain": ("base", ON, SHAPE, None),
    "more partitions than rows make": ("base", ON, {**SHAPE, "num_partitions": ROWS}, None),
    "num_partitions text": ("base", ON, {**SHAPE, "num_partitions": "4"}, None),
    "num_partitions 4.5": ("base", ON, {**SHAPE, "num_partitions": 4.5}, None),
    "num_partitions 4.0": ("base", ON, {**SHAPE, "num_partitions": 4.0}, None),
    "num_partitions 0": ("base", ON, {**SHAPE, "num_partitions": 0}, None),
    "num_partitions -1": ("base", ON, {**SHAPE, "num_partitions": -1}, "OverflowError"),
    "num_partitions True": ("base", ON, {**SHAPE, "num_partitions": True}, "`True` is no number"),
    "num_partitions of numpy": ("base", ON, {**SHAPE, "num_partitions": np.int64(4)}, "numpy's whole numbers"),
    "no num_partitions": ("base", ON, {"num_sub_vectors": 2}, None),
    "no num_partitions, graphs": ("base", ("vector", "IVF_HNSW_PQ"), {"num_sub_vectors": 2}, None),
    "no num_sub_vectors": ("base", ON, {"num_partitions": 4}, "`num_sub_vectors` left out"),
    "num_sub_vectors 0": ("base", ON, {**SHAPE, "num_sub_vectors": 0}, "ZeroDivisionError"),
    "num_sub_vectors 3": ("base", ON, {**SHAPE, "num_sub_vectors": 3}, None),
    "num_sub_vectors text": ("base", ON, {**SHAPE, "num_sub_vectors": "2"}, None),
    "num_sub_vectors 2.0": ("base", ON, {**SHAPE, "num_sub_vectors": 2.0}, "whole floats"),
    "num_bits 5": ("base", ON, {**SHAPE, "num_bits": 5}, None),
    "num_bits 4": ("base", ON, {**SHAPE, "num_bits": 4}, None),
    "num_bits 4, odd": ("base", ON, {"num_partitions": 4, "num_sub_vectors": 1, "num_bits": 4}, None),
    "num_bits text": ("base", ON, {**SHAPE, "num_bits": "8"}, None),
    "empty name": ("base", ON, {**SHAPE, "name": ""}, "An empty `name`"),
    "name 5": ("base", ON, {**SHAPE, "name": 5}, None),
    "two columns": ("base", (["vector", "other"], "IVF_PQ"), SHAPE, None),
    "no column": ("base", ([], "IVF_PQ"), SHAPE, "PanicException"),
    "a list of one column": ("base", (["vector"], "IVF_PQ"), SHAPE, None),
    "a column in another case": ("base", ("VECTOR", "IVF_PQ"), SHAPE, "in another case"),
    "no such column": ("base", ("vecotr", "IVF_PQ"), SHAPE, None),
    "a column of lists": ("base", ("lists", "IVF_PQ"), SHAPE, None),
    "a column of numbers": ("base", ("id", "IVF_PQ"), SHAPE, None),
    "a column of bytes": ("base", ("bytes", "IVF_PQ"), SHAPE, None),
    "column 5": ("base", (5, "IVF_PQ"), SHAPE, None),
    "no fragments": ("base", ON, {**SHAPE, "fragment_ids": []}, "`fragment_ids`"),
    "a fragment": ("base", ON, {**SHAPE, "fragment_ids": [0]}, "`fragment_ids`"),
    "a fragment that is not there": ("base", ON, {**SHAPE, "fragment_ids": [99]}, None),
    "target_partition_size 100": ("base", ON, {"num_sub_vectors": 2, "target_partition_size": 100}, None),
    "target_partition_size 0": ("base", ON, {"num_sub_vectors": 2, "target_partition_size": 0}, "PanicException"),
    "both": ("base", ON, {**SHAPE, "target_partition_size": 100}, None),
    "few rows": ("few", ON, SHAPE, None),
    "few rows, 4 bits": ("few", ON, {**SHAPE, "num_bits": 4}, None),
    "few rows, centroids": ("few", ON, GIVEN, None),
    "few rows, a model": ("few", ON, {**GIVEN, "pq_codebook": CODEBOOK}, None),
    "no rows": ("none", ON, SHAPE, None),
    "nulls only": ("base", ("nulls", "IVF_PQ"), SHAPE, None),
    "train=False": ("base", ON, {**SHAPE, "train": False}, None),
    "a callback that raises": ("base", ON, {**SHAPE, "progress_callback": boom}, None),
    "progress_callback 5": ("base", ON, {**SHAPE, "progress_callback": 5}, None),
    "progress": ("base", ON, {**SHAPE, "progress": boom}, "`progress=`"),
    "metric foo": ("base", ON, {**SHAPE, "metric": "foo"}, None),
    "metric hamming": ("base", ON, {**SHAPE, "metric": "hamming"}, None),
    "metric COSINE": ("base", ON, {**SHAPE, "metric": "COSINE"}, None),
    "metric None": ("base", ON, {**SHAPE, "metric": None}, None),
    "metric euclidean": ("base", ON, {**SHAPE, "metric": "euclidean"}, None),
    "index_type IVF_FOO": ("base", ("vector", "IVF_FOO"), SHAPE, None),
    "index_type ivf_pq": ("base", ("vector", "ivf_pq"), SHAPE, None),
    "index_type IVF_FLAT": ("base", ("vector", "IVF_FLAT"), SHAPE, "`IVF_PQ` and `IVF_HNSW_PQ` only"),
    "index_type None": ("base", ("vector", None), SHAPE, "AttributeError"),
    "sample_rate 1": ("base", ON, {**SHAPE, "sample_rate": 1}, None),
    "sample_rate 0": ("base", ON, {**SHAPE, "sample_rate": 0}, None),
    "sample_rate 2.5": ("base", ON, {**SHAPE, "sample_rate": 2.5}, "`sample_rate=2.5`"),
    "max_iters 0": ("base", ON, {**SHAPE, "max_iters": 0}, None),
    "max_iters 1": ("base", ON, {**SHAPE, "max_iters": 1}, None),
    "max_level": ("base", ("vector", "IVF_HNSW_PQ"), {**SHAPE, "max_level": 4}, None),
    "m": ("base", ("vector", "IVF_HNSW_PQ"), {**SHAPE, "m": 8, "ef_construction": 32}, None),
    "m 0": ("base", ("vector", "IVF_HNSW_PQ"), {**SHAPE, "m": 0}, None),
    "index_file_version": ("base", ON, {**SHAPE, "index_file_version": "V3"}, None),
    "index_file_version Legacy": ("base", ON, {**SHAPE, "index_file_version": "Legacy"}, "`index_file_version`"),
    "skip_transpose": ("base", ON, {**SHAPE, "skip_transpose": True}, None),
    "centroids of float64": ("base", ON, {**GIVEN, "ivf_centroids": CENTROIDS.astype("f8")}, None),
    "centroids of float16": ("base", ON, {**GIVEN, "ivf_centroids": CENTROIDS.astype("f2")}, None),
    "centroids in lists": ("base", ON, {**GIVEN, "ivf_centroids": CENTROIDS.tolist()}, None),
    "centroids of whole numbers": ("base", ON, {**GIVEN, "ivf_centroids": CENTROIDS.astype(int)}, None),
    "centroids in a row": ("base", ON, {**GIVEN, "ivf_centroids": CENTROIDS.reshape(-1)}, None),
    "no centroids": ("base", ON, {"num_sub_vectors": 2, "ivf_centroids": CENTROIDS[:0]}, None),
    "other num_partitions": ("base", ON, {**GIVEN, "num_partitions": 4}, None),
    "centroids of another dimension": ("base", ON, {**GIVEN, "ivf_centroids": CENTROIDS[:, :8].copy()}, None),
    "a model": ("base", ON, {**GIVEN, "pq_codebook": CODEBOOK}, None),
    "a codebook of float64": ("base", ON, {**GIVEN, "pq_codebook": CODEBOOK.astype("f8")}, "codebook of float64"),
    "a codebook alone": ("base", ON, {**SHAPE, "pq_codebook": CODEBOOK}, None),
    "a codebook for another M": ("base", ON, {**GIVEN, "num_sub_vectors": 4, "pq_codebook": CODEBOOK}, None),
    "ivf_centroids_file": ("base", ON, {"num_sub_vectors": 2, "ivf_centroids_file": "file://{root}/centroids.npy"}, None),
    "both centroids": ("base", ON, {**GIVEN, "ivf_centroids_file": "file://{root}/centroids.npy"}, None),
    "index_cache_size": ("base", ON, {**SHAPE, "index_cache_size": 5}, None),
    "shuffle_partition_batches": ("base", ON, {**SHAPE, "shuffle_partition_batches": 5, "shuffle_partition_concurrency": 2}, None),
    "filter_nan": ("base", ON, {**SHAPE, "filter_nan": False}, None),
    "storage_options": ("base", ON, {**SHAPE, "storage_options": {"a": "b"}}, None),
    "index_uuid": ("base", ON, {**SHAPE, "index_uuid": "6a1b1c64-0a12-4c25-8a3a-3f1d2a0c9f11"}, None),
    "index_uuid x": ("base", ON, {**SHAPE, "index_uuid": "x"}, None),
    "streaming_sample_rate": ("base", ON, {**SHAPE, "streaming_sample_rate": 16}, "`streaming_*`"),
    "an argument that is none": ("base", ON, {**SHAPE, "foo": 1}, "An argument that is none"),
    "replace 1": ("base", ON, {**SHAPE, "replace": 1}, None),
    "too many": ("base", (*ON, None, "L2", False, 4, None, None, 2, "cuvs", *([None] * 11)), {}, None),
}  # fmt: skip

# What pylance says, of ours in short: these words of its message are in ours.
GIST = {
    "num_sub_vectors 3": "dimension (16) must be divisible by num_sub_vectors",
    "no such column": "vecotr not found in schema",
    "a column of lists": "Vector column lists must be FixedSizeListArray",
    "a column of bytes": "must have floating value type",
    "metric foo": "Metric foo not supported",
    "metric None": "Metric None not supported",
    "other num_partitions": "Ivf centroids has 8 clusters, but num_partitions=4",
    "a codebook alone": "ivf_centroids must be specified when pq_codebook is provided",
    "both centroids": "ivf_centroids and ivf_centroids_file cannot be provided at the same time",
    "a callback that raises": "stop",
}


def seen(ds: Any) -> list[Any]:
    """What indexes there are, in what a search would notice."""
    found = []
    for index in ds.describe_indices():
        details = {k: v for k, v in index.details.items() if k != "runtime_hints"}
        parts = [
            (s.get("num_partitions"), (s.get("sub_index") or {}).get("num_sub_vectors"))
            for s in ds.stats.index_stats(index.name).get("indices", [])
        ]
        found.append((index.name, index.index_type, index.num_rows_indexed, details, parts))
    return found


def outcome(root: Path, name: str, ours: bool) -> tuple[Any, list[str]]:
    base, args, kwargs, _ = CALLS[name]
    place = root / "run"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(root / base, place)
    ds = lance.dataset(str(place))
    kwargs = {k: v.format(root=root) if isinstance(v, str) else v for k, v in kwargs.items()}
    if ours:
        args, kwargs = (args, kwargs) if "cuvs" in args else (args, {**kwargs, "accelerator": "cuvs"})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            ds.create_index(*args, **kwargs)
        except BaseException as error:
            assert lance.dataset(str(place)).version == 1
            return error, []
    return seen(ds), sorted({w.category.__name__ for w in told})


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate(monkeypatch, CpuBackend())
    monkeypatch.setattr(la, "create_index", la.create_index)
    la.unregister()
    try:
        stock, their_warnings = outcome(root, name, ours=False)
    finally:
        la.register()
    ours, our_warnings = outcome(root, name, ours=True)
    stated = CALLS[name][3]
    if isinstance(stock, BaseException) and isinstance(ours, BaseException):
        same = isinstance(ours, type(stock)) and GIST.get(name, "") in str(ours)
    else:
        same = (stock, their_warnings) == (ours, our_warnings)
    assert same == (stated is None), f"stock: {stock!r} {their_warnings}; ours: {ours!r} {our_warnings}"
    if isinstance(ours, BaseException) and "stop" not in str(ours):
        assert isinstance(ours, la.LanceArtifactError)
    if stated is not None:
        assert stated in STATED.read_text(encoding="utf-8")


def test_the_number_of_partitions(tmp_path: Path) -> None:
    """Rules of pylance, at more rows: 100,000 rows in partitions of 100 are 1,000."""
    array = vectors(100_000, 2)
    ds = lance.write_dataset(pa.table({"vector": column(array)}), str(tmp_path / "d.lance"))
    for options in (
        {"target_partition_size": 100},
        {"target_partition_size": 30_000},
        {},
        {"num_partitions": 300},
        {"num_partitions": 500},
    ):
        planned = la.plan(ds, "vector", num_sub_vectors=2, backend="cpu", calibrate=False, **options)
        ds.create_index(
            "vector", "IVF_PQ", name="stock", num_sub_vectors=2, max_iters=1, replace=True, **options
        )
        la.create_index(
            ds, "vector", name="ours", num_sub_vectors=2, max_iters=1, replace=True, backend="cpu", **options
        )
        found = [ds.stats.index_stats(name)["indices"][0]["num_partitions"] for name in ("stock", "ours")]
        assert found == [planned.num_partitions] * 2, (options, found, planned.num_partitions)


def test_the_builders_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lance.indices import IndicesBuilder

    accelerate(monkeypatch, CpuBackend())
    ds = lance.write_dataset(pa.table({"vector": column(vectors(20_000, DIM))}), str(tmp_path / "d.lance"))
    builder = IndicesBuilder(ds, "vector")
    for options in ({"sample_rate": 100}, {"sample_rate": 256}):
        results = []
        for accelerator in ({}, {"accelerator": "cuvs"}):
            try:
                results.append(
                    len(builder.prepare_global_ivf_pq(None, None, **options, **accelerator)["ivf_centroids"])
                )
            except ValueError as error:
                results.append(str(error))
        assert results[0] == results[1], results


def test_create_then_fill(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A table without rows, an index, then the rows: pylance's optimize_indices trains what we committed."""
    ds = lance.write_dataset(pa.table({"vector": column(VECTORS[:0])}), str(tmp_path / "d.lance"))
    la.create_index(ds, "vector", num_sub_vectors=2, metric="cosine", backend="cpu")
    assert "committed without rows: 0 vectors, and a codebook needs 256" in caplog.text
    assert [(i.name, i.num_rows_indexed) for i in ds.describe_indices()] == [("vector_idx", 0)]
    with pytest.raises(la.IndexExistsError):
        la.create_index(ds, "vector", num_sub_vectors=2, backend="cpu")
    with pytest.raises(la.InvalidInputError, match="has no rows"):
        la.extend_index(ds, "vector_idx", backend="cpu")
    lance.write_dataset(pa.table({"vector": column(VECTORS)}), ds.uri, mode="append")
    ds.checkout_latest()
    ds.optimize.optimize_indices()
    index = next(i for i in ds.describe_indices())
    assert (index.num_rows_indexed, index.details["metric_type"]) == (ROWS, "COSINE")
    # And ours trains it too, in its place, whatever its metric was.
    again = lance.write_dataset(pa.table({"vector": column(VECTORS[:0])}), str(tmp_path / "e.lance"))
    la.create_index(again, "vector", num_sub_vectors=2, metric="cosine", train=False)
    lance.write_dataset(pa.table({"vector": column(VECTORS)}), again.uri, mode="append")
    again.checkout_latest()
    la.create_index(again, "vector", num_sub_vectors=2, replace=True, backend="cpu")
    index = next(i for i in again.describe_indices())
    assert (index.num_rows_indexed, index.details["metric_type"], len(index.segments)) == (ROWS, "L2", 1)


def test_near_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = lance.write_dataset(pa.table({"vector": column(VECTORS)}), str(tmp_path / "d.lance"))
    accelerate(monkeypatch, CpuBackend())
    for call, match in (
        (lambda: ds.create_index(*ON, precomputed_partition_artifact_url="x", **SHAPE), "did you mean 'precomputed_partition_artifact_uri'"),
        (lambda: ds.create_index(*ON, accelerator="CUVS", **SHAPE), "expected 'cuvs'"),
        (lambda: ds.create_index(*ON, accelerator="cuvs", num_partition=4), "did you mean 'num_partitions'"),
        (lambda: la.create_index(ds, "vector", num_partition=4), "did you mean 'num_partitions'"),
        (lambda: la.train(ds, "vector", num_subvectors=4), "did you mean 'num_sub_vectors'"),
        (lambda: la.finalize(ds, "vector", [], replacing=True), "did you mean 'replace'"),
        (lambda: la.create_index(ds, "vecotr"), "did you mean 'vector'"),
        (lambda: la.create_index(ds, "vector", *([None] * 20)), "too many positional"),
        (lambda: la.train(ds), "missing a required argument: 'column'"),
    ):  # fmt: skip
        with pytest.raises(la.LanceArtifactError, match=match):
            call()
    assert ds.latest_version == 1
    lists = lance.write_dataset(
        pa.table({"v": pa.array(VECTORS.tolist(), pa.list_(pa.float32()))}), str(tmp_path / "l.lance")
    )
    with pytest.raises(la.ColumnTypeError, match="alter_columns") as told:
        la.create_index(lists, "v", backend="cpu", **SHAPE)
    advice = str(told.value).split("by ds.")[1].split(", or")[0].replace("DIM", str(DIM))
    eval(f"lists.{advice}", {"lists": lists, "pa": pa})
    la.create_index(lists, "v", backend="cpu", **SHAPE)
    assert lists.describe_indices()[0].num_rows_indexed == ROWS


@pytest.mark.parametrize(
    "what", ["precomputed_partitions_file", "precomputed_shuffle_buffers_path", "foo", "artefact"]
)
def test_other_keywords_stay_pylances(what: str, tmp_path: Path) -> None:
    """What pylance does with a keyword that it knows, or does not know, is its own business."""
    ds = lance.write_dataset(pa.table({"vector": column(VECTORS)}), str(tmp_path / "d.lance"))
    try:
        ds.create_index(*ON, **SHAPE, **{what: str(tmp_path / "none")})
    except Exception as error:
        assert not isinstance(error, la.LanceArtifactError), error


def test_what_an_artifact_says_may_be_left_out(tmp_path: Path) -> None:
    ds = lance.write_dataset(pa.table({"vector": column(VECTORS)}), str(tmp_path / "d.lance"))
    model = la.train(ds, "vector", metric="cosine", backend="cpu", **SHAPE)
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
    ds.create_index("vector", "IVF_PQ", precomputed_partition_artifact_uri=artifact.uri)
    assert ds.describe_indices()[0].details["metric_type"] == "COSINE"
    with pytest.raises(la.ArtifactMismatchError):
        ds.create_index("vector", "IVF_PQ", "other", "L2", precomputed_partition_artifact_uri=artifact.uri)
    with pytest.raises(la.InvalidInputError, match="encoded already"):
        ds.create_index(
            "vector", "IVF_PQ", "other", sample_rate=3, precomputed_partition_artifact_uri=artifact.uri
        )


def test_replace_and_append(tmp_path: Path) -> None:
    ds = lance.write_dataset(
        pa.table({"vector": column(VECTORS)}), str(tmp_path / "d.lance"), max_rows_per_file=2000
    )
    la.create_index(ds, "vector", fragment_ids=[0], backend="cpu", **SHAPE)
    with pytest.raises(la.InvalidInputError, match="append=True"):
        la.create_index(ds, "vector", fragment_ids=[1], replace=True, backend="cpu", **SHAPE)
    with pytest.raises(la.InvalidInputError, match="one of them"):
        la.create_index(ds, "vector", fragment_ids=[1], replace=True, append=True, backend="cpu", **SHAPE)
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    given = {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook, "num_sub_vectors": 2}
    la.create_index(ds, "vector", fragment_ids=[1], append=True, backend="cpu", **given)
    la.extend_index(ds, "vector_idx", backend="cpu")
    assert len(ds.describe_indices()[0].segments) == 3
    # Other K, M and metric: all of it is replaced.
    la.create_index(
        ds, "vector", replace=True, metric="dot", num_partitions=7, num_sub_vectors=4, backend="cpu"
    )
    index = ds.describe_indices()[0]
    assert (len(index.segments), index.details["metric_type"], index.num_rows_indexed) == (1, "DOT", ROWS)


def test_an_old_handle_takes_no_index_away(tmp_path: Path) -> None:
    """Of an earlier version with too few rows: pylance's commit is a conflict, and so is ours."""
    ds = lance.write_dataset(pa.table({"vector": column(VECTORS[:100])}), str(tmp_path / "d.lance"))
    stale = lance.dataset(ds.uri)
    lance.write_dataset(pa.table({"vector": column(VECTORS)}), ds.uri, mode="append")
    ds.checkout_latest()
    la.create_index(ds, "vector", backend="cpu", **SHAPE)
    for options in ({}, {"train": False}):
        with pytest.raises(la.LanceArtifactError):
            la.create_index(
                stale.checkout_version(1), "vector", replace=True, backend="cpu", **SHAPE, **options
            )
    assert lance.dataset(ds.uri).describe_indices()[0].num_rows_indexed == ROWS + 100


@pytest.mark.parametrize("merge", [0, 1])
def test_others_index_what_came_while_it_is_built_anew(merge: int, tmp_path: Path) -> None:
    ds = lance.write_dataset(pa.table({"vector": column(VECTORS)}), str(tmp_path / "d.lance"))
    la.create_index(ds, "vector", backend="cpu", **SHAPE)
    done: list[bool] = []

    def meanwhile(step: Any) -> None:
        if step.stage == "shuffle" and not done:
            done.append(True)
            lance.write_dataset(pa.table({"vector": column(VECTORS[:500])}), ds.uri, mode="append")
            lance.dataset(ds.uri).optimize.optimize_indices(num_indices_to_merge=merge)

    la.create_index(
        ds, "vector", replace=True, backend="cpu", progress=meanwhile, **{**SHAPE, "num_partitions": 7}
    )
    index = ds.describe_indices()[0]
    assert (len(index.segments), index.num_rows_indexed) == (1, ROWS)
    found = ds.to_table(
        nearest={"column": "vector", "q": VECTORS[3], "k": 2, "nprobes": 7, "refine_factor": 50}
    )
    assert found.num_rows == 2


def test_pylances_defaults_beside_an_artifact(tmp_path: Path) -> None:
    ds = lance.write_dataset(pa.table({"vector": column(VECTORS)}), str(tmp_path / "d.lance"))
    model = la.train(ds, "vector", backend="cpu", **SHAPE)
    la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
    ds.create_index(
        "vector",
        "IVF_PQ",
        accelerator=None,
        train=True,
        index_cache_size=None,
        precomputed_partition_artifact_uri=str(tmp_path / "a"),
    )
    assert ds.describe_indices()[0].num_rows_indexed == ROWS


def test_centroids_alone_need_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lance.indices import IndicesBuilder

    accelerate(monkeypatch, CpuBackend())
    ds = lance.write_dataset(pa.table({"vector": column(VECTORS[:200])}), str(tmp_path / "d.lance"))
    made = IndicesBuilder(ds, "vector").train_ivf(4, sample_rate=16, accelerator="cuvs")
    assert len(made.centroids) == 4
