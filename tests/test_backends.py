"""Who can train and encode here, what the others say they lack, and the bridge to `lance_cuvs`."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_artifact as la
from conftest import Gpu, leftovers, real_driver, stored, vectors
from lance_artifact.backends import DatasetBackend, pylance_cuvs, resolve_accelerator
from lance_artifact.backends.cpu import CpuBackend

K, M, DIM, ROWS = 12, 8, 32, 6000
SHAPE = {"num_partitions": K, "num_sub_vectors": M}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lance_artifact.cli", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(real_driver(), reason="this machine has a driver")
def test_without_cuda_everything_says_what_is_missing() -> None:
    done = run("backends")
    assert done.returncode == 0
    assert "cpu: available" in done.stdout
    assert "missing driver: the NVIDIA driver is not installed or not visible" in done.stdout
    assert "--gpus all" in done.stdout
    found = json.loads(run("backends", "--json").stdout)
    assert found["cuvs"]["details"]["cuda_driver"] is None
    assert found["cuda"]["devices"] == []
    for backend, package, advice in (
        ("cuvs", "cuvs", "pip install cuvs-cu13 nvidia-cuda-runtime"),
        ("pylance-cuvs", "lance_cuvs", "pip install pylance-cuvs"),
    ):
        advised = any(advice in reason for reason in found[backend]["missing"])
        assert advised == (find_spec(package) is None)


@pytest.mark.skipif(real_driver(), reason="this machine has a driver")
def test_a_backend_as_an_object_is_refused_too(tmp_path: Path) -> None:
    script = f"""
import lance, numpy as np, pyarrow as pa, lance_artifact as la
from lance_artifact.backends.cuvs import CuvsBackend
column = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(3000 * 8, "f4")), 8)
ds = lance.write_dataset(pa.table({{"vector": column}}), {str(tmp_path / "t.lance")!r})
try:
    la.train(ds, "vector", num_partitions=2, num_sub_vectors=2, backend=CuvsBackend())
