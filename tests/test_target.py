"""Several writers at one place: who may publish, and who deletes what."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lance_artifact as la
from conftest import LINUX, leftovers
from lance_artifact import _lance_artifact as core
from targets import (
    EIGHT_DAYS,
    ELSEWHERE,
    TAG,
    WIDTH,
    K,
    attempt_of_another_machine,
    filled,
    is_artifact_of,
    named,
)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("end", ["abort", "drop"])
def test_the_first_of_two_overwriting_writers_wins(first: int, end: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    filled(path, 9).finish()
    both = [filled(path, seed, rows=300_000, overwrite=True) for seed in range(2)]
    both[first].finish()
    assert is_artifact_of(path, first, 300_000)
    with pytest.raises(la.ArtifactExistsError, match="another writer published"):
        both[1 - first].finish()
    assert is_artifact_of(path, first, 300_000)
    if end == "abort":
        both[1 - first].abort()
    both.clear()
    assert is_artifact_of(path, first, 300_000)
    assert leftovers(path) == named(path)


def test_writers_that_finish_at_one_moment(tmp_path: Path) -> None:
    path = tmp_path / "a"
    filled(path, 99).finish()
    for turn in range(4):
        seeds = range(turn * 4, turn * 4 + 4)
        made = {seed: filled(path, seed, overwrite=True) for seed in seeds}
        start, won, lost = threading.Barrier(len(made)), [], []

        def finish(seed: int, made: Any = made, start: Any = start, won: Any = won, lost: Any = lost) -> None:
            start.wait()
            try:
                made[seed].finish()
                won.append(seed)
            except la.ArtifactExistsError:
                lost.append(seed)

        threads = [threading.Thread(target=finish, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 3)
        for seed in lost:
            made[seed].abort()
        assert is_artifact_of(path, won[0])
        assert leftovers(path) == named(path)


ZOMBIE = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import encoded
import lance_artifact as la
made = la.PartitionArtifactBuilder(sys.argv[1], num_partitions={K}, pq_code_width={WIDTH},
                                   overwrite=sys.argv[2] == "overwrite", memory_limit=16 << 20)
for n in range(6):
    made.append_batch(encoded(200_000, {K}, {WIDTH}, seed=n, first=n * 200_000))
print("ready", flush=True)
sys.stdin.readline()
try:
    made.finish()
    print("published", flush=True)
except la.ArtifactExistsError:
    print("lost", flush=True)
    sys.stdin.readline()
    made.abort()
    print("gone", flush=True)
"""


