"""What the process gives and takes: threads, the GIL, the end of the interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import LINUX, column, encoded, leftovers, vectors

PYTHON = Path(la.__file__).parent.parent
ROWS, DIM, M = 2000, 8, 2


def python(script: str, *arguments: str, timeout: float = 60, **options: Any) -> Any:
    """Run a script in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{PYTHON}:{Path(__file__).parent}", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, timeout=timeout, env=environment, **options,
    )  # fmt: skip


class Counter:
    """A thread of Python that counts whenever it gets the GIL, which it never keeps."""

    def __init__(self) -> None:
        self.count = 0
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop:
            self.count += 1
            time.sleep(0)

    def __enter__(self) -> Counter:
        # The GIL is never taken from whoever has it: the count grows only where it is given away.
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(1000)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        sys.setswitchinterval(self._interval)
        self._thread.join()


def big_model_arrays() -> tuple[pa.Array, pa.Array]:
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((20_000, 256), dtype=np.float32)
    codebook = rng.standard_normal((256, 256), dtype=np.float32)
    return column(centroids), column(codebook)


@pytest.mark.parametrize("what", ["model", "encoder", "drop"])
def test_other_threads_go_on(what: str, tmp_path: Path) -> None:
    """Constructors hash and copy a model, a dropped builder waits for threads and stores: all without the GIL."""
    centroids, codebook = big_model_arrays()
    model = la.IvfPqModel(centroids, codebook, num_sub_vectors=16)
    builder = [la.PartitionArtifactBuilder(tmp_path / "a", num_partitions=64, pq_code_width=64)]
    builder[0].append_batch(encoded(200_000, 64, 64))
    work: dict[str, Callable[[], Any]] = {
        "model": lambda: la.IvfPqModel(centroids, codebook, num_sub_vectors=16),
        "encoder": lambda: la.CpuEncoder(model),
        "drop": builder.clear,
    }
    with Counter() as counter:
        while counter.count == 0:
            time.sleep(0)
        # Work that is done in no time tells nothing: it is repeated until the other thread was seen to go on.
        before = counter.count
        work[what]()
        if what == "drop":
            for n in range(50):
                if counter.count > before:
                    break
                another = [
                    la.PartitionArtifactBuilder(tmp_path / f"b{n}", num_partitions=64, pq_code_width=64)
                ]
                another[0].append_batch(encoded(200_000, 64, 64))
                before = counter.count
                another.clear()
        assert counter.count > before
    builder.clear()
    assert leftovers(tmp_path) == []


DAEMON = """
import sys, threading, time
import lance, lance_artifact as la
folder, wait, what = sys.argv[1], float(sys.argv[2]), sys.argv[3]
ds = lance.dataset(f"{folder}/vectors.lance")
model = la.train(ds, "vector", num_partitions=4, num_sub_vectors=2, sample_rate=16, backend="cpu")
began = threading.Event()

def work():
    n = 0
    while True:
        began.set()
        if what == "artifact":
            la.build_artifact(ds, "vector", model, f"{folder}/artifacts/{n}", backend="cpu", overwrite=True, progress=print_nothing)
        else:
            la.create_index(ds, "vector", num_partitions=4, num_sub_vectors=2, sample_rate=16, backend="cpu", replace=True)
        n = (n + 1) % 3

def print_nothing(progress):
    sum(range(1000))

threading.Thread(target=work, daemon=True).start()
began.wait()
time.sleep(wait)
"""


@pytest.mark.parametrize("what", ["artifact", "index"])
def test_a_daemon_thread_that_builds_does_not_abort_the_process(
    what: str, write: Callable[..., Any], tmp_path: Path
) -> None:
    ds = write(vectors(ROWS, DIM))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for n in range(5):
        done = python(DAEMON, str(tmp_path), str(0.02 + 0.043 * n), what, env={"TMPDIR": str(scratch)})
        # An exception of the thread may be told; that it is killed within Rust is fatal.
        assert done.returncode == 0 and "fatal" not in done.stderr.lower() and "panick" not in done.stderr, (
            done.stderr
        )
    assert list(scratch.iterdir()) == []
    found = leftovers(tmp_path / "artifacts")
    assert not [f for f in found if "lance-artifact" in f], found
    for artifact in (tmp_path / "artifacts").glob("*"):
        assert la.Artifact.open(artifact).verify().ok
    versions = [lance.dataset(ds.uri, version=v["version"]) for v in lance.dataset(ds.uri).versions()]
    live = {s.uuid for at in versions for i in at.describe_indices() for s in i.segments}
    assert {p.name for p in Path(ds.uri, "_indices").glob("*")} == live


