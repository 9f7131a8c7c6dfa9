"""Where the real cuVS needs care that arithmetic alone does not ask for: each over a double that is as unkind."""

from __future__ import annotations

import ctypes
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import Gpu, vectors
from lance_artifact._lance_artifact import _CudaDevice
from lance_artifact.backends import _cuvs_c, _cuvs_calls
from lance_artifact.backends._cuvs_train import Trainer
from lance_artifact.backends._vectors import as_matrix, codebook_array, directions_of
from lance_artifact.backends.cuvs import CuvsBackend

K, M, DIM, ROWS = 8, 4, 16, 3000
SHAPE = {"num_partitions": K, "num_sub_vectors": M, "sample_rate": 16}


def where(artifact: la.Artifact) -> dict[int, int]:
    """The partition of each row."""
    return {
        row: partition
        for partition in range(artifact.num_partitions)
        for row in artifact.read_partition(partition).read_all().column("_rowid").to_pylist()
    }


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_training_allocates_from_the_pool_too(metric: str, double: Gpu, write: Any) -> None:
    from rmm import mr

    before = mr.get_current_device_resource()
    la.train(write(vectors(ROWS, DIM)), "vector", metric=metric, backend="cuvs", **SHAPE)
    assert {type(resource) for resource in double.control.trained_in} == {mr.CudaAsyncMemoryResource}
    assert mr.get_current_device_resource() is before


def test_pools_keep_what_is_freed_and_are_of_their_device(double: Gpu, write: Any, tmp_path: Path) -> None:
    """cuVS waits for the device in each batch, and a pool with a threshold gives memory back there."""
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", backend="cuvs", **SHAPE)
    la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cuvs", devices=[0, 1], batch_rows=300)
    assert sum(pool.trims for pool in double.control.trained_in) == 0
    assert sum(pool.trims for pool in _cuvs_calls._POOLS.values()) == 0
    assert double.control.encoded_in == {(0, 0), (1, 1)}


def test_codebooks_are_trained_from_the_devices_memory(double: Gpu, write: Any) -> None:
    ds = write(vectors(ROWS, DIM))
    la.train(ds, "vector", metric="dot", backend="cuvs", **SHAPE)
    la.train(ds, "vector", backend="cuvs", ivf_centroids=vectors(K, DIM), num_sub_vectors=M, sample_rate=8)
    assert len(double.control.trained_in) == 3
    assert double.control.pageable == 0


