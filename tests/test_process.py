"""Processes that are told to end, or killed: what they leave, and who removes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import LINUX, column, leftovers, vectors
from failing_s3 import proxy
from lance_artifact import _lance_artifact as core
from lance_artifact import _process
from lance_artifact._process import Terminated, remove_abandoned, temporary_artifact, terminable
from local_s3 import BUCKET, client, s3_server

BUILD = "num_partitions=4, num_sub_vectors=4, sample_rate=8, max_iters=2, backend='cpu'"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, of this process and its children."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(_process.tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def segments(ds: Any) -> list[str]:
    return leftovers(Path(ds.uri) / "_indices")


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


KILLED_AT = f"""
import os, signal, sys
import lance, lance_artifact as la
def progress(step):
    if f"{{step.event}} {{step.stage}}" == sys.argv[2]:
        os.kill(os.getpid(), int(sys.argv[3]))
la.create_index(lance.dataset(sys.argv[1]), "vector", progress=progress, {BUILD})
"""


@pytest.mark.parametrize(
    "moment",
    [
        "start train_ivf",
        "start shuffle",
        "complete shuffle",
        "start merge_partitions",
        "complete merge_partitions",
    ],
)
def test_sigterm_leaves_nothing(moment: str, write: Any, temporary: Path) -> None:
    """It ends as a process that SIGTERM ends, and neither artifact nor segment stays."""
    ds = write(vectors(3000, 16))
    done = python(KILLED_AT, ds.uri, moment, str(int(signal.SIGTERM)))
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stderr == ""
    assert leftovers(temporary) == [] and list(temporary.iterdir()) == []
    assert segments(ds) == [] and lance.dataset(ds.uri).version == 1


def test_sigterm_from_outside(write: Any, temporary: Path) -> None:
    ds = write(vectors(3000, 16))
    script = f"""
import lance, lance_artifact as la, sys
ds = lance.dataset(sys.argv[1])
while True:
    la.create_index(ds, "vector", replace=True, progress=lambda step: print(step.stage, flush=True), {BUILD})
"""
    for lines in (1, 7, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", script, ds.uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        process.terminate()
        _, said = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGTERM, said
        assert list(temporary.iterdir()) == []


@LINUX
def test_what_sigkill_leaves_is_removed_by_the_next_build(write: Any, temporary: Path) -> None:
    ds = write(vectors(3000, 16))
    done = python(KILLED_AT, ds.uri, "start merge_partitions", str(int(signal.SIGKILL)))
    assert done.returncode == -signal.SIGKILL
    (left,) = temporary.iterdir()
    assert (left / "artifact" / "manifest.json").exists()
    la.create_index(
        ds, "vector", num_partitions=4, num_sub_vectors=4, sample_rate=8, max_iters=2, backend="cpu"
    )
    assert list(temporary.iterdir()) == []


@LINUX
def test_a_living_process_keeps_its_folder(temporary: Path) -> None:
    script = """
import sys
from lance_artifact._process import temporary_artifact
with temporary_artifact() as path:
    print(path, flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip()).parent
    assert folder.is_dir() and folder.stat().st_mode & 0o777 == 0o700
    with temporary_artifact():
        assert folder.exists()
    process.kill()
    # Until it is waited for it is a zombie, which does nothing any more.
    process.wait()
    process.communicate()
    with temporary_artifact():
        assert not folder.exists()


