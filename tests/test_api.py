"""The Python API: pylance's arguments and errors, backends of others, progress, the CLI."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from lance.indices import IndicesBuilder
from lance.progress import IndexProgress

import lance_artifact as la
from conftest import accelerate, command_line, differences, leftovers, stored, vectors
from lance_artifact import cli

K, M, DIM, ROWS = 8, 4, 16, 3000
BUILD: dict[str, Any] = {
    "num_partitions": K,
    "num_sub_vectors": M,
    "sample_rate": 8,
    "max_iters": 3,
    "backend": "cpu",
}


@pytest.fixture
def ds(write: Any) -> Any:
    return write(vectors(ROWS, DIM))


def test_import_is_quick_and_quiet() -> None:
    script = """
import lance, threading, time, socket
socket.socket.connect = None
before, started = threading.active_count(), time.process_time()
threads = len(__import__("os").listdir("/proc/self/task")) if __import__("sys").platform == "linux" else 0
import lance_artifact
assert time.process_time() - started < 0.5, time.process_time() - started
assert threading.active_count() == before
assert not threads or len(__import__("os").listdir("/proc/self/task")) == threads
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_training_is_reproducible(ds: Any) -> None:
    train = dict(BUILD)
    first = la.train(ds, "vector", seed=3, **train)
    assert la.train(ds, "vector", seed=3, **train) == first
    assert la.train(ds, "vector", seed=4, **train) != first
    assert la.train(lance.dataset(ds.uri), "VECTOR", seed=3, **train) == first


def test_what_would_fail_after_training_fails_before_it(
    ds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lance_artifact import _create_index

    with la.PartitionArtifactBuilder(tmp_path / "there", num_partitions=1, pq_code_width=1):
        pass
    monkeypatch.setattr(_create_index, "train_handle", None)
    for wrong in (
        {"artifact_uri": tmp_path / "there"},
        {"memory_limit": 1000},
        # Enough for one partition, and not for as many as there are centroids, or rows make.
        {"memory_limit": 450_000, "num_partitions": None, "ivf_centroids": vectors(1000, DIM)},
        {"memory_limit": 450_000, "num_partitions": None, "target_partition_size": 3},
        {"index_type": "IVF_HNSW_PQ", "m": 2},
    ):
        with pytest.raises(la.LanceArtifactError):
            la.create_index(ds, "vector", **{**BUILD, **wrong})


def test_many_cores(ds: Any) -> None:
    script = "import lance, sys, lance_artifact as la; la.create_index(lance.dataset(sys.argv[1]), 'vector', num_partitions=4, num_sub_vectors=4, sample_rate=8, max_iters=2, backend='cpu')"
    import os

    subprocess.run(
        [sys.executable, "-c", script, ds.uri], check=True, env={**os.environ, "LANCE_CPU_THREADS": "192"}
    )


def test_given_centroids_and_codebook(ds: Any) -> None:
    model = la.train(ds, "vector", **BUILD)
    arrays = {
        "fixed size lists": (model.ivf_centroids, model.pq_codebook),
        "numpy": (np.array(model.ivf_centroids.flatten()).reshape(K, DIM), np.array(model.pq_codebook.flatten()).reshape(M, 256, -1)),
        "tensors": (pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(model.ivf_centroids.flatten()).reshape(K, DIM)), model.pq_codebook),
    }  # fmt: skip
    for name, (centroids, codebook) in arrays.items():
        la.create_index(
            ds,
            "vector",
            name=name,
            num_sub_vectors=M,
            ivf_centroids=centroids,
            pq_codebook=codebook,
            backend="cpu",
        )
        assert differences(stored(ds, name), stored(ds, "fixed size lists")) == (K, 0, 0)
    retrained = la.train(
        ds, "vector", num_sub_vectors=M, ivf_centroids=model.ivf_centroids, sample_rate=8, backend="cpu"
    )
    assert retrained.ivf_centroids == model.ivf_centroids and retrained != model