def test_normalising_takes_the_memory_of_the_result() -> None:
    sample = np.random.default_rng(0).normal(size=(100_000, 64)).astype(np.float16)
    sample[[5, 77_000]] = 0
    tracemalloc.start()
    found = directions_of(sample)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000 * 64 * 4 * 1.3
    expected = np.delete(sample, [5, 77_000], axis=0).astype(np.float32)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_batches_of_any_size_share_their_scratch(
    double: Gpu, write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = []
    empty = _cuvs_calls.Cuvs.empty
    monkeypatch.setattr(_cuvs_calls.Cuvs, "empty", lambda self, *a: made.append(a) or empty(self, *a))
    array = vectors(ROWS, DIM)
    array[np.random.default_rng(1).choice(ROWS, 200, replace=False)] = np.nan
    ds = write(array)
    model = la.train(ds, "vector", metric="dot", backend="cpu", **SHAPE)
    made.clear()
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cuvs", batch_rows=300)
    assert artifact.num_rows == ROWS - 200
    assert len(set(double.control.rows)) > 3
    assert len(made) <= 2


@pytest.mark.parametrize("length", [1e-4, 1.0, 1000.0])
def test_dot_of_vectors_of_any_length_in_float32(
    length: float, double: Gpu, write: Any, tmp_path: Path
) -> None:
    array = vectors(ROWS, DIM)
    array *= length / np.linalg.norm(array, axis=1, keepdims=True)
    ds = write(array)
    model = la.train(ds, "vector", metric="dot", backend="cpu", **{**SHAPE, "num_partitions": 64})
    # Not what the CPU says, which follows Lance: of short vectors its 1 - x.c leaves little.
    products = array.astype(np.float64) @ as_matrix(model.ivf_centroids).T.astype(np.float64)
    row_ids = ds.to_table(columns=[], with_row_id=True)["_rowid"].to_pylist()
    expected = dict(zip(row_ids, products.argmax(1).tolist(), strict=True))
    double.control.expanded = True
    found = where(la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cuvs"))
    assert sum(found[row] != expected[row] for row in expected) <= ROWS * 0.001


def test_few_distinct_vectors_are_bad_input(double: Gpu, write: Any) -> None:
    array = np.repeat(vectors(2, DIM), ROWS // 2, axis=0)
    with pytest.raises(la.InvalidInputError, match=r"too few distinct ones.*lower num_partitions"):
        la.train(write(array), "vector", backend="cuvs", **SHAPE)


def test_a_handle_that_got_no_memory_is_not_used_again(double: Gpu, write: Any, tmp_path: Path) -> None:
    """cuVS keeps it, and every call with the same resources fails: the batch is tried again with others, in smaller parts."""
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", backend="cpu", **SHAPE)
    expected = where(la.build_artifact(ds, "vector", model, tmp_path / "cpu", backend="cpu"))
    double.control.calls = 0
    double.control.no_handle_at = 2
    made = la.build_artifact(ds, "vector", model, tmp_path / "cuvs", backend="cuvs", batch_rows=500)
    assert len(double.control.broken) == 1
    assert where(made) == expected


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_few_rows_are_compared_as_exactly_as_many(
    metric: str, double: Gpu, write: Any, tmp_path: Path
) -> None:
    """On Hopper cuVS rounds to TF32 where rows and partitions are fewer than 4096: the rest of a table, a small batch."""
    assert la.available_backends()["cuvs"].details["devices"][0]["compute_capability"][0] == 9
    rows = 5000
    array = vectors(rows, DIM)
    ds = write(array)
    model = la.train(ds, "vector", metric=metric, backend="cpu", **{**SHAPE, "num_partitions": 64})
    ours = where(la.build_artifact(ds, "vector", model, tmp_path / "cpu", backend="cpu"))
    double.control.tf32_below = 4096
    theirs = where(la.build_artifact(ds, "vector", model, tmp_path / "cuvs", backend="cuvs", batch_rows=4500))
    assert ours == theirs
    assert min(double.control.rows) >= 4096
    part_ids, _ = CuvsBackend().encoder(model).encode(prepared(array[:50]))
    assert part_ids.tolist() == [ours[row] for row in range(50)]
    # Slots without room for so many: some rows move, and nothing fails.
    double.control.rows.clear()
    small = where(la.build_artifact(ds, "vector", model, tmp_path / "small", backend="cuvs", batch_rows=1000))
    assert max(double.control.rows) == 1000
    assert 0 < sum(small[row] != ours[row] for row in ours) < rows * 0.02


def prepared(array: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), DIM)


def test_a_pool_outlives_its_first_use(double: Gpu, write: Any, tmp_path: Path) -> None:
    """A context goes with its last user, and with it what was made in it: a build after a build would find a pool that is gone."""
    ds = write(vectors(ROWS, DIM))
    destroyed = [double.driver.fake_cuda_generation(device) for device in (0, 1)]
    model = la.train(ds, "vector", backend="cuvs", **SHAPE)
    for n in range(2):
        la.build_artifact(ds, "vector", model, tmp_path / f"{n}", backend="cuvs", devices=[0, 1])
    assert [double.driver.fake_cuda_generation(device) for device in (0, 1)] == destroyed


def test_two_devices_encode_at_once(double: Gpu, write: Any, tmp_path: Path) -> None:
    """Calls into cuVS let other threads of Python run: through its C interface, which its Python package does not."""
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", backend="cpu", **SHAPE)
    library = ctypes.CDLL("libcuvs_c.so")
    library.fake_cuvs_wait(20)
    try:
        la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cuvs", devices=[0, 1], batch_rows=300)
        assert library.fake_cuvs_most_at_once() == 2
    finally:
        library.fake_cuvs_wait(0)


def test_a_cuvs_without_the_c_functions_encodes_all_the_same(
    double: Gpu, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", backend="cpu", **SHAPE)
    expected = where(la.build_artifact(ds, "vector", model, tmp_path / "c", backend="cuvs"))
    monkeypatch.setattr(_cuvs_c, "LIBRARY", "libcuvs_c_of_another_release.so")
    with caplog.at_level("INFO", logger="lance_artifact"):
        made = la.build_artifact(ds, "vector", model, tmp_path / "python", backend="cuvs")
    assert where(made) == expected
    assert "one thread at a time" in caplog.text


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_encodings_that_are_there_later_are_waited_for(
    metric: str, double: Gpu, write: Any, tmp_path: Path
) -> None:
    """cuVS waits for each batch itself so far. Where it does not, results are poison until somebody waits for the stream."""
    array = vectors(ROWS, DIM)
    # The first batches are small: what is made for later ones must not go while an earlier one is under way.
    array[:200] = array[300:400] = np.nan
    ds = write(array)
    model = la.train(ds, "vector", metric=metric, backend="cpu", **SHAPE)
    expected = la.build_artifact(ds, "vector", model, tmp_path / "now", backend="cuvs", batch_rows=300)
    double.control.put_off = True
    later = la.build_artifact(
        ds, "vector", model, tmp_path / "later", backend="cuvs", batch_rows=300, devices=[0, 1]
    )
    for partition in range(K):
        found, wanted = (a.read_partition(partition).read_all().sort_by("_rowid") for a in (later, expected))
        assert found.equals(wanted)


def loss(array: np.ndarray, model: la.IvfPqModel) -> float:
    """Mean squared distance to the nearest centroid; for dot of directions."""
    if model.metric == "dot":
        array = array / np.linalg.norm(array, axis=1, keepdims=True)
    centroids = as_matrix(model.ivf_centroids)
    return float(((array[:, None] - centroids[None]) ** 2).sum(2).min(1).mean())


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_a_sample_that_a_device_does_not_hold_goes_through_it_in_parts(
    metric: str, double: Gpu, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    array = vectors(ROWS, DIM)
    if metric != "l2":
        array /= np.linalg.norm(array, axis=1, keepdims=True)
    ds = write(array)
    shape = {**SHAPE, "num_partitions": 64, "sample_rate": 40, "metric": metric, "backend": "cuvs"}
    whole = la.train(ds, "vector", **shape)
    assert "in parts" not in caplog.text
    assert max(double.control.rows) == ROWS
    double.control.rows.clear()
    limit = int(600 * DIM * 4 / 0.4) + 1
    parts = la.train(ds, "vector", device_memory_limit=limit, **shape)
    assert "training centroids on 600 vectors, and moving them to the means of 3000" in caplog.text
    assert max(double.control.rows) == 600
    # Of the same vectors, whose centroids were found among a quarter of them.
    assert loss(array, parts) < loss(array, whole) * 1.1
    if metric == "dot":
        assert np.allclose(np.linalg.norm(as_matrix(parts.ivf_centroids), axis=1), 1, atol=1e-5)
    assert codebook_array(parts).std() > 0
    with pytest.raises(la.DeviceMemoryError, match=r"must be on the device at once.*device_memory_limit"):
        la.train(ds, "vector", device_memory_limit=limit // 2, **shape)


def test_encoding_keeps_within_the_memory_it_may_take(double: Gpu, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", backend="cpu", **SHAPE)
    expected = where(la.build_artifact(ds, "vector", model, tmp_path / "all", backend="cuvs"))
    assert max(double.control.rows) >= ROWS
    double.control.rows.clear()
    limit = 400_000
    la.build_artifact(
        ds, "vector", model, tmp_path / "some", backend="cuvs", device_memory_limit=limit, devices=[0, 1]
    )
    assert where(la.Artifact.open(tmp_path / "some")) == expected
    # Slots have a quarter of it, and cuVS three.
    assert max(double.control.rows) <= limit / 4 / 4 / (DIM * 4 + 4 + M)
    assert {pool.allocation_limit for pool in _cuvs_calls._LIMITED.values()} == {limit * 3 // 4}


def test_a_limit_that_cannot_be_kept_is_refused(
    double: Gpu, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmm import mr

    ds = write(vectors(ROWS, DIM))
    with pytest.raises(la.InvalidInputError, match="'cpu' takes no device_memory_limit"):
        la.train(ds, "vector", backend="cpu", device_memory_limit=1 << 30, **SHAPE)
    with pytest.raises(la.InvalidInputError, match="device_memory_limit"):
        la.train(ds, "vector", backend="cuvs", device_memory_limit=0, **SHAPE)
    monkeypatch.delattr(mr, "LimitingResourceAdaptor")
    with pytest.raises(la.BackendUnavailableError, match="this rmm cannot keep to it"):
        la.train(ds, "vector", backend="cuvs", device_memory_limit=1 << 29, **SHAPE)
    assert la.train(ds, "vector", backend="cuvs", **SHAPE).num_partitions == K


def test_a_training_that_got_no_memory_says_that_it_is_kept(double: Gpu, write: Any) -> None:
    double.control.most_rows = 100
    with pytest.raises(la.DeviceMemoryError, match=r"training on .*try again in a new process"):
        la.train(write(vectors(ROWS, DIM)), "vector", backend="cuvs", **SHAPE)


def test_a_fault_of_the_device_fails_every_later_call(double: Gpu, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", backend="cpu", **SHAPE)
    double.control.calls, double.control.fail_at = 0, 2
    for n in range(2):
        with pytest.raises(la.DeviceError, match="try again in a new one"):
            la.build_artifact(ds, "vector", model, tmp_path / f"{n}", backend="cuvs", batch_rows=500)
        assert not (tmp_path / f"{n}" / "manifest.json").exists()


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_a_codebook_is_trained_on_rows_from_all_over(metric: str, double: Gpu) -> None:
    """cuVS trains a quantizer on the first rows of what it gets, and a sample comes in any order: here as a table is sorted."""
    rng = np.random.default_rng(0)
    # Of the first half little is known of the second.
    array = np.concatenate([rng.normal(size=(ROWS, DIM)), rng.normal(size=(ROWS, DIM)) * 20]).astype("f4")
    given = None if metric == "dot" else prepared(np.zeros((1, DIM), "f4"))
    params = la.TrainParams(metric, 64 if given is None else 1, M, 4, 64, ivf_centroids=given)
    model = CuvsBackend().train(prepared(array), params)
    assert np.abs(codebook_array(model)).max() > 15


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_a_batch_begins_while_another_thread_holds_the_interpreter(
    metric: str, double: Gpu, write: Any, tmp_path: Path
) -> None:
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", metric=metric, backend="cpu", **SHAPE)
    expected = where(
        la.build_artifact(ds, "vector", model, tmp_path / "quiet", backend="cuvs", batch_rows=100)
    )
    # Neither gives the interpreter away while it is called.
    held, system = ctypes.PyDLL("libcuvs_c.so"), ctypes.PyDLL(None)
    ended, begun = threading.Event(), [0]

    def busy() -> None:
        while not ended.is_set():
            before = held.fake_cuvs_entered()
            system.usleep(20_000)
            begun[0] += held.fake_cuvs_entered() - before
            time.sleep(0.001)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        made = la.build_artifact(ds, "vector", model, tmp_path / "busy", backend="cuvs", batch_rows=100)
    finally:
        ended.set()
        thread.join()
    assert where(made) == expected
    assert begun[0] > 5


def test_a_batch_that_fails_without_the_interpreter_is_tried_with_it(
    double: Gpu, write: Any, tmp_path: Path
) -> None:
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", metric="dot", backend="cpu", **SHAPE)
    expected = where(la.build_artifact(ds, "vector", model, tmp_path / "all", backend="cuvs", batch_rows=300))
    # Fewer rows, then other resources.
    double.control.most_rows = 120
    made = la.build_artifact(ds, "vector", model, tmp_path / "few", backend="cuvs", batch_rows=300)
    assert where(made) == expected
    double.control.reset()
    double.control.no_handle_at = 9
    made = la.build_artifact(ds, "vector", model, tmp_path / "broken", backend="cuvs", batch_rows=300)
    assert where(made) == expected
    assert len(double.control.broken) == 1


def test_a_second_training_that_finds_less_memory_says_where_the_rest_is(
    double: Gpu, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """rmm does not tell how much of its pool is free: that is not guessed at."""
    double.reset(memory=16 << 20)
    ds = write(vectors(ROWS, DIM))
    shape = {**SHAPE, "num_partitions": 64, "sample_rate": 40, "backend": "cuvs"}
    row = int(DIM * 4 / 0.4)
    said = "without what cuVS had in earlier calls of this process"
    for earlier in (False, True):
        if earlier:
            la.train(ds, "vector", **shape)
        for rows in (300, 600):
            with _CudaDevice(0) as device:
                # As the pool has it.
                taken = _cuvs_calls.Cuvs().empty((device.free_memory() - rows * row - 1,), np.uint8)
                caplog.clear()
                if rows == 300:
                    with pytest.raises(la.DeviceMemoryError, match="must be on the device at once") as error:
                        la.train(ds, "vector", **shape)
                    assert (said in str(error.value)) == earlier
                else:
                    la.train(ds, "vector", **shape)
                    assert "more do not fit the device's memory" in caplog.text
                    assert (said in caplog.text) == earlier
                del taken
    with pytest.raises(la.DeviceMemoryError) as error:
        la.train(ds, "vector", device_memory_limit=300 * row, **shape)
    assert said not in str(error.value), "it is the limit that is short"


def test_directions_of_a_part_of_the_sample_take_the_memory_of_the_result(
    double: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part itself is not copied out of the sample beside them."""
    sample = np.random.default_rng(0).normal(size=(240_000, 64)).astype(np.float32)
    sample[5] = 0
    params = la.TrainParams("dot", K, M, 8, 256, 2, 0, None)
    trained: list[Any] = []

    def train(self: Any, part: np.ndarray, *_: Any) -> Any:
        trained.extend([tracemalloc.get_traced_memory(), part.copy()])
        raise InterruptedError

    with _CudaDevice(0):
        trainer = Trainer(_cuvs_calls.Cuvs(), 0, sample, params, lambda *_: None, 120_000)
        monkeypatch.setattr(_cuvs_calls.Cuvs, "train", train)
        tracemalloc.start()
        try:
            with pytest.raises(InterruptedError):
                trainer.train()
        finally:
            tracemalloc.stop()
        del trainer
    (now, peak), part = trained
    size = 120_000 * 64 * 4
    assert now < size * 1.1 and peak < size * 1.3
    expected = sample[np.arange(120_000) * 2]
    np.testing.assert_allclose(part, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_a_session_that_gets_no_memory_to_open_again_says_so_and_puts_the_resource_back(
    metric: str, double: Gpu, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmm import mr

    model = la.train(write(vectors(ROWS, DIM)), "vector", metric=metric, backend="cpu", **SHAPE)
    index = _cuvs_calls.Cuvs.index
    short = []

    def scarce(self: Any, *arguments: Any) -> Any:
        # The second index of dot is as large as the first.
        if len(short) > (metric == "dot"):
            raise MemoryError("std::bad_alloc: out_of_memory: CUDA error")
        short.append(arguments)
        return index(self, *arguments)

    with _CudaDevice(0):
        before = mr.get_current_device_resource()
        library = _cuvs_calls.Cuvs()
        session = CuvsBackend().encoder(model).open(0, 0)
        rows = [
            library.to_device(np.zeros((10, DIM), np.float32)),
            library.empty((10,), np.uint32),
            library.empty((10, model.pq_code_width), np.uint8),
        ]
        double.control.calls, double.control.no_handle_at = 0, 1
        with pytest.raises(la.DeviceMemoryError):
            session.encode(*rows)
        monkeypatch.setattr(_cuvs_calls.Cuvs, "index", scarce)
        short.extend([None] * 2)
        for _ in range(2):
            with pytest.raises(la.DeviceMemoryError, match="out of device memory"):
                session.encode(*rows)
        assert session.without_python(10) is None
        session.finish()
        monkeypatch.setattr(_cuvs_calls.Cuvs, "index", index)
        session.encode(*rows)
        monkeypatch.setattr(_cuvs_calls.Cuvs, "index", scarce)
        double.control.calls, double.control.no_handle_at = 0, 1
        for _ in range(2):
            with pytest.raises(la.DeviceMemoryError):
                session.encode(*rows)
        session.close()
        assert mr.get_current_device_resource() is before
        session.close()
        del rows


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_memory_for_what_comes_out_that_is_not_there(
    metric: str, double: Gpu, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = vectors(ROWS, DIM)
    model = la.train(write(array), "vector", metric=metric, backend="cpu", **SHAPE)

    def scarce(*_: Any) -> Any:
        raise MemoryError("std::bad_alloc: out_of_memory: CUDA error")

    encoder = CuvsBackend().encoder(model)
    with _CudaDevice(0):
        session = encoder.open(0, 2)
        monkeypatch.setattr(_cuvs_calls.Cuvs, "empty", scarce)
        with pytest.raises(la.DeviceMemoryError, match="out of device memory"):
            encoder.encode(prepared(array[:10]))
        if metric == "dot":
            with pytest.raises(la.DeviceMemoryError, match="out of device memory"):
                session.without_python(10)
        session.close()
