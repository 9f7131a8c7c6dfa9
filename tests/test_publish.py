"""The end of a build: publishing that fails and is tried again, interrupts, and what is on the disk then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lance_artifact as la
from conftest import LINUX, leftovers
from targets import (
    WIDTH,
    K,
    named,
)

FULL = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import pathlib, resource, signal, threading, time
from conftest import encoded
import lance_artifact as la
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def filled(name):
    made = la.PartitionArtifactBuilder(sys.argv[1] + name, num_partitions=4000, pq_code_width=4, num_buckets=2)
    made.append_batch(encoded(500, 4000, 4))
    return made
def fails(error, texts, what, *arguments, **options):
    try:
        what(*arguments, **options)
    except error as raised:
        assert all(text in str(raised) for text in texts), raised
    else:
        raise AssertionError(error)
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
    fails(la.StorageError, ["finish() again", "not published"], made.finish, rows_seen=510, rows_dropped={"null": 10})
    fails(la.InvalidInputError, ["finish() again"], made.append_batch, encoded(1, 4000, 4))
    go_on()
    fails(la.InvalidInputError, ["cannot change"], made.finish, rows_seen=511, rows_dropped={"null": 11})
    assert made.finish().manifest["rows"] == {"seen": 510, "written": 500, "dropped": {"null": 10}}
    done.append("again")
def block():
    made = filled("block")
    def use():
        with made:
            pass
    fails(la.StorageError, [], use)
    go_on()
    assert made.finish().num_rows == 500 and made.artifact.num_rows == 500
    done.append("block")
def inside():
    made = filled("inside")
    def use():
        with made:
            made.finish(rows_seen=501, rows_dropped={"null": 1})
    fails(la.StorageError, ["finish() again"], use)
    go_on()
    assert made.finish().manifest["rows"]["dropped"] == {"null": 1}
    done.append("inside")
def gone():
    made = filled("gone")
    fails(la.StorageError, [], made.finish)
    made.abort()
    fails(la.InvalidInputError, ["aborted"], made.finish)
    go_on()
    done.append("gone")
def removed():
    made = filled("removed")
    fails(la.StorageError, [], made.finish)
    next(pathlib.Path(sys.argv[1], "removed/partitions").glob("*.lance")).unlink()
    go_on()
    fails(la.CommitConflictError, ["is gone"], made.finish)
    made.abort()
    done.append("removed")
failed, ready, done = threading.Barrier(6), threading.Event(), []
def go_on():
    failed.wait(30)
    ready.wait(30)
limit(1 << 15)
threads = [threading.Thread(target=work) for work in (again, block, inside, gone, removed)]
for thread in threads: thread.start()
failed.wait(30)
limit(resource.RLIM_INFINITY)
ready.set()
for thread in threads: thread.join()
assert sorted(done) == ["again", "block", "gone", "inside", "removed"], done
""",
        tmp_path,
    )
    for name in ("again", "block", "inside"):
        assert la.Artifact.open(tmp_path / name).verify().ok
        assert leftovers(tmp_path / name) == named(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "block", "inside"]


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


def preloaded(source: str, folder: Path) -> str:
    """A library that stands before the system's functions."""
    (folder / "preloaded.c").write_text(source)
    library = folder / "preloaded.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "preloaded.c"], check=True)
    return str(library)


@LINUX
@pytest.mark.parametrize("sync", [True, False])
def test_new_folders_are_synced_into_their_parents(sync: bool, tmp_path: Path) -> None:
    library = preloaded(SYNCED, tmp_path)
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
    environment = {**os.environ, "LD_PRELOAD": library, "SYNCED": str(log)}
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
    """Ctrl-C is answered in seconds, also where the target takes longer; that is wound up behind it."""
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


SLOW_FOLDERS = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int mkdir(const char *path, mode_t mode) {
    size_t length = strlen(path);
    int slow = length > 5 && strcmp(path + length - 5, "/slow") == 0;
    if (slow) usleep(500 * 1000);
    int made = (int) syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    if (slow) usleep(500 * 1000);
    return made;
}
"""

INTERRUPTED = """
import os, shutil, signal, sys, threading, time
import lance_artifact as la
folder = sys.argv[1]
os.mkdir(folder)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    la.PartitionArtifactBuilder(folder + "/slow", num_partitions=2, pq_code_width=1)
except KeyboardInterrupt:
    assert os.listdir(folder) == [], list(os.walk(folder))
    shutil.rmtree(folder)
    time.sleep(1.5)
    sys.exit(42 if not os.path.exists(folder) else f"{folder} is there again: {os.listdir(folder)}")
"""

EXITING = """
import os, sys, threading, time
import lance_artifact as la
folder = sys.argv[1]
os.mkdir(folder)
made = lambda: la.PartitionArtifactBuilder(folder + "/slow", num_partitions=2, pq_code_width=1)
threading.Thread(target=made, daemon=True).start()
time.sleep(0.7)
sys.exit(42)
"""


@LINUX
@pytest.mark.parametrize("script", [INTERRUPTED, EXITING], ids=["interrupt", "exit"])
def test_nothing_appears_behind_a_builder_that_was_not_made(script: str, tmp_path: Path) -> None:
    """A builder is interrupted while its folder is made: once that is told, nothing is there, and nothing comes."""
    folder = tmp_path / "scratch"
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, "LD_PRELOAD": preloaded(SLOW_FOLDERS, tmp_path)},
    )  # fmt: skip
    assert run.returncode == 42, run.stderr
    assert list(tmp_path.glob("scratch/*")) == []
