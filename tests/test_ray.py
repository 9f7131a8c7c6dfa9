"""The driver for Ray, on a cluster on this machine with logical GPUs."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from commits import before_commit, folders
from conftest import column, stored, stored_in, vectors
from lance_artifact import _run_commit
from lance_artifact import ray as driver
from local_s3 import BUCKET, s3_server
from test_extend import DIM, ROWS, K, M, append, segments

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

ray = pytest.importorskip("ray")

ASK: dict[str, Any] = {"num_partitions": K, "num_sub_vectors": M, "max_iters": 5}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # Workers see the tests' modules.
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


def build(ds: Any, run: Path, **options: Any) -> Any:
    return driver.create_index(
        ds, "vector", artifact_uri=run, **{**ASK, "num_workers": 2, "num_shards": 3, **options}
    )


def test_the_same_index_as_in_one_process(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    la.create_index(ds, "vector", name="plain", backend="cpu", **ASK)
    seen: list[Any] = []
    assert build(ds, tmp_path / "run", name="ray", progress=seen.append) is ds
    assert stored(ds, "plain") == stored(ds, "ray")
    assert {p.stage for p in seen} >= {"shuffle", "merge_partitions"}
    # Again, and nothing happens; by its path too, and without a worker.
    version = ds.version
    assert build(ds.uri, tmp_path / "run", name="ray").version == version
    # Also where nothing may be replaced: what is there is the run's own.
    again = {"name": "new", "replace": False}
    version = build(ds, tmp_path / "new", **again).version
    assert build(ds, tmp_path / "new", **again).version == version
    with pytest.raises(la.IndexExistsError):
        build(ds, tmp_path / "newer", **again)
    with pytest.raises(la.InvalidInputError, match="cannot be taken up"):
        build(ds, tmp_path / "newer", name="newer", backend="pylance-cuvs")
    assert not (tmp_path / "newer").exists()
    with pytest.raises(la.InvalidInputError, match="resume: got False"):
        build(ds, tmp_path / "run", name="ray", resume=False)


def test_another_shape_than_the_codebooks_is_refused(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", num_bits=4, backend="cpu", **ASK)
    given = {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook}
    for other in ({"num_bits": 8}, {"num_partitions": K + 1}):
        with pytest.raises(la.InvalidInputError, match=next(iter(other))):
            build(ds, tmp_path / "run", **given, **other)
    assert not (tmp_path / "run").exists()
    assert build(ds, tmp_path / "run", **given).describe_indices()[0].details["compression"]["num_bits"] == 4


def test_a_callers_model_and_graphs(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, max_iters=3, backend="cpu")
    driver.create_index(
        ds,
        "vector",
        "IVF_HNSW_PQ",
        artifact_uri=tmp_path / "run",
        ivf_centroids=model.ivf_centroids,
        pq_codebook=model.pq_codebook,
        num_sub_vectors=M,
        num_workers=2,
        keep_artifact=False,
    )
    assert la.IvfPqModel.from_index(ds, "vector_idx") == model
    assert not (tmp_path / "run").exists()


def test_extend(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    la.create_index(ds, "vector", backend="cpu", **ASK)
    append(ds, vectors(500, DIM, seed=1))
    plain = lance.dataset(ds.uri).shallow_clone(f"{ds.uri}-plain", lance.dataset(ds.uri).version)
    one = la.extend_index(plain, "vector_idx", measure_fit=False)
    done = driver.extend_index(ds, "vector_idx", artifact_uri=tmp_path / "run", num_workers=2)
    assert done.num_rows == 500 and done.num_segments == 2 and done.segment in segments(ds)
    assert stored_in(ds, "vector_idx", done.segment) == stored_in(plain, "vector_idx", one.segment)
    again = driver.extend_index(ds, "vector_idx", artifact_uri=tmp_path / "run", num_workers=2)
    assert again.segment == done.segment and len(segments(ds)) == 2
    assert driver.extend_index(ds, "vector_idx", artifact_uri=tmp_path / "other").segment is None


def test_an_extension_of_an_index_that_was_built_anew_without_it(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    """Of the same model: what the run had added is not there any more, and is added again."""
    ds = write(vectors(ROWS, DIM))
    la.create_index(ds, "vector", backend="cpu", **ASK)
    append(ds, vectors(500, DIM, seed=1))
    done = driver.extend_index(ds, "vector_idx", artifact_uri=tmp_path / "run", num_workers=1)
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    ds.drop_index("vector_idx")
    la.create_index(
        ds,
        "vector",
        fragment_ids=[0, 1, 2],
        ivf_centroids=model.ivf_centroids,
        pq_codebook=model.pq_codebook,
        num_sub_vectors=M,
        backend="cpu",
    )
    again = driver.extend_index(ds, "vector_idx", artifact_uri=tmp_path / "run", num_workers=1)
    assert again.segment != done.segment and segments(ds)[str(again.segment)] == {3}
    assert (again.num_rows, again.num_segments) == (500, 2)


def test_an_index_that_is_dropped_while_it_is_extended(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = write(vectors(ROWS, DIM))
    la.create_index(ds, "vector", backend="cpu", **ASK)
    append(ds, vectors(500, DIM, seed=1))
    there = folders(ds)
    before_commit(monkeypatch, lambda: lance.dataset(ds.uri).drop_index("vector_idx"), _run_commit)
    with pytest.raises(la.CommitConflictError, match="not there any more"):
        driver.extend_index(ds, "vector_idx", artifact_uri=tmp_path / "run", num_workers=1)
    assert lance.dataset(ds.uri).describe_indices() == [] and folders(ds) == there
    with pytest.raises(la.InvalidInputError, match="does not exist"):
        driver.extend_index(ds, "vector_idx", artifact_uri=tmp_path / "run", num_workers=1)


def test_a_sample_that_is_more_than_a_worker_holds(
    write: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ds = write(vectors(120_000, 64), max_rows_per_file=30_000)
    with caplog.at_level(logging.WARNING, "lance_artifact"):
        build(
            ds, tmp_path / "run", num_partitions=400, num_sub_vectors=8, num_shards=4, memory_limit=40 << 20
        )
    assert "more do not fit a worker's memory" in caplog.text
    found = la.evaluate(ds, "vector_idx", num_queries=30, nprobes=[400], refine_factors=[20]).settings[0]
    one = write(vectors(120_000, 64), "one.lance")
    la.create_index(one, "vector", backend="cpu", **{**ASK, "num_partitions": 400, "num_sub_vectors": 8})
    plain = la.evaluate(one, "vector_idx", num_queries=30, nprobes=[400], refine_factors=[20]).settings[0]
    assert found.recall > plain.recall - 0.05


@pytest.mark.parametrize("by_handle", [False, True])
def test_dataset_and_run_in_a_store(by_handle: bool) -> None:
    with s3_server() as options:
        uri = f"s3://{BUCKET}/t.lance"
        ds = lance.write_dataset(
            pa.table({"vector": column(vectors(ROWS, DIM))}),
            uri,
            storage_options=options,
            max_rows_per_file=1000,
        )
        given = {} if by_handle else {"storage_options": options}
        place = f"s3://{BUCKET}/run"
        built = driver.create_index(
            ds if by_handle else uri,
            "vector",
            artifact_uri=place,
            num_workers=2,
            num_shards=3,
            **ASK,
            **given,
        )
        assert built.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0
        lance.write_dataset(
            pa.table({"vector": column(vectors(50, DIM))}), uri, mode="append", storage_options=options
        )
        done = driver.extend_index(
            ds if by_handle else uri, "vector_idx", artifact_uri=f"s3://{BUCKET}/more", num_workers=1, **given
        )
        assert done.num_rows == 50


def test_more_than_there_is_is_refused_at_once(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    start = time.monotonic()
    for options, match in (
        (
            {"num_workers": 3, "ray_remote_args": {"num_gpus": 1}},
            "3 workers of 1 GPU need 3, the cluster has 2",
        ),
        ({"num_workers": 9}, "9 workers of 1 CPU need 9, the cluster has 4"),
        ({"ray_remote_args": {"resources": {"tpu": 1}}}, "2 workers of 1 tpu need 2, the cluster has 0"),
    ):
        with pytest.raises(la.InvalidInputError, match=match):
            build(ds, tmp_path / "run", **options)
    assert time.monotonic() - start < 10 and not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_never_the_cpu(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    with pytest.raises(la.BackendUnavailableError, match="backend 'cuvs' cannot run here"):
        build(ds, tmp_path / "run", ray_remote_args={"num_gpus": 1})
    # Its logical GPUs take the CPU where that is said.
    build(ds, tmp_path / "cpu", ray_remote_args={"num_gpus": 1}, backend="cpu")


class Dying(driver.Worker):
    """A worker that ends its process, as often as a file says, at a stage."""

    def _die(self, stage: str) -> None:
        for note in sorted(Path(os.environ["DYING"]).glob(f"{stage}-*")):
            try:
                note.unlink()
            except FileNotFoundError:
                continue
            os._exit(1)

    def train(self, model: Any, ivf_centroids: Any, parts: Any = None) -> str:
        self._die("train")
        found = super().train(model, ivf_centroids, parts)
        self._die("trained")
        return found

    def encode(self, shard: int) -> int:
        self._die(f"encode{shard}")
        rows = super().encode(shard)
        self._die(f"encoded{shard}")
        return rows


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(driver, "Worker", Dying)
    monkeypatch.setattr(driver, "PAUSE", 0.05)

    def at(stage: str, times: int) -> None:
        for n in range(times):
            (notes / f"{stage}-{n}").touch()

    return at


@pytest.mark.parametrize("stage", ["train", "trained", "encode0", "encode2", "encoded1"])
def test_workers_that_die(
    write: Callable[..., Any], tmp_path: Path, dying: Callable[..., None], stage: str
) -> None:
    ds = write(vectors(ROWS, DIM))
    la.create_index(ds, "vector", name="plain", backend="cpu", **ASK)
    dying(stage, 2)
    environment = {"env_vars": {"DYING": str(tmp_path / "notes")}}
    build(ds, tmp_path / "run", name="ray", ray_remote_args={"runtime_env": environment})
    assert stored(ds, "plain") == stored(ds, "ray")
    assert not list((tmp_path / "notes").iterdir())


def test_a_poisoned_shard_ends_the_job_and_the_rest_stays(
    write: Callable[..., Any], tmp_path: Path, dying: Callable[..., None]
) -> None:
    ds = write(vectors(ROWS, DIM))
    dying("encode1", 50)
    environment = {"env_vars": {"DYING": str(tmp_path / "notes")}}
    with pytest.raises(la.StorageError, match="shard 1: its worker died 3 times"):
        build(ds, tmp_path / "run", ray_remote_args={"runtime_env": environment})
    status = la.Run.open(tmp_path / "run").status()
    assert status.shards == (True, False, True)
    for note in (tmp_path / "notes").iterdir():
        note.unlink()
    build(ds, tmp_path / "run", ray_remote_args={"runtime_env": environment})
    assert len(segments(ds)) == 1


def test_a_worker_for_which_there_is_no_room_is_not_waited_for(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    """Somebody else has one of the GPUs, which Ray counts all the same: the other worker does all shards."""

    @ray.remote(num_gpus=1)
    class Other:
        def here(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.here.remote())
    ds, ends = write(vectors(ROWS, DIM)), time.monotonic() + 120
    try:
        with la.cancel_on(lambda: time.monotonic() > ends):
            build(ds, tmp_path / "run", backend="cpu", ray_remote_args={"num_gpus": 1})
    finally:
        ray.kill(other)
    assert len(segments(ds)) == 1


class Short(Dying):
    """A worker that the node ends for its memory, or that cannot open the dataset."""

    def _die(self, stage: str) -> None:
        for note in sorted(Path(os.environ["DYING"]).glob(f"{stage}-*")):
            note.unlink()
            raise ray.exceptions.OutOfMemoryError("the node is out of memory")

    def ready(self) -> bool:
        notes = Path(os.environ["DYING"])
        if (notes / "closed").exists():
            (notes / f"started-{os.getpid()}").touch()
            raise la.InvalidInputError("the dataset cannot be opened here")
        return super().ready()


def test_a_worker_that_its_node_ends_for_its_memory(
    write: Callable[..., Any], tmp_path: Path, dying: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "Worker", Short)
    ds = write(vectors(ROWS, DIM))
    dying("encode1", 2)
    environment = {"env_vars": {"DYING": str(tmp_path / "notes")}}
    build(ds, tmp_path / "run", ray_remote_args={"runtime_env": environment})
    assert len(segments(ds)) == 1 and not list((tmp_path / "notes").iterdir())


def test_a_worker_that_cannot_open_the_dataset_says_so_at_once(
    write: Callable[..., Any], tmp_path: Path, dying: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "Worker", Short)
    ds, notes = write(vectors(ROWS, DIM)), tmp_path / "notes"
    (notes / "closed").touch()
    with pytest.raises(la.InvalidInputError, match="cannot be opened here"):
        build(ds, tmp_path / "run", ray_remote_args={"runtime_env": {"env_vars": {"DYING": str(notes)}}})
    assert len(list(notes.glob("started-*"))) <= 2, "each of two workers once"


class Endless(driver.Worker):
    """A worker that says that it has come to a stage, and stays there."""

    def _stay(self, stage: str) -> None:
        notes = Path(os.environ["ENDLESS"])
        if (notes / stage).exists():
            (notes / "there").touch()
            time.sleep(3600)

    def train(self, model: Any, ivf_centroids: Any, parts: Any = None) -> str:
        self._stay("train")
        return super().train(model, ivf_centroids, parts)

    def encode(self, shard: int) -> int:
        self._stay("encode")
        return super().encode(shard)


@pytest.mark.parametrize("stage", ["train", "encode"])
def test_cancelling_does_not_wait_for_workers(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    ds = write(vectors(ROWS, DIM))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / stage).touch()
    environment = {"env_vars": {"ENDLESS": str(notes)}}
    with monkeypatch.context() as patched:
        patched.setattr(driver, "Worker", Endless)
        with la.cancel_on((notes / "there").exists), pytest.raises(la.CancelledError):
            build(ds, tmp_path / "run", ray_remote_args={"runtime_env": environment})
    assert la.Run.open(tmp_path / "run").status().is_trained == (stage == "encode")
    assert ds.describe_indices() == []
    build(ds, tmp_path / "run")
    assert len(segments(ds)) == 1


def test_an_error_for_good_comes_as_itself_and_soon(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    run = la.Run.create(la.plan(ds, "vector", backend="cpu", num_shards=3, calibrate=False, **ASK, replace=True), tmp_path / "run")  # fmt: skip
    other = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, seed=3, max_iters=2, backend="cpu")
    la.build_artifact(ds, "vector", other, run.shard_uri(1), fragment_ids=[1], backend="cpu")
    with pytest.raises(la.ArtifactMismatchError, match="is not shard 1 of this run"):
        build(ds, tmp_path / "run")


def test_errors_survive_the_way() -> None:
    from lance_artifact import exceptions

    for name in exceptions.__all__:
        kind = getattr(exceptions, name)
        error = pickle.loads(pickle.dumps(kind("what happened")))
        assert type(error) is kind and str(error) == "what happened"


def test_lance_ray_as_it_is_encodes_through_us(write: Callable[..., Any]) -> None:
    """What its workers do: pylance's own calls, in processes that have imported the package by a setup hook."""

    @ray.remote(num_cpus=1, runtime_env={"worker_process_setup_hook": "lance_artifact.register"})
    def work(uri: str, fragments: list[int], centroids: Any, codebook: Any) -> Any:
        from lance_artifact import _uncommitted
        from lance_artifact.backends.cpu import CpuBackend

        # No GPU is here: the CPU stands for it.
        _uncommitted.resolve_accelerator = lambda *_: CpuBackend()
        return lance.dataset(uri).create_index_uncommitted(
            "vector",
            "IVF_PQ",
            accelerator="cuvs",
            fragment_ids=fragments,
            ivf_centroids=centroids,
            pq_codebook=codebook,
            num_partitions=len(centroids),
            num_sub_vectors=M,
        )

    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, max_iters=5, backend="cpu")
    parts = ray.get(
        [work.remote(ds.uri, ids, model.ivf_centroids, model.pq_codebook) for ids in ([0], [1, 2])]
    )
    merged = ds.merge_existing_index_segments(parts)
    ds.commit_existing_index_segments("both", "vector", [merged])
    la.create_index(
        ds,
        "vector",
        name="plain",
        ivf_centroids=model.ivf_centroids,
        pq_codebook=model.pq_codebook,
        num_sub_vectors=M,
        backend="cpu",
    )
    assert stored(ds, "both") == stored(ds, "plain")
    assert np.isfinite(
        ds.to_table(nearest={"column": "vector", "q": vectors(1, DIM)[0], "k": 5})["_distance"]
    ).all()


INTERRUPTED = """
import sys, lance_artifact.ray, ray
if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    lance_artifact.ray.create_index(
        sys.argv[1], "vector", artifact_uri=sys.argv[2], num_partitions=64, num_sub_vectors=8, num_shards=8, num_workers=1
    )
"""


def test_ctrl_c_leaves_a_run_that_goes_on(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(400_000, 64), max_rows_per_file=50_000)
    run = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", INTERRUPTED, ds.uri, str(run)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (run / "shards" / "00000" / "manifest.json").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode != 0 and b"KeyboardInterrupt" in error
    status = la.Run.open(run).status()
    assert status.is_trained and 0 < sum(status.shards) < 8 and status.committed is None
    la.resume_run(run, ds, backend="cpu")
    assert la.Run.open(run).status().committed is not None and len(segments(ds)) == 1
    assert la.clean_run(run, ds, dry_run=True) == []
