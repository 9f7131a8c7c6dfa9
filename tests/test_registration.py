"""When and where LanceDB is wrapped: while it is being imported, in releases that differ, and by a package that was imported anew."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest
from lancedb.index import IvfPq

import lance_artifact as la
from conftest import accelerate, column, vectors
from lance_artifact import _lancedb_calls, _tested, _versions
from lance_artifact.backends.cpu import CpuBackend

SHAPE: dict[str, Any] = {"num_partitions": 4, "num_sub_vectors": 4}


def ran(script: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


# A finder that gives a module of LanceDB other source.
OTHER = """
import importlib.abc, importlib.util, sys
class Other(importlib.abc.MetaPathFinder):
    def __init__(self, name, change):
        self.name = name
        spec = importlib.util.find_spec(name.split(".")[0])
        import pathlib
        path = pathlib.Path(spec.origin).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
        self.path, self.source = str(path), change(path.read_text())
    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        other = self
        class Loader(importlib.abc.SourceLoader):
            def get_filename(self, name): return other.path
            def get_data(self, path): return other.source.encode()
            def path_stats(self, path): raise OSError
        return importlib.util.spec_from_loader(name, Loader(), origin=other.path)
"""


@pytest.mark.parametrize("half", ["lancedb.table", "lancedb.common"])
def test_an_import_of_lancedb_that_is_under_way(half: str) -> None:
    """Another thread's, of which a part is there and the rest comes later."""
    ran(
        OTHER
        + f"""
import threading, time
import lance
sys.half = threading.Event()
slow = "import sys, time\\nsys.half.set()\\ntime.sleep(1)\\n"
change = lambda text: text.replace("from __future__ import annotations\\n", "from __future__ import annotations\\n" + slow, 1)
other = Other({half!r}, lambda text: change(text) if "from __future__ import annotations\\n" in text else slow + text)
sys.meta_path.insert(0, other)
failed = []
def importing():
    try:
        import lancedb
    except BaseException as error:
        failed.append(error)
thread = threading.Thread(target=importing)
thread.start()
assert sys.half.wait(60)
import lance_artifact
thread.join()
assert not failed, failed
import lancedb, lancedb.remote.table
for owner in (lancedb.table.LanceTable, lancedb.table.AsyncTable, lancedb.remote.table.RemoteTable):
    assert hasattr(owner.create_index, "__lance_artifact_original__"), owner
"""
    )


@pytest.mark.parametrize("first", ["lancedb", "lance_artifact"])
def test_a_class_that_a_later_release_has_renamed(first: str) -> None:
    """Said once, and nothing else is the worse for it."""
    done = ran(
        OTHER
        + f"""
sys.meta_path.insert(0, Other("lancedb.remote.table", lambda text: text.replace("RemoteTable", "CloudTable")))
import importlib
if {first!r} == "lancedb":
    importlib.import_module("lancedb.remote.table")
import lance_artifact
importlib.import_module("lancedb.remote.table")
lance_artifact.register()
import lancedb, pyarrow as pa, tempfile
assert hasattr(lancedb.table.LanceTable.create_index, "__lance_artifact_original__")
from lance_artifact import _lancedb
assert not _lancedb.is_remote(object())
lance_artifact.unregister()
"""
    )
    assert done.stderr.count("lancedb.remote.table has no RemoteTable.create_index") == 1, done.stderr


def test_a_method_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    later = types.ModuleType("lancedb.table")
    later.LanceTable = type("LanceTable", (), {"build_index": None})  # type: ignore[attr-defined]
    with pytest.warns(la.UntestedVersionWarning) as caught:
        _lancedb_calls._wrap(later)
    said = str(caught[0].message)
    assert len(caught) == 1 and "LanceTable.create_index" in said and "AsyncTable.create_index" in said
    assert f"LanceDB {lancedb.__version__}" in said and "lance_artifact.create_index(table" in said


