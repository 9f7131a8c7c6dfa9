"""The place an artifact is written to: what is refused there, who may publish, and who deletes what."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, content, encoded, leftovers, vectors
from lance_artifact import _lance_artifact as core

K, WIDTH = 7, 6
TAG = "0a1b2c3d"
ELSEWHERE = {"host": "another-machine", "pid": 4711, "started": "1"}
EIGHT_DAYS = 8 * 24 * 3600


def builder(path: Any, **options: Any) -> la.PartitionArtifactBuilder:
    defaults: dict[str, Any] = {"num_partitions": K, "pq_code_width": WIDTH}
    return la.PartitionArtifactBuilder(path, **{**defaults, **options})


def table(seed: int, rows: int = 200) -> pa.Table:
    return encoded(rows, K, WIDTH, seed=seed, first=seed * 1_000_000)


def filled(path: Any, seed: int, rows: int = 200, **options: Any) -> la.PartitionArtifactBuilder:
    made = builder(path, **options)
    made.append_batch(table(seed, rows))
    return made


def ids(artifact: la.Artifact) -> set[int]:
    return {i for part in content(artifact) for i in part}


def is_artifact_of(path: Path, seed: int, rows: int = 200) -> bool:
    artifact = la.Artifact.open(path)
    return artifact.verify().ok and ids(artifact) == set(table(seed, rows)["_rowid"].to_pylist())


def named(path: Path) -> list[str]:
    """The files of an artifact, as its manifest names them."""
    manifest = json.loads((path / "manifest.json").read_text())
    return sorted({"manifest.json", *manifest["files"]})


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in root.rglob("*")
    }


def a_model(seed: int = 0, partitions: int = K) -> la.IvfPqModel:
    rng = np.random.default_rng(seed)
    centroids = rng.standard_normal((partitions, 12)).astype("float32")
    codebook = rng.standard_normal((WIDTH, 256, 2)).astype("float32")
    return la.IvfPqModel(
        column(centroids), column(codebook.reshape(-1, 2)), metric="l2", num_sub_vectors=WIDTH
    )


# Several writers.


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


def attempt_of_another_machine(path: Path, tag: str | None) -> list[Path]:
    """A claim, closed files and an open one, of a process of which nothing is known here."""
    end = f"-{tag}" if tag else ""
    files = [
        path / f".lance-artifact-claim{end}",
        path / f"metadata{end}.lance",
        path / "partitions" / f"bucket-00003{end}.lance",
        path / "partitions" / f".lance-artifact-{TAG}-aB3xY9",
    ]
    (path / "partitions").mkdir(parents=True, exist_ok=True)
    for file in files:
        file.write_text("theirs")
    files[0].write_text(json.dumps({"attempt": TAG, "owner": ELSEWHERE}))
    return files


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


def test_a_manifest_cannot_have_the_targets_own_files_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    filled(path, 1).finish()
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("manifest.json", ".lance-artifact-claim", "partitions/.lance-artifact-notes"):
        manifest["files"][name] = {"num_rows": 1, "size_bytes": 1}
    (path / "manifest.json").write_text(json.dumps(manifest))
    filled(path, 2, overwrite=True).finish()
    assert is_artifact_of(path, 2)


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


# Publishing that fails.

FULL = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import resource, signal, threading, time
from conftest import encoded
import lance_artifact as la
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def filled(name):
    made = la.PartitionArtifactBuilder(sys.argv[1] + name, num_partitions=4000, pq_code_width=4, num_buckets=2)
    made.append_batch(encoded(500, 4000, 4))
    return made
"""


def full_disk(script: str, path: Path) -> None:
    """Files of more than 32 KiB cannot be written, which only the manifest is: it stands for a disk that is full."""
    subprocess.run([sys.executable, "-c", FULL + script, f"{path}/"], check=True, timeout=120)


