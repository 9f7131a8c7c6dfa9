"""Datasets of known content and the oracle: what an index really holds, read from its files."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from lance_artifact.backends import _cuvs_calls


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[Any]:
    """A test that passed leaves nothing on the disk: a whole run writes gigabytes. pytest's own way removes a folder that the test
    still is in."""
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    done = yield
    # Where a test left it in its folder.
    os.chdir(item.config.rootpath)
    if folder is not None and not item.stash.get(_FAILED, False):
        shutil.rmtree(folder, ignore_errors=True)
    return done


_FAILED = pytest.StashKey[bool]()

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs what only Linux tells of processes")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A shell's background job ignores Ctrl-C, and so would these tests and what they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def vectors(rows: int, dim: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Clustered vectors: k-means has something to find, and ties are rare."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((32, dim)) * 3
    return (centers[rng.integers(0, 32, rows)] + rng.standard_normal((rows, dim))).astype(dtype)


def column(array: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Any]:
    """Write a dataset with a column ``vector`` in three or so fragments."""

    def make(array: Any, name: str = "vectors.lance", **options: Any) -> Any:
        values = array if isinstance(array, pa.Array) else column(array)
        table = pa.table({"id": pa.array(range(len(values))), "vector": values})
        options.setdefault("max_rows_per_file", max(1, len(values) // 3))
        return lance.write_dataset(table, str(tmp_path / name), **options)

    return make


def segment(ds: Any, name: str) -> Any:
    """The only segment of an index."""
    found = [s for i in ds.describe_indices() if i.name == name for s in i.segments]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


def stored(ds: Any, name: str) -> list[dict[int, bytes]]:
    """For each partition of an index of one segment: row id to code, read from ``auxiliary.idx`` without Lance's search."""
    return stored_in(ds, name, segment(ds, name).uuid)


def stored_in(ds: Any, name: str, uuid: str, options: dict[str, str] | None = None) -> list[dict[int, bytes]]:
    """The same, of one segment of an index."""
    statistics = next(s for s in ds.stats.index_stats(name)["indices"] if s["uuid"] == uuid)
    sizes = [p["size"] for p in statistics["partitions"]]
    from lance.file import LanceFileReader

    file = LanceFileReader(f"{ds.uri}/_indices/{uuid}/auxiliary.idx", storage_options=options)
    table = file.read_all().to_table()
    (quantization,) = json.loads((file.metadata().schema.metadata or {})[b"storage_metadata"])
    transposed = json.loads(quantization)["transposed"]
    row_ids = table["_rowid"].to_numpy()
    codes = table["__pq_code"].combine_chunks()
    width = codes.type.list_size
    flat = codes.flatten().to_numpy().reshape(-1)
    content, at = [], 0
    for size in sizes:
        # Codes of a partition are stored transposed, [byte][row], but for those of segments that are to be merged.
        block = flat[at * width : (at + size) * width]
        block = block.reshape(width, size).T if transposed else block.reshape(size, width)
        ids = row_ids[at : at + size]
        assert len(set(ids.tolist())) == size, "a row id is stored twice"
        content.append({int(i): block[n].tobytes() for n, i in enumerate(ids)})
        at += size
    assert at == len(row_ids)
    return content


def command_line(**options: Any) -> list[str]:
    """Options of the command line by their names in Python."""
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def accelerate(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Let ``accelerator="cuvs"`` mean a backend that is here."""
    from lance_artifact import _create_index, _register, _uncommitted

    for module in (_create_index, _register, _uncommitted):
        monkeypatch.setattr(module, "resolve_accelerator", lambda *_: backend)


def differences(ours: list[dict[int, bytes]], theirs: list[dict[int, bytes]]) -> tuple[int, int, int]:
    """Partitions compared, row ids that differ, codes that differ."""
    assert len(ours) == len(theirs)
    ids = sum(len(a.keys() ^ b.keys()) for a, b in zip(ours, theirs, strict=True))
    codes = sum(a[i] != b[i] for a, b in zip(ours, theirs, strict=True) for i in a.keys() & b.keys())
    return len(ours), ids, codes


def encoded(rows: int, partitions: int, width: int, seed: int = 0, first: int = 0) -> pa.Table:
    """An encoded batch of distinct row ids, random partitions and random codes."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "_rowid": pa.array(np.arange(first, first + rows, dtype=np.uint64)),
            "__ivf_part_id": pa.array(rng.integers(0, partitions, rows, dtype=np.uint32)),
            "__pq_code": pa.FixedSizeListArray.from_arrays(
                pa.array(rng.integers(0, 256, rows * width, dtype=np.uint8)), width
            ),
        }
    )