@pytest.mark.parametrize(
    ("change", "error", "builtin", "message"),
    [
        ({"column": "nope"}, la.ColumnNotFoundError, KeyError, "not found in schema"),
        ({"column": "id"}, la.ColumnTypeError, TypeError, "Vector column"),
        ({"metric": "hamming"}, la.InvalidInputError, ValueError, "not supported"),
        ({"index_type": "IVF_FLAT"}, la.UnsupportedError, NotImplementedError, "index_type"),
        ({"num_sub_vectors": 3}, la.InvalidInputError, ValueError, "divisible"),
        ({"num_bits": 5}, la.UnsupportedError, RuntimeError, "num_bits"),
        ({"num_partitions": 0}, la.InvalidInputError, ValueError, "num_partitions"),
        ({"num_partitions": "4"}, la.InvalidTypeError, TypeError, "whole"),
        ({"sample_rate": 0}, la.InvalidInputError, ValueError, "sample_rate"),
        ({"max_iters": 0}, la.InvalidInputError, ValueError, "max_iters"),
        ({"fragment_ids": []}, la.InvalidInputError, ValueError, "fragment_ids"),
        ({"fragment_ids": [77]}, la.InvalidInputError, ValueError, "77"),
        ({"backend": "nope"}, la.InvalidInputError, ValueError, "backend"),
        ({"backend": "cuvs"}, la.BackendUnavailableError, RuntimeError, "package"),
        ({"backend": object()}, la.InvalidInputError, ValueError, "backend"),
        (
            {"pq_codebook": np.zeros((M, 256, 4), "f4")},
            la.InvalidInputError,
            ValueError,
            "ivf_centroids must be",
        ),
        ({"keep_artifact": True}, la.InvalidInputError, ValueError, "artifact_uri"),
        ({"memory_limit": 10}, la.InvalidInputError, ValueError, "memory_limit"),
        ({"dataset": 3}, la.InvalidInputError, ValueError, "LanceDataset"),
    ],
)
def test_errors(
    change: dict[str, Any], error: type[Exception], builtin: type[Exception], message: str, ds: Any
) -> None:
    arguments = {"dataset": ds, "column": "vector", **BUILD, **change}
    with pytest.raises(error, match=message) as caught:
        la.create_index(arguments.pop("dataset"), arguments.pop("column"), **arguments)
    assert isinstance(caught.value, builtin) and isinstance(caught.value, la.LanceArtifactError)
    assert ds.describe_indices() == []