def test_publishing_goes_on_when_it_can(tmp_path: Path) -> None:
    full_disk(
        """
made = filled("a")
limit(1 << 15)
threading.Timer(0.4, lambda: limit(resource.RLIM_INFINITY)).start()
start = time.monotonic()
assert made.finish().num_rows == 500
assert time.monotonic() - start > 0.3
""",
        tmp_path,
    )
    assert la.Artifact.open(tmp_path / "a").verify().ok
    assert leftovers(tmp_path / "a") == named(tmp_path / "a")


def test_finish_can_be_called_again(tmp_path: Path) -> None:
    full_disk(
        """
def again():
    made = filled("again")
    try:
        made.finish(rows_seen=510, rows_dropped={"null": 10})
    except la.StorageError as error:
        assert "finish() again" in str(error) and "not published" in str(error), error
    else:
        raise AssertionError
    try:
        made.append_batch(encoded(1, 4000, 4))
    except la.InvalidInputError as error:
        assert "finish() again" in str(error), error
    else:
        raise AssertionError
    go_on()
    try:
        made.finish(rows_seen=511, rows_dropped={"null": 11})
    except la.InvalidInputError as error:
        assert "cannot change" in str(error), error
    else:
        raise AssertionError
    assert made.finish().manifest["rows"] == {"seen": 510, "written": 500, "dropped": {"null": 10}}
    done.append("again")
def block():
    try:
        with filled("block") as made:
            pass
    except la.StorageError:
        pass
    else:
        raise AssertionError
    go_on()
    assert made.finish().num_rows == 500 and made.artifact.num_rows == 500
    done.append("block")
def gone():
    made = filled("gone")
    try:
        made.finish()
    except la.StorageError:
        pass
    else:
        raise AssertionError
    made.abort()
    try:
        made.finish()
    except la.InvalidInputError as error:
        assert "aborted" in str(error), error
    else:
        raise AssertionError
    go_on()
    done.append("gone")
def removed():
    made = filled("removed")
    try:
        made.finish()
    except la.StorageError:
        pass
    else:
        raise AssertionError
    import pathlib
    next(pathlib.Path(sys.argv[1], "removed/partitions").glob("*.lance")).unlink()
    go_on()
    try:
        made.finish()
    except la.CommitConflictError as error:
        assert "is gone" in str(error), error
    else:
        raise AssertionError
    made.abort()
    done.append("removed")
failed, ready, done = threading.Barrier(5), threading.Event(), []
def go_on():
    failed.wait(30)
    ready.wait(30)
limit(1 << 15)
threads = [threading.Thread(target=work) for work in (again, block, gone, removed)]
for thread in threads: thread.start()
failed.wait(30)
limit(resource.RLIM_INFINITY)
ready.set()
for thread in threads: thread.join()
assert sorted(done) == ["again", "block", "gone", "removed"], done
""",
        tmp_path,
    )
    for name in ("again", "block"):
        assert la.Artifact.open(tmp_path / name).verify().ok
        assert leftovers(tmp_path / name) == named(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "block"]


def test_an_interrupt_ends_the_waiting(tmp_path: Path) -> None:
    full_disk(
        """
import os
made = filled("a")
limit(1 << 15)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    made.finish()
except KeyboardInterrupt:
    assert time.monotonic() - start < 1.5, time.monotonic() - start
    made.abort()
else:
    raise AssertionError
""",
        tmp_path,
    )
    assert leftovers(tmp_path) == []


# What is no place for an artifact.


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    rows = pa.table({"vector": column(vectors(300, 8))})
    return lance.write_dataset(rows, str(tmp_path / "data.lance"))