def test_an_open_builder_is_aborted_when_the_interpreter_exits(tmp_path: Path) -> None:
    script = """
import sys, lance_artifact as la
from conftest import encoded
kept = la.PartitionArtifactBuilder(sys.argv[1], num_partitions=8, pq_code_width=64, memory_limit=32 << 20)
for n in range(5):
    kept.append_batch(encoded(100_000, 8, 64, first=n * 100_000))
"""
    done = python(script, str(tmp_path / "a"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert leftovers(tmp_path) == []


def test_late_calls_are_refused_and_harmless(tmp_path: Path) -> None:
    script = """
import atexit, sys
def late():
    try:
        la.PartitionArtifactBuilder(sys.argv[1] + "/b", num_partitions=8, pq_code_width=4)
    except la.LanceArtifactError as error:
        print(error)
    kept.abort()
    print("aborted")
atexit.register(late)  # runs after what is registered later
import lance_artifact as la
kept = la.PartitionArtifactBuilder(sys.argv[1] + "/a", num_partitions=8, pq_code_width=4)
"""
    done = python(script, str(tmp_path))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "exiting" in done.stdout and "aborted" in done.stdout, done.stdout
    assert leftovers(tmp_path) == []


@LINUX
def test_importing_starts_no_thread() -> None:
    script = """
import os, lance
before = len(os.listdir("/proc/self/task"))
import lance_artifact
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert python(script, env={"OMP_NUM_THREADS": "1"}).stdout == "0\n"


STARVED = """
import os, resource, sys
import lance, lance_artifact as la
folder, more = sys.argv[1], int(sys.argv[2])
ds = lance.dataset(f"{folder}/vectors.lance")
ds.count_rows(), ds.schema, ds.get_fragments()[0].metadata
if len(sys.argv) > 3:
    # After everything is imported: another user may not read the packages.
    os.setgid(int(sys.argv[3])), os.setuid(int(sys.argv[3]))
limit = len(os.listdir("/proc/self/task")) + more
resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
trained = False
try:
    model = la.train(ds, "vector", num_partitions=4, num_sub_vectors=2, sample_rate=16, backend="cpu")
    trained = True
    artifact = la.build_artifact(ds, "vector", model, f"{folder}/out/{more}", backend="cpu")
    assert artifact.verify().ok and artifact.num_rows == 2000
    artifact.read_partition(0).read_all()
    print("done")
except la.StorageError as error:
    print("refused", "after" if trained else "before", "training:", error)
"""


@pytest.mark.skipif(
    not hasattr(os, "setuid") or os.getuid() != 0,
    reason="limits on threads do not bind root: needs to change the user",
)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads that the system has")
def test_threads_that_cannot_be_had_are_errors(write: Callable[..., Any], tmp_path: Path) -> None:
    """From a limit at which nothing works to one at which all does: an end, a typed error, nothing left behind."""
    write(vectors(ROWS, DIM))
    uid = str(50_000 + os.getpid() % 10_000)
    with tempfile.TemporaryDirectory() as open_to_all:
        folder = Path(open_to_all)
        folder.chmod(0o777)
        shutil.copytree(tmp_path / "vectors.lance", folder / "vectors.lance")
        ends = []
        for more in (0, 1, 3, 6, 9, 12, 16, 24, 40, 100):
            done = python(
                STARVED,
                open_to_all,
                str(more),
                uid,
                env={"RAYON_NUM_THREADS": "2", "TOKIO_WORKER_THREADS": "2"},
            )
            assert done.returncode == 0 and "panick" not in done.stderr, (more, done.stdout, done.stderr)
            ends.append(done.stdout.split()[0])
            if ends[-1] == "refused":
                assert "threads" in done.stdout and "ulimit -u" in done.stdout
                assert leftovers(folder / "out") == []
                assert done.stdout.startswith("refused before"), done.stdout
            shutil.rmtree(folder / "out", ignore_errors=True)
    assert ends[0] == "refused" and ends[-1] == "done", ends


@LINUX
def test_threads_under_a_limit_on_the_address_space(write: Callable[..., Any], tmp_path: Path) -> None:
    """As above where the stacks of threads are what is refused."""
    write(vectors(ROWS, DIM))
    script = STARVED.replace(
        'limit = len(os.listdir("/proc/self/task")) + more\nresource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))',
        'used = int(open("/proc/self/statm").read().split()[0]) * 4096\nlimit = used + (more << 20)\n'
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))",
    )
    for more in (8, 2000):
        done = python(script, str(tmp_path), str(more), env={"MALLOC_ARENA_MAX": "1"})
        assert done.returncode == 0 and "panick" not in done.stderr, (more, done.stdout, done.stderr)
        assert done.stdout.startswith("refused" if more == 8 else "done"), done.stdout