def test_what_could_not_be_removed_is_by_the_next_one(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy file on NFS, say: a service that lives for weeks would keep all its folders."""
    with monkeypatch.context() as patched:
        patched.setattr(_process.shutil, "rmtree", lambda *_, **__: None)
        with temporary_artifact() as path:
            Path(path).mkdir()
    left = Path(path).parent
    assert left.exists()
    with temporary_artifact() as other:
        assert not left.exists() and Path(other).parent.exists()
        assert remove_abandoned(temporary) == []
    assert list(temporary.iterdir()) == []


def test_a_segment_that_could_not_be_removed_is_by_the_next_build() -> None:
    """While the process that began it lives, as a service does."""
    with s3_server() as s3:
        uri = f"s3://{BUCKET}/kept.lance"
        table = pa.table({"vector": column(vectors(2000, 16))})
        lance.write_dataset(table, uri, storage_options=s3)
        shape: dict[str, Any] = {
            "num_partitions": 4,
            "num_sub_vectors": 4,
            "sample_rate": 8,
            "backend": "cpu",
        }

        def there() -> set[str]:
            listed = client(s3).list_objects_v2(Bucket=BUCKET, Prefix="kept.lance/_indices/")
            return {Path(found["Key"]).parent.name for found in listed.get("Contents", [])}

        def act(method: str, key: str, _: dict[str, str]) -> str | None:
            fails = "_indices" in key and key.endswith(".idx") and method in ("PUT", "POST")
            return "403" if fails or method == "DELETE" or "?delete" in key else None

        with proxy(s3, act) as options:
            refused = lance.dataset(uri, storage_options=options)
            with pytest.raises(la.StorageError, match=r"index segment.*") as raised:
                la.create_index(refused, "vector", **shape)
            (left,) = there()
            assert left in raised.value.__notes__[0]
            again = lance.dataset(uri, storage_options=options)
            with pytest.raises(la.StorageError, match=r"index segment.*"):
                la.create_index(again, "vector", **shape)
            assert len(there()) == 2 and left in there()
        made = la.create_index(lance.dataset(uri, storage_options=s3), "vector", **shape)
        assert there() == {index["uuid"] for index in made.list_indices()}


def gone() -> str:
    return python(
        "from lance_artifact import _lance_artifact as core; print(core.owner_marks())"
    ).stdout.strip()


def test_nothing_else_is_removed(temporary: Path, tmp_path: Path) -> None:
    marks = gone()
    name = "lance-artifact-" + "0123456789abcdef" * 2
    other = name[:-1]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "owner.json").write_text(marks)
    cases: dict[str, dict[str, str]] = {
        name + "0": {"owner.json": marks},
        other + "1": {},
        other + "2": {"owner.json": "no marks"},
        other + "3": {"owner.json": core.owner_marks()},
        other + "4": {"owner.json": marks, "mine.txt": "somebody put this here"},
        other + "5": {"owner.json": marks + " " * 5000},
        "lance-artifact-abc": {"owner.json": marks},
        "somebody-" + name: {"owner.json": marks},
    }
    for folder, files in cases.items():
        (temporary / folder).mkdir()
        for file, text in files.items():
            (temporary / folder / file).write_text(text)
    (temporary / (other + "6")).write_text(marks)
    (temporary / (other + "7")).symlink_to(outside)
    (temporary / (other + "8")).mkdir()
    (temporary / (other + "8") / "owner.json").symlink_to(outside / "owner.json")
    (temporary / (other + "9")).mkdir()
    (temporary / (other + "9") / "owner.json").write_bytes(b"\xff\xfe")
    before = leftovers(temporary)
    assert remove_abandoned(temporary) == []
    assert leftovers(temporary) == before and leftovers(outside) == ["owner.json"]
    # The very form, and only that, is removed, with the artifact in it.
    ours = temporary / (other + "a")
    (ours / "artifact" / "partitions").mkdir(parents=True)
    (ours / "owner.json").write_text(marks)
    assert remove_abandoned(temporary) == [str(ours)]
    assert not ours.exists() and leftovers(temporary) == before


def test_without_a_temporary_folder(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = write(vectors(3000, 16))
    monkeypatch.setattr(_process.tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(la.StorageError, match="TMPDIR"):
        la.create_index(ds, "vector", num_partitions=4, num_sub_vectors=4, backend="cpu")


# The signal itself


def test_a_handler_of_the_callers_own_is_asked() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with terminable():
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with terminable():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_default_comes_back_and_nests() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(ZeroDivisionError), terminable():
        handler = signal.getsignal(signal.SIGTERM)
        assert handler is not signal.SIG_DFL
        with terminable():
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_are_left_alone() -> None:
    found: list[Any] = []

    def work() -> None:
        with terminable():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("how", ["twice", "swallowed"])
def test_the_process_ends_by_the_signal(how: str, tmp_path: Path) -> None:
    """Also where a second one disturbs the cleaning up, or somebody swallows what the first one raised."""
    script = f"""
import pathlib, signal, sys
from lance_artifact._process import Terminated, terminable
with terminable():
    try:
        signal.raise_signal(signal.SIGTERM)
    except Terminated:
        if {how!r} == "twice":
            signal.raise_signal(signal.SIGTERM)
        pathlib.Path(sys.argv[1]).write_text("cleaned up")
        if {how!r} == "twice":
            raise
pathlib.Path(sys.argv[1]).write_text("went on")
"""
    done = python(script, str(tmp_path / "said"))
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert (tmp_path / "said").read_text() == "cleaned up"


def test_it_is_a_keyboard_interrupt() -> None:
    assert issubclass(Terminated, KeyboardInterrupt) and os.getpid() != 1