@pytest.mark.parametrize("version", _tested.LANCEDB)
def test_a_tested_release_of_lancedb_is_taken_without_a_word(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _versions.check_lancedb(version)
        _versions.warn_of_lancedb(version)


@pytest.mark.parametrize("version", ["0.33.1", "0.35.0", "0.40.1", "0.41.0b1", "1.0.0"])
def test_an_untested_release_of_lancedb_is_warned_of(version: str) -> None:
    _versions.check_lancedb(version)
    with pytest.warns(la.UntestedVersionWarning, match="was not tested with LanceDB") as caught:
        _versions.warn_of_lancedb(version)
    said = str(caught[0].message)
    assert len(caught) == 1 and version in said and f"lancedb=={_tested.LANCEDB[-1]}" in said


@pytest.mark.parametrize("version", ["0.32.9", "0.33.0b1", "0.33.0-beta.2", "", "unknown"])
def test_an_older_release_of_lancedb_is_refused(version: str) -> None:
    with pytest.raises(la.UnsupportedVersionError, match="needs LanceDB >=") as caught:
        _versions.check_lancedb(version)
    assert f"lancedb=={_tested.LANCEDB[-1]}" in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _versions.warn_of_lancedb(version)


def test_an_older_release_is_refused_where_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is not asked of us is as it was."""
    accelerate(monkeypatch, CpuBackend())
    table = lancedb.connect(str(tmp_path)).create_table("t", pa.table({"vector": column(vectors(300, 16))}))
    monkeypatch.setattr(lancedb, "__version__", "0.32.0")
    for call in (
        lambda: table.create_index("vector", config=IvfPq(accelerator="cuvs", **SHAPE)),
        lambda: la.train(table, "vector", backend="cpu", **SHAPE),
    ):
        with pytest.raises(la.UnsupportedVersionError, match=r"LanceDB 0\.32\.0 is installed"):
            call()
    table.create_index("vector", config=IvfPq(**SHAPE))
    assert len(list(table.list_indices())) == 1


@pytest.mark.parametrize("first", ["lancedb", "lance_artifact"])
def test_the_warning_comes_once(first: str) -> None:
    """Also with LanceDB's several modules, and with a second registration."""
    other = f"""
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.99.0" if name == "lancedb" else version(name)
import {first}
import lancedb, lance_artifact, lancedb.remote.table
lance_artifact.register()
"""
    done = ran(other)
    assert done.stderr.count("UntestedVersionWarning: ") == 1, done.stderr


def test_where_warnings_are_errors_lancedb_is_imported_all_the_same() -> None:
    """As pytest has it with `filterwarnings = error`: its classes are wrapped, too."""
    done = ran("""
import importlib.metadata, logging, warnings
logging.basicConfig()
import lance_artifact
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.99.0" if name == "lancedb" else version(name)
warnings.simplefilter("error", UserWarning)
import lancedb
from lancedb.remote.table import RemoteTable
from lancedb.table import AsyncTable, LanceTable
for wrapped in (AsyncTable, LanceTable, RemoteTable):
    assert hasattr(wrapped.create_index, "__lance_artifact_original__"), wrapped
""")
    assert done.stderr.count("was not tested with LanceDB 0.99.0") == 1, done.stderr


@pytest.mark.parametrize("lancedb_first", [True, False])
def test_a_package_that_was_imported_anew_gives_back_what_the_old_one_took(lancedb_first: bool) -> None:
    ran(
        f"""
import sys, lance
from lance.dataset import LanceDataset
stock = LanceDataset.create_index
if {lancedb_first}:
    import lancedb
    of_lancedb = lancedb.table.LanceTable.create_index, lancedb.table.AsyncTable.create_index_async
import lance_artifact as old
for name in [name for name in sys.modules if name.split(".")[0] == "lance_artifact"]:
    del sys.modules[name]
import lance_artifact as new
assert new is not old
if {lancedb_first}:
    assert lancedb.table.LanceTable.create_index is not of_lancedb[0]
new.unregister()
import lancedb
assert LanceDataset.create_index is stock
table = lancedb.table
for function in (table.LanceTable.create_index, table.AsyncTable.create_index_async, table.AsyncTable.create_index):
    assert not hasattr(function, "__lance_artifact_original__"), function
if {lancedb_first}:
    assert (table.LanceTable.create_index, table.AsyncTable.create_index_async) == of_lancedb
new.register()
assert hasattr(table.LanceTable.create_index, "__lance_artifact_original__")
"""
    )