def test_the_artifact_is_kept_where_asked(ds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    la.create_index(ds, "vector", name="a", **BUILD)
    assert leftovers(tmp_path / "temporary") == []
    la.create_index(ds, "vector", name="b", artifact_uri=tmp_path / "kept", **BUILD)
    assert la.Artifact.open(str(tmp_path / "kept")).verify().ok
    la.create_index(ds, "vector", name="c", artifact_uri=tmp_path / "gone", keep_artifact=False, **BUILD)
    assert leftovers(tmp_path / "gone") == []
    with pytest.raises(la.ArtifactExistsError):
        la.create_index(ds, "vector", name="d", artifact_uri=tmp_path / "kept", **BUILD)


class Flat:
    """A backend of somebody else, in numpy."""

    name = "flat"

    def __init__(self, **broken: Any) -> None:
        self.broken = broken

    def availability(self) -> la.Availability:
        return la.Availability(True)

    def train(self, sample: Any, params: la.TrainParams, progress: Any = None) -> la.IvfPqModel:
        array = np.array(sample.flatten()).reshape(len(sample), -1)
        codebook = (
            array[: 2**params.num_bits]
            .reshape(2**params.num_bits, params.num_sub_vectors, -1)
            .transpose(1, 0, 2)
        )
        return la.IvfPqModel(
            array[: params.num_partitions + self.broken.get("extra", 0)],
            np.ascontiguousarray(codebook),
            params.metric,
        )

    def encoder(self, model: la.IvfPqModel) -> Any:
        oracle, broken = la.CpuEncoder(model), self.broken

        class Encode:
            def encode(self, batch: Any) -> tuple[Any, Any]:
                part, code = oracle.encode(batch)
                if broken.get("raises"):
                    raise ZeroDivisionError
                codes = np.array(code.flatten()).reshape(len(code), -1)
                return np.array(part).astype(broken.get("dtype", "uint32")), codes[
                    :, : broken.get("width", 99)
                ]

        return Encode()


def test_a_backend_of_somebody_else(ds: Any) -> None:
    assert isinstance(Flat(), la.Backend)
    arguments = {**BUILD, "backend": Flat()}
    la.create_index(ds, "vector", name="flat", **arguments)
    model = la.train(ds, "vector", **arguments)
    la.create_index(
        ds,
        "vector",
        name="cpu",
        num_sub_vectors=M,
        ivf_centroids=model.ivf_centroids,
        pq_codebook=model.pq_codebook,
        backend="cpu",
    )
    assert differences(stored(ds, "flat"), stored(ds, "cpu")) == (K, 0, 0)


def test_a_last_batch_of_nothing_but_nulls(write: Any) -> None:
    mask = np.arange(9000) >= 3000
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors(9000, DIM).reshape(-1)), DIM, mask=pa.array(mask)
    )
    ds = write(values)
    la.create_index(ds, "vector", **{**BUILD, "backend": Flat()})
    assert sum(map(len, stored(ds, "vector_idx"))) == 3000


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        ({"extra": 1}, la.InvalidInputError, "expected"),
        ({"dtype": "int64"}, la.InvalidInputError, "uint32"),
        ({"width": 3}, la.InvalidInputError, "pq_code"),
        ({"raises": True}, ZeroDivisionError, None),
    ],
)
def test_a_broken_backend_is_found_out(
    broken: dict[str, Any], error: type[Exception], message: str | None, ds: Any, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        la.create_index(ds, "vector", artifact_uri=tmp_path / "a", **{**BUILD, "backend": Flat(**broken)})
    assert leftovers(tmp_path / "a") == [] and ds.describe_indices() == []


def test_progress(ds: Any, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[IndexProgress] = []
    la.create_index(ds, "vector", progress=events.append, **BUILD)
    assert all(isinstance(e, IndexProgress) for e in events)
    stages = list(dict.fromkeys(e.stage for e in events))
    assert stages == ["train_ivf", "train_quantizer", "shuffle", "merge_partitions"]
    for stage in stages:
        mine = [e for e in events if e.stage == stage]
        assert (mine[0].event, mine[-1].event) == ("start", "complete")
        done = [e.completed for e in mine if e.event == "progress"]
        assert done == sorted(done)
    assert [e for e in events if e.stage == "shuffle"][-1].completed == ROWS
    version = ds.version
    for stage in stages:

        def fails(event: IndexProgress, stage: str = stage) -> None:
            if event.stage == stage and event.event == "complete":
                raise LookupError(stage)

        with pytest.raises(LookupError, match=stage):
            la.create_index(ds, "vector", replace=True, progress=fails, **BUILD)
        with pytest.raises(LookupError, match=stage):
            la.create_index(ds, "vector", replace=True, progress_callback=fails, **BUILD)
    assert lance.dataset(ds.uri).version == version
    with pytest.raises(la.InvalidInputError, match="one of them"):
        la.create_index(ds, "vector", replace=True, progress=fails, progress_callback=fails, **BUILD)
    la.create_index(ds, "vector", replace=True, progress=True, **BUILD)
    assert "train" not in capfd.readouterr().err  # no terminal, no bar


def test_a_slow_callback_does_not_hold_the_build(ds: Any) -> None:
    import time

    calls = []
    la.create_index(
        ds,
        "vector",
        progress=lambda e: (calls.append(e), time.sleep(0.02)),
        **{**BUILD, "num_sub_vectors": DIM},
    )
    assert calls and ds.describe_indices()


# Registration


def test_registration_is_idempotent_and_reversible() -> None:
    wrapped = lance.LanceDataset.create_index
    assert la.register() and lance.LanceDataset.create_index is wrapped
    la.unregister()
    la.unregister()
    try:
        assert not hasattr(lance.LanceDataset.create_index, "__lance_artifact_original__")
        assert not hasattr(IndicesBuilder.prepare_global_ivf_pq, "__lance_artifact_original__")
    finally:
        assert la.register()
    assert lance.LanceDataset.create_index.__doc__.startswith("Create index on column")


def test_other_calls_go_where_they_went(ds: Any) -> None:
    ds.create_index("vector", "IVF_PQ", "stock", "L2", False, K, None, None, M)
    ds.create_index("vector", "IVF_FLAT", name="flat", num_partitions=2)
    with pytest.raises(ValueError, match="divisible"):
        ds.create_index("vector", "IVF_PQ", num_partitions=K, num_sub_vectors=3)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        ds.create_index("vector", "IVF_PQ", name="x", num_partitions=K, num_sub_vectors=M, accelerator="cuda")
    assert sorted(i.name for i in ds.describe_indices()) == ["flat", "stock"]


def test_it_steps_aside_where_pylance_knows_cuvs(monkeypatch: pytest.MonkeyPatch) -> None:
    from lance_artifact import _register

    la.unregister()
    try:
        monkeypatch.setattr(_register, "pylance_knows_cuvs", lambda: True)
        before = lance.LanceDataset.create_index
        assert la.register() is False and lance.LanceDataset.create_index is before
    finally:
        monkeypatch.undo()
        assert la.register()


def test_accelerator_cuvs_says_what_is_missing(ds: Any) -> None:
    calls = (
        lambda: ds.create_index("vector", "IVF_PQ", num_partitions=K, num_sub_vectors=M, accelerator="cuvs"),
        lambda: ds.create_index("vector", "IVF_PQ", None, "L2", False, K, None, None, M, "cuvs"),
        lambda: IndicesBuilder(ds, "vector").prepare_global_ivf_pq(K, M, accelerator="cuvs", sample_rate=8),
    )
    for call in calls:
        with pytest.raises(
            la.BackendUnavailableError, match=r"package: .*cuvs.*driver|package: .*cuvs.*device"
        ):
            call()
    assert ds.describe_indices() == []


def test_accelerator_cuvs_reaches_the_registry(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    accelerate(monkeypatch, Flat())
    back = ds.create_index(
        "vector", "IVF_PQ", num_partitions=K, num_sub_vectors=M, accelerator="cuvs", sample_rate=8
    )
    assert back is ds and [i.name for i in ds.describe_indices()] == ["vector_idx"]
    with pytest.raises(la.InvalidInputError, match="ivf_centroids_file"):
        ds.create_index(
            "vector", "IVF_PQ", num_sub_vectors=M, accelerator="cuvs", ivf_centroids_file="x", replace=True
        )
    with pytest.raises(la.InvalidInputError, match="mistyped"):
        ds.create_index("vector", "IVF_PQ", num_sub_vectors=M, accelerator="cuvs", mistyped=1, replace=True)
    trained = IndicesBuilder(ds, "vector").prepare_global_ivf_pq(K, M, accelerator="cuvs", sample_rate=8)
    assert len(trained["ivf_centroids"]) == K and len(trained["pq_codebook"]) == 256


def test_finalizing_from_pylances_own_call(ds: Any, tmp_path: Path) -> None:
    model = la.train(ds, "vector", **BUILD)
    uri = str(tmp_path / "a")
    la.build_artifact(ds, "vector", model, uri, backend="cpu")
    back = ds.create_index("vector", "IVF_PQ", name="plain", precomputed_partition_artifact_uri=uri)
    assert back is ds
    ds.create_index(
        "vector", "IVF_PQ", name="with", precomputed_partition_artifact_uri=uri, num_partitions=K, num_sub_vectors=M,
        ivf_centroids=model.ivf_centroids, pq_codebook=model.pq_codebook,
    )  # fmt: skip
    assert differences(stored(ds, "plain"), stored(ds, "with")) == (K, 0, 0)
    other = la.train(ds, "vector", seed=9, **BUILD)
    for wrong in (
        {"ivf_centroids": other.ivf_centroids, "pq_codebook": other.pq_codebook, "num_sub_vectors": M},
        {"num_partitions": K + 1},
        {"num_sub_vectors": 2 * M},
        {"metric": "cosine"},
    ):
        with pytest.raises(la.ArtifactMismatchError):
            ds.create_index("vector", "IVF_PQ", name="wrong", precomputed_partition_artifact_uri=uri, **wrong)


def test_lancedb_reaches_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lancedb

    array = vectors(ROWS, DIM)
    table = lancedb.connect(str(tmp_path)).create_table("t", pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), DIM)}))  # fmt: skip
    arguments = {
        "num_partitions": K,
        "num_sub_vectors": M,
        "vector_column_name": "vector",
        "accelerator": "cuvs",
    }
    with pytest.raises(la.BackendUnavailableError, match=r"driver|device"):
        table.create_index("l2", **arguments)
    accelerate(monkeypatch, Flat())
    table.create_index("l2", **arguments)
    assert [i.columns for i in table.list_indices()] == [["vector"]]
    assert len(table.search(array[5]).limit(3).nprobes(K).to_list()) == 3
    la.create_index(
        table, "vector", name="direct", num_partitions=K, num_sub_vectors=M, sample_rate=8, backend="cpu"
    )
    table.checkout_latest()
    assert len(table.list_indices()) == 2


