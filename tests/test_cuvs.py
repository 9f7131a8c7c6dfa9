"""The backend cuvs: over doubles of the driver and of cuVS and, with ``-m gpu``, on a real GPU."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import runpy
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import Gpu, column, content, differences, leftovers, stored, vectors
from lance_artifact.backends._vectors import as_matrix, codebook_array
from lance_artifact.backends.cuvs import CuvsBackend

K, M, DIM, ROWS = 12, 8, 32, 6000


def train(ds: Any, backend: Any = "cpu", **options: Any) -> la.IvfPqModel:
    defaults = {"num_partitions": K, "num_sub_vectors": M, "sample_rate": 16, "max_iters": 8}
    return la.train(ds, "vector", backend=backend, **{**defaults, **options})


def with_bad_rows(dtype: str) -> pa.FixedSizeListArray:
    """Nulls, null elements, NaN, infinities, zeros and a norm that underflows, among good rows."""
    array = vectors(ROWS, DIM, dtype)
    array[10], array[11, 3], array[12, 5] = 0, np.nan, -np.inf
    if dtype == "float32":
        array[13] = 1e-30
    array[3000:3010] = np.nan
    mask = np.zeros(ROWS, bool)
    mask[[20, 21, 4000, ROWS - 1]] = True
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), DIM, mask=pa.array(mask))


def prepared(model: la.IvfPqModel, values: Any) -> np.ndarray:
    """Vectors as an encoder sees them, in float64."""
    array = values.values.to_numpy().reshape(-1, DIM).astype(np.float64)
    if model.metric == "cosine":
        with np.errstate(all="ignore"):
            array = (
                (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(model.dtype).astype(np.float64)
            )
    return array


def ties(
    model: la.IvfPqModel, values: Any, ours: list[dict[int, bytes]], theirs: list[dict[int, bytes]]
) -> int:
    """Rows whose partition or code differs; each must be a tie within the rounding of the column's type."""
    array = prepared(model, values)
    centroids = as_matrix(model.ivf_centroids).astype(np.float64)
    codebook = codebook_array(model).astype(np.float64)
    rounding = float(np.finfo(model.dtype if model.dtype != "float64" else "float32").eps) * 16
    where = [{row: p for p, rows in enumerate(side) for row in rows} for side in (ours, theirs)]
    assert where[0].keys() == where[1].keys()
    differing = 0
    for row, mine in where[0].items():
        other = where[1][row]
        if mine == other and ours[mine][row] == theirs[other][row]:
            continue
        differing += 1
        vector = array[(row >> 32) * 2000 + (row & 0xFFFFFFFF)]
        scale = (vector**2).sum() + (centroids**2).sum(1).max()
        if mine != other:
            distances = -centroids @ vector if model.metric == "dot" else ((vector - centroids) ** 2).sum(1)
            assert abs(distances[mine] - distances[other]) <= rounding * scale, f"row {row} is no tie"
            continue
        target = vector if model.metric == "dot" else vector - centroids[mine]
        for m, (a, b) in enumerate(
            zip(*(codes_of(model, side[mine][row]) for side in (ours, theirs)), strict=True)
        ):
            part = target.reshape(model.num_sub_vectors, -1)[m]
            a_far, b_far = (((part - codebook[m][c]) ** 2).sum() for c in (a, b))
            assert abs(a_far - b_far) <= rounding * scale, f"row {row}, sub-vector {m} is no tie"
    return differing