def content(artifact: la.Artifact) -> list[dict[int, bytes]]:
    """For each partition of an artifact: row id to code, in order."""
    result = []
    for partition in range(artifact.num_partitions):
        table = artifact.read_partition(partition).read_all()
        codes = table["__pq_code"].combine_chunks() if table.num_rows else []
        result.append({i: bytes(c.as_py()) for i, c in zip(table["_rowid"].to_pylist(), codes, strict=True)})
    return result


def leftovers(root: Path) -> list[str]:
    """Every file below a folder, if it exists."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) if root.exists() else []


DOUBLES = Path(__file__).parent / "doubles"
REQUIRE_GPU = os.environ.get("LANCE_ARTIFACT_REQUIRE_GPU") == "1"


def real_driver() -> bool:
    """Whether this machine has NVIDIA's own driver, beside which its double cannot be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def double_driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The double of the CUDA driver (tests/doubles/libcuda.c), compiled and loaded: without devices until asked."""
    if sys.platform != "linux":
        pytest.skip("CUDA is for Linux, and so is the double of its driver")
    if real_driver():
        pytest.skip("a double of the driver cannot stand beside the real one; run pytest -m gpu")
    folder = tmp_path_factory.mktemp("doubles")
    loaded = []
    for name, soname in (("libcuda", "libcuda.so"), ("libcuvs_c", "libcuvs_c.so")):
        command = [
            "cc",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-O1",
            "-shared",
            "-fPIC",
            "-pthread",
            f"-Wl,-soname,{soname}",
        ]
        subprocess.run([*command, "-o", folder / soname, DOUBLES / f"{name}.c"], check=True)
        # Whoever loads a library by this name from now on gets the one that is loaded.
        loaded.append(ctypes.CDLL(str(folder / soname), mode=ctypes.RTLD_GLOBAL))
    driver = loaded[0]
    driver.fake_cuda_reset.argtypes = [ctypes.c_int, ctypes.c_size_t]
    driver.fake_cuda_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    driver.fake_cuda_live.restype = ctypes.c_long
    return driver


@dataclass
class Gpu:
    """A machine with GPUs: a real one, or two doubles of 1 GiB each."""

    devices: int
    driver: Any = None
    control: Any = None

    @property
    def real(self) -> bool:
        return self.driver is None

    def fail(self, call: bytes, after: int, code: int) -> None:
        self.driver.fake_cuda_fail(call, after, code)

    def reset(self, devices: int = 2, memory: int = 1 << 30) -> None:
        self.driver.fake_cuda_reset(devices, memory)
        self.control.reset()


def _forget(*packages: str) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in packages]:
        del sys.modules[name]


@pytest.fixture
def double(double_driver: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Doubles of two GPUs and of cuVS. What is not released by the end is an error."""
    packages = ("cuvs", "pylibraft", "rmm", "lance_cuvs")
    _forget(*packages)
    monkeypatch.syspath_prepend(str(DOUBLES / "packages"))
    control = importlib.import_module("cuvs._double").CONTROL
    gpu = Gpu(2, double_driver, control)
    gpu.reset()
    yield gpu
    gpu.reset()
    # For the rest of a process one context of each device is kept, and its pool.
    _cuvs_calls._LIMITED.clear()
    _cuvs_calls._POOLS.clear()
    _cuvs_calls._KEPT.clear()
    gc.collect()
    live = double_driver.fake_cuda_live()
    _forget(*packages)
    double_driver.fake_cuda_reset(0, 1 << 30)
    assert live == 0, f"{live} allocations, streams, events or contexts were not released"


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """A machine with GPUs and cuVS: the same tests run over the doubles and, with ``-m gpu``, on real ones."""
    if request.param == "double":
        found: Gpu = request.getfixturevalue("double")
        return found
    missing = la.available_backends()["cuvs"].missing
    if missing and REQUIRE_GPU:
        pytest.fail(f"LANCE_ARTIFACT_REQUIRE_GPU=1, but {'; '.join(missing)}")
    if missing:
        pytest.skip("; ".join(missing))
    return Gpu(len(la.available_backends()["cuvs"].details["devices"]))