def test_the_door_for_distributed_callers(write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What lance-ray's driver and workers call."""
    from lance.indices import IndicesBuilder

    from lance_artifact.backends.cpu import CpuBackend

    ds = write(vectors(ROWS, DIM))
    for call in (
        lambda: IndicesBuilder(ds, "vector").train_ivf(K, accelerator="cuvs"),
        lambda: ds.create_index_uncommitted("vector", "IVF_PQ", accelerator="cuvs", fragment_ids=[0]),
    ):
        with pytest.raises(la.BackendUnavailableError, match=r"driver|device"):
            call()
    accelerate(monkeypatch, CpuBackend())
    builder = IndicesBuilder(ds, "vector")
    ivf = builder.train_ivf(K, accelerator="cuvs", sample_rate=8, fragment_ids=[0, 1])
    assert (ivf.num_partitions, ivf.distance_type) == (K, "l2")
    assert builder.train_ivf(K, sample_rate=8).num_partitions == K
    pq = builder.train_pq(ivf, M, sample_rate=8)
    options = {
        "ivf_centroids": ivf.centroids,
        "pq_codebook": pq.codebook,
        "num_partitions": K,
        "num_sub_vectors": M,
    }
    uuid = "0b0f9a3c-5f0e-4a5e-8a0e-0123456789ab"
    parts = [
        ds.create_index_uncommitted(
            "vector", "IVF_PQ", accelerator="cuvs", fragment_ids=ids, index_uuid=given, **options
        )
        for ids, given in (([0], uuid), ([1, 2, 3][: len(ds.get_fragments()) - 1], None))
    ]
    assert parts[0].uuid == uuid
    ds.commit_existing_index_segments("both", "vector", [ds.merge_existing_index_segments(parts)])
    model = la.IvfPqModel.from_index(ds, "both")
    assert (model.num_partitions, model.num_sub_vectors) == (K, M)
    assert ds.stats.index_stats("both")["num_unindexed_rows"] == 0
    for more, match in (
        ({"artifact_uri": "x"}, "unexpected argument 'artifact_uri'"),
        ({"train": False}, "train: got False"),
        ({"fragment_ids": None}, "fragment_ids"),
        ({"index_uuid": "x"}, "index_uuid: got 'x'"),
    ):
        with pytest.raises(la.InvalidInputError, match=match):
            ds.create_index_uncommitted(
                "vector", "IVF_PQ", **{"accelerator": "cuvs", "fragment_ids": [0], **options, **more}
            )


def test_a_lancedb_tables_life(tmp_path: Path) -> None:
    import lancedb

    array = vectors(ROWS, DIM)
    data = pa.table({"id": pa.array(range(ROWS)), "vector": pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), DIM)})  # fmt: skip
    table = lancedb.connect(str(tmp_path)).create_table("t", data)
    print(la.plan(table, "vector", num_partitions=K, backend="cpu"))
    la.create_index(
        table,
        "vector",
        num_partitions=K,
        num_sub_vectors=M,
        sample_rate=8,
        backend="cpu",
        artifact_uri=tmp_path / "run",
        resume=True,
    )
    table.checkout_latest()
    table.add(data.slice(0, 100))
    assert la.extend_index(table, "vector_idx").num_rows == 100
    table.delete("id < 50")
    assert la.merge_segments(table, "vector_idx").rows_dropped == 100
    table.checkout_latest()
    assert len(table.list_indices()) == 1 and table.index_stats("vector_idx").num_unindexed_rows == 0
    table.add(data.slice(50, 200))
    table.optimize()
    assert table.index_stats("vector_idx").num_unindexed_rows == 0
    found = table.search(array[300]).limit(3).nprobes(K).refine_factor(20).to_list()
    assert found[0]["id"] == 300
    assert la.evaluate(table, "vector_idx", num_queries=20, refine_factors=[20]).settings[-1].recall > 0.9