except la.BackendUnavailableError as error:
    print("refused", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "refused" in done.stdout, done.stderr
    assert "driver" in done.stdout


def test_a_driver_older_than_the_package_is_said(double: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from lance_artifact.backends import _cuda, cuvs

    monkeypatch.setattr(cuvs, "installed_distribution", lambda: ("cuvs-cu13", "26.10.0"))
    assert la.available_backends()["cuvs"].ok
    found = {**_cuda.probe(), "driver": (12, 8)}
    monkeypatch.setattr(_cuda, "probe", lambda: found)
    assert "it runs CUDA 12.8, and cuvs-cu13 needs 13" in la.available_backends()["cuvs"].missing[0]
    found = {**found, "driver": (13, 0), "devices": [{**found["devices"][0], "compute_capability": (6, 1)}]}
    assert "compute capability 6.1, cuVS needs 7.5" in la.available_backends()["cuvs"].missing[0]


def test_a_driver_without_a_device_is_said(double: Gpu) -> None:
    double.reset(devices=0)
    assert (
        "device: the NVIDIA driver (CUDA 13.0) sees no GPU; look at nvidia-smi"
        in la.available_backends()["cuvs"].missing[0]
    )


def test_two_devices_are_described(double: Gpu, capsys: pytest.CaptureFixture[str]) -> None:
    from lance_artifact.cli import main

    assert main(["backends", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cuvs"]["available"]
    assert [d["name"] for d in found["cuda"]["devices"]] == ["Double A", "Double B"]
    assert found["cuda"]["devices"][1]["compute_capability"] == [9, 0]
    assert found["cuda"]["devices"][1]["free_memory"] == 1 << 30
    assert found["cuvs"]["details"]["devices"][0]["free_memory"] is None
    assert main(["backends"]) == 0
    assert "CUDA device 1: Double B, compute capability 9.0, 1.0 of 1.0 GiB free" in capsys.readouterr().out


def test_a_cuvs_that_cannot_be_imported_is_said(double: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pylibraft.common", None)
    missing = la.available_backends()["cuvs"].missing
    assert len(missing) == 1
    assert "cannot be imported" in missing[0]
    assert "nvidia-cuda-runtime" in missing[0]


def test_auto_takes_the_gpu_where_there_is_one(double: Gpu, write: Any) -> None:
    ds = write(vectors(ROWS, DIM))
    la.create_index(ds, "vector", sample_rate=16, **SHAPE)
    assert double.control.calls > 0
    calls = double.control.calls
    double.reset(devices=0)
    double.control.calls = calls
    la.create_index(ds, "vector", sample_rate=16, replace=True, **SHAPE)
    assert double.control.calls == calls


class Their:
    """A backend of somebody else's, with all that one may have."""

    name = "their"

    def __init__(self, in_any_order: bool = False) -> None:
        self.takes_any_order, self.asked, self.sample = in_any_order, [], None

    def availability(self) -> la.Availability:
        return la.Availability(True)

    def on_devices(self, devices: list[int]) -> Their:
        self.asked.append(("devices", devices))
        return self

    def within_device_memory(self, device_memory_limit: int) -> Their:
        self.asked.append(("device_memory_limit", device_memory_limit))
        return self

    def check_fits(self, params: la.TrainParams, dimension: int) -> None:
        assert self.sample is None, "asked after the sample was drawn"
        self.asked.append(("fits", params.num_partitions, dimension))
        if dimension > DIM:
            raise la.DeviceMemoryError(f"training: dimension {dimension} does not fit")

    def train(self, sample: Any, params: la.TrainParams, progress: Any = None) -> la.IvfPqModel:
        self.sample = np.stack(sample.to_numpy(zero_copy_only=False))
        return CpuBackend().train(sample, params, progress)

    def encoder(self, model: la.IvfPqModel) -> Any:
        return la.CpuEncoder(model)


@pytest.mark.parametrize("in_any_order", [True, False])
def test_what_a_backend_may_have_is_used(in_any_order: bool, write: Any) -> None:
    array = vectors(ROWS, DIM)
    ds, backend = write(array), Their(in_any_order)
    la.create_index(ds, "vector", backend=backend, devices=[1, 0], device_memory_limit=1 << 30, **SHAPE)
    assert backend.asked == [
        ("devices", [1, 0]), ("device_memory_limit", 1 << 30), ("fits", K, DIM)
    ]  # fmt: skip
    assert backend.sample.shape == array.shape, "all rows are the sample"
    assert np.array_equal(backend.sample, array) == in_any_order
    assert sum(len(partition) for partition in stored(ds, "vector_idx")) == ROWS


def test_a_backend_that_cannot_hold_a_sample_is_asked_first(write: Any) -> None:
    ds, backend = write(vectors(ROWS, 2 * DIM)), Their()
    with pytest.raises(la.DeviceMemoryError, match="does not fit"):
        la.create_index(ds, "vector", backend=backend, **SHAPE)
    assert backend.sample is None and not ds.describe_indices() and not leftovers(Path(ds.uri, "_indices"))


@pytest.fixture
def bridge(double: Gpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The double of lance_cuvs on a machine without the backend cuvs."""
    import lance_cuvs

    from lance_artifact.backends import cuvs

    monkeypatch.setattr(pylance_cuvs, "_installed_version", lambda: "0.1.0b2")
    monkeypatch.setattr(cuvs, "find_spec", lambda name: None)
    lance_cuvs.CALLS.clear()
    return lance_cuvs


def test_the_bridge_finalizes_the_artifact_as_it_is(bridge: Any, write: Any) -> None:
    array = vectors(ROWS, DIM)
    ds = write(array)
    assert isinstance(resolve_accelerator("cuvs"), DatasetBackend)
    ds.create_index(
        "vector", "IVF_PQ", metric="cosine", accelerator="cuvs", sample_rate=16, max_iters=7, **SHAPE
    )
    assert sum(map(len, stored(ds, "vector_idx"))) == ROWS
    trained, written = bridge.CALLS
    assert trained[0] == "train_ivf_pq"
    assert trained[2] == {
        "metric_type": "Cosine", "num_partitions": K, "num_sub_vectors": M, "sample_rate": 16, "max_iters": 7, "num_bits": 8,
        "filter_nan": True,
    }  # fmt: skip
    assert written[0] == "build_ivf_pq_artifact"
    found = ds.to_table(
        nearest={"column": "vector", "q": array[5], "k": 1, "nprobes": K, "refine_factor": 10}
    )
    assert found["id"].to_pylist() == [5]


def test_the_bridge_refuses_what_it_would_get_wrong(bridge: Any, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    backend = pylance_cuvs.PylanceCuvsBackend()
    for parameters, message in (
        ({"metric": "dot"}, "raw vectors"),
        ({"num_bits": 4}, "8 bits"),
        ({"ivf_centroids": vectors(K, DIM)}, "its own centroids"),
        ({"fragment_ids": [0]}, "reads all fragments"),
    ):
        with pytest.raises(la.InvalidInputError, match=message):
            la.train(ds, "vector", backend=backend, **{**SHAPE, **parameters})
    model = la.train(ds, "vector", backend="cpu", sample_rate=16, **SHAPE)
    with pytest.raises(la.InvalidInputError, match="trained in this process"):
        la.build_artifact(ds, "vector", model, tmp_path / "a", backend=backend)
    model = la.train(ds, "vector", backend=backend, sample_rate=16, **SHAPE)
    for parameters in ({"memory_limit": 1 << 28}, {"overwrite": True}, {"batch_rows": 5}):
        with pytest.raises(la.InvalidInputError, match="writes its artifact itself"):
            la.build_artifact(ds, "vector", model, tmp_path / "a", backend=backend, **parameters)
    with pytest.raises(la.InvalidInputError, match="local folder"):
        la.build_artifact(ds, "vector", model, "s3://bucket/a", backend=backend)
    older = ds.version
    ds.delete("id = 3")
    with pytest.raises(la.ArtifactMismatchError, match="reads the newest version"):
        la.build_artifact(ds.checkout_version(older), "vector", model, tmp_path / "new/a", backend=backend)
    assert leftovers(tmp_path / "a") == [] and not (tmp_path / "new").exists()


def test_what_the_bridge_writes_is_read_by_its_uri(bridge: Any, write: Any, tmp_path: Path) -> None:
    """With the folder's own model and with the one given, beside an artifact of ours with the same model."""
    array = vectors(ROWS, DIM)
    array[[3, 70]] = np.nan
    ds = write(array)
    backend = pylance_cuvs.PylanceCuvsBackend()
    model = la.train(ds, "vector", backend=backend, sample_rate=16, **SHAPE)
    # A partition in the middle has no rows, and no list in the files.
    emptied = la.build_artifact(ds, "vector", model, tmp_path / "before", backend="cpu").read_partition(5)
    ids = [(row >> 32) * 2000 + (row & 0xFFFFFFFF) for row in emptied.read_all()["_rowid"].to_pylist()]
    ds.delete(f"id in ({', '.join(map(str, ids))})")
    theirs = la.build_artifact(ds, "vector", model, tmp_path / "theirs", backend=backend)
    assert (theirs.num_rows, theirs.num_partitions) == (ROWS - 2 - len(ids), K)
    assert theirs.verify().ok
    ours = la.build_artifact(ds, "vector", model, tmp_path / "ours", backend="cpu")
    assert ours.read_partition(5).read_all().num_rows == 0
    for partition in range(K):
        expected, found = (a.read_partition(partition).read_all() for a in (ours, theirs))
        assert found.sort_by("_rowid").equals(expected.sort_by("_rowid"))
    ds = la.finalize(ds, "vector", ours, name="ours")
    covered = {"fragment_ids": [f.fragment_id for f in ds.get_fragments()]}
    ds = ds.create_index(
        "vector",
        "IVF_PQ",
        name="theirs",
        precomputed_partition_artifact_uri=str(tmp_path / "theirs"),
        **covered,
    )
    assert stored(ds, "theirs") == stored(ds, "ours")
    la.finalize(ds, "vector", tmp_path / "theirs", model=model, name="with", **covered)
    assert stored(ds, "with") == stored(ds, "ours")
    (tmp_path / "theirs/metadata.lance").unlink()
    with pytest.raises(la.CorruptArtifactError, match="only it says how many there are"):
        la.finalize(ds, "vector", tmp_path / "theirs", model=model, name="without", **covered)


def test_rows_that_the_bridge_lost_are_missed(bridge: Any, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    backend = pylance_cuvs.PylanceCuvsBackend()
    model = la.train(ds, "vector", backend=backend, sample_rate=16, **SHAPE)
    la.build_artifact(ds, "vector", model, tmp_path / "a", backend=backend)
    partitions = [la.Artifact.open(tmp_path / "a").read_partition(p).read_all() for p in range(K)]
    longest = max(range(K), key=lambda p: len(partitions[p]))
    partitions[longest] = partitions[longest].slice(1)
    bridge.write_sorted(tmp_path / "a/sorted_0.lance", partitions)
    with pytest.raises(la.ArtifactMismatchError, match=r"1 rows of the fragments .* are in no artifact"):
        la.finalize(ds, "vector", tmp_path / "a", fragment_ids=[f.fragment_id for f in ds.get_fragments()])
    assert ds.list_indices() == []


def test_an_unfinished_build_of_the_bridge_is_refused(bridge: Any, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    backend = pylance_cuvs.PylanceCuvsBackend()
    model = la.train(ds, "vector", backend=backend, sample_rate=16, **SHAPE)
    la.build_artifact(ds, "vector", model, tmp_path / "a", backend=backend)
    (tmp_path / "a/unsorted.lance").write_bytes(b"")
    with pytest.raises(la.ArtifactNotFoundError, match=r"unsorted\.lance is there"):
        la.Artifact.open(tmp_path / "a")
    (tmp_path / "a/unsorted.lance").unlink()
    (tmp_path / "a/sorted_0.lance").unlink()
    with pytest.raises(
        la.ArtifactNotFoundError, match=r"metadata\.lance is there: this is a build that has not finished"
    ):
        la.Artifact.open(tmp_path / "a")


def test_a_training_that_loads_much_is_said_before_it_starts(
    bridge: Any, write: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ds = write(vectors(ROWS, DIM))
    backend = pylance_cuvs.PylanceCuvsBackend()
    la.train(ds, "vector", backend=backend, sample_rate=16, **SHAPE)
    assert "loads the whole column" not in caplog.text
    monkeypatch.setattr(pylance_cuvs, "QUIETLY", ROWS * DIM * 4 - 1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("trained")

    monkeypatch.setattr(bridge, "train_ivf_pq", refuse)
    with pytest.raises(RuntimeError, match="trained"):
        la.train(ds, "vector", backend=backend, sample_rate=16, **SHAPE)
    assert "loads the whole column 'vector' into memory" in caplog.text


def test_the_bridge_calls_by_signature(bridge: Any) -> None:
    for name in ("train_ivf_pq", "build_ivf_pq_artifact"):
        assert "storage_options" not in inspect.signature(getattr(bridge, name)).parameters


def test_a_run_is_not_begun_with_the_bridge(bridge: Any, write: Any, tmp_path: Path) -> None:
    """Nobody could take it up: it encodes with what the same process has trained, and writes as it goes."""
    ds = write(vectors(ROWS, DIM))
    place, backend = tmp_path / "run", pylance_cuvs.PylanceCuvsBackend()
    ask = {**SHAPE, "sample_rate": 16}
    planned = la.plan(ds, "vector", backend="cpu", calibrate=False, **ask)
    theirs = la.plan(ds, "vector", backend="pylance-cuvs", calibrate=False, **ask)
    for refused in (
        lambda: la.create_index(ds, "vector", artifact_uri=place, resume=True, backend=backend, **ask),
        lambda: la.create_index(ds, "vector", artifact_uri=place, resume=True, accelerator="cuvs", **ask),
        lambda: la.plan(ds, "vector", artifact_uri=place, backend=backend, **ask),
        lambda: la.Run.create(theirs, place),
    ):
        with pytest.raises(la.InvalidInputError, match=r"'pylance-cuvs'.*cannot be taken up"):
            refused()
        assert not place.exists() and bridge.CALLS == []
    run = la.Run.create(planned, place)
    for step in (
        lambda: run.train(backend=backend),
        lambda: la.resume_run(place, backend="pylance-cuvs"),
        lambda: la.create_index(ds, "vector", artifact_uri=place, backend="pylance-cuvs", **ask),
    ):
        with pytest.raises(la.InvalidInputError, match="cannot be taken up"):
            step()
    run.train(backend="cpu")
    with pytest.raises(la.InvalidInputError, match="cannot be taken up"):
        run.encode(0, backend=backend)
    assert bridge.CALLS == [] and run.status().shards == (False,)
    assert len(la.resume_run(place, ds, backend="cpu").describe_indices()) == 1


def test_a_shard_that_the_bridge_wrote_is_one(bridge: Any, write: Any, tmp_path: Path) -> None:
    """By hand, in the place of a shard: it counts, is finalized, and goes with its run. Nothing else of its folder does."""
    ds = write(vectors(ROWS, DIM))
    place, backend = tmp_path / "run", pylance_cuvs.PylanceCuvsBackend()
    model = la.train(ds, "vector", backend=backend, sample_rate=16, **SHAPE)
    run = la.Run.create(la.plan(ds, "vector", model=model, backend="cpu", calibrate=False), place)
    run.train(model=model)
    shard = Path(run.shard_uri(0))
    la.build_artifact(ds, "vector", model, shard, backend=backend)
    assert run.status().shards == (True,) and run.encode(0).num_rows == ROWS
    # What has no manifest is no attempt of ours, however old it is.
    for file in shard.iterdir():
        os.utime(file, (1, 1))
    assert la.clean_run(place, elsewhere=True) == [] and len(list(shard.iterdir())) == 2
    run.finalize(ds)
    assert sum(map(len, stored(ds, "vector_idx"))) == ROWS
    (shard / "notes.txt").write_text("mine")
    listed = la.clean_run(place, everything=True, dry_run=True)
    assert [(each.kind, each.files) for each in listed] == [("artifact", 2), ("run", 3)]
    assert la.clean_run(place, everything=True) == listed
    assert [p.name for p in place.rglob("*") if p.is_file()] == ["notes.txt"]


def test_what_the_bridge_wrote_is_kept_only_where_it_is_wanted(
    bridge: Any, write: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ds = write(vectors(ROWS, DIM))
    place, ask = tmp_path / "some" / "where", {**SHAPE, "sample_rate": 16, "backend": "pylance-cuvs"}
    ds = la.create_index(ds, "vector", artifact_uri=place, keep_artifact=False, **ask)
    assert not place.exists() and caplog.text == ""
    assert sum(map(len, stored(ds, "vector_idx"))) == ROWS
    # Where it cannot write is known before it trains.
    bridge.CALLS.clear()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for uri in ("memory://a", tmp_path / "full"):
        with pytest.raises((la.InvalidInputError, la.ArtifactExistsError)):
            la.create_index(ds, "vector", name="b", artifact_uri=uri, **ask)
    assert bridge.CALLS == []
