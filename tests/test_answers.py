"""A commit whose answer is late, lost or not waited for: the files of an index that may come are there when it comes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_artifact as la
from commits import BUILD, ROWS, append, at_the_commit, before_commit, cleanup, folders, nearest, written
from conftest import segment, vectors
from lance_artifact import _commit
from lance_artifact._says import lance_says


@pytest.fixture(params=[True, False], ids=["", "restarted"], autouse=True)
def system_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Libraries may let signals interrupt no system call: a thread that waits in one is not told then."""
    signal.siginterrupt(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def ds(tmp_path: Path) -> Any:
    made = written(tmp_path / "t.lance", stable=False)
    la.create_index(made, "vector", **BUILD)
    return made


def is_right(ds: Any) -> bool:
    latest = lance.dataset(ds.uri)
    assert folders(ds) >= {segment(latest, "vector_idx").uuid}
    return nearest(latest, vectors(ROWS, 16)[9]) == 9


def ctrl_c_after(seconds: float) -> None:
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


def test_an_interrupt_waits_for_the_answer(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = segment(ds, "vector_idx").uuid

    def slow() -> None:
        ctrl_c_after(0.1)
        time.sleep(0.5)

    at_the_commit(monkeypatch, slow)
    with pytest.raises(KeyboardInterrupt):
        la.create_index(ds, "vector", replace=True, **BUILD)
    new = segment(lance.dataset(ds.uri), "vector_idx").uuid
    assert new != old and is_right(ds)


@pytest.mark.parametrize("happens", [True, False])
def test_an_interrupt_that_is_not_answered(
    happens: bool, ds: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The commit comes later, or never: its files stay, and it is said."""
    old = segment(ds, "vector_idx").uuid
    monkeypatch.setattr(_commit, "ANSWER_SECONDS", 0.1)
    ended = threading.Event()

    def slow() -> None:
        ctrl_c_after(0.1)
        time.sleep(1)
        if not happens:
            ended.set()
            raise OSError("not sent")

    at_the_commit(monkeypatch, slow, lambda uuid: ended.set())
    with caplog.at_level(logging.WARNING, "lance_artifact"), pytest.raises(KeyboardInterrupt):
        la.create_index(ds, "vector", replace=True, **BUILD)
    assert "may still happen" in caplog.text
    assert ended.wait(30)
    time.sleep(0.2)
    assert (segment(lance.dataset(ds.uri), "vector_idx").uuid != old) == happens
    assert is_right(ds) and len(folders(ds)) == 2


def test_an_interrupt_before_anything_was_sent(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folders(ds)

    def slow() -> None:
        ctrl_c_after(0.1)
        time.sleep(0.5)

    latest = _commit.Handle.latest
    called = []

    def slow_latest(self: Any) -> Any:
        # Calls before are of the checks at the start.
        called.append(threading.current_thread().name)
        if called[-1] == "lance-artifact-commit" and called.count(called[-1]) == 1:
            slow()
        return latest(self)

    monkeypatch.setattr(_commit.Handle, "latest", slow_latest)
    with pytest.raises(KeyboardInterrupt):
        la.create_index(ds, "vector", replace=True, **BUILD)
    assert folders(ds) == before and is_right(ds)


def test_without_a_thread_for_the_commit(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if self.name == "lance-artifact-commit":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    la.create_index(ds, "vector", replace=True, **BUILD)
    assert is_right(ds) and len(folders(ds)) == 2


def test_a_panic_of_lance_is_an_error_of_ours(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folders(ds)
    panic = type("PanicException", (BaseException,), {})

    def panics() -> None:
        raise panic("not implemented")

    at_the_commit(monkeypatch, panics)
    with pytest.raises(la.CommitConflictError, match="not implemented"):
        la.create_index(ds, "vector", replace=True, **BUILD)
    assert folders(ds) == before and is_right(ds)


def test_an_answer_that_is_lost_and_another_version_after_it(
    ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came after the commit is none of its business: it is looked at the version that is the commit."""

    def lost(_: str) -> None:
        append(ds)
        lance.dataset(ds.uri).optimize.compact_files(target_rows_per_fragment=10_000)
        raise OSError("the answer was lost")

    old = segment(ds, "vector_idx").uuid
    at_the_commit(monkeypatch, after=lost)
    la.create_index(ds, "vector", replace=True, **BUILD)
    latest = lance.dataset(ds.uri)
    assert old not in [s.uuid for i in latest.describe_indices() for s in i.segments]
    assert nearest(latest, vectors(ROWS, 16)[9]) == 9


def test_an_answer_that_is_lost_and_a_cleanup_after_it(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that is the commit is gone, and the latest one has the index: its files stay."""

    def lost(_: str) -> None:
        append(ds)
        cleanup(ds)
        raise OSError("the answer was lost")

    old = segment(ds, "vector_idx").uuid
    at_the_commit(monkeypatch, after=lost)
    la.create_index(ds, "vector", replace=True, **BUILD)
    assert segment(lance.dataset(ds.uri), "vector_idx").uuid != old and is_right(ds)


def test_a_commit_that_cannot_be_looked_at(
    ds: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store fails right after: the index is committed, so that is no failure."""

    def unreadable(*_: Any) -> Any:
        raise OSError("503")

    monkeypatch.setattr(_commit, "coverage", unreadable)
    with caplog.at_level(logging.WARNING, "lance_artifact"):
        la.create_index(ds, "vector", replace=True, **BUILD)
    assert "could not be looked at" in caplog.text and is_right(ds)
    assert ds.version == lance.dataset(ds.uri).version


@pytest.mark.parametrize("when", ["before the build", "before the commit", "at the commit"])
def test_a_dataset_that_is_removed(
    when: str, ds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = la.train(ds, "vector", **BUILD)
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")

    def removed() -> None:
        shutil.rmtree(ds.uri)

    if when == "before the build":
        opened = _commit.Handle.of(ds)
        removed()
        with pytest.raises(la.StorageError, match="moved or removed"):
            opened.latest()
        return
    if when == "before the commit":
        before_commit(monkeypatch, removed)
    else:
        at_the_commit(monkeypatch, removed)
    with pytest.raises((la.StorageError, la.CommitConflictError), match="removed"):
        la.finalize(ds, "vector", artifact, replace=True)


S3_SAYS = (
    "LanceError(IO): Generic S3 error: Error performing PUT http://127.0.0.1:9000/concurrent/t.lance/_versions/3.manifest in 1.2s, after 3 "
    "retries - Server returned non-2xx status code: 500 Internal Server Error: <Error><BucketName>conflict</BucketName><Key>write "
    "contention/t.lance</Key></Error>, /home/x/lance-io/src/object_writer.rs:689:9"
)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (
            "Commit conflict for version 4: Failed to commit the transaction after 0 retries., /a/b.rs:1:2",
            True,
        ),
        ("Retryable commit conflict for version 3: preempted by concurrent transaction CreateIndex", True),
        ("Incompatible transaction: 3 was removed by a concurrent transaction. Please retry.", True),
        ("Too many concurrent writers. 5 retries due to manifest contention", True),
        ("LanceError(IO): External error: Commit conflict for version 4: x", True),
        (S3_SAYS, False),
        ("LanceError(IO): Object at location /data/concurrent/incompatible/t.lance not written", False),
        ("LanceError(IO): Generic S3 error: bucket conflict: operation timed out", False),
        ("Not found: conflict/t.lance/_versions/3.manifest", False),
    ],
)
def test_a_conflict_is_told_by_its_kind(text: str, is_one: bool) -> None:
    """Names of buckets, folders and files are in the text too."""
    assert _commit.is_conflict(OSError(text)) == is_one


def test_pylances_own_conflict_is_one() -> None:
    assert _commit.is_conflict(lance.commit.CommitConflictError("somebody else was first"))


def test_what_lance_says_ends_without_a_place_in_its_source() -> None:
    for text, shown in (
        (
            "LanceError(IO): no space, /a/lance/rust/lance-io/src/object_writer.rs:689:9",
            "LanceError(IO): no space",
        ),
        ("no space, /a/b.rs:1:2, src/c.rs:3:4", "no space"),
        ("in x.rs, line 2", "in x.rs, line 2"),
    ):
        assert lance_says(OSError(text)) == f"Lance says: {shown}"