# The command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    code = cli.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_cli(ds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path / "a")
    training = command_line(num_partitions=K, num_sub_vectors=M, sample_rate=8, backend="cpu")
    code, result, _ = run(capsys, "build", ds.uri, "vector", *training, "--artifact", uri, "--artifact-only")
    assert (code, result["rows"]["written"]) == (0, ROWS)
    code, result, _ = run(capsys, "inspect", uri, "--plot", str(tmp_path / "sizes.png"))
    assert (code, result["num_rows"], result["num_partitions"]) == (0, ROWS, K)
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    code, result, _ = run(capsys, "verify", uri)
    assert (code, result["ok"]) == (0, True)
    code, result, _ = run(capsys, "finalize", ds.uri, "vector", uri)
    assert (code, result["index"], result["rows"]) == (0, "vector_idx", ROWS)
    code, result, _ = run(capsys, "backends")
    assert (code, result["cpu"]["available"], result["cuvs"]["available"]) == (0, True, False)
    assert cli.main(["inspect", uri]) == 0 and "skew" not in capsys.readouterr().out
    failures = {
        3: ["verify", str(tmp_path / "nowhere")],
        4: ["build", ds.uri, "vector", *training, "--artifact", uri, "--artifact-only"],
        6: ["finalize", str(tmp_path / "other.lance"), "vector", uri],
        7: ["build", ds.uri, "vector", *training[:-1], "cuvs", "--replace"],
        9: ["finalize", ds.uri, "vector", uri],
        2: ["build", str(tmp_path / "nowhere.lance"), "vector", *training],
    }
    lance.write_dataset(pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors(50, 8).reshape(-1)), 8)}), str(tmp_path / "other.lance"))  # fmt: skip
    for expected, arguments in failures.items():
        code, result, err = run(capsys, *arguments)
        assert code == expected, (arguments, result)
        assert result["message"] and result["message"] in err
    (tmp_path / "a" / "partitions" / "bucket-00000.lance").unlink()
    code, result, _ = run(capsys, "verify", uri)
    assert (code, result["ok"]) == (5, False)


def test_cli_demo_replaces_nothing_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("artifact", "patches.lance", "stock.lance"):
        output = tmp_path / f"beside {name}"
        (output / name).mkdir(parents=True)
        (output / name / "mine").write_text("kept")
        code, result, _ = run(capsys, "demo", "--output", str(output), "--backend", "cpu")
        assert code == 2 and name in result["message"]
        assert sorted(path.name for path in output.rglob("*")) == sorted([name, "mine"])


def test_cli_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = run(capsys, "demo", "--output", str(tmp_path), "--limit", "70000", "--backend", "cpu")
    assert code == 0 and result["rows"] == 70000
    assert set(result) >= {
        "rows",
        "recall_at_10",
        "stock_recall_at_10",
        "seconds",
        "stock_seconds",
        "peak_memory_bytes",
        "picture",
    }
    assert result["recall_at_10"] > result["stock_recall_at_10"] - 0.03
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