def codes_of(model: la.IvfPqModel, code: bytes) -> list[int]:
    return list(code) if model.num_bits == 8 else [n for byte in code for n in (byte & 15, byte >> 4)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_same_artifact_as_the_cpu(
    metric: str, dtype: str, bits: int, gpu: Gpu, write: Any, tmp_path: Path
) -> None:
    values = with_bad_rows(dtype)
    ds = write(values)
    ds.delete("id in (100, 5000)")
    model = train(ds, metric=metric, num_bits=bits)
    cpu = la.build_artifact(ds, "vector", model, tmp_path / "cpu", backend="cpu")
    ours = la.build_artifact(ds, "vector", model, tmp_path / "cuvs", backend="cuvs", batch_rows=1000)
    assert ours.manifest["rows"] == cpu.manifest["rows"]
    assert ours.num_rows < ROWS - 2
    differing = ties(model, values, content(ours), content(cpu))
    print(f"{metric:6} {dtype} {bits} bits: {differing} of {ours.num_rows} rows differ, all of them ties")
    # Float16 residuals are rounded on the CPU and not on a GPU.
    assert differing <= ours.num_rows * (0.1 if dtype == "float16" else 0.005)
    assert ours.verify().ok
    la.finalize(ds, "vector", ours)
    query = values.values.to_numpy().reshape(-1, DIM)[50]
    found = ds.to_table(
        nearest={"column": "vector", "q": query, "k": 1, "nprobes": K, "refine_factor": 20, "metric": metric}
    )
    assert found.num_rows == 1


def recall(ds: Any, array: np.ndarray, metric: str, **search: Any) -> float:
    hits = 0
    for query in array[:50]:
        truth = ds.to_table(
            nearest={"column": "vector", "q": query, "k": 10, "use_index": False, "metric": metric}
        )
        found = ds.to_table(nearest={"column": "vector", "q": query, "k": 10, "nprobes": 4, **search})
        hits += len(set(truth["id"].to_pylist()) & set(found["id"].to_pylist()))
    return hits / 500


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_recall_beside_stock(metric: str, dtype: str, gpu: Gpu, write: Any) -> None:
    array = vectors(ROWS, DIM, dtype)
    ds, stock = write(array), write(array, "stock.lance")
    parameters = {"metric": metric, "num_partitions": K, "num_sub_vectors": M, "sample_rate": 64}
    ds.create_index("vector", "IVF_PQ", accelerator="cuvs", **parameters)
    stock.create_index("vector", "IVF_PQ", **parameters)
    ours, theirs = recall(ds, array, metric), recall(stock, array, metric)
    print(f"{metric:6} {dtype}: recall@10 {ours:.3f}, stock {theirs:.3f}")
    # 500 answers of a small dataset, and stock starts anew each time.
    assert ours >= theirs - 0.1
    assert recall(ds, array, metric, nprobes=K, refine_factor=10) > 0.97


def test_the_model_is_the_columns_and_the_callers(gpu: Gpu, write: Any) -> None:
    ds = write(vectors(ROWS, DIM, "float16"))
    model = train(ds, "cuvs", metric="dot")
    assert (model.dtype, model.metric, model.num_partitions, model.num_sub_vectors) == (
        "float16",
        "dot",
        K,
        M,
    )
    assert np.allclose(np.linalg.norm(as_matrix(model.ivf_centroids).astype("f4"), axis=1), 1, atol=2e-3)
    for metric in ("l2", "cosine", "dot"):
        given = as_matrix(train(ds, metric=metric).ivf_centroids)
        model = train(ds, "cuvs", metric=metric, ivf_centroids=given, num_partitions=None)
        assert np.array_equal(as_matrix(model.ivf_centroids), given)
        assert codebook_array(model).astype("f4").std() > 0
    steps: list[Any] = []
    train(ds, "cuvs", progress=lambda p: steps.append((p.event, p.stage)))
    assert steps == [
        (event, stage) for stage in ("train_ivf", "train_quantizer") for event in ("start", "complete")
    ]


def test_an_encoder_takes_a_few_vectors_too(gpu: Gpu, write: Any) -> None:
    array = vectors(ROWS, DIM)
    model = train(write(array))
    encoder = CuvsBackend().encoder(model)
    assert isinstance(encoder, la.DeviceEncoder)
    part_id, pq_code = encoder.encode(column(array[:500]))
    expected_ids, expected_codes = la.CpuEncoder(model).encode(column(array[:500]))
    assert (part_id == expected_ids.to_numpy()).mean() > 0.99
    assert (pq_code == as_matrix(expected_codes)).mean() > 0.99


def test_batches_shrink_when_the_device_is_full(
    double: Gpu, write: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ds = write(vectors(ROWS, DIM))
    model = train(ds)
    expected = content(la.build_artifact(ds, "vector", model, tmp_path / "whole", backend="cuvs"))
    double.control.most_rows = 300
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "split", backend="cuvs")
    assert content(artifact) == expected
    assert "ran out of device memory" in caplog.text
    double.control.reset()
    # The slots themselves: 4 of them in a quarter of what is free.
    double.reset(memory=4 << 20)
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "small", backend="cuvs")
    assert content(artifact) == expected
    # After the model's four arrays.
    double.fail(b"cuMemAlloc_v2", 6, 2)
    with pytest.raises(la.DeviceMemoryError, match="bytes"):
        la.build_artifact(ds, "vector", model, tmp_path / "none", backend="cuvs")
    assert leftovers(tmp_path / "none") == []
    double.reset(memory=100_000)
    with pytest.raises(la.DeviceMemoryError, match="free on the device"):
        la.build_artifact(ds, "vector", model, tmp_path / "none", backend="cuvs")
    assert leftovers(tmp_path / "none") == []
    double.reset()
    double.control.most_rows = 100
    with pytest.raises(la.DeviceMemoryError, match="training on"):
        train(ds, "cuvs")