@pytest.fixture
def zombie() -> Iterator[Any]:
    """Start a writer in another process, which stops before it finishes."""
    started = []

    def start(path: Path, how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", ZOMBIE, str(path), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def tell(process: subprocess.Popen[str]) -> str:
    """Let it go on, and hear what became of it."""
    assert process.stdin is not None and process.stdout is not None
    process.send_signal(signal.SIGCONT)
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("how", ["fresh", "overwrite"])
def test_a_writer_that_wakes_up_after_a_retry_has_published(how: str, zombie: Any, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if how == "overwrite":
        filled(path, 9).finish()
    other = zombie(path, how)
    its = [f for f in leftovers(path) if f.split("/")[-1].startswith(".lance-artifact-")]
    assert len(its) > K, "expected a claim and open files"
    filled(path, 1, overwrite=how == "overwrite").finish()
    # It lives: its open files and its claim stay.
    assert set(its) <= set(leftovers(path))
    assert tell(other) == "lost"
    assert is_artifact_of(path, 1)
    assert tell(other) == "gone"
    assert is_artifact_of(path, 1)
    assert leftovers(path) == named(path)


@LINUX
def test_what_a_killed_writer_left_goes_with_the_next_artifact(zombie: Any, tmp_path: Path) -> None:
    path = tmp_path / "a"
    for turn, how in enumerate(["fresh", "overwrite"]):
        other = zombie(path, how)
        other.kill()
        other.wait()
        left = set(leftovers(path)) - (set(named(path)) if turn else set())
        assert left, "the writer left nothing"
        filled(path, turn, overwrite=turn == 1).finish()
        assert is_artifact_of(path, turn)
        assert leftovers(path) == named(path)


@LINUX
@pytest.mark.parametrize("plain", [True, False])
def test_a_claim_whose_owner_is_gone(plain: bool, tmp_path: Path) -> None:
    """A process that ends without a word leaves its claim, and closed files if it had got so far."""
    path = tmp_path / "a"
    script = f"""
import sys, os; sys.path.insert(0, {str(Path(__file__).parent)!r})
import lance_artifact as la
made = la.PartitionArtifactBuilder({str(path)!r}, num_partitions={K}, pq_code_width={WIDTH}, overwrite=True)
os._exit(3)
"""
    if not plain:
        filled(path, 9).finish()
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 3
    claims = [p for p in path.iterdir() if p.name.startswith(".lance-artifact-claim")]
    assert len(claims) == 1 and (claims[0].name == ".lance-artifact-claim") is plain
    marks = json.loads(claims[0].read_text())
    assert core.owner_is_gone(json.dumps(marks["owner"]))
    tag = "" if plain else f"-{marks['attempt']}"
    (path / "partitions").mkdir(exist_ok=True)
    (path / f"metadata{tag}.lance").write_text("left")
    (path / "partitions" / f"bucket-00003{tag}.lance").write_text("left")
    made = filled(path, 1, overwrite=not plain)
    # Nothing is deleted before the new artifact is there.
    assert (path / f"metadata{tag}.lance").read_text() == "left"
    made.finish()
    assert is_artifact_of(path, 1)
    assert leftovers(path) == named(path)


def age(files: list[Path]) -> None:
    for file in files:
        os.utime(file, (time.time() - EIGHT_DAYS,) * 2)


@pytest.mark.parametrize("tag", [None, TAG])
def test_files_of_an_unknown_owner_stay_until_they_are_old(tag: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a"
    theirs = attempt_of_another_machine(path, tag)
    before = {file: file.read_bytes() for file in theirs}
    filled(path, 1).finish()
    assert is_artifact_of(path, 1)
    assert {file: file.read_bytes() for file in theirs} == before
    # One young file is enough: that attempt is at work.
    age(theirs[:-1])
    filled(path, 2, overwrite=True).finish()
    assert all(file.exists() for file in theirs)
    age(theirs)
    filled(path, 3, overwrite=True).finish()
    assert is_artifact_of(path, 3)
    assert leftovers(path) == named(path)


def test_plain_files_without_a_claim_are_not_overwritten(tmp_path: Path) -> None:
    """Whose they are is not known; a build beside them uses names of its own."""
    path = tmp_path / "a"
    theirs = attempt_of_another_machine(path, None)
    for file in (theirs[0], theirs[3]):
        file.unlink()
    artifact = filled(path, 1).finish()
    assert is_artifact_of(path, 1)
    assert theirs[1].read_text() == theirs[2].read_text() == "theirs"
    assert all("-" in Path(name).stem.replace("bucket-", "") for name in artifact.manifest["files"])
    age(theirs[1:3])
    filled(path, 2, overwrite=True).finish()
    assert leftovers(path) == named(path)


def test_a_claim_of_an_earlier_release_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    claim = path / ".lance-artifact-claim"
    claim.touch()
    made = filled(path, 1)
    assert claim.read_bytes() == b""
    made.finish()
    assert claim.exists() and is_artifact_of(path, 1)


def test_a_claim_that_became_anothers_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    made = filled(path, 1)
    claim = path / ".lance-artifact-claim"
    assert json.loads(claim.read_text())["owner"]["pid"] == os.getpid()
    theirs = json.dumps({"attempt": TAG, "owner": ELSEWHERE})
    claim.write_text(theirs)
    # Plain names may be another's by now: nothing may be written under them.
    with pytest.raises(la.CommitConflictError, match="claim"):
        made.finish()
    made.abort()
    assert leftovers(path) == [".lance-artifact-claim"]
    assert claim.read_text() == theirs


def test_the_lock_of_another_process_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a"
    filled(path, 1).finish()
    made = filled(path, 2, overwrite=True)
    lock = (path / ".lance-artifact-lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    finished = threading.Event()
    thread = threading.Thread(target=lambda: (made.finish(), finished.set()))
    thread.start()
    assert not finished.wait(0.3)
    assert is_artifact_of(path, 1)
    lock.close()
    thread.join()
    assert is_artifact_of(path, 2)
    assert leftovers(path) == named(path)


def test_an_artifact_deleted_meanwhile_is_not_missed(tmp_path: Path) -> None:
    """What was to be replaced is gone: there is nothing to lose."""
    path = tmp_path / "a"
    filled(path, 1).finish()
    made = filled(path, 2, overwrite=True)
    core.delete_artifact(str(path))
    made.finish()
    assert is_artifact_of(path, 2) and leftovers(path) == named(path)


def test_deleting_takes_the_artifacts_files_only(tmp_path: Path) -> None:
    path = tmp_path / "a"
    filled(path, 1).finish()
    (path / "notes.txt").write_text("mine")
    core.delete_artifact(str(path))
    assert leftovers(tmp_path) == ["a/notes.txt"]
    (path / "notes.txt").unlink()
    filled(path, 1).finish()
    core.delete_artifact(str(path))
    assert not path.exists()


def naming(path: Path, files: dict[str, str]) -> None:
    """An artifact whose manifest names these files, too, and the files, if they are any."""
    filled(path, 1).finish()
    manifest = json.loads((path / "manifest.json").read_text())
    for name, content in files.items():
        manifest["files"][name] = {"num_rows": 1, "size_bytes": 1}
        if content:
            (path / name).write_text(content)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("deleted", [False, True], ids=["replaced", "deleted"])
def test_a_manifest_cannot_have_the_targets_own_files_deleted(deleted: bool, tmp_path: Path) -> None:
    """Of an attempt of another machine, which may be at work: that these go is for its end, or a week, to say."""
    path = tmp_path / "a"
    claim = json.dumps({"attempt": TAG, "owner": ELSEWHERE})
    kept = {f".lance-artifact-claim-{TAG}": claim, f"partitions/.lance-artifact-{TAG}-abc123": "theirs"}
    naming(path, {"manifest.json": "", ".lance-artifact-lock": "", **kept})
    if deleted:
        core.delete_artifact(str(path))
        assert leftovers(path) == sorted(kept)
    else:
        filled(path, 2, overwrite=True).finish()
        assert is_artifact_of(path, 2)
        assert leftovers(path) == sorted({*kept, *named(path)})
    assert {name: (path / name).read_text() for name in kept} == kept


def test_a_manifest_cannot_have_a_claim_on_its_own_names_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    claim = json.dumps({"attempt": TAG, "owner": ELSEWHERE})
    naming(path, {".lance-artifact-claim": claim})
    filled(path, 2, overwrite=True).finish()
    assert is_artifact_of(path, 2)
    assert (path / ".lance-artifact-claim").read_text() == claim


def test_a_manifest_cannot_have_hidden_files_deleted(tmp_path: Path) -> None:
    """A name like ours that is none of the format's is somebody's: nothing is written beside it, and it is not deleted."""
    path, notes = tmp_path / "a", "partitions/.lance-artifact-notes"
    naming(path, {notes: "mine"})
    before = leftovers(path)
    with pytest.raises(la.InvalidInputError, match=r"partitions/\.lance-artifact-notes"):
        filled(path, 2, overwrite=True)
    assert leftovers(path) == before and is_artifact_of(path, 1)
    core.delete_artifact(str(path))
    assert leftovers(path) == [notes] and (path / notes).read_text() == "mine"


def test_an_artifact_of_another_writer_is_replaced_with_its_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    filled(path, 1, num_buckets=1).finish()
    (path / "rows").mkdir()
    (path / "partitions/bucket-00000.lance").rename(path / "rows/all.lance")
    manifest = json.loads((path / "manifest.json").read_text())
    foreign = {key: manifest[key] for key in ("version", "num_partitions", "partitions")}
    for partition in foreign["partitions"]:
        partition["path"] = partition.get("path") and "rows/all.lance"
    (path / "manifest.json").write_text(json.dumps(foreign))
    assert is_artifact_of(path, 1)
    filled(path, 2, overwrite=True).finish()
    assert is_artifact_of(path, 2)
    assert leftovers(path) == named(path) and not (path / "rows").exists()