REFUSED = {
    "a file": ("notes.txt", "is a file"),
    "a dataset": ("data.lance", "is the Lance dataset"),
    "in a dataset": ("data.lance/artifact", r"Lance dataset .*data\.lance, or lies inside"),
    "deep in a dataset": ("data.lance/data/x/y", r"Lance dataset .*data\.lance, or lies inside"),
    "in a dataset by a link": ("link/artifact", r"Lance dataset .*link, or lies inside"),
    "deeper in a dataset by a link": ("deep/x", r"Lance dataset .*data\.lance, or lies inside"),
    "a folder with a file": ("full", r"notes\.txt"),
    "a folder with a folder": ("folders", "mine/"),
    "a folder that contains itself": ("loop", "self"),
    "files like ours": ("like", r"metadata2024\.lance.*partitions/bucket-7\.lance"),
    "another program's manifest": ("web", "not of an artifact"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("form", ["path", "uri", "relative"])
@pytest.mark.usefixtures("dataset")
def test_places_that_are_refused(
    case: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, message = REFUSED[case]
    for file in (
        "notes.txt",
        "full/notes.txt",
        "folders/mine/x",
        "like/metadata2024.lance",
        "web/manifest.json",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / "like/partitions").mkdir()
    (tmp_path / "like/partitions/bucket-7.lance").write_text("mine")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/self").symlink_to(".")
    (tmp_path / "link").symlink_to("data.lance")
    (tmp_path / "deep").symlink_to("data.lance/data")
    monkeypatch.chdir(tmp_path)
    uri = {"path": str(tmp_path / name), "uri": f"file://{tmp_path}/{name}", "relative": name}[form]
    before = tree(tmp_path)
    with pytest.raises(la.InvalidInputError, match=message):
        builder(uri, overwrite=True)
    assert tree(tmp_path) == before


def test_a_refusal_names_some_of_what_is_there(tmp_path: Path) -> None:
    for n in range(9):
        (tmp_path / f"file{n}").touch()
    with pytest.raises(la.InvalidInputError, match=r"file0, .*file4 and 4 more.*new or empty folder"):
        builder(tmp_path)


def test_create_index_refuses_the_dataset_as_a_target(dataset: Any, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for uri in (dataset.uri, f"{dataset.uri}/artifact"):
        with pytest.raises(la.InvalidInputError, match="is the dataset"):
            la.create_index(dataset, "vector", num_partitions=2, num_sub_vectors=2, artifact_uri=uri)
    assert tree(tmp_path) == before


def test_a_folder_in_memory_with_other_things() -> None:
    with builder("memory://refused/a/b") as made:
        made.append_batch(table(1))
    with pytest.raises(la.InvalidInputError, match="b/"):
        builder("memory://refused/a")
    assert la.Artifact.open("memory://refused/a/b").verify().ok


@pytest.mark.parametrize("how", ["new", "empty", "nested", "leftovers", "here"])
def test_places_that_are_fine(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x/y/a" if how == "nested" else tmp_path / "a"
    if how in ("empty", "here"):
        path.mkdir()
    elif how == "leftovers":
        attempt_of_another_machine(path, TAG)
    monkeypatch.chdir(path if how == "here" else tmp_path)
    filled("." if how == "here" else path, 1).finish()
    assert is_artifact_of(path, 1)


def test_files_that_appear_meanwhile_are_never_touched(tmp_path: Path) -> None:
    mine = [
        "notes.txt",
        "metadata2024.lance",
        "metadata-mine.lance",
        "partitions/bucket-7.lance",
        "x/bucket-00001.lance",
    ]
    for end in ("finish", "abort", "overwrite"):
        path = tmp_path / end
        if end == "overwrite":
            filled(path, 2).finish()
        made = filled(path, 1, overwrite=end == "overwrite")
        for name in mine:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("mine")
        (path / "self").symlink_to(".")
        getattr(made, "abort" if end == "abort" else "finish")()
        assert all((path / name).read_text() == "mine" for name in mine)
        (path / "self").unlink()
        assert set(leftovers(path)) == {*mine, *([] if end == "abort" else named(path))}


def test_a_store_without_conditional_writes(tmp_path: Path) -> None:
    """It can take a new artifact (put-if-absent), but replacing one could destroy another writer's: refused at the start."""
    uri = f"file-object-store://{tmp_path}/a"
    filled(uri, 1).finish()
    before = tree(tmp_path)
    with pytest.raises(la.InvalidInputError, match=r"overwrite=True.*conditional"):
        builder(uri, overwrite=True)
    assert tree(tmp_path) == before
    assert la.Artifact.open(uri).verify().ok


# Whose model it is.


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_of_another_artifact_is_not_adopted(when: str, tmp_path: Path) -> None:
    model = a_model()
    other = la.PartitionArtifactBuilder(tmp_path / "other", model)
    other.finish()
    path = tmp_path / "a"
    if when == "before":
        path.mkdir()
        shutil.copy(tmp_path / "other/metadata.lance", path)
    made = filled(path, 1)
    made.finish()
    if when == "after":
        shutil.copy(tmp_path / "other/metadata.lance", path)
    assert (path / "metadata.lance").exists()
    artifact = la.Artifact.open(path)
    assert artifact.manifest["metadata_file"] is None and artifact.model is None
    assert artifact.verify().ok


def test_a_manifest_that_says_nothing_means_the_usual_model(tmp_path: Path) -> None:
    path = tmp_path / "a"
    model = a_model()
    la.PartitionArtifactBuilder(path, model).finish()
    manifest = json.loads((path / "manifest.json").read_text())
    least = {key: manifest[key] for key in ("version", "num_partitions", "partitions")}
    (path / "manifest.json").write_text(json.dumps(least))
    assert la.Artifact.open(path).model == model
    (path / "manifest.json").write_text(json.dumps({**least, "metadata_file": None}))
    assert la.Artifact.open(path).model is None


def test_a_model_without_a_file_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a"
    la.PartitionArtifactBuilder(path, a_model()).finish()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "metadata_file": None}))
    with pytest.raises(la.CorruptArtifactError, match="metadata_file is null"):
        la.Artifact.open(path)


def test_a_model_of_another_fingerprint_is_corrupt(tmp_path: Path) -> None:
    for seed in range(2):
        la.PartitionArtifactBuilder(tmp_path / f"a{seed}", a_model(seed)).finish()
    shutil.copy(tmp_path / "a0/metadata.lance", tmp_path / "a1")
    with pytest.raises(la.CorruptArtifactError):
        la.Artifact.open(tmp_path / "a1")


# Where it is.


@pytest.mark.parametrize("given", ["rel/a", "./rel/../rel/a/", "rel/ä #1%20?"])
def test_a_relative_path_and_a_changed_directory(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    path = here / "rel" / ("a" if given.endswith(("a", "a/")) else "ä #1%20?")
    made = filled(given, 1)
    assert made.uri == str(path)
    monkeypatch.chdir(there)
    artifact = made.finish()
    assert artifact.uri == str(path) and leftovers(there) == []
    assert is_artifact_of(path, 1)
    monkeypatch.chdir(here)
    opened = la.Artifact.open(given)
    pickled = pickle.dumps(opened)
    monkeypatch.chdir(there)
    assert opened.verify().ok
    assert ids(pickle.loads(pickled)) == ids(artifact)
    again = filled(path, 2, overwrite=True)
    again.abort()
    assert is_artifact_of(path, 1)


@pytest.mark.parametrize("place", ["memory://container:pass-word@shown/a", "file://{}/a"])
def test_the_true_uri_is_kept_and_secrets_are_not_shown(place: str, tmp_path: Path) -> None:
    uri = place.format(tmp_path) + "?sig=signa-ture&ddbTableName=table"
    made = filled(uri, 1)
    artifact = made.finish()
    for shown in (made.uri, repr(made), artifact.uri, repr(artifact), repr(artifact.manifest)):
        assert "pass-word" not in shown and "signa-ture" not in shown
    for shown in (made.uri, artifact.uri):
        assert "ddbTableName=table" in shown and ("container:***@" in shown or "file://" in shown)
    with pytest.raises(la.ArtifactExistsError) as refused:
        builder(uri)
    assert "pass-word" not in str(refused.value) and "signa-ture" not in str(refused.value)
    _, (kept, _options) = artifact.__reduce__()
    assert kept == uri
    assert ids(pickle.loads(pickle.dumps(artifact))) == ids(artifact)


def test_errors_on_the_way_to_a_store_keep_secrets() -> None:
    for uri in (
        "nosuch://user:pass-word@host/a?sig=signa-ture",
        "s3://user:pass-word@/a?sig=signa-ture",
        "s3://user:pass/pass-word@bucket/a?sig=signa-ture",
    ):
        with pytest.raises(la.LanceArtifactError) as failed:
            la.Artifact.open(uri)
        assert "pass-word" not in str(failed.value) and "signa-ture" not in str(failed.value)


def test_what_looks_like_a_uri_and_is_none_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("s3://buck et/a", "s3://bucket:port/a", "az://"):
        with pytest.raises(la.LanceArtifactError, match="artifact_uri"):
            builder(uri)
    assert leftovers(tmp_path) == []


SYNCED = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/syscall.h>
int fsync(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    FILE *log = fopen(getenv("SYNCED"), "a");
    if (n > 0 && log) { path[n] = 0; fprintf(log, "%s\n", path); }
    if (log) fclose(log);
    return (int) syscall(SYS_fsync, fd);
}
"""


@pytest.mark.parametrize("sync", [True, False])
def test_new_folders_are_synced_into_their_parents(sync: bool, tmp_path: Path) -> None:
    (tmp_path / "sync.c").write_text(SYNCED)
    library = tmp_path / "sync.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "sync.c"], check=True)
    (tmp_path / "old").mkdir()
    path = tmp_path / "old/new/newer/a"
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import encoded
import lance_artifact as la
with la.PartitionArtifactBuilder({str(path)!r}, num_partitions={K}, pq_code_width={WIDTH}, sync={sync}) as made:
    made.append_batch(encoded(100, {K}, {WIDTH}))
"""
    log = tmp_path / "log"
    log.touch()
    environment = {**os.environ, "LD_PRELOAD": str(library), "SYNCED": str(log)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    synced = log.read_text().splitlines()
    if not sync:
        assert not [line for line in synced if line.startswith(str(tmp_path))]
        return
    folders = [path, path / "partitions", path.parent, path.parent.parent, tmp_path / "old"]
    assert {str(folder) for folder in folders} <= set(synced)
    assert str(tmp_path) not in synced
    # Names are durable before the manifest is.
    last_parent = max(synced.index(str(folder)) for folder in folders)
    assert synced.index(str(path / "partitions")) <= last_parent < len(synced) - 1
    assert synced[-1] == str(path)


def test_an_interrupt_while_claiming_leaves_no_claim(tmp_path: Path) -> None:
    """Ctrl-C is answered at once; what was under way in the target is wound up behind it."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import fcntl, os, signal, threading, time
import lance_artifact as la
where = {str(tmp_path / "a")!r}
with la.PartitionArtifactBuilder(where, num_partitions=2, pq_code_width=1):
    pass
before = sorted(os.listdir(where))
lock = os.open(where + "/.lance-artifact-lock", os.O_CREAT | os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_EX)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    la.PartitionArtifactBuilder(where, num_partitions=2, pq_code_width=1, overwrite=True)
except KeyboardInterrupt:
    os.close(lock)
    for _ in range(200):
        if sorted(os.listdir(where)) == before:
            sys.exit(42)
        time.sleep(0.05)
    sys.exit(str(os.listdir(where)))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 42, run.stderr
    assert la.Artifact.open(tmp_path / "a").verify().ok