@pytest.mark.parametrize(
    "call",
    [b"cuMemcpyHtoDAsync_v2", b"cuMemcpyDtoHAsync_v2", b"cuEventSynchronize", b"cuStreamWaitEvent", b"cuStreamCreate",
     b"cuMemHostAlloc", b"cuEventRecord"],
)  # fmt: skip
def test_a_lost_device_leaves_nothing_behind(call: bytes, double: Gpu, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    la.create_index(ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=16, backend="cpu")
    before, model = stored(ds, "vector_idx"), train(ds)
    # In the middle of the work, or at the third of what a lane makes.
    double.fail(call, 2, 719)
    with pytest.raises(la.DeviceError, match="719") as caught:
        la.build_artifact(ds, "vector", model, tmp_path / "artifact", backend="cuvs", batch_rows=500)
    assert "nvidia-smi" in str(caught.value)
    assert leftovers(tmp_path / "artifact") == []
    double.reset()
    double.fail(call, 0, 719)
    with pytest.raises(la.DeviceError):
        ds.create_index(
            "vector", "IVF_PQ", replace=True, ivf_centroids=model.ivf_centroids, pq_codebook=model.pq_codebook,
            num_sub_vectors=M, accelerator="cuvs",
        )  # fmt: skip
    double.reset()
    assert differences(stored(ds, "vector_idx"), before) == (K, 0, 0)


def test_an_error_of_cuvs_is_raised_with_its_cause(double: Gpu, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = train(ds)
    double.control.fail_at = 3
    with pytest.raises(la.DeviceError, match="cudaErrorLaunchFailure") as caught:
        la.build_artifact(ds, "vector", model, tmp_path / "artifact", backend="cuvs", batch_rows=500)
    assert type(caught.value.__cause__).__name__ == "CuvsCallError"
    assert leftovers(tmp_path / "artifact") == []


def test_a_failed_allocation_is_not_always_a_full_device(double: Gpu, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = train(ds)
    double.control.message = "std::bad_alloc: CUDA error (failed to allocate 16 bytes) at: cudaErrorIllegalAddress an illegal memory access"
    double.control.fail_at = 2
    with pytest.raises(la.DeviceError, match="cudaErrorIllegalAddress") as caught:
        la.build_artifact(ds, "vector", model, tmp_path / "artifact", backend="cuvs", batch_rows=500)
    assert not isinstance(caught.value, la.DeviceMemoryError)
    double.control.calls = 1
    with pytest.raises(la.DeviceError, match=r"training on .*cudaErrorIllegalAddress"):
        train(ds, "cuvs")
    # Whoever keeps the exception does not keep the device's memory; the context is kept for the process.
    assert double.driver.fake_cuda_live() == 1


def test_dot_of_short_vectors_goes_where_the_cpu_puts_them(gpu: Gpu, write: Any, tmp_path: Path) -> None:
    array = (vectors(ROWS, DIM, "float32") * 0.01 / 17).astype("float16")
    ds = write(array)
    model = train(ds, metric="dot", num_partitions=64)
    cpu = la.build_artifact(ds, "vector", model, tmp_path / "cpu", backend="cpu")
    ours = la.build_artifact(ds, "vector", model, tmp_path / "cuvs", backend="cuvs")
    where = [{row: p for p, rows in enumerate(content(a)) for row in rows} for a in (cpu, ours)]
    moved = sum(where[0][row] != where[1][row] for row in where[0])
    print(f"{moved} of {ROWS} rows in another partition")
    # Centroids of nearly one direction; by norms as float16 has them hundreds of rows moved.
    assert moved <= ROWS * 0.005


def test_given_centroids_need_vectors_for_the_codebook_only(gpu: Gpu, write: Any) -> None:
    array = vectors(ROWS, DIM)
    ds = write(array)
    for backend in ("cpu", "cuvs"):
        model = train(ds, backend, ivf_centroids=array[:600], num_partitions=None, num_bits=4)
        assert model.num_partitions == 600


def test_training_beyond_float32_is_refused(double: Gpu, write: Any) -> None:
    array = vectors(ROWS, DIM, "float64")
    array[:, 3] = 1e300
    with pytest.raises(la.InvalidInputError, match="beyond the range of float32"):
        train(write(array), "cuvs")


def test_several_devices_make_one_artifact(gpu: Gpu, write: Any, tmp_path: Path) -> None:
    if gpu.devices < 2:
        pytest.skip("one device only")
    ds = write(vectors(ROWS, DIM))
    model = train(ds)
    one = la.build_artifact(ds, "vector", model, tmp_path / "one", backend="cuvs")
    two = la.build_artifact(
        ds, "vector", model, tmp_path / "two", backend="cuvs", devices=[0, 1], batch_rows=256
    )
    assert differences(content(two), content(one)) == (K, 0, 0)
    ds.create_index(
        "vector",
        "IVF_PQ",
        num_partitions=K,
        num_sub_vectors=M,
        sample_rate=16,
        accelerator="cuvs",
        devices=[1, 0],
    )
    ds.create_index(
        "vector",
        "IVF_PQ",
        num_partitions=K,
        num_sub_vectors=M,
        sample_rate=16,
        accelerator="cuvs:1",
        replace=True,
    )
    assert sum(map(len, stored(ds, "vector_idx"))) == ROWS


def test_devices_that_cannot_be(double: Gpu, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    shape = {"num_partitions": K, "num_sub_vectors": M}
    with pytest.raises(la.BackendUnavailableError, match=r"\[7\] are not among the 2 visible"):
        la.create_index(ds, "vector", backend="cuvs", devices=[0, 7], **shape)
    for devices in ([], [0, 0], [-1], ["0"]):
        with pytest.raises(la.InvalidInputError, match="devices"):
            la.create_index(ds, "vector", backend="cuvs", devices=devices, **shape)
    with pytest.raises(la.InvalidInputError, match="takes no devices"):
        la.create_index(ds, "vector", backend="cpu", devices=[0], **shape)
    with pytest.raises(la.InvalidInputError, match="batch_rows"):
        la.build_artifact(ds, "vector", train(ds), tmp_path / "a", backend="cpu", batch_rows=100)
    with pytest.raises(la.InvalidInputError, match="pass one of them"):
        ds.create_index("vector", "IVF_PQ", accelerator="cuvs:0", devices=[1], **shape)
    assert leftovers(tmp_path / "a") == []


def test_dot_needs_centroids_of_equal_norm(double: Gpu, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = train(ds, metric="dot")
    uneven = as_matrix(model.ivf_centroids) * np.linspace(1, 2, K, dtype="f4")[:, None]
    with pytest.raises(la.InvalidInputError, match="norms are 1 to 2"):
        la.build_artifact(
            ds, "vector", la.IvfPqModel(uneven, codebook_array(model), "dot"), tmp_path / "a", backend="cuvs"
        )
    assert leftovers(tmp_path / "a") == []


def test_what_cuvs_gives_back_is_checked(double: Gpu, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = write(vectors(ROWS, DIM))
    double.control.rotation = np.eye(DIM, dtype="f4")[::-1]
    with pytest.raises(la.BackendUnavailableError, match="rotates the vectors"):
        train(ds, "cuvs")
    double.control.reset()
    from cuvs.common import device_tensor_view

    good = device_tensor_view.DeviceTensorView.copy_to_host
    monkeypatch.setattr(
        device_tensor_view.DeviceTensorView, "copy_to_host", lambda s, resources=None: good(s).astype("f8")
    )
    with pytest.raises(la.BackendUnavailableError, match=r"centers as float64.*expected finite float32"):
        train(ds, "cuvs")


def test_an_old_cuvs_is_named(double: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuvs.neighbors import ivf_pq

    monkeypatch.delattr(ivf_pq, "transform")
    found = la.available_backends()["cuvs"]
    assert not found.ok
    assert "has no ivf_pq.transform; it needs 26.2 or newer" in found.missing[0]


def test_a_cuvs_without_its_c_interface_computes_on_its_own_stream(
    double: Gpu, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lance_artifact.backends import _cuvs_calls

    def load(name: str) -> Any:
        if name == "libcuvs_c.so":
            raise OSError("not here")
        return ctypes.CDLL(name)

    ds = write(vectors(ROWS, DIM))
    model = train(ds)
    expected = content(
        la.build_artifact(ds, "vector", model, tmp_path / "ours", backend="cuvs", batch_rows=500)
    )
    caplog.set_level(logging.INFO)
    hidden = type("ctypes", (), {**vars(ctypes), "CDLL": staticmethod(load)})
    monkeypatch.setattr(_cuvs_calls, "ctypes", hidden)
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "own", backend="cuvs", batch_rows=500)
    assert "a stream of its own" in caplog.text
    assert content(artifact) == expected


def test_float64_beyond_float32_is_refused(double: Gpu, write: Any, tmp_path: Path) -> None:
    array = vectors(ROWS, DIM, "float64")
    ds = write(array)
    model = train(ds)
    array[17, 3] = 1e300
    with pytest.raises(la.InvalidInputError, match="beyond the range of float32"):
        la.build_artifact(write(array, "huge.lance"), "vector", model, tmp_path / "a", backend="cuvs")
    assert leftovers(tmp_path / "a") == []


def test_ctrl_c_ends_it_and_leaves_nothing(gpu: Gpu, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS * (1 if not gpu.real else 50), DIM))
    model = train(ds)
    started = threading.Event()
    interrupted = [0.0]

    def interrupt() -> None:
        started.wait(30)
        interrupted[0] = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    def progress(step: Any) -> None:
        if step.event == "progress" and step.completed:
            started.set()

    if not gpu.real:
        gpu.control.delay = lambda: time.sleep(0.1)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        la.build_artifact(
            ds, "vector", model, tmp_path / "artifact", backend="cuvs", batch_rows=100, progress=progress
        )
    assert time.monotonic() - interrupted[0] < 1
    assert leftovers(tmp_path / "artifact") == []


def test_lancedb_builds_on_the_gpu(gpu: Gpu, tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    array = vectors(ROWS, DIM)
    table = lancedb.connect(str(tmp_path)).create_table("t", pa.table({"vector": column(array)}))
    table.create_index(
        "cosine", num_partitions=K, num_sub_vectors=M, vector_column_name="vector", accelerator="cuvs"
    )
    assert [i.columns for i in table.list_indices()] == [["vector"]]
    assert (
        table.search(array[7]).limit(1).nprobes(K).refine_factor(10).to_list()[0]["vector"]
        == array[7].tolist()
    )
    if not gpu.real:
        assert gpu.control.calls > 0


def test_the_example_and_the_benchmark_run(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parent.parent
    np.save(tmp_path / "vectors.npy", vectors(9000, DIM))
    runpy.run_path(str(root / "examples/cuvs.py"))["main"]([str(tmp_path / "vectors.npy")])
    assert "on the GPU" in capsys.readouterr().out
    monkeypatch.syspath_prepend(str(root / "benches"))
    arguments = ["--rows", "6000", "--dim", "32", "--partitions", "8", "--sub-vectors", "8", "--sample-rate", "64",
                 "--max-iters", "5", "--runs", "1", "--parts", "stages,ours,stock", "--batch-rows", "1000",
                 "--folder", str(tmp_path / "bench"), "--json", str(tmp_path / "gpu.json")]  # fmt: skip
    runpy.run_path(str(root / "benches/gpu.py"))["main"](arguments)
    table = {row["goal"]: row for row in json.loads((tmp_path / "gpu.json").read_text())}
    assert len(table) == 7
    assert table["end to end against stock pylance on the CPU, at least 5 times as fast"]["ours"] > 0
    found = table["recall@10 beside stock pylance on the CPU, at most 0.01 lower"]
    assert found["ours"] > found["peer"] - 0.1
    assert set(found) >= {"goal", "ours", "peer", "ratio", "limit", "unit", "machine", "versions"}
